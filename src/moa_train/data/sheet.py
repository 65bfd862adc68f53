"""A contact sheet of samples: pictures with masks tinted and outlined, captions with the subjects' nouns in colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from moa_train.data.schema import Sample, pillow

COLOURS = ((230, 60, 60), (40, 120, 230), (20, 160, 80), (190, 80, 200), (230, 140, 20), (0, 160, 170))
_TINT = 0.35
_LINES = 3
_LINE_HEIGHT = 17
_FONT_SIZE = 13
_GAP = 8


def contact_sheet(samples: Sequence[Sample], columns: int, tile: int = 256) -> Image.Image:
    """Samples in rows of `columns`; each picture fits into a square of `tile` pixels."""
    rows = -(-len(samples) // columns)
    cell = (tile + _GAP, tile + _LINES * _LINE_HEIGHT + _GAP)
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    for place, sample in enumerate(samples):
        x, y = _GAP + place % columns * cell[0], _GAP + place // columns * cell[1]
        picture = Image.fromarray(tinted(sample, tile))
        sheet.paste(picture, (x + (tile - picture.width) // 2, y + tile - picture.height))
        _write_caption(ImageDraw.Draw(sheet), sample, x, y + tile + 2, tile)
    return sheet


def tinted(sample: Sample, tile: int) -> UInt8[np.ndarray, "rows columns 3"]:
    """The picture, its longer side `tile` pixels, each mask tinted and outlined in its colour."""
    height, width = sample.labels.shape
    scale = tile / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    image = np.asarray(pillow(sample.image).resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    labels = np.asarray(
        Image.fromarray(sample.labels.astype(np.int32), mode=None).resize(size, Image.Resampling.NEAREST)
    )
    for number, segment in enumerate(sample.segments):
        colour = np.array(COLOURS[number % len(COLOURS)], dtype=np.float32)
        mask = labels == segment.id
        image[mask] = (1 - _TINT) * image[mask] + _TINT * colour
        image[_outline(mask)] = colour
    return image.round().clip(0, 255).astype(np.uint8)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _write_caption(draw: ImageDraw.ImageDraw, sample: Sample, left: int, top: int, width: int) -> None:
    """The caption, wrapped at words; a noun has the colour of its mask. What does not fit ends in an ellipsis."""
    font = ImageFont.load_default(_FONT_SIZE)
    x, line, at = float(left), 0, 0
    for word in sample.caption.split(" "):
        start, end = at, at + len(word)
        at = end + 1
        length = draw.textlength(word + " ", font=font)
        if x + length > left + width and x > left:
            x, line = float(left), line + 1
        if line >= _LINES:
            draw.text((left + width - 14, top + (_LINES - 1) * _LINE_HEIGHT), "...", fill="black", font=font)
            return
        owners = [i for i, s in enumerate(sample.segments) if s.start < end and start < s.end]
        colour = COLOURS[owners[0] % len(COLOURS)] if owners else (30, 30, 30)
        draw.text((x, top + line * _LINE_HEIGHT), word, fill=colour, font=font)
        x += length
