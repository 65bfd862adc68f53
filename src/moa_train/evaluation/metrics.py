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
from torchmetrics.functional.image import structural_similarity_index_measure

from moa_train.inference.regions import dilate, otsu_threshold

Interval = tuple[float, float]

SSIM_RADIUS = 5
"""Pixels from the middle of a window to its edge; torchmetrics' Gaussian of sigma 1.5."""


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


def rank(vectors: Float[Tensor, "b i"], lineup: Float[Tensor, "n i"], truth: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Place (from 1 on) of the true identity among a line-up sorted by cosine.

    Equals count against it, so a zero vector (no person was found) comes last.
    """
    similarity = functional.normalize(vectors.float(), eps=1e-12) @ functional.normalize(lineup.float(), eps=1e-12).T
    return (similarity >= similarity.gather(1, truth[:, None])).sum(dim=1)


def context_difference(
    first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"], people: Bool[Tensor, "b h w"]
) -> Float[Tensor, " b"]:
    """Mean squared difference of two pictures where there are no people in either; 0 if there are people everywhere.

    Args:
        first, second: pictures in [0, 1].
        people: the union of both pictures' people.
    """
    squared = reduce((first.float() - second.float()) ** 2, "b c h w -> b h w", "mean")
    return _mean_outside(squared, people)


def context_ssim(
    first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"], people: Bool[Tensor, "b h w"]
) -> Float[Tensor, " b"]:
    """Structural similarity of two pictures where no window holds people; 1 if there is no such place.

    The map of Wang et al. 2004 (Gaussian windows of 11 pixels, sigma 1.5) of each channel, averaged. A place counts if
    its whole window lies outside `people`: what a person looks like never reaches the mean.
    """
    _, similarity = structural_similarity_index_measure(
        first.float(), second.float(), data_range=1.0, reduction="none", return_full_image=True
    )
    return 1.0 - _mean_outside(1.0 - reduce(similarity, "b c h w -> b h w", "mean"), dilate(people, SSIM_RADIUS))


def feature_difference(
    first: Sequence[Float[Tensor, "b _ _ _"]],
    second: Sequence[Float[Tensor, "b _ _ _"]],
    people: Bool[Tensor, "b h w"],
) -> Float[Tensor, " b"]:
    """1 - cosine of two pictures' features, averaged over the places outside people, then over the resolutions.

    A place of a coarse resolution counts if none of its pixels shows people.
    """
    levels = []
    for one, other in zip(first, second, strict=True):
        taken = functional.adaptive_max_pool2d(people.float()[:, None], one.shape[-2:])[:, 0] > 0.5
        levels.append(_mean_outside(1.0 - functional.cosine_similarity(one, other, dim=1, eps=1e-12), taken))
    return torch.stack(levels).mean(dim=0)


def _mean_outside(values: Float[Tensor, "b h w"], people: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Mean of a map outside people; 0 if there are people everywhere."""
    outside = (~people).float()
    return reduce(values * outside, "b h w -> b", "sum") / reduce(outside, "b h w -> b", "sum").clamp_min(1.0)


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


def centre_and_size(people: Bool[Tensor, "b h w"]) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b 1"]]:
    """Where a person stands and how large it is, in fractions of the picture's side; NaN where nobody is found.

    Returns:
        The mean (x, y) of its pixels' centres, and the square root of its share of the picture.
    """
    height, width = people.shape[-2:]
    weight = people.double()
    area = reduce(weight, "b h w -> b", "sum")
    x = reduce(weight, "b h w -> b w", "sum") @ ((torch.arange(width).double() + 0.5) / width)
    y = reduce(weight, "b h w -> b h", "sum") @ ((torch.arange(height).double() + 0.5) / height)
    size = torch.where(area > 0, (area / (height * width)).sqrt(), torch.nan)
    return (torch.stack([x, y], dim=1) / area[:, None]).float(), size[:, None].float()


def spread(points: Float[Tensor, "b g d"]) -> Float[Tensor, " b"]:
    """Mean distance over all pairs of a group's points (they differ in their seeds); pairs with a NaN do not count.

    Its mean does not depend on the number of seeds, as the standard deviation's would. NaN for a group without a pair.
    """
    first, second = torch.triu_indices(points.shape[1], points.shape[1], offset=1)
    return (points[:, first] - points[:, second]).norm(dim=2).nanmean(dim=1)


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
