"""Model offloading: every part of a pipeline with subjects is where it computes, and the picture stays the same."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from PIL import Image

from drawing import PROMPT, make
from moa_train.denoiser import Denoiser
from moa_train.inference.edits.invert import encoded
from moa_train.symbols import Conditioning


def test_an_offloaded_unet_finds_its_multimodal_tokens_where_the_sample_is(pipe):
    """The meta device stands for the accelerator: as there, a layer refuses tensors of two devices."""
    unet = pipe.unet
    cpu_offload_with_hook(unet, "meta")
    assert unet.moa.tokens.layer_position.device == torch.device("cpu")
    with torch.device("meta"):
        present = torch.ones(2, 1, dtype=torch.bool)
        features = torch.zeros(2, 1, pipe.image_encoder.dim)
        conditioning = Conditioning(torch.zeros(2, 77, 16), features, present.long(), present, prior_rows=1)
        noisy, timesteps = torch.zeros(2, 4, 8, 8), torch.tensor([5, 5])
    with torch.no_grad():
        prediction, seen = Denoiser(unet)(noisy, timesteps, conditioning)
    assert prediction.is_meta
    assert len(seen.routing) == 14
    assert all(value.is_meta for value in unet.parameters())


def test_model_offloading_takes_the_image_encoder_along_and_gives_the_same_picture(pipe, photo):
    expected = make(pipe, PROMPT, [photo])
    pipe.enable_model_cpu_offload(device="cpu")
    parts = [pipe.text_encoder, pipe.image_encoder, pipe.unet, pipe.vae]
    for before, after in pairwise(parts):
        assert after._hf_hook.prev_module_hook.model is before
    for _ in range(2):
        assert np.array_equal(make(pipe, PROMPT, [photo]), expected)


def test_a_picture_is_encoded_where_an_offloaded_pipeline_computes(pipe):
    for part in (pipe.vae, pipe.text_encoder, pipe.unet, pipe.image_encoder):
        cpu_offload_with_hook(part, "meta")
    assert encoded(pipe, Image.new("RGB", (16, 16))).is_meta


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to offload from")
@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_without_an_accelerator_offloading_is_refused_and_the_pipeline_goes_on(pipe, photo, name):
    expected = make(pipe, PROMPT, [photo])
    with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
        getattr(pipe, name)()
    assert np.array_equal(make(pipe, PROMPT, [photo]), expected)
