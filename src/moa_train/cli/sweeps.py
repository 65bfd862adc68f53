"""What surrounds the trials of `moa-train -m`: refusals before them, an orderly stop, the summary after them."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from moa_train.cli.collect import report
from moa_train.cli.command import INTERRUPTED, fail
from moa_train.cli.trials import FINISHED, PRUNED, STOP, StopOnSignal

if TYPE_CHECKING:
    from omegaconf import DictConfig

FAILURE = 1
"""Exit code of a sweep in which a trial failed."""


class Sweep(Callback):
    """Hydra calls it around a multirun, whatever the sweeper and the launcher are."""

    def __init__(self) -> None:
        self._signals: StopOnSignal | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses what cannot be swept; forgets an earlier request to stop."""
        _refuse(config)
        sweep = Path(config.hydra.sweep.dir)
        sweep.mkdir(parents=True, exist_ok=True)
        (sweep / STOP).unlink(missing_ok=True)
        self._signals = StopOnSignal(sweep, (signal.SIGINT, signal.SIGTERM))
        self._signals.__enter__()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Writes and shows the summary; the exit code tells whether every trial is done."""
        try:
            self._end(Path(config.hydra.sweep.dir))
        except Exception as error:  # Hydra would make a warning of it, and end with 0
            traceback.print_exc()
            raise SystemExit(FAILURE) from error

    def _end(self, sweep: Path) -> None:
        assert self._signals is not None
        self._signals.__exit__()
        stopped = (sweep / STOP).exists()
        (sweep / STOP).unlink(missing_ok=True)
        undone = [run for run in report(sweep) if run.status not in (FINISHED, PRUNED)]
        if undone or stopped:
            given = [argument for argument in sys.argv[1:] if not argument.startswith("hydra.sweep.dir=")]
            command = shlex.join(["moa-train", *given, f"hydra.sweep.dir={sweep}"])
            print(f"moa-train: finished trials are kept; for the others: {command}", file=sys.stderr)
            sys.exit(INTERRUPTED if stopped else FAILURE)


def _refuse(config: DictConfig) -> None:
    if config.run_dir is not None:
        where = "every run of a sweep needs a folder of its own; hydra.sweep.dir=FOLDER holds them all"
        fail("moa-train", f"run_dir cannot be given with -m: {where}")
    processes = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if processes > 1:
        fail(
            "moa-train",
            f"-m was started in {processes} processes (torchrun or srun): each would run the whole sweep, the ranks of "
            "one group with other values. Start `moa-train -m ...` once, without torchrun or srun: with trainer=ddp "
            "each trial starts its own ranks",
        )
