"""A run resumed anywhere sees the samples it would have seen; what would change the order is refused."""

import itertools
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from moa_train.data.order import epoch_order
from moa_train.data.packing import write_shards
from moa_train.data.sources.toy_scenes import ToyScenes
from moa_train.training.datamodule import MoADataModule


class WordTokenizer:
    """One token a word; the interface of a CLIP tokenizer."""

    model_max_length = 24

    def __call__(self, text, padding=None, max_length=None, truncation=False, add_special_tokens=True):
        ids = [3 + sum(word.encode()) % 1000 for word in text.split()]
        ids = [1, *ids, 2] if add_special_tokens else ids
        return SimpleNamespace(input_ids=ids + [0] * ((max_length or 0) - len(ids)))


class Recorder(pl.LightningModule):
    """Notes what it is given; accumulation and resuming are Lightning's own, counters rescaled as MoAModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []
        self.colours: list[float] = []

    def training_step(self, batch, batch_idx):
        assert batch.pixels.is_floating_point()  # the loader gave bytes
        self.seen.append(batch.sample.tolist())
        self.colours.append(float(batch.subject_pixels.double().sum()))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.sample.tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint):
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counter in (progress["total"], progress["current"]):
            mid_hook = counter["completed"] < counter["processed"]
            counter.update(dict.fromkeys(("ready", "started", "processed"), done))
            counter["completed"] = done - 1 if mid_hook else done


class SaveEveryStep(Callback):
    """A checkpoint after each optimizer step, as a model checkpoint's hook would write it."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 22), ("validation", 5)):
        write_shards(ToyScenes(split, count, people=9, size=16), folder, split, shard_bytes=20_000)
    return folder


def _datamodule(data, **changes):
    settings = {"batch_size": 4, "max_subjects": 2, "window": 2, "num_workers": 0, "seed": 7, **changes}
    train = settings.pop("train", data / "train")
    return MoADataModule(
        train, data / "validation", tokenizer=WordTokenizer(), resolution=16, subject_size=8, **settings
    )


def _fit(datamodule, steps, ckpt=None, accumulate=1, callbacks=(), **options):
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        **{"limit_val_batches": 0, **options},
    )
    trainer.fit(module, datamodule, ckpt_path=ckpt)
    return module


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of 12 steps (5 global batches an epoch), and a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return _fit(_datamodule(data), 12, callbacks=[SaveEveryStep(folder)]), folder


def test_a_run_sees_the_epochs_in_order(whole, data):
    counts = _datamodule(data)._train_sets().counts[0]
    expected = []
    for epoch in range(3):
        samples = epoch_order(counts, 7, epoch, 2).tolist()
        expected += [samples[k : k + 4] for k in range(0, 20, 4)]
    assert whole[0].seen == expected[:12]
    assert len(counts) > 2


@pytest.mark.parametrize("step", [1, 4, 5, 6, 11])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_after_any_step_sees_exactly_the_rest(whole, data, step, workers):
    run, folder = whole
    resumed = _fit(_datamodule(data, num_workers=workers), 12, ckpt=folder / f"{step}.ckpt")
    assert resumed.seen == run.seen[step:]
    assert resumed.colours == run.colours[step:]


def test_a_resume_with_other_accumulation_sees_the_same_global_batches(whole, data, tmp_path):
    run, folder = whole
    resumed = _fit(
        _datamodule(data, batch_size=2),
        9,
        ckpt=folder / "3.ckpt",
        accumulate=2,
        callbacks=[SaveEveryStep(tmp_path)],
    )
    assert [a + b for a, b in zip(resumed.seen[::2], resumed.seen[1::2], strict=True)] == run.seen[3:9]
    again = _fit(_datamodule(data), 12, ckpt=tmp_path / "7.ckpt")
    assert again.seen == run.seen[7:]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 2}, "global_batch was 4, is 2"),
        ({"seed": 8}, "seed was 7, is 8"),
        ({"window": 3}, "window was 2, is 3"),
        ({"stream": "sequential", "shard_samples": 5}, "stream was exact, is sequential"),
    ],
)
def test_a_resume_with_another_order_is_refused(whole, data, changes, told):
    with pytest.raises(ValueError, match=told):
        _fit(_datamodule(data, **changes), 12, ckpt=whole[1] / "3.ckpt")


def test_a_resume_on_other_data_is_refused(whole, data, tmp_path):
    write_shards(ToyScenes("train", 22, people=9, size=16, seed=1), tmp_path, "train", shard_bytes=20_000)
    datamodule = _datamodule(data)
    datamodule.train = [tmp_path / "train"]
    with pytest.raises(ValueError, match="index_hash was"):
        _fit(datamodule, 12, ckpt=whole[1] / "3.ckpt")


def test_the_state_counts_what_was_processed_not_what_workers_prepared(data, tmp_path):
    _fit(_datamodule(data, num_workers=2, prefetch_factor=4), 7, callbacks=[SaveEveryStep(tmp_path)])
    for step in (1, 5, 7):
        state = torch.load(tmp_path / f"{step}.ckpt")["MoADataModule"]
        assert (state["epoch"], state["samples_done"]) == (step // 5, step % 5 * 4)


def test_validation_is_the_whole_split_in_order_each_time(data):
    module = _fit(_datamodule(data), 4, limit_val_batches=1.0, val_check_interval=2)
    assert module.validated == [[0, 1, 2, 3], [4]] * 2


def test_validation_batches_are_equal_each_time(data):
    datamodule = _datamodule(data, unconditional_probability=1.0)
    first, second = (list(datamodule.val_dataloader()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.subject_pixels, b.subject_pixels)
        assert a.subject_present.any()


def test_sequential_training_runs_and_resumes_at_a_shard(data, tmp_path, caplog):
    settings = {"stream": "sequential", "shard_samples": 5, "shuffle_buffer": 4}
    _fit(_datamodule(data, **settings), 4, callbacks=[SaveEveryStep(tmp_path)])
    resumed = _fit(_datamodule(data, **settings), 6, ckpt=tmp_path / "4.ckpt")
    assert len(resumed.seen) == 2
    assert "resuming at shard 4 of the sequence (16 samples were processed" in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stream": "other"}, "stream is 'other'"),
        ({"stream": "sequential"}, "needs shard_samples"),
        ({"on_bad_sample": "drop"}, "on_bad_sample is 'drop'"),
        ({"crop": "left"}, "crop is 'left'"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction is 2.0"),
        ({"fetch_tries": 0}, "fetch_tries is 0"),
        ({"stream": "sequential", "shard_samples": 5, "weights": [1.0]}, "weights needs stream=exact"),
    ],
)
def test_wrong_settings_are_refused_at_once(data, changes, told):
    with pytest.raises(ValueError, match=told):
        _datamodule(data, **changes)


def _attached(data, ranks=1, rank=0, accumulate=1, step=0, **changes):
    """A data module as a trainer of that rank holds it; the global batch is 8."""
    datamodule = _datamodule(data, batch_size=8 // (ranks * accumulate), **changes)
    datamodule.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=ranks,
        accumulate_grad_batches=accumulate,
        global_step=step,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return datamodule


def _global_batches(data, ranks, accumulate, count, state=None, **changes):
    """The addresses of global batches, put together from what every rank is about to read."""
    shares = []
    for rank in range(ranks):
        datamodule = _attached(data, ranks, rank, accumulate, **changes)
        if state is not None:
            datamodule.load_state_dict(state)
        micro = itertools.islice(datamodule.train_dataloader().batch_sampler, count * accumulate)
        shares.append(list(itertools.chain(*micro)))
    merged = [address for together in zip(*shares, strict=True) for address in together]
    return [merged[i : i + 8] for i in range(0, len(merged), 8)]


WAYS = [
    {"ranks": ranks, "accumulate": accumulate, "num_workers": workers}
    for ranks in (1, 2, 4)
    for accumulate in (1, 2)
    for workers in (0, 2)
]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_stopped_anywhere_goes_on_in_any_other_way_with_exactly_the_next_sample(data, mixed):
    changes = {"train": [data / "train", data / "validation"], "weights": [1, 2]} if mixed else {}
    whole = _global_batches(data, 1, 1, 9, **changes)
    for way in WAYS:
        assert _global_batches(data, count=9, **way, **changes) == whole
    for step in range(1, 8):
        states = [_attached(data, step=step, **way, **changes).state_dict() for way in WAYS]
        assert all(state == states[0] for state in states)
        for way in WAYS:
            assert _global_batches(data, count=9 - step, state=states[0], **way, **changes) == whole[step:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_trains_and_resumes_with_exactly_the_rest(data, tmp_path, workers):
    changes = {"train": [data / "train", data / "validation"], "weights": [1, 2], "num_workers": workers}
    whole = _fit(_datamodule(data, **changes), 9, callbacks=[SaveEveryStep(tmp_path)])
    resumed = _fit(_datamodule(data, **changes), 9, ckpt=tmp_path / "4.ckpt")
    assert resumed.seen == whole.seen[4:]
    assert resumed.colours == whole.colours[4:]
    drawn = [sample >= 22 for batch in whole.seen[:6] for sample in batch]
    assert sum(drawn) == pytest.approx(16, abs=2)  # two thirds of 24 samples come from the second set
    with pytest.raises(ValueError, match=r"index_hash was .*data\.weights is not what the run began with"):
        _fit(_datamodule(data, **{**changes, "weights": [1, 1]}), 9, ckpt=tmp_path / "4.ckpt")


@pytest.fixture
def spoiled(tmp_path):
    """A set whose samples 0 and 6 cannot be read."""
    index = write_shards(ToyScenes("train", 22, people=9, size=16), tmp_path, "train", shard_bytes=20_000)
    for number in (0, 6):
        row = index.members[number]
        path = tmp_path / "train" / index.shards[row["shard"]].name
        content = bytearray(path.read_bytes())
        content[int(row["image_offset"]) - 512 + 150] ^= 1  # in the checksum of the picture's header
        path.write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_counted_and_logged_once_in_training(spoiled, caplog, workers):
    settings = {"train": spoiled / "train", "num_workers": workers, "on_bad_sample": "skip", "max_bad_fraction": 0.5}
    datamodule = _datamodule(spoiled, **settings)
    seen = _fit(datamodule, 12).seen
    order = datamodule._order()
    expected = [order.epoch(epoch)[4 * k : 4 * k + 4, 1].tolist() for epoch in range(3) for k in range(5)][:12]
    assert seen == [[{0: 1, 6: 7}.get(sample, sample) for sample in batch] for batch in expected]
    met = sum(sample in (0, 6) for batch in expected for sample in batch)
    logged = [record.message for record in caplog.records if record.name.startswith("moa_train")]
    assert [sum(f"sample {n}:" in line for line in logged) for n in (0, 6)] == [1, 1]
    assert logged[-1] == f"{met} of {48 + met} samples read were bad and skipped"


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_end_training(spoiled, workers):
    settings = {"train": spoiled / "train", "num_workers": workers, "on_bad_sample": "skip", "max_bad_fraction": 0.01}
    with pytest.raises(ValueError, match=r"^\d+ of 1\d\d samples were bad, max_bad_fraction is 0.01: [^\n]*$"):
        _fit(_datamodule(spoiled, **settings), 40)


def test_a_cache_smaller_than_what_is_in_use_is_refused(data):
    settings = {"train": f"file://{data}/train", "window": 2, "cache_gigabytes": 0.00001}
    with pytest.raises(ValueError, match=r"cache_gigabytes is 1e-05, but data.window=2 keeps up to .* GB"):
        _fit(_datamodule(data, **settings), 1)


def test_training_from_a_url_goes_through_the_bounded_cache(whole, data, tmp_path):
    settings = {"train": f"file://{data}/train", "cache": tmp_path, "cache_gigabytes": 0.00007}
    assert _fit(_datamodule(data, **settings), 12).seen == whole[0].seen
    assert 0 < len(list(tmp_path.glob("*.tar"))) < len(list((data / "train").glob("*.tar")))
