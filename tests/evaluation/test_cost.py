"""Seconds and memory: what is counted, and what is not; how summaries are joined."""

import numpy as np
import psutil
import pytest
import torch

from moa_train.evaluation.cost import measure_seconds, peak_memory
from moa_train.evaluation.gallery import Gallery
from moa_train.evaluation.summary import joined, summarise


def test_seconds_are_means_over_pictures_without_the_batch_that_warms_up():
    nothing = np.empty((4, 1, 2), dtype=object)
    seconds = {"moa": np.array([np.nan, np.nan, 1.0, 1.0, 4.0]), "prior": np.array([0.5, 0.5])}
    numbers = measure_seconds(Gallery((), (), nothing, nothing[:2], seconds=seconds), batch_size=2)
    assert numbers["seconds_per_picture"] == {"moa": 2.0, "prior": 0.5}
    assert numbers["intervals"]["seconds_per_picture.prior"] == [0.5, 0.5]


def test_resident_memory_sees_what_was_in_use_and_is_no_more():
    cpu = torch.device("cpu")
    before, now = peak_memory(cpu)["resident_gigabytes"], psutil.Process().memory_info().rss / 1e9
    assert now < before + 0.01
    held = torch.ones(int((before - now + 0.3) * 1e9 / 4))
    del held
    assert peak_memory(cpu) == {"resident_gigabytes": pytest.approx(before + 0.3, abs=0.05)}


def test_summaries_of_one_measure_are_joined_and_what_was_not_measured_is_left_out():
    first = summarise({"a.x": torch.tensor([1.0, 3.0, torch.nan]), "a.z": torch.full((3,), torch.nan)}, [0, 1, 1])
    second = summarise({"a.y": torch.tensor([5.0]), "b": torch.tensor([6.0])}, [0])
    whole = joined(first, second)
    assert whole["a"] == {"x": 2.0, "y": 5.0}
    assert whole["b"] == 6.0
    assert whole["intervals"].keys() == {"a.x", "a.y", "b"}
    assert whole["intervals"]["a.x"] == [1.0, 3.0]
