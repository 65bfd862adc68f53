"""A folder of photos as samples: captions and masks from the files beside them, or from models, or made offline."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer
from PIL import Image

from moa_train.data.report import Item, LeftOut, Remark
from moa_train.data.sources.annotators import Captioner, Segmenter
from moa_train.data.sources.compose import NO_NOUN, append_nouns, compose, find_nouns, label_map
from moa_train.data.sources.grabcut import segment_people
from moa_train.data.sources.pictures import MAX_MEGAPIXELS, frame_count, open_picture, read_alpha, read_photo

log = logging.getLogger(__name__)

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
UNREAD_SUFFIXES = {".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".psd", ".jxl"}
"""Photos of formats that are not read: each is left out by name, none passed over in silence."""
MASK_SUFFIX = ".mask.png"
LABELS_SUFFIX = ".seg.png"
PEOPLE_NOUNS = ("man", "woman", "boy", "girl", "child", "baby", "lady", "guy", "person")


def list_photos(folder: str | Path) -> list[Path]:
    """Photos of a folder and its subfolders, by name; masks (`NAME.mask.png`, `NAME.seg.png`) are none.

    Raises:
        ValueError: the folder is missing or holds no photo.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder that holds the photos")
    found = (path for path in root.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES | UNREAD_SUFFIXES)
    photos = sorted(path for path in found if not path.name.endswith((MASK_SUFFIX, LABELS_SUFFIX)))
    if not photos:
        raise ValueError(f"{root} holds no photo: expected files that end in {', '.join(sorted(PHOTO_SUFFIXES))}")
    return photos


@dataclass(frozen=True)
class PhotoSource:
    """Photos as samples; one that cannot be used is left out with the reason, which the log tells, too.

    Beside `NAME.jpg` may lie `NAME.txt`, its caption; or `NAME.json`, a mapping with `caption` and perhaps `nouns`, a
    list; and `NAME.mask.png`, its subject's mask (white is the subject), or `NAME.seg.png`, a label map of several.
    Without a mask the photo's transparency is one, else the segmenter looks for people. Subjects are numbered as in the
    label map, else from left to right; in this order they get the nouns that the caption holds.

    Args:
        root: the folder the photos are told relative to.
        photos: the files.
        noun: what a subject is called.
        caption: the template where there is no caption; `{noun}` stands for the noun.
        max_side: short side that larger photos are reduced to, pixels.
        nouns: other words that name a subject in a caption, if `noun` is one of them.
        no_noun: append, keep or leave_out; see `compose`.
        max_people: most subjects that a segmenter gives one photo, the largest.
        min_area: smallest mask of a segmenter, as a fraction of the photo.
        max_megapixels: larger photos are left out.
        captioner: makes captions; None: the template.
        segmenter: makes masks; None: the offline one.

    Raises:
        ValueError: a value outside its domain.
    """

    root: Path
    photos: list[Path] = field(repr=False)
    noun: str = "person"
    caption: str = "a photo of a {noun}"
    max_side: int = 1024
    nouns: Sequence[str] = PEOPLE_NOUNS
    no_noun: str = "append"
    max_people: int = 4
    min_area: float = 0.005
    max_megapixels: float = MAX_MEGAPIXELS
    captioner: Captioner | None = None
    segmenter: Segmenter | None = None

    def __post_init__(self) -> None:
        if "{noun}" not in self.caption:
            raise ValueError(f"caption is {self.caption!r}; it must hold {{noun}}, the place of the subject")
        if self.no_noun not in NO_NOUN:
            raise ValueError(f"no_noun is {self.no_noun!r}; expected one of {', '.join(NO_NOUN)}")
        if self.max_people < 1:
            raise ValueError(f"max_people is {self.max_people}; expected at least 1")

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> Item:
        path = self.photos[number]
        name = str(path.relative_to(self.root))
        try:
            return self._item(path, f"{number:08d}", name)
        except LeftOut as left_out:
            log.warning("left out: %s: %s", name, left_out.remark)
            return Item(name, None, (left_out.remark,))

    def _item(self, path: Path, key: str, name: str) -> Item:
        if path.suffix.lower() in UNREAD_SUFFIXES:
            raise LeftOut("its format is not read", f"{path.suffix}: convert it to JPEG or PNG")
        try:
            image = read_photo(path, self.max_side, self.max_megapixels)
        except ValueError as error:
            raise LeftOut("the photo cannot be read", error) from error
        remarks = [Remark("it is animated; its first frame was taken")] if frame_count(path) > 1 else []
        given, nouns = _sidecar(path)
        labels, more = self._labels(path, image)
        count = len(np.unique(labels[labels > 0]))
        if nouns is not None and len(nouns) != count:
            raise LeftOut("its .json names another number of subjects than its mask has", f"{len(nouns)}, not {count}")
        caption = given or (self.captioner(image) if self.captioner else "")
        if not caption:
            caption = self.caption.format(noun=self.noun)
            caption = append_nouns(caption, [self.noun] * (count - 1))[0] if count > 1 else caption
        own = [self.noun] * count if nouns is None else nouns
        also = self.nouns if self.noun in self.nouns and nouns is None else ()
        if nouns is None:
            own = _from_left_to_right(caption, own, also)
        sample, changed = compose(
            key, image, labels, caption, own, also=also, no_noun=self.no_noun, source={"file": name}
        )
        return Item(key, sample, (*remarks, *more, *changed))

    def _labels(self, path: Path, image: np.ndarray) -> tuple[Integer[np.ndarray, "h w"], list[Remark]]:
        size = (image.shape[1], image.shape[0])
        labels, mask = path.with_name(path.stem + LABELS_SUFFIX), path.with_name(path.stem + MASK_SUFFIX)
        if labels.is_file():
            return _checked(np.asarray(_read_mask(labels, size, None)).astype(np.int32), labels), []
        if mask.is_file():
            return _checked((np.asarray(_read_mask(mask, size, "L")) > 127).astype(np.uint8), mask), []
        alpha = read_alpha(path, size)
        if alpha is not None:
            return (alpha > 127).astype(np.uint8), [Remark("its transparency was taken as its mask")]
        found = segment_people(image, self.max_people) if self.segmenter is None else self.segmenter(image)
        return self._selected(found)

    def _selected(self, masks: list[Bool[np.ndarray, "h w"]]) -> tuple[Integer[np.ndarray, "h w"], list[Remark]]:
        """The largest masks as a label map, numbered from left to right."""
        seen = [one for one in masks if one.sum() >= max(self.min_area * one.size, 1)]
        if not seen:
            what = "no face was found" if self.segmenter is None else "no subject was found"
            raise LeftOut(what, "give a mask beside the photo, or another segmenter")
        kept = sorted(seen, key=lambda one: -int(one.sum()))[: self.max_people]
        kept.sort(key=lambda one: float(np.flatnonzero(one.any(axis=0)).mean()))
        remarks = [Remark("more subjects than max_people; the largest were kept")] if len(kept) < len(seen) else []
        return label_map(kept), remarks


def _from_left_to_right(caption: str, nouns: list[str], also: Sequence[str]) -> list[str]:
    """The words that the caption has for its subjects, in its order; those it lacks come last."""
    spans = sorted(span for span in find_nouns(caption, nouns, also) if span is not None)
    return [caption[start:end] for start, end in spans] + nouns[len(spans) :]


def _sidecar(path: Path) -> tuple[str, list[str] | None]:
    """Caption ('' if none) and nouns (None if not told) of the files beside a photo."""
    as_json, as_text = path.with_suffix(".json"), path.with_suffix(".txt")
    try:
        if as_json.is_file():
            told: Any = json.loads(as_json.read_text(encoding="utf-8-sig"))
            caption, nouns = (told.get("caption", ""), told.get("nouns")) if isinstance(told, dict) else (None, None)
            sound = nouns is None or (isinstance(nouns, list) and all(isinstance(noun, str) and noun for noun in nouns))
            if not isinstance(caption, str) or not sound:
                raise LeftOut("its .json is not a mapping with caption (text) and perhaps nouns (a list)", as_json.name)
            return " ".join(caption.split()), nouns
        return " ".join(as_text.read_text(encoding="utf-8-sig").split()) if as_text.is_file() else "", None
    except (ValueError, RecursionError, OSError) as error:
        raise LeftOut("its caption cannot be read", error) from error


def _read_mask(path: Path, size: tuple[int, int], mode: str | None) -> Image.Image:
    """A mask or label map at the photo's size, values never mixed."""
    try:
        with open_picture(path) as opened:
            if mode is None and opened.mode not in {"L", "P", "I", "I;16", "1"}:
                raise ValueError(f"a label map has one channel, {path.name} is {opened.mode}")
            picture = opened.convert(mode) if mode else opened
            return picture.resize(size, Image.Resampling.NEAREST)
    except ValueError as error:
        raise LeftOut("its mask cannot be read", f"{path.name}: {error}") from error


def _checked(labels: Integer[np.ndarray, "h w"], path: Path) -> Integer[np.ndarray, "h w"]:
    if not labels.any():
        raise LeftOut("its mask is empty", path.name)
    return labels
