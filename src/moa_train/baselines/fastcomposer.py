"""FastComposer (Xiao et al., arXiv 2305.10431): the whole U-Net trains, on tokens fused with a post-fuse MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention
from einops import repeat
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from moa_train.conditioning.multimodal import noun_tokens
from moa_train.model.attention import PriorProcessor
from moa_train.model.one_expert import MultimodalProcessor
from moa_train.symbols import Conditioning


@dataclass(frozen=True)
class FastComposerConfig:
    """image_dim: width of an image feature. localized: blocks of the U-Net whose A_s is recorded, so localised."""

    name: ClassVar[str] = "fastcomposer"
    trains_unet: ClassVar[bool] = True

    image_dim: int
    localized: Sequence[str] = ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `FastComposerConfig(**values)` is the inverse."""
        return asdict(self)

    def tokens(self, layers: int, text_dim: int) -> PostFuse:
        """One fused token for all layers and timesteps."""
        return PostFuse(layers, text_dim, self.image_dim)

    def processor(self, attn: Attention, layer: str) -> PriorProcessor | MultimodalProcessor:
        """Attention over the fused prompt; self-attention as it was."""
        if not attn.is_cross_attention:
            return PriorProcessor()
        return MultimodalProcessor(layer, record=layer.startswith(tuple(f"{block}." for block in self.localized)))


class ResidualMLP(nn.Module):
    """LayerNorm -> Linear -> GELU -> Linear, plus the input where `residual` is set."""

    def __init__(self, wide: int, width: int, residual: bool) -> None:
        super().__init__()
        self.norm, self.residual = nn.LayerNorm(wide), residual
        self.first, self.second = nn.Linear(wide, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "*b _wide"]) -> Float[Tensor, "*b _width"]:
        """Of each vector by itself."""
        out = self.second(F.gelu(self.first(self.norm(x))))
        return x + out if self.residual else out


class PostFuse(nn.Module):
    """y = token + MLP1(LN([token; f])); y <- y + MLP2(LN y); m = LN(y): after the text encoder's last norm."""

    def __init__(self, layers: int, text_dim: int, image_dim: int) -> None:
        super().__init__()
        self.layers = layers
        self.first = ResidualMLP(text_dim + image_dim, text_dim, residual=False)
        self.second = ResidualMLP(text_dim, text_dim, residual=True)
        self.norm = nn.LayerNorm(text_dim)

    def forward(self, timestep: Num[Tensor, " b"], conditioning: Conditioning) -> Float[Tensor, "l b s d"]:
        """m of each subject slot, the same for every layer; `timestep` changes nothing."""
        token = noun_tokens(conditioning).to(self.norm.weight.dtype)
        feature = conditioning.image_features.to(token.dtype)
        fused = self.norm(self.second(token + self.first(torch.cat([token, feature], dim=-1))))
        return repeat(fused, "b s d -> l b s d", l=self.layers)
