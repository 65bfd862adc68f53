"""Checkpoints: written atomically at optimizer steps and when a signal asks the run to stop."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from moa_train.checkpoint import atomic_write
from moa_train.training.callbacks.steps import StepCallback, every
from moa_train.training.module import MoAModule

logger = logging.getLogger(__name__)

LAST = "last.ckpt"
_STEP_FILE = re.compile(r"step=(\d+)\.ckpt")


class Interrupted(SystemExit):
    """A signal ended the run after its checkpoint was saved; the exit code is 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Torch files that are either the old one or the new one, whatever kills the writer."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        atomic_write(path, lambda temporary: torch.save(checkpoint, temporary))


class Checkpoints(StepCallback, Checkpoint):
    """Keeps `last.ckpt` and the latest few `step=000123.ckpt`; on SIGTERM or SIGINT saves `last.ckpt` and ends the run.

    Args:
        directory: where the files are.
        every_n_steps: optimizer steps between two saves; None: only at the end and on a signal.
        keep: how many `step=...` files to keep; None: all, 0: none.
        signal_every_n_steps: with several ranks, optimizer steps until a signal to one of them is known to all.
    """

    def __init__(
        self,
        directory: str | Path,
        every_n_steps: int | None = 500,
        keep: int | None = 3,
        signal_every_n_steps: int = 10,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"callbacks.checkpoint.every_n_steps={every_n_steps}: expected at least 1, or null")
        if keep is not None and keep < 0:
            raise ValueError(f"callbacks.checkpoint.keep={keep}: expected at least 0, or null for all")
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.signal_every_n_steps = signal_every_n_steps
        self._signal = 0
        self._stop_by = 0
        self._saved_at = -1
        self._previous: dict[int, Any] = {}

    # ------------------------------------------------------------------------------------------------------- saving
    def after_step(self, trainer: pl.Trainer, module: MoAModule, step: int) -> None:  # type: ignore[override]
        if every(step, self.every_n_steps) or step == trainer.max_steps:
            self.save(trainer, module)
        signum = self._agreed_signal(trainer, step)
        if signum:
            self.save(trainer, module)
            self._stop_by = signum

    def save(self, trainer: pl.Trainer, module: MoAModule) -> None:
        """Writes `last.ckpt`, and a link to it under the step's name.

        Raises:
            ValueError: a trained weight is not finite; the files on disk stay.
        """
        step = trainer.global_step
        if step == self._saved_at:
            return
        _check_finite(module, step)
        last = self.directory / LAST
        trainer.save_checkpoint(last)
        if trainer.is_global_zero and self.keep != 0:
            _link(last, self.directory / f"step={step:06d}.ckpt")
            self._remove_old()
        self._saved_at = step

    def _remove_old(self) -> None:
        if self.keep is not None:
            for path in step_files(self.directory)[: -self.keep]:
                path.unlink()

    # ------------------------------------------------------------------------------------------------------ signals
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = trainer.global_step if trainer.ckpt_path else -1
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._note)

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
            raise Interrupted(self._stop_by)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """The first signal asks for an orderly end; a second one of SIGINT ends at once."""
        if self._signal and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signum

    def _agreed_signal(self, trainer: pl.Trainer, step: int) -> int:
        """The signal that any rank got, known to all ranks at the same step."""
        if trainer.world_size == 1:
            return self._signal
        if not every(step, self.signal_every_n_steps):
            return 0
        told = torch.tensor(self._signal, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return int(told)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}


def step_files(directory: Path) -> list[Path]:
    """The `step=...` checkpoints of a folder in order of their steps."""
    found = [
        (int(match[1]), path) for path in directory.glob("step=*.ckpt") if (match := _STEP_FILE.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def _check_finite(module: MoAModule, step: int) -> None:
    trained = module.trained_parameters()
    finite = torch.stack([parameter.isfinite().all() for parameter in trained.values()]).tolist()
    broken = [name for name, good in zip(trained, finite, strict=True) if not good]
    if broken:
        raise ValueError(
            f"{len(broken)} trained tensors hold NaN or infinity after step {step} (first: {broken[0]}); no checkpoint "
            "was written: resume from the last one with a smaller optim.lr or trainer.gradient_clip_val"
        )


def _link(source: Path, target: Path) -> None:
    """Gives a finished file a second name, without its bytes a second time where the file system can."""

    def link_or_copy(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    atomic_write(target, link_or_copy)
