"""Exponential moving average of the trained weights: what validates, draws samples and is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from moa_train.training.callbacks.steps import StepCallback
from moa_train.training.module import MoAModule
from moa_train.training.split import gathered, own_part, part_like

KEY = "ema"
"""Where a checkpoint holds the average: {"updates": n, "average": {name: tensor}}."""


class ExponentialMovingAverage(StepCallback):
    """average <- d average + (1 - d) weights after every step, d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    Only trained weights are averaged. The average stands in for them during validation.

    Args:
        decay: share of the old average that a step keeps, once warmed up.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay}: expected at least 0 and less than 1")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: MoAModule) -> None:  # type: ignore[override]
        trained = pl_module.trained_parameters()
        source = self.average or trained
        self.average = {
            name: part_like(source[name].detach(), parameter).to(parameter, copy=True)
            for name, parameter in trained.items()
        }

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, module: MoAModule, step: int) -> None:  # type: ignore[override]
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        trained = module.trained_parameters()
        parts = [own_part(average) for average in self.average.values()]
        torch._foreach_lerp_(parts, [own_part(trained[name]) for name in self.average], 1 - decay)
        self.updates += 1

    # -------------------------------------------------------------------------------------------------- standing in
    @contextmanager
    def in_place_of_weights(self, module: MoAModule) -> Iterator[None]:
        """Inside, `module` holds the average; afterwards its weights again, bit for bit."""
        self._swap_in(module)
        try:
            yield
        finally:
            self._swap_out(module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: MoAModule) -> None:  # type: ignore[override]
        if self.average:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: MoAModule) -> None:  # type: ignore[override]
        if self._weights is not None:
            self._swap_out(pl_module)

    @torch.no_grad()
    def _swap_in(self, module: MoAModule) -> None:
        assert self._weights is None, "the average already stands in for the weights"
        trained = module.trained_parameters()
        self._weights = {name: parameter.detach().clone() for name, parameter in trained.items()}
        for name, parameter in trained.items():
            parameter.copy_(self.average[name])

    @torch.no_grad()
    def _swap_out(self, module: MoAModule) -> None:
        assert self._weights is not None
        for name, parameter in module.trained_parameters().items():
            parameter.copy_(self._weights[name])
        self._weights = None

    # ------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert self._weights is None, "a checkpoint must hold the weights, not their average"
        checkpoint[KEY] = {"updates": self.updates, "average": gathered(self.average)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continues the average.

        Raises:
            ValueError: the checkpoint comes from a run without one.
        """
        if KEY not in checkpoint:
            raise ValueError("the checkpoint holds no average of the weights: resume with callbacks.ema=null")
        self.updates = checkpoint[KEY]["updates"]
        self.average = checkpoint[KEY]["average"]


def find_ema(trainer: pl.Trainer) -> ExponentialMovingAverage | None:
    """The run's average, if it keeps one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, ExponentialMovingAverage)), None)
