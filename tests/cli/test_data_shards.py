"""`moa-data validate repair=`, `index` and `stats` as a person calls them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from moa_train.data.schema import Sample, Segment, encode_sample
from moa_train.data.shards import ShardIndex, ShardReader


def _sample(number, noun="dog", area=36, offset=2):
    labels = np.zeros((12, 12), np.uint8)
    labels[2:8, 3:9] = 1
    segment = Segment(1, noun, offset, offset + 3, (3, 2, 9, 8), area)
    image = np.full((12, 12, 3), number, np.uint8)
    return Sample(f"k{number}", image, labels, "a dog at home", (segment,))


@pytest.fixture
def foreign(tmp_path):
    """Tars that another tool wrote: 0 sound, 1 of a wrong area, 2 of shifted offsets, 3 of an unknown noun, 4 sound."""
    folder = tmp_path / "foreign" / "train"
    folder.mkdir(parents=True)
    samples = [_sample(0), _sample(1, area=7), _sample(2, offset=4), _sample(3, noun="cat"), _sample(4)]
    for name, chosen in (("a.tar", samples[:3]), ("b-x.tar", samples[3:])):
        with tarfile.open(folder / name, "w") as tar:
            for sample in chosen:
                for suffix, content in encode_sample(sample).items():
                    info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                    info.size, info.mtime = len(content), 1.5  # a fraction: an extended header before each
                    tar.addfile(info, io.BytesIO(content))
    return folder


def _stored(folder):
    reader = ShardReader(ShardIndex.load(folder))
    return {reader[i].key: reader[i] for i in range(len(reader))}


def test_index_names_what_is_damaged_and_leaves_it_out_where_told(moa_data, foreign):
    code, out, err = moa_data("index", "foreign/train")
    assert code == 1
    assert [line.split()[:2] for line in out.splitlines()] == [["a.tar", "k1"], ["a.tar", "k2"], ["b-x.tar", "k3"]]
    assert "3 problems" in err
    assert not (foreign / "index.json").exists()
    assert moa_data("index", "foreign/train", "leave_out=true", "split=mine")[0] == 0
    assert set(_stored(foreign)) == {"k0", "k4"}
    assert moa_data("validate", "foreign/train")[:2] == (0, "foreign/train: 2 samples in 2 shards, no problem\n")
    code, _, err = moa_data("index", "foreign/train")
    assert code == 2
    assert "overwrite=true" in err


def test_repair_mends_what_is_certain_and_touches_nothing_else(moa_data, foreign, tmp_path):
    before = {path: path.read_bytes() for path in foreign.iterdir()}
    code, out, _ = moa_data("validate", "foreign/train", "repair=clean/train")
    assert code == 0
    assert "clean/train: 4 samples in 2 shards" in out
    assert {path: path.read_bytes() for path in foreign.iterdir()} == before
    stored = _stored(tmp_path / "clean" / "train")
    for number in (0, 1, 2, 4):
        assert stored.pop(f"k{number}").segments == _sample(number).segments
    assert stored == {}
    told = json.loads((tmp_path / "clean" / "train" / "report.json").read_text())
    assert [name["key"] for name in told["names"]] == ["a.tar k1", "a.tar k2", "b-x.tar k3"]
    assert (told["left_out"], told["remarked"]) == ({"damaged": 1}, {"mended": 2})
    assert moa_data("validate", "clean/train")[0] == 0
    assert moa_data("validate", "foreign/train", "repair=clean/train")[0] == 2


def test_stats_count_what_is_there(moa_data, foreign, tmp_path):
    moa_data("index", "foreign/train", "leave_out=true")
    code, out, _ = moa_data("stats", "foreign/train", "out=told")
    assert code == 0
    assert "dog 2" in out
    told = json.loads((tmp_path / "told" / "stats.json").read_text())
    assert (told["samples"], told["subjects"], told["nouns"]) == (2, {"1": 2}, {"dog": 2})
    assert told["shares"] == [0.25, 0.25]  # 36 of 144 pixels
    assert told["captions"]["words"]["50"] == 4
    assert told["captions"]["tokens"]["100"] == 6
    with Image.open(tmp_path / "told" / "stats.png") as plot:
        assert plot.width > 500
