"""A Stable Diffusion folder of a few thousand random weights, with personalized weights for it."""

import copy
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from moa_train.checkpoint import export_personalized
from moa_train.inference.pipeline import MoAPipeline
from moa_train.model.unet import add_moa, personalized_state_dict
from moa_train.prior.load import clip_tokenizer, load_prior

TEXT_DIM, IMAGE_DIM, IMAGE_SIZE = 16, 12, 16


def _write_image_encoder(folder: Path) -> None:
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}
    model = open_clip.model.CLIP(embed_dim=IMAGE_DIM, vision_cfg=vision, text_cfg=text)
    config = {
        "model_cfg": {"embed_dim": IMAGE_DIM, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )


@pytest.fixture(scope="session")
def prior_folder(tmp_path_factory) -> Path:
    """Pictures of 16 x 16 pixels, latents of 8 x 8, 14 attention layers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("prior")
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=TEXT_DIM,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    parts = {
        "unet": unet,
        "vae": vae,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    _write_image_encoder(folder / "image_encoder")
    return folder


@pytest.fixture(scope="session")
def _loaded(prior_folder):
    return load_prior(str(prior_folder))


@pytest.fixture
def prior(_loaded):
    """A prior of its own for each test."""
    return copy.deepcopy(_loaded)


def make_pipeline(prior) -> MoAPipeline:
    pipe = MoAPipeline(prior.vae, prior.text_encoder, prior.tokenizer, prior.unet, prior.scheduler, prior.image_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomize(unet) -> None:
    """Random personalized weights, so that every part of MoA changes the picture."""
    generator = torch.Generator().manual_seed(1)
    for value in personalized_state_dict(unet).values():
        value.add_(torch.randn(value.shape, generator=generator) * 0.3)


@pytest.fixture
def fresh(prior) -> MoAPipeline:
    """MoA as it is before training."""
    add_moa(prior.unet, prior.image_encoder.dim)
    return make_pipeline(prior)


@pytest.fixture
def pipe(fresh) -> MoAPipeline:
    randomize(fresh.unet)
    return fresh


@pytest.fixture(scope="session")
def weights(_loaded, tmp_path_factory) -> Path:
    """A file of personalized weights that belongs to `prior_folder`."""
    prior = copy.deepcopy(_loaded)
    add_moa(prior.unet, prior.image_encoder.dim)
    randomize(prior.unet)
    path = tmp_path_factory.mktemp("weights") / "personalized.safetensors"
    metadata = {"moa": prior.unet.moa.config.to_dict(), "prior": prior.identity, "step": 7}
    export_personalized(path, personalized_state_dict(prior.unet), metadata)
    return path


@pytest.fixture
def photo() -> tuple[np.ndarray, np.ndarray]:
    """A random photo (20 rows, 24 columns) and the mask of a rectangle in it."""
    return photo_of(0)


def photo_of(person: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((20, 24), dtype=bool)
    mask[4:16, 6:15] = True
    return np.random.default_rng(person).integers(0, 255, (20, 24, 3), dtype=np.uint8), mask


@pytest.fixture
def other_photo() -> tuple[np.ndarray, np.ndarray]:
    return photo_of(1)


@pytest.fixture
def photo_files(tmp_path, photo) -> tuple[Path, Path, Path]:
    """The photo, its mask, and both as one picture with an alpha channel."""
    image, mask = (Image.fromarray(x) for x in (photo[0], photo[1].astype(np.uint8) * 255))
    both = image.copy()
    both.putalpha(mask)
    paths = (tmp_path / "photo.png", tmp_path / "mask.png", tmp_path / "both.png")
    for path, picture in zip(paths, (image, mask, both), strict=True):
        picture.save(path)
    return paths
