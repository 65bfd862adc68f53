"""From a training checkpoint to the file that generation reads."""

from __future__ import annotations

from pathlib import Path

import torch

from moa_train.checkpoint import export_personalized
from moa_train.training.callbacks import ema
from moa_train.training.resume import read_checkpoint

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_UNET = "denoiser.unet."


def export_checkpoint(path: Path, out: Path, dtype: str = "float16", averaged: bool = True) -> int:
    """Writes the trained tensors of a checkpoint with their provenance; returns the step they come from.

    Names are those of `personalized_state_dict`; tuned image encoder layers carry the prefix `image_encoder.`.

    Raises:
        ValueError: an unknown dtype, a file that is no checkpoint of this project, or no average in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    checkpoint = read_checkpoint(path)
    if averaged and ema.KEY not in checkpoint:
        raise ValueError(f"{path} holds no average of the weights: export the weights themselves with ema=false")
    state = checkpoint[ema.KEY]["average"] if averaged else checkpoint["state_dict"]
    metadata = {key: value for key, value in checkpoint["moa_train"].items() if key != "version"}
    metadata |= {"step": checkpoint["global_step"], "ema": averaged}
    tensors = {name.removeprefix(_UNET): value.to(DTYPES[dtype]) for name, value in state.items()}
    export_personalized(out, tensors, metadata)
    return int(checkpoint["global_step"])


def push_to_hub(file: Path, repository: str) -> str:
    """Uploads `file` to a Hugging Face repository, made if need be; returns its address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, exist_ok=True)
    return str(hub.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=repository))
