"""Stored views: what training needs of a sample, encoded beforehand, so that no picture is decoded.

A view is a square of the picture, perhaps mirrored. `KEY.latent.npy` holds one record that plain numpy reads:

    latents         float16, views x 2 x c x h x w: mean and standard deviation of the VAE's posterior
    masks           per crop and segment (in the order of KEY.json) the segment's pixels in each latent cell
    subject_N, mask_N    segment N's box of the picture, 8-bit RGB, weighed by its mask, and the mask, 0 to 255 (sets of
                         earlier versions: true or false); absent where the segment is

Views are ordered crop by crop, each plain and then mirrored. Crop 0 is the centre without zoom.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16, Integer, UInt8

from moa_train.data.cutout import reduced
from moa_train.data.geometry import Resize, Window, mirrored
from moa_train.data.packing import TAR_FORMAT, PackingProgress, add_sample, complete_already
from moa_train.data.schema import (
    JSON_SUFFIX,
    LATENT_SUFFIX,
    BadSample,
    Sample,
    Segment,
    bounding_box,
    read_member,
    read_told,
)
from moa_train.data.shards import INDEX_NAME, Shard, ShardIndex, ShardReader, index_shards
from moa_train.data.storage import replacing, sha256_of

_NPY_START = 10
"""Bytes before the header of a .npy file of version 1.0: magic, version, the header's length."""
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': \[(.+)\], 'fortran_order': False, 'shape': \(\), \} *\n", re.DOTALL
)
_NPY_FIELD = re.compile(r"\('(\w+)', '([<|][ubf]\d)', \((\d+(?:, \d+)+)\)\)")

Encoder = Callable[[UInt8[np.ndarray, "views size size 3"]], Float16[np.ndarray, "views 2 c h w"]]


@dataclass(frozen=True)
class ViewSettings:
    """Which views are stored.

    resolution: side of the square in pixels. crops: squares of each picture; the first is the centre, the others are
        drawn as crop, zoom, pad and hold_subjects say (`Resize`). flips: each also mirrored.
    subject_side: longer subjects' pictures are reduced to this many pixels; shorter ones are kept exactly.
    """

    resolution: int
    crops: int = 1
    flips: bool = True
    crop: str = "centre"
    zoom: tuple[float, float] = (1.0, 1.0)
    pad: str = "none"
    hold_subjects: bool = False
    subject_side: int = 224

    def __post_init__(self) -> None:
        by_chance = self.crop == "random" or tuple(self.zoom) != (1.0, 1.0)
        if self.crops < 1 or by_chance != (self.crops > 1):
            raise ValueError(
                f"crops is {self.crops} with crop={self.crop} and zoom={list(self.zoom)}: 1 is the centre alone; more "
                "need crop=random or a zoom, which in turn need crops=2 or more"
            )

    def windows(self, sample: Sample) -> list[Window]:
        """The squares of a picture: the same whenever they are asked for."""
        resize = Resize(self.resolution, self.crop, tuple(self.zoom), self.pad, self.hold_subjects)
        seed = int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:8], "big")
        first = replace(resize, crop="centre", zoom=(1.0, 1.0)).window(sample, np.random.default_rng([seed, 0]))
        return [first, *(resize.window(sample, np.random.default_rng([seed, n])) for n in range(1, self.crops))]

    def views(self, sample: Sample) -> list[Sample]:
        """Every view of a sample, in the order in which they are stored."""
        plain = [window.show(sample, self.resolution) for window in self.windows(sample)]
        return [each for view in plain for each in ((view, mirrored(view)) if self.flips else (view,))]


@dataclass(frozen=True, eq=False)
class EncodedSample:
    """A sample as its stored views show it; `record` is what the module describes."""

    key: str
    caption: str
    segments: tuple[Segment, ...]
    record: np.ndarray

    @property
    def crops(self) -> int:
        """Squares of the picture."""
        return int(self.record["masks"].shape[0])

    def latents(self, crop: int, flip: bool) -> Float16[np.ndarray, "2 c h w"]:
        """Mean and standard deviation of a view."""
        stored = self.record["latents"]
        each = len(stored) // self.crops
        if flip and each == 1:
            raise BadSample("mirrored views are not stored: set flip_probability=0, or encode them with flips=true")
        return stored[crop * each + int(flip)]

    def masks(self, crop: int, flip: bool) -> Integer[np.ndarray, "segments h w"]:
        """Pixels of each segment in each latent cell of a view."""
        masks = self.record["masks"][crop]
        return masks[..., ::-1] if flip else masks

    def subject(
        self, segment: Segment
    ) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"] | Bool[np.ndarray, "h w"]]:
        """Picture and mask of a subject, as `cut_out` takes them."""
        number = [each.id for each in self.segments].index(segment.id)
        return self.record[f"subject_{number}"], self.record[f"mask_{number}"]


def record_of(sample: Sample, settings: ViewSettings, latents: Float16[np.ndarray, "views 2 c h w"]) -> np.ndarray:
    """The record to store, given what the VAE made of `settings.views(sample)`."""
    cells = latents.shape[-1]
    factor = settings.resolution // cells
    shown = [window.show(sample, settings.resolution).labels for window in settings.windows(sample)]
    shape = (len(shown), len(sample.segments), cells, cells)
    masks = np.zeros(shape, dtype=np.uint8 if factor**2 < 256 else np.uint16)
    for crop, labels in enumerate(shown):
        for number, segment in enumerate(sample.segments):
            masks[crop, number] = (labels == segment.id).reshape(cells, factor, cells, factor).sum((1, 3))
    parts: dict[str, np.ndarray] = {"latents": latents, "masks": masks}
    for number, segment in enumerate(sample.segments):
        mask = sample.labels == segment.id
        if mask.any():
            subject, weight = reduced(sample.image, mask, bounding_box(mask), settings.subject_side)
            parts |= {f"subject_{number}": subject, f"mask_{number}": weight}
    record = np.zeros((), dtype=[(name, part.dtype, part.shape) for name, part in parts.items()])
    for name, part in parts.items():
        record[name] = part
    return record


def decode_views(key: str, members: Mapping[str, bytes]) -> EncodedSample:
    """A sample from its JSON and its record; the picture is not looked at.

    Raises:
        BadSample: a member is missing or unreadable, or the two do not fit.
    """
    if JSON_SUFFIX not in members or LATENT_SUFFIX not in members:
        raise BadSample(f"{key} has no latents: set data.latents=false, or make them with moa-data latents")
    told, segments = read_member(key, JSON_SUFFIX, members[JSON_SUFFIX], read_told)
    record = read_member(key, LATENT_SUFFIX, members[LATENT_SUFFIX], _read_record)
    if record["masks"].shape[1] != len(segments):
        raise BadSample(f"{key}.{LATENT_SUFFIX} has {record['masks'].shape[1]} segments, {key}.json {len(segments)}")
    for segment in segments:
        if told["caption"][segment.start : segment.end] != segment.noun:
            raise BadSample(f"key {key}: segment {segment.id}: the noun {segment.noun!r} is not at its offsets")
    return EncodedSample(key, told["caption"], segments, record)


def _read_record(content: bytes) -> np.ndarray:
    """`np.load` of what `np.save` wrote of a record: numpy itself takes ten times as long to parse the header."""
    start = _NPY_START + int.from_bytes(content[_NPY_START - 2 : _NPY_START], "little")
    header = _NPY_HEADER.fullmatch(content[:start])
    fields = _NPY_FIELD.findall(header[1].decode("latin-1")) if header else []
    dtype = np.dtype([(name, code, tuple(map(int, shape.split(", ")))) for name, code, shape in fields])
    if not {"latents", "masks"} <= set(dtype.names or ()):
        raise ValueError("expected one record with latents and masks, as moa-data latents writes it")
    if len(content) != start + dtype.itemsize:
        raise ValueError(f"the record has {len(content) - start} bytes, its header says {dtype.itemsize}")
    return np.frombuffer(content, dtype, offset=start).reshape(())


def write_views(
    source: ShardIndex,
    out: str | Path,
    encode: Encoder,
    settings: ViewSettings,
    vae: Mapping[str, Any],
    batch_size: int = 8,
    on_sample: Callable[[int], None] = lambda done: None,
) -> ShardIndex:
    """Copy a split to `OUT/SPLIT`, shard by shard, in the same order, with the record of every sample added.

    Args:
        encode: what the VAE makes of views.
        vae: its `name` and `weights` (hash), kept in the index.
        batch_size: samples encoded at once.
        on_sample: called with the number of samples done, also those of an earlier, interrupted run.

    Raises:
        ValueError: the folder holds data of other settings. BadSample: a sample cannot be read.
    """
    folder = Path(out) / source.split
    latents = {**asdict(settings), "zoom": list(settings.zoom), "vae": dict(vae)}
    config = {"source": source.hash, "samples": len(source), "latents": latents}
    if (folder / INDEX_NAME).exists():
        return complete_already(folder, config, on_sample)
    progress = PackingProgress(folder / f"{source.split}-packing.json", config)
    reader = ShardReader(source)
    on_sample(progress.done)
    keys: set[str] = set()
    for shard in source.shards[len(progress.shards) :]:
        path, end = folder / shard.name, progress.done + shard.count
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=TAR_FORMAT) as tar:
            for start in range(progress.done, end, batch_size):
                numbers = range(start, min(start + batch_size, end))
                for key, members in _with_records(reader, numbers, encode, settings):
                    add_sample(tar, key, members, keys)
                on_sample(numbers[-1] + 1)
        progress.add(Shard(path.name, shard.count, path.stat().st_size, sha256_of(path)), end)
    packing = {"command": "moa-data latents", "config": config}
    index = index_shards(folder, source.split, tuple(progress.shards), packing)
    progress.path.unlink()
    return index


def _with_records(
    reader: ShardReader, numbers: range, encode: Encoder, settings: ViewSettings
) -> list[tuple[str, dict[str, bytes]]]:
    """The samples' members with their records."""
    samples = [reader[number] for number in numbers]
    encoded = encode(np.stack([np.asarray(view.image) for sample in samples for view in settings.views(sample)]))
    made = []
    for number, sample, latents in zip(numbers, samples, np.split(encoded, len(samples)), strict=True):
        key, members = reader.read(number)
        if not np.isfinite(latents).all():
            raise ValueError(f"the latents of {key} do not fit into float16: is this VAE in float32?")
        file = io.BytesIO()
        np.save(file, record_of(sample, settings, latents))
        made.append((key, {**members, LATENT_SUFFIX: file.getvalue()}))
    return made


def check_views(index: ShardIndex, vae: str, wanted: Mapping[str, Any], flips: bool) -> None:
    """Refuse stored views that a run cannot use.

    Args:
        vae: hash of the run's VAE. wanted: resolution, crop, zoom, pad and hold_subjects of the run.
        flips: whether the run mirrors pictures.

    Raises:
        ValueError: there are none, or another VAE or other settings made them; says which.
    """
    where = f"{index.storage.location} (data.latents=true)"
    told = (index.packing.get("config") or {}).get("latents")
    if told is None:
        raise ValueError(f"{where} has no latents: make them with moa-data latents, or set data.latents=false")
    if told["vae"]["weights"] != vae:
        raise ValueError(
            f"{where} was encoded by the VAE of {told['vae']['name']} ({told['vae']['weights']}), this run's prior has "
            f"another ({vae}): give that prior, or encode the set again with moa-data latents"
        )
    different = [f"{name} is {told[name]} there, {value} here" for name, value in wanted.items() if told[name] != value]
    if flips and not told["flips"]:
        different.append("no mirrored views are there, flip_probability is above 0 here")
    if different:
        raise ValueError(f"{where} was encoded with other settings: {'; '.join(different)}")
