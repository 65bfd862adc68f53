"""The router: decides for each pixel of an attention layer how much of each expert it takes (R of the paper)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moa_train.symbols import PERSONALIZED, PRIOR

RouterKind = Literal["mlp", "linear"]


class Router(nn.Module):
    """R = softmax(router(Z)) over the experts (prior, personalized), one distribution a pixel.

    kind: "mlp" (`LayerNorm -> Linear(d, d/4) -> GELU -> Linear(d/4, 2)`) or "linear" (`LayerNorm -> Linear(d, 2)`).
    initial_prior: R_0 before training, at every pixel; the last layer's weight starts at zero.
    hard: R is 1 for the more probable expert and 0 for the other, with the gradient of the softmax (straight-through,
        arXiv 1308.3432). A tie goes to the personalized expert, which would otherwise never be tried.
    """

    def __init__(self, dim: int, kind: RouterKind = "mlp", initial_prior: float = 0.5, hard: bool = False) -> None:
        super().__init__()
        if kind not in ("mlp", "linear"):
            raise ValueError(f"router kind {kind!r} is unknown: use mlp or linear")
        if not 0 < initial_prior < 1:
            raise ValueError(f"initial_prior is a probability between 0 and 1, given {initial_prior}")
        self.hard = hard
        width = dim // 4
        hidden = [nn.Linear(dim, width), nn.GELU()] if kind == "mlp" else []
        last = nn.Linear(width if kind == "mlp" else dim, 2)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias[PRIOR] = math.log(initial_prior / (1 - initial_prior)) / 2
            last.bias[PERSONALIZED] = -last.bias[PRIOR]
        self.layers = nn.Sequential(nn.LayerNorm(dim), *hidden, last)

    def forward(self, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Routing of each pixel; softmax in fp32, cast back to the dtype of `hidden`."""
        logits = self.layers(hidden)
        routing = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self.hard:
            chosen = (routing[..., PERSONALIZED] >= routing[..., PRIOR]).long()
            routing = F.one_hot(chosen, 2) + (routing - routing.detach())
        return routing.to(hidden.dtype)
