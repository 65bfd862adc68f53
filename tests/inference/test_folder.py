"""A saved pipeline: read again it draws the same; diffusers finds the prior in it; what it cannot hold is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig

from drawing import PLAIN, PROMPT, make, seeded
from moa_train.checkpoint import load_personalized
from moa_train.conditioning.encoders import build_image_encoder
from moa_train.inference.pipeline import MoAPipeline
from moa_train.model.unet import personalized_state_dict, remove_moa


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def made(prior_folder, weights):
    pipe = quiet(MoAPipeline.from_pretrained(prior_folder, weights))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    return pipe


def test_a_saved_pipeline_draws_the_same_pictures_bit_for_bit(made, weights, photo, tmp_path, caplog):
    made.subject_background = "grey"
    before = [make(made, PROMPT, [photo]), make(made, PLAIN)]
    made.save_pretrained(tmp_path / "saved")
    assert np.array_equal(make(made, PROMPT, [photo]), before[0])  # saving takes nothing away
    loaded = quiet(MoAPipeline.from_pretrained(tmp_path / "saved"))
    loaded.subject_background = "grey"
    assert not caplog.records
    assert type(loaded.scheduler) is DPMSolverMultistepScheduler
    assert loaded.scheduler.config.use_karras_sigmas
    for expected, image in zip(before, [make(loaded, PROMPT, [photo]), make(loaded, PLAIN)], strict=True):
        assert np.array_equal(image, expected)
    assert load_personalized(tmp_path / "saved" / "personalized.safetensors")[1]["step"] == 7
    other = quiet(MoAPipeline.from_pretrained(tmp_path / "saved", weights))  # weights given: as from any prior
    assert type(other.scheduler).__name__ == "UniPCMultistepScheduler"


def test_diffusers_finds_the_plain_prior_in_a_saved_pipeline(made, prior_folder, tmp_path):
    made.save_pretrained(tmp_path)
    plain = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    assert np.array_equal(plain(PLAIN, generator=seeded(0), **options).images, make(made, PLAIN))
    reference = StableDiffusionPipeline.from_pretrained(prior_folder, safety_checker=None)
    for name in ("unet", "vae", "text_encoder"):
        states = [getattr(pipe, name).state_dict() for pipe in (plain, reference)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_half_precision_and_a_pipeline_of_no_file_are_saved_as_they_are(pipe, photo, tmp_path):
    half = pipe.to(torch.float16)
    half.scheduler = EulerDiscreteScheduler.from_config(half.scheduler.config)
    half.subject_background = "grey"
    half.save_pretrained(tmp_path)
    loaded = MoAPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert loaded.subject_background == "grey"
    for part in ("unet", "image_encoder", "vae", "text_encoder"):
        states = [getattr(each, part).state_dict() for each in (half, loaded)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), part


def test_a_tuned_image_encoder_comes_back_with_its_tuned_layers(prior_folder, made, tmp_path):
    folder = str(prior_folder / "image_encoder")
    tuned = build_image_encoder(folder, trainable_layers=1)
    with torch.no_grad():
        for value in tuned.trained_state_dict().values():
            value.mul_(1.5)
    made.register_modules(image_encoder=tuned.requires_grad_(False))
    made.provenance = {
        **made.provenance,
        "config": {"image_encoder": {"name": folder, "pretrained": None, "trainable_layers": 1}},
    }
    made.save_pretrained(tmp_path)
    state, _ = load_personalized(tmp_path / "personalized.safetensors")
    names = {name.removeprefix("image_encoder.") for name in state if name.startswith("image_encoder.")}
    assert names == tuned.trained_state_dict().keys() != set()
    loaded = MoAPipeline.from_pretrained(tmp_path).image_encoder.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in tuned.state_dict().items())


def test_a_pipeline_without_moa_is_saved_as_the_prior(pipe, tmp_path):
    remove_moa(pipe.unet)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "personalized.safetensors").exists()
    assert np.array_equal(make(quiet(MoAPipeline.from_pretrained(tmp_path)), PLAIN).shape, (1, 16, 16, 3))


def test_another_checkpoint_of_the_architecture_under_the_same_personalized_weights(made, weights, photo, tmp_path):
    """A community checkpoint: its pictures where no subject is, its style around the subject, the same experts."""
    other = tmp_path / "other"
    made.save_pretrained(other)
    (other / "personalized.safetensors").unlink()
    unet = UNet2DConditionModel.from_pretrained(other / "unet")
    with torch.no_grad():
        for value in unet.parameters():
            value.mul_(1.1)
    unet.save_pretrained(other / "unet")
    swapped = quiet(MoAPipeline.from_pretrained(other, weights))
    plain = quiet(StableDiffusionPipeline.from_pretrained(other, safety_checker=None))
    plain.scheduler = swapped.scheduler
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    assert np.array_equal(make(swapped, PLAIN), plain(PLAIN, generator=seeded(0), **options).images)
    made.scheduler = swapped.scheduler
    assert not np.array_equal(make(swapped, PROMPT, [photo]), make(made, PROMPT, [photo]))
    own, before = (personalized_state_dict(pipe.unet) for pipe in (swapped, made))
    assert all(torch.equal(value, before[name]) for name, value in own.items())


def test_what_a_folder_cannot_hold_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="takes a folder alone, not push_to_hub"):
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="the unet carries a LoRA"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert personalized_state_dict(pipe.unet)
