"""Numbers of a split against a hand count."""

import numpy as np

from moa_train.data.packing import write_shards
from moa_train.data.schema import Sample, Segment
from moa_train.data.stats import split_stats


def _sample(key, shape, sides, caption):
    """Squares of these sides from the upper left corner on, side by side, all of them dogs."""
    labels, segments, left = np.zeros(shape, np.uint8), [], 0
    for number, side in enumerate(sides, 1):
        labels[:side, left : left + side] = number
        start = [i for i in range(len(caption)) if caption.startswith("dog", i)][number - 1]
        segments.append(Segment(number, "dog", start, start + 3, (left, 0, left + side, side), side * side))
        left += side
    return Sample(key, np.zeros((*shape, 3), np.uint8), labels, caption, tuple(segments))


def test_a_split_is_counted(tmp_path):
    samples = [_sample("a", (10, 40), [2, 4], "a dog and a dog"), _sample("b", (20, 10), [5], "the old dog"),
               _sample("c", (20, 10), [], "the old dog")]  # fmt: skip
    told = split_stats(write_shards(samples, tmp_path, "train"), count_tokens=len)
    assert told["samples"] == 3
    assert told["captions"]["different"] == 2
    assert (told["captions"]["words"]["0"], told["captions"]["words"]["100"]) == (3, 5)
    assert (told["captions"]["tokens"]["0"], told["captions"]["tokens"]["100"]) == (11, 15)
    assert told["subjects"] == {"0": 1, "1": 1, "2": 1}
    assert told["nouns"] == {"dog": 3}
    assert sorted(told["shares"]) == [4 / 400, 16 / 400, 25 / 200]
