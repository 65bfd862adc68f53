"""The bundled weights on the toy prior: what a pipeline of diffusers does, and how far each control reaches."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from drawing import make
from moa_train.evaluation.gallery import ToyProtocol, held_out_people
from moa_train.inference.pipeline import MoAPipeline
from moa_train.losses import mean_subject_attention

MAN, TWO = "a photo of a man <1> at the beach", "a photo of a man <1> and a woman <2> at the beach"
BEACH = "a photo of a man at the beach"
SHORT = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def toy():
    pipe = MoAPipeline.from_pretrained("toy", weights="toy")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def people():
    """A man and a woman that training never saw."""
    chosen = held_out_people(ToyProtocol(people=4, split="validation"))
    return [(chosen[0].photo, chosen[0].mask), (chosen[2].photo, chosen[2].mask)]


def attention(pipe, *args, **options):
    """A_s of each slot, at the latent's resolution, mean over layers and the steps after the first: (s, h, w)."""
    seen = []

    def note(module, args, kwargs, output):
        shown = kwargs["cross_attention_kwargs"]["moa"].observations()
        seen.append(mean_subject_attention(shown, (16, 16))[0])

    with pipe.unet.register_forward_hook(note, with_kwargs=True):
        make(pipe, *args, **options)
    return torch.stack(seen[1:]).mean(0)


@pytest.mark.parametrize(
    "kind", [UniPCMultistepScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
def test_each_scheduler_draws_the_prior_bit_for_bit_without_subject_and_at_strength_0(toy, people, kind):
    own = toy.scheduler
    plain = StableDiffusionPipeline(**{**toy.components, "image_encoder": None}, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    toy.scheduler = plain.scheduler = kind.from_config(own.config)
    try:
        options = {"output_type": "np", **SHORT}
        expected = plain(BEACH, generator=[torch.Generator().manual_seed(0)], **options).images
        assert np.array_equal(make(toy, BEACH, **SHORT), expected)
        assert np.array_equal(make(toy, MAN, people[:1], subject_strength=0.0, **SHORT), expected)
        assert np.abs(make(toy, MAN, people[:1], **SHORT) - expected).mean() > 0.01
    finally:
        toy.scheduler = own


def test_weights_that_accelerate_keeps_elsewhere_give_the_same_picture(toy, people):
    """The hooks of `enable_sequential_cpu_offload`, with the CPU as the device that computes."""
    expected = make(toy, MAN, people[:1], **SHORT)
    cpu_offload(toy.unet, execution_device=torch.device("cpu"))
    try:
        assert next(toy.unet.parameters()).is_meta
        assert np.array_equal(make(toy, MAN, people[:1], **SHORT), expected)
        with pytest.raises(ValueError, match="the unet is offloaded"):
            toy.save_pretrained("nowhere")
    finally:
        remove_hook_from_module(toy.unet, recurse=True)


def test_the_progress_bar_counts_the_steps(toy, people, capsys):
    toy.set_progress_bar_config(disable=False)
    make(toy, MAN, people[:1], num_inference_steps=2)
    toy.set_progress_bar_config(disable=True)
    assert "2/2" in capsys.readouterr().err


def test_the_picture_moves_away_from_the_prior_as_the_strength_grows(toy, people):
    prior = make(toy, BEACH, **SHORT)
    strengths = (0.25, 0.5, 0.75, 1.0)
    moved = [np.square(make(toy, MAN, people[:1], subject_strength=s, **SHORT) - prior).mean() for s in strengths]
    assert 0 < moved[0] < moved[1] < moved[2] < moved[3]


def test_a_region_holds_nine_tenths_of_its_subject_s_attention(toy, people):
    free = attention(toy, MAN, people[:1], **SHORT)[0]
    held = attention(toy, MAN, people[:1], regions=[(0.0, 0.0, 0.5, 1.0)], **SHORT)[0]
    assert free[:, :8].sum() / free.sum() < 0.6
    assert held[:, :8].sum() / held.sum() > 0.9


def test_subjects_kept_apart_share_less_than_half_the_attention_they_shared(toy, people):
    def shared(maps):
        return 2 * torch.minimum(*maps).sum() / maps.sum()

    mixed = shared(attention(toy, TWO, people, **SHORT))
    apart = shared(attention(toy, TWO, people, separate_subjects=True, **SHORT))
    assert apart < 0.5 * mixed
