"""Stored views are what encoding on the fly gives: latents, masks, subjects, prompts."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moa_train.data.mixture import Mixture, MixtureReader
from moa_train.data.packing import write_shards
from moa_train.data.schema import BadSample, encode_sample
from moa_train.data.shards import ShardIndex, ShardReader
from moa_train.data.stages import Pipeline, collate
from moa_train.data.views import ViewSettings, check_views, decode_views, record_of, write_views
from moa_train.latents import LatentCodec
from moa_train.prior.load import load_prior

VAE = {"name": "toy", "weights": "abc"}
FACTOR = 4


@pytest.fixture(scope="module")
def codec():
    return LatentCodec(load_prior("toy").vae)


@pytest.fixture
def encode(codec):
    def encoded(views):
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 127.5 - 1
        return codec.moments(pixels).half().numpy()

    return encoded


@pytest.fixture
def source(tmp_path, make_sample):
    return write_shards([make_sample(i, 48) for i in range(9)], tmp_path / "plain", "train", shard_bytes=30_000)


def _pipelines(tokenizer, **changes):
    settings = {"resolution": 32, "subject_size": 20, "max_subjects": 2, **changes}
    return Pipeline(tokenizer, **settings), Pipeline(tokenizer, latents=True, **settings)


def test_training_from_latents_is_training_from_pictures(tmp_path, tokenizer, codec, encode, source):
    """The rows of the default settings, with flips, drops and augmentation, for the same keys."""
    stored = write_views(source, tmp_path / "views", encode, ViewSettings(32), VAE)
    plain, latent = _pipelines(tokenizer, augment_subject=True, keep_probability=0.7)
    pictures, views = MixtureReader(Mixture([source])), MixtureReader(Mixture([stored]), views=True)
    flipped = set()
    for key in range(20):
        row, other = plain(pictures[key % 9], key, key), latent(views[key % 9], key, key)
        assert (other["caption"], other["key"], other["sample"]) == (row["caption"], key, key)
        for name in ("token_ids", "subject_positions", "subject_present", "subject_pixels"):
            np.testing.assert_array_equal(other[name], row[name], err_msg=name)
        assert torch.equal(other["subject_masks"], F.avg_pool2d(row["subject_masks"].float(), FACTOR))
        pixels = row["pixels"][None] / 127.5 - 1
        expected = codec.moments(pixels)[0]
        torch.testing.assert_close(other["latents"].float(), expected, rtol=2e-3, atol=2e-3)
        flipped.add(bool((expected - codec.moments(pixels.flip(-1))[0]).abs().max() > 0.01))
    batch = collate([latent(views[i], i, i) for i in range(3)])
    assert batch.pixels is None
    assert batch.latents.shape == (3, 2, 4, 8, 8)
    assert batch.foreground.max() <= 1


def test_each_of_several_crops_and_its_mirror_image_keep_their_masks(tmp_path, tokenizer, codec, encode, source):
    settings = ViewSettings(32, crops=3, crop="random", zoom=(1.2, 2.0))
    stored = write_views(source, tmp_path / "views", encode, settings, VAE)
    changes = {"crop": "random", "zoom": (1.2, 2.0), "flip_probability": 0.5, "unconditional_probability": 0.0}
    latent = _pipelines(tokenizer, **changes, keep_probability=1.0)[1]
    sample, view = ShardReader(source)[0], MixtureReader(Mixture([stored]), views=True)[0]
    crops = [window.show(sample, 32) for window in settings.windows(sample)]
    mirrors = [replace(crop, image=crop.image[:, ::-1], labels=crop.labels[:, ::-1]) for crop in crops]
    shown = [*crops, *mirrors]
    assert len({(w.left, w.top, w.side) for w in settings.windows(sample)}) == 3
    encoded = torch.from_numpy(encode(np.stack([each.image for each in shown]))).float()
    seen = set()
    for key in range(40):
        row = latent(view, key, 0)
        apart = [float((each - row["latents"].float()).abs().max()) for each in encoded]
        crop = int(np.argmin(apart))
        assert apart[crop] < 0.01
        seen.add(crop)
        masks = [torch.from_numpy((shown[crop].labels == s.id).astype(np.float32)) for s in sample.segments]
        masks = [F.avg_pool2d(mask[None], FACTOR)[0] for mask in masks if mask.any()]
        for slot, mask in enumerate(masks):
            assert torch.equal(row["subject_masks"][slot], mask)
    assert seen == set(range(6))
    for key in range(5):  # validation: the centre
        assert torch.equal(
            latent.without_chance()(view, key, 0)["latents"], torch.from_numpy(view.latents(0, False).copy())
        )


def test_the_copy_is_the_set_and_more(tmp_path, encode, source):
    stored = write_views(source, tmp_path / "views", encode, ViewSettings(32), VAE)
    assert stored.counts.tolist() == source.counts.tolist()
    for number in range(9):
        key, members = ShardReader(source).read(number)
        other, more = ShardReader(stored).read(number)
        assert other == key
        assert more == {**members, "latent.npy": more["latent.npy"]}
        np.testing.assert_array_equal(ShardReader(stored)[number].image, ShardReader(source)[number].image)


def test_a_record_is_read_as_numpy_reads_it_and_a_damaged_one_is_refused(make_sample, encode):
    settings = ViewSettings(32)
    sample = make_sample(5, 48)
    record = record_of(sample, settings, encode(np.stack([np.asarray(v.image) for v in settings.views(sample)])))
    file = io.BytesIO()
    np.save(file, record)
    content = file.getvalue()
    told = {"json": encode_sample(sample, "png")["json"]}
    read = decode_views(sample.key, told | {"latent.npy": content}).record
    expected = np.load(io.BytesIO(content))
    assert len(sample.segments) == 2  # with subject_1 and mask_1
    assert read.dtype == expected.dtype
    for name in expected.dtype.names:
        np.testing.assert_array_equal(read[name], expected[name])
    others = {
        "cut": content[:-1],
        "cut in its header": content[:40],
        "longer": content + b"\0",
        "empty": b"",
        "a field that is no number": content.replace(b"'|u1', (22", b"'|O1', (22"),
        "a field without a name": content.replace(b"('masks'", b"('mas\"s'"),
        "version 2": content.replace(b"NUMPY\x01", b"NUMPY\x02"),
        "by columns": content.replace(b"'fortran_order': False", b"'fortran_order': True "),
        "no latents": content.replace(b"('latents'", b"('Latents'"),
    }
    for what, other in others.items():
        assert other != content, what
        with pytest.raises(BadSample, match=r"latent\.npy"):
            decode_views(sample.key, told | {"latent.npy": other})


def test_an_interrupted_encoding_goes_on_and_gives_the_same_bytes(tmp_path, encode, source):
    whole = write_views(source, tmp_path / "whole", encode, ViewSettings(32), VAE)
    assert len(source.shards) > 2
    calls = []

    def stopping(views):
        calls.append(len(views))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(views)

    with pytest.raises(KeyboardInterrupt):
        write_views(source, tmp_path / "parts", stopping, ViewSettings(32), VAE)
    done = []
    parts = write_views(source, tmp_path / "parts", stopping, ViewSettings(32), VAE, on_sample=done.append)
    assert done[0] == source.shards[0].count
    assert parts.hash == whole.hash
    with pytest.raises(ValueError, match="other settings"):
        write_views(source, tmp_path / "parts", encode, ViewSettings(16), VAE)
    before = len(calls)
    write_views(source, tmp_path / "parts", stopping, ViewSettings(32), VAE)
    assert len(calls) == before


def test_other_vaes_and_settings_are_refused_by_name(tmp_path, encode, source):
    index = ShardIndex.load(
        write_views(source, tmp_path / "v", encode, ViewSettings(32, flips=False), VAE).storage.location
    )
    wanted = {"resolution": 32, "crop": "centre", "zoom": [1.0, 1.0], "pad": "none", "hold_subjects": False}
    check_views(index, "abc", wanted, flips=False)
    with pytest.raises(ValueError, match=r"VAE of toy \(abc\).*another \(abd\)"):
        check_views(index, "abd", wanted, flips=False)
    with pytest.raises(ValueError, match="resolution is 32 there, 64 here"):
        check_views(index, "abc", {**wanted, "resolution": 64}, flips=False)
    with pytest.raises(ValueError, match="no mirrored views are there"):
        check_views(index, "abc", wanted, flips=True)
    with pytest.raises(ValueError, match="make them with moa-data latents"):
        check_views(source, "abc", wanted, flips=False)
    with pytest.raises(BadSample, match="has no latents"):
        MixtureReader(Mixture([source]), views=True)[0]


def test_large_subjects_are_reduced_and_nothing_outside_them_shows(make_sample, encode):
    sample = make_sample(0, 96)
    inside = np.isin(sample.labels, [1, 2])
    from moa_train.data.views import record_of

    settings = ViewSettings(32, flips=False, subject_side=16)
    latents = np.zeros((1, 2, 4, 8, 8), np.float16)
    records = [
        record_of(replace(sample, image=np.where(inside[..., None], sample.image, colour)), settings, latents)
        for colour in (np.uint8(0), np.uint8(255))
    ]
    for name in ("subject_0", "subject_1"):
        assert max(records[0][name].shape[:2]) == 16
        np.testing.assert_array_equal(records[0][name], records[1][name])


def test_crops_without_chance_and_chance_without_crops_are_refused():
    for changes in ({"crops": 2}, {"crop": "random"}, {"zoom": (1.0, 1.2)}, {"crops": 0}):
        with pytest.raises(ValueError, match="crops is"):
            ViewSettings(32, **changes)
