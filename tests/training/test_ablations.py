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


def trained(world, run_dir, override):
    """The pipeline of one step's weights."""
    run(world.compose(world.overrides("max_steps=1", f"run_dir={run_dir}", "validate_every=null", override)))
    out = run_dir / "personalized.safetensors"
    export_checkpoint(run_dir / "checkpoints" / "last.ckpt", out, "float32")
    pipe = MoAPipeline.from_pretrained(world.folder / "prior", out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt, subjects, **control):
    options = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "pt"}
    return pipe(prompt, subjects, generator=torch.Generator().manual_seed(0), **options, **control).images


def photo():
    return Image.effect_noise((32, 32), 90).convert("RGB"), torch.ones(32, 32).numpy()


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_ablation_trains_exports_and_generates(world, tmp_path, override):
    run_dir = tmp_path / "run"
    changed, value = override.split("=", 1)
    pipe = trained(world, run_dir, override)
    config = load(run_dir)["moa_train"]["config"]
    for key in changed.split("."):
        config = config[key]
    assert str(config).replace("'", "").replace(" ", "").lower() == value.replace(" ", "")
    assert draw(pipe, "a man <1> at sea", [photo()]).isfinite().all()


def test_without_routers_in_cross_attention_only_the_start_controls_the_subject(world, tmp_path):
    pipe = trained(world, tmp_path / "run", "model.cross_attention=false")
    for control in ({"subject_strength": 0.0}, {"routing_override": 0.0}, {"separate_subjects": True}):
        with pytest.raises(ValueError, match="no router in its cross-attention"):
            draw(pipe, "a man <1> at sea", [photo()], **control)
    late = draw(pipe, "a man <1> at sea", [photo()], subject_start=1.0)
    assert torch.equal(late, draw(pipe, "a man at sea", []))
