"""The classic WebDataset pipeline, for shards that cannot be indexed or cached (`pipe:`, object stores, `http`).

Shards are handed out without end, in a new order every epoch, to ranks and workers in turn: every rank can take any
number of steps. A resume goes on with the shard after the ones that were read: exact to a shard, not to a sample.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
import webdataset as wds
from webdataset import tariterators

from moa_train.data.guard import Notes
from moa_train.data.order import epoch_order, sample_key
from moa_train.data.schema import BadSample, decode_sample
from moa_train.data.stages import Pipeline, collate
from moa_train.data.stream import prepared

log = logging.getLogger(__name__)


class EndlessShards(torch.utils.data.IterableDataset[dict[str, Any]]):
    """One rank's shards in a new order every epoch, beginning with shard number `start` of the endless sequence.

    Rank and world are given, not asked of the process group: a worker process need not have one.
    """

    def __init__(self, urls: list[str], seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.urls, self.seed, self.start, self.rank, self.world = urls, seed, start, rank, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.islice(self._all(), self.rank, None, self.world)

    def _all(self) -> Iterator[dict[str, Any]]:
        epoch, first = divmod(self.start, len(self.urls))
        while True:
            order = epoch_order(np.array([len(self.urls)]), self.seed, epoch, 1)
            for shard in order[first:].tolist():
                yield {"url": self.urls[shard], "epoch": epoch}
            epoch, first = epoch + 1, 0


class _Open:
    """A stage of the pipeline: shards -> raw samples, each with the epoch it is read in."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def __call__(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            try:
                opened = wds.gopen(shard["url"])
            except OSError as error:
                self.notes.refuse(error)
                continue
            with opened as stream:  # closed here: webdataset leaves it to the garbage collector
                files = tariterators.tar_file_expander(iter([{**shard, "stream": stream}]), handler=self._handle)
                for raw in tariterators.group_by_keys(files, handler=self._handle):
                    yield {**raw, "__epoch__": shard["epoch"]}

    def _handle(self, error: Exception) -> bool:
        self.notes.refuse(error)
        return True


class _Rows:
    """A stage of the pipeline: raw samples -> rows of a batch."""

    def __init__(self, pipeline: Pipeline, seed: int, notes: Notes) -> None:
        self.pipeline, self.seed, self.notes = pipeline, seed, notes

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for raw in samples:
            key = raw["__key__"]
            number = _number(key)
            try:
                stored = decode_sample(key, {name: value for name, value in raw.items() if isinstance(value, bytes)})
                row = prepared(self.pipeline, stored, sample_key(self.seed, raw["__epoch__"], number), number)
            except BadSample as error:
                self.notes.refuse(BadSample(f"shard {raw['__url__']}: {error}"))
            else:
                self.notes.sound()
                yield row


def sequential_batches(
    urls: list[str],
    pipeline: Pipeline,
    batch_size: int,
    *,
    seed: int,
    notes: Notes,
    shuffle_buffer: int = 1000,
    start_shard: int = 0,
    rank: int = 0,
    world: int = 1,
) -> wds.DataPipeline:
    """Batches of this rank and worker, without end.

    Args:
        urls: shards; anything that webdataset opens.
        shuffle_buffer: samples among which the next is drawn; 0: as they come.
        start_shard: how many shards of the endless sequence are skipped.
        rank, world: which of its shards are this rank's.
    """
    stages: list[Any] = [EndlessShards(urls, seed, start_shard, rank, world), wds.split_by_worker, _Open(notes)]
    if shuffle_buffer:
        first = min(100, shuffle_buffer)
        stages.append(wds.shuffle(shuffle_buffer, initial=first, rng=random.Random(seed + start_shard)))
    stages += [_Rows(pipeline, seed, notes), wds.batched(batch_size, collation_fn=collate, partial=False)]
    return wds.DataPipeline(*stages)


def resume_shard(step: int, global_batch: int, shard_samples: int) -> int:
    """The shard of the endless sequence to go on with after `step` global batches; says so in the log."""
    shard = -(-step * global_batch // shard_samples)
    if shard:
        log.warning(
            "sequential stream: resuming at shard %d of the sequence (%d samples were processed, about %d a shard); "
            "within a shard the position is not kept: some samples are seen twice or left out",
            shard,
            step * global_batch,
            shard_samples,
        )
    return shard


def expand_shards(pattern: str) -> list[str]:
    """Shards of a folder, a glob (`DIR/*.tar`) or a brace list (`http://host/train-{000000..000099}.tar`).

    Raises:
        ValueError: nothing is there.
    """
    if "://" not in pattern and not pattern.startswith("pipe:"):
        path = Path(pattern)
        if path.is_dir():
            pattern = str(path / "*.tar")
        if "*" in pattern or "?" in pattern:
            path = Path(pattern)
            found = sorted(str(shard) for shard in path.parent.glob(path.name))
            if not found:
                raise ValueError(f"no shard matches {pattern}")
            return found
    return list(wds.shardlists.expand_urls(pattern))


def _number(key: str) -> int:
    """A number for a sample that has no place in an index: a 63-bit hash of its key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
