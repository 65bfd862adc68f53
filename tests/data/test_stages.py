"""Stages: geometry, choice of subjects, rates, and rows that depend on the sample and its key alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moa_train.data.geometry import Flip, Resize
from moa_train.data.schema import Sample, Segment, bounding_box
from moa_train.data.stages import ChooseSubjects, Pipeline, collate, stage_rng
from moa_train.symbols import Batch


def _rng(seed=0):
    return np.random.default_rng(seed)


def _painted(height, width):
    """A picture whose colour is its label's: labels in blocks of 8 pixels, so that picture and mask can be compared."""
    blocks = _rng(1).integers(0, 4, (height // 8, width // 8))
    labels = np.kron(blocks, np.ones((8, 8), dtype=np.int64)).astype(np.uint8)
    return Sample("k", np.repeat(labels[..., None] * 80, 3, axis=2).astype(np.uint8), labels, "", ())


@pytest.mark.parametrize("crop", ["centre", "random"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (128, 64)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_mask_follows_the_picture(crop, shape, flip):
    view = Flip(flip)(Resize(64, crop)(_painted(*shape), _rng(3)), _rng())
    assert view.image.shape == (64, 64, 3)
    painted = np.rint(view.image[..., 0] / 80.0).astype(int)
    assert (painted == view.labels).mean() > 0.99


def test_reducing_by_two_keeps_mask_and_picture_together():
    view = Resize(32)(_painted(64, 64), _rng())
    inside = np.zeros((4, 4), dtype=bool)
    inside[1:3, 1:3] = True  # away from a block's edge, where the picture is smoothed
    inside = np.tile(inside, (8, 8))
    np.testing.assert_array_equal(np.rint(view.image[..., 0] / 80.0)[inside], view.labels[inside])


def test_the_centre_crop_is_the_middle_of_the_long_side():
    sample = _painted(64, 128)
    np.testing.assert_array_equal(Resize(64, "centre")(sample, _rng()).labels, sample.labels[:, 32:96])
    np.testing.assert_array_equal(Resize(64, "centre")(sample, _rng()).image, sample.image[:, 32:96])


def test_random_crops_reach_both_ends():
    labels = np.arange(40, dtype=np.int64)[None].repeat(8, axis=0)
    sample = Sample("k", np.zeros((8, 40, 3), np.uint8), labels, "", ())
    lefts = {int(Resize(8, "random")(sample, _rng(seed)).labels[0, 0]) for seed in range(400)}
    assert min(lefts) <= 1
    assert max(lefts) >= 31
    assert len(lefts) > 25


def test_flip_mirrors_with_its_probability(make_sample):
    sample = make_sample(0)
    flipped = [Flip(0.3)(sample, stage_rng(key, 1)) for key in range(2000)]
    mirrored = [view for view in flipped if (view.labels == sample.labels[:, ::-1]).all()]
    assert abs(len(mirrored) / 2000 - 0.3) < 0.04  # four standard deviations
    np.testing.assert_array_equal(mirrored[0].image, sample.image[:, ::-1])


def _crowd(count):
    """`count` subjects in a row, nouns n0 n1 ... in the reverse order of the ids."""
    labels = np.arange(1, count + 1, dtype=np.uint8).repeat(4)[None].repeat(8, axis=0)
    caption = " ".join(f"n{i}" for i in range(count))
    segments = tuple(
        Segment(
            i + 1, f"n{count - 1 - i}", 3 * (count - 1 - i), 3 * (count - 1 - i) + 2, bounding_box(labels == i + 1), 32
        )
        for i in range(count)
    )
    return Sample("k", np.zeros((8, 4 * count, 3), np.uint8), labels, caption, segments)


def test_subjects_are_sorted_by_their_nouns():
    view = ChooseSubjects(9, unconditional=0.0, keep=1.0)(_crowd(5), _rng())
    assert [segment.noun for segment in view.segments] == ["n0", "n1", "n2", "n3", "n4"]


def test_where_there_are_too_many_every_subject_is_equally_likely():
    chosen = [ChooseSubjects(2, 0.0, 1.0)(_crowd(5), stage_rng(key, 2)).segments for key in range(1000)]
    assert {len(segments) for segments in chosen} == {2}
    assert all(segments[0].end < segments[1].end for segments in chosen)
    shares = np.bincount([segment.id for segments in chosen for segment in segments], minlength=6)[1:] / 1000
    np.testing.assert_allclose(shares, 0.4, atol=0.065)  # four standard deviations


def test_each_subject_is_kept_with_its_probability():
    kept = [len(ChooseSubjects(9, 0.0, 0.7)(_crowd(5), stage_rng(key, 2)).segments) for key in range(1000)]
    assert abs(np.mean(kept) / 5 - 0.7) < 0.03
    assert {0, 5} <= set(kept)


def test_a_subject_outside_the_crop_is_not_named():
    sample = _crowd(5)
    view = replace(sample, labels=np.where(sample.labels == 2, 0, sample.labels))
    assert [s.id for s in ChooseSubjects(9, 0.0, 1.0)(view, _rng()).segments] == [5, 4, 3, 1]


def test_boxes_and_areas_are_those_of_the_view():
    sample = _crowd(2)
    view = ChooseSubjects(9, 0.0, 1.0)(
        replace(sample, image=sample.image[:4, 2:], labels=sample.labels[:4, 2:]), _rng()
    )
    assert [(s.bbox, s.area) for s in view.segments] == [((2, 0, 6, 4), 16), ((0, 0, 2, 4), 8)]


def test_of_subjects_that_share_a_noun_the_largest_is_named():
    sample = _crowd(3)
    labels = sample.labels.copy()
    labels[:, 4:6] = 1  # 1 has 48 pixels, 2 has 16
    one, two, three = sample.segments
    shared = replace(sample, labels=labels, segments=(replace(one, start=two.start, end=two.end), two, three))
    assert [s.id for s in ChooseSubjects(9, 0.0, 1.0)(shared, _rng()).segments] == [3, 1]


def test_subjects_below_the_smallest_area_are_not_named():
    sample = _crowd(4)  # of 8 x 16 pixels
    labels = sample.labels.copy()
    labels[4:, 0:4] = 0  # subject 1 keeps 16 of 128 pixels, an eighth; the others a quarter
    view = replace(sample, labels=labels)
    for smallest, named in ((0.0, [4, 3, 2, 1]), (0.125, [4, 3, 2, 1]), (0.126, [4, 3, 2]), (0.26, [])):
        assert [s.id for s in ChooseSubjects(9, 0.0, 1.0, smallest)(view, _rng()).segments] == named


def test_the_smallest_area_counts_in_the_crop_and_moves_no_other_draw(tokenizer, make_sample):
    image, labels = np.zeros((16, 64, 3), np.uint8), np.zeros((16, 64), np.uint8)
    labels[:, :24], labels[4:8, 30:34] = 1, 2  # subject 1 is outside the centre crop 24:40; 2 is 16 of its 256 pixels
    sample = replace(make_sample(0), image=image, labels=labels)
    for smallest, named in ((0.0, [True, False]), (16 / 256, [True, False]), (17 / 256, [False, False])):
        row = _pipeline(tokenizer, max_subjects=2, min_subject_area=smallest, flip_probability=0.0)(sample, 3, 0)
        assert row["subject_present"].tolist() == named
    for key in range(20):
        plain = _pipeline(tokenizer, keep_probability=0.5)(make_sample(0), key, 0)
        filtered = _pipeline(tokenizer, keep_probability=0.5, min_subject_area=0.01)(make_sample(0), key, 0)
        assert plain["caption"] == filtered["caption"]
        np.testing.assert_array_equal(plain["subject_pixels"], filtered["subject_pixels"])


def _pipeline(tokenizer, **changes):
    settings = {"resolution": 16, "subject_size": 12, "max_subjects": 3, "unconditional_probability": 0.0}
    return Pipeline(tokenizer, **{**settings, "keep_probability": 1.0, **changes})


def test_a_row_holds_what_the_sample_shows(tokenizer, make_sample):
    sample = make_sample(4)
    row = _pipeline(tokenizer, flip_probability=0.0)(sample, key=77, number=4)
    np.testing.assert_array_equal(row["pixels"], sample.image.transpose(2, 0, 1))
    for slot, label in ((0, 1), (1, 2)):
        np.testing.assert_array_equal(row["subject_masks"][slot], sample.labels == label)
    assert row["caption"] == "a man <1> and a woman <2> at sea"
    words = ["a", "man", "and", "a", "woman", "at", "sea"]
    assert [words[p - 1] for p in row["subject_positions"][:2].tolist()] == ["man", "woman"]
    assert row["subject_present"].tolist() == [True, True, False]
    assert not row["subject_masks"][2].any()
    assert len(row["subject_pixels"]) == 2


def test_flipped_rows_keep_each_mask_with_its_subject(tokenizer, make_sample):
    sample = make_sample(4)
    row = _pipeline(tokenizer, flip_probability=1.0)(sample, key=77, number=4)
    np.testing.assert_array_equal(row["subject_masks"][0], (sample.labels == 1)[:, ::-1])
    np.testing.assert_array_equal(row["pixels"], sample.image[:, ::-1].transpose(2, 0, 1))


def test_subject_pictures_have_the_resolution_of_the_stored_picture(tokenizer):
    """A fine pattern survives in the cut-out although the training picture is too small for it."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::2] = 255
    labels = np.zeros((64, 64), np.uint8)
    labels[16:48, 16:48] = 1
    sample = Sample("k", image, labels, "man", (Segment(1, "man", 0, 3, (16, 16, 48, 48), 1024),))
    row = _pipeline(tokenizer, subject_size=32, flip_probability=0.0)(sample, 1, 0)
    assert row["pixels"].float().std() < 0.2 * 127.5
    assert row["subject_pixels"][0].std() > 0.49 * 255


def test_unconditional_rows_have_no_caption_and_no_subject_at_the_given_rate(tokenizer, make_sample):
    pipeline = _pipeline(tokenizer, unconditional_probability=0.25)
    rows = [pipeline(make_sample(0), key, 0) for key in range(600)]
    dropped = [row for row in rows if row["caption"] == ""]
    assert abs(len(dropped) / 600 - 0.25) < 0.071  # four standard deviations
    for row in dropped[:5]:
        assert not row["subject_present"].any()
        assert not row["subject_masks"].any()
        assert len(row["subject_pixels"]) == 0
        assert row["token_ids"].tolist()[:2] == [1, 2]


def test_a_row_depends_on_sample_and_key_alone(tokenizer, make_sample):
    pipeline = _pipeline(tokenizer, unconditional_probability=0.1, augment_subject=True, crop="random")
    first = pipeline(make_sample(0), 5, 0)
    pipeline(make_sample(1), 6, 1)
    again, other = pipeline(make_sample(0), 5, 0), pipeline(make_sample(0), 6, 0)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    assert not np.array_equal(first["subject_pixels"], other["subject_pixels"])


def test_an_option_of_one_stage_does_not_move_the_numbers_of_another(tokenizer, make_sample):
    for key in range(20):
        plain = _pipeline(tokenizer)(make_sample(0), key, 0)
        changed = _pipeline(tokenizer, crop="random", augment_subject=True)(make_sample(0), key, 0)
        assert torch.equal(plain["pixels"], changed["pixels"])
        zoomed = _pipeline(tokenizer, zoom=(1.0, 1.5), hold_subjects=True, pad="all")(make_sample(0), key, 0)
        for name in ("caption", "subject_pixels", "token_ids"):
            np.testing.assert_array_equal(plain[name], zoomed[name], err_msg=name)


def test_without_chance_keys_change_nothing_but_the_noise(tokenizer, make_sample):
    pipeline = _pipeline(
        tokenizer, unconditional_probability=0.5, keep_probability=0.5, background="grey", zoom=(1.0, 2.0)
    ).without_chance()
    rows = [pipeline(make_sample(0), key, 0) for key in range(20)]
    for row in rows[1:]:
        for name in ("pixels", "subject_masks", "subject_pixels", "token_ids"):
            np.testing.assert_array_equal(row[name], rows[0][name], err_msg=name)


def test_collated_rows_are_a_batch(tokenizer, make_sample):
    pipeline = _pipeline(tokenizer)
    rows = [pipeline(make_sample(i), 2**63 - 1 - i, i) for i in range(3)]
    batch = collate(rows)
    assert isinstance(batch, Batch)
    assert batch.pixels.shape == (3, 3, 16, 16)
    assert batch.subject_pixels.shape == (3, 3, 3, 12, 12)
    for pictures, row in zip(batch.subject_pixels.numpy(), rows, strict=True):
        number = len(row["subject_pixels"])
        np.testing.assert_array_equal(pictures[:number], row["subject_pixels"].transpose(0, 3, 1, 2))
        assert not pictures[number:].any()
    assert batch.key.tolist() == [2**63 - 1, 2**63 - 2, 2**63 - 3]
    assert batch.sample.tolist() == [0, 1, 2]
    assert batch.latents is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"flip_probability": 1.5}, "flip_probability is 1.5"),
        ({"unconditional_probability": -0.1}, "unconditional_probability is -0.1"),
        ({"keep_probability": 2.0}, "keep_probability is 2.0"),
        ({"max_subjects": 0}, "max_subjects is 0"),
        ({"max_subjects": 10}, "max_subjects is 10"),
        ({"crop": "left"}, "crop is 'left'; expected one of centre, random"),
        ({"background": "black"}, "background is 'black'"),
        ({"pad": "wide"}, "pad is 'wide'; expected one of none, tall, all"),
        ({"augmentation": "heavy"}, "augmentation is 'heavy'; expected one of light, fastcomposer"),
        ({"min_subject_area": 2.0}, "min_subject_area is 2.0"),
        ({"zoom": (0.5, 1.0)}, r"zoom is \[0.5, 1.0\]; expected smallest and largest factor"),
        ({"zoom": (1.5, 1.0)}, r"zoom is \[1.5, 1.0\]"),
        ({"zoom": (1.0,)}, r"zoom is \[1.0\]"),
    ],
)
def test_values_outside_their_domain_are_refused(tokenizer, changes, told):
    with pytest.raises(ValueError, match=told):
        _pipeline(tokenizer, **changes)


def test_bytes_of_a_batch_become_floats(tokenizer, make_sample):
    samples = [make_sample(i) for i in range(3)]
    batch = collate([_pipeline(tokenizer, flip_probability=0.0)(sample, i, i) for i, sample in enumerate(samples)])
    floats = batch.unpacked()
    pictures = np.stack([sample.image.transpose(2, 0, 1) for sample in samples])
    np.testing.assert_allclose(floats.pixels, pictures / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(floats.subject_pixels, batch.subject_pixels.numpy() / 255, atol=1e-6)
    assert floats.subject_masks.dtype == torch.float32
    assert torch.equal(floats.subject_masks.bool(), batch.subject_masks)
    again = floats.unpacked()
    assert torch.equal(again.pixels, floats.pixels)
    assert torch.equal(again.subject_pixels, floats.subject_pixels)
