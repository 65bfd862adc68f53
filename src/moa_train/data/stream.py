"""The exact stream: a seeded, elastic, resumable order of samples, the same on any number of ranks and workers.

Global batch g (counted over the whole run) is slice g mod B of epoch g div B, where an epoch has B = N div G global
batches. Rank r of W takes every W-th sample of it, so a run resumed elsewhere sees the same samples at the same step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.utils.data

from moa_train.data.guard import Notes
from moa_train.data.mixture import Mixture, MixtureReader
from moa_train.data.order import mixed_order, sample_key
from moa_train.data.schema import BadSample, Sample, check_sample
from moa_train.data.stages import Pipeline
from moa_train.data.views import EncodedSample

STATE_VERSION = 1
ENDLESS = 1 << 40
"""What an endless stream gives as its length: Lightning must never see it end; `max_steps` ends the run."""

Address = tuple[int, int]
"""(epoch of its set, sample)"""


@dataclass(frozen=True)
class StreamOrder:
    """All that decides which sample comes when, apart from how the work is shared.

    counts: samples in each shard of each set. shares: samples of each set in an epoch.
    """

    counts: tuple[np.ndarray, ...]
    shares: tuple[int, ...]
    seed: int
    window: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.window < 1 or self.global_batch < 1:
            raise ValueError(f"window is {self.window}, the global batch {self.global_batch}; expected 1 or more")
        if self.batches_per_epoch < 1:
            raise ValueError(
                f"a global batch of {self.global_batch} samples is larger than the data set "
                f"({sum(self.shares)}): lower batch_size, accumulation or the number of ranks"
            )

    @property
    def batches_per_epoch(self) -> int:
        """B; the samples behind the last whole global batch of an epoch are left out, on all ranks."""
        return sum(self.shares) // self.global_batch

    def epoch(self, number: int) -> np.ndarray:
        """The addresses of an epoch in order, one a row."""
        return np.stack(mixed_order(self.counts, self.shares, self.seed, number, self.window), axis=1)


class GlobalBatchSampler:
    """The micro-batches of one rank, without end: lists of addresses.

    Args:
        order: what comes when.
        rank, world: which share of each global batch is this rank's.
        accumulate: micro-batches of one global batch on a rank.
        start_step: the global batch to begin with.

    Raises:
        ValueError: the global batch cannot be shared out evenly.
    """

    def __init__(
        self, order: StreamOrder, rank: int = 0, world: int = 1, accumulate: int = 1, start_step: int = 0
    ) -> None:
        if order.global_batch % (world * accumulate):
            raise ValueError(
                f"a global batch of {order.global_batch} cannot be shared by {world} ranks x {accumulate} micro-batches"
            )
        self.order = order
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.start_step = start_step

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[Address]]:
        size, batches = self.order.global_batch, self.order.batches_per_epoch
        epoch, first = divmod(self.start_step, batches)
        while True:
            addresses = self.order.epoch(epoch)
            for batch in range(first, batches):
                mine = addresses[batch * size : (batch + 1) * size][self.rank :: self.world].tolist()
                micro = len(mine) // self.accumulate
                for start in range(0, len(mine), micro):
                    yield [(own, sample) for own, sample in mine[start : start + micro]]
            epoch, first = epoch + 1, 0


class ValidationSampler:
    """The first samples in stored order, every W-th for a rank; all ranks have equally many."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        if count < world:
            raise ValueError(f"{count} validation samples cannot be shared by {world} ranks: give a larger set")
        self.samples = range(rank, count - count % world, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[list[Address]]:
        for start in range(0, len(self.samples), self.batch_size):
            yield [(0, sample) for sample in self.samples[start : start + self.batch_size]]


class ExactStream(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a batch by address: read, decode, stages.

    A bad sample is replaced by the next of its set that is sound, never dropped: ranks would part. It keeps its own
    key, so that its replacement gets other noise than where it stands itself.
    """

    def __init__(self, sets: Mixture, pipeline: Pipeline, seed: int, notes: Notes, open_shards: int = 16) -> None:
        self.reader = MixtureReader(sets, open_shards, pipeline.latents)
        self.pipeline = pipeline
        self.seed = seed
        self.notes = notes

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, address: Address) -> dict[str, Any]:
        epoch, sample = address
        key = sample_key(self.seed, epoch, sample)
        for steps in itertools.count():
            number = self.reader.mixture.following(sample, steps)
            try:
                row = prepared(self.pipeline, self.reader[number], key, number)
            except BadSample as error:
                self.notes.refuse(error)
            else:
                self.notes.sound()
                return row
        raise AssertionError("the count has no end")


def prepared(pipeline: Pipeline, stored: Sample | EncodedSample, key: int, number: int) -> dict[str, Any]:
    """Run the stages on a sample that is checked first.

    Raises:
        BadSample: it has a problem that the schema forbids, or its prompt cannot be tokenised.
    """
    problems = check_sample(stored) if isinstance(stored, Sample) else []
    if problems:
        raise BadSample(f"key {stored.key}: {problems[0]}")
    try:
        return pipeline(stored, key, number)
    except ValueError as error:
        raise BadSample(f"key {stored.key}: {error}") from error


@dataclass(frozen=True)
class StreamState:
    """Where a run stands in its data: what is stored in a checkpoint, the same on all ranks."""

    version: int
    stream: str
    epoch: int
    samples_done: int
    global_batch: int
    seed: int
    window: int
    index_hash: str

    @classmethod
    def at(cls, step: int, order: StreamOrder, index_hash: str) -> StreamState:
        """The state after `step` global batches were processed."""
        epoch, batch = divmod(step, order.batches_per_epoch)
        done = batch * order.global_batch
        return cls(STATE_VERSION, "exact", epoch, done, order.global_batch, order.seed, order.window, index_hash)

    def step(self, order: StreamOrder) -> int:
        """Global batches processed."""
        return self.epoch * order.batches_per_epoch + self.samples_done // order.global_batch


_WHAT_TO_DO = {
    "stream": "set data.stream to what it was",
    "version": "resume with the version of moa-train that wrote the checkpoint",
    "global_batch": "batch_size x ranks x accumulation: change data.batch_size or trainer.accumulate_grad_batches",
    "seed": "set the seed to what it was",
    "window": "set data.window to what it was",
    "index_hash": "data.train or data.weights is not what the run began with: give the same shards and weights",
}


def refuse_changed_state(stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with another order of data than the run began with.

    Raises:
        ValueError: names what changed, its value then and now, and what to do.
    """
    changed = [name for name in _WHAT_TO_DO if stored.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{name} was {stored.get(name)}, is {now.get(name)} ({_WHAT_TO_DO[name]})" for name in changed)
        raise ValueError(f"cannot resume exactly: {told}. To start the data anew, begin a new run from the weights")
