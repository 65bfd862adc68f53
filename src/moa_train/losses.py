"""The three losses of MoA: masked reconstruction, router and object loss; pure, one value a sample, fp32 inside."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from moa_train.symbols import PRIOR, Observations

ObjectLoss = Literal["masked_l2", "balanced_l1"]


def _full(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _masked_mean(values: Float[Tensor, "*b h w"], mask: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """Mean of `values` under a soft mask; 0 with finite gradients where the mask is empty."""
    area = mask.sum((-2, -1))
    total = (values * mask).sum((-2, -1))
    return torch.where(area > 0, total / torch.where(area > 0, area, 1), 0)


def masked_reconstruction(
    prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, " b"]:
    """L_masked = mean over M of (target - prediction)^2, by each sample's own mask area; an empty mask gives 0."""
    error = reduce((_full(target) - _full(prediction)).square(), "b c h w -> b h w", "mean")
    return _masked_mean(error, _full(mask)[:, 0])


def plain_reconstruction(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean squared error over all elements of a sample."""
    return reduce((_full(target) - _full(prediction)).square(), "b c h w -> b", "mean")


def router_loss(prior_routing: Float[Tensor, "b 1 h w"], foreground: Float[Tensor, "b 1 h w"]) -> Float[Tensor, " b"]:
    """L_router = mean over pixels of ((1 - M) (1 - R_bar))^2: only the background is pulled to the prior."""
    return reduce(((1 - _full(foreground)) * (1 - _full(prior_routing))).square(), "b 1 h w -> b", "mean")


def object_loss(
    subject_attention: Float[Tensor, "b s h w"],
    subject_masks: Float[Tensor, "b s h w"],
    subject_present: Bool[Tensor, "b s"],
    kind: ObjectLoss = "masked_l2",
) -> Float[Tensor, " b"]:
    """Mean over the present subjects of one loss each; 0 for a sample without subjects.

    masked_l2: L_object, the mean over pixels of ((1 - M_s) A_s)^2.
    balanced_l1: mean of A_s over the background minus its mean over the subject (FastComposer, arXiv 2305.10431).
    """
    attention, mask = _full(subject_attention), _full(subject_masks)
    if kind == "masked_l2":
        loss = reduce(((1 - mask) * attention).square(), "b s h w -> b s", "mean")
    elif kind == "balanced_l1":
        loss = _masked_mean(attention, 1 - mask) - _masked_mean(attention, mask)
    else:
        raise ValueError(f"object loss {kind!r} is unknown: use masked_l2 or balanced_l1")
    present = subject_present.to(loss.dtype)
    return (loss * present).sum(1) / present.sum(1).clamp(min=1)


def _resized_mean(
    maps: list[Float[Tensor, "b s _n"]], sizes: list[tuple[int, int]], size: tuple[int, int]
) -> Float[Tensor, "b s h w"]:
    """Mean of maps of different layers, each resized to `size`."""
    resized = [
        F.interpolate(rearrange(_full(m), "b s (h w) -> b s h w", h=h, w=w), size, mode="bilinear", antialias=True)
        for m, (h, w) in zip(maps, sizes, strict=True)
    ]
    return torch.stack(resized).mean(0)


def mean_prior_routing(
    observations: Observations, size: tuple[int, int], skip_first: int = 2, skip_last: int = 2
) -> Float[Tensor, "b 1 h w"]:
    """R_bar: mean of R_0 over the attention layers, without the first and last ones, which carry low-level detail."""
    layers = list(observations.routing)
    kept = layers[skip_first : len(layers) - skip_last]
    if not kept:
        raise ValueError(f"{len(layers)} layers leave none after skip_first={skip_first} and skip_last={skip_last}")
    maps = [observations.routing[layer][:, None, :, PRIOR] for layer in kept]
    return _resized_mean(maps, [observations.sizes[layer] for layer in kept], size)


def mean_subject_attention(observations: Observations, size: tuple[int, int]) -> Float[Tensor, "b s h w"]:
    """A_s averaged over the cross-attention layers."""
    layers = list(observations.subject_attention)
    if not layers:
        raise ValueError("no subject attention was recorded: call the denoiser with record=True")
    maps = [observations.subject_attention[layer] for layer in layers]
    return _resized_mean(maps, [observations.sizes[layer] for layer in layers], size)
