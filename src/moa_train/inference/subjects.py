"""From a photo to what the image encoder sees: the subject alone, cut out of its background as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from moa_train.data.cutout import cut_out
from moa_train.prompts import Prompt


@dataclass(frozen=True)
class Views:
    """Several pictures of one subject: the mean of their image features stands for it.

    pictures: each as a subject by itself would be given; at least one. A list among `subjects` means something else (a
    prompt's own subjects), and a pair means a photo with its mask, hence this name.
    """

    pictures: Sequence[Any]

    def __post_init__(self) -> None:
        """Refuse an empty list, and a single picture in the place of a list."""
        if not isinstance(self.pictures, (list, tuple)) or not self.pictures:
            raise ValueError(
                "Views holds the pictures of one subject: give a list of at least one, Views([photo, photo])"
            )


Picture: TypeAlias = Image.Image | str | Path | np.ndarray
Subject: TypeAlias = Picture | tuple[Picture, Any] | Tensor | Views
"""A photo (its alpha channel is the mask; without one the person is found), a pair (photo, mask), a cut-out (3, r, r),
an image feature (f), or several of these as `Views`."""


def subjects_of_each(prompts: Sequence[Prompt], subjects: Sequence[Any]) -> list[list[Subject]]:
    """One list of subjects a prompt, as long as the prompt has markers; see `MoAPipeline.__call__`.

    Raises:
        ValueError: too few or too many subjects, or prompts with subjects among prompts without.
    """
    if not isinstance(subjects, (list, tuple)):
        raise ValueError(f"subjects is a {type(subjects).__name__}: give a list, subjects=[photo]")
    own = len(subjects) > 0 and all(isinstance(entry, list) for entry in subjects)
    if own and len(subjects) != len(prompts):
        raise ValueError(f"{len(subjects)} lists of subjects were given for {len(prompts)} prompts: give one each")
    chosen = [list(subjects[row]) if own else list(subjects) for row in range(len(prompts))]
    for prompt, given in zip(prompts, chosen, strict=True):
        if len(given) != prompt.count:
            raise ValueError(
                f'"{prompt.text}" marks {prompt.count} subjects and {len(given)} were given: '
                "write <1>, <2> ... behind their nouns and give one photo each"
            )
    if any(chosen) and not all(chosen):
        raise ValueError("some prompts have subjects and some have none: make them in two calls")
    return chosen


def subject_pixels(
    subject: Picture | tuple[Picture, Any] | Tensor, size: int, background: str = "noise"
) -> Float[Tensor, "3 r r"]:
    """Cut a subject out of its picture; the same subject always gives the same numbers.

    Args:
        subject: a photo or its path; a pair (photo, mask), the mask being what is brighter than half its maximum; or a
            tensor (3, size, size) in [0, 1] that is already cut out.
        size: r, pixels along an edge of the image encoder's input.
        background: what replaces the background, as in training: "noise" or "grey".

    Raises:
        ValueError: an unreadable picture, a mask of another size or without a subject, a tensor of another shape.
    """
    if isinstance(subject, Tensor):
        if subject.shape != (3, size, size):
            raise ValueError(
                f"a cut-out subject has shape {tuple(subject.shape)}; the image encoder takes (3, {size}, {size}): "
                "give the photo and its mask, or resize it"
            )
        return subject.float()
    image, selected = photo_and_mask(subject)
    pixels = torch.from_numpy(np.array(cut_out(image, selected, size, np.random.default_rng(0), background)))
    return rearrange(pixels, "h w c -> c h w").float() / 255


def photo_and_mask(
    subject: Picture | tuple[Picture, Any],
) -> tuple[UInt8[np.ndarray, "rows columns 3"], Bool[np.ndarray, "rows columns"]]:
    """A subject's photo, and which of its pixels are the subject.

    Raises:
        ValueError: an unreadable picture, a mask of another size or without a subject.
    """
    photo, mask = subject if isinstance(subject, tuple) else (subject, None)
    picture = read_picture(photo)
    image = np.asarray(picture.convert("RGB"))
    selected = _given_mask(mask, image.shape[:2]) if mask is not None else _found_mask(picture, image)
    if not selected.any():
        raise ValueError(f"the mask of subject {_name(photo)} is empty: mark the subject in it, or leave the mask out")
    return image, selected


def read_picture(picture: Picture, name: str = "subject") -> Image.Image:
    """Open a picture upright (EXIF orientation applied), alpha kept; `name` says in errors what it is.

    Raises:
        ValueError: the file does not exist or is not a picture.
    """
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture)
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    try:
        with Image.open(picture) as opened:
            return ImageOps.exif_transpose(opened)
    except FileNotFoundError as error:
        raise ValueError(f"{name} {picture}: no such file") from error
    except OSError as error:
        raise ValueError(f"{name} {picture} cannot be read: give a PNG, JPEG or WebP picture") from error


def _given_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(mask if isinstance(mask, np.ndarray) else read_picture(mask).convert("L"))
    if values.shape != shape:
        raise ValueError(
            f"the mask has {values.shape[0]} rows and {values.shape[1]} columns, its photo {shape[0]} and {shape[1]}: "
            "give a mask of the photo's size"
        )
    return np.asarray(values > values.max() / 2) if values.any() else np.zeros(shape, dtype=bool)


def _found_mask(picture: Image.Image, image: np.ndarray) -> np.ndarray:
    """The alpha channel where there is one, else the person that the offline segmenter finds."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        return np.asarray(picture.convert("RGBA"))[..., 3] > 127
    from moa_train.data.sources.grabcut import segment_person  # OpenCV is needed for photos without a mask only

    return segment_person(image)


def _name(photo: Picture) -> str:
    return str(photo) if isinstance(photo, (str, Path)) else "(a picture in memory)"
