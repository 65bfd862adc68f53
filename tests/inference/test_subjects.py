"""From a photo to what the image encoder sees."""

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.inference.subjects import read_picture, subject_pixels


def test_nothing_of_the_background_gets_through(photo):
    image, mask = photo
    other = image.copy()
    other[~mask] = 255 - other[~mask]
    assert torch.equal(subject_pixels((image, mask), 16), subject_pixels((other, mask), 16))
    inside = image.copy()
    inside[8, 8] = 255 - inside[8, 8]
    assert not torch.equal(subject_pixels((image, mask), 16), subject_pixels((inside, mask), 16))


def test_the_same_subject_gives_the_same_numbers_in_the_unit_interval(photo):
    first, second = subject_pixels(photo, 16), subject_pixels(photo, 16)
    assert torch.equal(first, second)
    assert first.shape == (3, 16, 16)
    assert 0 <= first.min() < first.max() <= 1
    assert not torch.equal(first, subject_pixels(photo, 16, "grey"))


@pytest.mark.parametrize("brightest", [1, 128, 255])
def test_a_mask_is_what_is_brighter_than_half_its_maximum(photo, brightest):
    image, mask = photo
    values = mask.astype(np.uint8) * brightest
    assert torch.equal(subject_pixels((image, values), 16), subject_pixels(photo, 16))


def test_a_photo_without_mask_is_segmented_by_the_offline_segmenter(photo, monkeypatch):
    from moa_train.data.sources import grabcut

    monkeypatch.setattr(grabcut, "segment_person", lambda image: photo[1])
    assert torch.equal(subject_pixels(photo[0], 16), subject_pixels(photo, 16))


def test_pictures_are_read_upright(tmp_path):
    picture = Image.new("RGB", (6, 4))
    picture.getexif()[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=picture.getexif())
    assert read_picture(tmp_path / "turned.jpg").size == (4, 6)


def test_a_cut_out_passes_through_and_another_size_is_refused():
    ready = torch.rand(3, 16, 16)
    assert torch.equal(subject_pixels(ready, 16), ready)
    with pytest.raises(ValueError, match=r"\(3, 8, 16\).*\(3, 16, 16\)"):
        subject_pixels(ready[:, :8], 16)


def test_mistakes_are_named(photo, tmp_path):
    image, mask = photo
    with pytest.raises(ValueError, match="empty"):
        subject_pixels((image, np.zeros_like(mask)), 16)
    with pytest.raises(ValueError, match="rows"):
        subject_pixels((image, mask[:-1]), 16)
    with pytest.raises(ValueError, match="no such file"):
        subject_pixels(tmp_path / "none.png", 16)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="cannot be read"):
        subject_pixels(tmp_path / "text.png", 16)
