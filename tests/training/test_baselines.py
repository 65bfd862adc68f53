"""Baselines in the same trainer: chosen by one override, exported and used for generation like MoA."""

import pytest
import torch
from PIL import Image

from moa_train.cli.train import build_module, run
from moa_train.inference.pipeline import MoAPipeline
from moa_train.training.export import export_checkpoint
from tiny import load

# diffusers' UniPC, with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def settings(world, name, *more):
    """The settings of a quick run with `model=name`."""
    chosen = [each for each in world.overrides(f"model={name}", *more) if not each.startswith("model.sinusoids")]
    return chosen if name in ("fastcomposer", "ip_adapter") else [*chosen, "model.sinusoids=8"]


@pytest.fixture(scope="module", params=["fastcomposer", "ip_adapter", "finetune"])
def baseline(request, world, tmp_path_factory):
    """Name of a baseline and the folder of a run of it: two steps, validation and pictures at the end."""
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    pictures = (
        "callbacks.samples={_target_: moa_train.training.callbacks.samples.SamplePictures, _partial_: true, "
        "directory: ${run_dir}, every_n_steps: 2, number: 1, steps: 2, guidance: 2.0, seed: 0}"
    )
    overrides = settings(world, request.param, "max_steps=2", f"run_dir={run_dir}", "validate_every=2", pictures)
    run(world.compose(overrides))
    return request.param, run_dir


def test_a_baseline_is_trained_exported_and_generates(world, baseline, tmp_path):
    name, run_dir = baseline
    assert load(run_dir)["moa_train"]["method"] == name
    assert "val/identity_gap" in (run_dir / "metrics.csv").read_text().splitlines()[0]
    assert (run_dir / "samples" / "step=000002.png").exists()
    assert not (run_dir / "routing").exists()  # there is no router
    out = tmp_path / "personalized.safetensors"
    export_checkpoint(run_dir / "checkpoints" / "last.ckpt", out, "float32")
    photo = Image.effect_noise((32, 32), 90).convert("RGB"), torch.ones(32, 32).numpy()
    pipe = MoAPipeline.from_pretrained(world.folder / "prior", out)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt, subjects, **control):
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        return pipe(prompt, subjects=subjects, height=16, width=16, **options, **control).images

    given = draw("a man <1> at sea", [photo])
    assert pipe.routing is None
    assert given.isfinite().all()
    text = draw("a man at sea", [])
    assert not torch.equal(given, text)
    assert torch.equal(draw("a man <1> at sea", [photo], subject_start=1.0), text)
    for control in ({"subject_strength": 0.5}, {"separate_subjects": True}):
        with pytest.raises(ValueError, match=f"{name}, which has no router"):
            draw("a man <1> at sea", [photo], **control)


def test_each_baseline_brings_its_own_losses_and_the_command_line_still_has_the_last_word(world):
    given = {name: world.compose(settings(world, name)).loss for name in ("fastcomposer", "ip_adapter", "finetune")}
    assert (given["fastcomposer"].mask_probability, given["fastcomposer"].masked_mean) == (0.5, "picture")
    assert (given["ip_adapter"].mask_probability, given["ip_adapter"].object.weight) == (0.0, 0.0)
    assert given["finetune"].masked_mean == "mask"
    assert world.compose(settings(world, "ip_adapter", "loss.mask_probability=0.25")).loss.mask_probability == 0.25


@pytest.mark.parametrize(("name", "whole"), [("fastcomposer", True), ("finetune", True), ("ip_adapter", False)])
def test_a_baseline_trains_the_whole_u_net_or_what_it_added(world, name, whole):
    _, module = build_module(world.compose(settings(world, name)))
    trained = module.trained_parameters()
    plain = {each for each in trained if ".processor." not in each and ".unet.moa." not in each}
    assert bool(plain) == whole
    assert any("conv_in" in each for each in trained) == whole
