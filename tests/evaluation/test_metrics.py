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


def test_rank_counts_who_is_at_least_as_near_as_the_true_identity():
    rng = np.random.default_rng(0)
    vectors, lineup = rng.normal(size=(5, 6)).astype(np.float32), rng.normal(size=(20, 6)).astype(np.float32)
    truth = [3, 0, 19, 7, 7]
    vectors[3] = 0.1 * lineup[7]  # the very person, fainter
    vectors[4] = 0.0  # nobody
    expected = []
    for vector, own in zip(vectors, truth, strict=True):
        cosines = [v @ vector / max(np.linalg.norm(v) * np.linalg.norm(vector), 1e-12) for v in lineup]
        expected.append(sum(cosine >= cosines[own] for cosine in cosines))
    ranks = metrics.rank(*map(torch.from_numpy, (vectors, lineup)), torch.tensor(truth)).tolist()
    assert ranks == expected
    assert ranks[3:] == [1, 20]


def test_rank_of_strangers_is_at_chance():
    generator = torch.Generator().manual_seed(0)
    vectors, lineup = (torch.randn(n, 16, generator=generator) for n in (4000, 50))
    ranks = metrics.rank(vectors, lineup, torch.randint(50, (4000,), generator=generator))
    for k in (1, 5):
        # Four standard deviations of a share of 4,000.
        assert float((ranks <= k).float().mean()) == pytest.approx(k / 50, abs=4 * (k / 50 / 4000) ** 0.5)


def naive_ssim(first, second, row, column):
    """Of one place, mean over channels: Wang et al. 2004, equation 13, with a Gaussian window."""
    lines = np.arange(-5, 6)
    window = np.exp(-(lines[:, None] ** 2 + lines[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        x, y = (each[channel, row - 5 : row + 6, column - 5 : column + 6].double().numpy() for each in (first, second))
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy, cov = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2, (window * x * y).sum() - mx * my
        c1, c2 = 0.01**2, 0.03**2
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_context_ssim_is_the_mean_over_windows_without_people():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(1, 3, 24, 24, generator=generator)
    second = (first + 0.3 * torch.rand(1, 3, 24, 24, generator=generator)).clamp(0, 1)
    people = torch.ones(1, 24, 24, dtype=torch.bool)
    people[:, 4:18, 3:17] = False  # windows of 11 fit around rows 9 to 12, columns 8 to 11
    expected = np.mean([naive_ssim(first[0], second[0], r, c) for r in range(9, 13) for c in range(8, 12)])
    assert float(metrics.context_ssim(first, second, people)) == pytest.approx(expected, abs=1e-5)
    inside = torch.where(people[:, None], torch.rand(1, 3, 24, 24, generator=generator), second)
    assert float(metrics.context_ssim(first, inside, people)) == pytest.approx(expected, abs=1e-5)


def test_equal_pictures_have_ssim_one_and_noise_has_none():
    first, second = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nobody = torch.zeros(2, 32, 32, dtype=torch.bool)
    assert metrics.context_ssim(first, first.clone(), nobody).tolist() == pytest.approx([1.0, 1.0])
    assert metrics.context_ssim(first, second, nobody).abs().max() < 0.1
    assert metrics.context_ssim(first, second, ~nobody).tolist() == [1.0, 1.0]


def test_feature_difference_is_one_less_the_cosine_outside_people_and_a_mean_over_levels():
    fine, coarse = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)
    fine[:, 0], coarse[:, 0] = 1.0, 1.0
    turned, opposite = fine.clone(), 3.0 * coarse
    turned[:, :, 0] = torch.tensor([1.0, 1.0])[None, :, None]  # 45 degrees in the first row
    opposite[:, :, :, 1] *= -1.0
    people = torch.zeros(1, 4, 4, dtype=torch.bool)
    people[0, 0, 0] = True  # hides one of 16 fine places, one of four coarse ones
    expected = (3 * (1 - 0.5**0.5) / 15 + 2 * 2.0 / 3) / 2
    measured = metrics.feature_difference([fine, coarse], [turned, opposite], people)
    assert measured.tolist() == pytest.approx([expected], abs=1e-6)
    assert metrics.feature_difference([fine, coarse], [5.0 * fine, coarse], people).tolist() == pytest.approx([0.0])


def test_centre_and_size_of_a_rectangle_and_of_nobody():
    people = torch.zeros(2, 8, 16, dtype=torch.bool)
    people[0, 2:6, 4:12] = True
    centre, size = metrics.centre_and_size(people)
    assert centre[0].tolist() == pytest.approx([0.5, 0.5])
    assert size[0].tolist() == pytest.approx([0.5])
    assert centre[1].isnan().all()
    assert size[1].isnan().all()


@pytest.mark.parametrize("count", [2, 4])
def test_spread_is_the_mean_distance_over_pairs_that_are_there(count):
    points = torch.rand(3, count, 2, generator=torch.Generator().manual_seed(0))
    points[1, 0], points[2] = torch.nan, torch.nan
    expected = []
    for group in points.numpy():
        there = [np.linalg.norm(a - b) for a, b in itertools.combinations(group, 2) if not np.isnan([a, b]).any()]
        expected.append(np.mean(there) if there else np.nan)
    assert metrics.spread(points).tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_spread_of_normal_places_does_not_depend_on_the_number_of_seeds():
    # Distance of two draws of a normal: 2 / sqrt(pi) of its standard deviation.
    generator = torch.Generator().manual_seed(0)
    for seeds in (2, 6):
        points = 0.1 * torch.randn(4000, seeds, 1, generator=generator)
        assert float(metrics.spread(points).mean()) == pytest.approx(0.2 / np.pi**0.5, rel=0.05)
