"""Where to compute and in which type, from the words of a configuration."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and floating type that "auto", "cuda:1", "float16" ... mean here.

    Args:
        device: a torch device, or "auto": CUDA where there is one, else the CPU.
        dtype: "float32", "float16", "bfloat16", or "auto": float16 on CUDA, else float32.

    Raises:
        ValueError: an unknown word, or a device that this machine does not have.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype}; expected auto or one of {', '.join(DTYPES)}")
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device is {device}; expected auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device} but torch finds no CUDA device: use device=cpu or install a driver")
    if dtype == "auto":
        return chosen, torch.float16 if chosen.type == "cuda" else torch.float32
    return chosen, DTYPES[dtype]
