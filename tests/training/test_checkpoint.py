"""Checkpoints: what is on the disk after any sequence of saves, failures and resumes."""

import contextlib
import resource
import shutil
import signal
import threading
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch

from moa_train.cli.train import build_module
from moa_train.training.callbacks.checkpoint import CheckpointNotWritten, Checkpoints
from moa_train.training.callbacks.sample_log import SampleLog
from moa_train.training.callbacks.signals import ASKING
from moa_train.training.module import MoAModule
from moa_train.training.resume import check_resumable, read_checkpoint, step_files
from moa_train.training.writer import CheckpointWriter
from processes import ranks
from tiny import load


@pytest.fixture(autouse=True)
def handlers_as_before():
    """Callbacks of these tests begin to listen to signals, and no trainer ends it."""
    before = {signum: signal.getsignal(signum) for signum in ASKING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@contextlib.contextmanager
def files_limited_to(size):
    """Inside, this process cannot write a file beyond `size` bytes: what a full disk does to a checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Saving:
    """Checkpoints of a run that is nothing but its steps: each file holds its step and some kilobytes."""

    def __init__(self, directory, **settings):
        self.callback = Checkpoints(directory, every_n_steps=1, **settings)
        self.trainer = Mock(spec=pl.Trainer, ckpt_path=None, world_size=1, is_global_zero=True, max_steps=100)
        self.trainer.sanity_checking, self.trainer.state = False, SimpleNamespace(fn="fit")
        self.trainer.strategy = SimpleNamespace(checkpoint_io=CheckpointWriter(), broadcast=lambda value: value)
        self.trainer.save_checkpoint = self.save
        self.trainer.global_step = 0
        weight = torch.ones(1)
        self.module = Mock(spec=MoAModule, trained_parameters=lambda: {"weight": weight}, parameters=lambda: [weight])
        self.callback.on_train_start(self.trainer, self.module)

    def save(self, path):
        state = {"step": self.trainer.global_step, "bulk": torch.zeros(5000)}
        self.callback.writer.save_checkpoint(state, path)

    def step(self, step, score=None):
        self.trainer.global_step = step
        self.callback.after_step(self.trainer, self.module, step)
        if score is not None:
            self.trainer.callback_metrics = {"val/gap": torch.tensor(score)}
            self.callback.on_validation_end(self.trainer, self.module)
        self.callback.writer.wait()


def held(directory):
    """File name -> the step that its content is of."""
    return {path.name: torch.load(path)["step"] for path in directory.iterdir()}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("keep", "for_ever"), [(2, None), (3, None), (4, 2), (1, 4), (0, 3), (None, None)])
def test_the_latest_few_and_every_nth_step_are_kept(tmp_path, keep, for_ever, asynchronous):
    run = Saving(tmp_path, keep=keep, keep_every_n_steps=for_ever, monitor=None, asynchronous=asynchronous)
    for step in range(1, 11):
        run.step(step)
        seen = range(1, step + 1)
        expected = {n for n in seen if keep is None or n > step - keep or (for_ever is not None and n % for_ever == 0)}
        assert held(tmp_path) == {f"step={n:06d}.ckpt": n for n in expected} | {"last.ckpt": step}
    run.callback.writer.teardown()


@pytest.mark.parametrize(("mode", "best"), [("max", [1, 1, 3, 3, 3, 6]), ("min", [1, 2, 2, 2, 5, 5])])
def test_the_best_by_a_metric_is_kept_also_by_a_run_that_goes_on(tmp_path, mode, best):
    scores = [0.5, 0.25, 0.75, float("nan"), -0.5, 1.5e-6 + 0.75]
    settings = {"keep": 0, "monitor": "val/gap", "mode": mode}
    run = Saving(tmp_path, **settings)
    for step, score in enumerate(scores, start=1):
        if step == 4:
            run = Saving(tmp_path, **settings)  # resumed: what was best is told by the file's name
        run.step(step, score)
        files = held(tmp_path)
        assert files.pop("last.ckpt") == step
        ((name, held_step),) = files.items()
        assert held_step == best[step - 1]
        assert name == f"best-step={held_step:06d}-val_gap={scores[held_step - 1]:.6g}.ckpt"


def test_steps_after_the_one_resumed_from_do_not_push_out_new_checkpoints(tmp_path):
    run = Saving(tmp_path, keep=2, monitor=None)
    for step in (1, 2, 3, 4, 5, 6):
        run.step(step)
    again = Saving(tmp_path, keep=2, monitor=None)  # from a copy of step 1, say
    again.step(2)
    assert list(step_files(tmp_path)) == [2, 5, 6]
    again.step(3)
    again.step(4)
    assert list(step_files(tmp_path)) == [3, 4, 5, 6]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_is_removed_for_a_checkpoint_that_cannot_be_written(tmp_path, asynchronous):
    run = Saving(tmp_path, keep=1, monitor="val/gap", asynchronous=asynchronous, on_error="continue")
    run.step(1, 1.0)
    before = held(tmp_path)
    with files_limited_to(4000):
        run.step(2, 2.0)
    assert held(tmp_path) == before
    run.step(3, 1.5)
    assert set(held(tmp_path).values()) == {3}
    run.callback.writer.teardown()


def test_a_failed_write_ends_the_run_at_the_next_step_not_at_the_next_save(tmp_path):
    run = Saving(tmp_path, monitor=None, asynchronous=True)
    run.callback.every_n_steps = 10
    with pytest.raises(CheckpointNotWritten, match=r"File too large.*there is none yet"):  # noqa: PT012
        with files_limited_to(4000):
            run.step(10)  # raises already where the writer was quick
            run.callback.writer.wait()
        run.step(11)
    run.callback.writer.teardown()


def test_an_asynchronous_save_holds_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    may_write = threading.Event()
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: (may_write.wait(10), save(*arguments)))
    writer = CheckpointWriter(asynchronous=True)
    state = {"weights": [torch.ones(3)], "step": 4}
    writer.save_checkpoint(state, tmp_path / "last.ckpt")  # returns although nothing can be written
    state["weights"][0].zero_()
    assert not (tmp_path / "last.ckpt").exists()
    may_write.set()
    writer.teardown()
    written = torch.load(tmp_path / "last.ckpt")
    assert written["step"] == 4
    assert torch.equal(written["weights"][0], torch.ones(3))


def test_torn_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".last.ckpt.12345.tmp").write_bytes(b"half")
    Saving(tmp_path).step(1)
    assert set(held(tmp_path).values()) == {1}


@pytest.mark.parametrize(
    "settings", [{"mode": "best"}, {"on_error": "ignore"}, {"keep_every_n_steps": 750}, {"signal_every_n_steps": 0}]
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Checkpoints(tmp_path, every_n_steps=500, **settings)


def test_an_unknown_metric_is_refused_with_those_there_are(tmp_path):
    run = Saving(tmp_path, monitor="val/gop")
    with pytest.raises(ValueError, match="val/gop: a validation gives val/gap"):
        run.step(1, 1.0)


# ---------------------------------------------------------------------------------------------------- what is refused
def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(change, path):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


UNUSABLE = {
    "half written": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "not a whole"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole"),
    "a flipped bit": (flip_a_bit, "checksum"),
    "a pickle with code": (lambda path: torch.save({"moa_train": Mock}, path), "not a whole"),
    "foreign": (lambda path: torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6"}, path), "found none"),
    "older": (partial(rewrite, lambda c: c["moa_train"].update(version=0)), "expected format 1, found 0"),
    "another prior": (partial(rewrite, lambda c: c["moa_train"]["prior"].update(weights="0")), "trained on the prior"),
    "another model": (partial(rewrite, lambda c: c["state_dict"].popitem()), "lacks 1 trained tensors"),
}


def test_a_checkpoint_that_cannot_serve_is_refused_by_name_with_the_newest_that_can(world, finished, tmp_path):
    _, module = build_module(world.config(f"run_dir={tmp_path}"))
    for number, (make, reason) in enumerate(UNUSABLE.values()):
        folder = tmp_path / str(number)
        shutil.copytree(finished / "checkpoints", folder)
        last = folder / "last.ckpt"
        last.write_bytes(last.read_bytes())
        make(last)
        with pytest.raises(ValueError, match=reason) as error:
            check_resumable(last, module)
        assert str(last) in str(error.value)
        assert str(error.value).endswith(f"resume with ckpt={folder / 'step=000004.ckpt'}")
        make(folder / "step=000004.ckpt")
        with pytest.raises(ValueError, match=r"resume with ckpt=.*/step=000003\.ckpt$"):
            check_resumable(last, module)
    for path in step_files(folder).values():
        path.unlink()
    with pytest.raises(ValueError, match=r"No other checkpoint in .* is whole and fits"):
        check_resumable(last, module)
    check_resumable(finished / "checkpoints" / "last.ckpt", module)


# --------------------------------------------------------------------------------------------------------- whole runs
def disk_full_from_step_3_to_4():
    """After these steps no file of a checkpoint's size can be written; logs can."""
    log = SampleLog.after_step

    def log_and_fill(self, trainer, module, step):
        log(self, trainer, module, step)
        size = 100_000 if step in (3, 4) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    SampleLog.after_step = log_and_fill


@pytest.mark.slow
def test_a_full_disk_stops_the_run_or_not_as_told_and_the_old_checkpoint_stays(world, tmp_path):
    arguments = world.overrides("max_steps=6", "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=null")
    going = (
        f"run_dir={tmp_path / 'on'}",
        "callbacks.checkpoint.on_error=continue",
        "callbacks.checkpoint.asynchronous=true",
    )
    with (
        ranks(tmp_path / "a", [*arguments, f"run_dir={tmp_path / 'stop'}"], hook=disk_full_from_step_3_to_4) as stops,
        ranks(tmp_path / "b", [*arguments, *going], hook=disk_full_from_step_3_to_4) as goes_on,
    ):
        assert stops.codes() == [2], stops.said()
        assert goes_on.codes() == [0], goes_on.said()
    (line,) = [line for line in stops.said().splitlines() if line.startswith("moa-train: error:")]
    newest = tmp_path / "stop" / "checkpoints" / "step=000002.ckpt"
    assert f"File too large); the newest whole one is {newest}: make room and resume with ckpt=last" in line
    assert load(tmp_path / "stop")["global_step"] == 2
    assert goes_on.said().count("no checkpoint written to") == 2
    assert goes_on.said().count("training goes on") == 2
    assert list(step_files(tmp_path / "on" / "checkpoints")) == [1, 2, 5, 6]
    assert load(tmp_path / "on")["global_step"] == 6
    assert not list(tmp_path.glob("*/checkpoints/.*"))
    assert read_checkpoint(newest)["global_step"] == 2
