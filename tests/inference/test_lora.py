"""A LoRA of the prior: it reaches every picture, leaves the experts alone, and what does not fit is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from moa_train.inference.lora import adapted_layers, load_lora
from moa_train.model.unet import personalized_state_dict
from moa_train.prior.load import load_prior


@pytest.fixture(scope="module")
def lora(prior_folder, tmp_path_factory):
    """A random LoRA of the tiny prior, in a file as diffusers' training scripts write it."""
    unet = load_prior(str(prior_folder)).unet
    torch.manual_seed(0)
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
    )
    folder = tmp_path_factory.mktemp("lora")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def made(pipe, prompt="a man <1> at sea", subjects=()):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    return pipe(prompt, subjects, generator=generator, **options).images


def test_it_changes_pictures_with_and_without_subject_by_its_scale_and_no_expert(pipe, lora, photo):
    experts = {name: value.clone() for name, value in personalized_state_dict(pipe.unet).items()}
    before, prior = made(pipe, subjects=[photo]), made(pipe, "a man")
    load_lora(pipe, lora)
    assert np.abs(made(pipe, subjects=[photo]) - before).max() > 1e-3
    assert np.abs(made(pipe, "a man") - prior).max() > 1e-3
    after = personalized_state_dict(pipe.unet)
    assert after.keys() == experts.keys()
    assert all(torch.equal(after[name], value) for name, value in experts.items())
    assert len(adapted_layers(pipe)) == 3 * 14
    assert not any("processor" in name for name in adapted_layers(pipe))


def test_scale_0_is_the_picture_without_it(pipe, lora, photo):
    before = made(pipe, subjects=[photo])
    load_lora(pipe, lora, scale=0.0)
    assert np.abs(made(pipe, subjects=[photo]) - before).max() < 1e-5


def test_unloaded_again_every_picture_is_what_it_was_bit_for_bit(pipe, lora, photo):
    before = made(pipe, subjects=[photo]), made(pipe, "a man")
    load_lora(pipe, lora)
    assert not np.array_equal(made(pipe, "a man"), before[1])
    pipe.unload_lora_weights()
    assert not adapted_layers(pipe)
    assert np.array_equal(made(pipe, subjects=[photo]), before[0])
    assert np.array_equal(made(pipe, "a man"), before[1])


def renamed(state):
    return {name.replace("mid_block", "nowhere"): value for name, value in state.items()}


def widened(state):
    return {name: torch.cat([value, value], dim=1) for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "of another architecture than this prior, which has no unet.nowhere"),
        (widened, "of another architecture than this prior: size mismatch"),
        (lambda state: {"unet.weight": torch.ones(2)}, "holds no LoRA: none of its 1 tensors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(pipe, lora, tmp_path, change, message):
    path = tmp_path / "other.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(lora)).items()}, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(pipe, path)
    assert len(str(caught.value)) < 400


def test_what_is_no_safetensors_file_is_refused(pipe, lora, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_lora(pipe, tmp_path / "none.safetensors")
    (tmp_path / "style.bin").write_bytes(lora.read_bytes())
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_lora(pipe, tmp_path / "style.bin")
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_lora(pipe, tmp_path / "cut.safetensors")


@pytest.mark.slow
def test_the_toy_lora_is_trained_applied_and_measured(tmp_path):
    """After two steps its effect is small: style is told by its own scale, 0 without and 1 drawn over."""
    script = Path(__file__).parents[2] / "scripts" / "toy_lora.py"
    few = [
        "--steps",
        "2",
        "--rate",
        "1e-2",
        "--scenes",
        "8",
        "--batch",
        "2",
        "--people",
        "4",
        "--contexts",
        "1",
        "--sampler-steps",
        "2",
    ]
    subprocess.run([sys.executable, script, *few, "--out", tmp_path], check=True, capture_output=True)
    without, half, full, drawn = json.loads((tmp_path / "figures.json").read_text()).values()
    assert (without["style"], drawn["style"]) == (0.0, 1.0)
    assert 0 < abs(half["style"]) < 0.1
    assert 0 < abs(full["style"]) < 0.1
    assert drawn["identity"] != without["identity"]
