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


@pytest.mark.parametrize("augmentation", [None, "light", "fastcomposer"])
@pytest.mark.parametrize("background", ["noise", "grey"])
@pytest.mark.parametrize("size", [8, 24, 100])
def test_no_background_pixel_has_an_influence(augmentation, background, size):
    augment = augmentation is not None
    for seed in range(8):
        one, other = (
            cut_out(*_scene(scene), size, np.random.default_rng(seed), background, augment, augmentation or "light")
            for scene in (1, 2)
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
    for seed, augmentation in ((0, "light"), *((seed, "fastcomposer") for seed in range(20))):
        picture = cut_out(*_scene(0), 33, np.random.default_rng(seed), augment=True, augmentation=augmentation)
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


def _shares(picture, properties, draws=150):
    """How often each property holds of a subject's picture under FastComposer's augmentation."""
    mask = np.ones(picture.shape[:2], dtype=bool)
    made = [
        cut_out(picture, mask, 40, np.random.default_rng([s, 0]), "grey", True, "fastcomposer") for s in range(draws)
    ]
    return [float(np.mean([holds(each) for each in made])) for holds in properties]


def test_fastcomposers_changes_come_with_its_probabilities():
    """Shares within four standard deviations."""
    colours = np.zeros((40, 40, 3), np.uint8)
    colours[:, :20], colours[:, 20:] = (200, 30, 30), (30, 30, 200)
    (grey,) = _shares(colours, (lambda x: np.ptp(x, axis=0).max() < 0.01,))
    assert abs(grey - 0.1) < 0.1
    strip = np.full(
        (80, 20, 3), 255, np.uint8
    )  # shown whole, it leaves background beside it; its upper square does not
    (square,) = _shares(strip, (lambda x: abs(x[:, 20, 6].mean() - x[:, 20, 20].mean()) < 0.05,))
    assert abs(square - 0.5) < 0.165
    wide = np.zeros((40, 40, 3), np.uint8)
    wide[:, :20] = 255
    (mirrored,) = _shares(wide, (lambda x: x[:, 20, 30:36].mean() > x[:, 20, 4:10].mean(),))
    assert abs(mirrored - 0.5) < 0.165
    full = np.full((40, 40, 3), 255, np.uint8)
    (turned,) = _shares(full, (lambda x: x[:, 1, 1].mean() < 0.9 * x[:, 20, 20].mean(),))
    assert 0.55 < turned < 0.9


def test_fastcomposers_turn_uncovers_the_background_and_nothing_else():
    """White on grey with colours left alone by their own symmetry: no pixel is black, as it is where a turn pads."""
    white = np.full((40, 40, 3), 255, np.uint8)
    mask = np.ones((40, 40), dtype=bool)
    for seed in range(60):
        picture = cut_out(white, mask, 40, np.random.default_rng([seed, 1]), "grey", True, "fastcomposer")
        assert picture[:, 4:-4, 4:-4].min() > 0.1


def test_an_empty_mask_and_an_unknown_background_are_refused():
    image, mask = _scene(0)
    with pytest.raises(ValueError, match="mask is empty"):
        cut_out(image, np.zeros_like(mask), 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="augmentation is 'heavy'"):
        cut_out(image, mask, 8, np.random.default_rng(0), augmentation="heavy")
    with pytest.raises(ValueError, match="background is 'black'"):
        cut_out(image, mask, 8, np.random.default_rng(0), "black")
