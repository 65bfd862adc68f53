"""Attention whose one expert reads the multimodal prompt: of baselines, and of MoA's layers that only read it."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moa_train.model.attention import MoACall, PriorProcessor, subject_attention


class OneExpertProcessor:
    """Cross-attention that sees subjects, with the weights of the `Attention` that it serves.

    Without `moa`, or where none of its rows sees a subject, the prior's over the text alone. What is not inherited:
    `mixed`, the heads' output otherwise.
    """

    takes_moa = True

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b n d"],
        encoder_hidden_states: Float[Tensor, "b k _d"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        moa: MoACall | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The layer's output."""
        assert encoder_hidden_states is not None, "cross-attention only"
        if moa is None or not moa.active or moa.conditioning.prior_rows == len(hidden_states):
            return PriorProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)
        mixed = self.mixed(attn, hidden_states, encoder_hidden_states, moa)
        return attn.to_out[0](rearrange(mixed, "b heads n c -> b n (heads c)"))

    def mixed(
        self, attn: Attention, hidden: Float[Tensor, "b n d"], tokens: Float[Tensor, "b k _d"], moa: MoACall
    ) -> Float[Tensor, "b heads n c"]:
        """Attention over text and subjects, by head; the call's first `prior_rows` rows see the text alone."""
        raise NotImplementedError


class MultimodalProcessor(OneExpertProcessor):
    """Cross-attention over C_pers; A_s is recorded where asked for."""

    def __init__(self, layer: str, record: bool = True) -> None:
        self.layer, self.record = layer, record

    def mixed(
        self, attn: Attention, hidden: Float[Tensor, "b n d"], tokens: Float[Tensor, "b k _d"], moa: MoACall
    ) -> Float[Tensor, "b heads n c"]:
        """Attention(Z, C_pers)."""
        skip = moa.conditioning.prior_rows
        subjects = moa.personalized_tokens(self.layer, tokens[skip:])
        query, key, value = projected(attn, hidden, torch.cat([tokens[:skip], subjects]))
        if moa.record and self.record:
            assert moa.subject_slots is not None
            moa.subject_attention[self.layer] = subject_attention(query[skip:], key[skip:], moa.subject_slots)
        return F.scaled_dot_product_attention(query, key, value)


def projected(
    attn: Attention, hidden: Float[Tensor, "b n d"], context: Float[Tensor, "b k _d"]
) -> tuple[Float[Tensor, "b heads n c"], Float[Tensor, "b heads k c"], Float[Tensor, "b heads k c"]]:
    """Query, key and value of a layer by head."""
    query, key, value = (
        rearrange(linear(x), "b n (heads d) -> b heads n d", heads=attn.heads)
        for linear, x in ((attn.to_q, hidden), (attn.to_k, context), (attn.to_v, context))
    )
    return query, key, value
