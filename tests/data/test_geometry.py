"""Windows: masks stay in register with pixels, subjects stay inside, identities are identities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_train.data.geometry import Flip, Resize, Window, mirrored
from moa_train.data.schema import Sample, Segment, bounding_box

SHAPES = st.tuples(st.integers(5, 120), st.integers(5, 120))
PLACES = st.floats(0.0, 0.999)
RESIZES = st.fixed_dictionaries(  # built in the test: the type checker draws random numbers, strategies must not
    {
        "resolution": st.integers(8, 64),
        "crop": st.sampled_from(["centre", "random"]),
        "zoom": st.sampled_from([(1.0, 1.0), (1.0, 1.5), (1.2, 3.0)]),
        "pad": st.sampled_from(["none", "tall", "all"]),
        "hold_subjects": st.booleans(),
    }
)


def _with_subjects(labels, image=None):
    ids = [int(i) for i in np.unique(labels) if i]
    segments = tuple(Segment(i, "", 0, 1, bounding_box(labels == i), int((labels == i).sum())) for i in ids)
    image = np.zeros((*labels.shape, 3), np.uint8) if image is None else image
    return Sample("k", image, labels, "", segments)


def _numbered(height, width):
    """Red and green are column and row, so that a pixel says where it comes from; each label is its place's number."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([2 * columns, 2 * rows, np.full_like(rows, 255)], axis=-1).astype(np.uint8)
    return Sample("k", image, 1 + rows * width + columns, "", ())


def _boxes(data, height, width, most):
    labels = np.zeros((height, width), np.uint8)
    for number in range(1, data.draw(st.integers(1, most)) + 1):
        y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        labels[y : y + data.draw(st.integers(1, height)), x : x + data.draw(st.integers(1, width))] = number
    return _with_subjects(labels)


@settings(deadline=None)
@given(SHAPES, RESIZES, st.integers(0, 99), st.booleans())
def test_labels_are_those_of_the_nearest_pixel_and_black_lies_where_there_is_none(shape, options, seed, flipped):
    """Independent: integers alone. Output pixel i shows source pixel floor((2 i + 1) side / (2 resolution)) + start."""
    sample, resize = _numbered(*shape), Resize(**options)
    window = resize.window(sample, np.random.default_rng(seed))
    view = Flip(float(flipped))(resize(sample, np.random.default_rng(seed)), np.random.default_rng(0))
    for i in range(resize.resolution):
        for j in range(resize.resolution):
            column = resize.resolution - 1 - j if flipped else j
            y = window.top + (2 * i + 1) * window.side // (2 * resize.resolution)
            x = window.left + (2 * column + 1) * window.side // (2 * resize.resolution)
            inside = 0 <= y < shape[0] and 0 <= x < shape[1]
            assert view.labels[i, j] == (1 + y * shape[1] + x if inside else 0)


@settings(deadline=None)
@given(SHAPES, RESIZES, st.integers(0, 99), st.booleans())
def test_pixels_come_from_where_the_labels_come_from(shape, options, seed, flipped):
    """Colours that grow evenly stay so under any filter: away from borders a pixel's colour is its place."""
    sample, resize = _numbered(*shape), Resize(**options)
    view = Flip(float(flipped))(resize(sample, np.random.default_rng(seed)), np.random.default_rng(0))
    window = resize.window(sample, np.random.default_rng(seed))
    border = 4 + -(-4 * resize.resolution // window.side)  # the filter's reach in output pixels
    real = np.pad(view.labels > 0, border)
    away = np.ones_like(view.labels, dtype=bool)
    for shift in range(-border, border + 1):
        for rolled in (np.roll(real, shift, 0), np.roll(real, shift, 1)):
            away &= rolled[border:-border, border:-border]
    rows, columns = np.divmod(view.labels - 1, shape[1])
    step = max(1.0, window.side / resize.resolution)
    for channel, place in ((0, columns), (1, rows)):
        difference = view.image[..., channel].astype(float) / 2 - place
        assert np.abs(difference[away]).max(initial=0) <= step / 2 + 1.0


@settings(deadline=None)
@given(SHAPES, RESIZES, st.integers(0, 99))
def test_a_square_lies_in_the_picture_or_holds_it(shape, options, seed):
    window = Resize(**options).window(_numbered(*shape), np.random.default_rng(seed))
    for start, extent in ((window.top, shape[0]), (window.left, shape[1])):
        if window.side <= extent:
            assert 0 <= start <= extent - window.side
        else:
            assert start <= 0
            assert start + window.side >= extent
            assert abs((-start) - (start + window.side - extent)) <= 1  # as much black on either side


@settings(deadline=None)
@given(st.data(), SHAPES, st.sampled_from(["centre", "random"]), st.sampled_from(["none", "tall", "all"]))
def test_held_subjects_are_whole_wherever_that_is_possible(data, shape, crop, pad):
    sample = _boxes(data, *shape, most=3)
    resize = Resize(32, crop, (1.0, 4.0), pad, hold_subjects=True)
    window = resize.window(sample, np.random.default_rng(data.draw(st.integers(0, 99))))
    x1, y1, x2, y2 = bounding_box(sample.labels > 0)
    whole = max(shape) if pad == "all" or (pad == "tall" and shape[0] > shape[1]) else min(shape)
    if max(x2 - x1, y2 - y1) <= whole:
        assert window.left <= x1
        assert x2 <= window.left + window.side
        assert window.top <= y1
        assert y2 <= window.top + window.side


@settings(deadline=None)
@given(st.data(), st.integers(5, 30), st.integers(31, 90), st.booleans())
def test_where_subjects_do_not_fit_no_square_holds_more_of_them(data, short, long, tall):
    shape = (long, short) if tall else (short, long)
    sample = _boxes(data, *shape, most=3)
    window = Resize(16, "random", hold_subjects=True).window(sample, np.random.default_rng(0))
    mask = sample.labels > 0
    held = [(mask[i : i + short] if tall else mask[:, i : i + short]).sum() for i in range(long - short + 1)]
    start = window.top if tall else window.left
    assert held[start] == max(held)


def test_held_crops_are_even_over_all_squares_that_hold_the_subject():
    labels = np.zeros((20, 100), np.uint8)
    labels[5:10, 40:50] = 1  # whole in squares that begin at 30 to 40
    sample = _with_subjects(labels)
    resize = Resize(20, "random", hold_subjects=True)
    lefts = [resize.window(sample, np.random.default_rng([seed, 0])).left for seed in range(2200)]
    counts = np.bincount(lefts, minlength=41)
    assert counts[:30].sum() == 0
    assert len(counts) == 41
    np.testing.assert_allclose(counts[30:], 200, atol=65)  # more than four standard deviations


def test_the_centre_that_holds_the_subject_is_the_nearest():
    labels = np.zeros((20, 100), np.uint8)
    labels[5:10, 80:90] = 1
    assert Resize(20, "centre", hold_subjects=True).window(_with_subjects(labels), np.random.default_rng(0)).left == 70
    labels = np.roll(labels, -35, axis=1)
    assert Resize(20, "centre", hold_subjects=True).window(_with_subjects(labels), np.random.default_rng(0)).left == 40


def test_zoom_is_even_in_its_interval():
    sample = _numbered(1000, 1000)
    sides = [Resize(8, "random", (1.0, 2.0)).window(sample, np.random.default_rng([s, 0])).side for s in range(400)]
    factors = 1000 / np.array(sides)
    assert 1.0 <= factors.min() < 1.02
    assert 1.98 < factors.max() <= 2.0
    assert abs(factors.mean() - 1.5) < 0.06  # four standard deviations


def test_zoom_moves_the_square_along_both_axes():
    windows = [
        Resize(8, "random", (2.0, 2.0)).window(_numbered(60, 90), np.random.default_rng([s, 0])) for s in range(300)
    ]
    assert {w.side for w in windows} == {30}
    assert (min(w.left for w in windows), min(w.top for w in windows)) == (0, 0)
    assert max(w.left for w in windows) >= 58
    assert max(w.top for w in windows) >= 28
    assert abs(np.corrcoef([w.left for w in windows], [w.top for w in windows])[0, 1]) < 0.25


@settings(deadline=None)
@given(
    st.integers(1, 60), st.sampled_from(["centre", "random"]), st.sampled_from(["none", "tall", "all"]), st.booleans()
)
def test_a_square_of_the_right_size_is_left_as_it_is(side, crop, pad, hold):
    sample = _numbered(side, side)
    view = Resize(side, crop, (1.0, 1.0), pad, hold)(sample, np.random.default_rng(0))
    np.testing.assert_array_equal(view.image, sample.image)
    np.testing.assert_array_equal(view.labels, sample.labels)


@settings(deadline=None)
@given(SHAPES)
def test_two_flips_are_none(shape):
    sample = _numbered(*shape)
    np.testing.assert_array_equal(mirrored(mirrored(sample)).image, sample.image)
    np.testing.assert_array_equal(mirrored(mirrored(sample)).labels, sample.labels)


@pytest.mark.parametrize(("pad", "tall", "wide"), [("none", False, False), ("tall", True, False), ("all", True, True)])
def test_padding_shows_the_whole_picture_with_black_beside_it(pad, tall, wide):
    for shape, padded in (((40, 20), tall), ((20, 40), wide)):
        sample = _numbered(*shape)
        side = 40 if padded else 20
        view = Resize(side, pad=pad)(sample, np.random.default_rng(0))
        if padded:
            np.testing.assert_array_equal(np.unique(view.labels[view.labels > 0]), sample.labels.ravel())
            assert (view.image[view.labels == 0] == 0).all()
            assert (view.image[view.labels > 0][:, 2] == 255).all()
        else:
            assert (view.labels > 0).all()


def test_a_window_beside_the_picture_is_black():
    view = Window(-30, 0, 20).show(_numbered(20, 20), 20)
    assert not view.image.any()
    assert not view.labels.any()
