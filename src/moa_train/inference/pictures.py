"""Pictures by seed, and what a person sees of them: files that say how they were made, sheets, routing overlays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from moa_train.inference.regions import routed_region
from moa_train.inference.subject_pipeline import SubjectPipeline
from moa_train.inference.subjects import Subject, Views, photo_and_mask

_FONT_SIZE = 12
FONT = ImageFont.load_default(_FONT_SIZE)
"""Of all lettering in figures."""

_GAP, _CAPTION = 4, 18
_MILLISECONDS = 150
"""That a frame of a GIF is shown."""


@dataclass(frozen=True)
class Picture:
    """One picture with its seed and R_1 of each step, mean over layers (None for a prompt without subject)."""

    image: Image.Image
    seed: int
    steps: Float[Tensor, "t h w"] | None

    @property
    def routing(self) -> Float[Tensor, "h w"]:
        """R_1, averaged over steps and layers.

        Raises:
            ValueError: nothing was recorded.
        """
        if self.steps is None:
            raise ValueError("no routing was recorded: the prompt has no subject, or record_routing was off")
        return self.steps.mean(dim=0)


def generate(
    pipe: SubjectPipeline,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Any]],
    seeds: Sequence[int],
    batch_size: int,
    **options: Any,
) -> Iterator[Picture]:
    """Make one picture a (prompt, subjects, seed), in order; each draws its noise from a CPU generator of its own seed.

    Args:
        pipe: the pipeline.
        prompts, subjects, seeds: one entry a picture; `subjects` as `MoAPipeline` takes them, empty without markers.
        batch_size: pictures denoised together: memory against speed.
        options: passed to the pipeline (num_inference_steps, guidance_scale, height, width ...).
    """
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
        own = [list(entry) for entry in subjects[rows]]
        images = pipe(list(prompts[rows]), own if any(own) else [], generator=generators, **options).images
        for row, (image, seed) in enumerate(zip(images, seeds[rows], strict=True)):
            yield Picture(image, seed, None if pipe.routing is None else pipe.routing.steps[:, row])


def subject_region(made: Sequence[Picture]) -> Bool[Tensor, "rows columns"]:
    """Where the router puts the subjects of any of some pictures; everywhere if the weights have no router."""
    width, height = made[0].image.size
    if any(picture.steps is None for picture in made):
        return torch.ones(height, width, dtype=torch.bool)
    return routed_region(torch.stack([picture.routing for picture in made]), (width, height))


def save_png(path: Path, image: Image.Image, facts: Mapping[str, Any]) -> None:
    """Write a PNG whose text chunks hold the facts (JSON for all but text); equal inputs give equal bytes."""
    info = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=info)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def heat_map(routing: Float[Tensor, "h w"], size: tuple[int, int]) -> Image.Image:
    """R_1 as colours, dark (its lowest value) to bright (its highest), resized to (width, height)."""
    values = _stretched(routing, size)
    return Image.fromarray((colormaps["inferno"](values)[..., :3] * 255).round().astype(np.uint8))


def overlay(image: Image.Image, routing: Float[Tensor, "h w"]) -> Image.Image:
    """The picture, dimmed where R_1 is low: what stays bright is what the personalized expert drew."""
    weight = 0.15 + 0.85 * _stretched(routing, image.size)[..., None]
    return Image.fromarray((np.asarray(image.convert("RGB")) * weight).round().astype(np.uint8))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str] = (),
    side: int = 128,
) -> Image.Image:
    """Pictures in a grid on white, each `side` pixels wide (not smoothed when enlarged), titles above the columns."""
    if not rows or not rows[0]:
        raise ValueError("a contact sheet needs at least one picture")
    height = round(side * rows[0][0].height / rows[0][0].width)
    top = _CAPTION if columns else 0
    count = max(len(row) for row in rows)
    sheet = Image.new("RGB", (count * (side + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP + top), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        middle = (_GAP + column * (side + _GAP) + side // 2, top // 2 + 1)
        draw.text(middle, title, fill="black", font=_fitting(title, side + _GAP), anchor="mm")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            place = (_GAP + column * (side + _GAP), _GAP + top + row * (height + _GAP))
            sheet.paste(image.convert("RGB").resize((side, height), method), place)
    return sheet


def _fitting(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font, smaller where the text is wider than its column."""
    share = (width - 2) / max(FONT.getlength(text), 1)
    return FONT if share >= 1 else ImageFont.load_default(_FONT_SIZE * share)


def text_tile(text: str, side: int) -> Image.Image:
    """Words in the middle of a white square: the cell of a contact sheet that has no picture."""
    tile = Image.new("RGB", (side, side), "white")
    middle = (side // 2, side // 2)
    ImageDraw.Draw(tile).multiline_text(middle, text, fill="black", font=FONT, anchor="mm", align="center")
    return tile


def subjects_tile(subjects: Sequence[Subject], side: int) -> Image.Image:
    """The photos of some subjects side by side in a square cell, each whole, what is not the subject faded to white."""
    shown = [tile for subject in subjects for tile in _shown(subject, side)]
    width = side // len(shown)
    cell = Image.new("RGB", (side, side), "white")
    for place, image in enumerate(shown):
        cell.paste(ImageOps.pad(image, (width, side), Image.Resampling.BICUBIC, color="white"), (place * width, 0))
    return cell


def _shown(subject: Subject, side: int) -> list[Image.Image]:
    """A picture of the subject, or several of one; a feature has none."""
    if isinstance(subject, Views):
        return [tile for view in subject.pictures for tile in _shown(view, side)]
    if isinstance(subject, Tensor):
        if subject.ndim == 1:
            return [text_tile("image feature", side)]
        return [Image.fromarray((rearrange(subject, "c h w -> h w c") * 255.0).round().byte().cpu().numpy())]
    image, selected = photo_and_mask(subject)
    return [Image.fromarray(np.where(selected[..., None], image, 255 - (255 - image) // 3))]


def save_gif(path: Path, frames: Sequence[Image.Image], facts: Mapping[str, Any], side: int = 256) -> None:
    """Write frames that play forwards and back without end, the facts as the comment (JSON).

    Frames are enlarged, unsmoothed, to at least `side` pixels. Equal inputs give equal bytes.
    """
    scale = max(1, -(-side // frames[0].width))
    shown = [frame.convert("RGB").resize((frame.width * scale, frame.height * scale), Image.Resampling.NEAREST)
             for frame in [*frames, *frames[-2:0:-1]]]  # fmt: skip
    comment = json.dumps(dict(facts), sort_keys=True).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = shown
    first.save(path, "GIF", save_all=True, append_images=others, duration=_MILLISECONDS, loop=0, comment=comment)


def routing_row(picture: Picture) -> list[Image.Image]:
    """What `ROUTING_COLUMNS` name: the picture, its personalized part, R_1 over all steps and at three of them."""
    size, mean, steps = picture.image.size, picture.routing, picture.steps
    assert steps is not None  # else picture.routing has raised
    maps = [mean, *(steps[step] for step in (0, len(steps) // 2, len(steps) - 1))]
    return [picture.image, overlay(picture.image, mean), *(heat_map(routing, size) for routing in maps)]


ROUTING_COLUMNS = ("picture", "personalized part", "routing, mean", "first step", "middle step", "last step")


def _stretched(routing: Float[Tensor, "h w"], size: tuple[int, int]) -> np.ndarray:
    """R_1 with its own range stretched to [0, 1], float32, resized to (width, height)."""
    values = routing.numpy().astype(np.float32)
    values = (values - values.min()) / max(float(values.max() - values.min()), 1e-6)
    resized = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized).clip(0.0, 1.0)
