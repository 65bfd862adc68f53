"""Several sets of shards as one: sample numbers run through the sets in order, weights say how often each is drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from moa_train.data.order import shares_of
from moa_train.data.schema import Sample
from moa_train.data.shards import ShardIndex, ShardReader
from moa_train.data.views import EncodedSample, decode_views


class Mixture:
    """The sets that a run trains on. `len(mixture)` counts samples.

    Args:
        indexes: one or more sets.
        weights: how many samples of each are drawn, relative to the others; None: as many as it has.

    Raises:
        ValueError: weights that do not fit the sets.
    """

    def __init__(self, indexes: Sequence[ShardIndex], weights: Sequence[float | int] | None = None) -> None:
        self.indexes = tuple(indexes)
        self.shares = shares_of([len(index) for index in indexes], weights)
        self._starts = np.concatenate([[0], np.cumsum([len(index) for index in indexes])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def counts(self) -> tuple[np.ndarray, ...]:
        """Samples in each shard of each set."""
        return tuple(index.counts for index in self.indexes)

    @property
    def hash(self) -> str:
        """Identity of the data and of how it is mixed; of one set alone its own."""
        if len(self.indexes) == 1:
            return self.indexes[0].hash
        told = [[index.hash, share] for index, share in zip(self.indexes, self.shares, strict=True)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def place(self, number: int) -> tuple[int, int]:
        """Set of a sample, and its number there."""
        chosen = int(np.searchsorted(self._starts, number, side="right")) - 1
        return chosen, number - int(self._starts[chosen])

    def following(self, number: int, steps: int) -> int:
        """The sample that many further on in the same set; behind its last comes its first."""
        chosen, place = self.place(number)
        return int(self._starts[chosen]) + (place + steps) % len(self.indexes[chosen])


class MixtureReader:
    """Samples by number.

    Args:
        open_shards: files held open at once, of each set.
        views: read the stored views instead of the pictures.
    """

    def __init__(self, mixture: Mixture, open_shards: int = 16, views: bool = False) -> None:
        self.mixture = mixture
        self.views = views
        self.readers = [ShardReader(index, open_shards) for index in mixture.indexes]

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, number: int) -> Sample | EncodedSample:
        """Raises `BadSample`, as `ShardReader`."""
        chosen, place = self.mixture.place(number)
        if self.views:
            return decode_views(*self.readers[chosen].read(place, ("json", "latent")))
        return self.readers[chosen][place]
