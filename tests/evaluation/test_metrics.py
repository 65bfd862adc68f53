"""Metrics against closed forms, naive loops and numpy."""

import itertools

import numpy as np
import pytest
import torch

from moa_train.evaluation import metrics


def test_routing_iou_is_one_for_the_mask_itself_and_ignores_scale_and_offset():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 4:12, 2:9] = True
    assert float(metrics.routing_iou(mask.float(), mask)) == 1.0
    assert float(metrics.routing_iou(0.8 + 0.01 * mask.float(), mask)) == 1.0
    assert float(metrics.routing_iou(1.0 - mask.float(), mask)) == 0.0


def test_routing_iou_of_a_map_of_lower_resolution():
    small = torch.zeros(1, 8, 8)
    small[:, 2:6, 2:6] = 1.0
    mask = torch.nn.functional.interpolate(small[:, None], (64, 64))[:, 0] > 0.5
    assert float(metrics.routing_iou(small, mask)) > 0.9


def test_iou_counts_pixels():
    first = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]).bool()
    second = torch.tensor([[[0, 1, 1], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]]).bool()
    assert metrics.iou(first, second).tolist() == pytest.approx([1 / 4, 1.0])


def test_cosine_equals_numpy_and_is_zero_for_nobody():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5)).astype(np.float32)
    a[2] = 0
    expected = [*(a[i] @ b[i] / np.linalg.norm(a[i]) / np.linalg.norm(b[i]) for i in range(2)), 0.0]
    assert metrics.cosine(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(expected, abs=1e-6)


def test_context_difference_sees_only_what_is_outside_people():
    first, second = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    people = torch.zeros(2, 4, 4, dtype=torch.bool)
    people[0, :2] = True
    people[1] = True
    second[:, :, :2] = 1.0  # inside the first picture's people
    second[:, :, 3] = 0.5  # half of what is outside
    assert metrics.context_difference(first, second, people).tolist() == pytest.approx([0.25 / 2, 0.0])


def test_correct_is_one_where_the_largest_logit_is_the_label():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert metrics.correct(logits, torch.tensor([1, 2])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_diversity_is_the_mean_over_pairs(count):
    pictures = torch.rand(2, count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pairs = list(itertools.combinations(range(count), 2))
    expected = [float(np.mean([((group[i] - group[j]) ** 2).mean() for i, j in pairs] or [0.0])) for group in pictures]
    assert metrics.diversity(pictures).tolist() == pytest.approx(expected, abs=1e-6)


def test_bootstrap_interval_holds_the_mean_and_knows_that_rows_of_a_group_are_not_independent():
    rng = np.random.default_rng(0)
    means = rng.normal(size=40)
    values, groups = np.repeat(means, 10), np.repeat(np.arange(40), 10)
    low, high = metrics.bootstrap_interval(values.tolist(), groups.tolist())
    assert low < values.mean() < high
    # Normal theory for 40 independent groups, not for 400 rows.
    assert (high - low) == pytest.approx(2 * 1.96 * means.std() / np.sqrt(40), rel=0.15)
    assert metrics.bootstrap_interval([0.5, 0.5], [0, 1]) == (0.5, 0.5)
