"""What a table of runs adds where they were evaluated: pictures side by side, intervals, learning curves, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.cli.runs import commands_of
from moa_train.cli.trials import read_record
from moa_train.training.rows import read_rows

if TYPE_CHECKING:
    from moa_train.cli.collect import RunRow


def compared(runs: Sequence[RunRow], out: Path) -> Iterator[str]:
    """The lines of a page on those of the runs that were evaluated, and comparison.png and curves.png in `out`."""
    evaluated = {_title(run): path.parent for run in runs for path in sorted(run.folder.glob("*/metrics.json"))}
    numbers = {title: json.loads((folder / "metrics.json").read_text()) for title, folder in evaluated.items()}
    numbers = {title: each for title, each in numbers.items() if "intervals" in each}
    if not numbers:
        return
    from moa_train.evaluation.comparison import comparable, comparison_figure, curves_figure, numbers_table

    yield "\n## Evaluations\n\nMeans with their 95 % intervals (bootstrap over people).\n"
    yield from numbers_table(numbers)
    shown = comparable({title: evaluated[title] for title in numbers})
    if shown:
        comparison_figure(shown).save(out / "comparison.png")
        yield "\nThe same people, places and seeds:\n\n![comparison](comparison.png)"
    curves_figure({_title(run): read_rows(run.folder / "metrics.csv") for run in runs}, out / "curves.png")
    yield "\n## Learning curves\n\n![curves](curves.png)\n\n## Commands\n"
    for run in runs:
        record = read_record(run.folder)
        commands = [f"moa-train {shlex.join(record.overrides)}"] if record else commands_of(run.folder)
        yield from (f"    {command}" for command in commands)
    yield ""


def _title(run: RunRow) -> str:
    """A run's name, or where that is the number of a trial, what is different in it."""
    settings = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in run.settings.items())
    return settings if run.folder.name.isdigit() and settings else run.folder.name
