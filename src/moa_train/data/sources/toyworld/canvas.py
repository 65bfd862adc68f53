"""What the toy world is drawn with: supersampled Pillow canvases in fractions of the picture, colours, random draws."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 3
"""Drawn pixels for one pixel of the picture, along each axis."""

Colour = tuple[int, int, int]
Point = tuple[float, float]


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour that lies `share` (0 .. 1) of the way from the first to the second."""
    a, b, c = (round(x + (y - x) * share) for x, y in zip(first, second, strict=True))
    return a, b, c


def shade(colour: Colour, light: float) -> Colour:
    """The colour made darker (`light` below 1) or brighter, clipped to 255."""
    a, b, c = (min(round(x * light), 255) for x in colour)
    return a, b, c


class Draws:
    """A fixed number of uniform draws taken at once, so that what is drawn never changes how many numbers are used."""

    def __init__(self, rng: np.random.Generator, count: int) -> None:
        """Take `count` numbers from the generator."""
        self._values = iter(rng.random(count).tolist())

    def between(self, low: float, high: float) -> float:
        """The next draw, uniform in [low, high)."""
        return low + (high - low) * next(self._values)

    def share(self) -> float:
        """The next draw, uniform in [0, 1)."""
        return self.between(0.0, 1.0)

    def below(self, bound: int) -> int:
        """The next draw, uniform over 0 .. bound - 1."""
        return int(bound * next(self._values))

    def chance(self, share: float) -> bool:
        """The next draw: true with probability `share`."""
        return bool(next(self._values) < share)


@lru_cache(maxsize=8)
def _ramp(side: int) -> np.ndarray:
    return (np.arange(side) + 0.5) / side


def sky(side: int, stops: Sequence[tuple[float, Colour]]) -> Image.Image:
    """A square picture whose colour depends on the height alone.

    Args:
        side: pixels along an edge.
        stops: (height, colour) with heights that never fall, 0 the top and 1 the bottom; linear in between, and two
            stops of nearly one height make an edge.
    """
    heights = [height for height, _ in stops]
    channels = [np.interp(_ramp(side), heights, [colour[i] for _, colour in stops]) for i in range(3)]
    column = np.stack(channels, axis=-1).round().astype(np.uint8)[:, None, :]
    return Image.fromarray(column).resize((side, side), Image.Resampling.NEAREST)


class Canvas:
    """Shapes on a picture, in fractions of its side: (0, 0) is the upper left corner, (1, 1) the lower right one."""

    def __init__(self, picture: Image.Image) -> None:
        """Draw on this square picture, in place."""
        self.side = picture.width
        self._draw = ImageDraw.Draw(picture)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """An ellipse around (x, y)."""
        s = self.side
        self._draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def dome(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """The upper half of an ellipse around (x, y)."""
        s = self.side
        self._draw.chord(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), 180, 360, fill=fill)

    def box(self, x1: float, y1: float, x2: float, y2: float, fill: Colour, radius: float = 0.0) -> None:
        """A rectangle, with rounded corners if a radius is given."""
        s = self.side
        edges = (x1 * s, y1 * s, x2 * s, y2 * s)
        if radius > 0.0:
            self._draw.rounded_rectangle(edges, radius * s, fill=fill)
        else:
            self._draw.rectangle(edges, fill=fill)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=fill)

    def stroke(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A broken line with round joints."""
        drawn = [(x * self.side, y * self.side) for x, y in points]
        self._draw.line(drawn, fill=fill, width=max(round(width * self.side), 1), joint="curve")
