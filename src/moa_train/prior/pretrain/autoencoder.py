"""Stage (a) of the toy prior: a small AutoencoderKL, 64 x 64 x 3 to 16 x 16 x 4."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from moa_train.prior.pretrain.scenes import SceneSet
from moa_train.prior.pretrain.stage import Stage


def build_autoencoder(size: int, channels: tuple[int, ...] = (32, 48, 64)) -> AutoencoderKL:
    """An untrained AutoencoderKL that halves the picture once less often than it has levels."""
    return AutoencoderKL(
        sample_size=size,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def to_pixels(images: UInt8[np.ndarray, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Bytes to pixels in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def edges(pixels: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
    """Differences between neighbours along rows and columns."""
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., 1:] - pixels[..., :-1]


class AutoencoderStage(Stage):
    """Reconstruct scenes: L1 + 4 MSE + edge L1 + a little KL."""

    def __init__(self, vae: AutoencoderKL, scenes: SceneSet, *, kl_weight: float, **options: Any) -> None:
        super().__init__(**options)
        self.vae = vae
        self.scenes = scenes
        self.kl_weight = kl_weight

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Reconstruction and KL loss of a random batch of scenes and portraits."""
        chosen = rng.integers(len(self.scenes), size=self.batch_size)
        images = self.scenes.images[chosen]
        pixels = to_pixels(images).to(self.device)
        flip = torch.from_numpy(rng.random(self.batch_size) < 0.5).to(self.device)
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        posterior = self.vae.encode(pixels).latent_dist
        restored = self.vae.decode(posterior.sample()).sample.float()
        edge = sum(functional.l1_loss(a, b) for a, b in zip(edges(restored), edges(pixels), strict=True))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        reconstruction = functional.l1_loss(restored, pixels) + 4.0 * functional.mse_loss(restored, pixels)
        return reconstruction + 0.5 * edge + self.kl_weight * kl


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "n h w 3"], device: str, batch_size: int = 32
) -> Float[Tensor, "n 2 c h_latent w_latent"]:
    """Posterior mean and standard deviation of every picture, float16 on the CPU."""
    moments = []
    for start in range(0, len(images), batch_size):
        posterior = vae.encode(to_pixels(images[start : start + batch_size]).to(device)).latent_dist
        moments.append(torch.stack([posterior.mean, posterior.std], dim=1).half().cpu())
    return torch.cat(moments)


@torch.no_grad()
def restore_all(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "n h w 3"], device: str, batch_size: int = 32
) -> UInt8[np.ndarray, "n h w 3"]:
    """Every picture after the auto-encoder, from the posterior's mean."""
    restored = []
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(images[start : start + batch_size]).to(device)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        decoded = ((decoded.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
        restored.append(decoded.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(restored)


def reconstruction_psnr(vae: AutoencoderKL, images: UInt8[np.ndarray, "n h w 3"], device: str) -> float:
    """Mean PSNR in dB, over pictures, of their bytes after the auto-encoder."""
    restored = restore_all(vae, images, device)
    error = np.square((restored.astype(np.float64) - images) / 255.0).mean(axis=(1, 2, 3))
    return float(np.mean(-10.0 * np.log10(error)))
