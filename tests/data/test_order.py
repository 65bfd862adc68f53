"""The order of an epoch is a pure function with windows; keys are SplitMix64."""

import numpy as np
import pytest

from moa_train.data.order import epoch_order, mix, sample_key

COUNTS = np.array([5, 1, 7, 3, 9, 4])
MASK = (1 << 64) - 1


def _splitmix64(x: int) -> int:
    """Steele et al. 2014, with Python's integers."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_mix_is_splitmix64():
    assert int(mix(np.array([0], dtype=np.uint64))[0]) == 0xE220A8397B1DCDAF  # first output of the reference, seed 0
    numbers = np.random.default_rng(0).integers(0, 2**63, 50, dtype=np.uint64)
    assert mix(numbers).tolist() == [_splitmix64(int(x)) for x in numbers]


def test_sample_key_is_the_hash_chain_of_seed_epoch_and_sample():
    for seed, epoch, sample in ((0, 0, 0), (3, 1, 17), (2**31, 1000, 10**9)):
        state = _splitmix64(3)
        for number in (seed, epoch, sample):
            state = _splitmix64(state ^ number)
        assert sample_key(seed, epoch, sample) == state >> 1 < 2**63


def test_keys_differ():
    keys = {sample_key(seed, epoch, sample) for seed in range(5) for epoch in range(5) for sample in range(100)}
    assert len(keys) == 2500


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_an_epoch_is_a_permutation_in_which_a_window_bounds_the_shards(window):
    order = epoch_order(COUNTS, seed=1, epoch=2, window=window)
    assert sorted(order.tolist()) == list(range(COUNTS.sum()))
    shards = np.repeat(np.arange(len(COUNTS)), COUNTS)[order].tolist()
    while shards:
        in_use = list(dict.fromkeys(shards))[:window]
        size = int(sum(COUNTS[shard] for shard in in_use))
        part, shards = shards[:size], shards[size:]
        assert set(part) == set(in_use)
        assert not set(part) & set(shards)


def test_the_order_is_a_function_of_its_arguments_alone():
    first = epoch_order(COUNTS, 1, 2, 3)
    np.random.seed(0)  # noqa: NPY002 - global state must not matter
    np.testing.assert_array_equal(epoch_order(COUNTS.copy(), 1, 2, 3), first)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 2)):
        assert epoch_order(COUNTS, *other).tolist() != first.tolist()


def test_every_sample_comes_first_about_equally_often():
    firsts = [int(epoch_order(np.array([4, 4]), 0, epoch, 1)[0]) for epoch in range(800)]
    assert np.bincount(firsts, minlength=8).min() > 60  # mean 100, standard deviation 9.4


def test_the_order_of_a_seed_never_changes():
    assert epoch_order(np.array([3, 3]), 0, 0, 1).tolist() == [4, 5, 3, 2, 0, 1]
