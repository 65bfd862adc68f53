"""The pages of moa-generate's tasks: their commands are sound, and their pictures were made by them."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from moa_train.cli.generate import TASKS, chosen_task
from moa_train.cli.overrides import read_arguments
from moa_train.cli.paths import config_dir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "tasks" / f"{task}.md" for task in TASKS if task != "generate"]


def commands(page):
    """The moa-generate commands of a page, lines that end in a backslash joined."""
    return re.findall(r"^    (moa-generate .*)$", page.read_text().replace("\\\n", " "), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pictures_of_a_page_were_made_by_its_command(page):
    assert commands(page)
    for command in commands(page):
        arguments = shlex.split(command)[1:]
        read_arguments(arguments, config_dir(), "generate")
        given = dict(argument.split("=", 1) for argument in arguments)
        chosen_task({"frames": None, "input": None, "input_mask": None, **given})
        for target in re.findall(r"\]\((\.\./images/[^)]+)\)", page.read_text()):
            with Image.open(page.parent / target) as picture:
                told = json.loads(picture.info["comment"]) if target.endswith(".gif") else dict(picture.text)
            assert told["task"] == given["task"] == page.stem
            assert told["prompt"] == given["prompt"]
            assert len(told["weights"]) == 64
            for name in {"seeds", "guidance", "steps", "frames"} & given.keys():
                value = told[name] if isinstance(told[name], str) else json.dumps(told[name])  # of a PNG, or of a GIF
                assert json.loads(value) == json.loads(given[name])


def test_every_picture_of_moa_generate_names_the_prior_and_its_hashes():
    told = []
    for path in (ROOT / "docs" / "images").glob("*.png"):
        with Image.open(path) as picture:
            told.append(picture.info)
    priors = [json.loads(info["prior"]) for info in told if "task" in info]
    assert len(priors) >= 13
    for prior in priors:
        assert prior == priors[0]
        assert prior["name"] == "toy"
        assert len(prior["weights"]) == len(prior["config"]) == 16


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
