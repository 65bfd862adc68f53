"""Every ablation of docs/ablations.md is one override that trains, exports and generates."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from moa_train.cli.train import run
from moa_train.inference.pipeline import MoAPipeline
from moa_train.training.export import export_checkpoint
from tiny import load

# diffusers' UniPC, with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PAGE = Path(__file__).parents[2] / "docs" / "ablations.md"
OVERRIDES = re.findall(r"^\|[^|]*\| `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE)


def test_the_page_names_every_ablation_that_the_configs_offer():
    assert len(OVERRIDES) >= 14
    assert len(set(OVERRIDES)) == len(OVERRIDES)


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_ablation_trains_exports_and_generates(world, tmp_path, override):
    run_dir = tmp_path / "run"
    changed, value = override.split("=", 1)
    run(world.compose(world.overrides("max_steps=1", f"run_dir={run_dir}", "validate_every=null", override)))
    config = load(run_dir)["moa_train"]["config"]
    for key in changed.split("."):
        config = config[key]
    assert str(config).replace("'", "").replace(" ", "").lower() == value.replace(" ", "")
    out = tmp_path / "personalized.safetensors"
    export_checkpoint(run_dir / "checkpoints" / "last.ckpt", out, "float32")
    pipe = MoAPipeline.from_pretrained(world.folder / "prior", out)
    pipe.set_progress_bar_config(disable=True)
    photo = Image.effect_noise((32, 32), 90).convert("RGB"), torch.ones(32, 32).numpy()
    picture = pipe("a man <1> at sea", [photo], num_inference_steps=1, height=16, width=16, output_type="pt").images
    assert picture.isfinite().all()
