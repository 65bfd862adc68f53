"""Attention whose one expert reads the multimodal prompt: of baselines, and of MoA's layers that only read it."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moa_train.model.attention import MoACall, PriorProcessor, subject_attention


class MultimodalProcessor(PriorProcessor):
    """Cross-attention over C_pers, with the weights of the `Attention` that it serves; A_s is recorded where asked for.

    Without `moa`, or for the call's first `prior_rows` rows, over the text alone.
    """

    def __init__(self, layer: str, record: bool = True) -> None:
        super().__init__()
        self.layer, self.record = layer, record

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
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        skip = moa.conditioning.prior_rows
        subjects = moa.personalized_tokens(self.layer, encoder_hidden_states[skip:])
        query, key, value = projected(attn, hidden_states, torch.cat([encoder_hidden_states[:skip], subjects]))
        if moa.record and self.record:
            assert moa.subject_slots is not None
            moa.subject_attention[self.layer] = subject_attention(query[skip:], key[skip:], moa.subject_slots)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](rearrange(mixed, "b heads n d -> b n (heads d)"))


def projected(
    attn: Attention, hidden: Float[Tensor, "b n d"], context: Float[Tensor, "b k _d"]
) -> tuple[Float[Tensor, "b heads n c"], Float[Tensor, "b heads k c"], Float[Tensor, "b heads k c"]]:
    """Query, key and value of a layer by head."""
    query, key, value = (
        rearrange(linear(x), "b n (heads d) -> b heads n d", heads=attn.heads)
        for linear, x in ((attn.to_q, hidden), (attn.to_k, context), (attn.to_v, context))
    )
    return query, key, value
