"""The objective's weights and what is watched, against hand-made numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa_train.diffusion import NoiseSchedule
from moa_train.symbols import Batch, LossTerms, Observations
from moa_train.training.objective import (
    LossSettings,
    Masks,
    ObjectLoss,
    RouterLoss,
    compute_losses,
    draw_masked,
    watched,
    with_wrong_subject,
)


def make_batch(present, masks):
    present = torch.tensor(present)
    rows, slots = present.shape
    return Batch(
        pixels=torch.zeros(rows, 3, 4, 4),
        subject_masks=masks,
        subject_pixels=torch.zeros(rows, slots, 3, 2, 2),
        subject_present=present,
        token_ids=torch.zeros(rows, 5, dtype=torch.int64),
        subject_positions=torch.zeros(rows, slots, dtype=torch.int64),
        key=torch.arange(rows),
        sample=torch.arange(rows),
        caption=("",) * rows,
    )


def test_the_router_loss_waits_and_then_ramps_to_its_weight():
    router = RouterLoss(weight=0.03, warmup=0.5, ramp=0.2)
    weights = [router.weight_at(progress) for progress in (0.0, 0.49, 0.5, 0.6, 0.7, 1.0)]
    assert weights == pytest.approx([0, 0, 0, 0.015, 0.03, 0.03])


def test_without_warmup_and_ramp_the_router_loss_has_its_weight_at_once():
    assert RouterLoss(weight=0.01).weight_at(0.0) == 0.01


@pytest.mark.parametrize(("warmup", "ramp"), [(-0.1, 0.0), (0.0, -0.1), (0.8, 0.3)])
def test_a_warmup_outside_the_run_is_refused(warmup, ramp):
    with pytest.raises(ValueError, match=r"loss\.router\.warmup"):
        RouterLoss(warmup=warmup, ramp=ramp)


def test_the_total_is_the_mean_over_all_samples_of_the_weighted_terms():
    terms = LossTerms(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 4.0]), torch.tensor([10.0, 0.0]))
    settings = LossSettings(router=RouterLoss(weight=0.1), object=ObjectLoss(weight=0.01))
    assert settings.total(terms, 1.0).item() == pytest.approx((1 + 0.2 + 0.1 + 0.4) / 2)


def test_a_wrong_subject_is_the_next_samples_and_padding_stays():
    features = torch.arange(1.0, 7.0).reshape(3, 2, 1)
    present = torch.tensor([[True, True], [False, False], [True, False]])
    swapped = with_wrong_subject(features, present)[..., 0]
    # In order of slots: 1 (sample 0), 5 (sample 2), 2 (sample 0, second slot): each takes its predecessor's.
    assert swapped.tolist() == [[2.0, 5.0], [3.0, 4.0], [1.0, 6.0]]


@given(present=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_wrong_subjects_are_a_permutation_of_the_right_ones(present):
    mask = torch.tensor(present)
    features = torch.arange(float(mask.numel())).reshape(*mask.shape, 1)
    swapped = with_wrong_subject(features, mask)
    assert sorted(swapped[mask].flatten().tolist()) == sorted(features[mask].flatten().tolist())
    assert torch.equal(swapped[~mask], features[~mask])


def test_masked_draws_have_their_probability_and_depend_on_the_key_alone():
    keys = torch.arange(4000)
    drawn = draw_masked(keys, 0.3)
    assert drawn.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(draw_masked(keys.flip(0), 0.3), drawn.flip(0))


def test_the_error_counts_inside_the_subject_alone_until_the_masks_warm_up_is_over():
    settings = LossSettings(mask_probability=0.25, mask_warmup=0.6)
    assert [settings.at(progress).mask_probability for progress in (0.0, 0.59, 0.6, 1.0)] == [1.0, 1.0, 0.25, 0.25]
    assert LossSettings(mask_probability=0.25).at(0.0).mask_probability == 0.25
    with pytest.raises(ValueError, match=r"loss\.mask_warmup=1\.5"):
        LossSettings(mask_warmup=1.5)


def test_masks_at_latent_resolution_are_area_averages():
    mask = torch.zeros(1, 2, 4, 4)
    mask[0, 0, :2, :3] = 1
    mask[0, 1, 2:, :] = 1
    masks = Masks.of(make_batch([[True, True]], mask), (2, 2))
    assert masks.subjects[0, 0].tolist() == [[1.0, 0.5], [0.0, 0.0]]
    assert masks.foreground[0, 0].tolist() == [[1.0, 0.5], [1.0, 1.0]]


def test_routing_and_attention_are_watched_inside_and_outside_over_samples_with_a_subject():
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, :2] = 1
    batch = make_batch([[True], [False]], mask)
    prior = torch.tensor([[0.2, 0.4, 0.9, 0.7], [0.0, 0.0, 0.0, 0.0]])  # the second sample has no subject
    attention = torch.tensor([[[0.5, 0.3, 0.1, 0.0]], [[9.0, 9.0, 9.0, 9.0]]])
    routing = torch.stack([prior, 1 - prior], dim=-1)
    observations = Observations({"a": routing}, {"a": attention}, {"a": (2, 2)})
    shown = watched(observations, batch, Masks.of(batch, (2, 2)))
    assert {name: round(mean.item(), 5) for name, (mean, _) in shown.items()} == {
        "routing_inside": 0.3,
        "routing_outside": 0.8,
        "attention_inside": 0.4,
        "attention_outside": 0.05,
    }
    assert {int(number) for _, number in shown.values()} == {1}


def test_a_batch_without_subjects_is_watched_as_zero_and_not_as_nan():
    batch = make_batch([[False]], torch.zeros(1, 1, 4, 4))
    observations = Observations({"a": torch.full((1, 4, 2), 0.5)}, {"a": torch.zeros(1, 1, 4)}, {"a": (2, 2)})
    shown = watched(observations, batch, Masks.of(batch, (2, 2)))
    assert all(mean.item() == 0 and number == 0 for mean, number in shown.values())


def test_the_error_inside_the_subject_over_all_pixels_is_fastcomposers_sum():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1:3, :3] = 1
    batch = make_batch([[True], [False]], mask)
    prediction, target = torch.randn(2, 2, 3, 4, 4, generator=generator)
    terms = compute_losses(
        LossSettings(mask_probability=1.0, masked_mean="picture"),
        NoiseSchedule.from_config({}),
        batch,
        Masks.of(batch, (4, 4)),
        torch.tensor([3, 700]),
        prediction,
        target,
        Observations({}, {}, {}),
    )
    expected = ((prediction - target).square() * mask).sum((1, 2, 3)) / prediction[0].numel()
    assert torch.allclose(terms.masked, expected)
