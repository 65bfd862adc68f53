"""`metrics.csv`: every logged number of a run in one table that a resume continues."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from moa_train.checkpoint import atomic_write
from moa_train.training.rows import read_rows


class MetricsCSV(Logger):
    """One row a step, one column a metric, empty where a metric was not logged at that step.

    A row is on disk as soon as it is logged; what validation adds to the same step replaces it. A new metric rewrites
    the file with one more column. On resume, rows of steps after the checkpoint's are cut off.

    Args:
        directory: the folder of `metrics.csv`.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self._columns: list[str] | None = None
        self._step = 0
        self._row: dict[str, float] = {}
        self._start: int | None = None  # bytes before the row of this step, if it is the file's last

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds numbers to the row of `step`."""
        step = self._step if step is None else step
        if step != self._step:
            self._step, self._row, self._start = step, {}, None
        self._row |= {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if self._row:
            self._write()

    def resume_at(self, step: int) -> None:
        """Cuts off the rows of steps after `step`."""
        rows = read_rows(self.path)
        if rows:
            self._rewrite(list(rows[0]), [row for row in rows if float(row["step"]) <= step])

    def _write(self) -> None:
        row = {"step": str(self._step)} | {name: repr(value) for name, value in self._row.items()}
        if self._columns is None:
            self._columns = list((read_rows(self.path) or [{}])[0])
        if self._start is not None:
            os.truncate(self.path, self._start)
        if not set(row) <= set(self._columns):
            self._rewrite([*self._columns, *(name for name in row if name not in self._columns)], read_rows(self.path))
        self._start = self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))
        self._columns = columns
