"""Writing shards: shuffled with a seed, each shard appears complete or not at all, an interrupted packing goes on."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moa_train.data.members import scan_shard
from moa_train.data.parallel import ordered_map
from moa_train.data.report import REPORT_NAME, Item, Report
from moa_train.data.schema import Sample, encode_sample, split_name
from moa_train.data.shards import INDEX_NAME, Shard, ShardIndex, index_shards
from moa_train.data.storage import replacing, sha256_of

log = logging.getLogger(__name__)

SHARD_BYTES = 256_000_000
TAR_FORMAT = tarfile.USTAR_FORMAT


@runtime_checkable
class Source(Protocol):
    """Samples by number, made when asked for. An `Item` also tells what was left out and why; None: left out."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sample | Item | None: ...


def write_shards(
    source: Source,
    out: str | Path,
    split: str,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    image_format: str = "png",
    workers: int = 0,
    command: str = "",
    config: dict[str, Any] | None = None,
    on_sample: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Write a source as the shards `OUT/SPLIT/SPLIT-000000.tar` ... with their index.

    What the source left out is counted in the index (`packing["left_out"]`) and listed in `report.json`.

    Args:
        source: samples in any order; they are shuffled with `seed`.
        shard_bytes: a shard is closed once it is this large.
        image_format: jpg, png or webp (the last two lossless).
        workers: processes that make samples; 0: this one. The bytes do not depend on it.
        command, config: kept in the index. A folder that holds other settings is refused; one with the same settings
            is completed, or left as it is where complete.
        on_sample: called with the number of source items done, also those of an earlier, interrupted run.

    Raises:
        ValueError: the folder holds data of other settings, a key is given twice or cannot be a file name, or no
            sample is left.
    """
    folder = Path(out) / split
    settings = {"samples": len(source), "seed": seed, "shard_bytes": shard_bytes, "image_format": image_format}
    packing: dict[str, Any] = {"command": command, "config": {**(config or {}), **settings}}
    if (folder / INDEX_NAME).exists():
        return complete_already(folder, packing["config"], on_sample)
    progress = PackingProgress(folder / f"{split}-packing.json", packing["config"])
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    make = partial(_make, source, image_format)
    with closing(ordered_map(make, order[progress.done :], workers)) as items:
        _write(items, folder, split, shard_bytes, progress, on_sample or (lambda done: None))
    _save_report(progress.report, folder)
    if not progress.shards:
        progress.path.unlink()
        why = "".join(f"; {line.strip()}" for line in progress.report.lines()[:3])
        raise ValueError(f"no sample is left to write to {folder}: all {len(source)} were left out{why}")
    told = progress.report.told()
    packing.update({name: told[name] for name in ("left_out", "remarked")})
    index = index_shards(folder, split, tuple(progress.shards), packing)
    progress.path.unlink()
    return index


class PackingProgress:
    """What an unfinished packing has written: complete shards, and how many source items are in them."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, json.loads(json.dumps(config))
        self.shards: list[Shard] = []
        self.done = 0
        self.report = Report()
        if path.exists():
            told = json.loads(path.read_text())
            if told["config"] != self.config:
                raise ValueError(_other_settings(path.parent, told["config"], self.config))
            self.shards = [Shard(**shard) for shard in told["shards"]]
            self.done = told["done"]
            self.report = Report.read(told["report"])
            log.info("%s: %d shards are there already; going on", path.parent, len(self.shards))
        for left_behind in path.parent.glob(".*.tar.*"):  # by a kill while a shard was written
            left_behind.unlink()

    def add(self, shard: Shard | None, done: int) -> None:
        self.done = done
        self.shards += [] if shard is None else [shard]
        shards = [asdict(shard) for shard in self.shards]
        told = {"config": self.config, "done": done, "shards": shards, "report": self.report.told()}
        with replacing(self.path) as file:
            file.write(json.dumps(told).encode())


def _make(source: Source, image_format: str, number: int) -> Item:
    """Item `number` with its content encoded."""
    item = source[number]
    if item is None:
        return Item(str(number), None)
    if isinstance(item, Sample):
        item = Item(item.key, item)
    if isinstance(item.content, Sample):
        return Item(item.key, encode_sample(item.content, image_format), item.remarks)
    return item


def _write(
    items: Iterable[Item],
    folder: Path,
    split: str,
    shard_bytes: int,
    progress: PackingProgress,
    on_sample: Callable[[int], None],
) -> None:
    """Fill shard after shard; note each in `progress` once it is complete."""
    iterator = iter(items)
    done, ended = progress.done, False
    keys = {sample.key for shard in progress.shards for sample in scan_shard(folder / shard.name)[0]}
    on_sample(done)
    while not ended:
        path = folder / f"{split}-{len(progress.shards):06d}.tar"
        count = 0
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=TAR_FORMAT) as tar:
            while file.tell() < shard_bytes and not ended:
                try:
                    item = next(iterator)
                except StopIteration:
                    ended = True
                    break
                if item.content is not None:
                    assert not isinstance(item.content, Sample)
                    add_sample(tar, item.key, item.content, keys)
                    count += 1
                progress.report.add(item.key, item.content is not None, item.remarks)
                done += 1
                on_sample(done)
        shard = Shard(path.name, count, path.stat().st_size, sha256_of(path)) if count else None
        if shard is None:
            path.unlink()
        progress.add(shard, done)


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes], keys: set[str]) -> None:
    """Append a sample whose key is none of `keys` yet."""
    if key in keys:
        raise ValueError(f"two samples have the key {key!r}: give each sample a key of its own")
    keys.add(key)
    for suffix, content in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        if split_name(info.name) != (key, suffix) or not key.isascii() or not key.isprintable() or key[:1] in "/":
            raise ValueError(f"the key {key!r} cannot name a sample: use letters, digits, - and _, no dots")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _save_report(report: Report, folder: Path) -> None:
    if report.names:
        with replacing(folder / REPORT_NAME) as file:
            file.write(json.dumps(report.told(), indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def complete_already(folder: Path, config: dict[str, Any], on_sample: Callable[[int], None] | None) -> ShardIndex:
    """The index of a set that is there; raises ValueError where other settings made it."""
    index = ShardIndex.load(folder)
    if index.packing.get("config") != json.loads(json.dumps(config)):
        raise ValueError(_other_settings(folder, index.packing.get("config") or {}, config))
    if on_sample is not None:
        on_sample(config["samples"])
    return index


def _other_settings(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    differ = ", ".join(f"{name} {there.get(name)!r} there, {now.get(name)!r} asked for" for name in names)
    return f"{folder} holds data made with other settings ({differ}): give another out=, or delete that folder"
