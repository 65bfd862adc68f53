"""A subject without its background, as the image encoder sees it; the same function for training and inference."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from moa_train.data.schema import Picture, bounding_box

BACKGROUNDS = ("noise", "grey")
AUGMENTATIONS = ("light", "fastcomposer")
GREY = 127
_MAX_DEGREES = 10.0
_SCALES = (0.9, 1.1)
_MARGIN = 1.4
"""Canvas of the augmentation over the subject's square: what a turn by 10 degrees of a 1.1-fold square needs."""


def cut_out(
    image: Picture,
    mask: Bool[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
    size: int,
    rng: np.random.Generator,
    background: str = "noise",
    augment: bool = False,
    augmentation: str = "light",
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The subject, cropped to the mask's box, padded to a square and resized.

    Args:
        mask: where the subject is; in bytes: image and mask are what `reduced` made of a subject.
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
    if mask.dtype == bool and not mask.any():
        raise ValueError("the mask is empty: there is no subject to cut out")
    heavy = augment and augmentation == "fastcomposer"
    x1, y1, x2, y2 = bounding_box(mask) if mask.dtype == bool else (0, 0, mask.shape[1], mask.shape[0])
    if heavy:
        y2 = _upper_square(x2 - x1, y1, y2, rng)
    subject, weight = reduced(image, mask, (x1, y1, x2, y2), size)
    side = max(weight.shape)
    canvas = _canvas(round(_MARGIN * side) if augment else side, rng, background)
    _place(subject, weight, canvas)
    if len(canvas) == size and not augment:
        return canvas
    return _augmented(Image.fromarray(canvas), size, float(side), rng, augmentation if augment else "none")


def _augmented(
    picture: Image.Image, size: int, side: float, rng: np.random.Generator, augmentation: str
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The square of `side` in the middle of the canvas, changed as the augmentation says and resized."""
    if augmentation == "fastcomposer":
        picture = _turned(picture, rng)
    elif augmentation == "light":
        picture, side = _moved(picture, side, rng)
    border = (picture.width - side) / 2
    box = (border, border, border + side, border + side)
    resized = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=1.0))
    if augmentation == "fastcomposer":
        from moa_train.data.augment import recoloured_and_bent  # torchvision is loaded only where it is needed

        return recoloured_and_bent(resized, rng)
    return resized


def reduced(
    image: Picture, mask: Bool[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"], box: tuple[int, int, int, int], side: int
) -> tuple[UInt8[np.ndarray, "h_box w_box 3"], UInt8[np.ndarray, "h_box w_box"]]:
    """A subject in its box, no longer than `side` pixels: its colours times its weight, and the weight, 0 to 255.

    What lies outside the mask is black before any filter is applied, so no background pixel has an influence.
    A mask in bytes is a weight, and `image` is weighed by it.
    """
    x1, y1, x2, y2 = box
    mask = mask[y1:y2, x1:x2]
    if mask.dtype == np.uint8 and max(mask.shape) <= side:
        return np.asarray(image)[y1:y2, x1:x2], mask
    subject = image.crop(box) if isinstance(image, Image.Image) else Image.fromarray(image[y1:y2, x1:x2])
    if mask.dtype == bool:
        subject.paste(0, mask=Image.fromarray(~mask))
        mask = mask.view(np.uint8) * np.uint8(255)
    longest = max(mask.shape)
    if longest <= side:
        return np.asarray(subject), mask
    size = (max(1, round(subject.width * side / longest)), max(1, round(subject.height * side / longest)))
    # Hamming has no negative lobes: a weighed colour never exceeds its weight
    pictures = (subject, Image.fromarray(mask))
    smaller = [np.asarray(each.resize(size, Image.Resampling.HAMMING, reducing_gap=1.0)) for each in pictures]
    return smaller[0], smaller[1]


def _place(
    subject: UInt8[np.ndarray, "h w 3"], weight: UInt8[np.ndarray, "h w"], canvas: UInt8[np.ndarray, "side side 3"]
) -> None:
    """In the middle of the canvas: subject + (1 - weight) canvas."""
    (height, width), side = weight.shape, len(canvas)
    top, left = (side - height) // 2, (side - width) // 2
    window = canvas[top : top + height, left : left + width]
    cv2.multiply(window, cv2.merge([~weight] * 3), dst=window, scale=1 / 255)
    cv2.add(window, subject, dst=window)  # at most 255, whatever a record holds


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
    whole, rest = divmod(side * side * 3, 8)  # the bytes of rng.bytes, and the generator as it leaves it, but faster
    noise = rng.bit_generator.random_raw(whole).astype("<u8", copy=False).view(np.uint8)
    if rest:  # asked for no byte, the generator still draws a number
        noise = np.concatenate([noise, np.frombuffer(rng.bytes(rest), dtype=np.uint8)])
    return noise.reshape(side, side, 3)


def _moved(picture: Image.Image, side: float, rng: np.random.Generator) -> tuple[Image.Image, float]:
    """The canvas, mirrored and turned about its centre, and the scaled side of the square to keep."""
    mirror, degrees, scale = rng.random() < 0.5, rng.uniform(-_MAX_DEGREES, _MAX_DEGREES), rng.uniform(*_SCALES)
    if mirror:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = picture.rotate(degrees, Image.Resampling.BILINEAR)
    return turned, min(side / scale, float(picture.width))
