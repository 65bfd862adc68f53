"""Which pixels the personalized expert drew: routing maps of one generation, by layer and step."""

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

    steps: by step (axis t, in order of generation), mean over the layers of the router loss (the first and last two are
        left out), at latent resolution.
    layer_steps: by layer (in order of execution) and step, each layer at its own resolution.
    timesteps: the diffusion timestep of each step.
    """

    steps: Float[Tensor, "t b h w"]
    layer_steps: dict[str, Tensor]
    timesteps: tuple[int, ...]

    @property
    def mean(self) -> Float[Tensor, "b h w"]:
        """`steps`, averaged over all of them."""
        return self.steps.mean(dim=0)

    @property
    def layers(self) -> dict[str, Tensor]:
        """Mean over steps of each layer, (b, h, w) at the layer's own resolution."""
        return {layer: maps.mean(dim=0) for layer, maps in self.layer_steps.items()}


class RoutingRecorder:
    """Gathers one `Routing` while a generation runs; nothing is copied off the device before its end."""

    def __init__(self) -> None:
        """Start empty."""
        self._steps: list[Tensor] = []
        self._layers: dict[str, list[Tensor]] = {}
        self._timesteps: list[Tensor | int] = []

    def add(self, observations: Observations, timestep: Tensor | int, size: tuple[int, int]) -> None:
        """Record one step; `size` is the latent's height and width. A method without a router leaves no record."""
        if not observations.routing:
            return
        prior = mean_prior_routing(observations, size)
        self._steps.append(1.0 - rearrange(prior.float(), "b 1 h w -> b h w"))
        self._timesteps.append(timestep)
        for layer, routing in observations.routing.items():
            height, width = observations.sizes[layer]
            share = rearrange(routing[..., PERSONALIZED].float(), "b (h w) -> b h w", h=height, w=width)
            self._layers.setdefault(layer, []).append(share)

    def result(self) -> Routing | None:
        """The record, or None if no routing was seen."""
        if not self._steps:
            return None
        layers = {layer: torch.stack(maps).cpu() for layer, maps in self._layers.items()}
        return Routing(torch.stack(self._steps).cpu(), layers, tuple(int(t) for t in self._timesteps))
