"""Where the subject is in a picture, and how much two pictures differ there and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional


def otsu_threshold(maps: Float[Tensor, "b h w"], bins: int = 256) -> Float[Tensor, " b"]:
    """Otsu's threshold of each map: the cut between two histogram bins with the largest variance between the classes.

    It needs no choice of level, which a routing map's own range would make arbitrary. A constant map gets its value.
    """
    values = rearrange(maps.float(), "b h w -> b (h w)")
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    step = (high - low).clamp_min(torch.finfo(torch.float32).tiny) / bins
    index = ((values - low) / step).long().clamp_(0, bins - 1)
    share = functional.one_hot(index, bins).float().mean(dim=1)
    below = share.cumsum(dim=1)[:, :-1]
    moment = (share * torch.arange(bins, device=share.device)).cumsum(dim=1)
    between = (moment[:, -1:] * below - moment[:, :-1]) ** 2 / (below * (1.0 - below)).clamp_min(1e-12)
    best = torch.where(between >= between.amax(dim=1, keepdim=True) * (1.0 - 1e-6), 1.0, 0.0)
    # The middle of the maximum: it is flat where the histogram has a gap.
    middle = (best * torch.arange(bins - 1, device=best.device)).sum(dim=1) / best.sum(dim=1)
    return torch.where(high[:, 0] > low[:, 0], low[:, 0] + (middle + 1.0) * step[:, 0], low[:, 0])


def dilate(mask: Bool[Tensor, "b h w"], pixels: int) -> Bool[Tensor, "b h w"]:
    """The mask grown by `pixels` in each direction (a square of side 2 * pixels + 1)."""
    grown = functional.max_pool2d(mask.float()[:, None], 2 * pixels + 1, stride=1, padding=pixels)
    return grown[:, 0] > 0.5


def routed_region(routing: Float[Tensor, "b h w"], size: tuple[int, int]) -> Bool[Tensor, "rows columns"]:
    """What the router gives to the personalized expert in any of some pictures.

    The union of {R_1 above Otsu's threshold}, found at the picture's resolution (bilinear). A routing map is coarse:
    on the toy prior the region covers the person whole and half as much again.

    Args:
        routing: R_1, averaged over steps and layers.
        size: width and height of the pictures.
    """
    width, height = size
    resized = functional.interpolate(routing.float()[:, None], (height, width), mode="bilinear")[:, 0]
    return (resized > otsu_threshold(resized)[:, None, None]).any(dim=0)


@dataclass(frozen=True)
class Difference:
    """Mean squared difference of two pictures with values in [0, 1], inside the subject's region and outside it.

    background: None where the region is the whole picture.
    """

    subject: float
    background: float | None

    def rounded(self) -> dict[str, float | None]:
        """Both by name, to five decimals."""
        return {name: None if value is None else round(value, 5) for name, value in asdict(self).items()}


def difference(first: Image.Image, second: Image.Image, region: Bool[Tensor, "rows columns"]) -> Difference:
    """How much two pictures of equal size differ inside a region (0 where it is empty) and outside it.

    Raises:
        ValueError: pictures or region of different sizes.
    """
    if not first.size == second.size == (region.shape[1], region.shape[0]):
        raise ValueError(f"sizes differ: {first.size}, {second.size} and a region of {tuple(region.shape)[::-1]}")
    squared = ((_values(first) - _values(second)) ** 2).mean(axis=2)
    inside = region.numpy()
    return Difference(
        float(squared[inside].mean()) if inside.any() else 0.0,
        None if inside.all() else float(squared[~inside].mean()),
    )


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The mean of each part; of the background over those that have one."""
    backgrounds = [each.background for each in differences if each.background is not None]
    subject = float(np.mean([each.subject for each in differences]))
    return Difference(subject, float(np.mean(backgrounds)) if backgrounds else None)


def mean_squared_error(first: Image.Image, second: Image.Image) -> float:
    """Of two pictures of equal size, values in [0, 1]."""
    return float(((_values(first) - _values(second)) ** 2).mean())


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of equal size, in dB; infinite for equal ones."""
    error = mean_squared_error(first, second)
    return -10.0 * float(np.log10(error)) if error > 0 else float("inf")


def _values(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255.0
