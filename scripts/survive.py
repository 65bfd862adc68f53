"""Kills a training run at random moments, resumes it each time, and compares the end with a run that was never killed.

  python scripts/survive.py                       20 kills, 28 minutes on two busy cores; exit code 1 on a difference
  python scripts/survive.py --kills 3 --steps 4   a short form

Every second kill aims at a save: it comes a random moment after a checkpoint's temporary file appears. Of the kills,
half have TMPDIR on another file system (--other-tmpdir), and half write checkpoints beside the training
(callbacks.checkpoint.asynchronous=true). What is compared, to the bit: trained weights, their average, optimizer,
learning rates, position in the data, and the log of sample ids.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

SAME = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "MoADataModule", "global_step")
TRIES = 8
"""New moments for one kill whose run ended before it came."""


@dataclass
class Kill:
    """One kill and what came of it."""

    aim: str
    moment: float
    settings: tuple[str, ...]
    tmpdir: str
    killed_at: int = 0
    resumed_from: int = 0
    torn: bool = False
    differences: tuple[str, ...] = ()


class Campaign:
    """Runs of one small configuration: the toy world and its bundled prior at 32 pixels."""

    def __init__(self, work: Path, steps: int, seed: int) -> None:
        self.work, self.steps, self.seed = work, steps, seed
        # children are forked from one process that has imported everything: a run starts at once
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["moa_train.cli.train", "moa_train.training.datamodule", "moa_train.inference.pipeline"]
        )

    def prepare(self) -> tuple[float, float]:
        """Draws the data, runs without a kill; returns from when to when that run worked, in seconds from its start."""
        command = [sys.executable, "-m", "moa_train.data", "toy", f"out={self.work / 'toy'}"]
        command += ["train=24", "validation=4", "test=0", f"seed={self.seed}"]
        subprocess.run(command, check=True, capture_output=True)
        self._run("straight", "max_steps=1")  # the first start also waits for the imports
        shutil.rmtree(self.work / "straight")
        began = time.time()
        if code := self._run("straight"):
            sys.exit(f"a run without a kill ended with {code}:\n{(self.work / 'straight' / 'output.txt').read_text()}")
        return (self.work / "straight" / "config.yaml").stat().st_mtime - began, time.time() - began

    def try_kill(self, folder: str, kill: Kill) -> bool:
        """Starts a run and kills it; False: it ended before the moment came."""
        shutil.rmtree(self.work / folder, ignore_errors=True)
        began = time.monotonic()
        process = self._start(folder, *kill.settings, tmpdir=kill.tmpdir)
        if kill.aim == "save":
            self._await_save(folder, process, which=1 + int(kill.moment * 97) % max(1, self.steps // 2))
            time.sleep(kill.moment % 0.15)
        else:
            process.join(max(0.0, began + kill.moment - time.monotonic()))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return False
        log = self.work / folder / "sample_log.csv"
        kill.killed_at = max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0
        kill.torn = bool(self._temporaries(folder))
        last = self.work / folder / "checkpoints" / "last.ckpt"
        kill.resumed_from = _load(last)["global_step"] if last.exists() else 0
        return True

    def resume(self, folder: str, kill: Kill) -> None:
        """Goes on until the end, and compares it with the run that was never killed."""
        if code := self._run(folder, "ckpt=auto", *kill.settings, tmpdir=kill.tmpdir):
            kill.differences = (f"the resume ended with {code}",)
            return
        straight, resumed = (self.work / name for name in ("straight", folder))
        given, expected = (_load(run / "checkpoints" / "last.ckpt") for run in (resumed, straight))
        found = [part for part in SAME if not _same(given[part], expected[part])]
        if (resumed / "sample_log.csv").read_bytes() != (straight / "sample_log.csv").read_bytes():
            found.append("sample_log.csv")
        if self._temporaries(folder):
            found.append("temporary files are left")
        kill.differences = tuple(found)

    def _arguments(self, folder: str) -> list[str]:
        return [
            f"run_dir={self.work / folder}",
            f"data.train={self.work / 'toy' / 'train'}",
            f"data.validation={self.work / 'toy' / 'validation'}",
            "data.resolution=32",
            "data.batch_size=2",
            "data.num_workers=0",
            f"max_steps={self.steps}",
            "validate_every=3",
            "trainer.precision=32-true",
            "callbacks.samples=null",
            "callbacks.checkpoint.every_n_steps=2",
            "callbacks.checkpoint.keep=2",
        ]

    def _start(self, folder: str, *more: str, tmpdir: str = "") -> BaseProcess:
        (self.work / folder).mkdir(parents=True, exist_ok=True)
        arguments = [*self._arguments(folder), *more]
        process = self.context.Process(target=_train, args=(arguments, self.work / folder / "output.txt", tmpdir))
        process.start()
        return process

    def _run(self, folder: str, *more: str, tmpdir: str = "") -> int | None:
        process = self._start(folder, *more, tmpdir=tmpdir)
        process.join(600)
        process.kill()  # does nothing to one that has ended
        process.join()
        return process.exitcode

    def _await_save(self, folder: str, process: BaseProcess, which: int) -> None:
        """Returns when the `which`-th save begins, or the process has ended."""
        seen: set[str] = set()
        began = 0
        while began < which and process.is_alive():
            now = {path.name for path in self._temporaries(folder) if path.name.startswith(".last")}
            began += len(now - seen)
            seen = now
            time.sleep(0.001)

    def _temporaries(self, folder: str) -> list[Path]:
        return list((self.work / folder / "checkpoints").glob(".*.tmp"))


def _train(arguments: list[str], output: Path, tmpdir: str) -> None:
    """`moa-train` in this process."""
    if tmpdir:
        os.environ["TMPDIR"] = tmpdir
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.argv = ["moa-train", *arguments]
    from moa_train.cli.train import main

    main()


def _load(path: Path) -> dict[str, Any]:
    from moa_train.training.resume import read_checkpoint

    return read_checkpoint(path)


def _same(given: Any, expected: Any) -> bool:
    """Equal to the bit, all the way down."""
    import torch

    if isinstance(expected, dict):
        return given.keys() == expected.keys() and all(_same(given[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(given) == len(expected) and all(map(_same, given, expected))
    if isinstance(expected, torch.Tensor):
        return given.dtype == expected.dtype and torch.equal(given, expected)
    return bool(given == expected)


def table(kills: list[Kill]) -> Table:
    """One line a kill."""
    drawn = Table("kill", "aim", "TMPDIR", "saves", "after step", "torn file", "resumed from", "result")
    for number, kill in enumerate(kills, start=1):
        drawn.add_row(
            str(number),
            kill.aim,
            kill.tmpdir or "default",
            "beside" if "callbacks.checkpoint.asynchronous=true" in kill.settings else "between",
            str(kill.killed_at),
            "yes" if kill.torn else "no",
            str(kill.resumed_from) if kill.resumed_from else "the start",
            "DIFFERS: " + ", ".join(kill.differences) if kill.differences else "the same bits",
        )
    return drawn


def run(campaign: Campaign, number: int, other_tmpdir: str, console: Console) -> list[Kill]:
    """All kills, with a bar that says how long it takes."""
    chosen = random.Random(campaign.seed)
    with console.status("the run that is never killed"):
        between = campaign.prepare()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    kills: list[Kill] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("kills", total=number)
        for index in range(number):
            aim = ("anywhere", "save")[index % 2]
            settings = ("callbacks.checkpoint.asynchronous=true",) if index // 2 % 2 else ()
            tmpdir = other_tmpdir if index // 4 % 2 == 0 else ""
            folder = f"kill-{index + 1:02d}"
            for _ in range(TRIES):
                kill = Kill(aim, chosen.uniform(*between), settings, tmpdir)
                if campaign.try_kill(folder, kill):
                    break
            else:
                sys.exit(f"{folder}: {TRIES} runs ended before the kill came")
            campaign.resume(folder, kill)
            kills.append(kill)
            if not kill.differences:
                shutil.rmtree(campaign.work / folder)
            progress.advance(task)
    return kills


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many runs are killed (20)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, the data and the training (0)")
    parser.add_argument(
        "--work", type=Path, help="folder for the runs, kept; a temporary one that is kept on a difference"
    )
    parser.add_argument("--other-tmpdir", default="/dev/shm", help="TMPDIR of half of the runs (/dev/shm)")
    given = parser.parse_args()
    if given.kills < 1 or given.steps < 4:
        parser.error("--kills: at least 1, --steps: at least 4")
    work = given.work or Path(tempfile.mkdtemp(prefix="survive-"))
    console = Console(stderr=True, width=120)
    kills = run(Campaign(work, given.steps, given.seed), given.kills, given.other_tmpdir, console)
    Console(width=120).print(table(kills))
    bad = sum(bool(kill.differences) for kill in kills)
    aimed = sum(kill.torn for kill in kills)
    print(
        f"{len(kills)} kills, {aimed} of them inside a save; {len(kills) - bad} resumed to the same bits, {bad} did not"
    )
    if given.work is None and not bad:
        shutil.rmtree(work)
    elif bad:
        print(f"the runs that differ: {work}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
