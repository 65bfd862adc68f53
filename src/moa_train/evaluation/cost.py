"""What pictures cost: seconds each, and the most memory that was in use."""

from __future__ import annotations

import sys
from typing import Any

import torch

from moa_train.evaluation.gallery import Gallery
from moa_train.evaluation.summary import joined, summarise

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of the system's peak of resident memory."""


def measure_seconds(gallery: Gallery, batch_size: int) -> dict[str, Any]:
    """Seconds a picture, by what was drawn; intervals over batches, whose pictures are timed together."""
    numbers: dict[str, Any] = {}
    for name, each in gallery.seconds.items():
        batches = [picture // batch_size for picture in range(len(each))]
        numbers = joined(numbers, summarise({f"seconds_per_picture.{name}": torch.from_numpy(each)}, batches))
    return numbers


def forget_peak(device: torch.device) -> None:
    """Start to watch the device's memory anew; a process's own peak cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The peak in gigabytes (10^9 bytes): of tensors on a CUDA device, else of the process with all its libraries."""
    if device.type == "cuda":
        return {"device_gigabytes": round(torch.cuda.max_memory_allocated(device) / 1e9, 3)}
    import resource

    return {"resident_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT / 1e9, 3)}
