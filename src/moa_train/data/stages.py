"""What happens to a stored sample on its way into a batch: crop, flip, choose and cut out subjects, tokenise, collate.

A stage is a frozen dataclass called with a sample and a generator of its own, derived from the sample's key: no stage's
numbers depend on another stage's options, on workers or on ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import default_collate, get_worker_info

from moa_train.data.cutout import AUGMENTATIONS, BACKGROUNDS, cut_out
from moa_train.data.geometry import CROPS, PADS, Flip, Resize
from moa_train.data.schema import Picture, Sample, Segment, bounding_box
from moa_train.data.views import EncodedSample
from moa_train.prompts import mark_prompt, parse_prompt, tokenize
from moa_train.symbols import Batch


@dataclass(frozen=True)
class ChooseSubjects:
    """Which subjects the prompt names; boxes and areas are those of the cropped picture.

    With probability `unconditional` none, and no caption. Else subjects are dropped that lie outside the crop or cover
    less than `smallest` of it (a fraction of its pixels); of those that share a noun the largest stays, each is kept
    with probability `keep`, and a random `maximum` of them where there are more. They are sorted by their nouns' places
    in the caption.
    """

    maximum: int
    unconditional: float = 0.1
    keep: float = 0.9
    smallest: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        inside = [measured(segment, sample.labels) for segment in sample.segments]
        segments = self.chosen(inside, sample.labels.size, rng)
        if segments is None:
            return replace(sample, caption="", segments=(), labels=np.zeros_like(sample.labels))
        return replace(sample, segments=segments)

    def chosen(
        self, inside: Sequence[Segment | None], pixels: int, rng: np.random.Generator
    ) -> tuple[Segment, ...] | None:
        """Of the sample's segments as the crop of so many pixels shows them (None: not at all) those to name.

        None: the sample is unconditional.
        """
        if rng.random() < self.unconditional:
            return None
        kept = rng.random(len(inside)) < self.keep
        largest: dict[int, Segment] = {}
        for segment in sorted((segment for segment in inside if segment is not None), key=lambda s: s.area):
            if segment.area >= self.smallest * pixels:
                largest[segment.end] = segment
        ids = {segment.id for segment, keep in zip(inside, kept, strict=True) if segment is not None and keep}
        segments = [largest[end] for end in sorted(largest) if largest[end].id in ids]
        if len(segments) > self.maximum:
            chosen = rng.choice(len(segments), self.maximum, replace=False)
            segments = [segments[i] for i in sorted(chosen)]
        return tuple(segments)


def measured(segment: Segment, labels: np.ndarray) -> Segment | None:
    """The segment with its box and area in these labels; None where it does not occur."""
    mask = labels == segment.id
    return replace(segment, bbox=bounding_box(mask), area=int(np.count_nonzero(mask))) if mask.any() else None


@dataclass(frozen=True)
class Pipeline:
    """A stored sample and its key -> one row of a batch.

    Args:
        tokenizer: a CLIP tokenizer of transformers.
        resolution: side of the picture in pixels.
        subject_size: side of a subject's picture in pixels, the image encoder's input.
        max_subjects: subject slots of a row.
        crop, zoom, pad, hold_subjects: see `moa_train.data.geometry.Resize`.
        flip_probability, unconditional_probability, keep_probability, min_subject_area: see the stages.
        augment_subject, augmentation, background: see `cut_out`.
        latents: take stored views (`moa_train.data.views`) in place of pictures: masks come at latent resolution.

    Raises:
        ValueError: a value outside its domain.
    """

    tokenizer: Any
    resolution: int
    subject_size: int
    max_subjects: int = 4
    crop: str = "centre"
    flip_probability: float = 0.5
    unconditional_probability: float = 0.1
    keep_probability: float = 0.9
    augment_subject: bool = False
    background: str = "noise"
    latents: bool = False
    zoom: tuple[float, ...] = (1.0, 1.0)
    pad: str = "none"
    hold_subjects: bool = False
    min_subject_area: float = 0.0
    augmentation: str = "light"

    def __post_init__(self) -> None:
        for name in ("flip_probability", "unconditional_probability", "keep_probability", "min_subject_area"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number in [0, 1]")
        if not 1 <= self.max_subjects <= 9:
            raise ValueError(f"max_subjects is {self.max_subjects}; expected 1 to 9 (markers have one digit)")
        options_of = {"crop": CROPS, "background": BACKGROUNDS, "pad": PADS, "augmentation": AUGMENTATIONS}
        for name, options in options_of.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(options)}")
        if len(self.zoom) != 2 or not 1.0 <= self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom is {list(self.zoom)}; expected smallest and largest factor, at least 1: [1.0, 1.3]")

    def without_chance(self) -> Pipeline:
        """The same for validation: centre crop, every subject, nothing flipped, dropped or augmented."""
        return replace(
            self,
            crop="centre",
            zoom=(1.0, 1.0),
            flip_probability=0.0,
            unconditional_probability=0.0,
            keep_probability=1.0,
            augment_subject=False,
        )

    @property
    def resize(self) -> Resize:
        """The stage that chooses and resizes the square."""
        return Resize(self.resolution, self.crop, self.zoom, self.pad, self.hold_subjects)

    def __call__(self, stored: Sample | EncodedSample, key: int, number: int) -> dict[str, Any]:
        """One row, the fields of `Batch`. `number`: the sample's index, as the batch reports it."""
        if isinstance(stored, EncodedSample):
            return self._stored_view(stored, key, number)
        view = self.resize(stored, stage_rng(key, 0))
        view = Flip(self.flip_probability)(view, stage_rng(key, 1))
        view = self._choose(view, stage_rng(key, 2))
        row = self._prompt(view.caption, view.segments) | self._subjects(stored, view, key)
        return row | {"pixels": _channels_first(view.image), "key": key, "sample": number}

    def _stored_view(self, stored: EncodedSample, key: int, number: int) -> dict[str, Any]:
        """The same from one of the stored views, drawn by the key; its masks are area averages a latent cell."""
        by_chance = self.crop == "random" or self.zoom != (1.0, 1.0)
        crop = int(stage_rng(key, 0).random() * stored.crops) if by_chance else 0
        flip = Flip(self.flip_probability).drawn(stage_rng(key, 1))
        latents, counts = stored.latents(crop, flip), stored.masks(crop, flip)
        areas = counts.sum((1, 2), dtype=np.int64).tolist()
        inside = [replace(s, area=area) if area else None for s, area in zip(stored.segments, areas, strict=True)]
        chosen = self._choose.chosen(inside, self.resolution**2, stage_rng(key, 2))
        numbers = [segment.id for segment in stored.segments]
        masks = np.zeros((self.max_subjects, *counts.shape[1:]), dtype=np.float32)
        for slot, segment in enumerate(chosen or ()):
            masks[slot] = counts[numbers.index(segment.id)]
        masks /= (self.resolution // counts.shape[-1]) ** 2
        pictures = self._pictures([stored.subject(segment) for segment in chosen or ()], key)
        row = self._prompt("" if chosen is None else stored.caption, chosen or ())
        row |= {"subject_masks": torch.from_numpy(masks), "subject_pixels": pictures, "key": key, "sample": number}
        return row | {"latents": torch.from_numpy(latents.copy())}

    def _prompt(self, text: str, segments: Sequence[Segment]) -> dict[str, Any]:
        caption = mark_prompt(text, [(segment.start, segment.end) for segment in segments])
        tokens = tokenize(self.tokenizer, parse_prompt(caption), self.max_subjects)
        return {
            "caption": caption,
            "token_ids": tokens.ids,
            "subject_positions": tokens.positions,
            "subject_present": tokens.present,
        }

    def _subjects(self, stored: Sample, view: Sample, key: int) -> dict[str, Any]:
        """Masks in the view, and pictures cut out of the stored picture at its full resolution."""
        masks = torch.zeros(self.max_subjects, self.resolution, self.resolution, dtype=torch.bool)
        for slot, segment in enumerate(view.segments):
            masks[slot] = torch.from_numpy(view.labels == segment.id)
        shown = [(stored.image, stored.labels == segment.id) for segment in view.segments]
        return {"subject_masks": masks, "subject_pixels": self._pictures(shown, key)}

    def _pictures(
        self, subjects: Sequence[tuple[Image.Image | np.ndarray, np.ndarray]], key: int
    ) -> UInt8[np.ndarray, "subjects size size 3"]:
        """Subjects, each a picture and its mask, cut out as this pipeline's settings say."""
        pictures = np.empty((len(subjects), self.subject_size, self.subject_size, 3), dtype=np.uint8)
        for slot, (image, mask) in enumerate(subjects):
            look = (self.background, self.augment_subject, self.augmentation)
            pictures[slot] = cut_out(image, mask, self.subject_size, stage_rng(key, 3 + slot), *look)
        return pictures

    @property
    def _choose(self) -> ChooseSubjects:
        rates = (self.unconditional_probability, self.keep_probability)
        return ChooseSubjects(self.max_subjects, *rates, self.min_subject_area)


def stage_rng(key: int, stage: int) -> np.random.Generator:
    """The generator of one stage of one sample."""
    return np.random.default_rng([key, stage])


def collate(rows: Sequence[dict[str, Any]]) -> Batch:
    """Stack rows of one pipeline; in a worker process straight into the memory that it shares with the run's."""
    rows = [dict(row) for row in rows]
    pictures = _slots([row.pop("subject_pixels") for row in rows], len(rows[0]["subject_present"]))
    stacked = default_collate(rows)
    return Batch(**{"pixels": None, **stacked, "subject_pixels": pictures, "caption": tuple(stacked["caption"])})


def _slots(
    rows: Sequence[UInt8[np.ndarray, "_ size size 3"]], slots: int
) -> UInt8[torch.Tensor, "rows slots 3 size size"]:
    """Each row's pictures in its first slots, channels first; the other slots are black."""
    shape = (len(rows), slots, 3, *rows[0].shape[1:3])
    if get_worker_info() is None:
        batch = torch.empty(shape, dtype=torch.uint8)
    else:
        memory = torch.UntypedStorage._new_shared(math.prod(shape))  # as default_collate
        batch = torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)
    for place, pictures in zip(batch.numpy(), rows, strict=True):
        for slot, picture in zip(place, pictures, strict=False):
            cv2.split(picture, [*slot])
        place[len(pictures) :] = 0
    return batch


def _channels_first(image: Picture) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
