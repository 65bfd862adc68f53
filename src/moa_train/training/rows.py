"""The rows of `metrics.csv`, for readers that need no other library."""

from __future__ import annotations

import csv
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics file; none where there is no file. A row that a kill tore is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def last_values(path: Path) -> dict[str, float]:
    """The last number of every column that has one."""
    return {name: float(value) for row in read_rows(path) for name, value in row.items() if name and value}
