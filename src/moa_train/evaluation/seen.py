"""What the probe sees in pictures: who is there, where, in which context; found without the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from moa_train.evaluation import metrics
from moa_train.inference.regions import dilate
from moa_train.prior.probe import SIZE, Probe, crop_people

_GREY = 0.5
_TOGETHER = 64
"""Pictures whose features are in memory at once."""


@dataclass(frozen=True)
class Seen:
    """What the probe sees in pictures: where people are, who (zeros where nobody is found), and which context."""

    pixels: Float[Tensor, "b 3 h w"]
    people: Bool[Tensor, "b h w"]
    vectors: Float[Tensor, "b i"]
    contexts: Float[Tensor, "b k"]

    @property
    def found(self) -> Bool[Tensor, " b"]:
        """Whether there is a person at all."""
        return self.people.flatten(1).any(dim=1)


def look(probe: Probe, pixels: Float[Tensor, "b 3 h w"]) -> Seen:
    """Find the people in each picture, and tell who they are and in which context."""
    people = probe.person(pixels) > 0.5
    found = people.flatten(1).any(dim=1, keepdim=True)
    return Seen(pixels, people, probe.identity(crop_people(pixels, people)) * found, probe.context(pixels))


def context_measures(
    probe: Probe, first: Seen, second: Seen, i: Int[Tensor, " b"], j: Int[Tensor, " b"], margin: int
) -> dict[str, Float[Tensor, " b"]]:
    """How much picture i of the first and j of the second differ outside both pictures' people, three ways.

    Args:
        probe: its features are compared, too; people are hidden from it behind grey in both pictures alike, because
            its normalisation would carry them to everywhere.
        margin: pixels around people that do not count as context.
    """
    pairs, place = torch.stack([i, j]).unique(dim=1, return_inverse=True)  # the prior's pictures serve many rows
    parts = [_context_part(probe, first, second, a, b, margin) for a, b in pairs.split(_TOGETHER, dim=1)]
    return {name: torch.cat([part[name] for part in parts])[place] for name in parts[0]}


def _context_part(
    probe: Probe, first: Seen, second: Seen, i: Int[Tensor, " b"], j: Int[Tensor, " b"], margin: int
) -> dict[str, Float[Tensor, " b"]]:
    found = first.people[i] | second.people[j]
    people = dilate(found, margin)
    one, other = first.pixels[i], second.pixels[j]
    features = [probe.scene_features(torch.where(people[:, None], _GREY, pixels)) for pixels in (one, other)]
    return {
        "context_difference": metrics.context_difference(one, other, people),
        "context_ssim": metrics.context_ssim(one, other, dilate(found, max(margin - metrics.SSIM_RADIUS, 0))),
        "context_features": metrics.feature_difference(features[0], features[1], people),
    }


def scene_vectors(probe: Probe, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """One feature vector a picture: the mean over places of the coarsest features, which tells the context."""
    return torch.cat([probe.scene_features(part)[-1].mean(dim=(2, 3)) for part in pixels.split(_TOGETHER)])


def pixels_of(pictures: np.ndarray) -> Float[Tensor, "b 3 h w"]:
    """Generated pictures at the probe's size, in the array's order."""
    images = (picture.image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures.flat)
    return pixels_in([np.asarray(image) for image in images])


def pixels_in(images: Sequence[np.ndarray]) -> Float[Tensor, "b 3 h w"]:
    """Images (uint8 h w 3) of equal size as the probe takes them."""
    return rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w") / 255.0
