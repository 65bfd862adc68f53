"""`make demo`: the whole way from data to tables on the toy world, in about five minutes on two CPU cores.

Each step is the command that a user would type; steps whose result exists are skipped, so that a demo that was
interrupted goes on where it was. `rm -r runs/demo data/toy` starts anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from moa_train.evaluation.report import plain, table

ROOT = Path(__file__).resolve().parents[1]
DATA, OUT = Path("data/toy"), Path("runs/demo")
WEIGHTS = OUT / "personalized.safetensors"
STEPS = 120


@dataclass(frozen=True)
class Step:
    """One heading, one command line; `result` is the file that says it is done."""

    heading: str
    result: Path
    module: str
    arguments: tuple[str, ...]


def steps() -> list[Step]:
    """The demo in order."""
    checkpoint = OUT / "checkpoints" / "last.ckpt"
    start = "ckpt=last" if (ROOT / checkpoint).is_file() else "init=toy"
    return [
        Step("Draw the toy world: people in places, with masks and captions", DATA / "test" / "index.json",
             "moa_train.data", ("toy", f"out={DATA}")),
        Step(f"Train MoA for {STEPS} more steps, from weights that were trained for longer and ship with this package",
             WEIGHTS, "moa_train.train",
             ("experiment=toy", start, f"run_dir={OUT}", f"max_steps={STEPS}", "optim.lr=2e-4",
              "loss.mask_warmup=0.0", "loss.router.warmup=0.0", "loss.router.ramp=0.0",
              f"validate_every={STEPS // 2}")),
        Step("Export what was trained", WEIGHTS, "moa_train.export", (f"ckpt={checkpoint}", f"out={WEIGHTS}")),
        Step("Draw people that training never saw, and measure", OUT / "metrics.json", "moa_train.eval",
             (f"weights={WEIGHTS}", "benchmark=toy", f"out={OUT}")),
    ]  # fmt: skip


def main() -> None:
    """Run the steps that are not done; print the table and where to look."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    start = time.monotonic()
    planned = steps()
    for number, step in enumerate(planned, 1):
        print(f"\n[{number}/{len(planned)}] {step.heading}   ({_elapsed(start)} so far)", flush=True)
        if (ROOT / step.result).is_file():
            print(f"      done before: {step.result}", flush=True)
            continue
        print(f"      python -m {step.module} {' '.join(step.arguments)}\n", flush=True)
        done = subprocess.run([sys.executable, "-m", step.module, *step.arguments], cwd=ROOT)
        if done.returncode:
            sys.exit(f"the step failed (exit code {done.returncode}); `make demo` tries it again")
    _show(json.loads((ROOT / OUT / "metrics.json").read_text()))
    print(
        f"\n{_elapsed(start)} in all. The training above continued from shipped weights; from scratch it takes about 20"
    )
    print("minutes on two cores: .venv/bin/moa-train experiment=toy")


def _show(numbers: dict) -> None:
    print(f"\n{plain(table(numbers))}")
    print("\nLook at:")
    for name, what in (
        ("samples.png", "the prior's pictures, and the same with people it never saw put into them"),
        ("routing.png", "which pixels the personalized expert drew"),
        ("report.md", "both with the table"),
        ("personalized.safetensors", "the trained weights: moa-generate weights=... prompt=... subjects=[...]"),
    ):
        print(f"   {OUT / name!s:36} {what}")


def _elapsed(start: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    return f"{minutes}:{seconds:02d} min"


if __name__ == "__main__":
    main()
