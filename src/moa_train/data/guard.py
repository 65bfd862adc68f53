"""Bad samples between loader processes and the run: a worker notes them, the run's process counts, logs and judges.

What ends a run is handed over as data, too: an error that leaves a worker by itself arrives wrapped in its traceback.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.utils.data

from moa_train.data.schema import BadSample
from moa_train.data.stages import collate
from moa_train.symbols import Batch

log = logging.getLogger(__name__)

POLICIES = ("raise", "skip")

_IN_A_ROW = 100
_FEW_SAMPLES = 100


@dataclass(frozen=True)
class Loaded:
    """What a loader process hands over.

    batch: None where an error ends the run. read: samples read for it. bad: what was wrong with those left out.
    error: the user's to mend. trace: where it came from, as text.
    """

    batch: Batch | None
    read: int
    bad: tuple[str, ...]
    error: Exception | None = None
    trace: str = ""

    def pin_memory(self) -> Loaded:
        """The same with the batch in page-locked memory."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class Notes:
    """What one process notes of the samples that it reads.

    Args:
        policy: "raise": the first bad sample ends the run; "skip": it is noted.
    """

    def __init__(self, policy: str = "raise") -> None:
        if policy not in POLICIES:
            raise ValueError(f"on_bad_sample is {policy!r}; expected one of {', '.join(POLICIES)}")
        self.policy = policy
        self.read = 0
        self.bad: list[str] = []
        self._in_a_row = 0

    def sound(self) -> None:
        """A sample was read and is sound."""
        self.read += 1
        self._in_a_row = 0

    def refuse(self, error: Exception) -> None:
        """A sample was read and is bad.

        Raises:
            ValueError: by policy, or because none of the last hundred was sound.
        """
        self.read += 1
        self._in_a_row += 1
        if self.policy == "raise":
            raise BadSample(f"{error}; moa-data validate lists all such samples, on_bad_sample=skip goes on") from error
        if self._in_a_row >= _IN_A_ROW:
            raise ValueError(f"{self._in_a_row} samples in a row are bad: run moa-data validate; the last one: {error}")
        self.bad.append(str(error))

    def hand_over(self, load: Callable[[], Batch]) -> Loaded:
        """The batch that is loaded, or the user's error instead, with what was noted since the last time."""
        batch, error, trace = None, None, ""
        try:
            batch = load()
        except (ValueError, OSError) as raised:
            error, trace = raised, traceback.format_exc()
        noted = Loaded(batch, self.read, tuple(self.bad), error, trace)
        self.read, self.bad = 0, []
        return noted


class ReportedRows(torch.utils.data.Dataset[Any]):
    """Batches of a data set by the addresses of their rows, as `Loaded`; use `collate_fn=as_it_is`."""

    def __init__(self, rows: Any, notes: Notes) -> None:
        self.rows, self.notes = rows, notes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, addresses: Sequence[Any]) -> Loaded:
        return self.notes.hand_over(lambda: collate([self.rows[address] for address in addresses]))


class ReportedBatches(torch.utils.data.IterableDataset[Loaded]):
    """Batches of an endless pipeline, as `Loaded`."""

    def __init__(self, batches: Iterable[Batch], notes: Notes) -> None:
        self.batches, self.notes = batches, notes

    def __iter__(self) -> Iterator[Loaded]:
        batches = iter(self.batches)
        while True:
            loaded = self.notes.hand_over(lambda: next(batches))
            yield loaded
            if loaded.error is not None:
                return


def as_it_is(loaded: Loaded) -> Loaded:
    """The collate function of what is a batch already."""
    return loaded


class BadSampleGuard:
    """Counts the bad samples of a rank, logs each once, and stops the run where they are too many.

    Args:
        max_fraction: of the samples read, by all workers together; judged from the hundredth on.
    """

    def __init__(self, max_fraction: float = 0.01) -> None:
        if not 0.0 <= max_fraction <= 1.0:
            raise ValueError(f"max_bad_fraction is {max_fraction}; expected a number in [0, 1]")
        self.max_fraction = max_fraction
        self.read = 0
        self.bad = 0
        self._logged: set[str] = set()

    def take(self, loaded: Loaded) -> Batch:
        """The batch, once what was noted with it is counted.

        Raises:
            ValueError: too many samples were bad.
            Exception: what the worker could not go on after.
        """
        self.read += loaded.read
        self.bad += len(loaded.bad)
        for told in loaded.bad:
            if told not in self._logged:
                self._logged.add(told)
                log.warning("bad sample skipped (%d of %d so far): %s", self.bad, self.read, told)
        if loaded.error is not None:
            raise loaded.error from RuntimeError(f"while loading data:\n{loaded.trace}")
        if loaded.bad and self.read >= _FEW_SAMPLES and self.bad > self.max_fraction * self.read:
            raise ValueError(
                f"{self.bad} of {self.read} samples were bad, max_bad_fraction is {self.max_fraction}: "
                f"run moa-data validate; the last one: {loaded.bad[-1]}"
            )
        assert loaded.batch is not None
        return loaded.batch
