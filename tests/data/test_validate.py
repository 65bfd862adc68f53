"""Validation names shard, key and problem, whatever is wrong."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moa_train.data.packing import write_shards
from moa_train.data.schema import encode_sample
from moa_train.data.shards import ShardIndex, ShardReader
from moa_train.data.validate import find_problems


def _problems(folder, **options):
    return list(find_problems(folder, **options))


def _rewrite(path, change):
    """Write a tar again with its (name, content) members changed."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(packed):
    return Path(packed.storage.location)


def _first_key(folder, shard="train-000001.tar"):
    with tarfile.open(folder / shard) as tar:
        return tar.getnames()[0].split(".")[0]


def test_sound_shards_have_no_problem(folder):
    done = []
    assert _problems(folder, max_subjects=2, on_shard=done.append) == []
    assert done == list(range(1, len(list(folder.glob("*.tar"))) + 1))


def test_too_many_subjects_are_named_where_a_limit_is_given(folder):
    assert len(_problems(folder, max_subjects=1)) == 23


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda s, m: replace(s, labels=np.where(s.labels == 1, 0, s.labels)), "segment 1: its mask is empty"),
        (lambda s, m: replace(s, caption=s.caption.upper()), "segment 1: the noun 'man' is not at its offsets"),
        (lambda s, m: replace(s, caption="a man"), "segment 2: offsets 12..17 lie outside the caption 'a man'"),
    ],
)
def test_contents_that_break_the_schema(tmp_path, samples, spoil, told):
    samples[7] = spoil(samples[7], None)
    folder = Path(write_shards(samples, tmp_path, "s", shard_bytes=20_000).storage.location)
    problems = _problems(folder)
    assert any(problem.startswith("s-0") and " 00007 " in problem and told in problem for problem in problems)
    assert all(" 00007 " in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: [(n, b"broken" if i == 0 else c) for i, (n, c) in enumerate(m)], "{key} cannot read {key}.png"),
        (lambda m: [(n, b"broken" if i == 2 else c) for i, (n, c) in enumerate(m)], "{key} cannot read {key}.json"),
        (lambda m: m[1:], "{key} has 0 pictures"),
        (lambda m: [m[0], *m[2:]], "{key} member {key}.seg.png is missing"),
        (lambda m: m + m[:3], "{key} duplicate key"),
        (lambda m: m[3:], "- holds"),
    ],
    ids=["picture", "json", "no picture", "no mask", "duplicate", "fewer"],
)
def test_damaged_members(folder, change, told):
    key = _first_key(folder)
    _rewrite(folder / "train-000001.tar", change)
    problems = _problems(folder)
    assert any(problem.startswith(f"train-000001.tar {told.format(key=key)}") for problem in problems), problems
    assert all(problem.startswith("train-000001.tar ") for problem in problems)


def test_a_mask_of_another_size(folder, make_sample):
    key = _first_key(folder)
    other = encode_sample(make_sample(0, 20))["seg.png"]
    _rewrite(folder / "train-000001.tar", lambda m: [m[0], (m[1][0], other), *m[2:]])
    assert any(
        f"train-000001.tar {key} sizes disagree: picture 16 x 16, label map 20 x 20" in p for p in _problems(folder)
    )


@pytest.mark.parametrize("kept", [0, 700, 1536, 9000])
def test_a_truncated_tar(folder, kept):
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:kept])
    problems = _problems(folder)
    assert any(p.startswith("train-000001.tar ") and "truncated" in p for p in problems), problems


def test_a_tar_cut_between_two_members(folder):
    path = folder / "train-000001.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:cut])
    problems = _problems(folder)
    assert any("end-of-archive marker is missing" in problem for problem in problems)
    assert any("seg.png is missing" in problem for problem in problems)


@pytest.mark.parametrize("bit", [0, 100, 124, 148, 156])
def test_one_flipped_bit_in_a_header(folder, bit):
    path = folder / "train-000001.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    content = bytearray(path.read_bytes())
    content[offset + bit] ^= 1
    path.write_bytes(content)
    assert any(p.startswith(f"train-000001.tar - damaged tar header at byte {offset}") for p in _problems(folder))


def test_one_flipped_bit_anywhere_is_seen_by_the_hash(folder):
    path = folder / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the padding, which no reader looks at
    path.write_bytes(content)
    assert _problems(folder) == ["train-000001.tar - its SHA-256 is not the index's: the content was changed"]


def test_missing_and_unlisted_shards(folder):
    (folder / "train-000001.tar").rename(folder / "other.tar")
    assert sorted(_problems(folder)) == [
        "other.tar - not in the index: nothing reads it",
        "train-000001.tar - missing",
    ]


def test_offsets_unlike_the_shard(folder):
    index = ShardIndex.load(folder)
    index.members = np.array(index.members)
    index.members["json_offset"][2] += 1
    index.save()
    problems = _problems(folder)
    key = ShardReader(index).read(3)[0]
    assert len(problems) == 2
    assert problems[0] == f"train-000000.tar {_key_of(folder, 2)} the index has other member offsets"
    assert problems[1] == "train-000000.tar - 1 samples of the index are not where it says"
    assert key not in problems[0]


def _key_of(folder, number):
    with tarfile.open(folder / "train-000000.tar") as tar:
        return tar.getnames()[3 * number].split(".")[0]
