"""Reads checkpoints without running code from them, and refuses by name those from which a run cannot go on."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from moa_train.training.module import MoAModule, check_format, check_prior, check_tensors

LAST = "last.ckpt"
_STEP_FILE = re.compile(r"step=(\d+)\.ckpt")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `moa-train`, without running code from the file.

    Raises:
        ValueError: damaged, or not one of this project, or of another version of its format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch compares no checksums when it loads
        if broken:
            raise ValueError(f"{path} is not a whole checkpoint of moa-train (the checksum of {broken} differs)")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of moa-train ({type(error).__name__})") from error
    try:
        check_format(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error
    return checkpoint


def check_resumable(path: Path, module: MoAModule) -> None:
    """Reads the checkpoint that a run is to go on from before anything else is done.

    Raises:
        ValueError: damaged, foreign, of another format, prior or model; names the newest one beside it that is whole.
    """
    try:
        _check(path, module)
    except ValueError as error:
        raise ValueError(f"{error}. {_advice(path, module)}") from error


def step_files(directory: Path) -> dict[int, Path]:
    """The `step=...` checkpoints of a folder by their steps, in order."""
    found = {
        int(match[1]): path for path in directory.glob("step=*.ckpt") if (match := _STEP_FILE.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def _check(path: Path, module: MoAModule) -> None:
    checkpoint = read_checkpoint(path)
    try:
        check_prior(checkpoint, module.prior)
        check_tensors(checkpoint["state_dict"], module.state_dict())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _advice(path: Path, module: MoAModule) -> str:
    """The newest checkpoint beside `path` from which the run can go on."""
    candidates = [*reversed(step_files(path.parent).values()), path.parent / LAST]
    for candidate in candidates:
        if candidate != path and candidate.exists() and not candidate.samefile(path):
            try:
                _check(candidate, module)
            except ValueError:
                continue
            return f"The newest whole one is {candidate}: resume with ckpt={candidate}"
    return f"No other checkpoint in {path.parent} is whole and fits: start anew without ckpt"
