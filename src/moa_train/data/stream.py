"""The exact stream: a seeded, elastic, resumable order of samples, the same on any number of ranks and workers.

Global batch g (counted over the whole run) is slice g mod B of epoch g div B, where an epoch has B = N div G global
batches. Rank r of W takes every W-th sample of it, so a run resumed elsewhere sees the same samples at the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.utils.data
from jaxtyping import Int64

from moa_train.data.order import epoch_order, sample_key
from moa_train.data.schema import BadSample, Sample, check_sample
from moa_train.data.shards import ShardIndex, ShardReader
from moa_train.data.stages import Pipeline

log = logging.getLogger(__name__)

STATE_VERSION = 1
ENDLESS = 1 << 40
"""What an endless stream gives as its length: Lightning must never see it end; `max_steps` ends the run."""
BAD_SAMPLE_POLICIES = ("raise", "skip")

_TRIES = 100
_FEW_SAMPLES = 100

Address = tuple[int, int]
"""(epoch, sample)"""


@dataclass(frozen=True)
class StreamOrder:
    """All that decides which sample comes when, apart from how the work is shared."""

    counts: Int64[np.ndarray, " shards"]
    seed: int
    window: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.window < 1 or self.global_batch < 1:
            raise ValueError(f"window is {self.window}, the global batch {self.global_batch}; expected 1 or more")
        if self.batches_per_epoch < 1:
            raise ValueError(
                f"a global batch of {self.global_batch} samples is larger than the data set "
                f"({int(self.counts.sum())}): lower batch_size, accumulation or the number of ranks"
            )

    @property
    def batches_per_epoch(self) -> int:
        """B; the samples behind the last whole global batch of an epoch are left out, on all ranks."""
        return int(self.counts.sum()) // self.global_batch

    def epoch(self, number: int) -> Int64[np.ndarray, " n"]:
        """Sample numbers of an epoch in order."""
        return epoch_order(self.counts, self.seed, number, self.window)


class GlobalBatchSampler:
    """The micro-batches of one rank, without end: lists of (epoch, sample).

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
            samples = self.order.epoch(epoch)
            for batch in range(first, batches):
                mine = samples[batch * size : (batch + 1) * size][self.rank :: self.world].tolist()
                micro = len(mine) // self.accumulate
                for start in range(0, len(mine), micro):
                    yield [(epoch, sample) for sample in mine[start : start + micro]]
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


class BadSampleGuard:
    """Counts and logs bad samples (each once); stops the run at the first, or where they are too many.

    Args:
        policy: "raise" or "skip".
        max_fraction: of the samples that this worker has read; judged once it has read a hundred.
    """

    def __init__(self, policy: str = "raise", max_fraction: float = 0.01) -> None:
        if policy not in BAD_SAMPLE_POLICIES:
            raise ValueError(f"on_bad_sample is {policy!r}; expected one of {', '.join(BAD_SAMPLE_POLICIES)}")
        self.policy = policy
        self.max_fraction = max_fraction
        self.read = 0
        self.bad = 0
        self._logged: set[str] = set()

    def refuse(self, error: Exception) -> None:
        """Take note of a bad sample.

        Raises:
            ValueError: by policy, or because too many were bad.
        """
        if self.policy == "raise":
            raise BadSample(f"{error}; moa-data validate lists all such samples, on_bad_sample=skip goes on") from error
        self.bad += 1
        if str(error) not in self._logged:
            self._logged.add(str(error))
            log.warning("bad sample replaced: %s", error)
        if self.read >= _FEW_SAMPLES and self.bad > self.max_fraction * self.read:
            raise ValueError(
                f"{self.bad} of {self.read} samples were bad, max_bad_fraction is {self.max_fraction}: "
                f"run moa-data validate; the last one: {error}"
            ) from error


class ExactStream(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a batch by address (epoch, sample): read, decode, stages.

    A bad sample is replaced by the next sample number that is sound, never dropped: ranks would part. It keeps its own
    key, so that its replacement gets other noise than where it stands itself.
    """

    def __init__(
        self, index: ShardIndex, pipeline: Pipeline, seed: int, guard: BadSampleGuard, open_shards: int = 16
    ) -> None:
        self.reader = ShardReader(index, open_shards)
        self.pipeline = pipeline
        self.seed = seed
        self.guard = guard

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, address: Address) -> dict[str, Any]:
        epoch, sample = address
        key = sample_key(self.seed, epoch, sample)
        for shift in range(_TRIES):
            number = (sample + shift) % len(self)
            self.guard.read += 1
            try:
                stored = self.reader[number]
                return prepared(self.pipeline, stored, key, number)
            except BadSample as error:
                self.guard.refuse(error)
        raise ValueError(f"samples {sample} to {number} are all bad: run moa-data validate")


def prepared(pipeline: Pipeline, stored: Sample, key: int, number: int) -> dict[str, Any]:
    """Run the stages on a sample that is checked first.

    Raises:
        BadSample: it has a problem that the schema forbids, or its prompt cannot be tokenised.
    """
    problems = check_sample(stored)
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
    "index_hash": "data.train is not the data that the run began with: give the same shards",
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
