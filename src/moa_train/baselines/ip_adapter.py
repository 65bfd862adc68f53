"""IP-Adapter (Ye et al., arXiv 2308.06721): decoupled cross-attention to image tokens beside a frozen U-Net."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import ImageProjection
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from moa_train.model.attention import MoACall, PriorProcessor
from moa_train.model.one_expert import OneExpertProcessor, projected
from moa_train.symbols import Conditioning


@dataclass(frozen=True)
class IPAdapterConfig:
    """image_dim: width of an image feature. image_tokens: for each subject. scale: of the image attention's output."""

    name: ClassVar[str] = "ip_adapter"
    trains_unet: ClassVar[bool] = False

    image_dim: int
    image_tokens: int = 4
    scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `IPAdapterConfig(**values)` is the inverse."""
        return asdict(self)

    def tokens(self, layers: int, text_dim: int) -> ImageTokens:
        """The image prompt: the same for all layers and timesteps."""
        return ImageTokens(layers, text_dim, self.image_dim, self.image_tokens)

    def processor(self, attn: Attention, layer: str) -> PriorProcessor | IPAdapterProcessor:
        """Decoupled cross-attention; self-attention stays the prior's."""
        return IPAdapterProcessor(attn, layer, self.scale) if attn.is_cross_attention else PriorProcessor()


class ImageTokens(nn.Module):
    """diffusers' projection of an image feature to a few tokens: Linear, then LayerNorm."""

    def __init__(self, layers: int, text_dim: int, image_dim: int, number: int) -> None:
        super().__init__()
        self.layers = layers
        self.projection = ImageProjection(image_dim, text_dim, number)

    def forward(self, timestep: Num[Tensor, " b"], conditioning: Conditioning) -> Float[Tensor, "l b s td"]:
        """The t tokens of each subject, one behind the other; `timestep` changes nothing."""
        features = conditioning.image_features.to(self.projection.norm.weight.dtype)
        tokens = self.projection(rearrange(features, "b s f -> (b s) f"))
        return repeat(tokens, "(b s) t d -> l b s (t d)", l=self.layers, b=len(features))


class IPAdapterProcessor(OneExpertProcessor, nn.Module):
    """out = W_out (Attention(Q, K_text, V_text) + scale Attention(Q, K_image, V_image)); only K_image, V_image train.

    Both begin as copies of the text's. The image tokens of all subjects stand in one row; a sample without a subject,
    like the call's first `prior_rows` rows, has no image part.
    """

    def __init__(self, attn: Attention, layer: str, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.key, self.value = (copy.deepcopy(linear).requires_grad_(True) for linear in (attn.to_k, attn.to_v))

    def mixed(
        self, attn: Attention, hidden: Float[Tensor, "b n d"], tokens: Float[Tensor, "b k _d"], moa: MoACall
    ) -> Float[Tensor, "b heads n c"]:
        """The sum of both attentions."""
        skip = moa.conditioning.prior_rows
        query, key, value = projected(attn, hidden, tokens)
        mixed = F.scaled_dot_product_attention(query, key, value)
        image = self._image(query[skip:], moa.subject_tokens[self.layer], moa.conditioning.subject_present[skip:])
        return torch.cat([mixed[:skip], mixed[skip:] + self.scale * image])

    def _image(
        self, query: Float[Tensor, "b heads n c"], tokens: Float[Tensor, "b s td"], present: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b heads n c"]:
        """Attention(Q, K_image, V_image) over the tokens of the subjects that are there; 0 where there is none."""
        context = rearrange(tokens, "b s (t d) -> b (s t) d", d=self.key.in_features)
        key, value = (
            rearrange(linear(context).to(query.dtype), "b k (heads d) -> b heads k d", heads=query.shape[1])
            for linear in (self.key, self.value)
        )
        some = present.any(dim=1)[:, None, None, None]
        seen = repeat(present, "b s -> b 1 1 (s t)", t=context.shape[1] // present.shape[1])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen | ~some) * some
