"""From a training checkpoint to the file that generation reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_train.checkpoint import export_personalized, load_personalized
from moa_train.training.callbacks import ema
from moa_train.training.metrics_csv import read_rows
from moa_train.training.privacy import without_private
from moa_train.training.resume import read_checkpoint

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_UNET = "denoiser.unet."
_VALIDATION = "val/"


def export_checkpoint(
    path: Path,
    out: Path,
    dtype: str = "float16",
    averaged: bool = True,
    license: str | None = None,
    metrics: Path | None = None,
) -> dict[str, Any]:
    """Write the trained tensors of a checkpoint with their provenance; returns all its metadata.

    Names are those of `personalized_state_dict`; tuned image encoder layers carry the prefix `image_encoder.`. What
    the metadata hold may be shown to anybody (`without_private`).

    Args:
        path: a checkpoint of `moa-train`, or an export to write again in another dtype or with another licence.
        out: the `.safetensors` file. dtype: one of `DTYPES`.
        averaged: the average of the weights instead of the weights themselves.
        license: of the weights; None: as in `path`, or not stated.
        metrics: the run's metrics.csv, whose last validation up to the checkpoint goes along.

    Raises:
        ValueError: an unknown dtype or one that cannot hold the weights, a file that is neither a checkpoint nor an
            export of this project, or no average in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if path.suffix == ".safetensors":
        state, metadata = load_personalized(path)
    else:
        state, metadata = _trained(path, averaged)
        metadata["metrics"] = last_validation(metrics, metadata["step"]) if metrics is not None else {}
    metadata["license"] = license if license is not None else metadata.get("license")
    metadata = without_private(metadata)
    return export_personalized(out, {name: _cast(name, value, dtype) for name, value in state.items()}, metadata)


def _trained(path: Path, averaged: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    checkpoint = read_checkpoint(path)
    if averaged and ema.KEY not in checkpoint:
        raise ValueError(f"{path} holds no average of the weights: export the weights themselves with ema=false")
    state: Mapping[str, Tensor] = checkpoint[ema.KEY]["average"] if averaged else checkpoint["state_dict"]
    metadata = {key: value for key, value in checkpoint["moa_train"].items() if key != "version"}
    metadata |= {"step": int(checkpoint["global_step"]), "ema": averaged}
    return {name.removeprefix(_UNET): value for name, value in state.items()}, metadata


def _cast(name: str, value: Tensor, dtype: str) -> Tensor:
    cast = value.to(DTYPES[dtype])
    if not cast.isfinite().all():
        raise ValueError(f"{name} has values that {dtype} cannot hold: use dtype=bfloat16 or float32")
    return cast


def last_validation(metrics: Path, step: int) -> dict[str, float | int]:
    """The figures of the last validation up to `step`, and its own `step`; empty where there was none."""
    for row in reversed(read_rows(metrics)):
        figures = {name: float(text) for name, text in row.items() if name.startswith(_VALIDATION) and text}
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        if figures and int(row["step"]) <= step:
            return {"step": int(row["step"]), **figures}
    return {}
