"""Checkpoints: which are written when, which are kept, and what happens when one cannot be written."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import LightningEnvironment
from pytorch_lightning.callbacks import Checkpoint

from moa_train.checkpoint import atomic_write
from moa_train.training.callbacks.signals import Interrupted, StopSignals
from moa_train.training.callbacks.steps import StepCallback, every
from moa_train.training.module import MoAModule
from moa_train.training.ranks import Agreement
from moa_train.training.resume import LAST, step_files
from moa_train.training.split import is_split, own_part
from moa_train.training.writer import CheckpointWriter

logger = logging.getLogger(__name__)

ON_ERROR = ("stop", "continue")
MODES = {"max": 1.0, "min": -1.0}
_BEST_FILE = re.compile(r"best-step=\d+-(.+)=(-?[\d.e+-]+)\.ckpt")


class CheckpointNotWritten(OSError):
    """The file system refused a checkpoint; those from before are as they were."""


class Checkpoints(StepCallback, Checkpoint):
    """Keeps `last.ckpt`, the latest few `step=000123.ckpt`, some for ever, and the best one by a metric.

    On SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to any rank, saves at the end of the step and ends the run.

    Args:
        directory: where the files are.
        every_n_steps: optimizer steps between two saves; None: only at the end and on a signal.
        keep: how many `step=...` files to keep; None: all, 0: none.
        keep_every_n_steps: files of these steps are kept for ever; None: none is.
        monitor: number of a validation by which the best checkpoint is kept beside the others; None: none is.
        mode: "max" or "min": which values of `monitor` are better.
        asynchronous: the run goes on while a copy of its state is written.
        on_error: "stop" or "continue" when a checkpoint cannot be written.
        signal_every_n_steps: with several ranks, optimizer steps until a signal to one of them is known to all.
    """

    def __init__(
        self,
        directory: str | Path,
        every_n_steps: int | None = 500,
        keep: int | None = 3,
        keep_every_n_steps: int | None = None,
        monitor: str | None = "val/identity_gap",
        mode: str = "max",
        asynchronous: bool = False,
        on_error: str = "stop",
        signal_every_n_steps: int = 1,
    ) -> None:
        key = "callbacks.checkpoint"
        for name, value in (("every_n_steps", every_n_steps), ("signal_every_n_steps", signal_every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{key}.{name}={value}: expected at least 1")
        if keep is not None and keep < 0:
            raise ValueError(f"{key}.keep={keep}: expected at least 0, or null for all")
        if keep_every_n_steps is not None and (not every_n_steps or keep_every_n_steps % every_n_steps):
            raise ValueError(
                f"{key}.keep_every_n_steps={keep_every_n_steps}: expected a multiple of every_n_steps={every_n_steps}, "
                "at which checkpoints are written"
            )
        for name, given, choices in (("mode", mode, tuple(MODES)), ("on_error", on_error, ON_ERROR)):
            if given not in choices:
                raise ValueError(f"{key}.{name}={given}: expected one of {', '.join(choices)}")
        self.directory = Path(directory)
        self.every_n_steps, self.keep, self.keep_every_n_steps = every_n_steps, keep, keep_every_n_steps
        self.monitor, self.sign, self.best = monitor, MODES[mode], -math.inf
        self.asynchronous, self.on_error = asynchronous, on_error
        self.signal_every_n_steps = signal_every_n_steps
        self.writer = CheckpointWriter()
        self.signals = StopSignals()
        self._stop_by = 0
        self._saved_at = -1

    # ------------------------------------------------------------------------------------------------------- saving
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = trainer.global_step if trainer.ckpt_path else -1
        self._agreement = Agreement(trainer)
        if isinstance(trainer.strategy.checkpoint_io, CheckpointWriter):
            self.writer = trainer.strategy.checkpoint_io
        self.writer.asynchronous = self.asynchronous
        if trainer.is_global_zero:
            for torn in self.directory.glob(".*.tmp"):  # of a process that was killed while it wrote
                torn.unlink()
            self.best = self._best_on_disk()
        self.signals.listen()

    def after_step(self, trainer: pl.Trainer, module: MoAModule, step: int) -> None:  # type: ignore[override]
        if every(step, self.every_n_steps) or step == trainer.max_steps:
            self.save(trainer, module)
        if trainer.world_size > 1 and not every(step, self.signal_every_n_steps):
            return
        failure = self.writer.failure()
        signum, failed = self._agreement.largest(self.signals.seen, failure is not None)
        if failed:
            self._saved_at, self.best = -1, self._best_on_disk()
            self._tell(failure, stop=self.on_error == "stop" and not signum)
        if signum:
            self.save(trainer, module)
            self._finish_writing(stop=False)
            self._stop_by = signum

    def save(self, trainer: pl.Trainer, module: MoAModule) -> None:
        """Writes `last.ckpt`, and a link to it under the step's name; every rank calls it at the same step.

        Raises:
            ValueError: a trained weight is not finite; the files on disk stay.
        """
        step = trainer.global_step
        if step == self._saved_at:
            return
        self._check_finite(module, step)
        trainer.save_checkpoint(self.directory / LAST)
        if trainer.is_global_zero:
            self.writer.then(partial(self._keep, step))
        self._saved_at = step

    def _check_finite(self, module: MoAModule, step: int) -> None:
        trained = module.trained_parameters()
        broken = torch.stack([~own_part(parameter).isfinite().all() for parameter in trained.values()]).tolist()
        if is_split(module):
            broken = self._agreement.largest(*broken)
        names = [name for name, bad in zip(trained, broken, strict=True) if bad]
        if names:
            raise ValueError(
                f"{len(names)} trained tensors hold NaN or infinity after step {step} (first: {names[0]}); no "
                "checkpoint was written: resume from the last one with a smaller optim.lr or trainer.gradient_clip_val"
            )

    def _keep(self, step: int) -> None:
        """Names the file that was just written after its step, then removes those that are not to be kept."""
        if self.keep != 0 or every(step, self.keep_every_n_steps):
            link(self.directory / LAST, self.directory / f"step={step:06d}.ckpt")
        if self.keep is None:
            return
        until_now = [other for other in step_files(self.directory) if other <= step]  # later ones: before a resume
        for old in until_now[: max(0, len(until_now) - self.keep)]:
            if not every(old, self.keep_every_n_steps):
                (self.directory / f"step={old:06d}.ckpt").unlink()

    # --------------------------------------------------------------------------------------------------------- best
    def on_validation_end(self, trainer: pl.Trainer, pl_module: MoAModule) -> None:  # type: ignore[override]
        """Saves and links the checkpoint of this step where `monitor` is better than ever."""
        if self.monitor is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(f"callbacks.checkpoint.monitor={self.monitor}: a validation gives {known}")
        score = self.sign * float(trainer.callback_metrics[self.monitor])
        if trainer.strategy.broadcast(score > self.best):
            self.best = score
            self.save(trainer, pl_module)
            if trainer.is_global_zero:
                self.writer.then(partial(self._keep_best, trainer.global_step, score))

    def _keep_best(self, step: int, score: float) -> None:
        before = self._best_files()
        name = str(self.monitor).replace("/", "_")
        best = self.directory / f"best-step={step:06d}-{name}={self.sign * score:.6g}.ckpt"
        link(self.directory / LAST, best)
        for old in before:
            if old != best:
                old.unlink()
        logger.info("best %s so far: %s", self.monitor, best)

    def _best_files(self) -> dict[Path, float]:
        """The best checkpoint by `monitor` with its score; two, if a kill came before the old one was removed."""
        name = str(self.monitor).replace("/", "_")
        found = {path: _BEST_FILE.fullmatch(path.name) for path in self.directory.glob("best-*.ckpt")}
        return {path: self.sign * float(match[2]) for path, match in found.items() if match and match[1] == name}

    def _best_on_disk(self) -> float:
        return max(self._best_files().values(), default=-math.inf)

    # ------------------------------------------------------------------------------------------- failures and signals
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run where the numbers of the step before are logged.

        Raises:
            Interrupted: a signal asked for it, and the checkpoint is saved.
        """
        if self._stop_by:
            name = signal.Signals(self._stop_by).name
            logger.warning("stopped by %s at step %d; resume with ckpt=last", name, trainer.global_step)
            # Lightning's launcher kills its main process, the first rank, when another one fails before it ends
            environment = getattr(trainer.strategy, "cluster_environment", None)  # one process alone has none
            launched = isinstance(environment, LightningEnvironment)
            raise Interrupted(self._stop_by, 0 if launched and trainer.local_rank > 0 else None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: MoAModule) -> None:  # type: ignore[override]
        """A run whose last state is not on the disk has not ended well, whatever `on_error` says."""
        self.save(trainer, pl_module)  # unless it is saved: once more, where the disk was full
        self._finish_writing(stop=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.writer.wait()
        failure = self.writer.failure()
        if failure is not None:
            self._tell(failure, stop=False)

    def _finish_writing(self, stop: bool) -> None:
        """Waits, on all ranks, until the first one has written everything."""
        self.writer.wait()
        failure = self.writer.failure()
        if self._agreement.largest(failure is not None)[0]:
            self._tell(failure, stop)

    def _tell(self, failure: BaseException | None, stop: bool) -> None:
        """Says that a checkpoint is missing; the ranks that do not write have no `failure` to tell."""
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        newest = next(reversed(step_files(self.directory).values()), self.directory / LAST)
        text = (
            f"no checkpoint written to {self.directory} ({failure or 'the first rank tells why'}); "
            + (f"the newest whole one is {newest}" if newest.exists() else "there is none yet")
        )  # fmt: skip
        if stop:
            raise CheckpointNotWritten(
                f"{text}: make room and resume with ckpt=last, or callbacks.checkpoint.on_error=continue"
            )
        if failure is not None:
            logger.error("%s; training goes on", text)


def link(source: Path, target: Path) -> None:
    """Gives a finished file a second name, without its bytes a second time where the file system can."""

    def link_or_copy(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    atomic_write(target, link_or_copy)
