"""Which part of a stored picture a training sample shows: a square window, resized, perhaps mirrored.

Picture and labels go through one window, so that masks follow every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int64
from PIL import Image

from moa_train.data.schema import Sample, bounding_box, pillow

CROPS = ("centre", "random")
PADS = ("none", "tall", "all")


@dataclass(frozen=True)
class Window:
    """A square of a stored picture, in pixels. Where it sticks out of the picture there is black, and no subject."""

    left: int
    top: int
    side: int

    def show(self, sample: Sample, resolution: int) -> Sample:
        """The sample as seen through the window, `resolution` pixels wide and high; labels by nearest neighbour."""
        size = sample.labels.shape
        if size == (resolution, resolution) and self == Window(0, 0, resolution):
            return sample
        image, labels, left, top = pillow(sample.image), sample.labels, self.left, self.top
        margins = [(max(0, -at), max(0, at + self.side - n)) for at, n in zip((top, left), size, strict=True)]
        if any(map(any, margins)):
            (above, below), (before, behind) = margins
            image = image.crop((-before, -above, image.width + behind, image.height + below))  # black beside it
            labels = np.pad(labels, margins)
            top, left = top + above, left + before
        box = (left, top, left + self.side, top + self.side)
        square = (resolution, resolution)
        shown = np.asarray(image.resize(square, Image.Resampling.BICUBIC, box=box, reducing_gap=1.0))
        steps = ((np.arange(resolution) + 0.5) * self.side / resolution).astype(np.int64)
        return replace(sample, image=shown, labels=labels[top + steps].take(left + steps, axis=1))


@dataclass(frozen=True)
class Resize:
    """A square of the picture, resized to `resolution` pixels.

    Without padding and zoom it is the largest square: its side is the picture's short side.

    crop: "centre" or "random": where the square lies.
    pad: "none"; "tall": a picture higher than wide is shown whole, with black at its sides, as FastComposer does;
        "all": every picture is shown whole.
    zoom: the square is smaller by a factor that is drawn evenly from this interval; at least 1.
    hold_subjects: only squares that hold every subject come into question (centre: the one nearest to the centre), and
        the zoom is held back until all of them fit. Where they do not even fit without zoom, those squares that hold
        most of their pixels: first along the long side, then along the other.
    """

    resolution: int
    crop: str = "centre"
    zoom: tuple[float, ...] = (1.0, 1.0)
    pad: str = "none"
    hold_subjects: bool = False

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self.window(sample, rng).show(sample, self.resolution)

    def window(self, sample: Sample, rng: np.random.Generator) -> Window:
        """The square to show."""
        height, width = sample.labels.shape
        long_place, zoom, short_place = rng.random(3)
        if self.crop == "centre":
            long_place = short_place = 0.5
        factor = self.zoom[0] + (self.zoom[1] - self.zoom[0]) * zoom
        side = self._whole(height, width)
        subjects = np.isin(sample.labels, [s.id for s in sample.segments]) if self.hold_subjects else None
        side = _zoomed(side, factor, subjects)
        if height > width:
            top = self._place(height, side, long_place, None if subjects is None else subjects.sum(1))
            inside = None if subjects is None else subjects[max(0, top) : top + side].sum(0)
            return Window(self._place(width, side, short_place, inside), top, side)
        left = self._place(width, side, long_place, None if subjects is None else subjects.sum(0))
        inside = None if subjects is None else subjects[:, max(0, left) : left + side].sum(1)
        return Window(left, self._place(height, side, short_place, inside), side)

    def _whole(self, height: int, width: int) -> int:
        """Side of the square without zoom."""
        padded = self.pad == "all" or (self.pad == "tall" and height > width)
        return max(height, width) if padded else min(height, width)

    def _place(self, extent: int, side: int, place: float, subjects: Int64[np.ndarray, " extent"] | None) -> int:
        """Where a window of `side` begins on an axis of `extent` pixels; `subjects`: their pixels in each column."""
        if side >= extent:
            return -((side - extent) // 2)
        middle = int((extent - side) * place)
        if subjects is None:
            return middle
        total = np.concatenate([[0], np.cumsum(subjects)])
        held = total[side:] - total[:-side]
        best = np.flatnonzero(held == held.max())
        if self.crop == "centre":
            return int(best[np.abs(best - middle).argmin()])
        return int(best[int(len(best) * place)])


@dataclass(frozen=True)
class Flip:
    """Mirror picture and labels with a probability."""

    probability: float

    def drawn(self, rng: np.random.Generator) -> bool:
        """Whether to mirror."""
        return bool(rng.random() < self.probability)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return mirrored(sample) if self.drawn(rng) else sample


def mirrored(sample: Sample) -> Sample:
    """Left and right exchanged."""
    return replace(sample, image=np.asarray(sample.image)[:, ::-1], labels=sample.labels[:, ::-1])


def _zoomed(side: int, factor: float, subjects: Bool[np.ndarray, "h w"] | None) -> int:
    """The side after the zoom, which stops where the subjects would not fit any more."""
    needed = 1
    if subjects is not None and subjects.any():
        x1, y1, x2, y2 = bounding_box(subjects)
        needed = max(x2 - x1, y2 - y1)
    return max(round(side / factor), min(needed, side))
