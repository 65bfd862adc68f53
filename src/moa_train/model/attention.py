"""The MoA layer as a diffusers attention processor: out = sum_n R_n Attention_n(Z, C_n), n in {prior, personalized}."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from moa_train.model.control import Control, ControlMaps, token_mask
from moa_train.model.router import Router
from moa_train.symbols import PERSONALIZED, Conditioning, Observations

_PRIOR_ATTENTION = AttnProcessor2_0()


class MoACall:
    """What one forward pass of the U-Net carries in `cross_attention_kwargs={"moa": call}`: conditioning and record.

    The U-Net's forward pre-hook fills `subject_tokens` (m_{t,l}, by cross-attention layer) and the sizes, and empties
    the record; each layer assigns to the record by its name, since a checkpointed layer runs twice.
    Read `observations()` between the forward and the backward pass, and make a new call for each training step.

    A generation keeps one call for all of its steps, and may set between them: `active` (False: the prior alone) and
    `owned` (see `ControlMaps`).
    """

    def __init__(self, conditioning: Conditioning, record: bool = False, control: Control | None = None) -> None:
        self.conditioning = conditioning
        self.record = record
        self.control = control
        self.active = True
        self.owned: Float[Tensor, "b s h w"] | None = None
        self.maps: ControlMaps | None = None
        self.subject_tokens: dict[str, Float[Tensor, "b s d"]] = {}
        self.subject_slots: Float[Tensor, "b s k"] | None = None
        self.latent_size = (0, 0)
        self.needs_gradient = False
        self.routing: dict[str, Float[Tensor, "b n e"]] = {}
        self.subject_attention: dict[str, Float[Tensor, "b s n"]] = {}
        self.free_attention: dict[str, Float[Tensor, "b s n"]] = {}

    def begin(self, latent_size: tuple[int, int], subject_tokens: dict[str, Float[Tensor, "b s d"]]) -> None:
        """Start a forward pass: set what its layers read, and empty the record."""
        skip, tokens = self.conditioning.prior_rows, self.conditioning.prior_tokens
        positions, present = self.conditioning.subject_positions[skip:], self.conditioning.subject_present[skip:]
        if self.control is not None:
            if self.maps is None or self.latent_size != latent_size:
                self.maps = self.control.at(latent_size, tokens.device)
            self.maps = replace(self.maps, owned=self.owned)
        self.latent_size = latent_size
        self.subject_tokens = subject_tokens
        slots = positions[..., None] == torch.arange(tokens.shape[1], device=tokens.device)
        self.subject_slots = (slots & present[..., None]).to(tokens.dtype)
        self.needs_gradient = torch.is_grad_enabled()
        self.routing, self.subject_attention, self.free_attention = {}, {}, {}

    def prior_alone(self, layer: str) -> bool:
        """Whether the personalized expert of a layer has no say at this step."""
        return not self.active or (self.maps is not None and self.maps.strength.get(layer) == 0)

    def route(self, layer: str, learned: Float[Tensor, "b n e"]) -> Float[Tensor, "b n e"]:
        """R of a layer: what the router says, after the caller's control."""
        return learned if self.maps is None else self.maps.share(layer, learned, self.size_of(learned.shape[1]))

    def visible(self, pixels: int) -> Bool[Tensor, "b s n"] | None:
        """The pixels of a layer that may attend to each slot's token; None: all."""
        return None if self.maps is None else self.maps.visible(self.size_of(pixels))

    def personalized_tokens(self, layer: str, prior_tokens: Float[Tensor, "b k d"]) -> Float[Tensor, "b k d"]:
        """C_pers: the prompt with the subjects' tokens replaced by this layer's multimodal tokens."""
        slots, tokens = self.subject_slots, self.subject_tokens[layer]
        assert slots is not None, "the U-Net's pre-hook did not run"
        placed = torch.einsum("bsk,bsd->bkd", slots.to(tokens.dtype), tokens)
        return torch.where(slots.sum(1).bool()[..., None], placed.to(prior_tokens.dtype), prior_tokens)

    def size_of(self, pixels: int) -> tuple[int, int]:
        """Height and width of a layer with so many pixels: the U-Net halves the latent, rounding up."""
        height, width = self.latent_size
        while height * width > pixels:
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != pixels:
            raise ValueError(f"an attention layer has {pixels} pixels, no halving of the latent {self.latent_size} has")
        return height, width

    def observations(self) -> Observations:
        """What the layers recorded in the last forward pass."""
        pixels = {layer: maps.shape[-1] for layer, maps in self.subject_attention.items()}
        pixels |= {layer: maps.shape[1] for layer, maps in self.routing.items()}
        sizes = {layer: self.size_of(number) for layer, number in pixels.items()}
        return Observations(dict(self.routing), dict(self.subject_attention), sizes)

    def free_observations(self) -> Observations:
        """The same, with A_s as it is where every pixel sees every subject: where a subject would be."""
        return replace(self.observations(), subject_attention=dict(self.free_attention))


class PriorProcessor(AttnProcessor2_0):
    """diffusers' attention, unchanged, for layers without a personalized expert; accepts and ignores `moa`."""

    takes_moa = True

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        moa: MoACall | None = None,
    ) -> Tensor:
        """The prior's output."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class MoAProcessor(nn.Module):
    """The personalized expert and the router of one attention layer; the served `Attention` stays the prior expert.

    The expert starts as a copy of the prior. Linears are not named `to_q` ..., else LoRA would wrap them too.
    """

    takes_moa = True

    def __init__(self, attn: Attention, layer: str, router: Router) -> None:
        super().__init__()
        self.layer, self.heads = layer, attn.heads
        self.query, self.key, self.value, self.output = (
            copy.deepcopy(linear).requires_grad_(True) for linear in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        )
        self.router = router

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b n d"],
        encoder_hidden_states: Float[Tensor, "b k _d"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        moa: MoACall | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The layer's output; without `moa`, or for the call's first `prior_rows` rows, that of the prior alone."""
        prior = _PRIOR_ATTENTION(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if moa is None:
            return prior
        skip = moa.conditioning.prior_rows
        if skip == len(prior):
            return prior
        self._check(moa, attention_mask)
        if moa.prior_alone(self.layer):
            if moa.record:
                moa.routing[self.layer] = _all_prior(prior[skip:])
            return prior
        context = None if encoder_hidden_states is None else encoder_hidden_states[skip:]
        blended = self._blend(moa, hidden_states[skip:], context, prior[skip:])
        return torch.cat([prior[:skip], blended]) if skip else blended

    def _blend(
        self,
        moa: MoACall,
        hidden: Float[Tensor, "b n d"],
        prior_tokens: Float[Tensor, "b k _d"] | None,
        prior: Float[Tensor, "b n d"],
    ) -> Float[Tensor, "b n d"]:
        """R_0 prior + R_1 personalized, written as one interpolation since R_0 = 1 - R_1: exact at both ends."""
        hidden = _like_weights(hidden, self.query)
        context = hidden if prior_tokens is None else moa.personalized_tokens(self.layer, prior_tokens)
        routing = moa.route(self.layer, self.router(hidden))
        personalized = self._personalized(hidden, context, moa if prior_tokens is not None else None)
        if moa.record:
            moa.routing[self.layer] = routing
        share = routing[..., PERSONALIZED, None].to(prior.dtype)
        return torch.lerp(prior, personalized.to(prior.dtype), share)

    def _personalized(
        self, hidden: Float[Tensor, "b n d"], context: Float[Tensor, "b k _d"], moa: MoACall | None
    ) -> Float[Tensor, "b n d"]:
        """Attention(Z, C_pers) with the personalized weights; `moa` for cross-attention, which records A_s."""
        context = _like_weights(context, self.key)
        query, key, value = (
            rearrange(linear(x), "b n (heads d) -> b heads n d", heads=self.heads)
            for linear, x in ((self.query, hidden), (self.key, context), (self.value, context))
        )
        mask = None
        if moa is not None:
            assert moa.subject_slots is not None
            visible = moa.visible(hidden.shape[1])
            mask = None if visible is None else token_mask(visible, moa.subject_slots)
            if moa.record:
                moa.free_attention[self.layer] = free = subject_attention(query, key, moa.subject_slots)
                used = free if mask is None else subject_attention(query, key, moa.subject_slots, mask)
                moa.subject_attention[self.layer] = used
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(rearrange(mixed, "b heads n d -> b n (heads d)"))

    def _check(self, moa: MoACall, attention_mask: Tensor | None) -> None:
        if attention_mask is not None:
            raise ValueError("MoA layers take no attention mask: call the U-Net without attention_mask")
        if moa.needs_gradient and not torch.is_grad_enabled():
            raise ValueError("reentrant checkpointing loses the router's gradients: use use_reentrant=False")


def _like_weights(x: Tensor, layer: nn.Linear) -> Tensor:
    """Cast to the dtype of a layer's weights, unless autocast chooses it."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x if autocast else x.to(layer.weight.dtype)


def _all_prior(rows: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
    """R of rows that the prior alone has made."""
    return rows.new_tensor([1.0, 0.0]).expand(*rows.shape[:2], 2)


def subject_attention(
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b heads k d"],
    slots: Float[Tensor, "b s k"],
    mask: Bool[Tensor, "b 1 n k"] | None = None,
) -> Float[Tensor, "b s n"]:
    """A_s: probability that each pixel gives to each subject's token, mean over heads; 0 for empty slots.

    A second attention whose values are one-hot for the subjects' tokens, padded to the head's width, has these columns
    as its output; so the fused kernel never writes the b x heads x n x k probabilities.
    """
    count, width = slots.shape[1], query.shape[-1]
    assert count <= width, "more subject slots than channels of a head"
    values = F.pad(rearrange(slots.to(query.dtype), "b s k -> b 1 k s"), (0, width - count))
    columns = F.scaled_dot_product_attention(query, key, values.expand(-1, query.shape[1], -1, -1), mask)
    return rearrange(columns[..., :count].mean(1), "b n s -> b s n")
