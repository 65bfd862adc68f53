"""The tiny prior, its MoA pipeline, and a file of personalized weights for it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from moa_train.checkpoint import export_personalized
from moa_train.inference.pipeline import MoAPipeline
from moa_train.model.unet import MoAConfig, add_moa, personalized_state_dict
from moa_train.prior.load import load_prior


@pytest.fixture(scope="session")
def prior_folder(tmp_path_factory) -> Path:
    """Pictures of 16 x 16 pixels, latents of 8 x 8, 14 attention layers."""
    return tiny.save_prior(tmp_path_factory.mktemp("prior"))


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


def install(prior, trained: bool) -> None:
    """MoA before training, or with random weights everywhere, so that every part of it changes the picture."""
    torch.manual_seed(1)
    add_moa(prior.unet, MoAConfig(prior.image_encoder.dim, sinusoids=8))
    for value in personalized_state_dict(prior.unet).values() if trained else ():
        value.add_(torch.randn_like(value) * 0.3)


@pytest.fixture
def fresh(prior) -> MoAPipeline:
    """MoA as it is before training."""
    install(prior, trained=False)
    return make_pipeline(prior)


@pytest.fixture
def pipe(prior) -> MoAPipeline:
    """MoA with random weights."""
    install(prior, trained=True)
    return make_pipeline(prior)


@pytest.fixture(scope="session")
def weights(_loaded, tmp_path_factory) -> Path:
    """The weights of `pipe` as a file."""
    prior = copy.deepcopy(_loaded)
    install(prior, trained=True)
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
