"""A subject without its background, as the image encoder sees it; the same function for training and inference."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from moa_train.data.schema import bounding_box

BACKGROUNDS = ("noise", "grey")
AUGMENTATIONS = ("light", "fastcomposer")
GREY = 127
_MAX_DEGREES = 10.0
_SCALES = (0.9, 1.1)
_MARGIN = 1.4
"""Canvas of the augmentation over the subject's square: what a turn by 10 degrees of a 1.1-fold square needs."""


def cut_out(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    size: int,
    rng: np.random.Generator,
    background: str = "noise",
    augment: bool = False,
    augmentation: str = "light",
) -> Float32[np.ndarray, "3 {size} {size}"]:
    """The subject, cropped to the mask's box, padded to a square and resized; values in [0, 1].

    Everything outside the mask is replaced before any filter is applied, so no background pixel has an influence.

    Args:
        size: side of the result in pixels.
        rng: noise and augmentation.
        background: "noise" (uniform, as FastComposer) or "grey".
        augment: change the picture at random, as `augmentation` says.
        augmentation: "light": mirror with probability 1/2, turn by up to 10 degrees, scale by 0.9 to 1.1;
            "fastcomposer": see `moa_train.data.augment`.

    Raises:
        ValueError: the mask is empty, or the background or augmentation unknown.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation is {augmentation!r}; expected one of {', '.join(AUGMENTATIONS)}")
    if background not in BACKGROUNDS:
        raise ValueError(f"background is {background!r}; expected one of {', '.join(BACKGROUNDS)}")
    if not mask.any():
        raise ValueError("the mask is empty: there is no subject to cut out")
    heavy = augment and augmentation == "fastcomposer"
    x1, y1, x2, y2 = bounding_box(mask)
    if heavy:
        y2 = _upper_square(x2 - x1, y1, y2, rng)
    height, width = y2 - y1, x2 - x1
    side = float(max(height, width))
    canvas_side = round(_MARGIN * side) if augment else max(height, width)
    picture = Image.fromarray(_canvas(canvas_side, rng, background))
    subject, stencil = Image.fromarray(image[y1:y2, x1:x2]), Image.fromarray(mask[y1:y2, x1:x2].view(np.uint8) * 255)
    picture.paste(subject, ((canvas_side - width) // 2, (canvas_side - height) // 2), stencil)
    if heavy:
        picture = _turned(picture, rng)
    elif augment:
        picture, side = _augmented(picture, side, rng)
    border = (picture.width - side) / 2
    box = (border, border, border + side, border + side)
    resized = picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=1.0)
    if heavy:
        from moa_train.data.augment import recoloured_and_bent  # torchvision is loaded only where it is needed

        return recoloured_and_bent(np.asarray(resized), rng).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    return np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)


def _upper_square(width: int, top: int, bottom: int, rng: np.random.Generator) -> int:
    """The lower end of a subject that is perhaps shown only as far down as it is wide."""
    from moa_train.data.augment import UPPER_SQUARE

    return min(bottom, top + width) if rng.random() < UPPER_SQUARE else bottom


def _turned(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    from moa_train.data.augment import DEGREES, TURN

    turns, degrees = rng.random() < TURN, rng.uniform(-DEGREES, DEGREES)
    return picture.rotate(degrees, Image.Resampling.BILINEAR) if turns else picture


def _canvas(side: int, rng: np.random.Generator, background: str) -> UInt8[np.ndarray, "side side 3"]:
    if background == "grey":
        return np.full((side, side, 3), GREY, dtype=np.uint8)
    return np.frombuffer(bytearray(rng.bytes(side * side * 3)), dtype=np.uint8).reshape(side, side, 3)


def _augmented(picture: Image.Image, side: float, rng: np.random.Generator) -> tuple[Image.Image, float]:
    """The canvas, mirrored and turned about its centre, and the scaled side of the square to keep."""
    mirror, degrees, scale = rng.random() < 0.5, rng.uniform(-_MAX_DEGREES, _MAX_DEGREES), rng.uniform(*_SCALES)
    if mirror:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = picture.rotate(degrees, Image.Resampling.BILINEAR)
    return turned, min(side / scale, float(picture.width))
