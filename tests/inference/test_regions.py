"""Regions of the subject and differences of pictures, against naive searches, counts and closed forms."""

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.inference.regions import difference, dilate, mean_difference, otsu_threshold, psnr, routed_region


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
    found = otsu_threshold(torch.from_numpy(values).reshape(1, 12, 12))
    assert float(found) == pytest.approx(naive_otsu(values), abs=1e-4)


def test_otsu_cuts_two_levels_in_the_middle_and_leaves_constants_alone():
    maps = torch.stack([torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.full((2, 2), 0.3)])
    assert torch.allclose(otsu_threshold(maps), torch.tensor([0.5, 0.3]), atol=0.01)


def test_dilation_reaches_exactly_its_margin_in_each_direction():
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 4, 4] = True
    grown = dilate(mask, 2)[0]
    assert grown.sum() == 25
    assert grown[2:7, 2:7].all()
    assert torch.equal(dilate(mask, 0), mask)


def test_the_region_is_what_any_map_gives_to_the_personalized_expert():
    maps = torch.full((2, 8, 8), 0.1)
    maps[0, 2:4, 2:4] = 0.5
    maps[1, 5:7, 5:7] = 0.9
    assert torch.equal(routed_region(maps, (8, 8)), maps.amax(dim=0) > 0.1)
    region = routed_region(maps, (32, 64))
    assert region.shape == (64, 32)
    assert region[16:32, 8:16].float().mean() > 0.9
    assert not region[:12].any()
    assert not region[:, 30:].any()


def test_a_difference_is_told_inside_and_outside():
    first, second = np.zeros((4, 6, 3), dtype=np.uint8), np.zeros((4, 6, 3), dtype=np.uint8)
    second[:2, :, 0] = 255
    second[2:, :3] = 51
    region = torch.zeros(4, 6, dtype=torch.bool)
    region[:2] = True
    found = difference(Image.fromarray(first), Image.fromarray(second), region)
    assert found.subject == pytest.approx(1 / 3)
    assert found.background == pytest.approx(0.2**2 / 2)
    everywhere = difference(Image.fromarray(first), Image.fromarray(second), torch.ones_like(region))
    assert everywhere.background is None
    mean = mean_difference([found, everywhere])
    assert mean.background == found.background
    assert mean.rounded() == {"subject": round(mean.subject, 5), "background": 0.02}
    with pytest.raises(ValueError, match="sizes differ"):
        difference(Image.fromarray(first), Image.new("RGB", (6, 5)), region)


def test_psnr_of_a_known_error():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5))
    assert psnr(grey, grey) == float("inf")
