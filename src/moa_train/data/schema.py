"""One stored sample: its key names, its encoding into shard members and back, and what can be wrong with it.

The only place that knows how members of a shard are named:

    KEY.jpg | .png | .webp    the picture, RGB
    KEY.seg.png               label map of the same size, 8 or 16 bit, 0 = background
    KEY.json                  caption, width, height, segments [{id, noun, start, end, bbox, area}], source
    KEY.latent.npy            optional: the views that moa-data latents encodes (`moa_train.data.views`)
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float16, Integer, UInt8
from PIL import Image

SCHEMA_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "png", "webp")
LABELS_SUFFIX = "seg.png"
JSON_SUFFIX = "json"
LATENT_SUFFIX = "latent.npy"
KINDS = ("image", "seg", "json", "latent")
"""The roles of a sample's members, in the order of a shard."""

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
}
_MARKER = re.compile(r"<\d+>")
_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
_PICTURE_MODES = ("RGB", "L", "P")
MAX_PIXELS = 1 << 26
"""Of a stored picture: a file of few bytes that would fill the memory is refused before it is decoded."""
MAX_ID = 65535


Picture: TypeAlias = UInt8[np.ndarray, "h w 3"] | Image.Image
"""Of a sample: an array, or as Pillow decoded it (RGB). `np.asarray` makes an array of either."""


class BadSample(ValueError):
    """A stored sample that cannot be used; the message names shard and key."""


@dataclass(frozen=True)
class Segment:
    """One subject: its value in the label map, and its noun at `caption[start:end]`.

    bbox: (x1, y1, x2, y2) in pixels with exclusive ends. area: pixels of this value in the label map.
    """

    id: int
    noun: str
    start: int
    end: int
    bbox: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture with its subjects. `source`: where it comes from, anything that JSON holds."""

    key: str
    image: Picture
    labels: Integer[np.ndarray, "h w"]
    caption: str
    segments: tuple[Segment, ...]
    source: dict[str, Any] = field(default_factory=dict)
    latents: Float16[np.ndarray, "*views 2 c h_latent w_latent"] | None = None


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member, as WebDataset splits them: `a/0001.seg.png` -> (`a/0001`, `seg.png`)."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix


def kind_of(suffix: str) -> str | None:
    """The role of a member; None for a suffix that is not part of the schema."""
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return {LABELS_SUFFIX: "seg", JSON_SUFFIX: "json", LATENT_SUFFIX: "latent"}.get(suffix)


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The tightest box (x1, y1, x2, y2), ends exclusive, around a non-empty mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def pillow(image: Picture) -> Image.Image:
    """The picture for Pillow."""
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def encode_sample(sample: Sample, image_format: str = "png", picture: bytes | None = None) -> dict[str, bytes]:
    """The members of a sample by suffix, in the order of a shard.

    Args:
        picture: the image as a file of this format, stored as it is; None: the image is encoded.

    Raises:
        ValueError: an unknown image format.
    """
    if image_format not in _SAVE_OPTIONS:
        raise ValueError(f"image_format is {image_format!r}; expected one of {', '.join(IMAGE_SUFFIXES)}")
    height, width = sample.labels.shape
    told = {
        "caption": sample.caption,
        "width": width,
        "height": height,
        "segments": [asdict(segment) for segment in sample.segments],
        "source": sample.source,
    }
    wide = sample.labels.max(initial=0) > 255
    labels = Image.fromarray(sample.labels.astype(np.uint16 if wide else np.uint8))
    members = {
        image_format: picture or _saved(pillow(sample.image), _SAVE_OPTIONS[image_format]),
        LABELS_SUFFIX: _saved(labels, _SAVE_OPTIONS["png"]),
        JSON_SUFFIX: json.dumps(told, ensure_ascii=False).encode(),
    }
    if sample.latents is not None:
        file = io.BytesIO()
        np.save(file, sample.latents)
        members[LATENT_SUFFIX] = file.getvalue()
    return members


def decode_sample(key: str, members: Mapping[str, bytes]) -> Sample:
    """A sample from its members by suffix; other members are ignored.

    Raises:
        BadSample: a member is missing or unreadable, or sizes disagree.
    """
    pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
    if not pictures:
        raise BadSample(f"the picture {key}.{'|'.join(IMAGE_SUFFIXES)} is missing")
    if len(pictures) > 1:
        raise BadSample(f"{len(pictures)} pictures, expected one: {', '.join(f'{key}.{name}' for name in pictures)}")
    suffix = pictures[0]
    for name in (LABELS_SUFFIX, JSON_SUFFIX):
        if name not in members:
            raise BadSample(f"member {key}.{name} is missing")
    image = read_member(key, suffix, members[suffix], _read_image)
    labels = read_member(key, LABELS_SUFFIX, members[LABELS_SUFFIX], _read_labels)
    told, segments = read_member(key, JSON_SUFFIX, members[JSON_SUFFIX], read_told)
    latents = None
    if LATENT_SUFFIX in members:
        latents = read_member(key, LATENT_SUFFIX, members[LATENT_SUFFIX], _read_latents)
    size = (told["height"], told["width"])
    shape = (image.height, image.width)
    if not shape == labels.shape == size:
        raise BadSample(f"sizes disagree: picture {_size(shape)}, label map {_size(labels.shape)}, JSON {_size(size)}")
    return Sample(key, image, labels, told["caption"], segments, told["source"], latents)


def check_sample(sample: Sample, max_subjects: int | None = None) -> list[str]:
    """What is wrong with a sample that could be decoded: one line a problem, none where it is sound."""
    problems = []
    if _MARKER.search(sample.caption):
        problems.append(f"caption {sample.caption!r} holds a subject marker; markers are set while training")
    if max_subjects is not None and len(sample.segments) > max_subjects:
        problems.append(f"{len(sample.segments)} subjects, at most {max_subjects} are allowed")
    if sample.latents is not None and not (
        np.isfinite(sample.latents).all() and (sample.latents[..., 1, :, :, :] >= 0).all()
    ):
        problems.append("latents hold NaN, infinite values or negative standard deviations")
    ids = [segment.id for segment in sample.segments]
    problems += [f"segment id {i} is given {ids.count(i)} times" for i in sorted(set(ids)) if ids.count(i) > 1]
    for segment in sample.segments:
        problems += [f"segment {segment.id}: {problem}" for problem in _check_segment(segment, sample)]
    return problems


def _check_segment(segment: Segment, sample: Sample) -> list[str]:
    problems = []
    if not 0 <= segment.start < segment.end <= len(sample.caption):
        problems.append(f"offsets {segment.start}..{segment.end} lie outside the caption {sample.caption!r}")
    elif sample.caption[segment.start : segment.end] != segment.noun:
        found = sample.caption[segment.start : segment.end]
        problems.append(f"the noun {segment.noun!r} is not at its offsets, where the caption says {found!r}")
    if not 0 < segment.id <= MAX_ID:
        return [*problems, f"an id must be positive (0 is the background) and at most {MAX_ID}"]
    mask = sample.labels == segment.id
    area = int(np.count_nonzero(mask))
    if area == 0:
        return [*problems, "its mask is empty: the id does not occur in the label map"]
    if segment.area != area:
        problems.append(f"area is given as {segment.area}, the mask has {area} pixels")
    if tuple(segment.bbox) != bounding_box(mask):
        problems.append(f"bbox is given as {list(segment.bbox)}, the mask's is {list(bounding_box(mask))}")
    return problems


def _saved(picture: Image.Image, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def read_member(key: str, suffix: str, content: bytes, reader: Any) -> Any:
    """Call a reader; whatever a library raises at damaged content becomes a BadSample."""
    try:
        return reader(content)
    except MemoryError:
        raise  # the machine's, not the content's: sizes are checked first
    except Exception as error:
        raise BadSample(f"cannot read {key}.{suffix}: {type(error).__name__}: {one_line(str(error))}") from error


def one_line(text: str, longest: int = 300) -> str:
    """Text that any terminal and log takes: on one line, unprintable characters escaped, not endless."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= longest else text[:longest] + "..."


def _open_picture(content: bytes, formats: tuple[str, ...]) -> Image.Image:
    """A picture that is not decoded yet. Formats are named: Pillow would hand others to outside programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
        picture = Image.open(io.BytesIO(content), formats=formats)
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels, at most {MAX_PIXELS:,d} are allowed")
    return picture


def _read_image(content: bytes) -> Image.Image:
    with _open_picture(content, _PICTURE_FORMATS) as picture:
        if picture.mode not in _PICTURE_MODES or "transparency" in picture.info:
            raise ValueError(f"a picture is RGB or grey with 8 bits a channel and opaque, this one is {picture.mode}")
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def _read_labels(content: bytes) -> np.ndarray:
    with _open_picture(content, ("PNG",)) as picture:
        if picture.mode not in {"L", "P", "I;16", "I"}:
            raise ValueError(f"a label map has one channel of 8 or 16 bits, this one is {picture.mode}")
        labels = np.asarray(picture)
    return labels if labels.dtype == np.uint8 else labels.astype(np.int32)


def _read_latents(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("expected a .npy file of version 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if "latents" in (dtype.names or ()):  # a record of moa_train.data.views
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False)["latents"])
    if dtype != np.float16 or len(shape) != 4 or shape[0] != 2 or by_columns:
        raise ValueError(f"expected float16 of shape 2 x c x h x w by rows, got {dtype} {shape}")
    if len(content) - file.tell() != 2 * math.prod(shape):
        raise ValueError(f"{len(content) - file.tell()} bytes of values, its shape {shape} has {2 * math.prod(shape)}")
    return np.frombuffer(content, np.float16, offset=file.tell()).reshape(shape)


def read_told(content: bytes) -> tuple[dict[str, Any], tuple[Segment, ...]]:
    """Caption, width, height and source of a sample by name, and its segments, from its JSON.

    Raises:
        ValueError, TypeError, KeyError: it is not as the schema says.
    """
    told = _object(json.loads(content.decode("utf-8")), "the content")
    listed = told["segments"]
    if not isinstance(listed, list):
        raise TypeError(f"segments is a {type(listed).__name__}, expected a list")
    segments = tuple(_read_segment(_object(s, f"segment {i}"), f"segments[{i}]") for i, s in enumerate(listed))
    source = told.get("source") or {}
    if not isinstance(source, dict):
        source = {"name": source}
    known = {"caption": _text(told, "caption"), "height": _whole(told, "height"), "width": _whole(told, "width")}
    return {**known, "source": source}, segments


def _read_segment(told: dict[str, Any], where: str) -> Segment:
    box = told["bbox"]
    if not isinstance(box, list) or len(box) != 4 or any(type(side) is not int for side in box):
        raise TypeError(f"{where}.bbox is {box!r}, expected four whole numbers")
    numbers = {name: _whole(told, name, f"{where}.") for name in ("id", "start", "end", "area")}
    return Segment(**numbers, noun=_text(told, "noun", f"{where}."), bbox=(box[0], box[1], box[2], box[3]))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{where} is a {type(value).__name__}, expected an object")
    return value


def _whole(told: dict[str, Any], name: str, where: str = "") -> int:
    value = told[name]
    if type(value) is not int:  # bool is none
        raise TypeError(f"{where}{name} is {value!r}, expected a whole number")
    return value


def _text(told: dict[str, Any], name: str, where: str = "") -> str:
    value = told[name]
    if not isinstance(value, str):
        raise TypeError(f"{where}{name} is {value!r}, expected text")
    value.encode("utf-8")  # half a surrogate pair, which JSON can hold, is no character
    return value


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
