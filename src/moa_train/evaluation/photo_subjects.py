"""The subjects of the photo benchmark: a folder with one photo each, their masks and nouns, checked before the work."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from moa_train.data.schema import Sample
from moa_train.data.sources.photos import PEOPLE_NOUNS, PhotoSource, list_photos


@dataclass(frozen=True)
class PhotoSubject:
    """One subject: its photo, which pixels are it, what it is called, and a name for its files."""

    name: str
    noun: str
    photo: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of photo and mask: another file of the same pixels is the same subject."""
        told = hashlib.sha256(repr(self.photo.shape).encode())
        told.update(self.photo.tobytes() + self.mask.tobytes())
        return told.hexdigest()


def read_subjects(folder: str | Path, count: int | None, noun: str = "person") -> list[PhotoSubject]:
    """One subject a photo of the folder and its subfolders, by name.

    Masks lie beside a photo or in its transparency, else the person is found (`PhotoSource`). The noun is that of the
    caption beside the photo; else the last word of its file's name, or of its folders' names, that is one of
    `PEOPLE_NOUNS`; else `noun`.

    Args:
        folder: the photos. count: how many there must be; None: any number. noun: of a photo that tells none.

    Raises:
        ValueError: another number of photos, or one that cannot be read or shows no subject, or more than one.
    """
    photos = list_photos(folder)
    if count is not None and len(photos) != count:
        raise ValueError(
            f"{folder} holds {len(photos)} photos, {count} are expected: one a subject; give people={len(photos)} if "
            "these are meant"
        )
    subjects = [_read(Path(folder), path, noun) for path in photos]
    names = [subject.name for subject in subjects]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{folder} holds {name} more than once: one photo a subject, under a name of its own")
    return subjects


def _read(root: Path, path: Path, noun: str) -> PhotoSubject:
    item = PhotoSource(root, [path], noun=_noun_of_name(path.relative_to(root)) or noun, max_people=1)[0]
    if not isinstance(item.content, Sample):
        raise ValueError(f"{path} is no photo of a subject: {item.remarks[0]}")
    found = item.content.segments
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} subjects in its mask: one photo a subject")
    name = re.sub(r"[^\w.-]+", "-", path.relative_to(root).with_suffix("").as_posix())
    return PhotoSubject(name, found[0].noun, np.asarray(item.content.image), item.content.labels == found[0].id)


def _noun_of_name(path: Path) -> str | None:
    """The last noun in the file's name, else in those of its folders, the nearest first."""
    for part in (path.stem, *(folder.name for folder in path.parents)):
        known = [word for word in re.findall(r"[a-z]+", part.lower()) if word in PEOPLE_NOUNS]
        if known:
            return known[-1]
    return None
