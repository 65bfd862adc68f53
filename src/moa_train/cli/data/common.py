"""What the commands of `moa-data` share: packing with a progress bar, and a folder as the first argument."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from moa_train.data.packing import Source


def pack(source: Source, split: str, settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Write one split of a source; `settings` are the command's, `config` is what the index keeps of them."""
    from moa_train.data.packing import write_shards
    from moa_train.data.report import REPORT_NAME, Report

    with progress(f"{split}: {len(source)} samples", len(source)) as advance:
        index = write_shards(
            source,
            settings["out"],
            split,
            seed=settings["seed"],
            shard_bytes=settings["shard_megabytes"] * 1_000_000,
            image_format=settings["image_format"],
            workers=settings["workers"],
            command=" ".join(["moa-data", settings["command"]]),
            config=config,
            on_sample=advance,
        )
    left_out = f"; {len(source) - len(index)} were left out" if len(index) < len(source) else ""
    print(f"{index.storage.location}: {len(index)} samples in {len(index.shards)} shards{left_out}")
    report = Path(index.storage.location) / REPORT_NAME
    if report.is_file():
        print("\n".join(Report.read(json.loads(report.read_text(encoding="utf-8"))).lines()))
        print(f"  by name in {report}")


_SECONDS_A_LINE = 15.0
"""Between two lines of progress where there is no terminal."""


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, plain lines where there is no terminal; call what it yields with the number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(text, total)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


class _Lines:
    """Progress as lines on stderr; the rate is that since the first call, which may tell of an earlier run's work."""

    def __init__(self, text: str, total: int) -> None:
        self.text, self.total = text, total
        self.first: tuple[int, float] | None = None
        self.told = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        before, began = self.first = self.first or (done, now)
        if now - self.told >= _SECONDS_A_LINE and done > before:
            rate = (done - before) / (now - began)
            left = timedelta(seconds=round((self.total - done) / rate))
            print(f"{self.text}: {done} done, {rate:.1f} a second, {left} left", file=sys.stderr, flush=True)
            self.told = now


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved settings."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def with_folder(main: Callable[[], None]) -> Callable[[], None]:
    """`moa-data show DIR ...` is `moa-data show folder=DIR ...`."""

    def chosen() -> None:
        for place, argument in enumerate(sys.argv[1:], 1):
            if "=" not in argument and not argument.startswith("-"):
                sys.argv[place] = f"folder={argument}"
                break
        main()

    return chosen
