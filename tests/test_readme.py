"""Every command of the README runs, in the order of the README, in one folder, at the smallest size."""

import logging
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastcomposer_layout
from moa_train.cli import data, evaluate, export, generate, train
from moa_train.data.sources.toyworld import draw_portrait, identity

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^    (moa-[a-z].*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
MAINS = {
    "moa-data": data.main,
    "moa-train": train.main,
    "moa-export": export.main,
    "moa-generate": generate.main,
    "moa-eval": evaluate.main,
}

SMALL = ["data.batch_size=2", "data.num_workers=0", "validate_every=null", "callbacks.samples=null"]
RANDOM = ["prior=toy", "image_encoder=toy", "trainer=cpu", "trainer.accumulate_grad_batches=1", "data.resolution=64"]
SMALLER = {
    "moa-data toy": ["train=12", "validation=4", "test=0"],
    "moa-data show": ["count=2"],
    "moa-data subjects": ["count=2"],
    "moa-data photos": [],
    "moa-data fastcomposer": ["workers=0"],
    "moa-data validate": [],
    "moa-data latents": ["prior=toy", "resolution=64"],
    "moa-train": [*SMALL, "max_steps=1"],
    "moa-train experiment=ffhq_sd15": [*SMALL, *RANDOM, "max_steps=1", "gradient_checkpointing=false"],
    "moa-train plan": [*SMALL, "plan_steps=0"],
    "moa-train -m": [*SMALL, "max_steps=1"],
    "moa-train ckpt=last": [*SMALL, "max_steps=2"],
    "moa-export": [],
    "moa-generate": ["steps=2", "seeds=[0]"],
    "moa-eval collect": [],
    "moa-eval": ["steps=2", "people=4", "contexts=1"],
}
"""By the start of a command: what makes it small enough for a test. The longest start that fits is taken."""


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command)
    start = max((start for start in SMALLER if command.startswith(start)), key=len)
    given = {argument.partition("=")[0] for argument in SMALLER[start]}
    kept = [argument for argument in arguments if argument.partition("=")[0] not in given]
    monkeypatch.setattr(sys, "argv", [program, *kept, *SMALLER[start]])
    handlers = logging.root.handlers[:]
    code = None
    try:
        MAINS[program]()
    except SystemExit as end:
        code = end.code
    finally:
        logging.root.handlers[:] = handlers
    assert not code, f"{command} ended with {code}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning's advice on loaders and of diffusers' schedulers
def test_every_command_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, mask = draw_portrait(np.random.default_rng(0), identity("test", 0), 64)
    for name in ("man.png", "other.png"):
        Image.fromarray(np.dstack([image, 255 * mask])).save(name)
    Path("photos").mkdir()
    for number in range(4):  # with masks beside them, since the cascade knows no cartoon faces
        image, mask = draw_portrait(np.random.default_rng(number), identity("train", number), 96)
        Image.fromarray(image).save(f"photos/{number}.png")
        Image.fromarray(255 * mask).save(f"photos/{number}.mask.png")
    pictures = {f"{number:08d}": fastcomposer_layout.picture(number) for number in range(4)}
    files = fastcomposer_layout.layout(pictures, sorted(pictures)[:3], sorted(pictures)[3:])
    fastcomposer_layout.write_tar(files, "ffhq_wild_files.tar")
    assert {shlex.split(command)[0] for command in COMMANDS} == MAINS.keys()
    for command in COMMANDS:
        run(command, monkeypatch)
    assert Path("personalized.safetensors").is_file()
    assert Path("card/README.md").is_file()
    assert Path("outputs/generate/control.png").is_file()
    assert Path("outputs/swap/swap.png").is_file()
    assert Path("outputs/eval/metrics.json").is_file()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, mask = draw_portrait(np.random.default_rng(0), identity("test", 0), 64)
    Image.fromarray(np.dstack([image, 255 * mask])).save("man.png")
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    example = example.replace('weights="personalized.safetensors"', 'weights="toy"')
    example = example.replace("guidance_scale=3.0", "guidance_scale=3.0, num_inference_steps=2")
    namespace: dict = {}
    exec(compile(example, "README", "exec"), namespace)
    assert namespace["image"].size == (64, 64)
    assert namespace["pipe"].routing.mean.shape == (1, 16, 16)


def test_every_picture_and_page_that_it_names_is_there():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (root / target).exists(), target
