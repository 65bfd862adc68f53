"""The forward diffusion of latents: noising, targets, signal-to-noise weights, and randomness drawn from keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

NOISE, LATENT, TIMESTEP = 0, 1, 2
"""Independent streams of randomness of one key."""

PredictionType = Literal["epsilon", "v_prediction"]
_MASK = (1 << 64) - 1


def _betas(config: Mapping[str, Any]) -> Float[Tensor, " t"]:
    """Variances beta_t, with the names and defaults of diffusers' DDPMScheduler."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float32)
    schedule, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)], dtype=torch.float32)
    raise ValueError(f"beta_schedule {schedule!r} is unknown: use linear, scaled_linear or squaredcos_cap_v2")


def _zero_terminal_snr(alphas_cumprod: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Shift and scale sqrt(alpha_bar) so that the last step is pure noise (arXiv 2305.08891, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@dataclass(frozen=True)
class NoiseSchedule:
    """q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I), and what the U-Net is to predict."""

    alphas_cumprod: Float[Tensor, " t"]
    prediction_type: PredictionType = "epsilon"

    def __post_init__(self) -> None:
        """Refuse prediction types other than the two of Stable Diffusion."""
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction_type!r} is not supported: epsilon or v_prediction")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the config of a diffusers scheduler (`scheduler.config` or `scheduler_config.json`)."""
        alphas_cumprod = (1 - _betas(config)).cumprod(0)
        if config.get("rescale_betas_zero_snr", False):
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, config.get("prediction_type", "epsilon"))

    @property
    def steps(self) -> int:
        """Number of training timesteps."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Move the schedule, so that indexing by timesteps on `device` copies nothing."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def _alpha_bar(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        return self.alphas_cumprod.to(t.device)[t]

    def _signal_noise(self, t: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        alpha_bar = self._alpha_bar(t)[:, None, None, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(
        self, z: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """z_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise."""
        signal, sigma = self._signal_noise(t)
        return (signal * z + sigma * noise).to(z.dtype)

    def target(
        self, z: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """The noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) z."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_noise(t)
        return (signal * noise - sigma * z).to(z.dtype)

    def predicted_original(
        self, z_t: Float[Tensor, "b c h w"], prediction: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """z_0 that follows from z_t and a prediction; the inverse of `add_noise` for a perfect prediction."""
        signal, sigma = self._signal_noise(t)
        if self.prediction_type == "epsilon":
            return ((z_t - sigma * prediction) / signal).to(z_t.dtype)
        return (signal * z_t - sigma * prediction).to(z_t.dtype)

    def snr(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """alpha_bar / (1 - alpha_bar)."""
        alpha_bar = self._alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    def min_snr_weight(self, t: Int[Tensor, " b"], gamma: float) -> Float[Tensor, " b"]:
        """min(snr, gamma) / snr, for v: / (snr + 1) (Hang et al., arXiv 2303.09556).

        Written as min(1, gamma / snr), so that it is finite where the last step has no signal.
        """
        snr = self.snr(t)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1)


def mix(key: int, stream: int) -> int:
    """Seed of one stream of a key: two rounds of splitmix64, whose output bits all depend on all input bits."""
    value = key & _MASK
    for word in (stream, 0):
        value = (value ^ ((word + 1) * 0x9E3779B97F4A7C15)) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def keyed_noise(keys: Int[Tensor, " b"], shape: Sequence[int], stream: int = NOISE) -> Float[Tensor, "b ..."]:
    """Standard normal noise of `shape` for each key; a sample's noise does not depend on its batch or device."""
    noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(mix(key, stream))) for key in keys.tolist()]
    return torch.stack(noise).to(keys.device)


def keyed_timesteps(keys: Int[Tensor, " b"], steps: int, stream: int = TIMESTEP) -> Int[Tensor, " b"]:
    """A uniform timestep in [0, steps) for each key."""
    return torch.tensor([mix(key, stream) % steps for key in keys.tolist()], device=keys.device)
