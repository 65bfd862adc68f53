"""Writes checkpoint files whole or not at all, in the training thread or beside it, and keeps what went wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch.utils._pytree import tree_map

from moa_train.checkpoint import atomic_write
from moa_train.training.resume import read_checkpoint


class CheckpointWriter(TorchCheckpointIO):
    """Torch files that are either the old one or the new one, whatever kills the writer.

    A write that fails raises nothing here, where other ranks would wait in vain: `failure` tells it. Asynchronously,
    a save copies the state to the CPU's memory (once, for one file at a time) and one thread writes the copy.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []  # of the latest save
        self._failed: list[BaseException] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes `checkpoint`, or begins to; waits first until earlier files are written."""
        self.wait()
        self._forget_done()
        state = tree_map(_on_cpu, checkpoint) if self.asynchronous else checkpoint
        self._do(lambda: write_checkpoint(state, Path(path)))

    def then(self, act: Callable[[], None]) -> None:
        """Calls `act` once what was saved before is on the disk; not at all if that failed."""
        before = list(self._jobs)

        def act_after_success() -> None:
            if not any(job.done() and job.exception() for job in before):
                act()

        self._do(act_after_success)

    def failure(self) -> BaseException | None:
        """What the first failed write that is not told yet raised; None: nothing failed so far."""
        self._forget_done()
        failed, self._failed = self._failed, []
        return failed[0] if failed else None

    def _forget_done(self) -> None:
        done = [job for job in self._jobs if job.done()]
        self._failed += [error for job in done if (error := job.exception())]
        self._jobs = [job for job in self._jobs if job not in done]

    def wait(self) -> None:
        """Returns when everything is written or has failed."""
        for job in self._jobs:
            job.exception()

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint of this project to the CPU; nothing in the file is ever run, whatever the caller asks."""
        return read_checkpoint(Path(path))

    def teardown(self) -> None:
        """Ends the thread when it has written everything."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def _do(self, job: Callable[[], None]) -> None:
        if self.asynchronous:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._jobs.append(self._thread.submit(job))
            return
        done: Future[None] = Future()
        try:
            job()
            done.set_result(None)
        except OSError as error:
            done.set_exception(error)
        self._jobs.append(done)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a torch file atomically.

    Raises:
        OSError: the file system refused it (full, a quota, gone); torch's own error would not say why.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            remembering = _Remembering(file)
            try:
                torch.save(checkpoint, cast("BinaryIO", remembering))
            except RuntimeError as error:
                raise remembering.error or error from error

    atomic_write(path, write)


class _Remembering:
    """A file for torch.save, which turns every error of writing into a RuntimeError without its reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _on_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
