"""One trial of a sweep: a process of its own on a frozen configuration, and the record of how it ended.

A crash, a kill for want of memory or a state that leaks stays inside the trial's process. This module imports nothing
heavy: it also runs in every worker of a launcher.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from moa_train.training.callbacks.signals import ASKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

FINISHED, FAILED, INTERRUPTED, PRUNED, RUNNING, LOST = "finished", "failed", "interrupted", "pruned", "running", "lost"
RECORD, OUTPUT, STOP = "trial.json", "output.log", "stop"
"""Files of a trial: how it ended, what it printed; and the request to end it, there or in the sweep's folder."""

COMMAND = (sys.executable, "-m", "moa_train.train")
"""What a trial's process runs."""

_FROZEN = "trial"
_LOCK = ".lock"
_POLL = 0.5  # seconds between two looks at a running trial
_GRACE = 60.0  # seconds for a checkpoint when this process itself has to go
_ASKED = {code for signum in ASKING for code in (128 + signum, -signum)}
"""Exit codes of runs that a signal asked to end: after a checkpoint, or before they could listen."""

_HEADER = """\
# A trial of a sweep, frozen. On its own: moa-train --config-path={folder} --config-name=trial ckpt=auto
defaults:
  - _self_
  - override hydra/job_logging: stdout
hydra: {{output_subdir: null, run: {{dir: .}}}}
"""


@dataclass(frozen=True)
class Record:
    """How a trial stands. `seconds` and `attempts` add up over resumes; `error` is the last line of what it said."""

    number: int
    overrides: list[str]
    status: str
    exit_code: int | None = None
    error: str = ""
    seconds: float = 0.0
    attempts: int = 1


def read_record(folder: Path) -> Record | None:
    """The record of the trial in `folder`; None where there is none. One that no process works on any more is lost."""
    try:
        record = Record(**json.loads((folder / RECORD).read_text()))
    except FileNotFoundError:
        return None
    if record.status == RUNNING:
        with locked(folder) as lock:
            return record if lock is None else replace(record, status=LOST)
    return record


def in_sweep() -> bool:
    """Whether Hydra runs this process's job as one of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run_trial(cfg: DictConfig) -> None:
    """Runs the job of a sweep that Hydra has composed, unless it is done already; a failure is recorded, not raised.

    A trial with a checkpoint goes on from it.

    Raises:
        ValueError: the trial's folder holds another trial, or the configuration builds what it must not.
    """
    from hydra.core.hydra_config import HydraConfig

    from moa_train.cli.targets import refuse_foreign_targets

    refuse_foreign_targets(cfg)
    hydra = HydraConfig.get()
    folder, sweep = Path(hydra.runtime.output_dir), Path(hydra.sweep.dir)
    overrides = list(hydra.overrides.task)
    before = read_record(folder)
    if before is not None and sorted(before.overrides) != sorted(overrides):
        raise ValueError(
            f"{folder} holds the trial {' '.join(before.overrides)}, not {' '.join(overrides)}: repeat the sweep as it "
            "was, or give another hydra.sweep.dir"
        )
    if before is not None and before.status in (FINISHED, PRUNED):
        _tell(hydra.job.num, f"{before.status} before")
    elif not (sweep / STOP).exists():
        with locked(folder) as lock, StopOnSignal(sweep, (signal.SIGINT,)):
            if lock is None:
                _tell(hydra.job.num, f"is running already in another process; see {folder / OUTPUT}")
            else:
                _freeze(cfg, folder, sweep)
                _run(Record(hydra.job.num, overrides, RUNNING), before, folder, sweep, lock)


def _freeze(cfg: DictConfig, folder: Path, sweep: Path) -> None:
    """Writes the trial's configuration with every interpolation resolved."""
    from omegaconf import OmegaConf

    frozen = cfg.copy()
    frozen.run_dir = str(folder)
    frozen.group = frozen.group or "-".join(sweep.absolute().parts[-2:])
    text = _HEADER.format(folder=folder.absolute()) + OmegaConf.to_yaml(frozen, resolve=True)
    _write(folder / f"{_FROZEN}.yaml", text)


def _run(record: Record, before: Record | None, folder: Path, sweep: Path, lock: int) -> None:
    attempts, seconds = (before.attempts, before.seconds) if before else (0, 0.0)
    record = replace(record, attempts=attempts + 1, seconds=seconds)
    _write_record(folder, record)
    (folder / STOP).unlink(missing_ok=True)
    frozen = [f"--config-path={folder.absolute()}", f"--config-name={_FROZEN}"]
    command = [*COMMAND, *frozen]
    if (folder / "checkpoints" / "last.ckpt").exists():
        command.append("ckpt=last")
    _tell(record.number, f"{'goes on' if command[-1] == 'ckpt=last' else 'begins'} in {folder}")
    began = time.monotonic()
    relay = _Relay(folder / OUTPUT, record.number)
    with (folder / OUTPUT).open("ab") as sink:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches it once, through `_wait`
            pass_fds=(lock,),  # the folder is taken as long as the trial lives, whatever becomes of this process
        )
    asked = ""
    try:
        asked = _wait(child, folder, sweep, relay)
    except BaseException as end:
        asked = INTERRUPTED
        _end(child, gently=not isinstance(end, KeyboardInterrupt))  # else a cluster's launcher gives up its place
        raise
    finally:
        relay.show()
        status, error = _outcome(child.returncode, asked, relay.last)
        seconds += time.monotonic() - began
        _write_record(
            folder, replace(record, status=status, exit_code=child.returncode, error=error, seconds=round(seconds, 1))
        )
        _tell(record.number, f"{status} after {seconds:.0f} s{': ' if error else ''}{error}")


def _wait(child: subprocess.Popen[bytes], folder: Path, sweep: Path, relay: _Relay) -> str:
    """Waits for the trial; gives back why it was asked to end, if it was."""
    asked = ""
    while True:
        try:
            child.wait(_POLL)
            return asked
        except subprocess.TimeoutExpired:
            relay.show()
        request = next((path for path in (folder / STOP, sweep / STOP) if path.exists()), None)
        if request is not None and not asked:
            asked = request.read_text() or INTERRUPTED
            child.send_signal(signal.SIGTERM)  # it saves a checkpoint at the end of its step


def _end(child: subprocess.Popen[bytes], gently: bool) -> None:
    try:
        if gently:
            child.send_signal(signal.SIGTERM)
            child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        child.kill()
        child.wait()


def _outcome(code: int, asked: str, last: str) -> tuple[str, str]:
    """Status and reason."""
    if code == 0:
        return FINISHED, ""
    if code in _ASKED:
        return (PRUNED, asked) if asked.startswith(PRUNED) else (INTERRUPTED, "")
    if code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return FAILED, f"killed by {signal.Signals(-code).name}{memory}"
    return FAILED, last.removeprefix("moa-train: error: ") or f"exit code {code}"


class _Relay:
    """Shows the lines that a trial adds to its output, each with the trial's number before it."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        self.offset = path.stat().st_size if path.exists() else 0
        self.last = ""

    def show(self) -> None:
        """Prints what is new, whole lines only."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            lines = file.read().rpartition(b"\n")[0]
        if lines:
            self.offset += len(lines) + 1
            shown = [line for line in lines.decode(errors="replace").splitlines() if line.strip()]
            self.last = shown[-1] if shown else self.last
            for line in shown:
                _tell(self.number, line)


class StopOnSignal:
    """Inside, the first signal asks all trials of the sweep to save and end; a second one raises KeyboardInterrupt.

    Handlers that something else has installed stay.
    """

    def __init__(self, sweep: Path, signals: tuple[signal.Signals, ...]) -> None:
        self.sweep, self.signals = sweep, signals
        self._previous: dict[int, Any] = {}
        self._asked = False

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in self.signals:
                if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[signum] = signal.signal(signum, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if not (self.sweep / STOP).exists():
            (self.sweep / STOP).write_text(INTERRUPTED)
            print("moa-train: stopping: running trials save a checkpoint; once more: at once", file=sys.stderr)


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Inside, the folder is taken, and the descriptor that holds it is given; None: another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock
    finally:
        os.close(lock)


def _write_record(folder: Path, record: Record) -> None:
    _write(folder / RECORD, json.dumps(asdict(record), indent=1))


def _write(path: Path, text: str) -> None:
    """Replaces a small file whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _tell(number: int, text: str) -> None:
    print(f"[{number}] {text}", file=sys.stderr, flush=True)
