"""Samples of a person's own Python code: a source, or any iterable of samples or mappings, checked and packed."""

from __future__ import annotations

import importlib
import inspect
import io
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from moa_train.data.packing import Source, write_shards
from moa_train.data.report import Item, LeftOut
from moa_train.data.schema import Sample, check_sample, encode_sample
from moa_train.data.shards import ShardIndex
from moa_train.data.sources.compose import compose, label_map
from moa_train.data.sources.pictures import as_rgb, read_photo

_KEYS = {"key", "image", "masks", "labels", "caption", "nouns", "source"}


def pack_samples(samples: Source | Iterable[Any], out: str | Path, split: str = "train", **settings: Any) -> ShardIndex:
    """Write shards of one's own samples, as `moa-data pack` does.

    Args:
        samples: something with `len()` and samples by number, which is made when asked for, by workers, and goes on
            after an interruption; or any iterable, which is gone through once into a temporary file beside the shards.
            A sample is a `Sample`, or a mapping; see `as_sample`.
        settings: `no_noun` of `as_sample`, and what `write_shards` takes.

    Raises:
        ValueError: no sample can be used, two have one key, or what `write_shards` raises.
    """
    no_noun, image_format = settings.pop("no_noun", "append"), settings.get("image_format", "png")
    if isinstance(samples, Source):
        return write_shards(Checked(samples, no_noun), out, split, **settings)
    with spooled(samples, out, image_format, no_noun) as source:
        return write_shards(source, out, split, **{**settings, "workers": 0})


@contextmanager
def spooled(samples: Iterable[Any], out: str | Path, image_format: str, no_noun: str = "append") -> Iterator[Source]:
    """The samples of an iterable as a source, kept encoded in a temporary file in `out`.

    Raises:
        ValueError: it cannot be gone through, or what `as_item` raises.
    """
    if not isinstance(samples, Iterable) or isinstance(samples, (str, bytes, Mapping)):
        raise ValueError(f"the source gave a {type(samples).__name__}; expected samples one after another, or a source")
    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as file:
        spool = _Spool(file)
        for number, one in enumerate(samples):
            item = as_item(one, number, no_noun)
            content = item.content
            members = encode_sample(content, image_format) if isinstance(content, Sample) else content
            spool.append(item, members or {})
        yield spool


def as_sample(told: Mapping[str, Any], number: int = 0, no_noun: str = "append") -> tuple[Sample, tuple[Any, ...]]:
    """A sample from a mapping, and remarks on what had to be changed for it.

    Args:
        told: `image` (H x W x 3 array of uint8, a PIL picture or a path), `caption`, and `masks` (a list of H x W
            arrays, one a subject; where they overlap the smaller lies in front) or `labels` (a label map), `nouns`
            (what each subject is called, in the order of the masks or ids; "person" unless given), `key` (`number`
            unless given), `source` (a mapping that JSON holds).
        no_noun: what becomes of subjects that the caption does not name: append, keep or leave_out; see `compose`.

    Raises:
        LeftOut: the picture or the subjects cannot be used.
        ValueError: a name that is not known, or a wrong type.
    """
    unknown = sorted(set(told) - _KEYS)
    if unknown or not {"image", "caption"} <= set(told):
        raise ValueError(
            f"a sample has {', '.join(sorted(map(str, told)))}; expected image, caption and any of "
            f"{', '.join(sorted(_KEYS - {'image', 'caption'}))}"
        )
    image = _image(told["image"])
    masks = [np.asarray(mask).astype(bool) for mask in told.get("masks", ())]
    shapes = {mask.shape for mask in masks} | ({np.shape(told["labels"])} if "labels" in told else set())
    if shapes - {image.shape[:2]}:
        raise LeftOut("a mask has another size than the picture", f"{sorted(shapes)}, picture {image.shape[:2]}")
    labels = label_map(masks) if masks else np.zeros(image.shape[:2], dtype=np.uint8)
    labels = np.asarray(told["labels"]).astype(np.int32) if "labels" in told else labels
    ids = np.unique(labels[labels > 0])
    if masks and len(ids) < len(masks):
        raise LeftOut("a mask is empty or hidden by others", f"{len(ids)} of {len(masks)} can be seen")
    nouns: Sequence[str] = told.get("nouns") or ["person"] * len(ids)
    key = str(told.get("key", f"{number:08d}"))
    return compose(
        key, image, labels, str(told["caption"]), nouns, no_noun=no_noun, source=dict(told.get("source", {}))
    )


def as_item(one: Any, number: int, no_noun: str = "append") -> Item:
    """What someone's code gave, as an item; what cannot be used is left out with its reason.

    Raises:
        ValueError: it is neither a sample nor a mapping, or a mapping of wrong names.
    """
    if isinstance(one, Item):
        return one
    if one is None:
        return Item(str(number), None)
    if isinstance(one, Sample):
        problems = check_sample(one)
        remark = LeftOut("it is not a sound sample", "; ".join(problems)).remark
        return Item(one.key, None, (remark,)) if problems else Item(one.key, one)
    if not isinstance(one, Mapping):
        raise ValueError(
            f"sample {number} is a {type(one).__name__}; expected a Sample, or a mapping with image, caption"
        )
    try:
        sample, remarks = as_sample(one, number, no_noun)
    except LeftOut as left_out:
        return Item(str(one.get("key", number)), None, (left_out.remark,))
    return Item(sample.key, sample, remarks)


def _image(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of someone's code: an array, a PIL picture or a path."""
    try:
        if isinstance(image, (str, Path)):
            return read_photo(image)
        if isinstance(image, Image.Image):
            return np.asarray(as_rgb(image))
    except ValueError as error:
        raise LeftOut("the picture cannot be read", error) from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    told = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ValueError(f"image is {told}; expected H x W x 3 numbers of uint8, a PIL picture, or a path")


@dataclass(frozen=True)
class Checked:
    """A source whose samples may be mappings, each checked."""

    source: Source
    no_noun: str = "append"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Item:
        return as_item(self.source[number], number, self.no_noun)


def load_function(name: str) -> Callable[..., Any]:
    """`package.module:function`, looked for in the current folder, too.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"source is {name!r}; expected package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"source {name} cannot be imported: {error}; is its folder the current one?") from error
    if not callable(found):
        raise ValueError(f"source {name} is a {type(found).__name__}; expected a function that gives samples")
    return found


def call(function: Callable[..., Any], split: str, arguments: Mapping[str, Any]) -> Any:
    """The function's samples; it is told the split if it has a parameter of this name.

    Raises:
        ValueError: it does not take these arguments.
    """
    told = {**arguments, **({"split": split} if "split" in inspect.signature(function).parameters else {})}
    try:
        inspect.signature(function).bind(**told)
    except TypeError as error:
        given = ", ".join(told) or "no arguments"
        raise ValueError(f"source cannot be called with {given}: {error}; give args={{name: value}}") from error
    return function(**told)


class _Spool:
    """Encoded items in a temporary file, so that what comes in one order can be stored in another."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.items: list[tuple[Item, int, dict[str, int]]] = []

    def append(self, item: Item, members: Mapping[str, bytes]) -> None:
        """Keep an item; of its content only the members, in the file."""
        place = self.file.seek(0, io.SEEK_END)
        self.file.writelines(members.values())
        sizes = {suffix: len(content) for suffix, content in members.items()}
        self.items.append((Item(item.key, None, item.remarks), place, sizes))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Item:
        item, place, sizes = self.items[number]
        self.file.seek(place)
        members = {suffix: self.file.read(size) for suffix, size in sizes.items()}
        return Item(item.key, members or None, item.remarks)
