"""Two people in one picture: parted, placed and told apart, on drawn scenes whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.data.sources.toyworld import CONTEXTS, NOUN_PARTS, draw_scene, identity
from moa_train.evaluation.gallery import Gallery, ToyProtocol, couples, held_out_people, make_gallery
from moa_train.evaluation.pairs import Couple, confusion, measure_pairs, nearer, part, see_couples
from moa_train.evaluation.seen import pixels_in
from moa_train.inference.pictures import Picture
from moa_train.inference.pipeline import MoAPipeline
from moa_train.prior.load import toy_prior_folder
from moa_train.prior.probe import load_probe

PLACES = CONTEXTS[:6]


@pytest.fixture(scope="module")
def probe():
    return load_probe(toy_prior_folder() / "probe")


@pytest.fixture(scope="module")
def people():
    return held_out_people(ToyProtocol(people=8))


def gallery_of(people, drawn):
    """Each couple in six places; `drawn` says who is drawn where these two were asked for."""
    mixed = couples(len(people), 4)
    pairs = np.empty((4, len(PLACES)), dtype=object)
    for k, c in np.ndindex(pairs.shape):
        asked = [people[mixed[k][slot]].identity for slot in (0, 1)]
        scene = draw_scene(np.random.default_rng([50, k, c]), drawn(asked), PLACES[c])
        pairs[k, c] = Picture(Image.fromarray(scene.image), 0, None)
    nothing = np.empty((8, 6, 2), dtype=object)
    return Gallery(people, PLACES, nothing, nothing[:2], pairs)


def with_looks_of(who, other):
    """The other's hair, shirt, skin ... on a body of this one's noun."""
    return replace(other, noun=who.noun, beard=who.beard)


def test_pairs_alone_are_kept_apart_where_it_is_asked_for(monkeypatch):
    asked = []

    def generate(pipe, prompts, subjects, seeds, size, **options):
        asked.extend((len(each), options.get("separate_subjects", False)) for each in subjects)
        return [Picture(Image.new("RGB", (8, 8)), seed, None) for seed in seeds]

    monkeypatch.setattr("moa_train.evaluation.gallery.generate", generate)
    pipe = MoAPipeline.__new__(MoAPipeline)  # nothing is drawn with it
    for separate in (False, True):
        asked.clear()
        make_gallery(pipe, ToyProtocol(people=4, contexts=2, pairs=2, separate_subjects=separate), pipe)
        assert sorted(set(asked)) == [(0, False), (1, False), (2, separate)]


def test_couples_are_mixed_and_take_turns():
    found = couples(8, 16)
    assert len(set(map(frozenset, found))) == 16
    assert found[:2] == [(0, 4), (5, 1)]
    for k, (first, second) in enumerate(found):
        assert (first < 4, second < 4) == ((True, False) if k % 2 == 0 else (False, True))
    assert {who for pair in found[:4] for who in pair} == set(range(8))


def test_parts_of_the_vector_that_tell_the_noun():
    who = next(each for each in (identity("test", n) for n in range(99)) if each.noun == "man")
    woman = replace(who, noun="woman", beard=False)
    assert np.flatnonzero(who.vector() != woman.vector()).tolist() == list(NOUN_PARTS)


def test_two_people_are_parted_in_real_scenes_and_one_is_not(probe):
    two, one = [], []
    for n in range(24):
        pair = [identity("test", n), identity("test", n + 24)]
        two.append(draw_scene(np.random.default_rng([51, n]), pair))
        one.append(draw_scene(np.random.default_rng([52, n]), pair[:1]))
    masks, found = part(probe.person(pixels_in([scene.image for scene in two])) > 0.5)
    assert found.all()
    for (left, right), scene in zip(masks.numpy(), two, strict=True):
        assert not (left & right).any()
        labels = [scene.labels == 1, scene.labels == 2]
        labels.sort(key=lambda mask: np.nonzero(mask)[1].mean())
        for mask, label in zip((left, right), labels, strict=True):
            assert (mask & label).sum() / (mask | label).sum() > 0.7
    assert not part(probe.person(pixels_in([scene.image for scene in one])) > 0.5)[1].any()


def test_parting_needs_a_valley_and_two_that_are_large_enough():
    people = torch.zeros(4, 20, 20, dtype=torch.bool)
    people[0, 5:, 1:7], people[0, 5:, 12:18] = True, True
    people[1, 5:, 1:18] = True  # no valley
    people[2, 5:, 1:7], people[2, 5:15, 12:14] = True, True  # 20 pixels of 400
    masks, found = part(people)
    assert found.tolist() == [True, False, False, False]
    left = people[0] & (torch.arange(20) < 9)
    assert torch.equal(masks[0, 0], left)
    assert torch.equal(masks[0, 1], people[0] & ~left)
    assert torch.equal(masks[1, 0], people[1])


def test_nearer_ignores_what_tells_the_noun():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 2, 16, generator=generator)
    vectors = torch.stack([truth[:, 1], truth[:, 0]], dim=1)  # swapped ...
    vectors[:, :, NOUN_PARTS] = 100.0 * truth[:, :, NOUN_PARTS]  # ... but for the noun
    couple = Couple(torch.tensor([True, True, False]), vectors)
    assert nearer(couple, truth).tolist() == [[1, 0]] * 3
    assert confusion(couple, truth) == [[0.0, 1.0], [1.0, 0.0]]
    couple.vectors[1, 0] = truth[1, 0]
    assert confusion(couple, truth) == [[0.5, 0.5], [1.0, 0.0]]
    assert confusion(Couple(torch.zeros(3, dtype=torch.bool), vectors), truth) is None


def test_real_couples_are_hardly_confused(probe, people):
    numbers = measure_pairs(gallery_of(people, lambda asked: asked), probe)
    assert numbers["pairs_found"] == {"moa": 1.0, "real": 1.0}
    for name in ("moa", "real"):
        assert numbers["pairs_confusion"][name] < 0.15
        rows = numbers["confusion"][name]
        assert min(rows[0][0], rows[1][1]) > 0.8
        assert numbers["pairs_identity"][name] > 0.55
    assert numbers["pairs_identity"]["wrong_subject"] < 0.2
    assert numbers["intervals"]["pairs_confusion.moa"][1] < 0.25


def test_people_with_each_others_looks_are_off_the_diagonal(probe, people):
    swapped = gallery_of(people, lambda asked: [with_looks_of(*asked), with_looks_of(*asked[::-1])])
    numbers = measure_pairs(swapped, probe)
    assert numbers["pairs_confusion"]["moa"] > 0.8
    rows = numbers["confusion"]["moa"]
    assert min(rows[0][1], rows[1][0]) > 0.7
    assert numbers["pairs_confusion"]["real"] < 0.15


def test_strangers_are_at_chance_and_a_single_person_is_no_couple(probe, people):
    strangers = iter([identity("train", n) for n in range(200)])

    def others(asked):
        return [next(each for each in strangers if each.noun == own.noun) for own in asked]

    numbers = measure_pairs(gallery_of(people, others), probe)
    assert 0.28 < numbers["pairs_confusion"]["moa"] < 0.72  # 48 people: three standard deviations are 0.22
    numbers = measure_pairs(gallery_of(people, lambda asked: asked[:1]), probe)
    assert numbers["pairs_found"]["moa"] == 0.0
    assert numbers["pairs_confusion"].keys() == numbers["confusion"].keys() == {"real"}


def test_the_man_stands_in_the_place_of_the_marker_behind_man(probe, people):
    scenes, man = [], []
    for k in range(8):
        who = [people[k % 4].identity, people[4 + k % 4].identity]
        man.append(k % 2)
        scenes.append(draw_scene(np.random.default_rng([53, k]), who).image)
    seen = see_couples(probe, pixels_in(scenes), torch.tensor(man))
    assert (seen.vectors[:, :, NOUN_PARTS[0]].argmax(dim=1) == torch.tensor(man)).all()
