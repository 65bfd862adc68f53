"""What happens between two denoising steps of a generation with subjects: late start, separation, recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from moa_train.inference.routing import RoutingRecorder
from moa_train.losses import mean_subject_attention
from moa_train.model.attention import MoACall

_MOVES = 10
"""Of the centres of k-means; on 16 x 16 pixels they rest after 3 to 5."""


class AfterStep:
    """The `callback_on_step_end` of a call of a pipeline with subjects, which calls the user's own at its end.

    Args:
        call: what the U-Net is given at every step; nothing is kept anywhere else.
        start: fraction of the steps that see the prior alone.
        owners: the subject of each slot, -1 in padded ones, where subjects are kept apart; None: they are not.
        recorder: gathers the routing; None: it is not recorded.
        options: of the call; the user's callback is taken out of them and this one put in.
    """

    def __init__(
        self,
        call: MoACall,
        start: float | int,
        owners: Int[Tensor, "b s"] | None,
        recorder: RoutingRecorder | None,
        options: dict[str, Any],
    ) -> None:
        self.call, self.start, self.owners, self.recorder = call, start, owners, recorder
        self.evidence: Float[Tensor, "b s h w"] | None = None
        self.own = options.get("callback_on_step_end")
        asked = options.get("callback_on_step_end_tensor_inputs", ["latents"])
        self.wanted = getattr(self.own, "tensor_inputs", None) or asked
        options["callback_on_step_end"] = self
        options["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(["latents", *self.wanted]))
        call.active = start == 0

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Record this step and set the call for the next one."""
        height, width = tensors["latents"].shape[-2:]
        if self.recorder is not None:
            self.recorder.add(self.call.observations(), timestep, (height, width))
        if self.owners is not None and self.call.free_attention:
            self._separate(self.owners, (height, width))
        self.call.active = step + 1 >= self.start * pipe.num_timesteps - 1e-6
        given = {name: tensors[name] for name in self.wanted}
        result = given if self.own is None else self.own(pipe, step, timestep, given)
        if self.call.conditioning.prior_rows and not pipe.do_classifier_free_guidance:
            self.call.conditioning = self.call.conditioning.personalized()  # a callback has switched guidance off
        return result

    def _separate(self, owners: Int[Tensor, "b s"], size: tuple[int, int]) -> None:
        seen = mean_subject_attention(self.call.free_observations(), size).float()
        self.evidence = seen if self.evidence is None else self.evidence + seen
        self.call.owned = owned(self.evidence, owners.to(seen.device))


def owned(attention: Float[Tensor, "b s h w"], owners: Int[Tensor, "b s"]) -> Float[Tensor, "b s h w"]:
    """1 in the slots of the subject whose region a pixel is in; 0 elsewhere.

    A region is what lies nearest to a subject's centre. Centres start at the centres of mass of each subject's A_s, so
    that a subject keeps its place, and k-means moves them to where all attention together gathers. The largest A_s of
    each pixel instead gave one subject's head and the other's shirt to one person: on the toy prior subjects mixed more
    than when left alone (docs/control.md).
    """
    members = F.one_hot(owners.clamp(min=0), owners.shape[1]) * (owners >= 0)[..., None]
    by_subject = torch.einsum("bshw,bsi->bihw", attention, members.to(attention.dtype)).flatten(2)
    share = by_subject / by_subject.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)
    height, width = attention.shape[-2:]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(attention)
    missing = (members.sum(dim=1) == 0)[..., None]
    centre, weight = share @ place, share.sum(dim=1, keepdim=True)
    for _ in range(_MOVES):
        near = F.one_hot(_nearest(centre, place, missing), share.shape[1]).transpose(1, 2) * weight
        mass = near.sum(dim=-1, keepdim=True)
        centre = torch.where(mass > 0, near @ place / mass.clamp(min=1e-12), centre)
    winner = rearrange(_nearest(centre, place, missing), "b (h w) -> b 1 h w", h=height)
    return (winner == rearrange(owners, "b s -> b s 1 1")).to(attention.dtype)


def _nearest(
    centre: Float[Tensor, "b s 2"], place: Float[Tensor, "n 2"], missing: Bool[Tensor, "b s 1"]
) -> Int[Tensor, "b n"]:
    return torch.cdist(centre, place.expand(len(centre), -1, -1)).masked_fill(missing, torch.inf).argmin(dim=1)


def slot_owners(owners: Sequence[Sequence[int]], copies: int) -> Int[Tensor, "b s"] | None:
    """The subject of each slot for a batch of prompts, `copies` rows each; None where no row has two subjects."""
    if all(len(set(row)) < 2 for row in owners):
        return None
    slots = max(len(row) for row in owners)
    padded = [[*row, *[-1] * (slots - len(row))] for row in owners for _ in range(copies)]
    return torch.tensor(padded)
