"""`moa-data fastcomposer`, `photos` and `pack` as a person calls them."""

import re
from pathlib import Path

import pytest
from PIL import Image

from fastcomposer_layout import layout, picture, write_tar
from moa_train.data.shards import ShardIndex, ShardReader

README = Path(__file__).parents[2] / "data" / "README.md"


def _keys(folder):
    reader = ShardReader(ShardIndex.load(folder))
    return sorted(reader[i].key for i in range(len(reader)))


def test_fastcomposer_converts_a_tar_and_tells_what_it_left_out(moa_data, tmp_path):
    pictures = {"00000": picture(0), "00001": picture(1, segments=[]), "00002": picture(2)}
    write_tar(layout(pictures, ["00000", "00001", "00009"], ["00002"]), tmp_path / "ffhq.tar", "ffhq_wild_files/")
    code, out, _ = moa_data("fastcomposer", "ffhq.tar", "out=data", "workers=2")
    assert code == 0
    assert (_keys("data/train"), _keys("data/validation")) == (["00000"], ["00002"])
    assert "data/train: 1 samples in 1 shards; 2 were left out" in out
    assert re.search(r"1 +left out +no person is marked", out)
    assert re.search(r"1 +left out +the \.jpg is missing", out)
    assert moa_data("validate", "data/train")[0] == 0
    assert moa_data("fastcomposer", "ffhq.tar", "out=kept", "no_person=keep")[0] == 0
    assert _keys("kept/train") == ["00000", "00001"]


def test_the_example_of_the_readme_runs(moa_data, tmp_path):
    text = README.read_text()
    (code,) = re.findall(r"```python\n# my_source\.py\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"^ *moa-data (pack source=my_source:samples .*)$", text, re.MULTILINE)
    (tmp_path / "my_source.py").write_text(code)
    (tmp_path / "animals").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / "animals" / f"{number}.jpg")
        mask = Image.new("L", (40, 30))
        mask.paste(255, (5, 5, 20, 20))
        mask.save(tmp_path / "animals" / f"{number}.png")
    assert moa_data(*command.split())[0] == 0
    reader = ShardReader(ShardIndex.load(tmp_path / "data" / "animals" / "train"))
    assert sorted(reader[i].key for i in range(3)) == ["0", "1", "2"]
    assert [(s.noun, s.bbox) for s in reader[0].segments] == [("dog", (5, 5, 20, 20))]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fastcomposer", "none", "out=x"), "none is neither a folder nor a tar file"),
        (("fastcomposer", ".", "out=x"), "lists no pictures"),
        (("fastcomposer", ".", "out=x", "no_person=drop"), "lists no pictures"),
        (("pack", "source=os:getcwd", "out=x"), "is a str; expected a Sample"),
        (("pack", "source=os", "out=x"), "expected package.module:function"),
        (("pack", "source=none_such:f", "out=x"), "cannot be imported"),
    ],
)
def test_mistakes_are_told_in_one_line(moa_data, arguments, told):
    code, _, err = moa_data(*arguments)
    assert code == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["fastcomposer", "pack", "photos"])
def test_help_teaches(moa_data, command):
    code, out, _ = moa_data(command, "--help")
    assert code == 0
    assert f"moa-data {command}" in out
    assert max(len(line) for line in out.splitlines()) <= 120
