"""A cut-out shows the subject, all of it, and nothing of its background."""

import numpy as np
import pytest

from moa_train.data.cutout import cut_out


def _scene(background_seed):
    """A subject, the same each time, before a background that differs."""
    mask = np.zeros((40, 50), dtype=bool)
    rows, columns = np.mgrid[:40, :50]
    mask[((rows - 18) / 12.0) ** 2 + ((columns - 27) / 7.0) ** 2 < 1] = True
    image = np.random.default_rng(background_seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image[mask] = np.random.default_rng(99).integers(0, 256, (int(mask.sum()), 3), dtype=np.uint8)
    return image, mask


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("background", ["noise", "grey"])
@pytest.mark.parametrize("size", [8, 24, 100])
def test_no_background_pixel_has_an_influence(augment, background, size):
    for seed in range(5):
        one, other = (
            cut_out(*_scene(scene), size, np.random.default_rng(seed), background, augment) for scene in (1, 2)
        )
        np.testing.assert_array_equal(one, other)


def test_the_subject_is_there_pixel_by_pixel():
    image, mask = _scene(1)
    x1, y1, x2, y2 = 21, 7, 34, 30  # of the ellipse
    side = 23  # its height; the width is 13
    assert (mask[y1:y2, x1:x2].sum(), mask.sum()) == (mask.sum(), mask[y1:y2, x1:x2].sum())
    picture = cut_out(image, mask, side, np.random.default_rng(0), "grey").transpose(1, 2, 0) * 255
    window = picture[:, 5:18].round().astype(np.uint8)
    inside = mask[y1:y2, x1:x2]
    np.testing.assert_array_equal(window[inside], image[y1:y2, x1:x2][inside])
    assert (window[~inside] == 127).all()
    assert (picture[:, :5].round() == 127).all()
    assert (picture[:, 18:].round() == 127).all()


def test_noise_is_uniform_and_the_generators():
    mask = np.zeros((100, 100), dtype=bool)
    mask[0, 0] = mask[99, 99] = True
    pictures = [cut_out(np.zeros((100, 100, 3), np.uint8), mask, 100, np.random.default_rng(s)) for s in (0, 0, 1)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).mean() > 0.9
    assert abs(pictures[0].mean() - 0.5) < 0.01
    assert abs(pictures[0].std() - 12**-0.5) < 0.01


def test_values_are_float32_in_the_unit_interval():
    picture = cut_out(*_scene(0), 33, np.random.default_rng(0), augment=True)
    assert picture.dtype == np.float32
    assert picture.shape == (3, 33, 33)
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_augmentation_moves_the_subject_but_keeps_it_in_the_picture():
    image = np.zeros((60, 60, 3), np.uint8)
    mask = np.zeros((60, 60), dtype=bool)
    mask[15:45, 20:40] = True
    image[mask] = 255
    whites = set()
    for seed in range(30):
        picture = cut_out(image, mask, 60, np.random.default_rng(seed), "grey", augment=True)
        white = (picture.mean(axis=0) > 0.9).sum() / 3600
        assert abs(white - 20 / 30) < 0.2
        assert picture.min() > 0.4  # grey 0.5 to the corners: turning uncovers nothing
        whites.add(round(float(white), 3))
    assert len(whites) > 10


def test_about_half_of_the_augmented_pictures_are_mirrored():
    image = np.zeros((60, 60, 3), np.uint8)
    mask = np.ones((60, 60), dtype=bool)
    image[:, :30] = 255
    lefts = [
        cut_out(image, mask, 60, np.random.default_rng(s), "grey", augment=True)[:, :, 10].mean() > 0.5
        for s in range(200)
    ]
    assert 70 < sum(lefts) < 130


def test_an_empty_mask_and_an_unknown_background_are_refused():
    image, mask = _scene(0)
    with pytest.raises(ValueError, match="mask is empty"):
        cut_out(image, np.zeros_like(mask), 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="background is 'black'"):
        cut_out(image, mask, 8, np.random.default_rng(0), "black")
