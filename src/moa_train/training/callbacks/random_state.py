"""The states of the global random generators in the checkpoint, although nothing in a step should draw from them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

KEY = "random_state"


class RandomState(pl.Callback):
    """Saves every rank's Python, NumPy, torch and CUDA generators; sets them before the first resumed batch.

    Until then all ranks draw alike, as initial weights need it; from the first batch on each has numbers of its own.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank > 0:
            pl.seed_everything(torch.initial_seed() + trainer.global_rank, verbose=False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint[KEY] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint[KEY]
        if len(states) == trainer.world_size:  # on another number of ranks they keep their seeds
            self._loaded = states[trainer.global_rank]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loaded is not None:
            set_random_state(self._loaded)
            self._loaded = None


def random_state() -> dict[str, Any]:
    """The generators' states as values that a weights-only load accepts."""
    name, words, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global generator is meant)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(words).tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
