"""Another subject in a real picture: DDIM inversion, reconstruction, and a swap that keeps the background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from moa_train.inference.edits.swap import swap_rows
from moa_train.inference.pictures import Picture, contact_sheet, subjects_tile
from moa_train.inference.pipeline import MoAPipeline
from moa_train.inference.regions import difference, dilate, mean_squared_error, psnr
from moa_train.inference.subjects import Subject
from moa_train.latents import LatentCodec
from moa_train.prompts import parse_prompt


@dataclass(frozen=True)
class Inversion:
    """A real picture and its way to noise under the prior.

    text: the prompt without markers. path: latents z_0 (the encoded picture), then after each inversion step, z_T last.
    """

    picture: Image.Image
    text: str
    path: tuple[Float[Tensor, "1 c h w"], ...]

    @property
    def steps(self) -> int:
        """Of the inversion, and of all that starts from it."""
        return len(self.path) - 1


@dataclass(frozen=True)
class EditedPhoto:
    """A real picture, what the inversion gives back, and the picture with other subjects.

    encoded: the picture after the VAE alone, the best that a reconstruction can be. reconstruction: from z_T.
    control: the same denoising from fresh noise. region: where the swap may change the picture.
    held, free: for each row of subjects, the swap with the background held and without.
    """

    picture: Image.Image
    encoded: Image.Image
    reconstruction: Image.Image
    control: Image.Image
    region: Bool[Tensor, "rows columns"]
    subjects: tuple[tuple[Subject, ...], ...]
    held: tuple[Picture, ...]
    free: tuple[Picture, ...]

    def report(self) -> dict[str, Any]:
        """PSNR of the reconstruction beside its bounds; what each swap changes inside and outside the region."""
        against = {"vae_alone": self.encoded, "reconstruction": self.reconstruction, "fresh_noise": self.control}
        return {
            "psnr_to_the_picture": {name: round(psnr(self.picture, image), 2) for name, image in against.items()},
            "mse_of_the_reconstruction": round(mean_squared_error(self.picture, self.reconstruction), 6),
            "measure": "mean squared difference to the picture, values in [0, 1], in the region and in the background",
            "region_share": round(float(self.region.float().mean()), 3),
            "swaps": [
                {"held": self._changed(held), "free": self._changed(free)}
                for held, free in zip(self.held, self.free, strict=True)
            ],
        }

    def _changed(self, swapped: Picture) -> dict[str, float | None]:
        return difference(self.picture, swapped.image, self.region).rounded()

    def sheet(self, side: int = 128) -> Image.Image:
        """A row a swap: picture, reconstruction, new subject, the swap with the background held and without."""
        common = [self.picture, self.encoded, self.reconstruction]
        rows = [
            [*common, subjects_tile(subjects, side), held.image, free.image]
            for subjects, held, free in zip(self.subjects, self.held, self.free, strict=True)
        ]
        titles = ("picture", "VAE alone", "reconstruction", "new subject", "background held", "not held")
        return contact_sheet(rows or [common], titles if rows else titles[:3], side)


def edit_photo(
    pipe: MoAPipeline,
    picture: Image.Image,
    mask: Bool[Tensor, "rows columns"],
    prompt: str,
    subjects: Sequence[Subject],
    steps: int,
    guidance_scale: float,
    seed: int = 0,
    **options: Any,
) -> EditedPhoto:
    """Invert a real picture, reconstruct it, and put other subjects into it.

    Args:
        pipe: the pipeline, with personalized weights.
        picture: RGB, of a size that the VAE can take.
        mask: where the subjects of the picture are; one latent pixel more may change.
        prompt: what the picture shows, with markers <1> ... <n> where subjects shall be put.
        subjects: the first n make the first swap, the next n the second ...; none: the reconstruction alone.
        steps: of DDIM, in both directions.
        guidance_scale: of the swaps. Inversion and reconstruction have none (`invert` says why).
        seed: of the control's noise.
        options: of the pipeline's call, for the swaps.
    """
    rows = swap_rows(prompt, subjects) if subjects else []
    inversion = invert(pipe, picture, prompt, steps)
    last = inversion.path[-1]
    noise = torch.randn(last.shape, generator=torch.Generator().manual_seed(seed)).to(last)
    region = dilate(mask[None], pipe.vae_scale_factor)[0]
    swaps = [
        [swap_into(pipe, inversion, prompt, row.subjects, where, guidance_scale, **options) for where in (region, None)]
        for row in rows
    ]
    return EditedPhoto(
        picture,
        through_vae(pipe, inversion),
        reconstruct(pipe, inversion),
        reconstruct(pipe, replace(inversion, path=(*inversion.path[:-1], noise))),
        region,
        tuple(row.subjects for row in rows),
        tuple(held for held, _ in swaps),
        tuple(free for _, free in swaps),
    )


def invert(pipe: MoAPipeline, picture: Image.Image, prompt: str, steps: int) -> Inversion:
    """Follow the prior's DDIM trajectory of a picture backwards to noise.

    Guidance is 1: guided steps are no longer the flow of one distribution, and their error, amplified at each step,
    would have to be undone by as large a one. The prior inverts alone, without MoA and whatever the prompt marks.

    Args:
        pipe: the pipeline; its scheduler's noise schedule is used, the scheduler itself stays as it is.
        picture: RGB, of a size that the VAE can take.
        prompt: what the picture shows; markers are ignored.
        steps: of DDIM; more steps reconstruct better.
    """
    text, start = parse_prompt(prompt).text, encoded(pipe, picture)
    path = [start]

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        path.append(tensors["latents"])
        return tensors

    with _scheduler(pipe, DDIMInverseScheduler):
        _denoise(pipe, text, (), start, steps, 1.0, callback_on_step_end=keep, output_type="latent")
    return Inversion(picture, text, tuple(path))


def encoded(pipe: MoAPipeline, picture: Image.Image) -> Float[Tensor, "1 c h w"]:
    """z_0 of a picture: the mean of the VAE's posterior, where the pipeline computes."""
    codec = LatentCodec(pipe.vae)
    moments = codec.moments(_pixels(picture).to(pipe._execution_device))
    return codec.sample(moments, noise=torch.zeros_like(moments[:, 0]))


def reconstruct(pipe: MoAPipeline, inversion: Inversion) -> Image.Image:
    """The prior's picture from z_T, guidance 1: equal to the inverted one up to the VAE's and the inversion's error."""
    with _scheduler(pipe, DDIMScheduler):
        return _denoise(pipe, inversion.text, (), inversion.path[-1], inversion.steps, 1.0)


def through_vae(pipe: MoAPipeline, inversion: Inversion) -> Image.Image:
    """The picture encoded and decoded again: the best that any reconstruction can be."""
    decoded = LatentCodec(pipe.vae).decode(inversion.path[0])
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0]


def swap_into(
    pipe: MoAPipeline,
    inversion: Inversion,
    prompt: str,
    subjects: Sequence[Subject],
    region: Bool[Tensor, "rows columns"] | None,
    guidance_scale: float,
    **options: Any,
) -> Picture:
    """The picture with other subjects, from its inverted noise z_T.

    Args:
        pipe: the pipeline, with personalized weights.
        inversion: of the real picture.
        prompt: as for the inversion, with markers where the subjects stand.
        subjects: one a marker.
        region: where the picture may change, at its resolution. Outside it, the latents are put back onto the picture's
            own path after each step: the background is the picture's, up to the VAE. None: nothing is held, and only
            z_T carries the background over.
        guidance_scale: of the swap; 1 stays nearest to the picture, more makes the subject more like its photo.
        options: of the pipeline's call.
    """
    if region is not None:
        size = inversion.path[0].shape[-2:]
        # A latent pixel is free if any of its picture pixels is.
        free = functional.adaptive_max_pool2d(region.float()[None, None], size).to(inversion.path[0])

        def hold(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            own = inversion.path[inversion.steps - 1 - step]
            return {**tensors, "latents": torch.lerp(own, tensors["latents"], free)}

        options = {**options, "callback_on_step_end": hold}
    with _scheduler(pipe, DDIMScheduler):
        image = _denoise(pipe, prompt, subjects, inversion.path[-1], inversion.steps, guidance_scale, **options)
    return Picture(image, 0, None if pipe.routing is None else pipe.routing.steps[:, 0])


@contextmanager
def _scheduler(pipe: MoAPipeline, kind: type) -> Iterator[None]:
    """The pipeline with another scheduler of the same noise schedule, for a while."""
    own = pipe.scheduler
    pipe.scheduler = kind.from_config(own.config)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        pipe.scheduler = own


def _denoise(
    pipe: MoAPipeline,
    prompt: str,
    subjects: Sequence[Subject],
    latents: Float[Tensor, "1 c h w"],
    steps: int,
    guidance_scale: float,
    **options: Any,
) -> Any:
    """One row through the pipeline from these latents: a picture, or with output_type="latent" latents."""
    made = pipe(
        prompt,
        list(subjects),
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        **options,
    )
    return made.images[0]


def _pixels(picture: Image.Image) -> Float[Tensor, "1 3 h w"]:
    """Values in [-1, 1]."""
    values = torch.from_numpy(np.array(picture.convert("RGB")))
    return rearrange(values, "h w c -> 1 c h w") / 127.5 - 1.0
