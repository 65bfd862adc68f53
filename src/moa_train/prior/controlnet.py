"""Control by edges: the maps that a ControlNet is given, how well a picture follows them, which ControlNets fit."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from jaxtyping import UInt8
from PIL import Image, ImageOps

TOY = "toy"
"""Name of the ControlNet that ships with the package, for the edges of pictures of the toy prior."""
LOW, HIGH = 100, 200
"""Canny's thresholds of the gradient, in grey values; those of ControlNet's authors."""

_ARCHITECTURE = (
    "in_channels",
    "cross_attention_dim",
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
)


@dataclass(frozen=True)
class EdgeAgreement:
    """How far two edge maps agree, in [0, 1].

    precision: share of the picture's edge pixels near an edge of the control. recall: share of the control's edge
    pixels near an edge of the picture. f1: their harmonic mean.
    """

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """2 precision recall / (precision + recall); 0 where both are 0."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def edge_map(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """Canny's edges: 255 on an edge, 0 elsewhere."""
    return cv2.Canny(cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY), LOW, HIGH)


def control_map(picture: Image.Image, size: tuple[int, int], kind: str = "auto") -> Image.Image:
    """What the ControlNet sees of a picture, RGB of `size`: cropped about its middle to the shape asked for, resized.

    Args:
        picture: a photo, or a ready map. size: width and height of the picture to be made, in pixels.
        kind: "canny": the edges of the picture; "map": the picture is the map itself (edges, poses, depth ...);
            "auto": a picture of nothing but black and white is a map, any other is a photo.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("auto", "canny", "map"):
        raise ValueError(f"control_kind is {kind}; expected auto, canny or map")
    picture = picture.convert("RGB")
    extremes = np.unique(np.asarray(picture).reshape(-1, 3), axis=0)
    binary = np.isin(extremes, (0, 255)).all() and (extremes == extremes[:, :1]).all()
    if kind == "map" or (kind == "auto" and binary):
        method = Image.Resampling.NEAREST if binary else Image.Resampling.BICUBIC
        return ImageOps.fit(picture, size, method)
    fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    return Image.fromarray(edge_map(np.asarray(fitted))).convert("RGB")


def edge_agreement(
    drawn: UInt8[np.ndarray, "h w"], control: UInt8[np.ndarray, "h w"], tolerance: int = 1
) -> EdgeAgreement:
    """Compare the edges of a picture with those that it was to follow.

    Args:
        drawn, control: edge maps, not 0 on an edge. tolerance: pixels by which an edge may be off, in rows and columns.
    """
    near = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
    around_drawn, around_control = (cv2.dilate((edges > 0).astype(np.uint8), near) > 0 for edges in (drawn, control))
    return EdgeAgreement(_share(drawn > 0, around_control), _share(control > 0, around_drawn))


def _share(edges: np.ndarray, near: np.ndarray) -> float:
    """Share of the edges that lie near the others; 1 where there is nothing to find, 0 where there is nothing found."""
    return float(near[edges].mean()) if edges.any() else float(not near.any())


def new_controlnet(unet: UNet2DConditionModel, factor: int) -> ControlNetModel:
    """A ControlNet that starts as a copy of the U-Net's encoder and adds nothing yet.

    Args:
        unet: the prior's. factor: pixels along an edge of the picture for one of the latent (8 in Stable Diffusion).
    """
    channels = (16, 32, 96, 256)[: factor.bit_length()]
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)


def load_controlnet(source: str | Path, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """Load a ControlNet, frozen and in evaluation mode; `check_controlnet` tells whether it fits a prior.

    Args:
        source: "toy", a folder in the diffusers format, or a hub id. dtype: of the weights.

    Raises:
        ValueError: nothing loadable at `source`.
    """
    folder = files("moa_train") / "assets" / "toy_controlnet" if source == TOY else source
    try:
        controlnet = ControlNetModel.from_pretrained(str(folder), torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"controlnet {source} cannot be loaded: give toy, a folder in the diffusers format or a hub id ({reason})"
        ) from error
    return controlnet.requires_grad_(False).eval()


def check_controlnet(controlnet: ControlNetModel, unet: UNet2DConditionModel, factor: int) -> None:
    """Refuse a ControlNet that does not fit a prior.

    Args:
        controlnet: to be checked. unet: the prior's. factor: pixels along an edge of the picture for one of the latent.

    Raises:
        ValueError: another architecture; says in what.
    """
    reads = 2 ** (len(controlnet.config["conditioning_embedding_out_channels"]) - 1)
    compared = {name: (controlnet.config[name], unet.config[name]) for name in _ARCHITECTURE}
    for name, (own, needed) in {**compared, "pixels for one of the latent": (reads, factor)}.items():
        if _plain(own) != _plain(needed):
            raise ValueError(
                f"the ControlNet {controlnet.config.get('_name_or_path')} is of another architecture (its {name} is "
                f"{own}, the prior's {needed}): give one that was made for a prior of this architecture"
            )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value
