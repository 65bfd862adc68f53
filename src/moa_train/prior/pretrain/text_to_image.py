"""Stage (b) of the toy prior: a text-to-image U-Net and its text encoder, trained together on latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from moa_train.prior.pretrain.stage import Stage
from moa_train.prior.pretrain.tokens import CONTEXT_LENGTH

TEXT_WIDTH = 128


def build_unet(size: int, channels: tuple[int, ...] = (64, 96, 160)) -> UNet2DConditionModel:
    """An untrained U-Net for `size` x `size` latents, with self- and cross-attention on every level."""
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text transformer of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class TextToImageStage(Stage):
    """Predict the noise in latents, given a caption; the captions are dropped for guidance now and then.

    moments: posterior mean and standard deviation of each picture and its mirror image, unscaled.
    captions: token ids, short and detailed form of each caption; the first row of `empty` is the empty prompt.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        *,
        moments: Float[Tensor, "n mirror=2 2 c h w"],
        captions: Int[Tensor, "n form=2 k"],
        empty: Int[Tensor, " k"],
        scaling_factor: float,
        drop_probability: float,
        ema_decay: float,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.networks = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
        self.averaged = AveragedModel(self.networks, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.averaged.requires_grad_(False)
        self.scheduler = build_scheduler()
        self.moments, self.captions, self.empty = moments, captions, empty
        self.scaling_factor = scaling_factor
        self.drop_probability = drop_probability

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Mean squared error of the predicted noise."""
        chosen = rng.integers(len(self.moments), size=self.batch_size)
        mirror, form = rng.integers(2, size=self.batch_size), rng.integers(2, size=self.batch_size)
        dropped = torch.from_numpy(rng.random(self.batch_size) < self.drop_probability)
        moments = self.moments[chosen, mirror].float().to(self.device)
        tokens = torch.where(dropped[:, None], self.empty, self.captions[chosen, form]).to(self.device)
        latents = (moments[:, 0] + moments[:, 1] * torch.randn_like(moments[:, 1])) * self.scaling_factor
        noise = torch.randn_like(latents)
        steps = torch.from_numpy(rng.integers(1000, size=self.batch_size)).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        text = self.networks["text_encoder"](tokens)[0]
        predicted = self.networks["unet"](noisy, steps, text, return_dict=False)[0]
        return nn.functional.mse_loss(predicted.float(), noise)

    def after_step(self) -> None:
        """Update the running average of the weights, which is what ships."""
        self.averaged.update_parameters(self.networks)

    @property
    def result(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """The averaged U-Net and text encoder."""
        networks = self.averaged.module
        return networks["unet"].eval(), networks["text_encoder"].eval()  # type: ignore[index]
