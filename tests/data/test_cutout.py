"""A cut-out shows the subject, all of it, and nothing of its background."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moa_train.data import cutout
from moa_train.data.cutout import reduced
from moa_train.data.schema import bounding_box


def cut_out(*args, **options):
    """Channels first, in [0, 1]."""
    return cutout.cut_out(*args, **options).transpose(2, 0, 1) / np.float32(255)


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


@pytest.mark.parametrize("side", [7, 8, 21])
def test_noise_is_the_bytes_that_the_generator_gives(side):
    mask = np.zeros((side, 3), dtype=bool)
    mask[:, 1] = True  # one column, in the middle of the square
    rng, other = np.random.default_rng(5), np.random.default_rng(5)
    picture = cutout.cut_out(np.zeros((side, 3, 3), np.uint8), mask, side, rng)
    noise = np.frombuffer(other.bytes(3 * side**2), np.uint8).reshape(side, side, 3)
    assert rng.permutation(20).tolist() == other.permutation(20).tolist()
    around = np.arange(side) != (side - 1) // 2
    np.testing.assert_array_equal(picture[:, around], noise[:, around])
    assert not picture[:, ~around].any()


def test_a_cut_out_is_a_square_of_bytes():
    for seed, augmentation in ((0, "light"), *((seed, "fastcomposer") for seed in range(20))):
        picture = cutout.cut_out(*_scene(0), 33, np.random.default_rng(seed), augment=True, augmentation=augmentation)
        assert picture.dtype == np.uint8
        assert picture.shape == (33, 33, 3)


@settings(deadline=None, max_examples=60)
@given(
    st.data(),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(4, 80),
    st.sampled_from([None, *cutout.AUGMENTATIONS]),
)
def test_subjects_of_any_shape_and_size_are_free_of_their_background(data, height, width, size, augmentation):
    """Any mask, reduced or enlarged, from an array or from Pillow's picture: other backgrounds, the same bytes."""
    share, seed = data.draw(st.floats(0.02, 1.0)), data.draw(st.integers(0, 2**32 - 1))
    numbers = np.random.default_rng(seed)
    mask = numbers.random((height, width)) < share
    mask[numbers.integers(height), numbers.integers(width)] = True
    image = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
    changed = np.where(mask[..., None], image, numbers.integers(0, 256, image.shape, dtype=np.uint8))
    look = (data.draw(st.sampled_from(cutout.BACKGROUNDS)), augmentation is not None, augmentation or "light")
    made = [
        cutout.cut_out(picture, mask, size, np.random.default_rng(seed), *look)
        for picture in (image, changed, Image.fromarray(image))
    ]
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_reduced_subject_is_weighed_by_its_mask(factor):
    """Independent: means over blocks, of subject pixels alone, before grey."""
    numbers = np.random.default_rng(0)
    image = numbers.integers(0, 256, (24 * factor, 24 * factor, 3), dtype=np.uint8)
    mask = numbers.random((24, 24)).repeat(factor, 0).repeat(factor, 1) + numbers.random(image.shape[:2]) < 0.9
    mask[0, 0] = mask[-1, -1] = True
    blocks = (image * mask[..., None]).reshape(24, factor, 24, factor, 3).mean((1, 3))
    weight = mask.reshape(24, factor, 24, factor).mean((1, 3))[..., None]
    picture = cutout.cut_out(image, mask, 24, np.random.default_rng(0), "grey").astype(float)
    np.testing.assert_allclose(picture, blocks + (1 - weight) * cutout.GREY, atol=2.0)


def test_what_is_stored_of_a_subject_gives_its_cut_out():
    image, mask = _scene(3)
    for size in (9, 20, 64):
        subject, weight = reduced(image, mask, bounding_box(mask), size)
        for augment in (False, True):
            one = cutout.cut_out(image, mask, size, np.random.default_rng(5), augment=augment)
            other = cutout.cut_out(subject, weight, size, np.random.default_rng(5), augment=augment)
            np.testing.assert_array_equal(one, other)


def test_what_shows_through_is_rounded_exactly_for_every_weight():
    """Integer arithmetic on the bytes that the generator gives: nearly every value meets every weight."""
    weight = np.arange(256, dtype=np.uint8)[:, None].repeat(256, axis=1)
    picture = cutout.cut_out(np.zeros((256, 256, 3), np.uint8), weight, 256, np.random.default_rng(0))
    noise = np.frombuffer(np.random.default_rng(0).bytes(256 * 256 * 3), np.uint8).reshape(256, 256, 3).astype(int)
    hidden = np.broadcast_to(255 - weight.astype(int)[..., None], noise.shape)
    assert len(np.unique(256 * noise + hidden)) > 60_000
    np.testing.assert_array_equal(picture, (2 * noise * hidden + 255) // 510)


def test_a_stored_colour_above_its_weight_does_not_wrap_round():
    white, half = np.full((6, 6, 3), 255, np.uint8), np.full((6, 6), 128, np.uint8)
    assert (cutout.cut_out(white, half, 6, np.random.default_rng(0)) == 255).all()


def test_noise_behind_a_reduced_subject_is_that_of_the_result():
    """White noise at the encoder's size, however large the photo is: neighbours are independent."""
    mask = np.zeros((900, 900), dtype=bool)
    mask[:4, :4] = mask[-4:, -4:] = True
    picture = cut_out(np.zeros((900, 900, 3), np.uint8), mask, 100, np.random.default_rng(0))[:, 2:-2, 2:-2]
    assert abs(picture.std() - 12**-0.5) < 0.01
    assert abs(np.corrcoef(picture[:, :, 1:].ravel(), picture[:, :, :-1].ravel())[0, 1]) < 0.03


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
