"""The exact stream: the same samples in the same order on any ranks, accumulation and workers; a resume seeks."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from moa_train.data.guard import BadSampleGuard, Notes, ReportedRows, as_it_is
from moa_train.data.mixture import Mixture, MixtureReader
from moa_train.data.order import epoch_order, sample_key
from moa_train.data.packing import write_shards
from moa_train.data.schema import BadSample
from moa_train.data.shards import ShardReader
from moa_train.data.stages import Pipeline, collate
from moa_train.data.stream import (
    ExactStream,
    GlobalBatchSampler,
    StreamOrder,
    StreamState,
    ValidationSampler,
    refuse_changed_state,
)
from moa_train.symbols import Batch

COUNTS = np.array([5, 6, 5, 7])


def _order(global_batch=8, seed=3):
    return StreamOrder((COUNTS,), (23,), seed, 2, global_batch)


def _global_batches(count, ranks, accumulate, start=0, order=None):
    """The first global batches as the ranks see them together: sample i of a batch belongs to rank i mod W."""
    order = order or _order()
    samplers = [iter(GlobalBatchSampler(order, rank, ranks, accumulate, start)) for rank in range(ranks)]
    batches = []
    for _ in range(count):
        shares = [list(itertools.chain(*itertools.islice(sampler, accumulate))) for sampler in samplers]
        assert len({len(share) for share in shares}) == 1
        batches.append([address for together in zip(*shares, strict=True) for address in together])
    return batches


def test_global_batches_are_slices_of_the_epochs_order():
    expected = []
    for epoch in range(4):  # 23 samples: two batches of 8, 7 samples are left out on every rank
        samples = epoch_order(COUNTS, 3, epoch, 2).tolist()
        expected += [[(epoch, s) for s in samples[k : k + 8]] for k in (0, 8)]
    assert _global_batches(8, 1, 1) == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_accumulation_do_not_change_the_global_batches(ranks, accumulate):
    assert _global_batches(7, ranks, accumulate) == _global_batches(7, 1, 1)


@pytest.mark.parametrize("start", range(7))
def test_a_start_anywhere_gives_exactly_the_rest(start):
    whole = _global_batches(9, 1, 1)
    assert _global_batches(9 - start, 2, 2, start) == whole[start:]


def test_micro_batches_follow_each_other_in_the_order_of_the_rank():
    one = list(itertools.islice(GlobalBatchSampler(_order(), 1, 2, 1), 6))
    two = list(itertools.islice(GlobalBatchSampler(_order(), 1, 2, 2), 12))
    assert [len(micro) for micro in two] == [2] * 12
    assert list(itertools.chain(*one)) == list(itertools.chain(*two))


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="8 cannot be shared by 3 ranks x 1"):
        GlobalBatchSampler(_order(), 0, 3, 1)
    with pytest.raises(ValueError, match=r"global batch of 24 samples is larger than the data set \(23\)"):
        _order(24)
    with pytest.raises(ValueError, match="window is 0"):
        StreamOrder((COUNTS,), (23,), 0, 0, 8)


def test_every_rank_validates_equally_many_samples_in_stored_order():
    shares = [list(ValidationSampler(23, 4, rank, 2)) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4, 3]] * 2
    merged = [a for pair in zip(*(itertools.chain(*share) for share in shares), strict=True) for a in pair]
    assert merged == [(0, sample) for sample in range(22)]
    assert [len(ValidationSampler(23, 4, rank, 2)) for rank in range(2)] == [3, 3]
    with pytest.raises(ValueError, match="1 validation samples cannot be shared by 2 ranks"):
        ValidationSampler(1, 4, 0, 2)


@pytest.fixture
def stream(packed, tokenizer):
    pipeline = Pipeline(tokenizer, 16, 12, 2, unconditional_probability=0.3, augment_subject=True)
    return ExactStream(Mixture([packed]), pipeline, seed=3, notes=Notes(), open_shards=2)


def _batches(stream, packed, count, workers=0, ranks=1, accumulate=1, start=0):
    """The rows of the first `count` global batches, gathered from every rank, as one batch each."""
    order = StreamOrder((packed.counts,), (23,), 3, 2, 8)
    gathered: list[list[list]] = [[None] * 8 for _ in range(count)]
    for rank in range(ranks):
        sampler = itertools.islice(GlobalBatchSampler(order, rank, ranks, accumulate, start), count * accumulate)
        loader = DataLoader(stream, batch_sampler=list(sampler), num_workers=workers, collate_fn=list)
        for micro, rows in enumerate(loader):
            number, part = divmod(micro, accumulate)
            for i, row in enumerate(rows):
                gathered[number][rank + ranks * (part * len(rows) + i)] = row
    return [collate(rows) for rows in gathered]


def _assert_equal(a, b):
    for name in ("pixels", "subject_masks", "subject_pixels", "token_ids", "key", "sample"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.caption == b.caption


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_contents_do_not_depend_on_workers_ranks_or_accumulation(stream, packed, workers, ranks, accumulate):
    expected = _batches(stream, packed, 3)
    for a, b in zip(expected, _batches(stream, packed, 3, workers, ranks, accumulate), strict=True):
        _assert_equal(a, b)


def test_the_batch_tells_sample_and_key(stream, packed):
    for g, batch in enumerate(_batches(stream, packed, 3)):
        epoch, k = divmod(g, 2)
        samples = epoch_order(packed.counts, 3, epoch, 2)[8 * k : 8 * k + 8].tolist()
        assert batch.sample.tolist() == samples
        assert batch.key.tolist() == [sample_key(3, epoch, sample) for sample in samples]


def test_an_epoch_shows_a_sample_anew(stream):
    rows = [stream[(epoch, 0)] for epoch in range(8)]
    assert len({row["key"] for row in rows}) == 8
    assert len({tuple(row["subject_pixels"].flatten().tolist()) for row in rows}) > 4


def _spoil(packed, numbers):
    """Turn a header's checksum of these samples' pictures; returns their keys."""
    for number in numbers:
        row = packed.members[number]
        path = Path(packed.storage.location) / packed.shards[row["shard"]].name
        content = bytearray(path.read_bytes())
        content[int(row["image_offset"]) - 512 + 150] ^= 1
        path.write_bytes(content)


def test_a_bad_sample_stops_the_run_by_name(stream, packed):
    _spoil(packed, [4])
    with pytest.raises(BadSample, match=r"shard train-000000.tar, sample 4: .*moa-data validate"):
        stream[(0, 4)]


def _reported(stream, addresses, workers, max_fraction=0.5):
    """The samples of batches of two as the run takes them, and its guard."""
    rows = ReportedRows(stream, stream.notes)
    batches = [addresses[i : i + 2] for i in range(0, len(addresses), 2)]
    guard = BadSampleGuard(max_fraction)
    loader = DataLoader(rows, batch_sampler=batches, num_workers=workers, collate_fn=as_it_is)
    return [batch.sample.tolist() for batch in map(guard.take, loader)], guard


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_counted_and_each_logged_once(stream, packed, caplog, workers):
    _spoil(packed, [4, 5, 22])
    stream.notes = Notes("skip")
    addresses = [(0, 4), (0, 3), (0, 22), (0, 4), (1, 5), (1, 6)]
    samples, guard = _reported(stream, addresses, workers)
    assert samples == [[6, 3], [0, 6], [6, 6]]
    assert (guard.read, guard.bad) == (6 + 2 + 1 + 2 + 1, 2 + 1 + 2 + 1)
    assert [record.args[:2] for record in caplog.records] == [(2, 4), (2, 4), (5, 9)]
    assert [f"sample {n}:" in record.message for n, record in zip((4, 5, 22), caplog.records, strict=True)] == [
        True
    ] * 3
    assert stream[(0, 4)]["key"] == sample_key(3, 0, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_ends_a_run_leaves_a_worker_without_its_traceback(stream, packed, workers):
    _spoil(packed, [4])
    with pytest.raises(BadSample, match=r"^shard train-000000.tar, sample 4: [^\n]* on_bad_sample=skip goes on$"):
        _reported(stream, [(0, 4)], workers)


def test_a_mistake_of_ours_keeps_its_traceback(stream):
    stream.pipeline = None
    with pytest.raises(TypeError, match=r"NoneType|Pipeline"):
        _reported(stream, [(0, 4)], 0)


def test_a_wrong_caption_is_a_bad_sample(tmp_path, samples, tokenizer):
    from dataclasses import replace

    wrong = [replace(sample, caption="nobody here at all, ...") for sample in samples]
    index = write_shards(wrong, tmp_path, "wrong")
    with pytest.raises(BadSample, match=r"key .*not at its offsets"):
        ExactStream(Mixture([index]), Pipeline(tokenizer, 16, 12), 0, Notes())[(0, 0)]


def test_too_many_bad_samples_stop_the_run():
    guard, notes = BadSampleGuard(0.1), Notes("skip")
    batch = object.__new__(Batch)
    for read in range(1, 100):
        notes.refuse(BadSample(f"sample {read}")) if read % 5 == 0 else notes.sound()  # 20 %
        guard.take(notes.hand_over(lambda: batch))
    notes.refuse(BadSample("sample 100"))
    with pytest.raises(ValueError, match=r"20 of 100 samples were bad, max_bad_fraction is 0\.1.* sample 100"):
        guard.take(notes.hand_over(lambda: batch))


def test_as_many_bad_samples_as_allowed_go_on():
    guard, notes = BadSampleGuard(0.2), Notes("skip")
    batch = object.__new__(Batch)
    for read in range(1, 301):
        notes.refuse(BadSample(f"sample {read}")) if read % 5 == 0 else notes.sound()
        guard.take(notes.hand_over(lambda: batch))
    assert (guard.read, guard.bad) == (300, 60)


def test_a_set_without_any_sound_sample_ends_the_run(stream, packed):
    _spoil(packed, range(23))
    stream.notes = Notes("skip")
    with pytest.raises(ValueError, match="100 samples in a row are bad: run moa-data validate"):
        stream[(0, 0)]


def test_wrong_settings_for_bad_samples_are_refused():
    with pytest.raises(ValueError, match="on_bad_sample is 'drop'; expected one of raise, skip"):
        Notes("drop")
    with pytest.raises(ValueError, match=r"max_bad_fraction is 1\.5"):
        BadSampleGuard(1.5)


@pytest.fixture
def mixture(packed, tmp_path, make_sample):
    """The 23 samples, and 11 others of three times their weight."""
    other = write_shards([make_sample(i) for i in range(100, 111)], tmp_path / "other", "train", shard_bytes=8_000)
    return Mixture([packed, other], [1.0, 3.0])


def test_a_mixture_reads_each_set_by_its_own_numbers(mixture, packed):
    reader, other = MixtureReader(mixture), ShardReader(mixture.indexes[1])
    expected = [ShardReader(packed)[i].key for i in range(23)] + [other[i].key for i in range(11)]
    assert [reader[i].key for i in range(len(reader))] == expected
    assert [mixture.following(22, 1), mixture.following(33, 2), mixture.following(0, 5)] == [0, 24, 5]


def test_ranks_and_accumulation_do_not_change_the_global_batches_of_a_mixture(mixture):
    order = StreamOrder(mixture.counts, mixture.shares, 3, 2, 8)
    whole = _global_batches(10, 1, 1, order=order)
    for ranks, accumulate, start in ((2, 2, 0), (4, 1, 3), (1, 2, 7)):
        assert _global_batches(10 - start, ranks, accumulate, start, order) == whole[start:]


def test_the_hash_of_a_mixture_covers_sets_and_weights(mixture, packed):
    first, second = mixture.indexes
    others = [Mixture([first, second]), Mixture([second, first], [3.0, 1.0]), Mixture([first, first], [1, 3])]
    assert len({mixture.hash, *(other.hash for other in others)}) == 4
    assert Mixture([first, second], [2, 6]).hash == mixture.hash
    assert Mixture([packed]).hash == packed.hash


def test_the_state_is_the_position(packed):
    order = _order()
    for step in (0, 1, 2, 5, 1001):
        state = StreamState.at(step, order, packed.hash)
        assert (state.epoch, state.samples_done) == (step // 2, step % 2 * 8)
        assert state.step(order) == step


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("global_batch", 4, "global_batch was 8, is 4"),
        ("seed", 9, "seed was 3, is 9"),
        ("window", 1, "window was 2, is 1"),
        ("index_hash", "b", "index_hash was a, is b"),
        ("stream", "sequential", "stream was exact, is sequential"),
        ("version", 2, "version was 1, is 2"),
    ],
)
def test_a_changed_order_is_refused_by_name(name, value, told):
    stored = vars(StreamState.at(5, _order(), "a"))
    refuse_changed_state(stored, vars(StreamState.at(0, _order(), "a")))
    with pytest.raises(ValueError, match=told):
        refuse_changed_state(stored, {**stored, name: value})
