"""What a person watches: step, rate, time left, loss and routing; a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from rich.progress import BarColumn, Progress, TextColumn

from moa_train.training.callbacks.steps import StepCallback

_SHOWN = {
    "loss": "train/loss",
    "R0 in": "train/routing_inside",
    "out": "train/routing_outside",
    "gap": "val/identity_gap",
}


class ProgressDisplay(StepCallback):
    """Step of max_steps, optimizer steps a second, time left, the last numbers of the loss and of the routing.

    Args:
        refresh: seconds between two updates of the bar; also how often a number is fetched from the accelerator.
        line_every: seconds between two plain lines where the output is no terminal.
    """

    def __init__(self, refresh: float = 1.0, line_every: float = 30.0) -> None:
        self.refresh = refresh
        self.line_every = line_every
        self._bar: Progress | None = None
        self._task: Any = None
        self._began = (0.0, 0)
        self._shown_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = (time.monotonic(), trainer.global_step)
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = (
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, refresh_per_second=2)
            self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step)
            self._bar.start()

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        now = time.monotonic()
        pause = self.refresh if self._bar is not None else self.line_every
        first, last = step == self._began[1] + 1, step == trainer.max_steps
        if not trainer.is_global_zero or not (first or last or now - self._shown_at >= pause):
            return
        self._shown_at = now
        text = self._text(trainer, step, now)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            print(f"step {step}/{trainer.max_steps}  {text}", file=sys.stderr, flush=True)

    def _text(self, trainer: pl.Trainer, step: int, now: float) -> str:
        rate = (step - self._began[1]) / max(now - self._began[0], 1e-9)
        parts = [f"{rate:.2f} it/s", f"{duration((trainer.max_steps - step) / rate)} left"]
        metrics = trainer.callback_metrics
        parts += [f"{label} {float(metrics[name]):.4f}" for label, name in _SHOWN.items() if name in metrics]
        return "  ".join(parts)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
