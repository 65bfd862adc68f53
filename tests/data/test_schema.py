"""A stored sample comes back as it was, and every way to be wrong is told."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moa_train.data.schema import BadSample, check_sample, decode_sample, encode_sample, split_name


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("highest", [2, 255, 256, 60_000])
def test_a_decoded_sample_equals_the_encoded_one(make_sample, image_format, highest):
    sample = make_sample(0)
    labels = sample.labels.astype(np.int64)
    labels[0, 0] = highest
    latents = np.random.default_rng(0).normal(size=(2, 4, 2, 2)).astype(np.float16)
    sample = replace(sample, labels=labels, latents=latents)
    members = encode_sample(sample, image_format)
    assert list(members) == [image_format, "seg.png", "json", "latent.npy"]
    back = decode_sample(sample.key, members)
    np.testing.assert_array_equal(back.image, sample.image)
    np.testing.assert_array_equal(back.labels, labels)
    np.testing.assert_array_equal(back.latents, latents)
    assert (back.caption, back.segments, back.source) == (sample.caption, sample.segments, sample.source)


def test_names_are_split_as_webdataset_splits_them():
    assert split_name("a.b/0001.seg.png") == ("a.b/0001", "seg.png")
    assert split_name("0001.json") == ("0001", "json")


def test_a_sound_sample_has_no_problem(make_sample):
    assert check_sample(make_sample(0), max_subjects=2) == []


def _with_segment(sample, **changes):
    return replace(sample, segments=(replace(sample.segments[0], **changes), sample.segments[1]))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda s: _with_segment(s, end=99), "outside the caption"),
        (lambda s: _with_segment(s, start=-1), "outside the caption"),
        (lambda s: _with_segment(s, start=0, end=1), "not at its offsets"),
        (lambda s: _with_segment(s, id=7), "does not occur"),
        (lambda s: _with_segment(s, id=0), "background"),
        (lambda s: _with_segment(s, id=2), "given 2 times"),
        (lambda s: _with_segment(s, area=1), "area"),
        (lambda s: _with_segment(s, bbox=(0, 0, 1, 1)), "bbox"),
        (lambda s: replace(s, labels=np.where(s.labels == 1, 0, s.labels)), "mask is empty"),
        (lambda s: replace(s, caption="a man <1> and a woman at sea"), "marker"),
        (lambda s: replace(s, segments=s.segments * 2), "subjects, at most 2"),
    ],
)
def test_each_problem_is_told(make_sample, spoil, told):
    assert any(told in problem for problem in check_sample(spoil(make_sample(0)), max_subjects=2))


def _png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "content", "told"),
    [
        ("png", b"no picture", "cannot read 00000.png"),
        ("seg.png", _png(np.zeros((3, 4), np.uint8)), "sizes disagree: picture 16 x 16, label map 4 x 3"),
        ("seg.png", _png(np.zeros((16, 16, 3), np.uint8)), "one channel"),
        ("json", b"{", "cannot read 00000.json"),
        ("json", json.dumps({"caption": "x"}).encode(), "cannot read 00000.json"),
        ("png", None, "the picture .* is missing"),
        ("json", None, "00000.json is missing"),
    ],
    ids=["picture", "mask size", "mask channels", "no json", "json keys", "no picture", "missing json"],
)
def test_damaged_members_are_refused_by_name(make_sample, suffix, content, told):
    members = encode_sample(make_sample(0)) | {suffix: content}
    members = {name: value for name, value in members.items() if value is not None}
    with pytest.raises(BadSample, match=told):
        decode_sample("00000", members)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_truncated_anywhere_is_refused(make_sample, suffix):
    members = encode_sample(make_sample(0, 64), suffix)
    for end in range(1, len(members[suffix]) - 16, 97):
        with pytest.raises(BadSample, match=f"cannot read 00000.{suffix}"):
            decode_sample("00000", members | {suffix: members[suffix][:end]})


def test_an_unknown_image_format_is_refused(make_sample):
    with pytest.raises(ValueError, match="image_format is 'gif'"):
        encode_sample(make_sample(0), "gif")
