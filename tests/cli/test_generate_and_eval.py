"""`moa-generate` and `moa-eval` from the command line's words to their files."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))

import tiny
from moa_train.baselines.finetune import FinetuneConfig
from moa_train.checkpoint import export_personalized
from moa_train.cli import evaluate, generate
from moa_train.cli.job import Job
from moa_train.cli.paths import config_dir
from moa_train.data.sources.toyworld import CONTEXTS, IDENTITY_DIM
from moa_train.model.unet import MoAConfig, add_moa, install, personalized_state_dict
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
    names = {"seed=3.png", "seed=8.png", "samples.png", "routing.png", "facts.json", "config.yaml"}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    for name in names - {"config.yaml"}:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    with Image.open(tmp_path / "first" / "seed=8.png") as picture:
        assert picture.size == (16, 16)
        assert picture.text["prompt"] == "a man <1> at sea"
        assert picture.text["seed"] == "8"
        assert len(json.loads(picture.text["subjects"])[0]) == len(picture.text["weights"]) == 64
        told = {name: value for name, value in picture.text.items() if name != "seed"}
    facts = json.loads((tmp_path / "first" / "facts.json").read_text())
    assert facts["prior"] == load_prior(str(world / "prior")).identity
    assert told == {name: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for name, v in facts.items()}


def test_generate_without_subject_takes_the_size_asked_for(world, tmp_path):
    more = ["prompt='the sea'", "seeds=[0]", "size=[32,24]", "weights=null", f"out={tmp_path}", "progress=false"]
    generate.run(composed("generate", world, *more))
    with Image.open(tmp_path / "seed=0.png") as picture:
        assert picture.size == (32, 24)
    assert not (tmp_path / "routing.png").exists()


def test_several_photos_of_one_subject_are_an_inner_list(world, tmp_path):
    two = [
        f"subjects=[[{world / 'man.png'},{world / 'man.png'}]]",
        f"masks=[[{world / 'mask.png'},{world / 'mask.png'}]]",
    ]
    one = [f"subjects=[{world / 'man.png'}]", f"masks=[{world / 'mask.png'}]"]
    for name, subjects in (("one", one), ("two", two)):
        more = ["prompt='a man <1> at sea'", "seeds=[0]", f"out={tmp_path / name}", "progress=false"]
        generate.run(composed("generate", world, *subjects, *more))
    with Image.open(tmp_path / "one" / "seed=0.png") as first, Image.open(tmp_path / "two" / "seed=0.png") as second:
        assert np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 1
        assert len(json.loads(second.text["subjects"])[0]) == 2


TASK_FILES = {
    "swap": "swap.png swap.json prior swap-1 swap-2",
    "morph": "morph.png morph.gif morph.json frame=00.png frame=01.png frame=02.png",
    "compose": "compose.png compose.json prior with-1 with-1-2 with-2",
    "invert": "invert.png invert.json input.png reconstruction.png swap-1.png swap-1_free.png swap-2.png "
    "swap-2_free.png",
    "routing": "seed=0.png seed=5.png routing",
}
"""What each task writes besides facts.json and config.yaml; a word without a dot: WORD_seed=0.png, WORD_seed=5.png."""


def files_of(task):
    words = TASK_FILES[task].split()
    return {name for word in words for name in ([word] if "." in word else [f"{word}_seed={s}.png" for s in (0, 5)])}


@pytest.mark.parametrize("task", list(TASK_FILES))
def test_a_task_writes_its_files_and_the_same_command_the_same_bytes(world, tmp_path, task, capsys):
    count = 1 if task == "routing" else 2
    photo, mask = world / "man.png", world / "mask.png"
    prompt = "a man <1> and a dog <2> at sea" if task == "compose" else "a man <1> at sea"
    given = [f"task={task}", f"prompt='{prompt}'", f"subjects={[str(photo)] * count}", f"masks={[str(mask)] * count}"]
    own = {"morph": ["frames=3"], "invert": [f"input={photo}", f"input_mask={mask}"]}.get(task, [])
    for out in ("first", "second"):
        out_and_more = [f"out={tmp_path / out}", "progress=false", "seeds=[0,5]"]
        generate.run(composed("generate", world, *given, *own, *out_and_more))
    assert f"{tmp_path / 'first'}" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == files_of(task) | {"config.yaml", "facts.json"}
    for name in names - {"config.yaml"}:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    for name in names:
        if name.endswith((".png", ".gif")):
            with Image.open(tmp_path / "first" / name) as picture:
                told = picture.text if name.endswith(".png") else json.loads(picture.info["comment"])
                assert (told["task"], told["prompt"]) == (task, prompt)
                assert len(told["weights"]) == 64


def test_control_at_sampling_reaches_the_pipeline_and_the_facts(world, tmp_path):
    subjects = [f"subjects=[{world / 'man.png'}]", f"masks=[{world / 'mask.png'}]", "prompt='a man <1>'", "seeds=[0]"]
    controls = {
        "whole": [],
        "none": ["subject_strength=0"],
        "layer": ["subject_strength={mid_block.*:0.5}"],
        "late": ["subject_start=1"],
        "boxed": ["regions=[[0,0,0.5,1]]", "separate_subjects=true"],
        "forced": [f"routing_override={world / 'mask.png'}"],
    }
    facts, shares = {}, {}
    for name, given in controls.items():
        settings = OmegaConf.to_container(
            composed("generate", world, *subjects, *given, "progress=false"), resolve=True
        )
        job = Job(settings)
        facts[name] = job.facts
        job.pipe(job.prompt, job.subjects, generator=torch.Generator().manual_seed(0), **job.sampling)
        shares[name] = job.pipe.routing.mean[0]
    assert shares["whole"].min() > 0
    assert not shares["none"].any()
    assert not shares["late"].any()
    assert shares["boxed"][:, 6:].max() < 1e-6  # the mean over layers is smoothed
    assert shares["boxed"][:, :4].all()
    assert not torch.equal(shares["layer"], shares["whole"])
    assert shares["forced"].max() > 0.5
    assert shares["forced"][0, 0] < 1e-6
    assert facts["whole"].keys() == facts["none"].keys() - {"subject_strength"}
    assert facts["boxed"]["regions"] == [[0, 0, 0.5, 1]]
    assert len(facts["forced"]["routing_override"]) == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["regions=[none.png]"], "none.png is not a file"),
        (["subject_start=2"], "subject_start is 2"),
        (["masks=[a.png,b.png]", "subjects=[c.png]"], "2 masks were given for 1 subjects"),
        (["seeds=[]"], "seeds is empty"),
        (["seeds=[1,1]"], "each once"),
        (["size=[8]"], r"size is \[8\]"),
        (["subjects=[none.png]"], "none.png is not a file"),
        (["weights=none.safetensors"], "none.safetensors is not a file"),
        (["lora=none.safetensors"], "none.safetensors is not a file"),
        (["task=swop"], "there is no task swop; expected one of generate, swap, .*; did you mean swap"),
        (["task=invert"], "task=invert needs a real picture: give input=photo.png"),
        (["task=swap", "frames=4"], "frames is a setting of task=morph, this is task=swap"),
        (["task=invert", "input=none.png"], "none.png is not a file"),
        (["task=swap"], "marks 1 subjects and 0 were given"),
        (["task=morph"], "give two for each marker"),
        (["task=compose"], "marks 1 subjects and 0 were given"),
        (["task=compose", "regions=[[0,0,1,1]]"], "task=compose takes no regions"),
        (["task=routing", "prompt='the sea'"], "so nothing is routed"),
    ],
)
def test_generate_names_what_is_wrong(world, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        generate.run(composed("generate", world, "prompt='a man <1>'", f"out={tmp_path}", *overrides))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "prompt", "count", "message"),
    [
        ("generate", "a man <1>", 2, "marks 1 subjects and 2 were given"),
        ("generate", "a man <1> and a dog <2>", 1, "marks 2 subjects and 1 were given"),
        ("routing", "a man <1>", 2, "marks 1 subjects and 2 were given"),
        ("swap", "a man <1> and a dog <2>", 3, "marks 2 subjects and 3 were given"),
        ("compose", "a man <1>", 2, "marks 1 subjects and 2 were given"),
        ("morph", "a man <1>", 1, "marks 1 subjects and 1 were given"),
        ("invert", "a man", 1, "marks no subject"),
    ],
)
def test_a_wrong_number_of_subjects_is_refused_before_the_prior_is_looked_for(world, task, prompt, count, message):
    given = [f"task={task}", f"prompt='{prompt}'", f"subjects={[str(world / 'man.png')] * count}"]
    own = [f"input={world / 'man.png'}"] if task == "invert" else []
    with pytest.raises(ValueError, match=message):
        generate.run(composed("generate", world, *given, *own, "prior.source=/nowhere"))


def test_every_task_of_the_help_is_there_and_every_task_is_in_the_help():
    assert set(re.findall(r"^  task=(\w+)", generate.HELP, flags=re.MULTILINE)) == generate.TASKS.keys()


def test_eval_measures_and_reports(world, tmp_path, capsys):
    more = [f"probe={world / 'probe'}", "people=4", "contexts=1", "seeds=[0,1]", f"out={tmp_path}"]
    evaluate.run(composed("eval", world, *more))
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert {"routing_iou", "identity", "context_difference", "context_accuracy", "seconds"} <= numbers.keys()
    assert numbers["identity"].keys() == {"moa", "prior", "wrong_subject", "real"}
    assert numbers["context_difference"].keys() == numbers["context_ssim"].keys()
    assert numbers["context_difference"].keys() == {"moa", "other_subject", "other_seed"}
    assert numbers["seconds_per_picture"].keys() == {"moa", "prior", "pairs"}
    assert numbers["frechet"].keys() == {"moa", "real"}
    assert numbers["memory"]["resident_gigabytes"] > 0.1
    assert 0.0 <= numbers["pairs_found"]["moa"] <= 1.0
    assert numbers["rank1"].keys() == {"moa", "prior", "real", "chance"}
    assert numbers["n"] == {"people": 4, "pictures": 8}
    # MoA before training is the prior.
    assert numbers["context_difference"]["moa"] == pytest.approx(0.0, abs=1e-4)
    assert numbers["context_ssim"]["moa"] == pytest.approx(1.0, abs=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json", "report.md", "samples.png", "routing.png", "eval.yaml", "pictures"
    }  # fmt: skip
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4 + 4 * 2 + 2 * 2  # photos, MoA's, the prior's
    assert "Did the context stay?" in capsys.readouterr().out


@pytest.mark.parametrize("command", [generate, evaluate])
def test_help_shows_every_setting_that_exists(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moa", "--help"])
    command.main()
    shown = capsys.readouterr().out
    name = "generate" if command is generate else "eval"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        keys = set(compose(name)) | (set(compose(name, ["benchmark=fastcomposer"])) if name == "eval" else set())
    mentioned = set(re.findall(r"(?<![\w/.])([a-z_]+)(?:\.[a-z_]+)?=(?!N)", shown))  # seed=N.png is a file
    assert mentioned <= keys, mentioned - keys


def test_a_method_that_changed_the_prior_is_compared_with_the_prior_as_it_was(world, tmp_path):
    prior = load_prior(str(world / "prior"))
    install(prior.unet, FinetuneConfig(prior.image_encoder.dim, sinusoids=8))
    with torch.no_grad():
        prior.unet.conv_out.bias += 1.0
    metadata = {"method": "finetune", "moa": prior.unet.moa.config.to_dict(), "prior": prior.identity, "step": 0}
    export_personalized(tmp_path / "tuned.safetensors", personalized_state_dict(prior.unet), metadata)
    quick = [f"probe={world / 'probe'}", "people=4", "contexts=1", "seeds=[0,1]", "pairs=0"]
    for name, weights in (("moa", world / "weights.safetensors"), ("tuned", tmp_path / "tuned.safetensors")):
        evaluate.run(composed("eval", world, *quick, f"weights={weights}", f"out={tmp_path / name}"))
    drawn = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name / "pictures").glob("*-*-*.png")}
        for name in ("moa", "tuned")
    }
    same = {name for name in drawn["moa"] if drawn["moa"][name] == drawn["tuned"][name]}
    assert same == {f"prior-{noun}-0-{seed}.png" for noun in range(2) for seed in range(2)}
