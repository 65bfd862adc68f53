"""Pictures with explicit seeds, as arrays, and how they are compared: what tests of pipelines share."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

PROMPT = "a photo of a man <1> at the beach"
PLAIN = "a photo of a man at the beach"
TWO = "a man <1> and a woman <2> in the forest"


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make(pipe, prompt, subjects=(), seeds=(0,), **options):
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np", **options}
    return pipe(prompt, subjects, generator=seeded(*seeds), **options).images


def close(first, second, tolerance=1e-5):
    return np.abs(first - second).max() <= tolerance


def vanilla(prior):
    pipe = StableDiffusionPipeline(
        prior.vae, prior.text_encoder, prior.tokenizer, prior.unet, prior.scheduler, None, None, None, False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
