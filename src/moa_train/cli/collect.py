"""The runs of a folder as one table: settings that differ, how each ended, its last numbers; means over seeds."""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from moa_train.cli.compare import compared, evaluations_of
from moa_train.cli.trials import FINISHED, Record, read_record
from moa_train.training.rows import last_values

_BELOW = ("*", "*/*", "*/*/*")  # the runs of a sweep, of an experiment, of all
_SEED = "seed"
_SHOWN = ("val/identity_gap", "val/masked", "val/routing_inside", "val/routing_outside", "train/loss")
"""What a table for people shows of a run's metrics; the CSV file has them all."""
_SHOWN_EVALUATED = (
    "identity.moa", "identity.wrong_subject", "rank1.moa", "context_difference.moa", "context_accuracy.moa",
    "clip_score.moa", "routing_iou",
)  # fmt: skip
"""And of evaluations."""
_MOST_SETTINGS = 8
"""So many settings that differ are shown to people; of more, runs of different models say, the CSV file alone tells."""
_PLACES = {"run_dir", "run_id", "runs", "ckpt", "group"}
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
"""97.5 % quantile of Student's t with 1, 2, ... 30 degrees of freedom; beyond, the normal's 1.96 is used."""


@dataclass
class RunRow:
    """One run. `settings` are those in which the gathered runs differ; `metrics` its last numbers and evaluations."""

    folder: Path
    settings: dict[str, str]
    status: str
    step: int
    seconds: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


def gather(root: Path) -> list[RunRow]:
    """Every run in `root` and up to three folders below it, in the order of their names (numbers by value).

    Raises:
        ValueError: there is no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: give the folder of a sweep, or one that holds runs")
    found = {folder for folder in [root, *(each for depth in _BELOW for each in root.glob(depth))] if _is_run(folder)}
    folders = sorted(found, key=lambda folder: [_natural(part) for part in folder.parts])
    records = {folder: read_record(folder) for folder in folders}
    settings = _settings(folders, records)
    return [_row(folder, records[folder], settings[folder]) for folder in folders]


def _is_run(folder: Path) -> bool:
    return (folder / "trial.json").is_file() or (folder / "config.yaml").is_file()


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _row(folder: Path, record: Record | None, settings: dict[str, str]) -> RunRow:
    metrics = last_values(folder / "metrics.csv")
    step = int(metrics.pop("step", 0))
    for place, numbers in evaluations_of(folder).items():
        metrics |= {f"{place}/{name}" if place else name: value for name, value in _numbers(numbers)}
    if record is None:
        return RunRow(folder, settings, "", step, None, metrics)
    return RunRow(folder, settings, record.status, step, record.seconds, metrics, record.error)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted names of the numbers in nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


# ------------------------------------------------------------------------------------------------------------ settings
def _settings(folders: list[Path], records: Mapping[Path, Record | None]) -> dict[Path, dict[str, str]]:
    """Of each run, the settings in which the runs differ: of the trials' overrides, or else of their configurations."""
    if all(records.values()):
        given = {
            folder: dict(_split(text) for text in record.overrides) for folder, record in records.items() if record
        }
    else:
        given = {folder: dict(_leaves(folder)) for folder in folders}
    keys = dict.fromkeys(key for settings in given.values() for key in settings)
    differing = [key for key in keys if len({settings.get(key, "") for settings in given.values()}) > 1]
    return {folder: {key: settings.get(key, "") for key in differing} for folder, settings in given.items()}


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _leaves(folder: Path) -> Iterator[tuple[str, str]]:
    """Dotted keys and values of a run's configuration, without its own place."""
    from omegaconf import OmegaConf

    if not (folder / "config.yaml").is_file():
        return

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            elif prefix or key not in _PLACES:
                yield f"{prefix}{key}", str(value)

    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict)
    run_dir, run_id = str(config.get("run_dir")), str(config.get("run_id"))
    for key, value in walk(config, ""):
        if run_dir not in value and value != run_id:
            yield key, value


# -------------------------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in the seed alone: of each metric the mean and the half width of its 95 % interval (t)."""

    settings: dict[str, str]
    seeds: int
    metrics: dict[str, tuple[float, float]]


def over_seeds(runs: Sequence[RunRow]) -> list[SeedGroup]:
    """The finished runs grouped over seeds; none where no setting was run with several seeds."""
    groups: dict[tuple[tuple[str, str], ...], list[RunRow]] = {}
    for run in runs:
        if _SEED in run.settings and run.status in ("", FINISHED):
            rest = tuple(item for item in run.settings.items() if item[0] != _SEED)
            groups.setdefault(rest, []).append(run)
    if all(len(members) < 2 for members in groups.values()):
        return []
    return [SeedGroup(dict(rest), len(members), _means(members)) for rest, members in groups.items()]


def _means(runs: list[RunRow]) -> dict[str, tuple[float, float]]:
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    values = {name: [run.metrics[name] for run in runs if name in run.metrics] for name in names}
    return {name: (mean(numbers), _half_width(numbers)) for name, numbers in values.items()}


def _half_width(numbers: Sequence[float]) -> float:
    """Of the 95 % interval of a mean, by Student's t; infinite for a single number."""
    degrees = len(numbers) - 1
    if degrees == 0:
        return math.inf
    quantile = _T95[degrees - 1] if degrees <= len(_T95) else 1.96
    return quantile * stdev(numbers) / math.sqrt(len(numbers))


def write_tables(runs: Sequence[RunRow], out: Path) -> tuple[Path, Path]:
    """Writes summary.csv (a row a run, every number) and summary.md (for people) into `out`; returns their paths."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    out.mkdir(parents=True, exist_ok=True)
    table, page = out / "summary.csv", out / "summary.md"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        settings = list(runs[0].settings)
        writer.writerow(["folder", *settings, "status", "steps", "seconds", *names, "error"])
        for run in runs:
            numbers = [run.metrics.get(name, "") for name in names]
            seconds = "" if run.seconds is None else run.seconds
            writer.writerow([run.folder, *run.settings.values(), run.status, run.step, seconds, *numbers, run.error])
    page.write_text("\n".join([*_page(runs), *compared(runs, out)]))
    return table, page


def _page(runs: Sequence[RunRow]) -> Iterator[str]:
    groups = over_seeds(runs)
    yield f"# {len(runs)} runs"
    if groups:
        yield "\nMeans over seeds with half the width of their 95 % interval (Student's t).\n"
        yield from _markdown(*seeds_table(groups))
    yield ""
    yield from _markdown(*runs_table(runs))
    failed = [run for run in runs if run.error]
    if failed:
        yield ""
        yield from (f"- {run.folder.name}: {run.status}: {run.error}" for run in failed)
    yield ""


def runs_table(runs: Sequence[RunRow]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows, one a run, for people."""
    names = _shown(name for run in runs for name in run.metrics)
    settings = list(runs[0].settings) if len(runs[0].settings) <= _MOST_SETTINGS else []
    heading = ["run", *settings, "status", "steps", "time", *names]
    rows = [
        [
            run.folder.name,
            *(run.settings[key] for key in settings),
            run.status,
            str(run.step),
            "" if run.seconds is None else f"{run.seconds:.0f} s",
            *(f"{run.metrics[name]:.4g}" if name in run.metrics else "" for name in names),
        ]
        for run in runs
    ]
    return heading, rows


def seeds_table(groups: Sequence[SeedGroup]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows, one a setting, for people."""
    names = _shown(name for group in groups for name in group.metrics)
    rows = [[*group.settings.values(), str(group.seeds), *(_cell(group, name) for name in names)] for group in groups]
    return [*groups[0].settings, "seeds", *names], rows


def _cell(group: SeedGroup, name: str) -> str:
    if name not in group.metrics:
        return ""
    centre, half = group.metrics[name]
    return f"{centre:.4g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")


def _shown(names: Iterable[str]) -> list[str]:
    """The training's own few, and those of evaluations."""
    known = set(names)
    evaluated = [name for end in _SHOWN_EVALUATED for name in sorted(known) if name.rpartition("/")[2] == end]
    return [name for name in _SHOWN if name in known] + evaluated


def _markdown(heading: list[str], rows: list[list[str]]) -> Iterator[str]:
    for cells in (heading, ["---"] * len(heading), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def report(root: Path) -> list[RunRow]:
    """Gathers the runs in `root`, writes their tables there and prints them; nothing where there is no run."""
    runs = gather(root)
    if runs:
        written = write_tables(runs, root)
        _print(runs)
        print(f"written to {' and '.join(map(str, written))}")
    return runs


def _print(runs: Sequence[RunRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)
    groups = over_seeds(runs)
    for heading, rows in ([seeds_table(groups)] if groups else []) + [runs_table(runs)]:
        table = Table()
        for name in heading:
            table.add_column(name.replace("/", "/ "), overflow="fold")  # a place to break the line
        for row in rows:
            table.add_row(*row)
        console.print(table)
