"""Pictures of any kind, read safely: upright, 8-bit RGB, and what cannot be used is refused by name."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_MEGAPIXELS = 100.0
"""Larger pictures are refused before they are decoded: a file of a few kB can claim gigabytes."""


@contextmanager
def open_picture(file: str | Path | io.BytesIO, max_megapixels: float = MAX_MEGAPIXELS) -> Iterator[Image.Image]:
    """A picture whose first frame can be decoded; errors of decoding inside the context are told as ours.

    Raises:
        ValueError: it is broken, of an unknown format, or has more pixels than allowed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked right below
            opened = Image.open(file)
        with opened:
            if opened.width * opened.height > max_megapixels * 1e6:
                raise ValueError(_too_large(f"it has {opened.width} x {opened.height} pixels", max_megapixels))
            yield opened
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(str(error), max_megapixels)) from error
    except UnidentifiedImageError as error:
        raise ValueError("it is broken or of a format that is not known") from error
    except (OSError, SyntaxError, EOFError, OverflowError, MemoryError, TypeError, IndexError, struct.error) as error:
        raise ValueError(f"it is broken ({error})") from error


def read_photo(
    path: str | Path, max_side: int | None = None, max_megapixels: float = MAX_MEGAPIXELS
) -> UInt8[np.ndarray, "h w 3"]:
    """A photo as RGB, upright; transparent pixels become white; of an animation its first frame.

    Args:
        max_side: the short side of a larger photo is reduced to this, pixels.
        max_megapixels: larger photos are refused.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        with open_picture(path, max_megapixels) as opened:
            if max_side is not None:
                opened.draft("RGB", (max_side, max_side))  # JPEG only: decodes at 1/2, 1/4 or 1/8 where that suffices
            picture = as_rgb(ImageOps.exif_transpose(opened))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    size = reduced_size(picture.size, max_side)
    return np.asarray(picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS))


def frame_count(path: str | Path) -> int:
    """Frames of an animation, 1 of a still picture. A JPEG has one: what phones append to it are previews."""
    with open_picture(path, float("inf")) as opened:
        return 1 if opened.format in {"JPEG", "MPO"} else int(getattr(opened, "n_frames", 1))


def reduced_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Width and height with the short side at most `max_side`."""
    if max_side is None or min(size) <= max_side:
        return size
    scale = max_side / min(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def as_rgb(picture: Image.Image) -> Image.Image:
    """Any picture (grey, 16 bit, palette, CMYK, transparent) as 8-bit RGB.

    Raises:
        ValueError: its values have no scale that could be known (floating point).
    """
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown scale: save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16 or 32 bits of grey
        values = np.asarray(picture).astype(np.float64)
        top = 65535.0 if picture.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
        picture = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if picture.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in picture.info:
        over = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return picture.convert("RGB")


def _too_large(told: str, max_megapixels: float) -> str:
    return (
        f"{told}, more than the {max_megapixels:g} megapixels allowed: reduce it, or raise max_megapixels (up to 178)"
    )


def read_alpha(path: str | Path, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"] | None:
    """Opacity of a photo, upright and at (width, height); None unless parts are opaque and parts transparent."""
    with open_picture(path, float("inf")) as opened:
        if opened.mode not in {"RGBA", "LA", "PA"} and "transparency" not in opened.info:
            return None
        alpha = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A").resize(size, Image.Resampling.NEAREST)
    values = np.asarray(alpha)
    return values if values.min() < 128 <= values.max() else None
