"""The codec against diffusers' own VAE calls and its scale."""

import pytest
import torch
from diffusers import AutoencoderKL

from moa_train.latents import LatentCodec


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.25,
    )


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 24) * 2 - 1


def test_latents_are_scaled_samples_of_the_posterior(vae, pixels):
    codec = LatentCodec(vae)
    noise = torch.randn(2, *codec.latent_shape(16, 24))
    posterior = vae.encode(pixels).latent_dist
    expected = 0.25 * (posterior.mean + posterior.std * noise)
    torch.testing.assert_close(codec.encode(pixels, noise), expected)
    torch.testing.assert_close(codec.sample(codec.moments(pixels), noise), expected)
    torch.testing.assert_close(codec.encode(pixels, torch.zeros_like(noise)), 0.25 * posterior.mode())


def test_decoding_undoes_the_scale(vae, pixels):
    codec = LatentCodec(vae)
    z = torch.randn(2, 4, 4, 6)
    assert torch.equal(codec.decode(z), vae.decode(z / 0.25).sample)
    assert codec.decode(z).shape == pixels.shape


def test_the_codec_is_frozen_and_in_evaluation_mode(vae, pixels):
    codec = LatentCodec(vae).train()
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert not codec.encode(pixels.requires_grad_(), torch.zeros(2, 4, 4, 6)).requires_grad


@pytest.mark.parametrize("size", [(16, 22), (15, 16)])
def test_sizes_that_the_vae_cannot_halve_are_refused(vae, size):
    with pytest.raises(ValueError, match="multiples of 4"):
        LatentCodec(vae).latent_shape(*size)
