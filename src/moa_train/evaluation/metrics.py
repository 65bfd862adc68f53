"""What the tables measure: does the router find the subject, who is in the picture, does the context stay.

Every function takes tensors and returns one value a picture; the caller averages. Pictures are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from moa_train.inference.regions import otsu_threshold

Interval = tuple[float, float]


def iou(first: Bool[Tensor, "b h w"], second: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Intersection over union; 1 where both are empty."""
    intersection = reduce((first & second).float(), "b h w -> b", "sum")
    union = reduce((first | second).float(), "b h w -> b", "sum")
    return torch.where(union > 0, intersection / union.clamp_min(1.0), torch.ones_like(union))


def routing_iou(routing: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h_mask w_mask"]) -> Float[Tensor, " b"]:
    """IoU of {R_1 above Otsu's threshold} and the subject's mask, at the mask's resolution (bilinear).

    Args:
        routing: R_1, the personalized expert's share, averaged over steps and layers.
        mask: where the subject is, found without the router.
    """
    resized = functional.interpolate(routing.float()[:, None], mask.shape[-2:], mode="bilinear")[:, 0]
    return iou(resized > otsu_threshold(resized)[:, None, None], mask)


def cosine(first: Float[Tensor, "b i"], second: Float[Tensor, "b i"]) -> Float[Tensor, " b"]:
    """Cosine between two identity vectors, row by row; 0 where a vector is zero (no person was found)."""
    return functional.cosine_similarity(first.float(), second.float(), dim=1, eps=1e-12)


def context_difference(
    first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"], people: Bool[Tensor, "b h w"]
) -> Float[Tensor, " b"]:
    """Mean squared difference of two pictures where there are no people in either; 0 if there are people everywhere.

    Args:
        first, second: pictures in [0, 1].
        people: the union of both pictures' people.
    """
    outside = (~people).float()
    squared = reduce((first.float() - second.float()) ** 2, "b c h w -> b h w", "mean")
    return reduce(squared * outside, "b h w -> b", "sum") / reduce(outside, "b h w -> b", "sum").clamp_min(1.0)


def correct(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the most probable class is the label, else 0."""
    return (logits.argmax(dim=1) == labels).float()


def diversity(pictures: Float[Tensor, "b g 3 h w"]) -> Float[Tensor, " b"]:
    """Mean squared difference over all pairs of a group's pictures (they differ in their seeds); 0 for one picture."""
    count = pictures.shape[1]
    if count < 2:
        return pictures.new_zeros(pictures.shape[0])
    # sum over pairs |x_i - x_j|^2 = count * sum |x_i - mean|^2
    spread = (pictures.float() - pictures.float().mean(dim=1, keepdim=True)) ** 2
    return reduce(spread, "b g c h w -> b", "mean") * 2.0 * count / (count - 1)


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[int], resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean, drawing whole groups (people): pictures of one person are not independent."""
    by_group: Mapping[int, list[float]] = {group: [] for group in groups}
    for value, group in zip(values, groups, strict=True):
        by_group[group].append(value)
    sums = np.array([sum(members) for members in by_group.values()])
    counts = np.array([len(members) for members in by_group.values()])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)
