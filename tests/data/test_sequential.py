"""The sequential pipeline: every shard once an epoch, shared by ranks and workers, without end."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from moa_train.data.guard import Notes
from moa_train.data.schema import BadSample
from moa_train.data.sequential import EndlessShards, expand_shards, resume_shard, sequential_batches
from moa_train.data.stages import Pipeline

URLS = [f"{i}.tar" for i in range(5)]


def _shards(count, **options):
    return [(s["epoch"], s["url"]) for s in itertools.islice(EndlessShards(URLS, seed=1, **options), count)]


def test_each_epoch_has_every_shard_once_in_another_order():
    epochs = [_shards(15)[5 * e : 5 * e + 5] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(number, url) for url in URLS]
    assert len({tuple(url for _, url in epoch) for epoch in epochs}) > 1


def test_ranks_take_turns_and_a_start_skips_shards():
    whole = _shards(12)
    assert _shards(4, rank=1, world=3) == whole[1::3]
    assert _shards(5, start=7) == whole[7:]


@pytest.fixture
def batches(packed, tokenizer):
    def build(**options):
        settings = {"seed": 1, "notes": Notes(), "shuffle_buffer": 0, **options}
        pipeline = Pipeline(tokenizer, 16, 12, 2, unconditional_probability=0.0)
        return sequential_batches(expand_shards(packed.storage.location), pipeline, 4, **settings)

    return build


def _samples(pipeline, count):
    return [sample for batch in itertools.islice(pipeline, count) for sample in batch.sample.tolist()]


def test_an_epoch_shows_every_sample_once(batches):
    samples = _samples(batches(), 23)  # 23 batches of 4 are 4 epochs of 23
    for epoch in range(4):
        assert len(set(samples[23 * epoch : 23 * epoch + 23])) == 23
    assert _samples(batches(shuffle_buffer=10), 5) != samples[:20]


def test_ranks_read_different_shards(batches, packed):
    least, world = int(packed.counts.min()), len(packed.counts)
    shares = [_samples(batches(rank=rank, world=world), 1)[: min(least, 4)] for rank in range(world)]
    together = [sample for share in shares for sample in share]
    assert len(set(together)) == len(together) >= world


def test_a_samples_numbers_do_not_depend_on_the_worker(batches):
    rows = {}
    for workers in (0, 2):
        loader = DataLoader(batches(), batch_size=None, num_workers=workers)
        seen = {}
        for batch in itertools.islice(loader, 5):
            for i, sample in enumerate(batch.sample.tolist()):
                seen.setdefault(sample, (batch.key[i], batch.subject_pixels[i]))
        rows[workers] = seen
    both = set(rows[0]) & set(rows[2])
    assert len(both) > 5
    for sample in both:
        assert all(torch.equal(a, b) for a, b in zip(rows[0][sample], rows[2][sample], strict=True))


def test_the_next_epoch_draws_other_numbers(batches):
    keys = [key for batch in itertools.islice(batches(), 12) for key in batch.key.tolist()]
    assert len(set(keys[:46])) == 46


def _truncate(packed):
    path = Path(packed.storage.location) / packed.shards[1].name
    path.write_bytes(path.read_bytes()[:2000])


def test_a_bad_shard_stops_the_run_or_is_skipped(batches, packed):
    _truncate(packed)
    with pytest.raises(ValueError, match="on_bad_sample=skip goes on"):
        _samples(batches(), 23)
    notes = Notes("skip")
    left = 23 - packed.shards[1].count
    assert len(set(_samples(batches(notes=notes), 23))) == left
    assert notes.bad
    assert notes.read > 4 * left


def test_a_bad_sample_is_named(batches, packed, monkeypatch):
    monkeypatch.setattr("moa_train.data.stream.check_sample", lambda sample: ["nobody is here"])
    with pytest.raises(BadSample, match=r"shard .*train-00000\d.tar: key \d{5}: nobody is here"):
        _samples(batches(), 1)


def test_a_resume_counts_shards_and_says_so(caplog):
    assert resume_shard(0, 8, 100) == 0
    assert not caplog.records
    assert resume_shard(30, 8, 100) == 3
    assert "resuming at shard 3 of the sequence (240 samples were processed, about 100 a shard)" in caplog.text


def test_patterns_are_expanded(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    both = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert expand_shards(str(tmp_path)) == both
    assert expand_shards(str(tmp_path / "*.tar")) == both
    assert expand_shards("http://host/x-{000..002}.tar") == [f"http://host/x-00{i}.tar" for i in range(3)]
    assert expand_shards("pipe:cat a.tar") == ["pipe:cat a.tar"]
    with pytest.raises(ValueError, match="no shard matches"):
        expand_shards(str(tmp_path / "*.zip"))
