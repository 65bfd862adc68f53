"""FastComposer's augmentation of a subject's picture, with every number drawn from the sample's own generator.

Probabilities and ranges are those of its public training code: an upper square of the subject (1/2), a turn by up to
30 degrees (3/4), brightness, contrast and saturation by 0.5 to 1.5 and hue by up to half a circle (1/2), blur (1/2),
grey (1/10), mirror (1/2), elastic (1/2). Two things differ: what a turn uncovers shows the background, not black; and
the picture is padded to a square with the background, too.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional

UPPER_SQUARE = 0.5
TURN, DEGREES = 0.75, 30.0
_JITTER, _FACTORS, _HUE = 0.5, (0.5, 1.5), 0.5
_BLUR, _BLUR_KERNEL, _BLUR_SIGMA = 0.5, 5, (0.1, 2.0)
_GREY = 0.1
_MIRROR = 0.5
_ELASTIC, _ELASTIC_ALPHA, _ELASTIC_SIGMA = 0.5, 50.0, 5.0


def recoloured_and_bent(
    picture: UInt8[np.ndarray, "size size 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """Colour jitter, blur, grey, mirror and elastic, each with its probability."""
    pixels = torch.from_numpy(picture.transpose(2, 0, 1).copy())
    jitter, blur, grey, mirror, elastic = rng.random(5) < (_JITTER, _BLUR, _GREY, _MIRROR, _ELASTIC)
    if jitter:
        pixels = _recoloured(pixels, rng)
    if blur:
        pixels = functional.gaussian_blur(pixels, [_BLUR_KERNEL] * 2, [rng.uniform(*_BLUR_SIGMA)] * 2)
    if grey:
        pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
    if mirror:
        pixels = functional.horizontal_flip(pixels)
    if elastic:
        pixels = functional.elastic(pixels, _displacement(pixels.shape[-1], rng))
    return pixels.permute(1, 2, 0).numpy()


def _recoloured(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, in random order."""
    brightness, contrast, saturation = rng.uniform(*_FACTORS, size=3)
    hue = rng.uniform(-_HUE, _HUE)
    changes = (
        lambda x: functional.adjust_brightness(x, brightness),
        lambda x: functional.adjust_contrast(x, contrast),
        lambda x: functional.adjust_saturation(x, saturation),
        lambda x: functional.adjust_hue(x, hue),
    )
    for number in rng.permutation(len(changes)):
        pixels = changes[number](pixels)
    return pixels


def _displacement(size: int, rng: np.random.Generator) -> Tensor:
    """A smooth random field: where each pixel comes from, 1 x size x size x 2, in halves of the picture."""
    field = torch.from_numpy(rng.uniform(-1.0, 1.0, (2, size, size)).astype(np.float32))
    kernel = min(int(8 * _ELASTIC_SIGMA) + 1, 2 * size - 1)
    field = functional.gaussian_blur(field, [kernel] * 2, [_ELASTIC_SIGMA] * 2)
    return field.permute(1, 2, 0)[None] * (_ELASTIC_ALPHA / size)
