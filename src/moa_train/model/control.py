"""Control at sampling: routing scaled, forced or limited to regions; each subject's token seen from its own pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from moa_train.symbols import PERSONALIZED


@dataclass(frozen=True)
class Control:
    """What a caller asks of the personalized expert; rows are those that it sees. The default changes nothing.

    strength: R_1 becomes min(1, strength R_1); by layer name, 1 where none is given; 0 leaves the layer to the prior.
    routing: one map (rows, columns) in [0, 1] a row of the batch, in the place of the learned R_1; then scaled.
    regions: for each row one map a slot: R_1 is multiplied by their union, and a pixel attends to the token of a slot
        only where none of the row's other regions covers it better.
    """

    strength: Mapping[str, float]
    routing: Sequence[Tensor] | None = None
    regions: Sequence[Sequence[Tensor]] | None = None

    def at(self, size: tuple[int, int], device: torch.device) -> ControlMaps:
        """The maps at the latent's height and width."""
        routing = None if self.routing is None else _stack(self.routing, size, device)
        regions = None if self.regions is None else torch.stack([_stack(row, size, device) for row in self.regions])
        return ControlMaps(self.strength, routing, regions)


@dataclass(frozen=True)
class ControlMaps:
    """A `Control` with its maps as tensors of one size, from which each layer takes its own.

    owned: 1 where a pixel belongs to the subject of a slot, found from attention while the picture is made; only this
        slot's token is seen there.
    """

    strength: Mapping[str, float]
    routing: Float[Tensor, "b h w"] | None = None
    regions: Float[Tensor, "b s h w"] | None = None
    owned: Float[Tensor, "b s h w"] | None = None

    def share(self, layer: str, learned: Float[Tensor, "b n e"], size: tuple[int, int]) -> Float[Tensor, "b n e"]:
        """R of a layer: forced, scaled, limited; the very tensor where nothing of it is asked."""
        strength = self.strength.get(layer, 1.0)
        if strength == 1.0 and self.routing is None and self.regions is None:
            return learned
        share = learned[..., PERSONALIZED]
        if self.routing is not None:
            share = _pixels(self.routing[:, None], size)[:, 0].to(share.dtype)
        share = (strength * share).clamp(max=1.0)
        if self.regions is not None:
            share = share * _pixels(self.regions, size).amax(dim=1).to(share.dtype)
        return torch.stack([1.0 - share, share], dim=-1)

    def visible(self, size: tuple[int, int]) -> Bool[Tensor, "b s n"] | None:
        """Where each slot's token may be attended to; None: everywhere."""
        if self.regions is None and self.owned is None:
            return None
        seen = [_largest(_pixels(maps, size)) for maps in (self.regions, self.owned) if maps is not None]
        return seen[0] if len(seen) == 1 else seen[0] & seen[1]


def token_mask(visible: Bool[Tensor, "b s n"], slots: Float[Tensor, "b s k"]) -> Bool[Tensor, "b 1 n k"]:
    """False where a pixel may not attend to a token, as `scaled_dot_product_attention` takes it."""
    hidden = torch.einsum("bsn,bsk->bnk", (~visible).to(slots.dtype), slots)
    return rearrange(hidden == 0, "b n k -> b 1 n k")


def _largest(maps: Float[Tensor, "b s n"]) -> Bool[Tensor, "b s n"]:
    """Which slots cover most of a pixel: at a coarse layer regions meet inside one; equal shares all count."""
    return (maps > 0) & (maps >= maps.amax(dim=1, keepdim=True))


def _stack(maps: Sequence[Tensor], size: tuple[int, int], device: torch.device) -> Float[Tensor, "m h w"]:
    return torch.stack([F.adaptive_avg_pool2d(one[None].to(device), size)[0] for one in maps])


def _pixels(maps: Float[Tensor, "b s h w"], size: tuple[int, int]) -> Float[Tensor, "b s n"]:
    """Area averages at a layer's height and width."""
    return rearrange(F.adaptive_avg_pool2d(maps, size), "b s h w -> b s (h w)")
