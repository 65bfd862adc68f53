"""Pictures while training: the same subjects, prompts and noise every time, and what the routers do to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from moa_train.symbols import Batch
from moa_train.training.callbacks.ema import find_ema
from moa_train.training.callbacks.steps import StepCallback, every
from moa_train.training.module import MoAModule
from moa_train.training.split import is_split


class SamplePictures(StepCallback):
    """Writes `samples/step=000250.png` (reference, picture) and `routing/step=000250.png` (picture, R_1) on rank 0.

    Where the weights are split over the ranks, all of them draw the same, for a pass needs all.

    Args:
        pipeline: makes a text-to-image pipeline around the modules that are being trained (`MoAPipeline`).
        directory: the run's folder.
        every_n_steps: optimizer steps between two sheets; None: none.
        number: how many validation samples with a subject are drawn.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        seed: of the initial noise.
    """

    def __init__(
        self,
        pipeline: Callable[[], Any],
        directory: str | Path,
        every_n_steps: int | None = 500,
        number: int = 4,
        steps: int = 25,
        guidance: float = 5.0,
        seed: int = 0,
    ) -> None:
        self.pipeline = pipeline
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.number = number
        self.steps = steps
        self.guidance = guidance
        self.seed = seed

    def after_step(self, trainer: pl.Trainer, module: MoAModule, step: int) -> None:  # type: ignore[override]
        draws = trainer.is_global_zero or is_split(module)
        if not draws or not (every(step, self.every_n_steps) or self._is_end(trainer, step)):
            return
        modes = {child: child.training for child in module.modules()}
        module.eval()
        ema = find_ema(trainer)
        try:
            with trainer.precision_plugin.forward_context():
                if ema is None:
                    self.draw(trainer, module, step)
                else:
                    with ema.in_place_of_weights(module):
                        self.draw(trainer, module, step)
        finally:
            for child, training in modes.items():
                child.training = training

    def _is_end(self, trainer: pl.Trainer, step: int) -> bool:
        return self.every_n_steps is not None and step == trainer.max_steps

    @torch.no_grad()
    def draw(self, trainer: pl.Trainer, module: MoAModule, step: int) -> None:
        """Generates with the weights as they are; the first rank writes the two sheets."""
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        rows, maps = [], []
        fixed = self._fixed(trainer, module.codec.factor) if trainer.is_global_zero else []
        if is_split(module):
            fixed = trainer.strategy.broadcast(fixed)
        for index, (caption, subjects, size) in enumerate(fixed):
            made = pipeline(
                prompt=caption,
                subjects=list(subjects.to(module.device)),
                generator=torch.Generator().manual_seed(self.seed + index),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                height=size[0],
                width=size[1],
            ).images[0]
            references = [_resized(_picture(subject), made.size) for subject in subjects]
            rows.append([*references, made])
            if pipeline.routing is not None:  # a baseline has no router
                routing = _grey(pipeline.routing.mean[0])
                maps.append([made, _resized(routing, made.size)])
        for name, images in (("samples", rows), ("routing", maps)):
            if images and trainer.is_global_zero:
                path = self.directory / name / f"step={step:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                sheet(images).save(path)

    def _fixed(self, trainer: pl.Trainer, factor: int) -> list[tuple[str, Float[Tensor, "s 3 r r"], tuple[int, int]]]:
        """Caption, subject pictures and picture size of the first validation samples that have a subject."""
        chosen: list[tuple[str, Tensor, tuple[int, int]]] = []
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        loader = datamodule.val_dataloader()
        for batch in loader or ():
            chosen += _with_subject(batch.unpacked(), factor)
            if len(chosen) >= self.number:
                break
        return chosen[: self.number]


def _with_subject(batch: Batch, factor: int) -> list[tuple[str, Tensor, tuple[int, int]]]:
    if batch.pixels is not None:
        size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
    else:
        assert batch.latents is not None
        size = (batch.latents.shape[-2] * factor, batch.latents.shape[-1] * factor)
    rows = zip(batch.caption, batch.subject_pixels, batch.subject_present, strict=True)
    return [(caption, pixels[present], size) for caption, pixels, present in rows if present.any()]


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows on white."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            whole.paste(image, (x * width, y * height))
    return whole


def _picture(pixels: Float[Tensor, "3 h w"]) -> Image.Image:
    values = (pixels.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(values.cpu().numpy())


def _grey(routing: Float[Tensor, "h w"]) -> Image.Image:
    """R_1 from black (0) to white (1)."""
    values = (routing.float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(np.stack([values] * 3, axis=-1))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)
