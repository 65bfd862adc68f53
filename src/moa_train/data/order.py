"""Order is data: which sample comes k-th in an epoch, and the key that all its random numbers are drawn from.

Both are functions of numbers alone (SplitMix64, Steele et al. 2014), equal on every machine, rank and library version.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64, UInt64

_SHARDS, _SAMPLES, _KEYS, _SETS, _PLACES = 1, 2, 3, 4, 5
"""Streams of numbers: the order of shards, the order in a window, sample keys, seeds of mixed sets, places in a mix."""


def mix(values: UInt64[np.ndarray, "*any"]) -> UInt64[np.ndarray, "*any"]:
    """SplitMix64's output function: a bijection of 64-bit numbers that looks random."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _hashed(stream: int, seed: int, epoch: int, numbers: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    return mix(_state(stream, seed, epoch) ^ numbers.astype(np.uint64))


@lru_cache(maxsize=64)
def _state(stream: int, seed: int, epoch: int) -> UInt64[np.ndarray, " one"]:
    state = mix(np.array([stream], dtype=np.uint64))
    for number in (seed, epoch):
        state = mix(state ^ np.array([number & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return state


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


def shares_of(sizes: Sequence[int], weights: Sequence[float | int] | None) -> tuple[int, ...]:
    """How many samples of each set one epoch has; together as many as the sets have.

    Rounded by largest remainders. Without weights each set gives what it has.

    Raises:
        ValueError: not one positive number a set, or one so small that its set would never be drawn.
    """
    if weights is None:
        return tuple(sizes)
    if len(weights) != len(sizes) or not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights are {list(weights)}; expected a positive number for each of {len(sizes)} sets")
    exact = np.array(weights) / sum(weights) * sum(sizes)
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: sum(sizes) - shares.sum()]] += 1
    if not shares.all():
        raise ValueError(f"weights are {list(weights)}: a set of them has no sample in an epoch of {sum(sizes)}")
    return tuple(shares.tolist())


def mixed_order(
    sets: Sequence[Int64[np.ndarray, " _"]], shares: Sequence[int], seed: int, epoch: int, window: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """An epoch of several sets: for each of its samples the epoch of its own set, and its number.

    Each set goes through its own epochs, whatever the others do, so that all its samples come equally often; an epoch
    of the mixture takes the next `share` samples of each. The k-th of them lies at a random place in
    [k, k + 1) / share of the epoch: any stretch has nearly the sets' shares, without a period. One set alone is
    `epoch_order`.

    Args:
        sets: samples in each shard of each set; sample numbers run through sets and shards in order.
    """
    if len(sets) == 1 and shares[0] == sets[0].sum():
        order = epoch_order(sets[0], seed, epoch, window)
        return np.full_like(order, epoch), order
    seeds = _hashed(_SETS, seed, 0, np.arange(len(sets))).tolist()
    parts, first = [], 0
    for counts, share, own in zip(sets, shares, seeds, strict=True):
        epochs, samples = _stretch(counts, own, window, epoch * share, share)
        chance = _hashed(_PLACES, own, epoch, np.arange(share)).astype(np.float64) / 2.0**64
        parts.append(((np.arange(share) + chance) / share, epochs, first + samples))
        first += int(counts.sum())
    places, epochs, samples = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(places, kind="stable")
    return epochs[order], samples[order]


def _stretch(
    counts: Int64[np.ndarray, " shards"], seed: int, window: int, start: int, length: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Epochs and sample numbers of a stretch of a set's endless sequence."""
    total = int(counts.sum())
    first, last = start // total, (start + length - 1) // total
    samples = np.concatenate([epoch_order(counts, seed, epoch, window) for epoch in range(first, last + 1)])
    skipped = start - first * total
    return (start + np.arange(length)) // total, samples[skipped : skipped + length]
