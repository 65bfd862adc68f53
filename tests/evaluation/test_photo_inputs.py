"""What the photo benchmark is given: prompts, subjects, and what recognises faces."""

import importlib.util
import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny
from moa_train.evaluation.clip_score import ClipScore
from moa_train.evaluation.faces import FaceEmbedder, FacenetFaces, OpenClipFaces, read_tensors
from moa_train.evaluation.photo_prompts import Template, read_templates
from moa_train.evaluation.photo_subjects import read_subjects
from moa_train.prompts import parse_prompt
from portrait import portrait


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    return str(tiny.save_open_clip(tmp_path_factory.mktemp("encoder")))


@pytest.fixture
def folder(tmp_path):
    """Three photos: a portrait without a mask, one with a mask beside it, one whose alpha channel is its mask."""
    picture, mask = portrait()
    grey = Image.fromarray(mask)
    (tmp_path / "women").mkdir()
    picture.save(tmp_path / "a woman 1.png")
    (tmp_path / "a woman 1.txt").write_text("an old man in a garden")
    picture.save(tmp_path / "women" / "b.jpg")
    grey.save(tmp_path / "women" / "b.mask.png")
    picture.putalpha(grey.convert("L"))
    picture.save(tmp_path / "00000003-girl-2.png")
    return tmp_path


# ----------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize(("together", "categories"), [
    (1, {"accessory": 10, "style": 10, "context": 10, "action": 10}), (2, {"style": 7, "context": 7, "action": 7})
])  # fmt: skip
def test_the_packages_prompts_are_those_of_the_protocol(together, categories):
    templates = read_templates(None, together)
    assert {name: sum(each.category == name for each in templates) for name in categories} == categories
    assert len({each.text for each in templates}) == len(templates) == sum(categories.values())
    for template in templates:
        prompt = parse_prompt(template.fill(["man", "woman"][:together]))
        assert prompt.count == together
        assert prompt.text == template.fill(["man", "woman"][:together], marked=False)
        assert [prompt.text[slice(*span)] for span in prompt.spans] == ["man", "woman"][:together]


def test_a_template_takes_the_nouns_with_their_article_and_marker():
    template = Template("style", "a bust of {subject} in stone")
    assert template.fill(["man"]) == "a bust of a man <1> in stone"
    assert template.fill(["old man", "child"]) == "a bust of an old man <1> and a child <2> in stone"
    assert template.fill(["old man", "child"], marked=False) == "a bust of an old man and a child in stone"


def test_a_file_of_prompts_takes_the_place_of_the_packages(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("# mine\n[mood]\n{subject}, happy\n\n  {subject}, sad\n[place]\n{subject} at sea\n")
    assert [(each.category, each.text) for each in read_templates(path)] == [
        ("mood", "{subject}, happy"), ("mood", "{subject}, sad"), ("place", "{subject} at sea")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{subject} at sea\n", "line 1 .* stands before any category"),
        ("[a]\na man at sea\n", r"line 2 .* write \{subject\} once"),
        ("[a]\n{subject} and {subject}\n", r"write \{subject\} once"),
        ("[a]\n{subject} <1> at sea\n", "no marker"),
        ("[a]\n{subject}\n[b]\n{subject}\n", "line 4 .* is there twice"),
        ("[a/b]\n{subject}\n", "names no category"),
        ("[a]\n# {subject}\n", "holds no prompt"),
        (None, "none.txt cannot be read"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "none.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_templates(path)


# ---------------------------------------------------------------------------------------------------------- subjects
def test_nouns_come_from_captions_file_names_and_folders_and_masks_from_where_they_lie(folder):
    truth = portrait()[1]
    girl, man, woman = read_subjects(folder, 3)
    assert [(each.name, each.noun) for each in (girl, man, woman)] == [
        ("00000003-girl-2", "girl"), ("a-woman-1", "man"), ("women-b", "person")
    ]  # fmt: skip
    assert np.array_equal(girl.mask, truth)
    assert np.array_equal(woman.mask, truth)
    assert (man.mask & truth).sum() / (man.mask | truth).sum() > 0.85  # found
    assert np.array_equal(man.photo, np.asarray(portrait()[0]))
    assert len({each.digest for each in (girl, man, woman)}) == 3
    assert [each.digest for each in read_subjects(folder, None)] == [girl.digest, man.digest, woman.digest]


def test_the_noun_of_a_folder_and_of_a_file_beside_count_before_the_setting(folder):
    (folder / "women").rename(folder / "woman")
    assert read_subjects(folder, 3, "dog")[2].noun == "woman"
    (folder / "woman" / "b.json").write_text(json.dumps({"nouns": ["astronaut"]}))
    assert read_subjects(folder, 3, "dog")[2].noun == "astronaut"
    (folder / "woman" / "b.json").unlink()
    (folder / "woman").rename(folder / "animals")
    assert [each.noun for each in read_subjects(folder, 3, "dog") if "b" in each.name] == ["dog"]


def test_a_folder_that_holds_other_subjects_than_expected_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="holds 3 photos, 15 are expected: one a subject; give people=3"):
        read_subjects(folder, 15)
    Image.new("RGB", (200, 200), "grey").save(folder / "c.png")
    with pytest.raises(ValueError, match=r"c.png is no photo of a subject: no face was found"):
        read_subjects(folder, 4)
    labels = np.zeros((200, 200), dtype=np.uint8)
    labels[:90], labels[110:] = 1, 2
    Image.fromarray(labels).save(folder / "c.seg.png")
    with pytest.raises(ValueError, match=r"c.png has 2 subjects in its mask"):
        read_subjects(folder, 4)
    (folder / "c.png").unlink()
    portrait()[0].save(folder / "women" / "b.png")
    with pytest.raises(ValueError, match="holds women-b more than once"):
        read_subjects(folder, None)


# ------------------------------------------------------------------------------------------------- clip and faces
def test_clip_scores_are_the_cosines_of_open_clips_own_embeddings(tmp_path):
    import open_clip

    torch.manual_seed(1)
    folder = tiny.save_open_clip(tmp_path, vocabulary=49408, length=77)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 26, 3), dtype=np.uint8)) for i in range(3)]
    texts = ["a man at sea", "a woman", "a bust of a man"]
    scores = ClipScore(str(folder))(images, texts)
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    for image, text, score in zip(images, texts, scores, strict=True):
        with torch.no_grad():
            seen = model.encode_image(prepare(image)[None]).numpy()[0]
            told = model.encode_text(open_clip.tokenize([text])).numpy()[0]
        assert float(score) == pytest.approx(seen @ told / np.sqrt(seen @ seen * (told @ told)), abs=1e-5)
    assert scores.std() > 1e-3


def test_an_architecture_without_weights_is_no_measure():
    with pytest.raises(ValueError, match=r"ViT-B-32 without weights: give clip.pretrained=TAG_OR_FILE"):
        ClipScore("ViT-B-32")


def test_the_same_face_scores_one_at_any_place_and_no_face_gives_no_vector(encoder):
    embed = OpenClipFaces(encoder, None)
    assert isinstance(embed, FaceEmbedder)
    picture = np.asarray(portrait()[0])
    (vector,) = embed(picture)
    assert torch.equal(embed(picture.copy())[0], vector)
    assert float(vector @ vector) == pytest.approx(1, abs=1e-5)
    moved = np.full((600, 640, 3), (60, 110, 170), dtype=np.uint8)
    moved[100:500, 200:520] = picture
    other = np.ascontiguousarray(picture[..., ::-1])
    assert float(vector @ embed(moved)[0]) > 0.99 > float(vector @ embed(other)[0])
    assert embed(np.full((200, 300, 3), 120, dtype=np.uint8)).shape == (0, len(vector))


def test_of_two_faces_the_larger_comes_first(encoder):
    embed = OpenClipFaces(encoder, None)
    large, small = np.asarray(portrait(480, 600)[0]), np.asarray(portrait(300, 375)[0])[..., ::-1]
    both = np.full((600, 780, 3), 90, dtype=np.uint8)
    both[:375, :300], both[:, 300:] = small, large
    assert len(embed(both)) == 1
    first, second = embed(both, most=2)
    assert float(first @ embed(large)[0]) > 0.99 > float(second @ embed(large)[0])


def test_the_whole_picture_can_stand_for_the_face(encoder):
    embed = OpenClipFaces(encoder, None, crop="picture")
    flat = np.full((40, 30, 3), 120, dtype=np.uint8)
    assert embed(flat).shape == (1, tiny.IMAGE_DIM)
    with pytest.raises(ValueError, match="expected face or picture"):
        OpenClipFaces(encoder, None, crop="head")


HAS_FACENET = importlib.util.find_spec("facenet_pytorch") is not None


@pytest.mark.skipif(HAS_FACENET, reason="facenet-pytorch is installed")
def test_without_its_package_facenet_is_refused_with_what_to_install():
    with pytest.raises(ValueError, match="needs the package facenet-pytorch, which is not installed: pip install"):
        FacenetFaces("weights.pt")


@pytest.mark.skipif(not HAS_FACENET, reason="needs facenet-pytorch")
@pytest.mark.filterwarnings("ignore")
def test_facenet_finds_the_face_and_gives_it_a_unit_vector(tmp_path):
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(0)
    state = InceptionResnetV1(pretrained=None, classify=False).state_dict()
    torch.save({**state, "logits.weight": torch.zeros(2, 512)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights is not given"):
        FacenetFaces(None)
    embed = FacenetFaces(str(tmp_path / "weights.pt"))
    (vector,) = embed(np.array(portrait()[0]), most=2)
    assert float(vector @ vector) == pytest.approx(1, abs=1e-5)
    assert embed(np.full((100, 100, 3), 120, dtype=np.uint8)).shape == (0, 512)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not of facenet-pytorch's InceptionResnetV1"):
        FacenetFaces(str(tmp_path / "other.safetensors"))


class Payload:
    """What a pickle would run: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_weights_that_would_run_code_are_refused_and_run_nothing(tmp_path, write):
    write({"weight": Payload(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt cannot be read as tensors"):
        read_tensors(str(tmp_path / "weights.pt"))
    assert not (tmp_path / "ran").exists()


def test_tensors_are_read_from_either_kind_of_file(tmp_path):
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert torch.equal(read_tensors(str(tmp_path / name))["a"], state["a"])
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds more than tensors by name"):
        read_tensors(str(tmp_path / "list.pt"))
    with pytest.raises(ValueError, match=re.escape("none.safetensors cannot be read as tensors")):
        read_tensors(str(tmp_path / "none.safetensors"))
