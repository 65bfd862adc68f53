"""Prompt consistency: the cosine of a picture's and a text's embedding by an open_clip model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import open_clip
import torch
from jaxtyping import Float
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from moa_train.conditioning.encoders import TOY, load_open_clip
from moa_train.prior.load import toy_prior_folder
from moa_train.prior.pretrain.tokens import encode_captions


class ClipScore:
    """Cosines between pictures and texts, in float32, prepared as for the model's own training.

    Args:
        model: open_clip architecture, "hf-hub:owner/name", a folder with open_clip_config.json and its weights, or
            "toy", the model of the toy world in this package.
        pretrained: tag or file of an architecture's weights (never read as a pickle that could run code).
        device: where it computes.

    Raises:
        ValueError: nothing loadable, or an architecture without weights: its scores would mean nothing.
    """

    def __init__(self, model: str, pretrained: str | None = None, device: str = "cpu") -> None:
        held = model == TOY or Path(model).is_dir() or model.startswith("hf-hub:")
        if pretrained is None and not held:
            raise ValueError(
                f"clip.model is {model} without weights: give clip.pretrained=TAG_OR_FILE, or a folder or hf-hub: id "
                "that holds them"
            )
        self.name = model if pretrained is None else f"{model} ({pretrained})"
        network, source = load_open_clip(model, pretrained)
        self.network = network.float().requires_grad_(False).eval().to(device)
        self.tokenizer = _toy_tokenizer() if model == TOY else open_clip.get_tokenizer(source)
        self.transform = image_transform_v2(
            PreprocessCfg(**open_clip.get_model_preprocess_cfg(network)), is_train=False
        )
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[Tensor, " b"]:
        """The cosine of each picture and its text."""
        pixels = torch.stack([self.transform(image.convert("RGB")) for image in images]).to(self.device)
        seen = self.network.encode_image(pixels)
        told = self.network.encode_text(self.tokenizer(list(texts)).to(self.device))
        return functional.cosine_similarity(seen.float(), told.float(), dim=1).cpu()


def _toy_tokenizer() -> Callable[[Sequence[str]], Tensor]:
    """The toy model has seen the toy prior's tokens, not those of open_clip's vocabulary."""
    return partial(encode_captions, CLIPTokenizer.from_pretrained(toy_prior_folder() / "tokenizer"))
