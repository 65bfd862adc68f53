"""Order is data: which sample comes k-th in an epoch, and the key that all its random numbers are drawn from.

Both are functions of numbers alone (SplitMix64, Steele et al. 2014), equal on every machine, rank and library version.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, UInt64

_SHARDS, _SAMPLES, _KEYS = 1, 2, 3
"""Streams of numbers: the order of shards, the order in a window, sample keys."""


def mix(values: UInt64[np.ndarray, "*any"]) -> UInt64[np.ndarray, "*any"]:
    """SplitMix64's output function: a bijection of 64-bit numbers that looks random."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _hashed(stream: int, seed: int, epoch: int, numbers: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    state = mix(np.array([stream], dtype=np.uint64))
    for number in (seed, epoch):
        state = mix(state ^ np.array([number & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return mix(state ^ numbers.astype(np.uint64))


def sample_key(seed: int, epoch: int, sample: int) -> int:
    """63-bit key of a sample in an epoch: noise, timestep, caption drop and augmentation are drawn from it."""
    return int(_hashed(_KEYS, seed, epoch, np.array([sample], dtype=np.int64))[0] >> np.uint64(1))


def epoch_order(counts: Int64[np.ndarray, " shards"], seed: int, epoch: int, window: int) -> Int64[np.ndarray, " n"]:
    """Sample numbers in the order of an epoch.

    The shards are permuted and joined in windows of `window`; samples are permuted inside each window. So at most
    `window` shards are in use at once.

    Args:
        counts: samples in each shard; sample numbers run through the shards in order.
    """
    starts = np.concatenate([[0], np.cumsum(counts)])
    shards = np.argsort(_hashed(_SHARDS, seed, epoch, np.arange(len(counts))), kind="stable")
    parts = []
    for first in range(0, len(shards), window):
        part = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]])
        parts.append(part[np.argsort(_hashed(_SAMPLES, seed, epoch, part), kind="stable")])
    return np.concatenate(parts)
