"""Metrics against closed forms, naive loops and numpy."""

import itertools

import numpy as np
import pytest
import torch

from moa_train.evaluation import metrics


def naive_otsu(values: np.ndarray, bins: int = 256) -> float:
    """The cut with the largest variance between classes, by trying all of them."""
    edges = np.linspace(values.min(), values.max(), bins + 1)
    index = np.clip(((values - values.min()) / (edges[1] - edges[0])).astype(int), 0, bins - 1)
    scores = []
    for cut in range(bins - 1):
        low, high = index[index <= cut], index[index > cut]
        scores.append(0.0 if not len(low) or not len(high) else len(low) * len(high) * (low.mean() - high.mean()) ** 2)
    best = np.flatnonzero(np.array(scores) >= max(scores) * (1 - 1e-6))
    return float(edges[0] + (best.mean() + 1) * (edges[1] - edges[0]))


@pytest.mark.parametrize("seed", range(3))
def test_otsu_equals_the_naive_search(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0.2, 0.05, 80), rng.normal(0.7, 0.1, 64)]).astype(np.float32)
    found = metrics.otsu_threshold(torch.from_numpy(values).reshape(1, 12, 12))
    assert float(found) == pytest.approx(naive_otsu(values), abs=1e-4)


def test_otsu_cuts_two_levels_in_the_middle_and_leaves_constants_alone():
    maps = torch.stack([torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.full((2, 2), 0.3)])
    assert torch.allclose(metrics.otsu_threshold(maps), torch.tensor([0.5, 0.3]), atol=0.01)


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


def test_dilation_reaches_exactly_its_margin_in_each_direction():
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 4, 4] = True
    grown = metrics.dilate(mask, 2)[0]
    assert grown.sum() == 25
    assert grown[2:7, 2:7].all()
    assert torch.equal(metrics.dilate(mask, 0), mask)


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
