"""FastComposer's preprocessing of FFHQ as samples: pictures and label maps as they are, people with their nouns."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from moa_train.data.report import Item, LeftOut, Remark
from moa_train.data.schema import Sample, Segment, bounding_box, check_sample, encode_sample
from moa_train.data.sources.archive import Archive
from moa_train.data.sources.pictures import as_rgb, open_picture, reduced_size

LISTS = {"train": "image_ids_train.txt", "validation": "image_ids_test.txt"}
"""Our splits and FastComposer's lists of them."""
ALL_IDS = "image_ids.txt"
SUBJECT_LABEL = "person"
NO_PERSON = ("leave_out", "keep")

_ID = re.compile(r"[\w-]+", re.ASCII)
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class FastComposerSplit:
    """One split by its ids; an id that cannot be used is left out with the reason.

    Args:
        archive: the folder or tar that holds `ID[:5]/ID.jpg`, `.json` and `.npy`.
        ids: the ids in the order of the list.
        remarks: of ids that are to be left out, and why; `read_splits` finds them.
        no_person: "leave_out" or "keep" pictures in which no person is marked. Kept, they have no subject.
        max_side: short side that larger pictures are reduced to, pixels (label maps without interpolation);
            None: pictures are stored byte for byte.
        max_megapixels: larger pictures are left out.

    Raises:
        ValueError: `no_person` is neither.
    """

    archive: Archive = field(repr=False)
    ids: list[str] = field(repr=False)
    remarks: dict[int, Remark] = field(default_factory=dict, repr=False)
    no_person: str = "leave_out"
    max_side: int | None = None
    max_megapixels: float = 100.0

    def __post_init__(self) -> None:
        if self.no_person not in NO_PERSON:
            raise ValueError(f"no_person is {self.no_person!r}; expected one of {', '.join(NO_PERSON)}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Item:
        key = self.ids[number]
        if number in self.remarks:
            return Item(key, None, (self.remarks[number],))
        try:
            return self._item(key)
        except LeftOut as left_out:
            return Item(key, None, (left_out.remark,))

    def _item(self, key: str) -> Item:
        picture = self._read(key, "jpg")
        caption, told = _read_caption(self._read(key, "json"))
        labels = _read_labels(self._read(key, "npy"))
        image, suffix = self._image(picture)
        if image.shape[:2] != labels.shape:
            sizes = f"{labels.shape[1]} x {labels.shape[0]}, the picture {image.shape[1]} x {image.shape[0]}"
            raise LeftOut("the label map has another size than the picture", sizes)
        size = reduced_size((image.shape[1], image.shape[0]), self.max_side)
        if size != (image.shape[1], image.shape[0]):
            suffix, image, labels = None, *_resized(image, labels, size)
        segments, remarks = people(told, labels, caption)
        if not segments and self.no_person == "leave_out":
            marked = any(isinstance(one, dict) and one.get("coco_label") == SUBJECT_LABEL for one in told)
            detail = "; ".join(map(str, remarks))
            raise LeftOut("no person can be used" if marked else "no person is marked", detail)
        sample = Sample(key, image, labels, caption, segments, {"set": "fastcomposer"})
        for problem in check_sample(sample):
            raise LeftOut("the caption cannot be used" if problem.startswith("caption") else "not sound", problem)
        stored = encode_sample(sample, suffix, picture) if suffix else encode_sample(sample, "jpg")
        return Item(key, stored, tuple(remarks))

    def _read(self, key: str, suffix: str) -> bytes:
        name = f"{key[:5]}/{key}.{suffix}"
        try:
            return self.archive.read(name)
        except FileNotFoundError:
            raise LeftOut(f"the .{suffix} is missing", name) from None
        except OSError as error:
            raise LeftOut(f"the .{suffix} cannot be read", error) from error

    def _image(self, content: bytes) -> tuple[UInt8[np.ndarray, "h w 3"], str | None]:
        """The picture, and the suffix under which its file can be stored as it is; None: it must be written anew.

        Label maps belong to the pixels as they are stored: a rotation in the EXIF data is not applied.
        """
        try:
            with open_picture(io.BytesIO(content), self.max_megapixels) as opened:
                plain = opened.mode == "RGB" and opened.getexif().get(_ORIENTATION, 1) == 1
                return np.asarray(as_rgb(opened)), _SUFFIXES.get(opened.format or "") if plain else None
        except ValueError as error:
            raise LeftOut("the picture cannot be read", error) from error


def read_splits(archive: Archive) -> dict[str, tuple[list[str], dict[int, Remark]]]:
    """Of each split its ids, and by their place those that must be left out.

    An id listed twice counts once; one listed in both splits belongs to validation, so that nothing that is trained on
    is measured on. Without a list of its own, training is what `image_ids.txt` holds and validation does not.

    Raises:
        ValueError: there is no list of ids, or it is empty.
    """
    lists = {name: _read_ids(archive, name) for name in (*LISTS.values(), ALL_IDS)}
    validation = lists[LISTS["validation"]]
    held_out = set(validation)
    everything = [name for name in lists[ALL_IDS] if name not in held_out]
    train = lists[LISTS["train"]] or everything
    if not train and not validation:
        raise ValueError(
            f"{archive.location} lists no pictures: expected {', '.join(lists)} (one id a line) in it; "
            "give the folder or the tar of FastComposer's preprocessed FFHQ"
        )
    splits = {"train": (train, _id_remarks(train, held_out)), "validation": (validation, _id_remarks(validation))}
    return {split: told for split, told in splits.items() if told[0]}


def people(
    told: list[Any], labels: Integer[np.ndarray, "h w"], caption: str
) -> tuple[tuple[Segment, ...], list[Remark]]:
    """The people among the segments of a `.json`, sorted by the end of their nouns, and why others were left out.

    Boxes and areas come from the label map. Of two with one `end` the larger area stays, then the smaller id: a subject
    is known by where its noun ends.
    """
    found: list[Segment] = []
    remarks: list[Remark] = []
    for one in told:
        segment = _person(one, labels, caption)
        if isinstance(segment, Segment):
            found.append(segment)
        elif segment is not None:
            remarks.append(segment)
    kept: list[Segment] = []
    for segment in sorted(found, key=lambda one: (-one.area, one.id, one.start, one.end)):
        if any(segment.id == other.id for other in kept):
            remarks.append(Remark("a segment id is given twice", f"id {segment.id}"))
        elif any(segment.end == other.end for other in kept):
            detail = f"id {segment.id}, {segment.noun!r}, ends at {segment.end}"
            remarks.append(Remark("two segments end at one place in the caption; the larger was kept", detail))
        else:
            kept.append(segment)
    return tuple(sorted(kept, key=lambda one: one.end)), remarks


def _person(told: Any, labels: np.ndarray, caption: str) -> Segment | Remark | None:
    """A segment of the `.json` as a subject; None: it is no person."""
    if isinstance(told, dict) and isinstance(told.get("coco_label"), str) and told["coco_label"] != SUBJECT_LABEL:
        return None
    numbers = _integers(told, "id", "start", "end")
    if numbers is None or told.get("coco_label") != SUBJECT_LABEL:
        return Remark("a segment is malformed", f"{told!r:.80}; expected id, coco_label, start and end")
    number, start, end = numbers
    if not 0 <= start < end <= len(caption) or not caption[start:end].strip():
        return Remark("a segment's offsets lie outside the caption", f"id {number}, {start}..{end} of {len(caption)}")
    start, end = (
        start + len(caption[start:end]) - len(caption[start:end].lstrip()),
        start + len(caption[start:end].rstrip()),
    )
    mask = labels == number
    if number <= 0 or not mask.any():
        return Remark("a segment's mask is empty", f"id {number} is not in the label map")
    return Segment(number, caption[start:end], start, end, bounding_box(mask), int(mask.sum()))


def _integers(told: Any, *names: str) -> list[int] | None:
    """The values of these names in a mapping, if all are integers."""
    values = [told.get(name) for name in names] if isinstance(told, dict) else []
    integers = [value for value in values if type(value) is int]
    return integers if len(integers) == len(names) else None


def _read_ids(archive: Archive, name: str) -> list[str]:
    try:
        lines = archive.read(name).decode("utf-8-sig", "replace").splitlines()
    except FileNotFoundError:
        return []
    return [line.strip() for line in lines if line.strip()]


def _id_remarks(ids: list[str], elsewhere: frozenset[str] | set[str] = frozenset()) -> dict[int, Remark]:
    def problems() -> Iterator[tuple[int, Remark]]:
        seen: set[str] = set()
        for place, name in enumerate(ids):
            if not _ID.fullmatch(name):
                yield place, Remark("the id cannot name a sample", f"{name!r:.80}: expected letters, digits, - and _")
            elif name in seen:
                yield place, Remark("the id is listed twice", f"line {place + 1}")
            elif name in elsewhere:
                yield place, Remark("the id is listed for validation, too", LISTS["validation"])
            seen.add(name)

    return dict(problems())


def _read_caption(content: bytes) -> tuple[str, list[Any]]:
    """Caption and segments of a `.json`."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LeftOut("the .json cannot be read", error) from error
    caption, segments = (told.get("caption"), told.get("segments")) if isinstance(told, dict) else (None, None)
    if not isinstance(caption, str) or not isinstance(segments, list):
        raise LeftOut("the .json does not hold a caption and segments")
    if not caption.strip():
        raise LeftOut("the caption is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise LeftOut("the caption cannot be used", "it holds half a character (a lone surrogate)")
    return caption, segments


def _read_labels(content: bytes) -> Integer[np.ndarray, "h w"]:
    """A label map; its header is checked before its memory is taken."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](file)
        if dtype.kind not in "iub" or len(shape) != 2 or dtype.itemsize * shape[0] * shape[1] > len(content):
            raise ValueError(f"expected H x W integers, got {dtype} {shape} in {len(content)} bytes")
        labels = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, KeyError, EOFError, SyntaxError) as error:
        raise LeftOut("the label map cannot be read", error) from error
    if labels.size and not (labels.min() >= 0 and labels.max() < 1 << 16):
        raise LeftOut("the label map's values do not fit 16 bits", f"{labels.min()} to {labels.max()}")
    return labels.astype(np.int32)


def _resized(image: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Picture and label map at (width, height); label values are never mixed."""
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture), np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
