"""A loss or gradient that is not finite: all ranks act alike, nothing is changed by it, and it can be made again."""

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_train.cli.train import main
from moa_train.data.packing import TAR_FORMAT, add_sample
from moa_train.data.schema import LATENT_SUFFIX
from moa_train.data.shards import Shard, ShardIndex, ShardReader, index_shards
from moa_train.data.storage import sha256_of
from moa_train.data.views import ViewSettings, write_views
from moa_train.latents import LatentCodec
from moa_train.prior.load import load_prior, weights_fingerprint
from moa_train.training.callbacks.finite import FiniteSteps, NotFinite
from moa_train.training.callbacks.random_state import RandomState
from moa_train.training.callbacks.spikes import LEAST, LossWindow
from moa_train.training.metrics_csv import read_rows
from moa_train.training.module import MoAModule
from moa_train.training.nonfinite import MicroBatch, Record
from tiny import RESOLUTION, load

BAD_STEP = 3
BATCH = 4


def plant_infinity(stored: ShardIndex, folder: Path, number: int) -> None:
    """A copy of stored views in which the latents of one sample are infinite."""
    reader, shards, start = ShardReader(stored), [], 0
    folder.mkdir(parents=True)
    for shard in stored.shards:
        path = folder / shard.name
        with tarfile.open(path, "w", format=TAR_FORMAT) as tar:
            keys = set()
            for sample in range(start, start + shard.count):
                key, members = reader.read(sample)
                if sample == number:
                    record = np.load(io.BytesIO(members[LATENT_SUFFIX]))
                    record["latents"][:, 0] = np.inf
                    content = io.BytesIO()
                    np.save(content, record)
                    members = {**members, LATENT_SUFFIX: content.getvalue()}
                add_sample(tar, key, members, keys)
        shards.append(Shard(shard.name, shard.count, path.stat().st_size, sha256_of(path)))
        start += shard.count
    index_shards(folder, stored.split, tuple(shards), stored.packing)


@pytest.fixture(scope="module")
def sick(world, tmp_path_factory):
    """(folder of the sound views, the same with one infinite sample, that sample).

    With a global batch of four on two ranks, rank 1 alone meets it, at step 3.
    """
    folder = tmp_path_factory.mktemp("sick")
    prior = load_prior(str(world.folder / "prior"))
    identity = weights_fingerprint(prior.vae)
    codec = LatentCodec(prior.vae, identity)

    def encode(views):
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 127.5 - 1
        return codec.moments(pixels).half().numpy()

    source = ShardIndex.load(world.folder / "data" / "train")
    stored = write_views(source, folder / "sound", encode, ViewSettings(RESOLUTION), {"name": "", "weights": identity})
    seen = world.train(folder / "order", f"max_steps={BAD_STEP}")
    sample = int(read_rows(seen / "sample_log.csv")[-1]["samples"].split()[1])  # every second one is rank 1's
    plant_infinity(stored, folder / "sick", sample)
    return folder / "sound" / "train", folder / "sick", sample


def from_latents(folder, *more):
    settings = (
        "data.latents=true",
        "data.validation=null",
        f"data.train={folder}",
        "callbacks.checkpoint.every_n_steps=1",
    )
    return (*settings, "callbacks.checkpoint.keep=null", "optim.lr=1e-3", "loss.router.warmup=0.0", *more)


def same(one, other):
    return all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.slow
@pytest.mark.parametrize("fused", ["null", "true"], ids=["verdict before the step", "left out by the optimizer"])
def test_a_step_that_is_left_out_changes_no_weight_and_no_moment_and_is_counted(world, sick, tmp_path, fused):
    """The average takes the unchanged weights once more; data and schedule go on as if the step had been taken."""
    settings = from_latents(sick[1], "max_steps=5", "trainer.on_nonfinite=skip", f"optim.optimizer.fused={fused}")
    run = world.train(tmp_path / "run", *settings)
    before, after = (load(run, f"step={step:06d}.ckpt") for step in (BAD_STEP - 1, BAD_STEP))
    assert same(after["state_dict"], before["state_dict"])
    for number, state in before["optimizer_states"][0]["state"].items():
        assert same(after["optimizer_states"][0]["state"][number], state)
    assert after["global_step"] == BAD_STEP
    assert after["lr_schedulers"][0]["last_epoch"] == BAD_STEP
    assert after["MoADataModule"]["samples_done"] == BAD_STEP * BATCH
    updates = before["ema"]["updates"]
    kept = min(0.99, (1 + updates) / (10 + updates))
    for name, average in before["ema"]["average"].items():
        expected = kept * average + (1 - kept) * before["state_dict"][name]
        torch.testing.assert_close(after["ema"]["average"][name], expected)
    assert (after["finite"]["skipped"], after["finite"]["in_a_row"]) == (1, 1)
    last = load(run)
    assert not same(last["state_dict"], after["state_dict"])
    assert (last["global_step"], last["finite"]["skipped"], last["finite"]["in_a_row"]) == (5, 1, 0)
    assert [float(row["train/skipped"]) for row in read_rows(run / "metrics.csv") if row["train/skipped"]][-1] == 1


@pytest.mark.slow
def test_a_resume_after_a_step_that_was_left_out_is_the_straight_run(world, sick, tmp_path):
    """With the verdict that comes late: the checkpoint of that very step knows it already."""
    settings = from_latents(sick[1], "max_steps=5", "trainer.on_nonfinite=skip", "optim.optimizer.fused=true")
    run = world.train(tmp_path / "run", *settings)
    again = world.train(tmp_path / "again", f"ckpt='{run}/checkpoints/step=000003.ckpt'", *settings)
    assert load(run, "step=000003.ckpt")["finite"]["skipped"] == 1
    assert same(load(again)["state_dict"], load(run)["state_dict"])
    assert load(again)["finite"] == load(run)["finite"]


WEIGHTS_OF_EACH_RANK = """
import os, torch
from moa_train.training.callbacks.sample_log import SampleLog
folder, log = os.environ["WEIGHTS_OF_RANKS"], SampleLog.after_step
def log_and_keep(self, trainer, module, step):
    log(self, trainer, module, step)
    torch.save(module.state_dict(), f"{folder}/rank{trainer.global_rank}.pt")
SampleLog.after_step = log_and_keep
from moa_train.cli.train import main
main()
"""


def on_two_ranks(world, folder, *settings):
    """`moa-train` on two gloo ranks, none of whose steps is logged; a deadlock is a TimeoutExpired."""
    ranks = ("trainer.strategy=ddp", "trainer.devices=2", "data.batch_size=2", "trainer.log_every_n_steps=1000")
    script = folder / "train.py"  # a file, which Lightning can start a second time
    script.write_text(WEIGHTS_OF_EACH_RANK)
    command = [sys.executable, str(script), *world.overrides(*settings, *ranks)]
    environment = {**os.environ, "WEIGHTS_OF_RANKS": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_infinity_on_one_rank_stops_both_with_one_message_and_is_made_again(world, sick, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    done = on_two_ranks(world, tmp_path, *from_latents(sick[1], "max_steps=5", f"run_dir={run}"))
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("moa-train: error:")]
    assert len(told) == 2, done.stderr
    assert told[0] == told[1]
    assert f"the loss of step {BAD_STEP} is not finite: samples {sick[2]};" in told[0]
    assert load(run)["global_step"] == BAD_STEP - 1
    path = run / "nonfinite" / "step=000003.json"
    record = Record.read(path)
    assert [[micro.faulty() for micro in rank] for rank in record.ranks] == [[[]], [[sick[2]]]]
    code, out = replayed(monkeypatch, capfd, f"replay={path}")
    assert code == 1
    assert "rank 1, micro-batch 1 of 1" in out
    assert "rank 0" not in out  # its losses were finite
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()]
    losses = dict(zip(record.ranks[1][0].samples, record.ranks[1][0].losses, strict=True))
    assert [int(row[0]) for row in rows] == record.ranks[1][0].samples
    for row in rows:
        assert float(row[5]) == pytest.approx(losses[int(row[0])], rel=1e-3, nan_ok=True)
        assert ("<- not finite" in " ".join(row)) == (int(row[0]) == sick[2])
    row_of_it = record.ranks[1][0].samples.index(sick[2])
    assert f"not finite first: latents of batch, rows [{row_of_it}]" in out
    code, out = replayed(monkeypatch, capfd, f"replay={path}", f"data.train={sick[0]}")
    assert code == 0
    assert "every loss and gradient is finite here" in out


def replayed(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["moa-train", *arguments])
    capfd.readouterr()
    try:
        main()
    except SystemExit as end:
        return end.code, capfd.readouterr().out
    return 0, capfd.readouterr().out


@pytest.mark.slow
def test_ranks_that_skip_go_on_with_equal_weights_those_of_one_rank(world, sick, tmp_path):
    settings = from_latents(sick[1], "max_steps=5", "trainer.on_nonfinite=skip", "optim.lr=1e-4")
    done = on_two_ranks(world, tmp_path, *settings, f"run_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    alone = world.train(tmp_path / "one", *settings)
    assert load(alone)["finite"]["skipped"] == load(tmp_path / "two")["finite"]["skipped"] == 1
    for name, value in load(alone)["state_dict"].items():
        assert torch.allclose(first[name], value, atol=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [float("nan"), 1e30], ids=["NaN", "finite, but its norm overflows"])
def test_a_gradient_that_is_not_finite_is_left_out_although_the_loss_is(world, tmp_path, monkeypatch, gradient):
    begin = RandomState.on_train_batch_start

    def plant(self, trainer, module, batch, batch_idx):
        begin(self, trainer, module, batch, batch_idx)
        if trainer.global_step == 1:
            parameter = next(iter(module.trained_parameters().values()))
            handle = parameter.register_hook(lambda value: [handle.remove(), torch.full_like(value, gradient)][1])

    monkeypatch.setattr(RandomState, "on_train_batch_start", plant)
    run = tmp_path / "run"
    with pytest.raises(NotFinite, match="the gradient of step 2 is not finite"):
        world.train(run, "max_steps=3", "callbacks.checkpoint.every_n_steps=1")
    record = Record.read(run / "nonfinite" / "step=000002.json")
    assert record.what == "gradient"
    assert not np.isfinite(record.gradient_norm)
    assert np.isfinite(record.ranks[0][0].losses).all()
    assert load(run)["global_step"] == 1


@pytest.mark.slow
def test_a_gradient_that_alone_is_not_finite_is_made_again_with_its_function(world, tmp_path, monkeypatch, capfd):
    """The root of nothing, times nothing, in the loss of one sample: its derivative is 0 times infinity."""
    seen = world.train(tmp_path / "seen", f"max_steps={BAD_STEP}")
    sample = int(read_rows(seen / "sample_log.csv")[-1]["samples"].split()[2])
    losses = MoAModule.losses

    def with_a_root(self, batch, *inputs):
        terms, observations = losses(self, batch, *inputs)
        rows = (batch.sample == sample).nonzero()[:, 0]
        if not len(rows) or not torch.is_grad_enabled():
            return terms, observations
        root = (next(iter(self.trained_parameters().values())).sum() * 0.0).sqrt() * 0.0
        return replace(terms, masked=terms.masked.index_add(0, rows, root[None])), observations

    monkeypatch.setattr(MoAModule, "losses", with_a_root)
    run = tmp_path / "run"
    with pytest.raises(NotFinite, match=f"the gradient of step {BAD_STEP} is not finite"):
        world.train(run, "max_steps=5", "callbacks.checkpoint.every_n_steps=1")
    path = run / "nonfinite" / f"step={BAD_STEP:06d}.json"
    code, out = replayed(monkeypatch, capfd, f"replay={path}")
    assert code == 1
    assert f"weights of that step, step={BAD_STEP:06d}.safetensors" in out
    (sick,) = [line.split() for line in out.splitlines() if line.endswith("<- not finite")]
    assert int(sick[0]) == sample
    assert np.isfinite([float(value) for value in sick[2:6]]).all()
    assert sick[6] == "nan"
    assert "in the backward pass: Function 'SqrtBackward0' returned nan" in out
    replace(Record.read(path), weights=None).write(path)
    (run / "checkpoints" / f"step={BAD_STEP - 1:06d}.ckpt").unlink()
    code, out = replayed(monkeypatch, capfd, f"replay={path}")
    assert (code, f"weights of step {BAD_STEP - 2} instead of {BAD_STEP - 1}, " in out) == (1, True)
    assert "SqrtBackward0" in out
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    monkeypatch.setattr(sys, "argv", ["moa-train", f"replay={path}"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "no weights beside it and no checkpoint before it: give ckpt=PATH" in capfd.readouterr().err


def test_a_run_that_skips_stops_after_as_many_in_a_row_as_it_is_told(world, tmp_path):
    """A learning rate beyond reason: after the first step every loss is NaN."""
    settings = ("trainer.on_nonfinite=skip", "callbacks.finite.max_in_a_row=3", "optim.lr=1e30", "max_steps=9")
    with pytest.raises(NotFinite, match=r"the loss of step 4 is not finite.*3 steps in a row"):
        world.train(tmp_path / "run", *settings)
    written = sorted(path.name for path in (tmp_path / "run" / "nonfinite").iterdir())
    kinds = {2: ("json", "safetensors"), 3: ("json",), 4: ("json", "safetensors")}  # weights: the first, and the last
    assert written == [f"step=00000{step}.{kind}" for step, of_it in kinds.items() for kind in of_it]


@pytest.mark.parametrize("settings", [{"on_nonfinite": "go"}, {"max_in_a_row": 0}, {"spike_window": 0}])
def test_impossible_settings_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=r"on_nonfinite=go: expected stop or skip|expected at least 1"):
        FiniteSteps(tmp_path, **settings)


def test_a_record_is_read_as_it_was_written(tmp_path):
    micro = MicroBatch([3, 4], [2**62 + 1, 7], [float("nan"), 0.1])
    record = Record(9, "loss", float("inf"), [[micro], [MicroBatch([5], [6], [1e-300])]], None, {"seed": 0})
    record.write(tmp_path / "record.json")
    assert repr(Record.read(tmp_path / "record.json")) == repr(record)
    assert record.faulty() == [3]
    (tmp_path / "record.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match="not a record of version 1"):
        Record.read(tmp_path / "record.json")
    with pytest.raises(ValueError, match="no such record"):
        Record.read(tmp_path / "nowhere.json")


def test_a_spike_is_measured_against_median_and_spread_of_the_window():
    losses = np.random.default_rng(0).lognormal(size=80)
    window = LossWindow(50)
    for number, loss in enumerate(losses):
        judged = window.judge(float(loss))
        before = losses[max(0, number - 50) : number]
        if number < LEAST:
            assert judged is None
            continue
        spread = 1.4826 * np.median(np.abs(before - np.median(before)))
        assert judged == pytest.approx((np.median(before), (loss - np.median(before)) / spread))


def test_losses_that_hardly_differ_make_no_spikes():
    window = LossWindow(50)
    told = [window.judge(1.0 + 1e-9 * (number % 2)) for number in range(60)]
    assert max(z for each in told if each for _, z in [each]) < 1


def test_a_spike_is_told_with_its_samples_the_worst_first(world, tmp_path, monkeypatch, caplog):
    """Latents a hundred times too large, of one sample, are learnt from and told."""
    monkeypatch.setattr("moa_train.training.callbacks.spikes.LEAST", 3)
    noised = MoAModule.noised

    def louder(self, batch):
        made = noised(self, batch)
        if self.trainer.training and self.trainer.global_step == 5:
            made.target[2] *= 100
        return made

    monkeypatch.setattr(MoAModule, "noised", louder)
    run = world.train(tmp_path / "run", "max_steps=7", "loss.mask_probability=0.0")
    (row,) = read_rows(run / "spikes.csv")
    samples = read_rows(run / "sample_log.csv")[5]["samples"].split()
    assert row["step"] == "6"
    assert float(row["z"]) > 8
    assert row["samples"].split()[0] == samples[2]
    assert sorted(row["samples"].split()) == sorted(samples)
    assert f"loss spike at step 6: {float(row['loss']):.4g}" in caplog.text
