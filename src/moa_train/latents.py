"""Between pictures and the latents z of the diffusion: the VAE and its scale."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn


class LatentCodec(nn.Module):
    """A frozen VAE: z = scaling_factor (mean + std noise). `identity`: hash of its weights, if known."""

    def __init__(self, vae: AutoencoderKL, identity: str = "") -> None:
        super().__init__()
        self.identity = identity
        self.vae = vae.requires_grad_(False).eval()
        self.scale = float(vae.config.scaling_factor)
        self.channels = int(vae.config.latent_channels)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def train(self, mode: bool = True) -> LatentCodec:
        """Stay in evaluation mode."""
        return super().train(False)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent of a picture with `height` x `width` pixels.

        Raises:
            ValueError: a picture that the VAE cannot halve evenly.
        """
        if height % self.factor or width % self.factor:
            raise ValueError(f"a picture of {height} x {width} pixels: both must be multiples of {self.factor}")
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def moments(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2 c h_latent w_latent"]:
        """Mean and standard deviation of the posterior, unscaled, for pictures in [-1, 1]."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    def sample(self, moments: Float[Tensor, "b 2 c h w"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """z = scaling_factor (mean + std noise)."""
        mean, std = moments.unbind(1)
        return self.scale * (mean + std * noise)

    def encode(
        self, pixels: Float[Tensor, "b 3 h w"], noise: Float[Tensor, "b c h_latent w_latent"]
    ) -> Float[Tensor, "b c h_latent w_latent"]:
        """Scaled latents of pictures in [-1, 1]; `noise` picks the sample of the posterior."""
        return self.sample(self.moments(pixels), noise)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h_latent w_latent"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures, about in [-1, 1], of scaled latents."""
        return self.vae.decode((latents / self.scale).to(self.vae.dtype), return_dict=False)[0]
