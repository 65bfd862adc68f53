"""FastComposer's evaluation from the command's settings to its files, with random weights."""

import hashlib
import json
import re
import shlex
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image, ImageOps

import tiny
from moa_train.baselines.fastcomposer import FastComposerConfig
from moa_train.baselines.finetune import FinetuneConfig
from moa_train.baselines.ip_adapter import IPAdapterConfig
from moa_train.checkpoint import export_personalized
from moa_train.cli import evaluate
from moa_train.cli.overrides import read_arguments
from moa_train.cli.paths import config_dir
from moa_train.evaluation.hub import model_card
from moa_train.evaluation.photo_shots import PhotoProtocol, plan_shots
from moa_train.evaluation.photo_subjects import PhotoSubject
from moa_train.evaluation.photos import identity
from moa_train.inference.pipeline import MoAPipeline
from moa_train.model.unet import MoAConfig, install, personalized_state_dict
from moa_train.prior.load import load_prior
from portrait import portrait

# diffusers' UniPC scheduler calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

METHODS = {
    "moa": MoAConfig(tiny.IMAGE_DIM, sinusoids=8),
    "fastcomposer": FastComposerConfig(tiny.IMAGE_DIM, localized=("mid_block",)),
    "ip_adapter": IPAdapterConfig(tiny.IMAGE_DIM),
    "finetune": FinetuneConfig(tiny.IMAGE_DIM, sinusoids=8),
}
PROMPTS = {"style": ["an oil painting of {}", "a bust of {}"], "context": ["a photo of {} at sea"]}
SEEDS = (3, 8)


def export(folder, name):
    """Random weights of a method, as if trained."""
    prior = load_prior(str(folder / "prior"))
    torch.manual_seed(1)
    method = METHODS[name]
    install(prior.unet, method)
    state = personalized_state_dict(prior.unet)
    with torch.no_grad():
        for value in state.values():
            value.add_(torch.randn_like(value) * 0.3)
    metadata = {"moa": method.to_dict(), "method": name, "prior": prior.identity, "step": 0}
    export_personalized(folder / f"{name}.safetensors", state, metadata)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A prior, MoA's weights, an open_clip model with a text tower, two photos of people, three prompts."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save_prior(folder / "prior")
    export(folder, "moa")
    torch.manual_seed(2)
    tiny.save_open_clip(folder / "clip", vocabulary=49408, length=77)
    (folder / "photos").mkdir()
    picture, mask = portrait(200, 250)
    for name, image in (("man", picture), ("woman", Image.fromarray(np.asarray(picture)[..., ::-1].copy()))):
        image.putalpha(Image.fromarray(mask).convert("L"))
        image.save(folder / "photos" / f"{name}.png")
    lines = [f"[{kind}]\n" + "\n".join(text.format("{subject}") for text in texts) for kind, texts in PROMPTS.items()]
    (folder / "prompts.txt").write_text("\n".join(lines))
    (folder / "one_prompt.txt").write_text("[style]\na bust of {subject}\n")
    return folder


def measure(world, out, *overrides, weights="moa"):
    given = [
        "benchmark=fastcomposer",
        f"prior.source={world / 'prior'}",
        f"weights={world / f'{weights}.safetensors'}",
        f"subjects={world / 'photos'}",
        "people=2",
        f"prompts={world / 'prompts.txt'}",
        f"clip.model={world / 'clip'}",
        "clip.pretrained=null",
        f"embedder.model={world / 'clip'}",
        "embedder.pretrained=null",
        "embedder.crop=picture",
        "seeds=[3,8]",
        "steps=2",
        "device=cpu",
        f"out={out}",
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        evaluate.run(compose("eval", [*given, *overrides]))
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A whole run: its folder and its numbers."""
    out = tmp_path_factory.mktemp("done")
    return out, measure(world, out)


def hashes(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png")}


@pytest.fixture
def drawn(monkeypatch):
    """How many pictures the pipeline draws, in a list that grows by one entry a call."""
    counts, call = [], MoAPipeline.__call__

    def counted(self, prompt, *given, **options):
        counts.append(len(prompt))
        return call(self, prompt, *given, **options)

    monkeypatch.setattr(MoAPipeline, "__call__", counted)
    return counts


class Independent:
    """CLIP's cosines and the embedder's vectors by open_clip's own functions and numpy."""

    def __init__(self, folder):
        self.model, _, self.prepare = open_clip.create_model_and_transforms(f"local-dir:{folder / 'clip'}")
        self.model.eval()

    @torch.no_grad()
    def prompt(self, path, text):
        with Image.open(path) as image:
            seen = self.model.encode_image(self.prepare(image)[None]).numpy()[0]
        told = self.model.encode_text(open_clip.tokenize([text])).numpy()[0]
        return seen @ told / np.linalg.norm(seen) / np.linalg.norm(told)

    @torch.no_grad()
    def vector(self, path):
        with Image.open(path) as image:
            small = ImageOps.fit(image.convert("RGB"), (tiny.IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC)
        pixels = (np.asarray(small).transpose(2, 0, 1) / 255 - 0.5) / 0.5
        found = self.model.encode_image(torch.from_numpy(pixels).float()[None]).numpy()[0]
        return found / np.linalg.norm(found)


def test_scores_are_means_of_cosines_that_numpy_finds_in_the_written_files(world, done):
    out, numbers = done
    independent, pictures = Independent(world), out / "pictures"
    seen = {key: [] for key in ("prompt.moa", "prompt.no_photo", "moa", "no_photo", "wrong_subject")}
    by_category = {kind: [] for kind in PROMPTS}
    flat = list(enumerate((kind, text) for kind, texts in PROMPTS.items() for text in texts))
    references = {who: on_white(independent, world / "photos" / f"{who}.png") for who in ("man", "woman")}
    for who, (number, (kind, text)), seed in product(("man", "woman"), flat, SEEDS):
        name = f"{number:02d}-{kind}_seed={seed}.png"
        with_photo, without = pictures / "subjects" / who / name, pictures / "without" / who / name
        other = "woman" if who == "man" else "man"
        seen["prompt.moa"].append(independent.prompt(with_photo, text.format(f"a {who}")))
        seen["prompt.no_photo"].append(independent.prompt(without, text.format(f"a {who}")))
        by_category[kind].append(seen["prompt.moa"][-1])
        seen["moa"].append(max(0, independent.vector(with_photo) @ references[who]))
        seen["wrong_subject"].append(max(0, independent.vector(with_photo) @ references[other]))
        seen["no_photo"].append(max(0, independent.vector(without) @ references[who]))
    told = {**numbers["identity"], **{f"prompt.{key}": v for key, v in numbers["prompt_consistency"].items()}}
    assert told == {key: pytest.approx(float(np.mean(values)), abs=2e-5) for key, values in seen.items()}
    assert numbers["face_found"] == {"moa": 1.0, "no_photo": 1.0}
    assert numbers["n"] == {"people": 2, "pictures": 12}
    assert numbers["made"] == 24
    for kind, values in by_category.items():
        told = numbers["by_category"][kind]["prompt_consistency"]["moa"]
        assert told == pytest.approx(float(np.mean(values)), abs=2e-5)
    groups = np.array(seen["moa"]).reshape(2, -1).mean(axis=1)  # with two people the ends are people's own means
    assert numbers["intervals"]["identity.moa"] == pytest.approx([groups.min(), groups.max()], abs=2e-5)


def on_white(independent, path):
    """The vector of a photo with its transparent part on white, as photos are read."""
    with Image.open(path) as image:
        image.load()
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    place = path.with_suffix(".flat.bmp").name
    flat.convert("RGB").save(path.parents[1] / place)
    return independent.vector(path.parents[1] / place)


def test_pictures_say_how_they_were_made_and_the_report_shows_them(world, done):
    out, numbers = done
    with Image.open(out / "pictures/subjects/woman/02-context_seed=8.png") as picture:
        told = picture.text
    assert (told["prompt"], told["seed"], told["category"]) == ("a photo of a woman <1> at sea", "8", "context")
    assert told["weights"] == hashlib.sha256((world / "moa.safetensors").read_bytes()).hexdigest() == numbers["weights"]
    assert len(json.loads(told["subjects"])) == 1
    assert json.loads(told["sampling"])["num_inference_steps"] == 2
    with Image.open(out / "pictures/without/woman/02-context_seed=8.png") as picture:
        assert picture.text["prompt"] == "a photo of a woman at sea"
        assert "subjects" not in picture.text
    text = (out / "report.md").read_text()
    for group in ("prompt_consistency", "identity", "face_found"):
        assert f"{numbers[group]['moa']:.4g}" in text
    assert all(f"| {kind} |" in text for kind in PROMPTS)
    with Image.open(out / "samples.png") as sheet:
        assert sheet.size == (3 * 164 + 4, 4 * 164 + 4 + 18)  # of each noun: without a photo, then the person


def test_pictures_without_a_photo_are_the_priors_and_those_with_one_are_not(world, done):
    pictures = done[0] / "pictures"
    pipe = MoAPipeline.from_pretrained(world / "prior")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    drawn = pipe("a bust of a man", num_inference_steps=2, guidance_scale=5.0, generator=generator).images[0]
    with Image.open(pictures / "without/man/01-style_seed=3.png") as image:
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1
        without = np.asarray(image, dtype=int)
    with Image.open(pictures / "subjects/man/01-style_seed=3.png") as image:
        assert np.abs(np.asarray(image, dtype=int) - without).max() > 8


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


def test_each_picture_shows_the_subject_of_its_own_photo(world, done):
    pipe = MoAPipeline.from_pretrained(world / "prior", world / "moa.safetensors")
    pipe.set_progress_bar_config(disable=True)
    told = pixels(done[0] / "pictures/subjects/woman/01-style_seed=3.png")
    far = {}
    for who in ("woman", "man"):
        generator = torch.Generator().manual_seed(3)
        photo = [str(world / "photos" / f"{who}.png")]
        prompt = "a bust of a woman <1>"
        image = pipe(prompt, photo, num_inference_steps=2, guidance_scale=5.0, generator=generator).images[0]
        far[who] = np.abs(np.asarray(image, dtype=int) - told).mean()
    assert far["woman"] < 0.5 * far["man"]


def test_what_is_there_is_not_drawn_again_and_what_is_missing_becomes_the_same_bytes(world, done, drawn):
    out, numbers = done
    before = hashes(out / "pictures")
    again = measure(world, out)
    assert drawn == []
    assert again["made"] == 0
    assert {key: v for key, v in again.items() if key not in ("made", "seconds")} == {
        key: v for key, v in numbers.items() if key not in ("made", "seconds")
    }
    lost, torn = out / "pictures/subjects/man/00-style_seed=8.png", out / "pictures/without/woman/02-context_seed=3.png"
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:-30])
    assert measure(world, out)["made"] == 8
    assert drawn == [4, 4]  # the two batches with a picture that is missing
    assert hashes(out / "pictures") == before


def test_pictures_made_in_another_way_are_made_again(world, done, drawn, tmp_path):
    out, _ = done
    before = hashes(out / "pictures")
    changed = measure(world, out, "guidance=2", "without_photo=false")
    assert (changed["made"], sum(drawn)) == (12, 12)
    assert "no_photo" not in changed["identity"]
    after = hashes(out / "pictures")
    different = {path.parts[0] for path in before if before[path] != after[path]}
    assert different == {"subjects"}
    measure(world, out)
    assert hashes(out / "pictures") == before


@pytest.mark.parametrize(("method", "start"), [("fastcomposer", 0.5), ("ip_adapter", 0.0), ("finetune", 0.0)])
def test_baselines_are_measured_with_subjects_from_where_their_authors_let_them_in(world, tmp_path, method, start):
    export(world, method)
    common = [f"prompts={world / 'one_prompt.txt'}", "seeds=[3]", "people=null", "without_photo=false"]
    numbers = measure(world, tmp_path / "auto", *common, weights=method)
    assert (numbers["method"], numbers["protocol"]["subject_start"]) == (method, start)
    late = measure(world, tmp_path / "late", *common, "subject_start=1", weights=method)
    assert late["protocol"]["subject_start"] == 1
    name = "subjects/man/00-style_seed=3.png"
    assert np.abs(pixels(tmp_path / "auto/pictures" / name) - pixels(tmp_path / "late/pictures" / name)).max() > 2
    assert "MoA" not in (tmp_path / "auto" / "report.md").read_text()


def test_a_face_that_is_not_found_counts_nothing(world, tmp_path):
    """The cascades find the photos' faces, and none in pictures of random weights."""
    numbers = measure(world, tmp_path, "embedder.crop=face", "seeds=[3]", f"prompts={world / 'one_prompt.txt'}")
    assert numbers["face_found"] == {"moa": 0.0, "no_photo": 0.0}
    assert numbers["identity"] == {"moa": 0.0, "no_photo": 0.0, "wrong_subject": 0.0}
    assert numbers["prompt_consistency"]["moa"] != 0


def test_two_subjects_are_drawn_as_every_pair(world, tmp_path):
    numbers = measure(world, tmp_path, "together=2", "seeds=[3]", "embedder.crop=picture")
    with Image.open(tmp_path / "pictures/subjects/man+woman/00-style_seed=3.png") as picture:
        assert picture.text["prompt"] == "an oil painting of a man <1> and a woman <2>"
        assert len(set(json.loads(picture.text["subjects"]))) == 2
    assert numbers["n"] == {"people": 1, "pictures": 3}
    assert numbers["identity"]["moa"] == 0.0  # a whole picture is one face, for two subjects
    assert numbers["face_found"]["moa"] == 0.0
    assert "which share people" in (tmp_path / "report.md").read_text()


def test_the_protocol_of_fastcomposer_has_its_numbers_of_pictures():
    from moa_train.evaluation.photo_prompts import read_templates

    mask = np.ones((2, 2), dtype=bool)
    people = [PhotoSubject(str(i), "man" if i % 2 else "woman", np.zeros((2, 2, 3), np.uint8), mask) for i in range(15)]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("eval", ["benchmark=fastcomposer"])
    for together, pictures, without in ((1, 2400, 2 * 160), (2, 8820, 4 * 84)):
        protocol = PhotoProtocol(together=together, seeds=tuple(cfg.seeds))
        shots, plain = plan_shots(people, read_templates(None, together), protocol)
        assert len({shot.path for shot in shots}) == len(shots) == pictures
        assert len({shot.path for shot in plain.values()}) == len(set(plain.values())) == without
        assert {shot.who for shot in shots} == set(combinations(range(15), together))
        assert len({shot.group for shot in shots}) == len({shot.who for shot in shots})
    assert (cfg.people, cfg.steps, cfg.guidance) == (15, 50, 5.0)


def test_identity_of_two_is_the_lower_cosine_of_the_greedy_pairing():
    def unit(*angles):
        return torch.tensor([[np.cos(a), np.sin(a)] for a in np.radians(angles)])

    assert identity(unit(10), unit(40)) == pytest.approx(np.cos(np.radians(30)))
    assert identity(unit(50, 5), unit(0, 40)) == pytest.approx(np.cos(np.radians(10)))
    assert identity(unit(0), unit(120)) == 0.0
    assert identity(unit(0), unit(0, 5)) == 0.0
    assert identity(unit(0)[:0], unit(0)) == 0.0
    # The nearest pair is taken first, though the other pairing would have the larger minimum.
    assert identity(unit(20, 60), unit(22, -20)) == pytest.approx(np.cos(np.radians(80)))


def test_a_model_card_takes_its_figures(world, done):
    metadata = {"prior": {"name": "a/b"}, "step": 7}
    card = model_card("title", "weights.safetensors", metadata, done[1], [])
    assert f"{done[1]['identity']['moa']:.4g}" in card


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["people=15"], "holds 2 photos, 15 are expected"),
        (["subjects=nowhere"], "nowhere is not a folder"),
        (["prompts=none.txt"], "none.txt cannot be read"),
        (["together=3"], "together is 3"),
        (["seeds=[1,1]"], "each once"),
        (["batch_size=0"], "batch_size is 0"),
        (["size=[8]"], r"size is \[8\]"),
        (["subject_start=2"], "subject_start is 2"),
        (["subject_start=late"], "subject_start is late"),
        (["weights=null"], "weights=None is no file"),
        (["clip.model=ViT-B-32"], "ViT-B-32 without weights"),
        (["clip.model=nothing", "clip.pretrained=openai"], "open_clip model 'nothing' .* cannot be loaded"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_drawn(world, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        measure(world, tmp_path, *overrides)
    assert not list(tmp_path.iterdir())


def test_a_photo_in_which_the_embedder_finds_no_face_is_named(world, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a-man", "b-man"):
        flat = Image.new("RGBA", (64, 64), (120, 90, 60, 255))
        flat.putpixel((0, 0), (0, 0, 0, 0))
        flat.save(photos / f"{name}.png")
    with pytest.raises(ValueError, match="finds no face in the photo of a-man"):
        measure(world, tmp_path / "out", f"subjects={photos}", "embedder.crop=face")
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_page_are_sound():
    page = (Path(__file__).parents[2] / "docs" / "evaluation_photos.md").read_text()
    commands = re.findall(r"^ +moa-eval (.*)$", page, flags=re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        assert read_arguments(shlex.split(command), config_dir(), "eval")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark=coco"], 'benchmark has no option "coco": expected one of fastcomposer, toy'),
        (["benchmark=fastcomposer"], "subjects is not given"),
        (["benchmark=fastcomposer", "subjects=a", "contexts=2"], "unknown setting contexts"),
        (["together=2"], "unknown setting together"),
        (["benchmark=fastcomposer", "subjects=a", "embedder=nothing"], 'embedder has no option "nothing"'),
        (["benchmark=fastcomposer", "subjects=a", "embedder._target_=os.system"], "is refused"),
    ],
)
def test_the_command_line_knows_the_settings_of_each_benchmark(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moa-eval", *arguments])
    with pytest.raises(SystemExit) as left:
        evaluate.main()
    assert left.value.code == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
