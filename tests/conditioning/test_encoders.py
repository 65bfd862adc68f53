"""The encoders: frozen, normalised as their models ask, zero in padded slots, loadable from folders."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from moa_train.conditioning.encoders import ImageEncoder, TextEncoder, build_image_encoder

MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
MODEL = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 5, "vocab_size": 11, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image encoder in open_clip's own folder format, with random weights."""
    path = tmp_path_factory.mktemp("image_encoder")
    torch.manual_seed(0)
    options = {name: value for name, value in MODEL.items() if name != "embed_dim"}
    model = open_clip.CLIP(MODEL["embed_dim"], **options)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, path / "open_clip_model.safetensors"
    )
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 3, 16, 16), torch.tensor([[True, False, True], [False, False, True]])


def test_features_are_those_of_open_clip_for_normalised_pictures(folder, pictures):
    pixels, present = pictures
    encoder = build_image_encoder(str(folder))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    features = encoder(pixels, present)
    assert features.shape == (2, 3, encoder.dim)
    assert encoder.image_size == 16
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for b, s in present.nonzero().tolist():
        expected = model.eval().encode_image(((pixels[b, s] - mean) / std)[None])[0]
        torch.testing.assert_close(features[b, s], expected)


def test_padded_slots_are_zero_whatever_their_picture(folder, pictures):
    pixels, present = pictures
    encoder = build_image_encoder(str(folder))
    features = encoder(pixels, present)
    assert (features[~present] == 0).all()
    assert (features[present].abs().sum(-1) > 0).all()
    other = torch.where(present[..., None, None, None], pixels, 1 - pixels)
    assert torch.equal(encoder(other, present), features)


def test_a_frozen_encoder_has_no_gradients_and_stays_in_evaluation_mode(folder, pictures):
    encoder = build_image_encoder(str(folder)).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(*pictures).requires_grad
    assert encoder.trained_state_dict() == {}


def test_only_the_last_blocks_train(folder, pictures):
    encoder = build_image_encoder(str(folder), trainable_layers=2)
    encoder(*pictures).square().sum().backward()
    trained = encoder.trained_state_dict()
    assert {name.split(".")[3] for name in trained} == {"1", "2"}
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


def test_trained_blocks_move_to_another_encoder(folder, pictures):
    encoder, other = (build_image_encoder(str(folder), trainable_layers=1) for _ in range(2))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    assert not torch.equal(encoder(*pictures), other(*pictures))
    other.load_trained_state_dict(encoder.trained_state_dict())
    assert torch.equal(encoder(*pictures), other(*pictures))
    with pytest.raises(ValueError, match="trainable_layers"):
        build_image_encoder(str(folder)).load_trained_state_dict(encoder.trained_state_dict())


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("ViT-nothing", {}, "ViT-nothing"),
        ("empty", {}, "config file missing"),
        ("folder", {"trainable_layers": 4}, "has 3 transformer blocks"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_names_it(folder, tmp_path, name, options, match):
    path = {"empty": str(tmp_path), "folder": str(folder)}.get(name, name)
    with pytest.raises(ValueError, match=match) as error:
        build_image_encoder(path, **options)
    assert "\n" not in str(error.value)


def test_a_tower_that_is_not_square_is_refused(folder):
    visual = open_clip.create_model(f"local-dir:{folder}").visual
    visual.image_size = (16, 24)
    with pytest.raises(ValueError, match="16 x 24"):
        ImageEncoder(visual)


class Tokenizer:
    """Only handed through."""

    model_max_length = 6

    def __call__(self, text, **options):
        raise AssertionError


def test_the_text_encoder_is_frozen_and_gives_the_states_after_its_final_norm():
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=6, eos_token_id=19, bos_token_id=18, pad_token_id=0,
    )  # fmt: skip
    transformer = CLIPTextModel(config)
    ids = torch.tensor([[18, 1, 2, 19, 0, 0], [18, 3, 19, 0, 0, 0]])
    encoder = TextEncoder(Tokenizer(), transformer).train()
    states = encoder(ids)
    assert torch.equal(states, transformer.eval()(ids).last_hidden_state)
    assert not states.requires_grad
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    torch.testing.assert_close(states.mean(-1), torch.zeros(2, 6), rtol=0, atol=1e-5)
