"""The toy world tells the truth about itself: masks, boxes, captions, splits and identity vectors."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from moa_train.data.sources.toyworld import (
    CONTEXTS,
    IDENTITY_DIM,
    NOUNS,
    SPLITS,
    Identity,
    Scene,
    describe,
    draw_portrait,
    draw_scene,
    identity,
    scene_caption,
)

HUE_PIXELS = {"red": (218, 36, 40), "green": (52, 168, 64), "blue": (44, 82, 218)}
SLIVERS = 4  # pixels
HUE_PLACES = {"red": 0.0, "green": 3 / 8, "blue": 5 / 8}


def people(count: int, first: int = 0) -> list[Identity]:
    return [identity("train", first + i) for i in range(count)]


def scenes(number: int, size: int = 64) -> list[Scene]:
    rng = np.random.default_rng(11)
    return [draw_scene(rng, people(i % 3, 3 * i), size=size, detailed=i % 2 == 0) for i in range(number)]


def dilated(mask: np.ndarray) -> np.ndarray:
    """Grown by one pixel in all eight directions, by shifting."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    shifts = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    return np.any(shifts, axis=0)


def eroded(mask: np.ndarray) -> np.ndarray:
    """Shrunk by one pixel; what lies outside the picture counts as covered."""
    return ~dilated(~mask)


# ------------------------------------------------------------------------------------------------------------ captions


def test_offsets_select_the_nouns() -> None:
    for scene in scenes(60):
        for person, segment in zip(scene.identities, scene.segments, strict=True):
            assert scene.caption[segment.start : segment.end] == segment.noun == person.noun


def test_offsets_of_two_people_of_one_noun_differ_and_keep_their_order() -> None:
    twins = [replace(identity("train", 0), noun="woman", beard=False)] * 2
    for seed in range(8):
        _, offsets = scene_caption(twins, CONTEXTS[0], seed % 2 == 0, np.random.default_rng(seed))
        assert offsets[0][1] < offsets[1][0]


def test_a_caption_ends_with_its_context_and_a_short_one_says_nothing_about_attributes() -> None:
    man, woman = replace(identity("train", 0), noun="man"), replace(identity("train", 1), noun="woman", beard=False)
    for seed, context in enumerate(CONTEXTS):
        caption, _ = scene_caption([man, woman], context, False, np.random.default_rng(seed))
        assert caption.removeprefix("a photo of ").removeprefix("a picture of ") == f"a man and a woman {context}"


def test_a_whole_description_names_every_visible_attribute() -> None:
    who = Identity("man", 0.5, "spiky", 6 / 8, 6 / 8, True, False, 0.0, False, 0.5)
    assert describe(who, detail=False) == "man"
    assert describe(who, detail=True) == "man with tan skin, spiky violet hair, violet shirt and glasses"
    other = replace(who, hair_style="bald", glasses=False, hat=True, beard=True, skin=0.9)
    assert describe(other, detail=True) == "man with dark skin, bald head, beard, violet shirt and red hat"


def test_a_detailed_caption_names_all_attributes_mostly_and_else_a_part_of_them_in_order() -> None:
    who, rng = identity("train", 4), np.random.default_rng(0)
    whole = describe(who, detail=True)
    captions = [scene_caption([who], CONTEXTS[0], True, rng)[0] for _ in range(400)]
    share = np.mean([whole in caption for caption in captions])
    assert 0.7 < share < 0.9
    named = whole.replace(" and ", ", ").split(" with ")[1].split(", ")
    for caption in captions:
        said = caption.removesuffix(f" {CONTEXTS[0]}").split(" with ")[1].replace(" and ", ", ").split(", ")
        assert said == [phrase for phrase in named if phrase in said]


def test_scenes_without_people_have_a_caption_and_no_segments() -> None:
    for context in CONTEXTS:
        scene = draw_scene(np.random.default_rng(3), [], context, detailed=True)
        assert scene.segments == ()
        assert not scene.labels.any()
        assert context.split(" ")[-1] in scene.caption
        assert not any(noun in scene.caption for noun in NOUNS)


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [16, 50, 64, 96])
def test_segments_agree_with_the_labels_pixel_by_pixel(size: int) -> None:
    for scene in scenes(12, size):
        assert scene.image.shape == (size, size, 3)
        assert scene.labels.shape == (size, size)
        assert scene.image.dtype == scene.labels.dtype == np.uint8
        assert set(np.unique(scene.labels)) - {0} == {segment.id for segment in scene.segments}
        for segment in scene.segments:
            ys, xs = np.nonzero(scene.labels == segment.id)
            assert segment.bbox == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert segment.area == len(xs)


def test_the_same_generator_draws_the_same_scene() -> None:
    first, second = (draw_scene(np.random.default_rng(5), people(2), detailed=True) for _ in range(2))
    other = draw_scene(np.random.default_rng(6), people(2), detailed=True)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.labels, second.labels)
    assert (first.caption, first.segments, first.context) == (second.caption, second.segments, second.context)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("count", [1, 2])
def test_people_change_the_pixels_of_their_masks_and_no_others(count: int) -> None:
    """An unmasked pixel is covered by at most 4 of its 9 parts, so it moves by at most 4 / 9 of the range, and hardly
    ever away from a mask's border: tips of spikes and arms that graze the edge of the picture do.
    """
    for seed in range(24):
        empty = draw_scene(np.random.default_rng(seed), [])
        scene = draw_scene(np.random.default_rng(seed), people(count, seed))
        mask, changed = scene.labels > 0, (scene.image != empty.image).any(axis=-1)
        moved = np.abs(scene.image.astype(int) - empty.image).max(axis=-1)
        assert moved[~mask].max() <= 255 * 4 / 9 + 1
        assert (changed & ~dilated(mask)).sum() <= SLIVERS
        assert (~changed & eroded(mask)).sum() <= 0.02 * mask.sum()


@pytest.mark.parametrize("count", [1, 2])
def test_other_people_in_the_same_poses_change_only_the_masks(count: int) -> None:
    for seed in range(24):
        one, other = (draw_scene(np.random.default_rng(seed), people(count, first)) for first in (seed, 500 + seed))
        assert one.context == other.context
        changed = (one.image != other.image).any(axis=-1)
        assert changed.any()
        assert (changed & ~dilated((one.labels > 0) | (other.labels > 0))).sum() <= SLIVERS


def test_each_label_shows_its_own_person() -> None:
    """The first person's colour is nowhere under the second one's label, whoever stands in front."""
    base = Identity("man", 0.5, "short", 0.0, 0.0, False, False, 0.0, False, 0.5)
    red, blue = (replace(base, hair_hue=HUE_PLACES[name], shirt_hue=HUE_PLACES[name]) for name in ("red", "blue"))
    for seed in range(24):
        scene = draw_scene(np.random.default_rng(seed), [red, blue])
        for label, own, other in ((1, "red", "blue"), (2, "blue", "red")):
            pixels = scene.image[eroded(scene.labels == label)].astype(int)
            near = {name: (np.abs(pixels - HUE_PIXELS[name]).max(axis=-1) < 12).mean() for name in (own, other)}
            assert near[own] > 0.25
            assert near[other] < 0.005


def test_half_coverage_decides_about_a_pixel() -> None:
    """At a third of the size, a label is what a clear majority of the nine pixels of the large picture say."""
    for seed in range(8):
        large = draw_scene(np.random.default_rng(seed), people(1, seed), size=192).labels
        small = draw_scene(np.random.default_rng(seed), people(1, seed), size=64).labels
        share = large.reshape(64, 3, 64, 3).mean(axis=(1, 3))
        clear = np.abs(share - 0.5) > 0.3
        assert (clear & (small != (share > 0.5))).sum() <= SLIVERS
        assert abs(small.sum() - share.sum()) <= 0.025 * share.sum()


@pytest.mark.parametrize("count", [1, 2])
def test_people_are_large_and_their_faces_are_seen(count: int) -> None:
    for seed in range(60):
        scene = draw_scene(np.random.default_rng(seed), people(count, 2 * seed))
        for segment in scene.segments:
            x1, y1, x2, y2 = segment.bbox
            assert 0.5 <= (y2 - y1) / 64 <= 1.0
            assert (x2 - x1) / 64 >= 0.3
            assert segment.area >= 0.08 * 64 * 64


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("skin", 0.9),
        ("hair_style", "long"),
        ("hair_hue", 0.625),
        ("shirt_hue", 0.375),
        ("glasses", True),
        ("hat", True),
        ("beard", True),
        ("noun", "woman"),
        ("head_shape", 1.0),
    ],
)
def test_each_attribute_is_visible_in_a_small_scene(attribute: str, value: object) -> None:
    base = Identity("man", 0.1, "short", 0.0, 0.0, False, False, 0.25, False, 0.0)
    for seed in range(8):
        plain = draw_scene(np.random.default_rng(seed), [base])
        varied = draw_scene(np.random.default_rng(seed), [replace(base, **{attribute: value})])
        different = np.abs(plain.image.astype(int) - varied.image).max(axis=-1) > 40
        assert different.sum() >= 20


def test_contexts_look_different_from_one_another() -> None:
    """Mean empty pictures of two places differ by more than two samples of one place do from their mean."""
    rng = np.random.default_rng(0)
    drawn = {c: np.stack([draw_scene(rng, [], c).image for _ in range(12)]).astype(float) for c in CONTEXTS}
    means = {context: images.mean(axis=0) for context, images in drawn.items()}
    for context, images in drawn.items():
        for image in images:
            errors = {c: ((image - mean) ** 2).mean() for c, mean in means.items()}
            assert min(errors, key=lambda c: errors[c]) == context


def test_a_portrait_shows_one_large_person_on_a_plain_ground() -> None:
    for number in range(12):
        who = identity("train", number)
        image, mask = draw_portrait(np.random.default_rng(number), who)
        again, _ = draw_portrait(np.random.default_rng(number), who)
        assert image.shape == (64, 64, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}
        assert 0.3 < mask.mean() < 0.85
        assert np.array_equal(image, again)
        rows = [row[~seen] for row, seen in zip(image, dilated(mask > 0), strict=True) if not seen.all()]
        assert sum((row != np.median(row, axis=0)).any(axis=-1).sum() for row in rows) <= SLIVERS


def test_pictures_can_be_written_to() -> None:
    """Arrays that own their memory: `torch.from_numpy` warns about others."""
    scene = draw_scene(np.random.default_rng(0), people(1))
    assert all(
        array.flags.writeable
        for array in (scene.image, scene.labels, *draw_portrait(np.random.default_rng(0), people(1)[0]))
    )


# ----------------------------------------------------------------------------------------------------------- identities


def test_no_description_occurs_in_two_splits_whatever_the_seed() -> None:
    seen = {
        split: {describe(identity(split, n, seed), detail=True) for n in range(400) for seed in (0, 7)}
        for split in SPLITS
    }
    assert all(len(descriptions) > 300 for descriptions in seen.values())
    for first, second in combinations(SPLITS, 2):
        assert not seen[first] & seen[second]


def test_an_identity_is_a_pure_function_of_split_number_and_seed() -> None:
    assert identity("test", 3, 1) == identity("test", 3, 1)
    assert len({identity(split, n, seed) for split in SPLITS for n in range(20) for seed in (0, 1)}) == 120


def test_the_population_has_every_attribute_and_only_men_have_beards() -> None:
    population = [identity("train", n) for n in range(600)]
    assert {person.noun for person in population} == set(NOUNS)
    assert {person.hair_style for person in population} == {"short", "long", "spiky", "bald"}
    assert all(person.noun == "man" for person in population if person.beard)
    for flag in ("glasses", "hat"):
        assert 0.3 < np.mean([getattr(person, flag) for person in population]) < 0.6


def test_vectors_are_centred_and_independent_people_have_cosines_near_zero() -> None:
    vectors = np.stack([identity("train", n).vector() for n in range(1500)])
    assert vectors.shape == (1500, IDENTITY_DIM)
    assert vectors.dtype == np.float32
    assert np.abs(vectors.mean(axis=0)).max() < 0.1
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    assert abs(cosines.mean()) < 0.01
    assert cosines.std() < 0.35


def test_vectors_tell_apart_what_is_visible_and_ignore_what_is_not() -> None:
    base = Identity("man", 0.5, "bald", 0.0, 0.0, False, False, 0.0, False, 0.5)
    assert np.array_equal(base.vector(), replace(base, hair_hue=0.5, hat_hue=0.5).vector())
    changes = {"noun": "woman", "skin": 0.7, "hair_style": "long", "shirt_hue": 0.5, "glasses": True, "hat": True}
    for attribute, value in {**changes, "beard": True, "head_shape": 0.9}.items():
        assert np.linalg.norm(base.vector() - replace(base, **{attribute: value}).vector()) > 0.3


# ---------------------------------------------------------------------------------------------------------- wrong input


def test_wrong_arguments_are_refused_by_name() -> None:
    rng, who = np.random.default_rng(0), identity("train", 0)
    with pytest.raises(ValueError, match="at most 2"):
        draw_scene(rng, [who, who, who])
    with pytest.raises(ValueError, match="in the bath"):
        draw_scene(rng, [who], "in the bath")
    with pytest.raises(ValueError, match="in the bath"):
        scene_caption([who], "in the bath", False, rng)
    with pytest.raises(ValueError, match="16 pixels"):
        draw_scene(rng, [who], size=8)
    with pytest.raises(ValueError, match="'dev'"):
        identity("dev", 0)
    with pytest.raises(ValueError, match="-1"):
        identity("train", -1)
    with pytest.raises(ValueError, match="beard"):
        replace(who, noun="woman", beard=True)
    for attribute, value in {"noun": "cat", "hair_style": "mohawk", "skin": 1.5, "hat_hue": 1.0}.items():
        with pytest.raises(ValueError, match=attribute):
            replace(who, **{attribute: value})
