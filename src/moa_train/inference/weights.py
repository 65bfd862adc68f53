"""Puts a file of personalized weights onto a prior: MoA as its metadata describes it, tuned image encoder layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moa_train.checkpoint import LOCAL, load_personalized
from moa_train.conditioning.encoders import ImageEncoder, build_image_encoder
from moa_train.methods import method_of
from moa_train.model.unet import install, load_personalized_state_dict
from moa_train.prior.load import Prior, load_prior

logger = logging.getLogger(__name__)

_IMAGE_ENCODER = "image_encoder."


def weights_path(weights: str | Path) -> Path:
    """The file of personalized weights; "toy" is the one that ships with this package."""
    toy = Path(__file__).parents[1] / "assets" / "toy_moa" / "personalized.safetensors"
    return toy if weights == "toy" else Path(weights)


def load_personalized_prior(
    prior: str | Path, weights: str | Path | None, image_encoder: ImageEncoder | None = None
) -> tuple[Prior, dict[str, Any]]:
    """A prior with MoA on it, and the metadata of the weights (empty without weights).

    Args:
        prior: "toy", a folder in the Stable Diffusion format, or a hub id.
        weights: see `weights_path`; None for the prior alone.
        image_encoder: used instead of the one of the training.

    Raises:
        ValueError: weights of another architecture, a damaged file, an unknown prior.
    """
    if weights is None:
        return load_prior(str(prior), image_encoder), {}
    path = weights_path(weights)
    state, metadata = load_personalized(path)
    trained_with = None if image_encoder is not None else metadata.get("config", {}).get("image_encoder")
    if trained_with is not None:
        image_encoder = _image_encoder(trained_with)
    parts = load_prior(str(prior), image_encoder)
    try:
        if trained_with is not None and image_encoder is None:
            parts.image_encoder.unfreeze(trained_with["trainable_layers"])
        install(parts.unet, method_of(metadata))
        fill_moa(parts, state, metadata)
    except ValueError as error:
        own = metadata["prior"].get("name")
        raise ValueError(f"{path} was trained on the prior {own} and does not fit {prior}: {error}") from error
    return parts, metadata


def _image_encoder(trained_with: Mapping[str, Any]) -> ImageEncoder | None:
    """The image encoder of the training.

    None, with a warning, where it lay in a folder of its own, whose place an export does not tell.
    """
    if trained_with["name"].startswith(LOCAL) and not Path(trained_with["name"]).exists():
        logger.warning(
            "the weights were trained with an image encoder of their own (%s) and get the prior's: unless it is the "
            "same one, give it as image_encoder=build_image_encoder(FOLDER)",
            trained_with["name"],
        )
        return None
    return build_image_encoder(trained_with["name"], trained_with["pretrained"], trained_with["trainable_layers"])


def fill_moa(parts: Prior, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Fill the MoA that is installed on a prior, and its tuned image encoder layers; warn if the prior is another one.

    Raises:
        ValueError: weights of another architecture or configuration.
    """
    tuned = {name for name in state if name.startswith(_IMAGE_ENCODER)}
    load_personalized_state_dict(parts.unet, {name: state[name] for name in state.keys() - tuned})
    parts.image_encoder.load_trained_state_dict({name.removeprefix(_IMAGE_ENCODER): state[name] for name in tuned})
    trained_on, used = metadata["prior"], parts.identity
    if any(trained_on.get(key) != used.get(key) for key in {*trained_on, *used} - {"name"}):
        logger.warning(
            "the weights were trained on the prior %s and are used on %s: expect another style and maybe less likeness",
            trained_on.get("name"),
            used.get("name"),
        )
