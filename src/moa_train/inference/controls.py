"""What a caller says about control at sampling, read and checked: strengths, forced routing, regions, a late start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from moa_train.inference.subjects import read_picture
from moa_train.model.control import Control
from moa_train.prompts import Prompt

_BOX_SIDE = 256
"""Rows and columns of the map that a box becomes; its edges are averaged, not rounded."""


@dataclass(frozen=True)
class Controls:
    """Control of one call of a pipeline with subjects. The defaults change nothing; how they act: docs/control.md.

    strength: `subject_strength`: the personalized expert's share is multiplied by it, at most to 1. A number from 0
        (the prior's picture, bit for bit), or numbers by layer name or pattern ({"up_blocks.*": 0.5}); of several
        patterns that match a layer the last counts, and a layer that none matches keeps 1.
    routing: `routing_override`: in the place of the learned share, in every layer: a number in [0, 1], a map (picture,
        path, array or tensor of rows x columns, 1 or white: personalized), or a list with one of these a prompt.
    start: `subject_start`: fraction in [0, 1] of the steps, the first ones, that see the prior alone.
    regions: where each subject may be: a map as above, a box (left, top, right, bottom) in fractions of the picture, or
        None for everywhere. One list serves every prompt; a list of lists gives each prompt its own.
    separate: `separate_subjects`: each pixel sees the one subject that attention has given it in the steps before.
    """

    strength: float | int | Mapping[str, float | int] = 1.0
    routing: Any = None
    start: float | int = 0.0
    regions: Sequence[Any] | None = None
    separate: bool = False

    def __post_init__(self) -> None:
        """Refuse what no prompt could make sense of."""
        if not isinstance(self.start, Real) or not 0 <= self.start <= 1:
            raise ValueError(f"subject_start is {self.start}: give the fraction of the steps before it, from 0 to 1")

    def bind(self, prompts: Sequence[Prompt], copies: int, layers: Sequence[str]) -> Control | None:
        """The control of one denoising batch: each prompt `copies` times, a region for each slot; None: none asked.

        Raises:
            ValueError: a value outside its domain, a pattern without a layer, an unreadable or empty map, more
                or fewer regions than subjects.
        """
        strength, routing, regions = self._strengths(layers), None, None
        if self.routing is not None:
            given = self.routing if isinstance(self.routing, list) else [self.routing] * len(prompts)
            if len(given) != len(prompts):
                raise ValueError(f"routing_override has {len(given)} maps for {len(prompts)} prompts: give one each")
            routing = [one for one in map(_read_routing, given) for _ in range(copies)]
        if self.regions is not None:
            regions = [row for row in self._regions_by_slot(prompts) for _ in range(copies)]
        if not (strength or self.separate) and routing is None and regions is None:
            return None
        return Control(strength, routing, regions)

    def _strengths(self, layers: Sequence[str]) -> dict[str, float]:
        """Strength of each layer that has another than 1."""
        patterns = self.strength if isinstance(self.strength, Mapping) else {"*": self.strength}
        chosen: dict[str, float] = {}
        for pattern, value in patterns.items():
            if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
                raise ValueError(f"subject_strength is {value}: give a number from 0 (the prior); 1 changes nothing")
            matching = [layer for layer in layers if fnmatchcase(layer, pattern)]
            if not matching:
                raise ValueError(f"subject_strength: no layer is called {pattern!r}; one is {layers[0]!r}")
            chosen |= dict.fromkeys(matching, float(value))
        return {layer: value for layer, value in chosen.items() if value != 1}

    def _regions_by_slot(self, prompts: Sequence[Prompt]) -> list[list[Tensor]]:
        given = self.regions
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"regions is a {type(given).__name__}: give a list with one region a subject, or None")
        own = len(given) > 0 and all(isinstance(entry, list) and not _is_box(entry) for entry in given)
        if own and len(given) != len(prompts):
            raise ValueError(f"{len(given)} lists of regions were given for {len(prompts)} prompts: give one each")
        rows, slots = [], max(len(prompt.owners) for prompt in prompts)
        for number, prompt in enumerate(prompts):
            regions = given[number] if own else given
            if len(regions) != prompt.count:
                raise ValueError(f'"{prompt.text}" marks {prompt.count} subjects, {len(regions)} regions were given')
            maps = [_read_region(region) for region in regions]
            padding = [torch.zeros(1, 1)] * (slots - len(prompt.owners))
            rows.append([maps[owner] for owner in prompt.owners] + padding)
        return rows


def read_map(value: Any, name: str) -> Float[Tensor, "h w"]:
    """A map of values in [0, 1]: a picture or its path (grey, white is 1), an array or tensor of rows x columns.

    Arrays of bytes are divided by 255.

    Raises:
        ValueError: not of this shape or range; `name` says which argument it was.
    """
    if isinstance(value, (str, Path, Image.Image)):
        value = np.array(read_picture(value, name).convert("L"))
    tensor = torch.as_tensor(value)
    tensor = tensor / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if tensor.ndim != 2 or not tensor.numel():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: give one value a pixel, rows x columns")
    if not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(f"{name} has values from {tensor.min():.3g} to {tensor.max():.3g}: they must lie in [0, 1]")
    return tensor


def _read_routing(value: Any) -> Float[Tensor, "h w"]:
    return read_map([[value]] if isinstance(value, Real) else value, "routing_override")


def _read_region(region: Any) -> Float[Tensor, "h w"]:
    if region is None:
        return torch.ones(1, 1)
    if _is_box(region):
        return _box_map(region)
    read = read_map(region, "a region")
    if not read.any():
        raise ValueError("a region is empty: mark where the subject may be, or give None for everywhere")
    return read


def _is_box(region: Any) -> bool:
    return isinstance(region, (list, tuple)) and all(isinstance(value, Real) for value in region)


def _box_map(box: Sequence[float | int]) -> Float[Tensor, "h w"]:
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"the box {tuple(box)} is not (left, top, right, bottom) in fractions of the picture, 0 to 1")
    left, top, right, bottom = (edge * _BOX_SIDE for edge in box)
    return torch.outer(_covered(top, bottom), _covered(left, right))


def _covered(first: float | int, last: float | int) -> Float[Tensor, " n"]:
    """How much of each unit interval lies between the two."""
    start = torch.arange(_BOX_SIDE, dtype=torch.float32)
    return ((start + 1).clamp(max=last) - start.clamp(min=first)).clamp(min=0)
