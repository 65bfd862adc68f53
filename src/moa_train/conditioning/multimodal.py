"""The multimodal prompt: m_{t,l} = MLP(concat(f + PE(t, l), text token)), for each subject and attention layer."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange, repeat
from jaxtyping import Float, Num
from torch import Tensor, nn

from moa_train.symbols import Conditioning


class MultimodalTokens(nn.Module):
    """Fuses each subject's picture with the token of its noun, for all cross-attention layers at once.

    f_{t,l} = f + PE(t, l), PE = MLP(sinusoids of t) + one learned vector a layer.
    m_{t,l} = token + MLP(LayerNorm(concat(f_{t,l}, token))), whose last layer starts at zero, so that m is the token.

    layers: number of cross-attention layers l. text_dim: width d of a text token. image_dim: width f of a feature.
    sinusoids: number of sinusoidal features of t. use_timestep, use_layer: False takes that part of PE away.
    """

    def __init__(
        self,
        layers: int,
        text_dim: int,
        image_dim: int,
        sinusoids: int = 256,
        use_timestep: bool = True,
        use_layer: bool = True,
    ) -> None:
        super().__init__()
        self.layers, self.sinusoids = layers, sinusoids
        self.timestep_position = (
            nn.Sequential(nn.Linear(sinusoids, image_dim), nn.SiLU(), nn.Linear(image_dim, image_dim))
            if use_timestep
            else None
        )
        self.layer_position = nn.Parameter(0.02 * torch.randn(layers, image_dim)) if use_layer else None
        last = nn.Linear(text_dim, text_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        width = image_dim + text_dim
        self.fusion = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text_dim), nn.GELU(), last)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def position(self, timestep: Num[Tensor, " b"]) -> Float[Tensor, "l b f"] | None:
        """PE(t, l), or None where both of its parts are switched off."""
        parts = []
        if self.timestep_position is not None:
            features = get_timestep_embedding(timestep, self.sinusoids, downscale_freq_shift=0)
            parts.append(self.timestep_position(features.to(self.dtype))[None])
        if self.layer_position is not None:
            parts.append(repeat(self.layer_position, "l f -> l b f", b=len(timestep)))
        return sum(parts[1:], parts[0]).expand(self.layers, -1, -1) if parts else None

    def forward(self, timestep: Num[Tensor, " b"], conditioning: Conditioning) -> Float[Tensor, "l b s d"]:
        """m_{t,l} of each subject slot; what padded slots hold is for nobody to read."""
        token = repeat(noun_tokens(conditioning).to(self.dtype), "b s d -> l b s d", l=self.layers)
        feature = repeat(conditioning.image_features.to(self.dtype), "b s f -> l b s f", l=self.layers)
        position = self.position(timestep)
        if position is not None:
            feature = feature + rearrange(position, "l b f -> l b 1 f")
        return token + self.fusion(torch.cat([feature, token], dim=-1))


def noun_tokens(conditioning: Conditioning) -> Float[Tensor, "b s d"]:
    """The text token of each subject's noun; what padded slots hold is for nobody to read."""
    index = repeat(conditioning.subject_positions, "b s -> b s d", d=conditioning.prior_tokens.shape[-1])
    return conditioning.prior_tokens.gather(1, index)
