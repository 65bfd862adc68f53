"""Files of weights that a command cannot use are refused in one line that says what to do."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import tiny
from calling import call, refused
from moa_train.checkpoint import export_personalized, load_personalized
from moa_train.cli import generate
from moa_train.model.unet import MoAConfig, add_moa, personalized_state_dict
from moa_train.prior.load import load_prior

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@dataclass(frozen=True)
class World:
    """A prior, weights for it, a prior of another architecture, and one of other weights."""

    prior: Path
    weights: Path
    wider: Path
    other: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    prior = load_prior(str(tiny.save_prior(folder / "prior")))
    add_moa(prior.unet, MoAConfig(prior.image_encoder.dim, sinusoids=8))
    metadata = {"moa": prior.unet.moa.config.to_dict(), "prior": prior.identity, "step": 0}
    export_personalized(folder / "weights.safetensors", personalized_state_dict(prior.unet), metadata)
    other = tiny.save_prior(folder / "other", seed=1)
    wider = tiny.save_prior(folder / "wider")
    config = {**UNet2DConditionModel.load_config(wider, subfolder="unet"), "block_out_channels": (16, 24)}
    UNet2DConditionModel.from_config(config).save_pretrained(wider / "unet")
    return World(folder / "prior", folder / "weights.safetensors", wider, other)


def arguments(world, out, weights=None, prior=None):
    return [
        f"prior={prior or world.prior}", f"weights={weights or world.weights}", "prompt='the sea'", "steps=1",
        "seeds=[0]", "device=cpu", "progress=false", f"out={out}",
    ]  # fmt: skip


def spoilt(world, folder, how) -> Path:
    """The weights with one thing wrong."""
    path = folder / f"{how.replace(' ', '_')}.safetensors"
    state, metadata = load_personalized(world.weights)
    if how == "truncated":
        path.write_bytes(world.weights.read_bytes()[:-10])
    elif how == "pickle":
        path.write_bytes(pickle.dumps(state))
    elif how == "torch file":
        torch.save(state, path)
    elif how == "missing key":
        export_personalized(path, {name: value for name, value in state.items() if name != min(state)}, metadata)
    elif how == "extra key":
        export_personalized(path, {**state, "zzz.weight": torch.zeros(1)}, metadata)
    elif how == "other shape":
        export_personalized(path, {**state, min(state): state[min(state)][:1]}, metadata)
    elif how == "newer settings":
        export_personalized(path, state, {**metadata, "moa": {**metadata["moa"], "experts": 3}})
    return path


TOLD = {
    "truncated": "not a whole safetensors file",
    "pickle": "moa-export ckpt=",
    "torch file": "moa-export ckpt=",
    "missing key": "lack 1 tensors, such as down_blocks",
    "extra key": "have unknown 1 tensors, such as zzz.weight",
    "other shape": "other architecture or config",
    "newer settings": "settings of moa that this version does not know",
}


@pytest.mark.parametrize("how", TOLD)
def test_a_spoilt_file_is_named_with_what_to_do(world, tmp_path, monkeypatch, capfd, how):
    path = spoilt(world, tmp_path, how)
    told = refused(generate.main, monkeypatch, capfd, *arguments(world, tmp_path / "out", path))
    assert TOLD[how] in told
    assert path.name in told
    assert not (tmp_path / "out").exists()


def test_weights_on_a_prior_of_another_architecture_are_refused(world, tmp_path, monkeypatch, capfd):
    told = refused(generate.main, monkeypatch, capfd, *arguments(world, tmp_path / "out", prior=world.wider))
    assert f"was trained on the prior {world.prior} and does not fit {world.wider}" in told
    assert "other architecture" in told


def test_weights_on_a_prior_of_other_weights_are_used_with_a_warning(world, tmp_path, monkeypatch, capsys):
    assert call(generate.main, monkeypatch, *arguments(world, tmp_path / "first")) == 0
    assert "expect another style" not in capsys.readouterr().out
    assert call(generate.main, monkeypatch, *arguments(world, tmp_path / "second", prior=world.other)) == 0
    told = capsys.readouterr().out
    assert f"trained on the prior {world.prior} and are used on {world.other}: expect another style" in told
