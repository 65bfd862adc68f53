"""The paper's symbols as frozen dataclasses, and the one meaning that an axis letter has in the whole project.

Axes: b batch; n pixels of an attention layer (n = h * w, row-major); s subject slots (padded to `max_subjects`);
k text tokens (77); d channels of a layer or token; f image-feature width; e experts (0 prior, 1 personalized);
l attention layers in order of execution; c h w picture or latent channels, rows, columns; r side of a subject picture.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

PRIOR, PERSONALIZED = 0, 1
"""Index of the two experts on the axis e of a routing map."""

_Bundle = TypeVar("_Bundle", "Conditioning", "Batch")


def _to(bundle: _Bundle, device: torch.device | str, dtype: torch.dtype | None = None) -> _Bundle:
    """Move every tensor of a bundle; floating tensors are cast to `dtype` where one is given."""
    moved: dict[str, Any] = {}
    for field in fields(bundle):
        value = getattr(bundle, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
    return replace(bundle, **moved)


@dataclass(frozen=True)
class Conditioning:
    """What the MoA U-Net is told besides z_t and t: C_prior, and what makes C_pers of it.

    prior_tokens: C_prior, the text-only prompt embedding; all that the prior expert ever sees.
    image_features: f, the image encoder's output for each subject slot (zeros in padded slots).
    subject_positions: index of the token that carries subject s (last token of its noun); 0 in padded slots.
    subject_present: False marks a padded slot, which changes nothing.
    prior_rows: the first `prior_rows` rows of the batch see the prior expert alone (the null half of guidance).
    """

    prior_tokens: Float[Tensor, "b k d"]
    image_features: Float[Tensor, "b s f"]
    subject_positions: Int[Tensor, "b s"]
    subject_present: Bool[Tensor, "b s"]
    prior_rows: int = 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every tensor to `device`; floating ones are cast to `dtype` where one is given."""
        return _to(self, device, dtype)

    def personalized(self) -> Conditioning:
        """The rows that the personalized expert sees."""
        rows = slice(self.prior_rows, None)
        return Conditioning(
            self.prior_tokens[rows],
            self.image_features[rows],
            self.subject_positions[rows],
            self.subject_present[rows],
        )


@dataclass(frozen=True)
class Observations:
    """What the attention layers showed during one forward pass, by layer name in order of execution.

    routing: R^l, softmax over experts, with its height and width in `sizes`.
    subject_attention: A_s^l, probability that a pixel's personalized cross-attention gives to subject token s,
        mean over heads, 0 for padded slots; cross-attention layers only.
    Rows: only those that the personalized expert saw (`prior_rows` rows are absent).
    """

    routing: dict[str, Float[Tensor, "b n e"]]
    subject_attention: dict[str, Float[Tensor, "b s n"]]
    sizes: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class LossTerms:
    """Per-sample losses before weights: L = masked + lambda_r * router + lambda_o * object."""

    masked: Float[Tensor, " b"]
    router: Float[Tensor, " b"]
    object: Float[Tensor, " b"]


@dataclass(frozen=True)
class Batch:
    """One padded batch. The stream hands it over in bytes, a quarter of the memory; `unpacked` makes floats of them.

    pixels: pictures in [-1, 1], or bytes; None where latents are given. foreground: M, the subjects' masks united.
    subject_masks: M_s in [0, 1] at picture resolution; area averages at latent resolution where latents are given.
    subject_pixels: each subject cut out of its background and resized for the image encoder, in [0, 1], or bytes.
    token_ids, subject_positions: the tokenised prompt (marker-free) and where its subjects sit.
    key: 63-bit integer derived from (seed, epoch, sample): noise, timestep and VAE sampling are drawn from it.
    sample: index of the sample in its data set. caption: the prompt as text with `<1>` markers; empty if unconditional.
    latents: posterior mean and standard deviation of the stored view, in place of pixels.
    """

    pixels: Float[Tensor, "b 3 h_pixels w_pixels"] | UInt8[Tensor, "b 3 h_pixels w_pixels"] | None
    subject_masks: Float[Tensor, "b s h w"] | Bool[Tensor, "b s h w"]
    subject_pixels: Float[Tensor, "b s 3 r r"] | UInt8[Tensor, "b s 3 r r"]
    subject_present: Bool[Tensor, "b s"]
    token_ids: Int[Tensor, "b k"]
    subject_positions: Int[Tensor, "b s"]
    key: Int[Tensor, " b"]
    sample: Int[Tensor, " b"]
    caption: tuple[str, ...]
    latents: Float[Tensor, "b 2 c h_latent w_latent"] | None = None

    @property
    def foreground(self) -> Float[Tensor, "b 1 h w"]:
        """M: the union of the subjects' masks."""
        return self.subject_masks.sum(dim=1, keepdim=True).clamp(max=1)

    def unpacked(self) -> Batch:
        """The batch with floats in place of bytes, once it is where it is used; floats stay as they are."""
        pixels, subjects = self.pixels, self.subject_pixels
        if pixels is not None and pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(127.5).sub_(1.0)
        if subjects.dtype == torch.uint8:
            subjects = subjects.float().div_(255.0)
        return replace(self, pixels=pixels, subject_pixels=subjects, subject_masks=self.subject_masks.float())

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to `device`."""
        return _to(self, device)

    def pin_memory(self) -> Batch:
        """Copy every tensor into page-locked memory, from which a copy to an accelerator does not block."""
        pinned: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                pinned[field.name] = value.pin_memory()
        return replace(self, **pinned)
