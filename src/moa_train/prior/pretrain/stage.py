"""What the four trainings of the toy prior share: batches as a function of the step, one schedule, one fit loop."""

from __future__ import annotations

import csv
import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

WARMUP_SHARE = 0.05
SAVE_EVERY = 200
"""Optimizer steps between checkpoints."""


class _Steps(IterableDataset[int]):
    """Nothing but a count: a stage draws its own batch from the number of the step."""

    def __iter__(self) -> Iterator[int]:
        yield from range(10**9)

    def __len__(self) -> int:
        return 10**9


class Stage(pl.LightningModule):
    """One training of the toy prior.

    The batch of step k is drawn from (seed, k), so a run that is resumed goes on as if it had never stopped. The
    learning rate warms up over 5 % of the steps and falls to zero along a cosine.
    """

    def __init__(self, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed

    @abstractmethod
    def loss(self, rng: np.random.Generator) -> Tensor:
        """The loss of one batch, drawn with `rng`."""

    def after_step(self) -> None:
        """What follows an optimizer step (an average of weights, say)."""

    def training_step(self, _: object, batch_idx: int) -> Tensor:
        """Draw the step's batch and noise from (seed, step) and return its loss."""
        rng = np.random.default_rng([self.seed, self.global_step])
        torch.manual_seed(int(rng.integers(2**62)))
        loss = self.loss(rng)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Run `after_step`."""
        self.after_step()

    def train_dataloader(self) -> DataLoader[int]:
        """An endless loader of step numbers."""
        return DataLoader(_Steps(), batch_size=None)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and a cosine, by step."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        progress = step / max(1, self.steps)
        return min(progress / WARMUP_SHARE + 0.01, 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))


class LossLog(pl.Callback):
    """Append the mean loss of every `every` steps to a CSV file: the learning curve that stands beside the weights."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self._losses: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, *_: object
    ) -> None:
        """Collect the step's loss; write a line where a window ends."""
        self._losses.append(float(outputs["loss"]))  # type: ignore[index]
        if trainer.global_step % self.every == 0:
            new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", "loss"])
                writer.writerow([trainer.global_step, f"{sum(self._losses) / len(self._losses):.5f}"])
            self._losses.clear()


def fit(stage: Stage, folder: Path, precision: str, accelerator: str) -> None:
    """Train a stage to its last step; a run that was cut off goes on from `folder/last.ckpt`."""
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    trainer = pl.Trainer(
        max_steps=stage.steps,
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        logger=False,
        enable_model_summary=False,
        callbacks=[
            TQDMProgressBar(refresh_rate=10),
            LossLog(folder / "loss.csv", every=max(1, min(50, stage.steps // 20))),
            ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=min(SAVE_EVERY, stage.steps)),
        ],
        default_root_dir=folder,
    )
    trainer.fit(stage, ckpt_path=str(last) if last.exists() else None, weights_only=False)


def parameter_count(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
