"""Two people in one picture: are there two, and is each the one who was asked for in that place of the prompt?

Nothing here sees the router: people are found by the probe's segmenter, parted where they stand apart, and told by the
probe's identity vectors. Who stands for which marker hangs on the noun alone, who that is on everything but the noun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from moa_train.data.sources.toyworld import IDENTITY_DIM, NOUN_PARTS, draw_scene
from moa_train.evaluation import metrics
from moa_train.evaluation.gallery import PAIR_STREAM, Gallery, couples
from moa_train.evaluation.seen import pixels_in, pixels_of
from moa_train.evaluation.summary import joined, summarise
from moa_train.prior.probe import Probe, crop_people

_VALLEY, _LEAST_AREA = 0.5, 0.06
_WITHOUT_NOUN = [entry for entry in range(IDENTITY_DIM) if entry not in NOUN_PARTS]


@dataclass(frozen=True)
class Couple:
    """What is seen of two people: whether there are two, and the vector of the one in each marker's place."""

    found: Bool[Tensor, " b"]
    vectors: Float[Tensor, "b 2 i"]


def part(people: Bool[Tensor, "b h w"]) -> tuple[Bool[Tensor, "b 2 h w"], Bool[Tensor, " b"]]:
    """Part the people of each picture into a left and a right one, and say whether there are two.

    h(x) is the number of people's pixels in column x. Two people stand side by side if a column has less than half of
    what the highest column on either side has, and either side at least 6 % of the picture's pixels; of several
    columns the deepest parts them. A raised arm is too small to be a person. Without two, both masks are the whole.
    """
    columns = [_valley(mask) for mask in people.numpy()]
    x = torch.arange(people.shape[2])
    masks = [
        torch.stack([mask & (x < column), mask & (x >= column)]) if column else torch.stack([mask, mask])
        for mask, column in zip(people, columns, strict=True)
    ]
    return torch.stack(masks), torch.tensor([column > 0 for column in columns])


def _valley(mask: np.ndarray) -> int:
    """The column between two people; 0 if there are not two."""
    height, area = mask.sum(axis=0), mask.sum(axis=0).cumsum()
    highest_left = np.maximum.accumulate(height)[:-2]
    highest_right = np.maximum.accumulate(height[::-1])[::-1][2:]
    share = height[1:-1] / np.maximum(np.minimum(highest_left, highest_right), 1)
    smaller = np.minimum(area[:-2], area[-1] - area[1:-1])
    share = np.where(smaller >= _LEAST_AREA * mask.size, share, 1.0)
    return int(share.argmin()) + 1 if share.min() < _VALLEY else 0


def see_couples(probe: Probe, pixels: Float[Tensor, "b 3 h w"], man: Int[Tensor, " b"]) -> Couple:
    """Find two people in each picture; the one who looks more like a man has the place of `man` (0 or 1)."""
    masks, found = part(probe.person(pixels) > 0.5)
    crops = crop_people(repeat(pixels, "b c h w -> (b two) c h w", two=2), rearrange(masks, "b two h w -> (b two) h w"))
    vectors = rearrange(probe.identity(crops), "(b two) i -> b two i", two=2)
    manliness = vectors[:, :, NOUN_PARTS[0]]
    swapped = (manliness[:, 1] > manliness[:, 0]) != (man == 1)
    return Couple(found, torch.where(swapped[:, None, None], vectors.flip(1), vectors))


def nearer(couple: Couple, truth: Float[Tensor, "b 2 i"]) -> Int[Tensor, "b 2"]:
    """Which of the two given people (0 or 1) the one in each place is nearer to, by cosine without the noun's parts."""
    seen, given = couple.vectors[:, :, None, _WITHOUT_NOUN], truth[:, None, :, _WITHOUT_NOUN]
    return functional.cosine_similarity(seen, given, dim=-1, eps=1e-12).argmax(dim=2)


def confusion(couple: Couple, truth: Float[Tensor, "b 2 i"]) -> list[list[float]] | None:
    """Rows: the place of marker 1 and 2; columns: share nearer to person 1 and 2. None if there never are two."""
    chosen = nearer(couple, truth)[couple.found].double()
    if not len(chosen):
        return None
    second = chosen.mean(dim=0).tolist()
    return [[round(1.0 - share, 5), round(share, 5)] for share in second]


def measure_pairs(gallery: Gallery, probe: Probe) -> dict[str, Any]:
    """The numbers of the pictures of two people and, as their ceiling, of real scenes; intervals over pairs."""
    assert gallery.pairs is not None  # else there is nothing to measure
    mixed, places = couples(len(gallery.people), len(gallery.pairs)), len(gallery.contexts)
    vectors = torch.from_numpy(np.stack([person.identity.vector() for person in gallery.people]))
    truth = vectors[torch.tensor(mixed)].repeat_interleave(places, dim=0)
    man = truth[:, :, NOUN_PARTS[0]].argmax(dim=1)
    numbers: dict[str, Any] = {"confusion": {}}
    for name, pixels in (("moa", pixels_of(gallery.pairs)), ("real", _real_couples(gallery, mixed))):
        couple = see_couples(probe, pixels, man)
        groups = torch.arange(len(mixed)).repeat_interleave(places).tolist()
        numbers = joined(numbers, summarise(_values(name, couple, truth), groups))
        matrix = confusion(couple, truth)
        if matrix is not None:
            numbers["confusion"][name] = matrix
    return numbers


def _values(name: str, couple: Couple, truth: Float[Tensor, "b 2 i"]) -> dict[str, Float[Tensor, " b"]]:
    own, other = (
        torch.stack([metrics.cosine(couple.vectors[:, slot], given[:, slot]) for slot in (0, 1)]).mean(dim=0)
        for given in (truth, truth.flip(1))
    )
    confused = (nearer(couple, truth) != torch.tensor([0, 1])).float().mean(dim=1)
    where_two = {f"pairs_confusion.{name}": confused, f"pairs_identity.{name}": own}
    if name == "moa":
        where_two["pairs_identity.wrong_subject"] = other
    nothing = torch.full_like(own, torch.nan)
    return {
        f"pairs_found.{name}": couple.found.float(),
        **{key: torch.where(couple.found, each, nothing) for key, each in where_two.items()},
    }


def _real_couples(gallery: Gallery, mixed: list[tuple[int, int]]) -> Float[Tensor, "b 3 h w"]:
    return pixels_in(
        [
            draw_scene(
                np.random.default_rng([PAIR_STREAM, k, c]), [gallery.people[who].identity for who in pair], context
            ).image
            for k, pair in enumerate(mixed)
            for c, context in enumerate(gallery.contexts)
        ]
    )
