"""How long a checkpoint keeps training waiting: written between two steps, or beside them from a copy in memory.

  python scripts/bench_checkpoint.py                    Stable Diffusion 1.5's size: 2 x 1.6 GB of memory and disk
  python scripts/bench_checkpoint.py --size tiny

The state is what a checkpoint of MoA holds in float32: trained weights, their average and Adam's two moments. Prints
medians: seconds that `save_checkpoint` takes, with and without asynchronous=true, and seconds until the file is whole.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bench_unet import SIZES
from moa_train.model.unet import add_moa, trainable_parameters
from moa_train.training.writer import CheckpointWriter


def trained_shapes(size: str) -> list[torch.Size]:
    """Shapes of MoA's trained tensors, from a U-Net without memory for its weights."""
    with torch.device("meta"):
        unet = add_moa(UNet2DConditionModel(**SIZES[size]), 768 if size == "sd15" else 16)
    return [parameter.shape for group in trainable_parameters(unet).values() for _, parameter in group]


def measure(state: dict[str, Any], folder: Path, asynchronous: bool) -> tuple[float, float]:
    """Seconds that training waits, and seconds until the file is whole."""
    writer = CheckpointWriter(asynchronous)
    began = time.perf_counter()
    writer.save_checkpoint(state, folder / "last.ckpt")
    waited = time.perf_counter() - began
    writer.teardown()
    if (failure := writer.failure()) is not None:
        raise failure
    return waited, time.perf_counter() - began


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd15", help="of the U-Net (sd15)")
    parser.add_argument("--repeats", type=int, default=3, help="saves of each kind (3)")
    parser.add_argument("--folder", type=Path, help="where the files go, on the disk to measure (a temporary folder)")
    given = parser.parse_args()
    shapes = trained_shapes(given.size)
    numbers = sum(map(torch.Size.numel, shapes))
    parts = ("weights", "average", "first_moments", "second_moments")
    state = {"moa_train": {"version": 1}, **{part: [torch.rand(shape) for shape in shapes] for part in parts}}
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=given.folder))
    free = shutil.disk_usage(folder).free
    if free < 2 * 16 * numbers:
        sys.exit(f"{folder} has {free / 1e9:.1f} GB free, expected {2 * 16 * numbers / 1e9:.1f}: give another --folder")
    try:
        times = {
            asynchronous: [measure(state, folder, asynchronous) for _ in range(given.repeats)]
            for asynchronous in (False, True)
        }
        size = (folder / "last.ckpt").stat().st_size
    finally:
        shutil.rmtree(folder)
    waited = {how: statistics.median(pair[0] for pair in pairs) for how, pairs in times.items()}
    whole = {how: statistics.median(pair[1] for pair in pairs) for how, pairs in times.items()}
    gigabytes = size / 1e9
    print(f"{numbers / 1e6:.1f} M trained numbers, gradients of {4 * numbers / 1e6:.0f} MB, file of {gigabytes:.2f} GB")
    print(f"between the steps: training waits {waited[False]:.3f} s")
    print(f"beside training:   training waits {waited[True]:.3f} s, {waited[True] / waited[False]:.2f} of that;")
    print(
        f"                   whole after {whole[True]:.3f} s; a copy of {gigabytes:.2f} GB in the first rank's memory"
    )


if __name__ == "__main__":
    main()
