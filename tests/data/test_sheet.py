"""The contact sheet shows each picture with its masks in colour."""

import numpy as np

from moa_train.data.sheet import COLOURS, contact_sheet, tinted


def test_only_masked_pixels_change_and_outlines_have_the_subjects_colour(make_sample):
    sample = make_sample(0)
    shown = tinted(sample, 16)
    background = sample.labels == 0
    np.testing.assert_array_equal(shown[background], sample.image[background])
    for segment, colour in zip(sample.segments, COLOURS, strict=False):
        x1, y1, x2, y2 = segment.bbox
        assert (shown[y1, x1:x2] == colour).all()
        assert (shown[y1:y2, x2 - 1] == colour).all()
        inner = (sample.labels == segment.id)[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
        expected = 0.65 * sample.image[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] + 0.35 * np.array(colour)
        assert inner.all()
        assert abs(shown[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] - expected).max() <= 0.51


def test_the_sheet_has_a_place_for_every_sample(make_sample):
    one, five = (contact_sheet([make_sample(i) for i in range(n)], columns=2, tile=64) for n in (2, 5))
    assert one.width == five.width
    assert five.height > 2.5 * one.height
    nouns = np.asarray(one)[70:]  # below the pictures: captions
    for colour in COLOURS[:2]:
        assert (abs(nouns.astype(int) - colour).sum(axis=-1) < 30).any()
