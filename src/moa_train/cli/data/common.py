"""What the commands of `moa-data` share: packing with a progress bar, and a folder as the first argument."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left; call what it yields with the number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


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
