"""The order of an epoch is a pure function with windows; keys are SplitMix64."""

import time

import numpy as np
import pytest

from moa_train.data.order import epoch_order, mix, mixed_order, sample_key, shares_of

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


def test_one_set_is_the_order_of_its_epoch():
    epochs, samples = mixed_order([COUNTS], [29], 1, 2, 3)
    np.testing.assert_array_equal(samples, epoch_order(COUNTS, 1, 2, 3))
    assert set(epochs.tolist()) == {2}


SETS = [np.array([4, 3]), np.array([10, 10, 10]), np.array([5])]
SHARES = (24, 6, 12)
FIRSTS = (0, 7, 37)


def _of_each_set(epochs):
    """(own epoch, sample) of each set over the first epochs of the mixture, in order."""
    found = [[], [], []]
    for epoch in range(epochs):
        for own, sample in zip(*(a.tolist() for a in mixed_order(SETS, SHARES, 5, epoch, 2)), strict=True):
            found[np.searchsorted(FIRSTS, sample, side="right") - 1].append((own, sample))
    return found


def test_each_set_of_a_mixture_goes_through_its_own_epochs():
    for counts, share, first, found in zip(SETS, SHARES, FIRSTS, _of_each_set(10), strict=True):
        size = int(counts.sum())
        assert len(found) == 10 * share
        for start in range(0, len(found) - size + 1, size):
            own, samples = zip(*found[start : start + size], strict=True)
            assert set(own) == {start // size}
            assert sorted(samples) == list(range(first, first + size))


def test_no_sample_of_a_mixture_comes_twice_with_one_key():
    addresses = [address for found in _of_each_set(10) for address in found]
    assert len(set(addresses)) == len(addresses) == 10 * sum(SHARES)


def test_any_stretch_of_a_mixture_has_nearly_the_shares():
    for epoch in range(5):
        samples = mixed_order(SETS, SHARES, 5, epoch, 2)[1]
        which = np.searchsorted(FIRSTS, samples, side="right") - 1
        for chosen, share in enumerate(SHARES):
            ideal = np.arange(1, 43) * share / 42
            assert np.abs(np.cumsum(which == chosen) - ideal).max() < 2.5


def test_equal_sets_do_not_fall_to_ranks_one_each():
    samples = mixed_order([np.array([50])] * 2, (50, 50), 0, 0, 1)[1]
    assert 10 < int((samples[::2] < 50).sum()) < 40


def test_the_order_of_a_mixture_never_changes():
    epochs, samples = mixed_order([np.array([2]), np.array([3])], (4, 1), 0, 1, 1)
    assert list(zip(epochs.tolist(), samples.tolist(), strict=True)) == [(2, 0), (2, 1), (0, 2), (3, 1), (3, 0)]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((100, 300), None, (100, 300)),
        ((100, 300), (3, 1), (300, 100)),
        ((100, 300), (0.3, 0.1), (300, 100)),
        ((5, 5), (1, 2), (3, 7)),  # 3.33 and 6.67
        ((4, 3, 3), (1, 1, 1), (4, 3, 3)),
        ((7,), (2,), (7,)),
    ],
)
def test_an_epoch_has_as_many_samples_as_the_sets_in_the_ratio_of_the_weights(sizes, weights, expected):
    assert shares_of(sizes, weights) == expected


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ((1.0,), "expected a positive number for each of 2 sets"),
        ((1.0, 0.0), "expected a positive"),
        ((1.0, float("nan")), "expected a positive"),
        ((1.0, 1e-6), "has no sample in an epoch of 10"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights, told):
    with pytest.raises(ValueError, match=told):
        shares_of((5, 5), weights)


def test_an_epoch_of_a_million_is_ordered_quickly():
    counts = np.full(4000, 250)
    start = time.perf_counter()
    order = epoch_order(counts, 0, 3, 16)
    assert time.perf_counter() - start < 2.0  # about 0.2 s
    assert len(order) == 10**6
