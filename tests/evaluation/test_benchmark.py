"""The toy benchmark with pictures that spell out what is in them, read by an oracle."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.data.sources.toyworld import CONTEXTS, IDENTITY_DIM, NOUNS
from moa_train.evaluation import benchmark
from moa_train.evaluation.clip_score import ClipScore
from moa_train.evaluation.gallery import Gallery, ToyProtocol, held_out_people
from moa_train.evaluation.report import markdown, routing_figure, samples_figure, table, write_report
from moa_train.evaluation.seen import look
from moa_train.inference.pictures import Picture
from moa_train.prior.probe import Probe

PROTOCOL = ToyProtocol(people=6, contexts=3, seeds=(4, 5), margin=2)
NOBODY = 99


class Oracle(Probe):
    """Reads the code of `picture`: red 255 where the person is, green the context, blue the person's number."""

    def __init__(self, people):
        super().__init__(IDENTITY_DIM, CONTEXTS)
        self.people = people

    def person(self, pictures):
        return (pictures[:, 0] > 0.99).float()

    def context(self, pictures):
        number = (pictures[:, 1].mean((1, 2)) * 255).round().long()
        return torch.nn.functional.one_hot(number, len(CONTEXTS)).float()

    def identity(self, crops):
        numbers = (crops[:, 2].mean((1, 2)) * 255).round().long().tolist()
        return torch.stack([vector(self.people, number) for number in numbers])


class Reader(ClipScore):
    """In place of CLIP: 1 for a text that names the picture's place, 0.25 more for the noun of its person."""

    def __init__(self, people):
        self.people = people

    def __call__(self, images, texts):
        codes = [np.asarray(image)[0, 0] for image in images]
        nouns = ["nobody" if number == NOBODY else self.people[number].identity.noun for *_, number in codes]
        return torch.tensor([
            float(text.endswith(CONTEXTS[code[1]])) + 0.25 * (f"a photo of a {noun} " in text)
            for code, noun, text in zip(codes, nouns, texts, strict=True)
        ])  # fmt: skip


def vector(people, number):
    return torch.ones(IDENTITY_DIM) if number == NOBODY else torch.from_numpy(people[number].identity.vector())


def box(seed):
    """Where the person stands: a function of the seed."""
    return slice(16, 48), slice(8 + 16 * seed, 32 + 16 * seed)


def picture(person, context, seed, background=0):
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = background, context, person
    rows, columns = box(seed)
    pixels[rows, columns, 0] = 255
    steps = torch.full((2, 64, 64), 0.2)
    steps[:, rows, columns] = 0.7
    return Picture(Image.fromarray(pixels), seed, steps)


@pytest.fixture(scope="module")
def gallery():
    people = held_out_people(PROTOCOL)
    moa, prior = np.empty((6, 3, 2), dtype=object), np.empty((2, 3, 2), dtype=object)
    for p, c, g in np.ndindex(moa.shape):
        moa[p, c, g] = picture(p, c, g, background=51)
    for noun, c, g in np.ndindex(prior.shape):
        prior[noun, c, g] = picture(NOBODY, c, g, background=102 * g)
    return Gallery(people, CONTEXTS[:3], moa, prior)


@pytest.fixture(scope="module")
def numbers(gallery):
    patch = pytest.MonkeyPatch()
    patch.setattr(benchmark, "_real_scenes", lambda gallery, stream: [np.asarray(p.image) for p in gallery.moa.flat])
    measured = benchmark.measure(gallery, Oracle(gallery.people), Reader(gallery.people), PROTOCOL)
    patch.undo()
    return {
        **measured,
        "method": "moa",
        "protocol": {"contexts": 3, "seeds": [4, 5], "steps": 2, "guidance": 3.0, "split": "test"},
        "seconds": 1.0,
    }


def test_each_picture_is_scored_with_its_own_prompt_and_with_that_of_another_place(numbers):
    assert numbers["clip_score"] == {"moa": 1.25, "prior": 1.0, "real": 1.25, "other_place": 0.25}


def cosine(first, second):
    return float(first @ second / first.norm() / second.norm())


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_people_are_half_men_half_women_and_of_the_split(split):
    from moa_train.data.sources.toyworld.identities import split_of

    people = held_out_people(replace(PROTOCOL, split=split))
    assert [person.identity.noun for person in people] == ["man"] * 3 + ["woman"] * 3
    assert {split_of(person.identity) for person in people} == {split}


def test_held_out_people_and_their_photos_are_the_same_each_time():
    people = held_out_people(PROTOCOL)
    assert len({person.identity for person in people}) == 6
    for person in people:
        assert person.mask.any()
        assert not person.mask.all()
    again = held_out_people(PROTOCOL)
    assert all(np.array_equal(a.photo, b.photo) for a, b in zip(people, again, strict=True))
    portraits = held_out_people(ToyProtocol(people=6, reference="portrait"))
    assert portraits[0].identity == people[0].identity
    assert not np.array_equal(portraits[0].photo, people[0].photo)


def test_who_is_in_the_picture_is_compared_with_the_right_people(gallery, numbers):
    truth = [vector(gallery.people, p) for p in range(6)]
    following = [1, 2, 0, 4, 5, 3]  # of the same noun
    assert numbers["identity"]["moa"] == pytest.approx(1.0, abs=1e-5)
    assert numbers["identity"]["real"] == pytest.approx(1.0, abs=1e-5)
    wrong = np.mean([cosine(truth[p], truth[q]) for p, q in enumerate(following)])
    assert numbers["identity"]["wrong_subject"] == pytest.approx(wrong, abs=1e-5)
    prior = np.mean([cosine(torch.ones(IDENTITY_DIM), person) for person in truth])
    assert numbers["identity"]["prior"] == pytest.approx(prior, abs=1e-5)


def test_context_is_compared_outside_people_with_the_same_seed_and_scaled_by_another(numbers):
    # Only red and blue differ outside people; the red backgrounds are 51 (MoA) and 0 or 102 (the prior, by seed).
    red = (51 / 255) ** 2 / 3
    blue = np.mean([((NOBODY - p) / 255) ** 2 / 3 for p in range(6)])
    assert numbers["context_difference"]["moa"] == pytest.approx(red + blue, abs=1e-4)
    assert numbers["context_difference"]["other_seed"] == pytest.approx((102 / 255) ** 2 / 3, abs=1e-4)


def test_routing_context_and_found_people_reach_their_ceilings(numbers):
    assert numbers["routing_iou"] == 1.0
    assert numbers["context_accuracy"] == {"moa": 1.0, "prior": 1.0, "real": 1.0}
    assert numbers["person_found"] == {"moa": 1.0, "prior": 1.0}
    assert numbers["n"] == {"people": 6, "pictures": 36}


def test_diversity_is_the_difference_between_seeds(gallery, numbers):
    first, second = (np.asarray(gallery.moa[0, 0, g].image) / 255.0 for g in range(2))
    assert numbers["diversity"]["moa"] == pytest.approx(((first - second) ** 2).mean(), abs=1e-4)


def test_nobody_found_counts_as_cosine_zero(gallery):
    seen = look(Oracle(gallery.people), torch.zeros(1, 3, 64, 64))
    assert not seen.people.any()
    assert (seen.vectors == 0).all()


def test_intervals_hold_their_means(numbers):
    for question, _, whose, mean, low, high in table(numbers):
        assert low - 1e-5 <= mean <= high + 1e-5, (question, whose)


def test_the_report_is_written_whole(gallery, numbers, tmp_path):
    write_report(tmp_path, gallery, numbers)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(numbers))
    text = (tmp_path / "report.md").read_text()
    assert text == markdown(numbers)
    assert "samples.png" in text
    assert f"{numbers['context_difference']['moa']:.4g}" in text
    for figure in ("samples.png", "routing.png"):
        with Image.open(tmp_path / figure) as image:
            assert min(image.size) > 100


def test_a_method_without_a_router_is_measured_and_reported_under_its_name_without_routing(
    gallery, numbers, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        benchmark, "_real_scenes", lambda gallery, stream: [np.asarray(p.image) for p in gallery.moa.flat]
    )
    moa = gallery.moa.copy()
    for place, picture_ in np.ndenumerate(moa):
        moa[place] = replace(picture_, steps=None)
    unrouted = replace(gallery, moa=moa)
    measured = benchmark.measure(unrouted, Oracle(gallery.people), Reader(gallery.people), PROTOCOL)
    assert "routing_iou" not in measured
    assert measured["context_difference"] == numbers["context_difference"]
    write_report(
        tmp_path, unrouted, numbers | measured | {"method": "ip_adapter"} | {"intervals": measured["intervals"]}
    )
    text = (tmp_path / "report.md").read_text()
    assert "IP-Adapter" in text
    assert "MoA" not in text
    assert "outing" not in text
    assert not (tmp_path / "routing.png").exists()


def test_the_figure_has_a_row_for_each_prior_and_person(gallery):
    figure = samples_figure(gallery, rows_per_noun=2, contexts=3, side=64)
    assert figure.size == (4 * 68 + 4, 18 + len(NOUNS) * 3 * 68 + 4)
    photo = gallery.people[0].photo
    assert figure.getpixel((4 + 10, 18 + 4 + 68 + 10)) == tuple(photo[10, 10].tolist())
    assert routing_figure(gallery, rows=5, side=64).size == (6 * 68 + 4, 18 + 5 * 68 + 4)


@pytest.mark.parametrize(
    "wrong", [{"people": 5}, {"people": 2}, {"contexts": 0}, {"contexts": 9}, {"seeds": (1,)}, {"seeds": (1, 1)},
              {"lineup": 11}, {"pairs": 37}, {"pairs": -1},
              {"reference": "drawing"}, {"split": "train"}],
)  # fmt: skip
def test_a_protocol_that_compares_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ToyProtocol(**wrong)
