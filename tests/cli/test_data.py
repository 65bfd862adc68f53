"""`moa-data` as a person calls it."""

import re

import numpy as np
import pytest
from PIL import Image

from moa_train.data.shards import ShardIndex, ShardReader

TOY = ("toy", "out=world", "train=6", "validation=3", "test=2", "size=32", "train_people=5", "held_out_people=4")


def _described(folder):
    reader = ShardReader(ShardIndex.load(folder))
    people = [person for i in range(len(reader)) for person in reader[i].source["identities"]]
    return {tuple(value for name, value in person.items() if name != "number") for person in people}


def test_toy_writes_three_splits_of_different_people(moa_data, tmp_path):
    code, out, _ = moa_data(*TOY)
    assert code == 0
    assert "world/train: 6 samples in 1 shards" in out
    assert [len(ShardIndex.load(tmp_path / "world" / s)) for s in ("train", "validation", "test")] == [6, 3, 2]
    train, validation, test = (_described(tmp_path / "world" / s) for s in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert (tmp_path / "world").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["world"]  # nothing of Hydra's is left behind


def test_toy_twice_changes_nothing_and_other_settings_are_refused(moa_data, tmp_path):
    moa_data(*TOY)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert moa_data(*TOY)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    code, _, err = moa_data(*TOY, "seed=1")
    assert code == 2
    assert "seed 0 there, 1 asked for" in err


def test_without_a_terminal_progress_is_told_in_lines(moa_data, monkeypatch):
    monkeypatch.setattr("moa_train.cli.data.common._SECONDS_A_LINE", 0.0)
    _, _, err = moa_data(*TOY)
    told = [
        re.fullmatch(r"train: 6 samples: (\d) done, [\d.]+ a second, 0:00:0\d left", line) for line in err.splitlines()
    ]
    assert [int(line[1]) for line in told if line] == [1, 2, 3, 4, 5, 6]


def test_validate_says_that_all_is_well_or_what_is_not(moa_data, tmp_path):
    moa_data(*TOY)
    assert moa_data("validate", "world/train") == (0, "world/train: 6 samples in 1 shards, no problem\n", "")
    shard = tmp_path / "world" / "train" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    code, out, err = moa_data("validate", "world/train")
    assert code == 1
    assert "train-000000.tar" in out
    assert "truncated" in out
    assert "problems in world/train" in err
    assert moa_data("validate", "world")[0] == 2


def test_show_draws_a_sheet(moa_data, tmp_path):
    moa_data(*TOY)
    code, out, _ = moa_data("show", "world/train", "out=pictures/a.png", "count=4", "columns=2", "tile=64")
    assert code == 0
    assert "4 of 6 samples" in out
    with Image.open(tmp_path / "pictures" / "a.png") as sheet:
        assert sheet.width == 2 * 64 + 3 * 8
    code, _, err = moa_data("show", "world/train", "start=6")
    assert code == 2
    assert "no sample of the 6" in err


def test_photos_go_with_their_masks_into_two_splits(moa_data, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.fromarray(np.full((40, 30, 3), 60 * i, np.uint8)).save(tmp_path / "in" / f"{i}.png")
        mask = np.zeros((40, 30), np.uint8)
        mask[10:30, 5:25] = 255
        Image.fromarray(mask).save(tmp_path / "in" / f"{i}.mask.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    arguments = (
        "photos",
        "in",
        "out=mine",
        "validation=0.4",
        "noun=dog",
        "caption=a {noun} at home",
        "image_format=png",
    )
    code, _, _ = moa_data(*arguments)
    assert code == 0
    splits = [ShardReader(ShardIndex.load(tmp_path / "mine" / split)) for split in ("train", "validation")]
    stored = [reader[i] for reader in splits for i in range(len(reader))]
    assert sorted(sample.source["file"] for sample in stored) == [f"{i}.png" for i in range(4)]
    assert {sample.caption for sample in stored} == {"a dog at home"}
    assert moa_data("validate", "mine/train")[0] == 0


def test_photos_of_nobody_are_refused(moa_data, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (100, 100)).save(tmp_path / "in" / "plain.png")
    code, _, err = moa_data("photos", "in", "out=mine")
    assert code == 2
    assert "no sample is left" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("toi",), 'unknown command "toi": expected one of toy, photos, '),
        (("toy", "trian=3"), 'unknown setting trian; did you mean "train"?'),
        (("toy", "train=0", "validation=0", "test=0"), "there is nothing to draw"),
        (("toy", "subjects=[1,2,3]"), "expected fewest and most"),
        (("photos", "nowhere", "out=x"), "nowhere is not a folder"),
        (("photos", "nowhere"), "out is not given"),
        (("validate", "s3://bucket/train"), "s3://bucket/train is a URL"),
        (("show", "nowhere"), "there is no nowhere/index.json"),
    ],
)
def test_mistakes_are_told_in_one_line(moa_data, arguments, told):
    code, _, err = moa_data(*arguments)
    assert code == 2
    assert told.replace('"', "") in err.replace('"', "")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", [(), ("toy",), ("photos",), ("show",), ("validate",)])
def test_help_teaches(moa_data, command):
    code, out, _ = moa_data(*command, "--help")
    assert code == 0
    assert f"moa-data {' '.join(command)}".strip() in out
    assert max(len(line) for line in out.splitlines()) <= 120


def test_subjects_writes_each_subject_as_the_photo_that_generation_takes(moa_data, tmp_path):
    from moa_train.inference.subjects import photo_and_mask
    from moa_train.prompts import parse_prompt

    moa_data(*TOY, "subjects=[2,2]")
    code, out, _ = moa_data("subjects", "world/test", "out=people")
    assert code == 0
    reader = ShardReader(ShardIndex.load(tmp_path / "world" / "test"))
    samples = {reader[i].key: reader[i] for i in range(2)}
    told = dict(line.split("   ") for line in out.splitlines())
    assert {path.name for path in (tmp_path / "people").iterdir()} == {name.removeprefix("people/") for name in told}
    assert len(told) == 4
    seen = set()
    for name, prompt in told.items():
        sample = samples[name.removeprefix("people/").split("-")[0]]
        image, mask = photo_and_mask(tmp_path / name)
        assert np.array_equal(image, sample.image)
        (segment,) = [s for s in sample.segments if np.array_equal(sample.labels == s.id, mask)]
        seen.add((sample.key, segment.id))
        parsed = parse_prompt(prompt)
        assert parsed.text == sample.caption
        assert parsed.spans == ((segment.start, segment.end),)
    assert len(seen) == 4
    code, _, err = moa_data("subjects", "world/test", "start=2")
    assert code == 2
    assert "no sample of the 2" in err
