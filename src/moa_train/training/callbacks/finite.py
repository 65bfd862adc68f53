"""Stops a run whose loss is no longer a number, and names the samples that did it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class NonFiniteLoss(ValueError):
    """The loss is NaN or infinite."""


@dataclass(frozen=True)
class _Pending:
    """A verdict on its way from the accelerator."""

    finite: Tensor
    ready: Any
    step: int
    samples: list[int]


class FiniteLoss(pl.Callback):
    """Raises NonFiniteLoss with the step and the sample ids.

    On the CPU before the gradients are made; on an accelerator one batch later, so that no step waits for the verdict.
    """

    def __init__(self) -> None:
        self._pending: _Pending | None = None
        self._samples: list[int] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._samples = batch.sample.tolist()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        step = trainer.global_step + 1
        finite = loss.detach().isfinite()
        if not loss.is_cuda:
            _check(finite, step, self._samples)
            return
        self._await()
        verdict = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self._pending = _Pending(verdict, ready, step, self._samples)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._await()

    def _await(self) -> None:
        if self._pending is not None:
            self._pending.ready.synchronize()
            _check(self._pending.finite, self._pending.step, self._pending.samples)


def _check(finite: Tensor, step: int, samples: list[int]) -> None:
    if not finite:
        raise NonFiniteLoss(
            f"the loss of step {step} is not finite; its samples are {', '.join(map(str, samples))}: look at them with "
            "`moa-data show`, or resume with ckpt=last and a smaller optim.lr"
        )
