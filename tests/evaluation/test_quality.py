"""The Fréchet distance against closed forms and torchmetrics, its interval, and what it says about scenes."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from moa_train.data.sources.toyworld import CONTEXTS, draw_scene, identity
from moa_train.evaluation.quality import frechet_distance, jackknife_interval, measure_quality
from moa_train.evaluation.seen import pixels_in, scene_vectors
from moa_train.prior.load import toy_prior_folder
from moa_train.prior.probe import load_probe


def exactly(mean, cov, seed):
    """Rows whose sample mean and covariance are exactly these."""
    noise = np.random.default_rng(seed).normal(size=(50, len(mean)))
    noise -= noise.mean(axis=0)
    noise = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    return torch.from_numpy(noise @ np.linalg.cholesky(cov).T + mean)


def test_frechet_distance_of_two_gaussians_of_two_dimensions_in_closed_form():
    means = np.array([[0.0, 1.0], [2.0, 0.5]])
    covs = np.array([[[2.0, 0.6], [0.6, 1.0]], [[0.5, -0.3], [-0.3, 3.0]]])
    first, second = (exactly(mean, cov, seed) for seed, (mean, cov) in enumerate(zip(means, covs, strict=True)))
    # For 2 x 2 matrices tr(A^(1/2)) = (tr A + 2 det(A)^(1/2))^(1/2).
    product = covs[0] @ covs[1]
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covs[0]) + np.trace(covs[1]) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_one_dimension_is_that_of_means_and_deviations():
    first, second = torch.randn(2, 40, 1, generator=torch.Generator().manual_seed(0)).double()
    second = 3.0 * second + 1.0
    expected = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_is_torchmetrics_and_zero_to_itself_with_fewer_rows_than_dimensions():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(60, 8, generator=generator).double()
    second = torch.randn(70, 8, generator=generator).double() @ torch.rand(8, 8, generator=generator).double()
    theirs = _compute_fid(first.mean(0), torch.cov(first.T), second.mean(0), torch.cov(second.T))
    assert frechet_distance(first, second) == pytest.approx(float(theirs), rel=1e-6)
    few = torch.randn(4, 8, generator=generator)
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)


def test_jackknife_of_a_mean_is_normal_theory_for_groups():
    rng = np.random.default_rng(0)
    means = rng.normal(size=30)
    rows, groups = torch.from_numpy(np.repeat(means, 4) + 10.0), torch.arange(30).repeat_interleave(4)
    value, (low, high) = jackknife_interval(lambda kept: float(rows[kept].mean()), groups)
    assert value == pytest.approx(means.mean() + 10.0)
    assert (high - low) / 2 == pytest.approx(1.96 * means.std(ddof=1) / np.sqrt(30), rel=1e-6)


@pytest.fixture(scope="module")
def features():
    """Of real scenes, row by row of equal person and context, twice, and once more blurred."""
    probe = load_probe(toy_prior_folder() / "probe")
    people = [identity("test", n) for n in range(8)]
    draws = [
        pixels_in([draw_scene(np.random.default_rng([s, p, c]), [who], CONTEXTS[c]).image
                   for p, who in enumerate(people) for c in range(8)])
        for s in (60, 61, 62)
    ]  # fmt: skip
    blurred = torch.nn.functional.avg_pool2d(draws[2], 7, stride=1, padding=3)
    return [scene_vectors(probe, pixels) for pixels in (draws[0], draws[1], blurred)]


def test_real_scenes_are_at_the_floor_and_blurred_ones_or_one_place_far_above(features):
    real, again, blurred = features
    person = torch.arange(8).repeat_interleave(8)
    floor = measure_quality(again, real, again, person)
    assert floor["frechet"]["moa"] == floor["frechet"]["real"] > 0.0
    assert measure_quality(blurred, real, again, person)["frechet"]["moa"] > 3 * floor["frechet"]["real"]
    one_place = again[person * 8]
    assert measure_quality(one_place, real, again, person)["frechet"]["moa"] > 3 * floor["frechet"]["real"]
    low, high = floor["intervals"]["frechet.real"]
    assert low < floor["frechet"]["real"] < high


def test_the_floor_falls_with_the_number_of_pictures(features):
    real, again, _ = features
    assert frechet_distance(real[:16], again[:16]) > 1.2 * frechet_distance(real, again)
