"""The tasks of `moa-generate`: each makes its pictures, writes them with a sheet and a report, and says what it did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image, ImageOps
from torch import Tensor

from moa_train.inference import edits, pictures
from moa_train.inference.edits.compose import compose_rows
from moa_train.inference.edits.grid import Row, make_grid
from moa_train.inference.edits.morph import morph_ends
from moa_train.inference.edits.swap import swap_rows
from moa_train.inference.subjects import photo_and_mask, subjects_of_each
from moa_train.model.unet import MoAConfig
from moa_train.prompts import parse_prompt

if TYPE_CHECKING:
    from moa_train.cli.job import Job


def generate(job: Job) -> str:
    """One picture a seed."""
    count = len(job.seeds)
    subjects_of_each([parse_prompt(job.prompt)], job.subjects)
    made = list(
        pictures.generate(
            job.pipe,
            [job.prompt] * count,
            [job.subjects] * count,
            job.seeds,
            job.settings["batch_size"],
            record_routing=job.settings["routing"],
            **job.sampling,
        )
    )
    for picture in made:
        job.save(f"seed={picture.seed}.png", picture.image, seed=picture.seed)
    rows = [[picture.image for picture in made[i : i + 4]] for i in range(0, count, 4)]
    job.save("samples.png", pictures.contact_sheet(rows, side=max(128, made[0].image.width)))
    if made[0].steps is not None:
        sheet = pictures.contact_sheet([pictures.routing_row(p) for p in made], pictures.ROUTING_COLUMNS)
        job.save("routing.png", sheet)
    return f"{count} pictures in {job.out}/: see {job.out / 'samples.png'}"


def swap(job: Job) -> str:
    """Other subjects at the same seeds."""
    return _write_grid(job, swap_rows(job.prompt, job.subjects))


def compose(job: Job) -> str:
    """Subjects that come in and go out, one at a time."""
    return _write_grid(job, compose_rows(job.prompt, job.subjects))


def morph(job: Job) -> str:
    """From one subject to another, at the first seed."""
    frames = 9 if job.settings["frames"] is None else job.settings["frames"]
    seed, batch_size = job.seeds[0], job.settings["batch_size"]
    morph_ends(job.prompt, job.subjects, frames)
    made = edits.morph(job.pipe, job.prompt, job.subjects, seed, frames, batch_size, **job.sampling)
    for number, frame in enumerate(made.frames):
        job.save(f"frame={number:02d}.png", frame.image, seed=seed, share=round(number / (frames - 1), 4))
    job.save("morph.png", made.strip())
    job.save_gif("morph.gif", [frame.image for frame in made.frames])
    job.report(made.report())
    return f"{frames} frames in {job.out}/: see {job.out / 'morph.gif'} and {job.out / 'morph.png'}"


def invert(job: Job) -> str:
    """Other subjects in a real picture."""
    if job.subjects:
        swap_rows(job.prompt, job.subjects)
    picture, mask = _input(job)
    sampling = job.sampling
    steps = sampling.pop("num_inference_steps")
    made = edits.edit_photo(job.pipe, picture, mask, job.prompt, job.subjects, steps, seed=job.seeds[0], **sampling)
    job.save("input.png", made.picture)
    job.save("reconstruction.png", made.reconstruction)
    for number, (held, free) in enumerate(zip(made.held, made.free, strict=True), 1):
        job.save(f"swap-{number}.png", held.image, background="held")
        job.save(f"swap-{number}_free.png", free.image, background="free")
    job.save("invert.png", made.sheet())
    report = made.report()
    job.report(report)
    db = report["psnr_to_the_picture"]
    return (
        f"{len(made.held)} swaps in {job.out}/: see {job.out / 'invert.png'}. The reconstruction has "
        f"{db['reconstruction']:.1f} dB, the VAE alone {db['vae_alone']:.1f}, fresh noise {db['fresh_noise']:.1f}"
    )


def _input(job: Job) -> tuple[Image.Image, Bool[Tensor, "rows columns"]]:
    """The real picture and its mask, cut at the middle to the shape of the pictures that the prior makes."""
    photo, mask = job.settings["input"], job.settings["input_mask"]
    if photo is None:
        raise ValueError("task=invert needs a real picture: give input=photo.png")
    image, selected = photo_and_mask(photo if mask is None else (photo, mask))
    side = job.pipe.unet.config.sample_size * job.pipe.vae_scale_factor
    size = (job.width or side, job.height or side)
    fitted = ImageOps.fit(Image.fromarray(image), size, Image.Resampling.LANCZOS)
    inside = ImageOps.fit(Image.fromarray(selected), size, Image.Resampling.NEAREST)
    return fitted, torch.from_numpy(np.array(inside))


def routing(job: Job) -> str:
    """The figure of the routing, one a seed."""
    prompt = parse_prompt(job.prompt)
    subjects_of_each([prompt], job.subjects)
    if prompt.count == 0:
        raise ValueError(f'"{job.prompt}" marks no subject, so nothing is routed: write <1> behind a noun')
    method = getattr(getattr(job.pipe.unet, "moa", None), "config", None)
    if method is not None and not isinstance(method, MoAConfig):
        raise ValueError(
            f"these weights are of {method.name}, which has no router for task=routing to show: give weights of "
            f"{MoAConfig.name}, or draw with these by another task"
        )
    options = {"record_routing": True, **job.sampling}
    for seed in job.seeds:
        (picture,) = pictures.generate(job.pipe, [job.prompt], [job.subjects], [seed], 1, **options)
        assert job.pipe.routing is not None, "a method with a router records what a subject is given"
        job.save(f"seed={seed}.png", picture.image, seed=seed)
        job.save(f"routing_seed={seed}.png", edits.routing_figure(picture.image, job.pipe.routing), seed=seed)
    return f"{len(job.seeds)} figures in {job.out}/: see {job.out / f'routing_seed={job.seeds[0]}.png'}"


def _write_grid(job: Job, rows: list[Row]) -> str:
    task = job.settings["task"]
    grid = make_grid(job.pipe, job.prompt, rows, job.seeds, job.settings["batch_size"], **job.sampling)
    for picture in grid.prior:
        job.save(f"prior_seed={picture.seed}.png", picture.image, seed=picture.seed, row="prior")
    for row, cells in zip(grid.rows, grid.cells, strict=True):
        for picture in cells:
            job.save(f"{row.name}_seed={picture.seed}.png", picture.image, seed=picture.seed, row=row.name)
    job.save(f"{task}.png", grid.sheet())
    report = grid.report()
    job.report(report)
    mean, other = report["mean"], report["background_of_another_seed"]
    scale = "" if other is None else f" (another seed: {other:.4f})"
    inside, outside = mean["subject"], mean["background"]
    where = "in the whole picture (no router tells where the subjects are)"
    if outside is not None:
        where = f"in the subjects' region, {outside:.4f} in the background{scale}"
    return (
        f"{len(grid.rows)} x {len(grid.prior)} pictures in {job.out}/: see {job.out / task}.png. Mean squared "
        f"difference to the prior: {inside:.4f} {where}"
    )
