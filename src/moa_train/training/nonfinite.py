"""What is kept of a step whose loss or gradient is not finite: a record that makes the step again, and its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa_train.checkpoint import atomic_write

FOLDER = "nonfinite"
VERSION = 1
MOST = 100
"""Records that a run keeps; later ones are only logged."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computed on: sample ids, the keys that their noise is drawn from, and each sample's loss."""

    samples: list[int]
    keys: list[int]
    losses: list[float] = field(default_factory=list)

    def faulty(self) -> list[int]:
        """The samples whose own loss is not finite."""
        return [sample for sample, loss in zip(self.samples, self.losses, strict=False) if not math.isfinite(loss)]


@dataclass(frozen=True)
class Record:
    """A step that was not taken.

    step: optimizer steps done after it; the weights are those after `step - 1`. what: "loss" or "gradient".
    gradient_norm: over all trained parameters and ranks. ranks: for each rank, its micro-batches in order.
    weights: name of a file beside the record with the trained tensors; None where it was not kept.
    config: the run's configuration, resolved.
    """

    step: int
    what: str
    gradient_norm: float
    ranks: list[list[MicroBatch]]
    weights: str | None
    config: dict[str, Any]

    def faulty(self) -> list[int]:
        """The samples whose loss is not finite; all of the step where no single loss shows it."""
        micro = [each for rank in self.ranks for each in rank]
        found = [sample for each in micro for sample in each.faulty()]
        return found or [sample for each in micro for sample in each.samples]

    def write(self, path: Path) -> None:
        """Writes it as JSON, atomically. JSON has no NaN: such numbers are the words that Python reads."""
        told = {"version": VERSION, **_plain(asdict(self))}
        atomic_write(path, lambda temporary: temporary.write_text(json.dumps(told, indent=1, allow_nan=False)))

    @classmethod
    def read(cls, path: Path) -> Record:
        """Reads what `write` wrote.

        Raises:
            ValueError: no such file, or not a record of this version.
        """
        try:
            told = json.loads(path.read_text())
            if told.pop("version") != VERSION:
                raise ValueError("another version")
            ranks = [[_micro(micro) for micro in rank] for rank in told.pop("ranks")]
            return cls(ranks=ranks, gradient_norm=float(told.pop("gradient_norm")), **told)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such record; runs write them to {FOLDER}/step=000123.json") from error
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{path} is not a record of version {VERSION} of a step that was not finite") from error


def record_path(run_dir: Path, step: int) -> Path:
    """Where the record of a step lies."""
    return run_dir / FOLDER / f"step={step:06d}.json"


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the trained tensors, atomically."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    atomic_write(path, lambda temporary: save_file(plain, temporary))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads what `save_weights` wrote.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}): give ckpt=PATH to take weights from there"
        ) from error


def _micro(told: Mapping[str, Any]) -> MicroBatch:
    return MicroBatch(list(told["samples"]), list(told["keys"]), [float(loss) for loss in told["losses"]])


def _plain(value: Any) -> Any:
    """The same with words for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
