"""docs/format.md: its reader, which knows nothing of this package, draws what this package draws."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from moa_train.checkpoint import export_personalized
from moa_train.inference.pipeline import MoAPipeline
from moa_train.prompts import parse_prompt

DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
(READER,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
PROMPT = "a man <2>, a dog <1> and a boy <2> at sea"

# diffusers' UniPC scheduler calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def read_and_draw(folder, prior, weights, subjects):
    """The picture of the reader, run where `import moa_train` fails."""
    program = f"import sys\nsys.modules['moa_train'] = None\n{READER}"
    command = [sys.executable, "-c", program, prior, weights, folder / "read.png", PROMPT, *subjects]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "read.png") as picture:
        return np.asarray(picture, dtype=int)


def draw(prior, weights, prompt, subjects):
    pipe = MoAPipeline.from_pretrained(prior, weights)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(prompt, subjects, 25, 5.0, generator=torch.Generator().manual_seed(0))
    return np.asarray(made.images[0], dtype=int)


def test_the_reader_draws_the_picture_of_the_pipeline(prior_folder, weights, tmp_path):
    subjects = [np.random.default_rng(n).integers(0, 255, (8, 8, 3), dtype=np.uint8) for n in range(2)]
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for path, subject in zip(paths, subjects, strict=True):
        Image.fromarray(subject).save(path)
    cut_out = [torch.from_numpy(subject).permute(2, 0, 1) / 255 for subject in subjects]
    ours = draw(prior_folder, weights, PROMPT, cut_out)
    assert np.abs(ours - draw(prior_folder, weights, parse_prompt(PROMPT).text, [])).max() > 20, "they have to matter"
    assert np.abs(read_and_draw(tmp_path, prior_folder, weights, paths) - ours).max() <= 1


def test_the_reader_is_one_short_file_that_never_names_this_package():
    assert len([line for line in READER.splitlines() if line.strip()]) <= 60
    imports = [line for line in READER.splitlines() if re.match(r"(import|from) ", line)]
    assert imports
    assert not any("moa_train" in line for line in imports)


def test_every_key_of_the_metadata_and_every_tensor_is_described(weights):
    with safe_open(weights, "np") as file:
        metadata = json.loads(file.metadata()["moa_train"])
    table = set(re.findall(r"`(\w+)`", DOC[DOC.index("## Metadata") : DOC.index("Nothing private")]))
    assert metadata.keys() <= table
    patterns = [
        r".*\.processor\.(query|key|value|output)\.(weight|bias)",
        r".*\.processor\.router\.layers\.[013]\.(weight|bias)",
        r"moa\.tokens\.timestep_position\.[02]\.(weight|bias)",
        r"moa\.tokens\.layer_position",
        r"moa\.tokens\.fusion\.[013]\.(weight|bias)",
    ]
    assert not [name for name in load_file(weights) if not any(re.fullmatch(each, name) for each in patterns)]


def test_equal_tensors_and_metadata_give_equal_bytes(weights, tmp_path):
    with safe_open(weights, "np") as file:
        metadata = json.loads(file.metadata()["moa_train"])
    export_personalized(tmp_path / "again.safetensors", load_file(weights), metadata)
    assert (tmp_path / "again.safetensors").read_bytes() == weights.read_bytes()
