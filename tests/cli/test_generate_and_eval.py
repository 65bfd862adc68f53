"""`moa-generate` and `moa-eval` from the command line's words to their files."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))

import tiny
from moa_train.checkpoint import export_personalized
from moa_train.cli import evaluate, generate
from moa_train.cli.paths import config_dir
from moa_train.data.sources.toyworld import CONTEXTS, IDENTITY_DIM
from moa_train.model.unet import MoAConfig, add_moa, personalized_state_dict
from moa_train.prior.load import load_prior
from moa_train.prior.probe import Probe, save_probe

# diffusers' UniPC scheduler calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a prior, personalized weights for it, a photo, its mask, and a probe."""
    folder = tmp_path_factory.mktemp("world")
    prior = load_prior(str(tiny.save_prior(folder / "prior")))
    add_moa(prior.unet, MoAConfig(prior.image_encoder.dim, sinusoids=8))
    metadata = {"moa": prior.unet.moa.config.to_dict(), "prior": prior.identity, "step": 0}
    export_personalized(folder / "weights.safetensors", personalized_state_dict(prior.unet), metadata)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / "man.png")
    mask = np.zeros((20, 24), dtype=np.uint8)
    mask[4:16, 6:15] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    torch.manual_seed(0)
    save_probe(Probe(IDENTITY_DIM, CONTEXTS), folder / "probe")
    return folder


def composed(name, world, *overrides):
    common = [f"prior.source={world / 'prior'}", f"weights={world / 'weights.safetensors'}", "steps=2", "device=cpu"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(name, [*common, *overrides])


def test_generate_writes_pictures_that_say_how_they_were_made(world, tmp_path):
    prompt = "prompt='a man <1> at sea'"
    subjects = [f"subjects=[{world / 'man.png'}]", f"masks=[{world / 'mask.png'}]"]
    for out in ("first", "second"):
        generate.run(
            composed("generate", world, prompt, *subjects, "seeds=[3,8]", f"out={tmp_path / out}", "progress=false")
        )
    names = {"seed=3.png", "seed=8.png", "samples.png", "routing.png", "config.yaml"}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    for name in names - {"config.yaml"}:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    with Image.open(tmp_path / "first" / "seed=8.png") as picture:
        assert picture.size == (16, 16)
        assert picture.text["prompt"] == "a man <1> at sea"
        assert picture.text["seed"] == "8"
        assert len(json.loads(picture.text["subjects"])[0]) == len(picture.text["weights"]) == 64


def test_generate_without_subject_takes_the_size_asked_for(world, tmp_path):
    more = ["prompt='the sea'", "seeds=[0]", "size=[32,24]", "weights=null", f"out={tmp_path}", "progress=false"]
    generate.run(composed("generate", world, *more))
    with Image.open(tmp_path / "seed=0.png") as picture:
        assert picture.size == (32, 24)
    assert not (tmp_path / "routing.png").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["masks=[a.png,b.png]", "subjects=[c.png]"], "2 masks were given for 1 subjects"),
        (["seeds=[]"], "seeds is empty"),
        (["size=[8]"], r"size is \[8\]"),
        (["subjects=[none.png]"], "none.png: no such file"),
        (["weights=none.safetensors"], "none.safetensors is not a file"),
    ],
)
def test_generate_names_what_is_wrong(world, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        generate.run(composed("generate", world, "prompt='a man <1>'", f"out={tmp_path}", *overrides))


def test_eval_measures_and_reports(world, tmp_path, capsys):
    more = [f"probe={world / 'probe'}", "people=4", "contexts=1", "seeds=[0,1]", f"out={tmp_path}"]
    evaluate.run(composed("eval", world, *more))
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert {"routing_iou", "identity", "context_difference", "context_accuracy", "seconds"} <= numbers.keys()
    assert numbers["identity"].keys() == {"moa", "prior", "wrong_subject", "real"}
    assert numbers["context_difference"].keys() == {"moa", "other_seed"}
    assert numbers["n"] == {"people": 4, "pictures": 8}
    # MoA before training is the prior.
    assert numbers["context_difference"]["moa"] == pytest.approx(0.0, abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json", "report.md", "samples.png", "routing.png", "eval.yaml"
    }  # fmt: skip
    assert "Did the context stay?" in capsys.readouterr().out


def test_eval_knows_one_benchmark(world):
    with pytest.raises(ValueError, match="there is no benchmark coco"):
        evaluate.run(composed("eval", world, "benchmark=coco"))


@pytest.mark.parametrize("command", [generate, evaluate])
def test_help_shows_every_setting_that_exists(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moa", "--help"])
    command.main()
    shown = capsys.readouterr().out
    name = "generate" if command is generate else "eval"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        keys = set(compose(name))
    mentioned = set(re.findall(r"(?<![\w/])([a-z_]+)=(?!N)", shown))  # seed=N.png is a file
    assert mentioned <= keys, mentioned - keys
