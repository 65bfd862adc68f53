"""A callback that acts after optimizer steps, which accumulation makes rarer than batches."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class StepCallback(pl.Callback):
    """Calls `after_step` once an optimizer step is done, at accumulation boundaries only."""

    _seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.after_step(trainer, pl_module, trainer.global_step)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """`step` optimizer steps are done; weights, learning rates and gradients are between two steps."""
        raise NotImplementedError


def every(step: int, interval: int | None) -> bool:
    """Whether something that happens each `interval` steps happens at `step`; None: never."""
    return interval is not None and step % interval == 0
