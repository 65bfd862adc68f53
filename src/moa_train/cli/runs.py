"""Where a run lives: its folder, and the checkpoint from which it goes on."""

from __future__ import annotations

import logging
import os
import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

LAST, AUTO = "last", "auto"
CONFIG = "config.yaml"
_CHECKPOINT = Path("checkpoints") / "last.ckpt"
_AGREED = "MOA_TRAIN_RUN_DIR"
"""Environment variable by which ranks that Lightning starts learn the first rank's folder."""


@dataclass(frozen=True)
class Run:
    """A run's folder and the checkpoint it resumes from; None: it starts anew."""

    folder: Path
    checkpoint: Path | None

    @property
    def identifier(self) -> str:
        """Name and time, joined: the same for every resume."""
        return "-".join(self.folder.absolute().parts[-2:])


def open_run(cfg: DictConfig) -> Run:
    """Chooses the folder and the checkpoint by `run_dir`, `ckpt`, `runs` and `name`.

    Raises:
        ValueError: no such checkpoint; a new run in the folder of another one; ranks that cannot agree on a folder.
    """
    given = os.environ.get(_AGREED) or cfg.run_dir
    folder = Path(given) if given is not None else None
    if folder is None and cfg.ckpt == AUTO and "SLURM_JOB_ID" in os.environ:
        folder = _new_folder(cfg)  # a requeued job goes on with its own run, not with the newest of this name
    checkpoint = _checkpoint(cfg, folder)
    if folder is None:
        folder = checkpoint.parents[1] if checkpoint is not None else _new_folder(cfg)
    if checkpoint is None and (folder / _CHECKPOINT).exists() and _AGREED not in os.environ:
        raise ValueError(f"{folder} holds a run already: go on with it by ckpt=last, or give another run_dir")
    return Run(folder, checkpoint)


def _checkpoint(cfg: DictConfig, folder: Path | None) -> Path | None:
    if cfg.ckpt is None:
        return None
    if cfg.ckpt in (LAST, AUTO):
        found = newest_checkpoint(Path(cfg.runs) / cfg.name if folder is None else folder)
        if found is None and cfg.ckpt == LAST:
            where = f"{cfg.runs}/{cfg.name}/*" if folder is None else folder
            raise ValueError(f"ckpt=last: there is no {_CHECKPOINT} in {where}; give ckpt=PATH, or name= or run_dir=")
        return found
    return existing_checkpoint(cfg.ckpt)


def existing_checkpoint(given: str) -> Path:
    """The checkpoint that a path names: a file, or a run's folder and in it the last one.

    Raises:
        ValueError: there is none.
    """
    path = Path(given)
    path = path / _CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"ckpt={given}: no such checkpoint; give a .ckpt file, a run's folder, or last")
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoints/last.ckpt` of a run's folder, or of the runs in it."""
    found = [*folder.glob(str(_CHECKPOINT)), *folder.glob(f"*/{_CHECKPOINT}"), *folder.glob(f"*/*/{_CHECKPOINT}")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _new_folder(cfg: DictConfig) -> Path:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes cannot agree on a folder by the time: give run_dir=FOLDER (and ckpt=auto)")
    return Path(cfg.runs) / cfg.name / (time.strftime("%Y-%m-%d_%H-%M-%S") if job is None else f"slurm-{job}")


def tell_ranks(folder: Path) -> None:
    """Lets ranks that this process is going to start use `folder` too."""
    os.environ[_AGREED] = str(folder.absolute())


_NOISE = (
    "Found [0-9]+ module.* in eval mode",  # the frozen prior is meant to be
    "You have overridden `transfer_batch_to_device`",  # keys and sample ids are meant to stay on the CPU
    r"`isinstance\(treespec, LeafSpec\)`",  # between Lightning and torch
    "The '.*_dataloader' does not have many workers",  # data.num_workers is the user's choice
    "You're resuming from a checkpoint that ended before the epoch ended",  # the stream knows its position
    "Experiment logs directory",  # metrics.csv and TensorBoard go on in the run's folder
)
"""Warnings of libraries about what is meant to be so."""


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Write config.yaml into a run's folder, below the commands that the run was begun and continued with."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    path = folder / CONFIG
    commands = [f"# {line}" for line in commands_of(folder)]
    if HydraConfig.initialized() and (given := list(HydraConfig.get().overrides.task)):
        commands.append(f"# moa-train {shlex.join(given)}")
    path.write_text("\n".join([*commands, OmegaConf.to_yaml(cfg, resolve=True)]))


def commands_of(folder: Path) -> list[str]:
    """The commands above a run's config.yaml, in order; none where there is none."""
    path = folder / CONFIG
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line.removeprefix("# ") for line in lines if line.startswith("# moa-train ")]


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Inside, what is logged is also appended to a file, and libraries only say what matters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours, lightning = (logging.getLogger(name) for name in (None, "moa_train", "pytorch_lightning"))
    levels = ours.level, lightning.level
    raised, logging.raiseExceptions = logging.raiseExceptions, False  # a full disk is told once, not by every line
    root.addHandler(handler)
    root.addFilter(_not_open_clips_chatter)
    ours.setLevel(logging.INFO)
    lightning.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(_not_open_clips_chatter)
        logging.raiseExceptions = raised
        ours.setLevel(levels[0])
        lightning.setLevel(levels[1])
        handler.close()


def _not_open_clips_chatter(record: logging.LogRecord) -> bool:
    """open_clip reports on the root logger itself, where this filter sees nothing else."""
    return record.levelno > logging.INFO
