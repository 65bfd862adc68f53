"""Samples of one's own code become shards, whatever they are given as."""

import numpy as np
import pytest
from PIL import Image

from moa_train.data.schema import check_sample
from moa_train.data.shards import ShardReader
from moa_train.data.sources.own import as_sample, call, load_function, pack_samples


def _told(number):
    """A picture with two overlapping squares; the smaller lies in front."""
    back, front = np.zeros((2, 20, 24), dtype=bool)
    back[2:18, 2:18], front[8:14, 10:22] = True, True
    image = np.full((20, 24, 3), number, dtype=np.uint8)
    return {"key": f"own-{number}", "image": image, "masks": [back, front], "caption": "a dog and a cat",
            "nouns": ["cat", "dog"]}  # fmt: skip


def _stored(index):
    reader = ShardReader(index)
    return {sample.key: sample for sample in (reader[i] for i in range(len(reader)))}


def test_a_generator_and_a_list_give_the_same_shards(tmp_path):
    from_list = pack_samples([_told(i) for i in range(9)], tmp_path / "list", workers=2)
    from_generator = pack_samples((_told(i) for i in range(9)), tmp_path / "generator")
    assert from_list.hash == from_generator.hash
    stored = _stored(from_generator)
    assert [path.name for path in (tmp_path / "generator").iterdir()] == ["train"]
    for number in range(9):
        sample = stored[f"own-{number}"]
        assert check_sample(sample) == []
        assert (np.asarray(sample.image) == number).all()
        expected = np.zeros((20, 24), int)
        expected[2:18, 2:18] = 1
        expected[8:14, 10:22] = 2
        np.testing.assert_array_equal(sample.labels, expected)
        assert [(s.noun, s.start) for s in sample.segments] == [("cat", 12), ("dog", 2)]


def test_what_cannot_be_used_is_counted_and_the_rest_kept(tmp_path):
    hidden = _told(1) | {"masks": [_told(1)["masks"][1] & _told(1)["masks"][0], _told(1)["masks"][0]]}
    hidden["masks"][0] = np.zeros((20, 24), bool)
    given = [
        _told(0),
        hidden,
        _told(2) | {"masks": [np.ones((3, 3))]},
        None,
        _told(3) | {"image": tmp_path / "none.png"},
    ]
    index = pack_samples(iter(given), tmp_path / "out")
    assert _stored(index).keys() == {"own-0"}
    assert index.packing["left_out"] == {
        "a mask is empty or hidden by others": 1,
        "a mask has another size than the picture": 1,
        "left out by the source": 1,
        "the picture cannot be read": 1,
    }


def test_pictures_may_be_paths_and_pil_pictures(tmp_path):
    Image.new("RGB", (24, 20), (9, 9, 9)).save(tmp_path / "a.png")
    for image in (str(tmp_path / "a.png"), tmp_path / "a.png", Image.new("L", (24, 20), 9)):
        sample, _ = as_sample(_told(0) | {"image": image})
        assert (np.asarray(sample.image) == 9).all()


@pytest.mark.parametrize(
    ("one", "told"),
    [
        ("text", "sample 0 is a str; expected a Sample, or a mapping"),
        ({"image": None}, "expected image, caption and any of"),
        (_told(0) | {"mask": 1}, "expected image, caption and any of"),
        (_told(0) | {"image": np.zeros((20, 24))}, r"image is float64 \(20, 24\)"),
        (_told(0) | {"nouns": ["cat"]}, "1 nouns are given for 2 subjects"),
    ],
)
def test_samples_of_a_wrong_form_are_refused(tmp_path, one, told):
    with pytest.raises(ValueError, match=told):
        pack_samples(iter([one]), tmp_path)


def test_two_samples_of_one_key_and_keys_that_no_file_can_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two samples have the key 'own-1'"):
        pack_samples(iter([_told(1), _told(1)]), tmp_path / "a")
    with pytest.raises(ValueError, match=r"key 'a\.b' cannot name a sample"):
        pack_samples(iter([_told(1) | {"key": "a.b"}]), tmp_path / "b")


def test_functions_are_found_and_called_by_what_they_take(monkeypatch, tmp_path):
    (tmp_path / "my_own_source.py").write_text("def some(split, n=1):\n    return [split] * n\nvalue = 3\n")
    monkeypatch.chdir(tmp_path)
    assert call(load_function("my_own_source:some"), "validation", {"n": 2}) == ["validation"] * 2
    for name, told in {
        "some": "expected package.module:function",
        "none_such:some": "cannot be imported",
        "my_own_source:other": "cannot be imported",
        "my_own_source:value": "is a int; expected a function",
    }.items():
        with pytest.raises(ValueError, match=told):
            load_function(name)
    with pytest.raises(ValueError, match="cannot be called with m, split"):
        call(load_function("my_own_source:some"), "train", {"m": 2})
