"""Which pixels the personalized expert drew: routing maps of one generation, averaged and by layer and step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from moa_train.losses import mean_prior_routing
from moa_train.symbols import PERSONALIZED, Observations


@dataclass(frozen=True)
class Routing:
    """R_1, the personalized expert's share in [0, 1], one row a picture, on the CPU in float32.

    mean: over all steps and the layers of the router loss (the first and last two are left out), latent resolution.
    steps: the same by step (axis t, in order of generation), mean over those layers.
    layers: by layer, each at its own resolution, mean over steps.
    timesteps: the diffusion timestep of each step.
    """

    mean: Float[Tensor, "b h w"]
    steps: Float[Tensor, "t b h w"]
    layers: dict[str, Tensor]
    timesteps: tuple[int, ...]


class RoutingRecorder:
    """Gathers one `Routing` while a generation runs; nothing is copied off the device before its end."""

    def __init__(self) -> None:
        """Start empty."""
        self._steps: list[Tensor] = []
        self._layers: dict[str, Tensor] = {}
        self._timesteps: list[Tensor | int] = []

    def add(self, observations: Observations, timestep: Tensor | int, size: tuple[int, int]) -> None:
        """Record one step; `size` is the latent's height and width."""
        prior = mean_prior_routing(observations, size)
        self._steps.append(1.0 - rearrange(prior.float(), "b 1 h w -> b h w"))
        self._timesteps.append(timestep)
        for layer, routing in observations.routing.items():
            height, width = observations.sizes[layer]
            share = rearrange(routing[..., PERSONALIZED].float(), "b (h w) -> b h w", h=height, w=width)
            self._layers[layer] = self._layers[layer] + share if layer in self._layers else share

    def result(self) -> Routing | None:
        """The record, or None if no step was seen."""
        if not self._steps:
            return None
        steps = torch.stack(self._steps).cpu()
        layers = {layer: (total / len(self._steps)).cpu() for layer, total in self._layers.items()}
        return Routing(steps.mean(dim=0), steps, layers, tuple(int(t) for t in self._timesteps))
