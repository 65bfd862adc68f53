"""A ControlNet for edge maps of toy scenes (Zhang et al., arXiv 2302.05543), trained on a frozen prior."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers import ControlNetModel
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from moa_train.diffusion import NoiseSchedule
from moa_train.latents import LatentCodec
from moa_train.prior.controlnet import edge_map, new_controlnet
from moa_train.prior.load import Prior, load_prior
from moa_train.prior.pretrain.autoencoder import encode_all
from moa_train.prior.pretrain.scenes import SceneSet, draw_scene_set
from moa_train.prior.pretrain.stage import Stage, fit
from moa_train.prior.pretrain.tokens import encode_captions

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlNetOptions:
    """All numbers of a ControlNet's training; `configs/controlnet.yaml` explains each."""

    prior: str
    out: Path
    work: Path
    scenes: int
    seed: int
    workers: int
    precision: str
    accelerator: str
    steps: int
    batch_size: int
    learning_rate: float
    drop_probability: float


def train_controlnet(options: ControlNetOptions) -> None:
    """Train on drawn scenes of the prior's picture size; `out` gets the ControlNet in float16 and how it was made.

    A run that was cut off goes on from `work` and ends with the same weights.

    Raises:
        ValueError: a prior that cannot be loaded.
    """
    prior = load_prior(options.prior)
    factor = LatentCodec(prior.vae).factor
    size = factor * int(prior.unet.config.sample_size)
    _LOG.info("drawing and encoding %d scenes of %d pixels", options.scenes, size)
    scenes = draw_scene_set("train", options.scenes, size, options.seed, options.workers)
    pl.seed_everything(options.seed, verbose=False)
    stage = ControlNetStage(
        new_controlnet(prior.unet, factor),
        prior,
        scenes,
        drop_probability=options.drop_probability,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    fit(stage, options.work, options.precision, options.accelerator)
    stage.controlnet.eval().half().save_pretrained(options.out)
    (options.out / "loss.csv").write_bytes((options.work / "loss.csv").read_bytes())
    recorded = {**asdict(options), "trained_on": prior.identity}
    (options.out / "training.json").write_text(json.dumps(recorded, indent=2, default=str) + "\n")


class ControlNetStage(Stage):
    """Predict the noise in latents of scenes, given their edges; half of the captions are dropped.

    What is left to the edges alone teaches the ControlNet to read them (so the paper, section 3.3).
    """

    def __init__(
        self, controlnet: ControlNetModel, prior: Prior, scenes: SceneSet, *, drop_probability: float, **options: Any
    ) -> None:
        super().__init__(**options)
        self.controlnet = controlnet
        self.drop_probability = drop_probability
        self.schedule = NoiseSchedule.from_config(prior.scheduler.config)
        self.scale = float(prior.vae.config.scaling_factor)
        self.moments = encode_all(prior.vae, scenes.images, "cpu")
        self.edges = np.stack([edge_map(image) for image in scenes.images])
        self.captions = torch.stack(
            [encode_captions(prior.tokenizer, [pair[form] for pair in scenes.captions]) for form in (0, 1)], dim=1
        )
        self.empty = encode_captions(prior.tokenizer, [""])[0]
        self._frozen = (prior.unet, prior.text_encoder)  # a tuple keeps them out of the checkpoint

    def on_fit_start(self) -> None:
        """Bring the frozen networks to the device of the trained one."""
        for network in self._frozen:
            network.to(self.device)

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Mean squared error of the U-Net's prediction."""
        chosen = rng.integers(len(self.moments), size=self.batch_size)
        form = rng.integers(2, size=self.batch_size)
        dropped = torch.from_numpy(rng.random(self.batch_size) < self.drop_probability)
        steps = torch.from_numpy(rng.integers(self.schedule.steps, size=self.batch_size)).to(self.device)
        tokens = torch.where(dropped[:, None], self.empty, self.captions[chosen, form]).to(self.device)
        moments = self.moments[chosen].float().to(self.device)
        latents = (moments[:, 0] + moments[:, 1] * torch.randn_like(moments[:, 1])) * self.scale
        noise = torch.randn_like(latents)
        predicted = self.predict(
            self.schedule.add_noise(latents, noise, steps), steps, tokens, control_pixels(self.edges[chosen])
        )
        return nn.functional.mse_loss(predicted.float(), self.schedule.target(latents, noise, steps))

    def predict(
        self,
        noisy: Float[Tensor, "b c h w"],
        steps: Int[Tensor, " b"],
        tokens: Int[Tensor, "b k"],
        control: Float[Tensor, "b 3 h_pixel w_pixel"],
    ) -> Float[Tensor, "b c h w"]:
        """The frozen U-Net's prediction with what the ControlNet adds to it."""
        unet, text_encoder = self._frozen
        text = text_encoder(tokens)[0]
        down, middle = self.controlnet(noisy, steps, text, control.to(self.device), return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction: Tensor = unet(noisy, steps, text, **added, return_dict=False)[0]
        return prediction


def control_pixels(edges: UInt8[np.ndarray, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Edge maps as a ControlNet reads them: three equal channels in [0, 1]."""
    return torch.from_numpy(edges).float().div(255.0)[:, None].expand(-1, 3, -1, -1)
