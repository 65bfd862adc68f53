"""The schedule against diffusers' DDPMScheduler and closed forms; keyed randomness against its promises."""

import pytest
import torch
from diffusers import DDPMScheduler

from moa_train.diffusion import LATENT, NOISE, TIMESTEP, NoiseSchedule, keyed_noise, keyed_timesteps, mix

CONFIGS = {
    "sd15": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "sd21": {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "num_train_timesteps": 500},
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "given": {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
}


def random_case(schedule, b=5):
    generator = torch.Generator().manual_seed(1)
    z, noise = torch.randn(2, b, 4, 3, 2, generator=generator)
    t = torch.linspace(0, schedule.steps - 1, b).long()
    return z, noise, t


@pytest.mark.parametrize("name", CONFIGS)
def test_noising_and_targets_equal_those_of_diffusers(name):
    reference = DDPMScheduler(**CONFIGS[name])
    schedule = NoiseSchedule.from_config(reference.config)
    z, noise, t = random_case(schedule)
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=1e-5, atol=1e-6)
    close = {"rtol": 1e-4, "atol": 3e-5}  # diffusers rounds once more, from alpha_bar to betas and back
    torch.testing.assert_close(schedule.add_noise(z, noise, t), reference.add_noise(z, noise, t), **close)
    expected = noise if schedule.prediction_type == "epsilon" else reference.get_velocity(z, noise, t)
    torch.testing.assert_close(schedule.target(z, noise, t), expected, **close)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_original_follows_from_a_perfect_prediction(prediction_type):
    schedule = NoiseSchedule.from_config({**CONFIGS["sd15"], "prediction_type": prediction_type})
    z, noise, t = random_case(schedule)
    z_t = schedule.add_noise(z, noise, t)
    recovered = schedule.predicted_original(z_t, schedule.target(z, noise, t), t)
    torch.testing.assert_close(recovered, z, rtol=1e-3, atol=1e-4)


def test_snr_and_its_clipped_weights_follow_their_definitions():
    alphas_cumprod = torch.tensor([0.99, 0.9, 0.5, 0.1, 0.0])
    t = torch.arange(5)
    ratio = [a / (1 - a) for a in (0.99, 0.9, 0.5, 0.1)]
    epsilon = NoiseSchedule(alphas_cumprod, "epsilon")
    velocity = NoiseSchedule(alphas_cumprod, "v_prediction")
    torch.testing.assert_close(epsilon.snr(t), torch.tensor([*ratio, 0.0]), rtol=1e-4, atol=0)
    expected = [min(r, 5) / r for r in ratio] + [1.0]
    torch.testing.assert_close(epsilon.min_snr_weight(t, 5.0), torch.tensor(expected), rtol=1e-4, atol=0)
    expected = [min(r, 5) / (r + 1) for r in ratio] + [0.0]
    torch.testing.assert_close(velocity.min_snr_weight(t, 5.0), torch.tensor(expected), rtol=1e-4, atol=0)


def test_a_zero_snr_schedule_ends_in_pure_noise():
    schedule = NoiseSchedule.from_config(CONFIGS["zero_snr"])
    assert schedule.alphas_cumprod[-1] == 0
    assert (
        schedule.alphas_cumprod[0]
        == NoiseSchedule.from_config(CONFIGS["zero_snr"] | {"rescale_betas_zero_snr": False}).alphas_cumprod[0]
    )


def test_half_precision_stays_half_and_is_computed_in_full():
    schedule = NoiseSchedule.from_config(CONFIGS["sd15"])
    z, noise, t = random_case(schedule)
    half = schedule.add_noise(z.bfloat16(), noise.bfloat16(), t)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, schedule.add_noise(z.bfloat16().float(), noise.bfloat16().float(), t).bfloat16())


@pytest.mark.parametrize("config", [{"prediction_type": "sample"}, {"beta_schedule": "sigmoid"}])
def test_unknown_schedules_and_predictions_are_refused(config):
    with pytest.raises((ValueError, TypeError)):
        NoiseSchedule.from_config(config)


def test_noise_of_a_key_does_not_depend_on_its_batch():
    keys = torch.tensor([5, 2**62 + 3, 7])
    together = keyed_noise(keys, (4, 8, 8), NOISE)
    for index, key in enumerate(keys):
        assert torch.equal(together[index], keyed_noise(key[None], (4, 8, 8), NOISE)[0])
    assert torch.equal(together.flip(0), keyed_noise(keys.flip(0), (4, 8, 8), NOISE))
    assert keyed_timesteps(keys, 1000)[1] == keyed_timesteps(keys[1:], 1000)[0]


def test_noise_is_normal_and_uncorrelated_between_neighbouring_keys_and_streams():
    keys = torch.arange(64)
    noise = keyed_noise(keys, (1024,), NOISE).flatten(1)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    correlation = torch.corrcoef(torch.cat([noise, keyed_noise(keys, (1024,), LATENT)]))
    assert (correlation - torch.eye(128)).abs().max() < 0.2


def test_timesteps_are_uniform_and_in_range():
    t = keyed_timesteps(torch.arange(20_000), 10)
    counts = t.bincount(minlength=10)
    assert counts.shape == (10,)
    chi_square = ((counts - 2000.0).square() / 2000).sum()
    assert chi_square < 28  # 9 degrees of freedom, p = 0.001


def test_seeds_of_keys_and_streams_do_not_collide():
    seeds = {mix(key, stream) for key in range(2000) for stream in (NOISE, LATENT, TIMESTEP)}
    assert len(seeds) == 6000
    assert mix(2**62, 0) % 2**32 != mix(0, 0) % 2**32
