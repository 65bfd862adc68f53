"""What a table of runs adds: evaluations side by side with their pictures and intervals, learning curves, commands."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.runs import commands_of
from moa_train.cli.trials import read_record
from moa_train.training.curves import draw_curves
from moa_train.training.rows import read_rows

if TYPE_CHECKING:
    from moa_train.cli.collect import RunRow

_OWN = ("", "evaluation")
"""Places of a run's evaluation that need no name: its own folder, and what `evaluate=` makes."""


def evaluations_of(run: Path) -> dict[str, dict[str, Any]]:
    """What evaluations in a run's folder measured: place ("" for the folder itself) -> its metrics.json."""
    files = [*run.glob("metrics.json"), *sorted(run.glob("*/metrics.json"))]
    return {"" if path.parent == run else path.parent.name: json.loads(path.read_text()) for path in files}


def compared(runs: Sequence[RunRow], out: Path) -> Iterator[str]:
    """The lines of a page on the runs; comparison.png and curves.png go into `out` where there is what they show."""
    titles = _titles(runs, out)
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for title, run in zip(titles, runs, strict=True):
        for place, numbers in evaluations_of(run.folder).items():
            if "intervals" in numbers and numbers.get("benchmark", "toy") == "toy":
                found[title if place in _OWN else f"{title} {place}"] = run.folder / place, numbers
    if found:
        yield from _evaluated(found, out)
    rows = {title: read_rows(run.folder / "metrics.csv") for title, run in zip(titles, runs, strict=True)}
    if draw_curves(rows, out / "curves.png"):
        yield "\n## Learning curves\n\n![curves](curves.png)"
    yield "\n## Commands\n"
    for run in runs:
        record = read_record(run.folder)
        commands = [f"moa-train {shlex.join(record.overrides)}"] if record else commands_of(run.folder)
        yield from (f"    {command}" for command in commands)
    yield ""


def _evaluated(found: Mapping[str, tuple[Path, Mapping[str, Any]]], out: Path) -> Iterator[str]:
    from moa_train.evaluation.comparison import comparable, comparison_figure, numbers_table

    yield "\n## Evaluations\n\nMeans with their 95 % intervals (bootstrap over people).\n"
    yield from numbers_table({title: numbers for title, (_, numbers) in found.items()})
    shown = comparable({title: folder for title, (folder, _) in found.items()})
    if shown:
        comparison_figure(shown).save(out / "comparison.png")
        yield "\nThe same people, places and seeds:\n\n![comparison](comparison.png)"


def _titles(runs: Sequence[RunRow], root: Path) -> list[str]:
    """Of each run its name, or where that is the number of a trial, what is different in it; its path if not unique."""
    titles = []
    for run in runs:
        settings = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in run.settings.items())
        titles.append(settings if run.folder.name.isdigit() and settings else run.folder.name)
    count = Counter(titles)
    return [
        title if count[title] == 1 else str(run.folder.relative_to(root))
        for title, run in zip(titles, runs, strict=True)
    ]
