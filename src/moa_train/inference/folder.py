"""A pipeline as a folder: the plain prior in diffusers' format, the image encoder, and personalized.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from moa_train.checkpoint import export_personalized, load_personalized
from moa_train.conditioning.encoders import ImageEncoder, build_image_encoder
from moa_train.model.unet import personalized_state_dict
from moa_train.prior.load import IMAGE_ENCODER, prior_identity

WEIGHTS = "personalized.safetensors"


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write a pipeline, so that `StableDiffusionPipeline` finds the prior in it and `MoAPipeline` everything.

    Raises:
        ValueError: weights that are wrapped by a LoRA, offloaded to nowhere, or a baseline's own U-Net.
    """
    for name in ("unet", "text_encoder", "vae"):
        _check_plain(name, getattr(pipe, name))
    installed = getattr(pipe.unet, "moa", None)
    if installed is not None and installed.config.trains_unet:
        raise ValueError(f"weights of {installed.config.name} are no prior with experts beside it: use moa-export")
    own = {} if installed is None else personalized_state_dict(pipe.unet)
    prior = StableDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=_bare(pipe.unet, own),
        scheduler=pipe.scheduler,
        safety_checker=pipe.safety_checker,
        feature_extractor=pipe.feature_extractor,
        requires_safety_checker=pipe.config.requires_safety_checker,
    )
    prior.save_pretrained(folder)
    if isinstance(pipe.image_encoder, ImageEncoder):
        pipe.image_encoder.save(folder / IMAGE_ENCODER)
    if installed is not None:
        tuned = {} if pipe.image_encoder is None else pipe.image_encoder.trained_state_dict()
        state = own | {f"{IMAGE_ENCODER}.{name}": value for name, value in tuned.items()}
        export_personalized(folder / WEIGHTS, state, _metadata(pipe, prior.unet, str(folder)))


def read_own_parts(folder: Path) -> dict[str, Any]:
    """What `save_pipeline` has written beside a prior, as options of `SubjectPipeline.from_pretrained`; else nothing.

    They are the weights, and the image encoder and scheduler that the pipeline had.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        return {}
    trained_with = load_personalized(weights)[1].get("config", {}).get("image_encoder") or {}
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return {
        "weights": weights,
        "image_encoder": build_image_encoder(
            str(folder / IMAGE_ENCODER), None, trained_with.get("trainable_layers", 0)
        ),
        "scheduler": getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler"),
    }


def _bare(unet: UNet2DConditionModel, own: dict[str, Tensor]) -> UNet2DConditionModel:
    """The prior's U-Net: the same tensors, not copied, in a U-Net without MoA."""
    with torch.device("meta"):
        bare = UNet2DConditionModel.from_config(unet.config)
    state = {name: value for name, value in unet.state_dict().items() if name not in own}
    bare.load_state_dict(state, assign=True)
    return bare.eval()


def _metadata(pipe: Any, unet: UNet2DConditionModel, name: str) -> dict[str, Any]:
    """That of the file the weights came from; of weights that came from none, what can be told from the networks."""
    config = pipe.unet.moa.config
    found = {"moa": config.to_dict(), "method": config.name, "prior": prior_identity(name, unet), "step": 0}
    return {**found, "config": {"data": {"background": pipe.subject_background}}, **pipe.provenance}


def _check_plain(name: str, module: nn.Module) -> None:
    if any(".base_layer." in key for key in module.state_dict()):
        raise ValueError(
            f"the {name} carries a LoRA: save without it (pipe.unload_lora_weights()), or for good "
            "(pipe.fuse_lora(), then pipe.unload_lora_weights())"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"the {name} is offloaded: save before enable_sequential_cpu_offload()")
