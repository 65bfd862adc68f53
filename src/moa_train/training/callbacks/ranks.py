"""Notices a rank that is gone, says which, and ends the ranks that would wait for it in vain."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from torch.distributed import DistError, TCPStore
from torch.nn.parallel import DistributedDataParallel

from moa_train.training.split import held_bytes, is_split
from moa_train.training.zero import ZeroStrategy

logger = logging.getLogger(__name__)

BEAT = 1.0
"""Seconds between two signs of life."""


class RankLost(SystemExit):
    """Another rank is gone and was named; exit code 1."""

    def __init__(self) -> None:
        super().__init__(1)


class RankWatch(pl.Callback):
    """A thread of every rank gives a sign of life each second, through the first rank, and looks for the others'.

    A process that is gone breaks gloo's connections at once; NCCL waits until its own timeout. In the first case this
    says which rank it was, in the second it ends the process, too, after `timeout` without a sign of life.

    Args:
        timeout: seconds of silence after which a rank counts as gone.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        if timeout < 5 * BEAT:
            raise ValueError(f"callbacks.ranks.timeout={timeout:g}: expected at least {5 * BEAT:g} seconds")
        self.timeout = timeout
        self.lost: str | None = None
        self._rank = 0
        self._children: list[Any] = []
        self._changed: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._watching = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        _tell_shares(trainer)
        self._rank = trainer.global_rank
        self._children = getattr(
            trainer.strategy.launcher, "procs", []
        )  # of Lightning's own launcher, on the first rank
        store = self._meet(trainer)
        store.set(f"beat/{self._rank}", "0")
        trainer.strategy.barrier("every rank has given a sign of life")
        self._watching = True
        others = [rank for rank in range(trainer.world_size) if rank != self._rank]
        threading.Thread(target=self._watch, args=(store, others), name="ranks", daemon=True).start()

    def _meet(self, trainer: pl.Trainer) -> TCPStore:
        """A store at the first rank."""
        host = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
        wait = timedelta(seconds=self.timeout)
        mine = None
        if trainer.is_global_zero:
            mine = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
        port: int = trainer.strategy.broadcast(0 if mine is None else mine.port)
        return mine or TCPStore(host, port, is_master=False, timeout=wait)

    # ------------------------------------------------------------------------------------------------- in the thread
    def _watch(self, store: TCPStore, others: list[int]) -> None:
        beats = 0
        while not self._ended.wait(BEAT):
            beats += 1
            try:
                store.set(f"beat/{self._rank}", str(beats))
                told = store.multi_get([f"beat/{rank}" for rank in others])
                for rank, beat in zip(others, told, strict=True):
                    self._note(rank, beat)
            except DistError:  # the store went with the first rank, and nothing is known of the others
                self._changed = {rank: last for rank, last in self._changed.items() if rank == 0}
            if not self._ended.is_set() and (gone := self._silent_for(self.timeout)):
                self._say(gone)
                time.sleep(5 * BEAT)  # enough for a main thread that got an error of its own
                logging.shutdown()
                os._exit(1)

    def _note(self, rank: int, beat: bytes) -> None:
        if rank not in self._changed or self._changed[rank][0] != beat:
            self._changed[rank] = (beat, time.monotonic())

    def _silent_for(self, seconds: float) -> dict[int, str]:
        """Ranks that are gone, and how that is known."""
        children = {rank: child.poll() for rank, child in enumerate(self._children, start=1)}
        gone = {rank: _ending(code) for rank, code in children.items() if code}
        now = time.monotonic()
        for rank, (_, changed) in list(self._changed.items()):
            if now - changed > seconds:
                gone.setdefault(
                    rank, "its connection is closed" if changed == 0 else f"silent for {now - changed:.0f} s"
                )
        return gone

    # -------------------------------------------------------------------------------------------- in the main thread
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended.set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finds out whether an error of communication means that a rank is gone."""
        if self._watching and self.lost is None and isinstance(exception, RuntimeError):
            end = time.monotonic() + 5 * BEAT
            while not (gone := self._silent_for(2.5 * BEAT)) and time.monotonic() < end:
                time.sleep(BEAT / 4)
            if gone:
                self._say(gone)
        self._ended.set()

    def _say(self, gone: dict[int, str]) -> None:
        told = ", ".join(f"rank {rank} ({how})" for rank, how in sorted(gone.items()))
        self.lost = f"{told} is gone: rank {self._rank} stops, too; resume with ckpt=last"
        logger.error(self.lost)


def find_watch(trainer: pl.Trainer) -> RankWatch | None:
    """The run's watch, if it has one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, RankWatch)), None)


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _tell_shares(trainer: pl.Trainer) -> None:
    if not trainer.is_global_zero:
        return
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        data = model._get_ddp_logging_data()
        logger.info(
            "%d ranks average %d gradients of %d bytes in each step",
            trainer.world_size,
            data["num_parameter_tensors"],
            data["total_parameter_size_bytes"],
        )
    elif isinstance(trainer.strategy, ZeroStrategy):
        held, every = trainer.strategy.shares()
        logger.info("%d ranks step %d bytes of weights, the first one %d of them", trainer.world_size, every, held)
    elif is_split(trainer.lightning_module):
        held, every = held_bytes(trainer.lightning_module)
        logger.info("%d ranks split %d bytes of weights, the first one holds %d", trainer.world_size, every, held)
