"""The objective: L = L_masked + lambda_r(progress) L_router + lambda_o L_object, and what is watched beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moa_train import losses
from moa_train.diffusion import NoiseSchedule, keyed_noise
from moa_train.symbols import Batch, LossTerms, Observations

MASK = 3
"""Stream of randomness of a sample's masked-or-plain draw, beside diffusion.NOISE, LATENT and TIMESTEP."""


@dataclass(frozen=True)
class RouterLoss:
    """lambda_r and when it acts: weight 0 for `warmup` of the run, then a linear ramp over `ramp` of the run.

    A router that is pulled to the prior from the first step starves the personalized expert before it can learn.
    """

    weight: float = 0.01
    warmup: float = 0.0
    ramp: float = 0.0
    skip_first: int = 2
    skip_last: int = 2

    def __post_init__(self) -> None:
        if not (self.warmup >= 0 and self.ramp >= 0 and self.warmup + self.ramp <= 1):
            raise ValueError(
                f"loss.router.warmup={self.warmup} and loss.router.ramp={self.ramp} are fractions of the run: "
                "expected both at least 0 and their sum at most 1"
            )

    def weight_at(self, progress: float) -> float:
        """lambda_r after the fraction `progress` of the run."""
        since = progress - self.warmup
        if since < 0:
            return 0.0
        return self.weight if self.ramp == 0 else self.weight * min(since / self.ramp, 1.0)


@dataclass(frozen=True)
class ObjectLoss:
    """lambda_o and which of the two losses on A_s it weighs."""

    weight: float = 0.001
    kind: Literal["masked_l2", "balanced_l1"] = "masked_l2"

    def __post_init__(self) -> None:
        if self.kind not in ("masked_l2", "balanced_l1"):
            raise ValueError(f"loss.object.kind={self.kind!r}: expected masked_l2 or balanced_l1")


@dataclass(frozen=True)
class LossSettings:
    """The weights of the objective.

    mask_probability: share of the samples whose error is averaged over the foreground; the others take all pixels.
    mask_warmup: fraction of the run at whose beginning every sample's error is averaged over the foreground.
    masked_mean: what divides the error inside the foreground: the "mask"'s area or the "picture"'s (FastComposer).
    min_snr_gamma: weight of a timestep by min(SNR, gamma) (arXiv 2303.09556); None: every timestep counts alike.
    """

    router: RouterLoss = RouterLoss()
    object: ObjectLoss = ObjectLoss()
    mask_probability: float = 1.0
    mask_warmup: float = 0.0
    masked_mean: Literal["mask", "picture"] = "mask"
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.masked_mean not in ("mask", "picture"):
            raise ValueError(f"loss.masked_mean={self.masked_mean!r}: expected mask or picture")
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"loss.mask_probability={self.mask_probability}: expected a probability from 0 to 1")
        if not 0 <= self.mask_warmup <= 1:
            raise ValueError(f"loss.mask_warmup={self.mask_warmup}: expected a fraction of the run from 0 to 1")

    def at(self, progress: float) -> LossSettings:
        """The settings after the fraction `progress` of the run."""
        return replace(self, mask_probability=1.0) if progress < self.mask_warmup else self

    def weighted(self, terms: LossTerms, progress: float) -> Float[Tensor, " b"]:
        """Each sample's objective."""
        return terms.masked + self.router.weight_at(progress) * terms.router + self.object.weight * terms.object

    def total(self, terms: LossTerms, progress: float) -> Float[Tensor, ""]:
        """The batch's objective: that of its samples, averaged.

        A sample without a subject counts with L_masked = L_object = 0. The divisor is the batch, not the number of
        subjects in it, so that ranks and accumulated micro-batches add up to exactly one large batch.
        """
        return self.weighted(terms, progress).mean()


@dataclass(frozen=True)
class Masks:
    """The masks of a batch at latent resolution; `foreground` is M, `subjects` are the M_s."""

    foreground: Float[Tensor, "b 1 h w"]
    subjects: Float[Tensor, "b s h w"]

    @classmethod
    def of(cls, batch: Batch, size: tuple[int, int]) -> Masks:
        """Area-averages the batch's masks to `size` (rows, columns)."""
        subjects = F.adaptive_avg_pool2d(batch.subject_masks.float(), size)
        return cls(F.adaptive_avg_pool2d(batch.foreground.float(), size), subjects)


def compute_losses(
    settings: LossSettings,
    schedule: NoiseSchedule,
    batch: Batch,
    masks: Masks,
    timesteps: Int[Tensor, " b"],
    prediction: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    observations: Observations,
) -> LossTerms:
    """The three losses of every sample; training and validation share it.

    A model that records no routing (a baseline) has no router loss; without subject attention no object loss.
    """
    size = (prediction.shape[-2], prediction.shape[-1])
    masked = losses.masked_reconstruction(prediction, target, masks.foreground)
    if settings.masked_mean == "picture":
        masked = masked * masks.foreground.mean((1, 2, 3))
    if settings.mask_probability < 1:
        plain = losses.plain_reconstruction(prediction, target)
        masked = torch.where(draw_masked(batch.key, settings.mask_probability).to(masked.device), masked, plain)
    if settings.min_snr_gamma is not None:
        masked = masked * schedule.min_snr_weight(timesteps, settings.min_snr_gamma).to(masked.device)
    router = torch.zeros_like(masked)
    if observations.routing:
        r_bar = losses.mean_prior_routing(observations, size, settings.router.skip_first, settings.router.skip_last)
        router = losses.router_loss(r_bar, masks.foreground)
    object_ = torch.zeros_like(masked)
    if observations.subject_attention:
        attention = losses.mean_subject_attention(observations, size)
        object_ = losses.object_loss(attention, masks.subjects, batch.subject_present, settings.object.kind)
    return LossTerms(masked, router, object_)


def draw_masked(key: Int[Tensor, " b"], probability: float) -> Bool[Tensor, " b"]:
    """Whether a sample's error is averaged over its foreground: true with `probability`, a function of its key."""
    return torch.special.ndtr(keyed_noise(key, (1,), MASK))[:, 0] < probability


@torch.no_grad()
def watched(observations: Observations, batch: Batch, masks: Masks) -> dict[str, tuple[Tensor, Tensor]]:
    """R_0 (mean over all layers) and A_s inside and outside the subject: name -> (mean, number of subjects).

    Only samples with a subject count. A_s is compared with its own M_s.
    """
    size = (masks.foreground.shape[-2], masks.foreground.shape[-1])
    has_subject = batch.subject_present.any(dim=1)
    shown: dict[str, tuple[Tensor, Tensor]] = {}
    if observations.routing:
        routing = losses.mean_prior_routing(observations, size, 0, 0)
        shown |= _sides("routing", routing, masks.foreground, has_subject[:, None])
    if observations.subject_attention:
        attention = losses.mean_subject_attention(observations, size)
        shown |= _sides("attention", attention, masks.subjects, batch.subject_present)
    return shown


def _sides(
    name: str, maps: Float[Tensor, "b s h w"], mask: Float[Tensor, "b s h w"], counted: Bool[Tensor, "b s"]
) -> dict[str, tuple[Tensor, Tensor]]:
    number = counted.sum()
    sides = {}
    for side, area in (("inside", mask), ("outside", 1 - mask)):
        mean = (maps.float() * area).sum((-2, -1)) / area.sum((-2, -1)).clamp_min(1e-6)
        sides[f"{name}_{side}"] = ((mean * counted).sum() / number.clamp_min(1), number)
    return sides


def with_wrong_subject(features: Float[Tensor, "b s f"], present: Bool[Tensor, "b s"]) -> Float[Tensor, "b s f"]:
    """The features with every subject's replaced by the next sample's (slot by slot; padded slots stay)."""
    rolled = features.transpose(0, 1).clone()
    slots = present.transpose(0, 1)
    rolled[slots] = rolled[slots].roll(1, dims=0)
    return rolled.transpose(0, 1)
