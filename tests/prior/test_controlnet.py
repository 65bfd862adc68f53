"""Control by edges: maps, agreement, training that goes on where it was cut off, pictures that follow an outline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file

import tiny
from calling import call, refused
from moa_train.cli import controlnet as command
from moa_train.cli import generate
from moa_train.data.sources.toyworld import CONTEXTS
from moa_train.inference.pipeline import MoAControlNetPipeline, MoAPipeline
from moa_train.prior.controlnet import control_map, edge_agreement, edge_map, load_controlnet, new_controlnet
from moa_train.prior.load import load_prior, weights_fingerprint
from moa_train.prior.pretrain.controlnet import ControlNetStage
from moa_train.prior.pretrain.scenes import draw_scene_set

# Lightning's advice on loaders and its own deprecations; diffusers' UniPC calls numpy in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


# ---------------------------------------------------------------------------------------------------------------- edges
def test_the_edges_of_a_rectangle_lie_along_its_sides():
    picture = np.zeros((40, 40, 3), dtype=np.uint8)
    picture[10:30, 8:32] = 255
    rows, columns = np.nonzero(edge_map(picture))
    on_side = (abs(rows - 9.5) <= 1) | (abs(rows - 29.5) <= 1) | (abs(columns - 7.5) <= 1) | (abs(columns - 31.5) <= 1)
    assert len(rows) >= 80
    assert on_side.all()
    assert not edge_map(np.full((40, 40, 3), 90, dtype=np.uint8)).any()


def naive_agreement(drawn, control, tolerance):
    """Every pixel against every other."""

    def share(edges, others):
        near = [
            any(max(abs(y - v), abs(x - u)) <= tolerance for v, u in np.argwhere(others)) for y, x in np.argwhere(edges)
        ]
        return sum(near) / len(near)

    return share(drawn, control), share(control, drawn)


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_agreement_equals_a_search_over_all_pairs_of_pixels(tolerance):
    rng = np.random.default_rng(tolerance)
    drawn, control = ((rng.random((12, 15)) < 0.1).astype(np.uint8) * 255 for _ in range(2))
    found = edge_agreement(drawn, control, tolerance)
    assert (found.precision, found.recall) == pytest.approx(naive_agreement(drawn, control, tolerance))
    assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))


def test_agreement_without_edges_is_perfect_only_where_none_were_asked_for():
    none, some = np.zeros((5, 5), dtype=np.uint8), np.eye(5, dtype=np.uint8)
    assert edge_agreement(none, none).f1 == 1
    assert edge_agreement(some, none).f1 == edge_agreement(none, some).f1 == 0
    assert edge_agreement(some, some, 0).f1 == 1


def test_a_photo_becomes_its_edges_and_a_map_stays_what_it_is():
    photo = Image.fromarray(draw_scene_set("validation", 1, 64, 0).images[0])
    edges = edge_map(np.asarray(photo))
    ready = Image.fromarray(edges)
    for picture, kind in ((photo, "auto"), (photo, "canny"), (ready, "auto"), (ready, "map")):
        assert np.array_equal(np.asarray(control_map(picture, (64, 64), kind)), np.repeat(edges[..., None], 3, axis=2))
    assert np.array_equal(np.asarray(control_map(photo, (64, 64), "map")), np.asarray(photo))
    assert control_map(photo, (32, 16)).size == (32, 16)
    with pytest.raises(ValueError, match="control_kind is depth"):
        control_map(photo, (64, 64), "depth")


# ------------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory) -> Path:
    return tiny.save_prior(tmp_path_factory.mktemp("prior"))


def settings(prior_folder, folder, *more):
    return [
        f"prior={prior_folder}", "weights=null", f"out={folder / 'net'}", f"work={folder / 'work'}", "scenes=6",
        "workers=1", "steps=3", "batch_size=2", "precision=32-true", "figure_scenes=2", "figure_steps=2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(prior_folder, tmp_path_factory) -> Path:
    """The folder of a ControlNet of three steps, with its figures."""
    folder = tmp_path_factory.mktemp("controlnet")
    with pytest.MonkeyPatch.context() as patch:
        assert call(command.main, patch, *settings(prior_folder, folder)) == 0
    return folder / "net"


def test_the_command_writes_a_controlnet_of_diffusers_with_curve_settings_and_figures(trained, prior_folder):
    assert {path.name for path in trained.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "loss.csv", "training.json", "figures.json", "samples.png"
    }  # fmt: skip
    assert ControlNetModel.from_pretrained(trained).config.cross_attention_dim == tiny.TEXT_DIM
    assert {value.dtype for value in load_file(trained / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    recorded = json.loads((trained / "training.json").read_text())
    assert recorded["trained_on"] == load_prior(str(prior_folder)).identity
    assert (recorded["steps"], recorded["seed"]) == (3, 0)
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["prior"].keys() == {"controlled", "uncontrolled", "other_edges"}
    assert "moa" not in figures, "there were no personalized weights"
    assert len((trained / "loss.csv").read_text().splitlines()) == 4


def test_training_that_was_cut_off_ends_with_the_same_weights(trained, prior_folder, tmp_path, monkeypatch):
    real = ControlNetStage.loss

    def killed_at_step_two(self, rng):
        if self.global_step == 2:
            raise KeyboardInterrupt
        return real(self, rng)

    arguments = settings(prior_folder, tmp_path, "stages=[train]")
    with monkeypatch.context() as patch:
        patch.setattr(ControlNetStage, "loss", killed_at_step_two)
        patch.setattr("moa_train.prior.pretrain.stage.SAVE_EVERY", 2)
        assert call(command.main, patch, *arguments) != 0
    assert not (tmp_path / "net").exists()
    assert call(command.main, monkeypatch, *arguments) == 0
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "net" / name).read_bytes() == (trained / name).read_bytes()


def test_a_new_controlnet_adds_nothing_and_its_zero_convolutions_learn_first_and_the_prior_never(prior_folder):
    prior = load_prior(str(prior_folder))
    net = new_controlnet(prior.unet, 2)
    options = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "seed": 0}
    stage = ControlNetStage(net, prior, draw_scene_set("train", 4, 16, 0), drop_probability=0.5, **options)
    noisy, steps, tokens = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), stage.captions[:2, 0]
    alone = prior.unet(noisy, steps, prior.text_encoder(tokens)[0]).sample
    assert torch.equal(stage.predict(noisy, steps, tokens, torch.rand(2, 3, 16, 16)), alone)
    stage.loss(np.random.default_rng(0)).backward()
    started = {name for name, value in net.named_parameters() if value.grad is not None and value.grad.any()}
    zero_convolutions = ("controlnet_down_blocks.", "controlnet_mid_block.")
    assert started == {name for name, _ in net.named_parameters() if name.startswith(zero_convolutions)}
    assert all(value.grad is None for part in (prior.unet, prior.text_encoder) for value in part.parameters())
    assert not any("unet" in name for name in stage.state_dict())


def test_an_unknown_stage_is_named(prior_folder, tmp_path, monkeypatch, capfd):
    told = refused(command.main, monkeypatch, capfd, *settings(prior_folder, tmp_path, "stages=[figure]"))
    assert "stages holds figure; expected some of train, figures" in told


# ------------------------------------------------------------------------------------------------------------- pictures
def drawn(pipe, prompts, subjects=(), **options):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "generator": generators}
    return pipe(prompts, subjects, **{**settings, **options}).images


def test_at_strength_zero_the_picture_is_the_uncontrolled_one_to_the_bit():
    photo = draw_scene_set("validation", 1, 64, 0)
    subject = (photo.portraits[0], photo.portrait_masks[0])
    control = control_map(Image.fromarray(photo.images[0]), (64, 64))
    plain = MoAPipeline.from_pretrained("toy", "toy")
    controlled = MoAControlNetPipeline.from_pretrained("toy", "toy", controlnet=load_controlnet("toy"))
    prompt = [f"a photo of a man <1> {CONTEXTS[0]}"]
    expected = drawn(plain, prompt, [subject])
    assert np.array_equal(
        drawn(controlled, prompt, [subject], image=control, controlnet_conditioning_scale=0.0), expected
    )
    assert np.abs(drawn(controlled, prompt, [subject], image=control) - expected).max() > 0.1


@pytest.mark.slow
def test_pictures_follow_the_edges_of_held_out_scenes_far_better_than_uncontrolled_ones():
    scenes = draw_scene_set("validation", 4, 64, 3)
    edges = [edge_map(image) for image in scenes.images]
    pipe = MoAControlNetPipeline.from_pretrained("toy", controlnet=load_controlnet("toy"))
    prompts = [short for short, _ in scenes.captions]
    maps = [Image.fromarray(each).convert("RGB") for each in edges]
    agreement = {}
    for scale in (0.0, 1.0):
        options = {"controlnet_conditioning_scale": scale, "num_inference_steps": 8}
        made = (drawn(pipe, prompts, image=maps, **options) * 255).round().astype(np.uint8)
        agreement[scale] = [edge_agreement(edge_map(a), b).f1 for a, b in zip(made, edges, strict=True)]
    assert np.mean(agreement[1.0]) > np.mean(agreement[0.0]) + 0.15
    assert sum(a > b for a, b in zip(agreement[1.0], agreement[0.0], strict=True)) >= 3


# ----------------------------------------------------------------------------------------------------- the command line
def arguments(prior_folder, folder, *more):
    return [
        f"prior={prior_folder}", "weights=null", "prompt='a man at sea'", "steps=2", "seeds=[0]", "device=cpu",
        "progress=false", f"out={folder / 'out'}", *more,
    ]  # fmt: skip


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(draw_scene_set("validation", 1, 64, 0).images[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_generate_follows_a_photo_and_writes_what_the_controlnet_saw(
    prior_folder, trained, tmp_path, photo, monkeypatch
):
    given = arguments(prior_folder, tmp_path, f"controlnet={trained}", f"control_image={photo}", "control_scale=0.5")
    assert call(generate.main, monkeypatch, *given) == 0
    with Image.open(photo) as picture, Image.open(tmp_path / "out" / "control.png") as seen:
        assert np.array_equal(np.asarray(seen), np.asarray(control_map(picture, (16, 16))))
    with Image.open(tmp_path / "out" / "seed=0.png") as made:
        assert made.text["control_scale"] == "0.5"
        assert len(made.text["control_image"]) == 64
        told = json.loads(made.text["controlnet"])
        assert told == {"name": str(trained), "weights": weights_fingerprint(load_controlnet(trained))}


WRONG = {
    "no picture": (["controlnet=toy"], "controlnet and control_image go together"),
    "no controlnet": (["control_image=PHOTO"], "controlnet and control_image go together"),
    "other architecture": (["controlnet=toy", "control_image=PHOTO"], "is of another architecture (its "),
    "missing": (
        ["controlnet=/no/such", "control_image=PHOTO"],
        "controlnet /no/such cannot be loaded: give toy",
    ),
    "missing picture": (
        ["controlnet=TRAINED", "control_image=nowhere.png"],
        "nowhere.png is not a file",
    ),
    "inversion": (["task=invert", "controlnet=TRAINED", "control_image=PHOTO"], "task=invert takes no controlnet"),
    "unknown kind": (["controlnet=TRAINED", "control_image=PHOTO", "control_kind=depth"], "control_kind is depth"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_control_that_cannot_be_is_refused_in_one_line(
    prior_folder, trained, tmp_path, photo, monkeypatch, capfd, mistake
):
    given, told = WRONG[mistake]
    given = [each.replace("PHOTO", str(photo)).replace("TRAINED", str(trained)) for each in given]
    assert told in refused(generate.main, monkeypatch, capfd, *arguments(prior_folder, tmp_path, *given))
