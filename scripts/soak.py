"""Whether memory and open files stay flat over a long run: a real `moa-train` of many tiny steps, watched from outside.

    python scripts/soak.py                      # 2,000 steps with validations, checkpoints, pictures: 10 minutes
    python scripts/soak.py steps=300            # the short form
    python scripts/soak.py out=runs/soak data.num_workers=2 logger=tensorboard      # with settings of moa-train

Prints step, resident memory and open files of all processes of the run; fits a line through each after the first
quarter; ends with exit code 1 where memory grows by more than `mib=4` per 1,000 steps or files by more than one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import tiny

MIB = 2**20
BOUND_MIB = 4.0
BOUND_FILES = 1.0
WARM_UP = 0.25


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, children = [pid], Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.exists() else ():
        found += family(int(child))
    return found


def measure(pid: int) -> tuple[float, int]:
    """Resident memory, MiB, and open file descriptors of a process and its descendants."""
    pages, files = 0, 0
    for each in family(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
            files += len(list(Path(f"/proc/{each}/fd").iterdir()))
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB, files


def settings(world: Path, run_dir: Path, steps: int) -> list[str]:
    """A run whose every part is at work: a loader process, validations, checkpoints, pictures, logged steps."""
    often = max(steps // 20, 1)
    return [
        f"prior.source={world / 'prior'}",
        f"image_encoder.name={world / 'prior' / 'image_encoder'}",
        f"data.train={world / 'data' / 'train'}",
        f"data.validation={world / 'data' / 'validation'}",
        f"data.resolution={tiny.RESOLUTION}",
        "data.batch_size=4",
        "data.num_workers=1",
        "model.sinusoids=8",
        "trainer.precision=32-true",
        "trainer.log_every_n_steps=1",
        "callbacks.samples.number=1",
        "callbacks.samples.steps=2",
        f"callbacks.samples.every_n_steps={often}",
        f"callbacks.checkpoint.every_n_steps={often}",
        f"validate_every={often}",
        f"max_steps={steps}",
        f"run_dir={run_dir}",
    ]


def steps_done(run_dir: Path) -> int:
    """Optimizer steps that the run has logged."""
    log = run_dir / "sample_log.csv"
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


def watch(process: subprocess.Popen[bytes], run_dir: Path, steps: int) -> np.ndarray:
    """Rows of (step, MiB, files), about two hundred over the run, until it ends."""
    rows: list[tuple[int, float, int]] = []
    shown = -1
    while process.poll() is None:
        step = steps_done(run_dir)
        if step > (rows[-1][0] if rows else 0) + steps // 200:
            rows.append((step, *measure(process.pid)))
            if step * 20 // steps != shown:
                shown = step * 20 // steps
                print(f"step {step:>6}  {rows[-1][1]:8.1f} MiB  {rows[-1][2]:>4} files", flush=True)
        time.sleep(0.1)
    return np.array(rows, dtype=float)


def slope(steps: np.ndarray, values: np.ndarray) -> float:
    """Growth per 1,000 steps: the median of the slopes of all pairs (Theil and Sen), which no single peak moves."""
    first, second = np.triu_indices(len(steps), k=1)
    return float(np.median((values[second] - values[first]) / (steps[second] - steps[first])) * 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="name=value", help="steps, mib, out, or settings of moa-train")
    settled = parser.parse_args().settings
    if strays := [each for each in settled if "=" not in each]:
        parser.error(f"{strays[0]!r}: expected name=value, as in steps=300")
    given = dict(each.split("=", 1) for each in settled)
    try:
        steps, bound = int(given.pop("steps", 2000)), float(given.pop("mib", BOUND_MIB))
    except ValueError as error:
        parser.error(f"steps= and mib= take numbers: {error}")
    if not Path("/proc/self/statm").exists():
        sys.exit("soak.py reads /proc, which this system does not have: run it on Linux")
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch)
        run_dir = Path(given.pop("out", world / "run"))
        tiny.save_prior(world / "prior")
        tiny.save_shards(world / "data")
        more = [f"{key}={value}" for key, value in given.items()]
        command = [sys.executable, "-m", "moa_train.train", *settings(world, run_dir, steps), *more]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        rows = watch(process, run_dir, steps)
    if process.returncode != 0:
        sys.exit(f"moa-train ended with exit code {process.returncode}")
    steady = rows[rows[:, 0] >= WARM_UP * steps]
    memory, files = slope(steady[:, 0], steady[:, 1]), slope(steady[:, 0], steady[:, 2])
    print(f"memory {memory:+.2f} MiB, open files {files:+.2f} per 1,000 steps, from step {steady[0, 0]:.0f} on")
    if memory > bound or files > BOUND_FILES:
        sys.exit(f"not flat: allowed are {bound} MiB and {BOUND_FILES} files per 1,000 steps")


if __name__ == "__main__":
    main()
