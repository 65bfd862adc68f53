"""Writing shards: shuffled with a seed, each shard appears complete or not at all, an interrupted packing goes on."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moa_train.data.schema import Sample, encode_sample
from moa_train.data.shards import INDEX_NAME, Shard, ShardIndex, index_shards
from moa_train.data.storage import replacing, sha256_of

log = logging.getLogger(__name__)

SHARD_BYTES = 256_000_000
_TAR_FORMAT = tarfile.USTAR_FORMAT


@runtime_checkable
class Source(Protocol):
    """Samples by number, made when asked for. None: this one is left out (the source has said why)."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sample | None: ...


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

    Args:
        source: samples in any order; they are shuffled with `seed`.
        shard_bytes: a shard is closed once it is this large.
        image_format: jpg, png or webp (the last two lossless).
        workers: processes that make samples; 0: this one. The bytes do not depend on it.
        command, config: kept in the index. A folder that holds other settings is refused; one with the same settings
            is completed, or left as it is where complete.
        on_sample: called with the number of source items done, also those of an earlier, interrupted run.

    Raises:
        ValueError: the folder holds data of other settings, or no sample is left.
    """
    folder = Path(out) / split
    settings = {"samples": len(source), "seed": seed, "shard_bytes": shard_bytes, "image_format": image_format}
    packing: dict[str, Any] = {"command": command, "config": {**(config or {}), **settings}}
    if (folder / INDEX_NAME).exists():
        return _complete_already(folder, packing["config"], on_sample)
    progress = _Progress(folder / f"{split}-packing.json", packing["config"])
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    with _encoded(source, order[progress.done :], image_format, workers) as samples:
        _write(samples, folder, split, shard_bytes, progress, on_sample or (lambda done: None))
    if not progress.shards:
        raise ValueError(f"no sample is left to write to {folder}: all {len(source)} were left out")
    index = index_shards(folder, split, tuple(progress.shards), packing)
    progress.path.unlink()
    return index


class _Progress:
    """What an unfinished packing has written: complete shards, and how many source items are in them."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, json.loads(json.dumps(config))
        self.shards: list[Shard] = []
        self.done = 0
        if path.exists():
            told = json.loads(path.read_text())
            if told["config"] != self.config:
                raise ValueError(_other_settings(path.parent, told["config"], self.config))
            self.shards = [Shard(**shard) for shard in told["shards"]]
            self.done = told["done"]
            log.info("%s: %d shards are there already; going on", path.parent, len(self.shards))

    def add(self, shard: Shard | None, done: int) -> None:
        self.done = done
        self.shards += [] if shard is None else [shard]
        told = {"config": self.config, "done": done, "shards": [asdict(shard) for shard in self.shards]}
        with replacing(self.path) as file:
            file.write(json.dumps(told).encode())


class _encoded:
    """Context of an iterator over the encoded samples of a source, made here or by worker processes."""

    def __init__(self, source: Source, order: list[int], image_format: str, workers: int) -> None:
        self.make = partial(_make, source, image_format)
        self.order = order
        self.pool = multiprocessing.Pool(workers) if workers else None

    def __enter__(self) -> Iterator[tuple[str, dict[str, bytes]] | None]:
        return map(self.make, self.order) if self.pool is None else self.pool.imap(self.make, self.order, chunksize=16)

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()


def _make(source: Source, image_format: str, number: int) -> tuple[str, dict[str, bytes]] | None:
    sample = source[number]
    return None if sample is None else (sample.key, encode_sample(sample, image_format))


def _write(
    samples: Iterable[tuple[str, dict[str, bytes]] | None],
    folder: Path,
    split: str,
    shard_bytes: int,
    progress: _Progress,
    on_sample: Callable[[int], None],
) -> None:
    """Fill shard after shard; note each in `progress` once it is complete."""
    iterator = iter(samples)
    done, ended = progress.done, False
    on_sample(done)
    while not ended:
        path = folder / f"{split}-{len(progress.shards):06d}.tar"
        count = 0
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=_TAR_FORMAT) as tar:
            while file.tell() < shard_bytes and not ended:
                try:
                    item = next(iterator)
                except StopIteration:
                    ended = True
                    break
                if item is not None:
                    _add(tar, *item)
                    count += 1
                done += 1
                on_sample(done)
        shard = Shard(path.name, count, path.stat().st_size, sha256_of(path)) if count else None
        if shard is None:
            path.unlink()
        progress.add(shard, done)


def _add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for suffix, content in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _complete_already(folder: Path, config: dict[str, Any], on_sample: Callable[[int], None] | None) -> ShardIndex:
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
