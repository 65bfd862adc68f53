"""The frozen text encoder and the image encoder (E_image), whose features make up the multimodal prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from moa_train.prompts import Tokenizer

TOY = "toy"
"""Name of the image encoder that ships with the package."""


class TextEncoder(nn.Module):
    """Stable Diffusion's text encoder with its tokenizer; frozen and always in evaluation mode."""

    def __init__(self, tokenizer: Tokenizer, transformer: CLIPTextModel) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.transformer = transformer.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, token_ids: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """C_prior: the last hidden states, after the final norm."""
        return self.transformer(token_ids)[0]


class ImageEncoder(nn.Module):
    """The vision tower of an open_clip model; its embedding of a subject's picture is the image feature f.

    Frozen but for its last `trainable_layers` transformer blocks (FastComposer trains 2); always in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, visual: nn.Module, trainable_layers: int = 0, architecture: Mapping[str, Any] | None = None
    ) -> None:
        """Freeze `visual`; `architecture`, open_clip's configuration of the model that it comes from, allows `save`."""
        super().__init__()
        self.architecture = architecture
        self.visual = visual.requires_grad_(False).eval()
        tower: Any = visual
        self.dim: int = tower.output_dim
        height, width = tower.image_size if isinstance(tower.image_size, tuple) else (tower.image_size,) * 2
        if height != width:
            raise ValueError(f"the image encoder takes {height} x {width} pixels: a square input is needed")
        self.image_size: int = height
        self.register_buffer("mean", torch.tensor(tower.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tower.image_std).view(3, 1, 1), persistent=False)
        self.trainable_layers = 0
        self.trained: list[str] = []
        if trainable_layers:
            self.unfreeze(trainable_layers)

    def unfreeze(self, count: int) -> None:
        """Let the last `count` transformer blocks train.

        Raises:
            ValueError: there are not so many.
        """
        blocks = self._blocks()
        if not 0 <= count <= len(blocks):
            raise ValueError(f"trainable_layers is {count}, this image encoder has {len(blocks)} transformer blocks")
        self.trainable_layers = count
        for block in self.trained_blocks():
            block.requires_grad_(True)
        self.trained = [name for name, value in self.named_parameters() if value.requires_grad]

    def _blocks(self) -> list[nn.Module]:
        return list(getattr(getattr(self.visual, "transformer", None), "resblocks", []))

    def trained_blocks(self) -> list[nn.Module]:
        """The last `trainable_layers` transformer blocks."""
        blocks = self._blocks()
        return blocks[len(blocks) - self.trainable_layers :]

    @property
    def device(self) -> torch.device:
        """Where it computes; diffusers asks every part of a pipeline."""
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights; diffusers asks every part of a pipeline."""
        return next(self.visual.parameters()).dtype

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(
        self, subject_pixels: Float[Tensor, "b s 3 r r"], present: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b s f"]:
        """f of each subject picture with values in [0, 1]; zeros in padded slots."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable_layers > 0):
            pixels = rearrange((subject_pixels - self.mean) / self.std, "b s c h w -> (b s) c h w")
            features = rearrange(self.visual(pixels), "(b s) f -> b s f", b=len(present))
            return torch.where(present[..., None], features, 0)

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The weights of the last `trainable_layers` blocks by name, frozen again for generation or not."""
        return {name: self.get_parameter(name).detach() for name in self.trained}

    def load_trained_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fill the unfrozen weights from `state`.

        Raises:
            ValueError: names other than those of the unfrozen weights.
        """
        own = self.trained_state_dict()
        if own.keys() != state.keys():
            raise ValueError(
                f"the weights hold {len(state)} image encoder tensors, {len(own)} are trainable here: "
                f"set image_encoder.trainable_layers (now {self.trainable_layers}) as in training"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write a folder that `build_image_encoder` reads, and open_clip as `local-dir:`; its text tower is a dummy.

        Raises:
            ValueError: an encoder whose architecture is not known.
        """
        if self.architecture is None:
            raise ValueError("this image encoder cannot be saved: make it with build_image_encoder(name)")
        folder.mkdir(parents=True, exist_ok=True)
        text = {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
        values = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        config = {"model_cfg": {**self.architecture, "text_cfg": text}, "preprocess_cfg": values}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        vision = {"image_size": 1, "patch_size": 1, "layers": 1, "width": 8, "head_width": 8}
        kind = open_clip.CustomTextCLIP if self.architecture.get("custom_text") else open_clip.CLIP
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dummy = kind(self.architecture["embed_dim"], vision, text).to(self.dtype).state_dict()
        state = {name: value for name, value in dummy.items() if not name.startswith("visual.")}
        state |= {f"visual.{name}": value.contiguous() for name, value in self.visual.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")


def build_image_encoder(name: str, pretrained: str | None = None, trainable_layers: int = 0) -> ImageEncoder:
    """Load an open_clip vision tower.

    Args:
        name: "toy" (bundled), a folder with open_clip_config.json and open_clip_model.safetensors, "hf-hub:owner/name",
            or an open_clip architecture such as "ViT-L-14". pretrained: tag or file of its weights; None: random ones.

    Raises:
        ValueError: an unknown name, or weights that cannot be loaded.
    """
    model, source = load_open_clip(name, pretrained)
    return ImageEncoder(model.visual, trainable_layers, open_clip.get_model_config(source))


def load_open_clip(name: str, pretrained: str | None = None) -> tuple[Any, str]:
    """An open_clip model, both towers, and what open_clip calls it; arguments and errors of `build_image_encoder`."""
    folder = Path(str(files("moa_train") / "assets" / "toy_prior" / "image_encoder")) if name == TOY else Path(name)
    source = f"local-dir:{folder}" if folder.is_dir() else name
    try:
        return open_clip.create_model(source, pretrained=pretrained, weights_only=True), source
    except (RuntimeError, OSError, ValueError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"open_clip model {name!r} (pretrained={pretrained!r}) cannot be loaded: {reason}") from error
