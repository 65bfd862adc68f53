"""The log of what was trained on: one line for every optimizer step and rank."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from moa_train.checkpoint import atomic_write
from moa_train.training.callbacks.steps import StepCallback

HEADER = ("step", "rank", "samples")


class SampleLog(StepCallback):
    """Appends step, rank and sample ids to `sample_log.csv` (`sample_log.rank1.csv` ... on further ranks).

    Args:
        directory: where the file is. On resume, lines of steps after the checkpoint's are cut off.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._samples: list[int] = []
        self._file: io.TextIOBase | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        rank = trainer.global_rank
        path = self.directory / ("sample_log.csv" if rank == 0 else f"sample_log.rank{rank}.csv")
        keep_until(path, trainer.global_step, HEADER)
        self._file = path.open("a", newline="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += batch.sample.tolist()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        assert self._file is not None
        csv.writer(self._file).writerow((step, trainer.global_rank, " ".join(map(str, self._samples))))
        self._file.flush()
        self._samples = []

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()  # Lightning tears down only what ended well

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def keep_until(path: Path, step: int, header: tuple[str, ...] = ()) -> None:
    """Cuts rows of steps after `step` off a CSV file whose first column is the step; a torn last row goes too.

    A file that does not exist yet is begun with `header`.
    """
    rows: list[list[str]] = [list(header)] if header else []
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        rows = list(csv.reader(lines))
        rows = rows[:1] + [row for row in rows[1:] if int(row[0]) <= step]
    if rows:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        atomic_write(path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))
