"""Each loss against numpy, at its closed forms, with empty masks, and in half precision."""

import numpy as np
import pytest
import torch

from moa_train.losses import (
    masked_reconstruction,
    mean_prior_routing,
    mean_subject_attention,
    object_loss,
    plain_reconstruction,
    router_loss,
)
from moa_train.symbols import Observations

B, S, C, H, W = 3, 2, 4, 5, 6


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, B, C, H, W, generator=generator)
    masks = (torch.rand(B, S, H, W, generator=generator) > 0.6).float()
    masks[0, 0, 0] = 0.3  # masks at latent resolution are soft
    masks[2] = 0
    return {
        "prediction": prediction,
        "target": target,
        "masks": masks,
        "foreground": masks.amax(1, keepdim=True),
        "routing": torch.rand(B, 1, H, W, generator=generator),
        "attention": torch.rand(B, S, H, W, generator=generator),
        "present": torch.tensor([[True, True], [True, False], [False, False]]),
    }


def numpy_of(case):
    return {name: value.numpy().astype(np.float64) for name, value in case.items()}


def test_masked_reconstruction_is_the_mean_over_the_mask(case):
    n = numpy_of(case)
    expected = []
    for b in range(B):
        total, area = 0.0, 0.0
        for y in range(H):
            for x in range(W):
                m = n["foreground"][b, 0, y, x]
                total += m * ((n["target"][b, :, y, x] - n["prediction"][b, :, y, x]) ** 2).mean()
                area += m
        expected.append(total / area if area else 0.0)
    result = masked_reconstruction(case["prediction"], case["target"], case["foreground"])
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)
    assert result[2] == 0


def test_masked_reconstruction_ignores_the_background_and_the_size_of_the_subject(case):
    mask = torch.zeros(B, 1, H, W)
    mask[:, :, 1, 2] = 1
    error = masked_reconstruction(case["prediction"], case["prediction"] + 2 * mask + 9 * (1 - mask), mask)
    torch.testing.assert_close(error, torch.full((B,), 4.0))


def test_a_full_mask_gives_the_plain_mean(case):
    plain = plain_reconstruction(case["prediction"], case["target"])
    n = numpy_of(case)
    np.testing.assert_allclose(plain.numpy(), ((n["target"] - n["prediction"]) ** 2).mean((1, 2, 3)), rtol=1e-5)
    full = masked_reconstruction(case["prediction"], case["target"], torch.ones(B, 1, H, W))
    torch.testing.assert_close(full, plain)


def test_router_loss_is_the_mean_square_of_what_the_background_takes_from_the_personalized_expert(case):
    n = numpy_of(case)
    expected = (((1 - n["foreground"]) * (1 - n["routing"])) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(router_loss(case["routing"], case["foreground"]).numpy(), expected, rtol=1e-5)


def test_router_loss_leaves_the_subject_free(case):
    routing = case["routing"].clone().requires_grad_()
    router_loss(routing, case["foreground"]).sum().backward()
    inside = case["foreground"] == 1
    assert (routing.grad[inside] == 0).all()
    assert (routing.grad[case["foreground"] == 0] < 0).all()


@pytest.mark.parametrize("kind", ["masked_l2", "balanced_l1"])
def test_object_loss_is_the_mean_over_present_subjects(case, kind):
    n = numpy_of(case)
    expected = []
    for b in range(B):
        losses = []
        for s in range(S):
            a, m = n["attention"][b, s], n["masks"][b, s]
            if n["present"][b, s] and kind == "masked_l2":
                losses.append((((1 - m) * a) ** 2).mean())
            elif n["present"][b, s]:
                losses.append((a * (1 - m)).sum() / (1 - m).sum() - (a * m).sum() / m.sum())
        expected.append(sum(losses) / len(losses) if losses else 0.0)
    result = object_loss(case["attention"], case["masks"], case["present"], kind)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


def test_balanced_object_loss_is_minus_one_for_perfect_attention(case):
    present = torch.tensor([[True, True], [True, True], [False, False]])
    masks = (case["masks"] > 0.5).float()
    result = object_loss(masks, masks, present, "balanced_l1")
    torch.testing.assert_close(result, torch.tensor([-1.0, -1.0, 0.0]))


def test_an_unknown_object_loss_is_refused(case):
    with pytest.raises(Exception, match="l3"):
        object_loss(case["attention"], case["masks"], case["present"], "l3")


@pytest.mark.parametrize("mask_value", [0.0, 1.0])
def test_empty_and_full_masks_give_finite_losses_and_gradients(case, mask_value):
    attention, prediction, routing = (
        case[name].clone().requires_grad_() for name in ("attention", "prediction", "routing")
    )
    masks, foreground = torch.full((B, S, H, W), mask_value), torch.full((B, 1, H, W), mask_value)
    losses = [
        masked_reconstruction(prediction, case["target"], foreground),
        router_loss(routing, foreground),
        object_loss(attention, masks, case["present"], "masked_l2"),
        object_loss(attention, masks, case["present"], "balanced_l1"),
    ]
    sum(loss.sum() for loss in losses).backward()
    assert all(loss.isfinite().all() for loss in losses)
    assert all(leaf.grad.isfinite().all() for leaf in (attention, prediction, routing))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_reduced_in_fp32(case, dtype):
    low = {name: value if value.dtype == torch.bool else value.to(dtype) for name, value in case.items()}
    for function, names in (
        (masked_reconstruction, ("prediction", "target", "foreground")),
        (router_loss, ("routing", "foreground")),
        (object_loss, ("attention", "masks", "present")),
    ):
        result = function(*(low[name] for name in names))
        assert result.dtype == torch.float32
        exact = function(*(low[name] if name == "present" else low[name].double() for name in names))
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["masked_l2", "balanced_l1"])
def test_gradients_equal_finite_differences(case, kind):
    def total(prediction, routing, attention):
        d = {name: value if value.dtype == torch.bool else value.double() for name, value in case.items()}
        return (
            masked_reconstruction(prediction, d["target"], d["foreground"])
            + router_loss(routing, d["foreground"])
            + object_loss(attention, d["masks"], d["present"], kind)
        )

    leaves = [case[name].double().requires_grad_() for name in ("prediction", "routing", "attention")]
    assert torch.autograd.gradcheck(total, leaves)


def observations(layers):
    """Constant maps: layer i has R_0 = values[i] and A_s = values[i] / (s + 1)."""
    routing, attention, sizes = {}, {}, {}
    for name, (value, (h, w)) in layers.items():
        prior = torch.full((B, h * w), value)
        routing[name] = torch.stack([prior, 1 - prior], dim=-1)
        if name.endswith("attn2"):
            attention[name] = torch.stack([prior / (s + 1) for s in range(S)], dim=1)
        sizes[name] = (h, w)
    return Observations(routing, attention, sizes)


LAYERS = {
    "0.attn1": (0.9, (8, 8)),
    "0.attn2": (0.9, (8, 8)),
    "1.attn1": (0.2, (4, 4)),
    "1.attn2": (0.4, (2, 3)),
    "2.attn1": (0.9, (8, 8)),
    "2.attn2": (0.9, (8, 8)),
}


def test_mean_prior_routing_leaves_out_the_first_and_last_layers():
    result = mean_prior_routing(observations(LAYERS), (H, W))
    torch.testing.assert_close(result, torch.full((B, 1, H, W), 0.3))
    everything = mean_prior_routing(observations(LAYERS), (H, W), skip_first=0, skip_last=0)
    torch.testing.assert_close(everything, torch.full((B, 1, H, W), (4 * 0.9 + 0.2 + 0.4) / 6))


def test_mean_subject_attention_uses_cross_attention_layers_only():
    result = mean_subject_attention(observations(LAYERS), (H, W))
    expected = torch.tensor([1.0, 0.5])[None, :, None, None].expand(B, S, H, W) * (0.9 + 0.4 + 0.9) / 3
    torch.testing.assert_close(result, expected)


def test_maps_are_rows_of_pixels_from_the_top_left():
    prior = torch.arange(6.0)[None].expand(B, 6)
    seen = Observations({"a": torch.stack([prior, prior], -1)}, {}, {"a": (2, 3)})
    result = mean_prior_routing(seen, (2, 3), 0, 0)
    assert result[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_observations_without_usable_layers_are_refused():
    with pytest.raises(ValueError, match="6 layers leave none"):
        mean_prior_routing(observations(LAYERS), (H, W), skip_first=3, skip_last=3)
    with pytest.raises(ValueError, match="record=True"):
        mean_subject_attention(Observations({}, {}, {}), (H, W))
