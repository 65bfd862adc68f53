"""Shards are plain WebDataset tars, any sample of them is one seek away, and what does not fit is refused by name."""

import gc
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from moa_train.data.packing import write_shards
from moa_train.data.remote import Patience
from moa_train.data.schema import BadSample, decode_sample
from moa_train.data.shards import ShardIndex, ShardReader
from moa_train.data.storage import Cache


def _shards(index):
    return sorted(Path(index.storage.location).glob("*.tar"))


def _names(index):
    names = []
    for shard in _shards(index):
        with tarfile.open(shard) as tar:
            names += tar.getnames()
    return names


def _same(a, b):
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert (a.key, a.caption, a.segments, a.source) == (b.key, b.caption, b.segments, b.source)


def test_tarfile_reads_complete_samples_in_the_order_of_the_schema(packed, samples):
    names = _names(packed)
    keys = [name.split(".")[0] for name in names[::3]]
    assert sorted(keys) == [sample.key for sample in samples]
    assert names == [f"{key}.{suffix}" for key in keys for suffix in ("png", "seg.png", "json")]
    assert len(_shards(packed)) > 2


def test_plain_webdataset_reads_every_sample(packed, samples):
    urls = [str(shard) for shard in _shards(packed)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves files to the garbage collector
        read = {raw["__key__"]: raw for raw in wds.WebDataset(urls, shardshuffle=False)}
        gc.collect()
    assert len(read) == len(samples)
    for sample in samples:
        members = {suffix: content for suffix, content in read[sample.key].items() if isinstance(content, bytes)}
        _same(decode_sample(sample.key, members), sample)


def test_any_sample_is_read_by_number(packed, samples):
    reader = ShardReader(ShardIndex.load(packed.storage.location))
    by_key = {sample.key: sample for sample in samples}
    read = [reader[number] for number in reversed(range(len(reader)))]
    for sample in read:
        _same(sample, by_key[sample.key])
    assert len({sample.key for sample in read}) == len(samples)
    stored = [name.removesuffix(".json") for name in _names(packed) if name.endswith(".json")]
    assert [sample.key for sample in reversed(read)] == stored


def test_the_seed_decides_the_order_in_the_shards(tmp_path, samples):
    orders = []
    for run, seed in enumerate((0, 0, 1)):
        reader = ShardReader(write_shards(samples, tmp_path / str(run), "train", seed=seed))
        orders.append([reader[i].key for i in range(len(reader))])
    assert orders[0] == orders[1] != orders[2] != sorted(orders[2])


class _Breaks(list):
    """A source that fails at the n-th sample that is asked for."""

    def __init__(self, samples, after):
        super().__init__(samples)
        self.after = after

    def __getitem__(self, number):
        self.after -= 1
        if self.after < 0:
            raise RuntimeError("interrupted")
        return super().__getitem__(number)


def test_an_interrupted_packing_goes_on_to_the_same_bytes(tmp_path, samples):
    whole = write_shards(samples, tmp_path / "whole", "train", shard_bytes=20_000)
    for after in (8, 11):
        with pytest.raises(RuntimeError, match="interrupted"):
            write_shards(_Breaks(samples, after), tmp_path / "parts", "train", shard_bytes=20_000)
        assert not (tmp_path / "parts" / "train" / "index.json").exists()
        (tmp_path / "parts" / "train" / ".train-000003.tar.k1ll3d").touch()  # what SIGKILL leaves
    left = _Breaks(samples, 23 - 5)  # at least one shard of five samples is not made again
    parts = write_shards(left, tmp_path / "parts", "train", shard_bytes=20_000)
    assert parts.hash == whole.hash
    assert [p.read_bytes() for p in _shards(parts)] == [p.read_bytes() for p in _shards(whole)]
    names = {path.name for path in (tmp_path / "parts" / "train").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole" / "train").iterdir()}


def test_worker_processes_make_the_same_bytes(tmp_path, samples, packed):
    index = write_shards(samples, tmp_path / "workers", "train", shard_bytes=20_000, workers=2)
    assert index.hash == packed.hash


def test_samples_that_a_source_leaves_out_are_not_stored(tmp_path, samples):
    source = [sample if i % 2 else None for i, sample in enumerate(samples)]
    index = write_shards(source, tmp_path, "odd", shard_bytes=20_000)
    assert {ShardReader(index)[i].key for i in range(len(index))} == {s.key for s in samples[1::2]}
    with pytest.raises(ValueError, match="all 2 were left out"):
        write_shards([None, None], tmp_path, "none")


def test_a_complete_set_is_kept_and_other_settings_are_refused(tmp_path, samples, packed):
    done = []
    assert write_shards(samples, tmp_path, "train", shard_bytes=20_000, on_sample=done.append).hash == packed.hash
    assert done == [23]
    with pytest.raises(ValueError, match="seed 0 there, 1 asked for"):
        write_shards(samples, tmp_path, "train", shard_bytes=20_000, seed=1)


def test_the_index_tells_shards_totals_and_how_they_were_packed(tmp_path, samples):
    index = write_shards(samples, tmp_path, "train", shard_bytes=20_000, command="me", config={"size": 16})
    told = json.loads((tmp_path / "train" / "index.json").read_text())
    assert told["samples"] == 23 == sum(shard["count"] for shard in told["shards"])
    assert told["bytes"] == sum(path.stat().st_size for path in _shards(index))
    assert [shard["name"] for shard in told["shards"]] == [path.name for path in _shards(index)]
    assert told["packing"]["command"] == "me"
    assert told["packing"]["config"]["size"] == 16


def test_no_more_files_are_open_than_asked_for(packed):
    reader = ShardReader(packed, open_shards=2)
    for number in [*range(len(reader)), *reversed(range(len(reader)))]:
        reader[number]
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        opened = [link for link in links if str(link.readlink()).startswith(packed.storage.location)]
        assert 1 <= len(opened) <= 2
    reader.close()
    targets = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not any(target.startswith(packed.storage.location) for target in targets)


def test_a_reader_can_be_sent_to_a_worker(packed):
    reader = ShardReader(packed)
    first = reader[0]
    there = pickle.loads(pickle.dumps(reader))
    assert not there._files  # a descriptor means nothing in another process
    _same(there[0], first)


def test_members_of_another_sample_are_refused(packed):
    for field in ("json", "image", "seg"):
        members = np.array(packed.members)
        same_shard = np.flatnonzero(members["shard"] == 0)[:2]
        for what in ("offset", "size"):
            members[f"{field}_{what}"][same_shard[0]] = members[f"{field}_{what}"][same_shard[1]]
        index = ShardIndex(packed.storage, "train", packed.shards, members, {})
        with pytest.raises(BadSample, match=r"shard train-000000.tar, key \d{5}: mixed"):
            ShardReader(index).read(int(same_shard[0]))


def test_an_offset_without_a_header_is_refused(packed):
    members = np.array(packed.members)
    members["seg_offset"][3] += 512
    index = ShardIndex(packed.storage, "train", packed.shards, members, {})
    with pytest.raises(BadSample, match=r"train-000000.tar, sample 3: no tar header where the index says"):
        ShardReader(index).read(3)


def test_a_sample_whose_members_the_index_does_not_know_is_refused(packed):
    with pytest.raises(BadSample, match=r"shard \S+\.tar, sample 3: the index knows none of its members"):
        ShardReader(packed).read(3, ("latent",))


def test_a_truncated_shard_is_refused(packed):
    path = _shards(packed)[0]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BadSample, match=r"shard train-000000.tar, .*truncated"):
        ShardReader(packed)[3]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "index.json").unlink(), "there is no .*index.json"),
        (lambda folder: (folder / "index.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "train-members.npy").unlink(), "missing or not the one"),
        (lambda folder: (folder / "train-members.npy").write_bytes(b"x"), "missing or not the one"),
        (lambda folder: (folder / "index.json").write_text('{"schema_version": 99}'), "schema version 99, expected 1"),
    ],
)
def test_a_damaged_index_is_refused(packed, spoil, told):
    spoil(Path(packed.storage.location))
    with pytest.raises(ValueError, match=told):
        ShardIndex.load(packed.storage.location)


def test_the_folder_above_a_split_is_told_apart(packed):
    folder = Path(packed.storage.location)
    with pytest.raises(ValueError, match=f"did you mean {folder}"):
        ShardIndex.load(folder.parent)


def test_remote_shards_are_read_through_the_cache(packed, samples, tmp_path):
    url, cache = f"file://{packed.storage.location}", tmp_path / "cache"
    index = ShardIndex.load(url, cache)
    assert index.hash == packed.hash
    reader = ShardReader(index)
    for number in range(len(reader)):
        _same(reader[number], ShardReader(packed)[number])
    assert len(list(cache.glob("*.tar"))) == len(packed.shards)
    for path in _shards(packed):
        path.unlink()
    assert ShardReader(ShardIndex.load(url, cache))[0].caption == samples[0].caption


def test_a_remote_shard_of_another_hash_is_refused(packed, tmp_path):
    path = _shards(packed)[0]
    path.write_bytes(path.read_bytes() + b"x")
    cache = Cache.at(tmp_path / "cache", patience=Patience(tries=2, wait=0.01))
    with pytest.raises(ValueError, match="its index says"):
        ShardReader(ShardIndex.load(f"file://{packed.storage.location}", cache))[0]
    assert not list((tmp_path / "cache").glob("*.tar"))
