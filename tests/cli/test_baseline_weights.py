"""`moa-generate` with weights of a baseline: all that needs no router works, and the rest is refused by name."""

import json

import numpy as np
import pytest
from PIL import Image

import tiny
from calling import call, refused
from moa_train.baselines.fastcomposer import FastComposerConfig
from moa_train.baselines.ip_adapter import IPAdapterConfig
from moa_train.checkpoint import export_personalized, load_personalized
from moa_train.cli import generate
from moa_train.model.unet import install, personalized_state_dict
from moa_train.prior.load import load_prior

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module", params=[FastComposerConfig, IPAdapterConfig], ids=lambda kind: kind.name)
def world(request, tmp_path_factory):
    """A prior, weights of a baseline for it, and two photos with an alpha channel."""
    folder = tmp_path_factory.mktemp("world")
    prior = load_prior(str(tiny.save_prior(folder / "prior")))
    method = request.param(prior.image_encoder.dim)
    install(prior.unet, method)
    metadata = {"moa": method.to_dict(), "method": method.name, "prior": prior.identity, "step": 0}
    export_personalized(folder / "weights.safetensors", personalized_state_dict(prior.unet), metadata)
    for person in range(2):
        photo = np.random.default_rng(person).integers(0, 255, (20, 20, 4), dtype=np.uint8)
        photo[..., 3] = 0
        photo[4:16, 6:15, 3] = 255
        Image.fromarray(photo).save(folder / f"{person}.png")
    return folder


def arguments(world, out, task, prompt, *more):
    return [
        f"task={task}", f"prior={world / 'prior'}", f"weights={world / 'weights.safetensors'}", f"prompt='{prompt}'",
        f"subjects=[{world / '0.png'},{world / '1.png'}]", "steps=1", "seeds=[0]", "device=cpu", "progress=false",
        f"out={out}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["swap", "compose", "morph"])
def test_edits_are_measured_on_the_whole_picture(world, tmp_path, monkeypatch, capsys, task):
    prompt = "a man <1> and a dog <2>" if task == "compose" else "a man <1>"
    more = ["frames=2"] if task == "morph" else []
    assert call(generate.main, monkeypatch, *arguments(world, tmp_path, task, prompt, *more)) == 0
    told = json.loads((tmp_path / f"{task}.json").read_text())
    found = told["from_first_to_last"] if task == "morph" else told["rows"][0]["by_seed"]["0"]
    if task == "morph":
        first, second = "frame=00.png", "frame=01.png"
        assert told["region_share"] == 1.0
    else:
        first, second = "prior_seed=0.png", f"{told['rows'][0]['name']}_seed=0.png"
        assert told["region_share"] == {"0": 1.0}
        assert "in the whole picture (no router tells" in capsys.readouterr().out
    images = [np.asarray(Image.open(tmp_path / name), dtype=float) / 255 for name in (first, second)]
    assert found["subject"] == pytest.approx(np.square(images[0] - images[1]).mean(), abs=1e-5)
    assert found["background"] is None


def test_a_figure_of_the_routing_is_refused_by_the_method_s_name(world, tmp_path, monkeypatch, capfd):
    given = arguments(world, tmp_path / "out", "routing", "a man <1>", f"subjects=[{world / '0.png'}]")
    told = refused(generate.main, monkeypatch, capfd, *given)
    assert "which has no router for task=routing to show: give weights of moa" in told
    assert f"of {load_personalized(world / 'weights.safetensors')[1]['method']}," in told
    assert not (tmp_path / "out").exists()
