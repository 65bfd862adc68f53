"""Toy scenes as samples: sound, reproducible, and with what evaluation needs to know."""

from dataclasses import asdict

import numpy as np
import pytest

from moa_train.data.schema import check_sample
from moa_train.data.sources.toy_scenes import ToyScenes
from moa_train.data.sources.toyworld import identity


def test_scenes_are_sound_samples_with_their_truth():
    source = ToyScenes("validation", 30, people=5, seed=2)
    for number in range(30):
        sample = source[number]
        assert check_sample(sample, max_subjects=2) == []
        people = sample.source["identities"]
        assert len(people) == len(sample.segments) in (1, 2)
        for person, segment in zip(people, sample.segments, strict=True):
            who = asdict(identity("validation", person["number"], 2))
            assert {**who, "number": person["number"]} == person
            assert who["noun"] == segment.noun
        assert len({person["number"] for person in people}) == len(people)


def test_a_scene_is_a_function_of_its_number():
    one, two = ToyScenes("train", 10, people=5), ToyScenes("train", 500, people=5)
    np.testing.assert_array_equal(one[7].image, two[7].image)
    assert (one[7].image != one[8].image).any()
    assert (ToyScenes("train", 10, people=5, seed=1)[7].image != one[7].image).any()


def test_numbers_of_people_and_captions_follow_the_settings():
    counts = [len(ToyScenes("train", 9, people=5, subjects=(2, 2))[i].segments) for i in range(9)]
    assert counts == [2] * 9
    some = [len(ToyScenes("train", 200, people=5, empty=0.5)[i].segments) for i in range(200)]
    assert abs(some.count(0) / 200 - 0.5) < 0.15  # four standard deviations
    captions = [ToyScenes("train", 9, people=5, detailed=1.0)[i].caption for i in range(9)]
    assert all(" with " in caption for caption in captions)
    two = ("in the desert", "at the beach")
    places = [ToyScenes("train", 40, people=5, contexts=two)[i] for i in range(40)]
    assert {place.source["context"] for place in places} == set(two)
    assert all(place.caption.endswith(place.source["context"]) for place in places)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"split": "dev"}, "split is 'dev'"),
        ({"subjects": (2, 1)}, r"subjects is \[2, 1\]"),
        ({"subjects": (1, 3)}, r"subjects is \[1, 3\]"),
        ({"people": 1}, "of 1 people"),
        ({"empty": 2.0}, "empty is 2.0"),
        ({"detailed": -1.0}, "detailed is -1.0"),
        ({"contexts": ("at home",)}, r"contexts is \['at home'\]; expected some of at the beach, "),
        ({"contexts": ()}, r"contexts is \[\]"),
    ],
)
def test_values_outside_their_domain_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        ToyScenes(**{"split": "train", "count": 3, "people": 5, **changes})
