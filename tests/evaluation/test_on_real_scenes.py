"""The toy benchmark on drawn scenes: what it says where the answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moa_train.data.sources.toyworld import CONTEXTS, NOUNS, draw_scene, identity
from moa_train.evaluation import benchmark
from moa_train.evaluation.clip_score import ClipScore
from moa_train.evaluation.gallery import Gallery, ToyProtocol, held_out_people, lineup
from moa_train.inference.pictures import Picture
from moa_train.prior.load import toy_prior_folder
from moa_train.prior.probe import load_probe

PROTOCOL = ToyProtocol(people=4, contexts=4, seeds=(0, 1))


@pytest.fixture(scope="module")
def probe():
    return load_probe(toy_prior_folder() / "probe")


def scene(who, context, seed):
    """Place, pose and background hang on context and seed alone, whoever it is."""
    drawn = draw_scene(np.random.default_rng([seed, context]), [who], CONTEXTS[context])
    return Picture(Image.fromarray(drawn.image), seed, None)


@pytest.fixture(scope="module")
def clip():
    return ClipScore("toy")


@pytest.fixture(scope="module")
def gallery():
    """What a perfect method would draw: the person in the very scene of the prior, which draws somebody."""
    people = held_out_people(PROTOCOL)
    moa, prior = np.empty((4, 4, 2), dtype=object), np.empty((2, 4, 2), dtype=object)
    for p, c, g in np.ndindex(moa.shape):
        moa[p, c, g] = scene(people[p].identity, c, g)
    somebody = [next(who for who in (identity("train", n) for n in range(99)) if who.noun == noun) for noun in NOUNS]
    for noun, c, g in np.ndindex(prior.shape):
        prior[noun, c, g] = scene(somebody[noun], c, g)
    return Gallery(people, CONTEXTS[:4], moa, prior)


@pytest.fixture(scope="module")
def numbers(gallery, probe, clip):
    return benchmark.measure(gallery, probe, clip, PROTOCOL)


def test_real_people_are_identified_and_the_prior_is_not(numbers):
    assert numbers["identity"]["moa"] > 0.6
    assert numbers["rank1"]["moa"] > 0.5
    assert numbers["rank5"]["moa"] > 0.8
    assert numbers["rank1"]["chance"] == 0.01
    assert numbers["rank5"]["chance"] == 0.05
    # One drawn stranger a noun: it can be nearest to one of the two at most, and is to none here.
    assert numbers["rank1"]["prior"] < 0.1


def test_people_drawn_for_one_another_are_not_identified(gallery, probe, clip, numbers):
    shuffled = replace(gallery, moa=np.roll(gallery.moa, 1, axis=0))
    measured = benchmark.measure(shuffled, probe, clip, PROTOCOL)
    assert measured["rank1"]["moa"] < 0.1
    assert measured["rank5"]["moa"] < 0.25
    assert abs(measured["identity"]["moa"]) < 0.3
    assert measured["rank1"]["real"] == numbers["rank1"]["real"] > 0.5


def test_the_same_context_behind_other_people_is_the_same_by_every_measure(numbers):
    for measure, nothing in (("context_difference", 0.0), ("context_ssim", 1.0), ("context_features", 0.0)):
        for name in ("moa", "other_subject"):
            kept, scale = (abs(numbers[measure][each] - nothing) for each in (name, "other_seed"))
            assert kept < 0.05 * scale, (measure, name)
    assert numbers["context_difference"]["other_seed"] > 0.01
    assert numbers["context_ssim"]["other_seed"] < 0.8
    assert numbers["context_features"]["other_seed"] > 0.02


def test_clip_knows_real_scenes_by_their_prompts_and_not_by_those_of_other_places(numbers):
    assert numbers["clip_score"]["moa"] == pytest.approx(numbers["clip_score"]["real"], abs=0.1)
    assert numbers["clip_score"]["moa"] > 0.6
    assert numbers["clip_score"]["prior"] > 0.5  # drawn, too
    assert numbers["clip_score"]["other_place"] < 0.2


def test_places_and_sizes_spread_as_those_drawn(numbers, gallery):
    centres = []
    for c, g in np.ndindex(4, 2):
        labels = draw_scene(np.random.default_rng([g, c]), [gallery.people[0].identity], CONTEXTS[c]).labels
        rows, columns = np.nonzero(labels)
        centres.append([(columns.mean() + 0.5) / 64, (rows.mean() + 0.5) / 64])
    drawn = np.linalg.norm(np.diff(np.array(centres).reshape(4, 2, 2), axis=1), axis=-1).mean()
    assert numbers["position_spread"]["moa"] == pytest.approx(drawn, rel=0.1)
    assert numbers["position_spread"]["prior"] == pytest.approx(drawn, rel=0.1)
    assert numbers["size_spread"]["moa"] == pytest.approx(numbers["size_spread"]["prior"], rel=0.2)


def test_a_method_that_ignores_the_seed_has_no_spread_and_nobody_has_no_place(gallery, probe, clip):
    frozen = gallery.moa.copy()
    frozen[:, :, 1] = frozen[:, :, 0]
    empty = Picture(Image.fromarray(draw_scene(np.random.default_rng(0), [], CONTEXTS[0]).image), 0, None)
    for place in np.ndindex(2, 4, 2):  # the men
        frozen[place] = empty
    measured = benchmark.measure(replace(gallery, moa=frozen), probe, clip, PROTOCOL)
    assert measured["person_found"]["moa"] == 0.5
    assert measured["rank5"]["moa"] <= 0.5
    assert measured["position_spread"]["moa"] == measured["size_spread"]["moa"] == measured["diversity"]["moa"] == 0.0
    assert measured["position_spread"]["prior"] > 0.02
    measured = benchmark.measure(replace(gallery, moa=frozen[[0, 1, 0, 1]]), probe, clip, PROTOCOL)
    assert measured["person_found"]["moa"] == measured["rank5"]["moa"] == measured["identity"]["moa"] == 0.0
    assert measured["position_spread"].keys() == {"prior", "real"}


def test_the_line_up_starts_with_those_shown_and_names_nobody_twice(gallery):
    vectors = lineup(gallery.people, PROTOCOL)
    assert vectors.shape == (100, 16)
    shown = np.stack([who.identity.vector() for who in gallery.people])
    assert np.array_equal(vectors[:4].numpy(), shown)
    assert len(vectors.unique(dim=0)) == 100
