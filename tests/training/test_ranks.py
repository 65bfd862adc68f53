"""Several ranks that are told to stop, one by one or together, and a rank that is gone."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from moa_train.cli.train import build_trainer
from moa_train.training.callbacks.ranks import RankWatch
from moa_train.training.metrics_csv import read_rows
from moa_train.training.strategies import check_strategy, ddp, deepspeed, fsdp
from processes import SignalAt, ranks
from tiny import load

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=1")


@dataclass(frozen=True)
class RecordedNoise:
    """A hook: each rank writes a line for every noise it draws for a sample."""

    folder: Path

    def __call__(self):
        from moa_train.training import module

        drawn = module.keyed_noise

        def draw(key, shape, purpose):
            noise = drawn(key, shape, purpose)
            with (self.folder / f"noise.{os.environ['RANK']}.txt").open("a") as file:
                file.writelines(f"{row.double().sum():.17g}\n" for row in noise)
            return noise

        module.keyed_noise = draw


@pytest.mark.slow
def test_a_signal_to_any_rank_saves_and_stops_all_and_a_lost_rank_is_named(world, tmp_path):
    """Six launches of one run of two ranks, each ended in another way, are the run of one process that never ended."""
    steps = ("max_steps=5", "optim.lr=1e-4")
    straight = world.train(tmp_path / "straight", *steps)
    run = tmp_path / "run"
    settings = ("trainer.accumulate_grad_batches=2", "callbacks.checkpoint.every_n_steps=3", "ckpt=auto")
    arguments = world.overrides(*steps, *TWO, *settings, f"run_dir={run}")

    for step, signum, to, code in (
        (1, signal.SIGTERM, (0,), 143),
        (2, signal.SIGUSR1, (1,), 138),
        (3, signal.SIGTERM, (0, 1), 143),
    ):
        with ranks(tmp_path / "output", arguments, 2, SignalAt(step, signum, to)) as launch:
            assert launch.codes() == [code, code], launch.said()
        assert f"stopped by {signum.name} at step {step}; resume with ckpt=last" in launch.said()
        assert load(run)["global_step"] == step

    with ranks(tmp_path / "output", arguments, 2, SignalAt(4, signal.SIGKILL, (1,))) as launch:
        assert launch.codes() == [1, -9], launch.said()
    assert "rank 1 (silent for" in launch.said()
    assert "is gone: rank 0 stops, too; resume with ckpt=last" in launch.said()
    assert "Traceback" not in launch.said()
    assert load(run)["global_step"] == 3

    patient = [*arguments, "callbacks.ranks.timeout=5.0"]
    with ranks(tmp_path / "output", patient, 2, SignalAt(4, signal.SIGSTOP, (1,))) as launch:
        launch.processes[0].join(300)  # the connection to a rank that stands still is open: the watch alone can tell
        assert [each.exitcode for each in launch.processes] == [1, None], launch.said()
    assert "rank 1 (silent for" in launch.said()

    with ranks(tmp_path / "output", arguments, 2, RecordedNoise(tmp_path)) as launch:
        assert launch.codes() == [0, 0], launch.said()
    noise = [(tmp_path / f"noise.{rank}.txt").read_text().split() for rank in range(2)]
    assert len(noise[0]) == len(noise[1]) >= 2 * 2 * 2  # steps, micro-batches, latents and epsilon
    assert len({*noise[0], *noise[1]}) == len(noise[0]) + len(noise[1])

    logs = [read_rows(run / f"sample_log{rank}.csv") for rank in ("", ".rank1")]
    for whole, first, second in zip(read_rows(straight / "sample_log.csv"), *logs, strict=True):
        samples = whole["samples"].split()
        assert [first["samples"].split(), second["samples"].split()] == [samples[::2], samples[1::2]]
    for name, value in load(straight)["state_dict"].items():
        assert torch.allclose(load(run)["state_dict"][name], value, atol=2e-5), name


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_reaches_the_loaders_processes_too_ends_in_a_checkpoint(world, tmp_path, signum):
    """As a batch system signals all processes of a job, and a terminal all of a command."""
    run = tmp_path / "run"
    arguments = world.overrides("max_steps=200", "data.num_workers=2", f"run_dir={run}")
    with ranks(tmp_path / "output", arguments, 1, SignalAt(2, signum, loaders=True)) as launch:
        assert launch.codes() == [128 + signum], launch.said()
    assert f"stopped by {signum.name} at step 2; resume with ckpt=last" in launch.said()
    assert load(run)["global_step"] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ddp, "strategy.timeout=0"),
        (fsdp, "strategy.timeout=0"),
        (deepspeed, "strategy.timeout=0"),
        (RankWatch, "ranks.timeout=0"),
    ],
)
def test_a_timeout_that_is_none_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(timeout=0.0)


@pytest.mark.parametrize(
    "kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy, "fsdp", "deepspeed_stage_2", "deepspeed"]
)
def test_other_ways_to_split_the_model_are_refused_with_the_one_to_use(kind):
    name = kind if isinstance(kind, str) else kind.__name__
    with pytest.raises(ValueError, match=f"trainer.strategy={name} splits the model.*use trainer=fsdp"):
        check_strategy(kind if isinstance(kind, str) else kind())


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_what_is_not_tried_with_a_split_model_is_refused(world, tmp_path, kind):
    split = (f"trainer={kind}", "trainer.accelerator=cpu", "trainer.devices=2", f"run_dir={tmp_path}")
    with pytest.raises(ValueError, match=rf"compile=true .*trainer={kind}"):
        build_trainer(world.config(*split, "compile=true"), None)
    with pytest.raises(ValueError, match="16-mixed"):
        build_trainer(world.config(*split, "trainer.precision=16-mixed"), None)
    with pytest.raises(ValueError, match=r"trainer\.strategy=deepspeed splits"):
        build_trainer(world.config("trainer.strategy=deepspeed", f"run_dir={tmp_path}"), None)


def test_deepspeed_is_asked_for_a_stage_that_it_has_and_where_it_is_installed(monkeypatch):
    with pytest.raises(ValueError, match=r"strategy\.stage=3: expected 1 or 2; trainer=fsdp"):
        deepspeed(stage=3)
    monkeypatch.setattr("moa_train.training.strategies.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'moa-train\[deepspeed\]', or use trainer=fsdp"):
        deepspeed()


@pytest.mark.parametrize("strategy", ["auto", "ddp", DDPStrategy(), SingleDeviceStrategy("cpu"), fsdp(), deepspeed()])
def test_strategies_that_keep_average_and_checkpoints_whole_are_let_through(strategy):
    check_strategy(strategy)
