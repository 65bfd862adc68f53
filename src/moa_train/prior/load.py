"""Stable Diffusion priors: the bundled toy, a folder, a hub id, or SD 1.5's architecture with random weights."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from moa_train.conditioning.encoders import ImageEncoder, build_image_encoder

TOY = "toy"
SD15_RANDOM = "sd15_random"
IMAGE_ENCODER = "image_encoder"
"""The folder of a prior's own image encoder, beside unet/, vae/ ..., in open_clip's format."""

_SD15_IMAGE_ENCODER = ("ViT-L-14-quickgelu", "openai")
_FINGERPRINT_VALUES = 256

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Prior:
    """The frozen half of the system.

    identity: what tells this prior from others: `name`, `config` (hash of the U-Net's architecture) and `weights` (hash
        of a sample of its weights).
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    image_encoder: ImageEncoder
    identity: dict[str, str]


def toy_prior_folder() -> Path:
    """The bundled toy prior: a Stable Diffusion folder with `image_encoder/` and `probe/` beside the rest."""
    return Path(str(files("moa_train") / "assets" / "toy_prior"))


def load_prior(source: str, image_encoder: ImageEncoder | None = None) -> Prior:
    """Load a prior in float32, frozen, in evaluation mode.

    Args:
        source: "toy", "sd15_random", a folder in the Stable Diffusion 1.x/2.x format, or a hub id.
        image_encoder: used instead of the prior's own (a folder's `image_encoder/`; else OpenAI's CLIP ViT-L/14).

    Raises:
        ValueError: nothing loadable at `source`, or a part of it is missing; says which.
    """
    unet, vae, text_encoder, tokenizer, scheduler = (
        _random_sd15() if source == SD15_RANDOM else _load_parts(str(toy_prior_folder()) if source == TOY else source)
    )
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False).eval()
    encoder = image_encoder or _own_image_encoder(source)
    return Prior(unet, vae, text_encoder, tokenizer, scheduler, encoder, prior_identity(source, unet))


def _load_parts(
    source: str,
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer, DDIMScheduler]:
    if not Path(source).is_dir() and ("/" not in source or source.startswith((".", "/", "~"))):
        raise ValueError(
            f"prior {source!r} is neither a folder nor a hub id: give {TOY}, {SD15_RANDOM}, a folder in the Stable "
            "Diffusion format (unet/, vae/, text_encoder/, tokenizer/, scheduler/) or owner/name"
        )
    float32 = {"torch_dtype": torch.float32}
    return (
        _load_part(UNet2DConditionModel, source, "unet", **float32),
        _load_part(AutoencoderKL, source, "vae", **float32),
        _load_part(CLIPTextModel, source, "text_encoder", dtype=torch.float32),
        _load_part(CLIPTokenizer, source, "tokenizer"),
        _load_part(DDIMScheduler, source, "scheduler"),
    )


def _load_part(kind: type[_Part], source: str, subfolder: str, **options: Any) -> _Part:
    if Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
        raise ValueError(f"{source} has no folder {subfolder}/: expected a folder in the Stable Diffusion format")
    try:
        with _without_progress_bars():
            return kind.from_pretrained(source, subfolder=subfolder, **options)  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{subfolder} of prior {source!r} cannot be loaded: {reason}") from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every file it reads; what is read here takes a moment."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _own_image_encoder(source: str) -> ImageEncoder:
    if source == SD15_RANDOM:
        return build_image_encoder(_SD15_IMAGE_ENCODER[0])
    folder = toy_prior_folder() if source == TOY else Path(source)
    if (folder / IMAGE_ENCODER / "open_clip_config.json").is_file():
        return build_image_encoder(str(folder / IMAGE_ENCODER))
    return build_image_encoder(*_SD15_IMAGE_ENCODER)


def prior_identity(source: str, unet: UNet2DConditionModel) -> dict[str, str]:
    """See `Prior.identity`; `source` is its name."""
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    return {
        "name": source,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weights": weights_fingerprint(unet),
    }


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of names, shapes and up to 256 evenly spaced float16 values of each tensor: quick at any size."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _FINGERPRINT_VALUES)].to("cpu", torch.float16)
        digest.update(f"{name}{tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _random_sd15(
    seed: int = 0,
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer, DDIMScheduler]:
    """Stable Diffusion 1.5's architecture; random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
        text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        text_encoder = CLIPTextModel(text)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return unet, vae, text_encoder, clip_tokenizer(), scheduler


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary that open_clip carries; no network."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    alphabet = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    vocab = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
