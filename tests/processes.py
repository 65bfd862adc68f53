"""`moa-train` in processes of its own that start at once: forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "moa_train.cli.train",
        "pytorch_lightning",
        "hydra",
        "moa_train.inference.pipeline",
        "moa_train.training.datamodule",
    ]
)


@dataclass
class Ranks:
    """The processes of one run, and the files that hold what each printed."""

    processes: list[BaseProcess]
    logs: list[Path]

    def codes(self, seconds: float = 300) -> list[int | None]:
        """Exit codes, as a shell has them (-9: killed by SIGKILL); None: still running after `seconds`."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


@contextlib.contextmanager
def ranks(
    folder: Path, arguments: list[str], number: int = 1, hook: Callable[..., None] | None = None, **more: str
) -> Iterator[Ranks]:
    """Starts `number` processes as torchrun does; whatever still runs at the end is killed.

    `hook` is called in each before `moa-train` starts; `more` are further environment variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"output.{rank}.txt" for rank in range(number)]
    port = free_port()
    processes: list[BaseProcess] = []
    for rank, log in enumerate(logs):
        environment = {**more, "OMP_NUM_THREADS": "1"}
        if number > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(number)}
            environment |= {"LOCAL_WORLD_SIZE": str(number), "TORCHELASTIC_RUN_ID": "test"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(CONTEXT.Process(target=_train, args=(arguments, environment, log, hook)))
        processes[-1].start()
    try:
        yield Ranks(processes, logs)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


@dataclass(frozen=True)
class SignalAt:
    """A hook: these ranks get a signal right after an optimizer step, before anything else happens.

    loaders: so do their loaders' processes, a moment before.
    """

    step: int
    signum: int
    ranks: tuple[int, ...] = (0,)
    loaders: bool = False

    def __call__(self) -> None:
        from moa_train.training.callbacks.sample_log import SampleLog

        if int(os.environ.get("RANK", "0")) not in self.ranks:
            return
        log = SampleLog.after_step

        def log_and_signal(callback: SampleLog, trainer: Any, module: Any, step: int) -> None:
            log(callback, trainer, module, step)
            if step == self.step:
                for child in multiprocessing.active_children() if self.loaders else ():
                    os.kill(child.pid or 0, self.signum)
                    child.join(0.5)
                os.kill(os.getpid(), self.signum)

        SampleLog.after_step = log_and_signal  # type: ignore[method-assign]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def _train(arguments: list[str], environment: dict[str, str], log: Path, hook: Callable[..., None] | None) -> None:
    os.environ.update(environment)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.argv = ["moa-train", *arguments]
    if hook is not None:
        hook()
    from moa_train.cli.train import main

    main()
