"""Small data sets, and a tokenizer that needs no files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moa_train.data.packing import write_shards
from moa_train.data.schema import Sample, Segment, bounding_box


class WordTokenizer:
    """One token a word: begin 1, end 2, padding 0, words from 3 on; the interface of a CLIP tokenizer."""

    model_max_length = 16

    def __call__(self, text, padding=None, max_length=None, truncation=False, add_special_tokens=True):
        ids = [3 + sum(word.encode()) % 1000 for word in text.split()]
        if add_special_tokens:
            ids = [1, *ids[: (max_length or 10**6) - 2], 2]
        if padding == "max_length":
            ids += [0] * (max_length - len(ids))
        return SimpleNamespace(input_ids=ids)


def square_sample(number: int, size: int = 16) -> Sample:
    """Random pixels with two squares as subjects: 1 a man on the left, 2 a woman on the right."""
    rng = np.random.default_rng(number)
    labels = np.zeros((size, size), dtype=np.uint8)
    labels[2 : size // 2, 1 : size // 2 - 1] = 1
    labels[4 : size - 1, size // 2 + 1 : size - 2] = 2
    caption = "a man and a woman at sea"
    segments = tuple(
        Segment(
            i,
            noun,
            caption.find(noun),
            caption.find(noun) + len(noun),
            bounding_box(labels == i),
            int((labels == i).sum()),
        )
        for i, noun in ((1, "man"), (2, "woman"))
    )
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Sample(f"{number:05d}", image, labels, caption, segments, {"number": number})


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def make_sample():
    return square_sample


@pytest.fixture
def samples() -> list[Sample]:
    return [square_sample(i) for i in range(23)]


@pytest.fixture
def packed(tmp_path: Path, samples):
    """23 samples in several shards."""
    return write_shards(samples, tmp_path, "train", shard_bytes=20_000)
