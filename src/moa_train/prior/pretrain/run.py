"""The toy prior from nothing: draw scenes, train the four stages, measure them, save a Stable Diffusion folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from moa_train.data.sources.toyworld import CONTEXTS, IDENTITY_DIM, identity, scene_caption
from moa_train.prior.pretrain.autoencoder import (
    AutoencoderStage,
    build_autoencoder,
    encode_all,
    reconstruction_psnr,
    restore_all,
)
from moa_train.prior.pretrain.contrastive import ContrastiveStage, clip_config, retrieval, save_clip
from moa_train.prior.pretrain.measure import ProbeStage, probe_figures
from moa_train.prior.pretrain.scenes import SceneSet, draw_scene_set
from moa_train.prior.pretrain.stage import Stage, fit
from moa_train.prior.pretrain.text_to_image import TextToImageStage, build_scheduler, build_text_encoder, build_unet
from moa_train.prior.pretrain.tokens import encode_captions, train_tokenizer
from moa_train.prior.probe import Probe, load_probe, save_probe

STAGES = ("autoencoder", "text_to_image", "image_encoder", "probe", "figures")
RETRIEVAL_COUNT = 100
"""Pictures among whose texts the own one must be found."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageOptions:
    """Length and size of one training: optimizer steps, samples of a batch, peak learning rate."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class PretrainOptions:
    """All numbers of the toy prior's training; `configs/experiment/toy_prior.yaml` explains each."""

    out: Path
    work: Path
    size: int
    scenes: int
    held_out_scenes: int
    seed: int
    workers: int
    precision: str
    accelerator: str
    autoencoder: StageOptions
    kl_weight: float
    text_to_image: StageOptions
    drop_probability: float
    ema_decay: float
    image_encoder: StageOptions
    probe: StageOptions
    figure_samples: int
    figure_steps: int
    figure_guidance: float


class Pretraining:
    """Runs stages; each reads what the earlier ones saved in `out` and can be run alone."""

    def __init__(self, options: PretrainOptions) -> None:
        self.options = options
        self.device = "cuda" if options.accelerator in ("gpu", "cuda") else "cpu"
        self._scenes: dict[str, SceneSet] = {}

    def run(self, stages: Sequence[str]) -> None:
        """Run the named stages in their order.

        Raises:
            ValueError: an unknown stage.
        """
        unknown = set(stages) - set(STAGES)
        if unknown:
            raise ValueError(f"stages holds {', '.join(sorted(unknown))}; expected some of {', '.join(STAGES)}")
        if self.options.figure_samples < len(CONTEXTS):
            raise ValueError(f"figure_samples is {self.options.figure_samples}; expected {len(CONTEXTS)} or more")
        self.options.out.mkdir(parents=True, exist_ok=True)
        recorded = json.dumps(asdict(self.options), indent=2, default=str)
        (self.options.out / "pretrain.json").write_text(recorded + "\n")
        for name in STAGES:
            if name in stages:
                pl.seed_everything(self.options.seed, verbose=False)
                _LOG.info("stage %s", name)
                getattr(self, f"_{name}")()

    def _scene_set(self, split: str) -> SceneSet:
        if split not in self._scenes:
            count = self.options.scenes if split == "train" else self.options.held_out_scenes
            _LOG.info("drawing %d scenes (%s)", count, split)
            self._scenes[split] = draw_scene_set(
                split, count, self.options.size, self.options.seed, self.options.workers
            )
        return self._scenes[split]

    def _fit(self, stage: Stage, name: str) -> None:
        folder = self.options.work / name
        fit(stage, folder, self.options.precision, self.options.accelerator)
        (self.options.out / f"loss_{name}.csv").write_bytes((folder / "loss.csv").read_bytes())
        stage.to(self.device)

    def _stage_options(self, name: str) -> dict[str, Any]:
        return {**asdict(getattr(self.options, name)), "seed": self.options.seed}

    def _autoencoder(self) -> None:
        stage = AutoencoderStage(
            build_autoencoder(self.options.size),
            self._scene_set("train"),
            kl_weight=self.options.kl_weight,
            **self._stage_options("autoencoder"),
        )
        self._fit(stage, "autoencoder")
        vae = stage.vae.eval()
        moments = encode_all(vae, self._scene_set("train").images[:2000], self.device)
        vae.register_to_config(scaling_factor=round(1.0 / float(moments[:, 0].float().std()), 4))
        vae.half().save_pretrained(self.options.out / "vae")

    def _vae(self) -> AutoencoderKL:
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(self.options.out / "vae", torch_dtype=torch.float32)
        return vae.requires_grad_(False).eval().to(self.device)

    def _tokenizer(self) -> CLIPTokenizer:
        folder = self.options.out / "tokenizer"
        if not folder.is_dir():
            texts = [text for pair in self._scene_set("train").captions for text in pair]
            train_tokenizer(texts).save_pretrained(folder)
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
        return tokenizer

    def _text_to_image(self) -> None:
        scenes, vae, tokenizer = self._scene_set("train"), self._vae(), self._tokenizer()
        mirrored = np.ascontiguousarray(scenes.images[:, :, ::-1])
        moments = torch.stack([encode_all(vae, images, self.device) for images in (scenes.images, mirrored)], dim=1)
        captions = torch.stack(
            [encode_captions(tokenizer, [c[form] for c in scenes.captions]) for form in (0, 1)], dim=1
        )
        stage = TextToImageStage(
            build_unet(moments.shape[-1]),
            build_text_encoder(tokenizer),
            moments=moments,
            captions=captions,
            empty=encode_captions(tokenizer, [""])[0],
            scaling_factor=vae.config.scaling_factor,
            drop_probability=self.options.drop_probability,
            ema_decay=self.options.ema_decay,
            **self._stage_options("text_to_image"),
        )
        self._fit(stage, "text_to_image")
        unet, text_encoder = stage.result
        unet.half().save_pretrained(self.options.out / "unet")
        text_encoder.half().save_pretrained(self.options.out / "text_encoder")
        build_scheduler().save_pretrained(self.options.out / "scheduler")
        self._save_model_index()

    def _save_model_index(self) -> None:
        index = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (self.options.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _image_encoder(self) -> None:
        tokenizer = self._tokenizer()
        config = clip_config(self.options.size, len(tokenizer))
        stage = ContrastiveStage(
            open_clip.CLIP(**config),
            tokenizer,
            self._scene_set("train"),
            size=self.options.size,
            **self._stage_options("image_encoder"),
        )
        self._fit(stage, "image_encoder")
        save_clip(stage.model.eval(), config, self.options.out / "image_encoder")

    def _probe(self) -> None:
        scenes = self._scene_set("train")
        restored = restore_all(self._vae(), scenes.images[: len(scenes) // 4], self.device)
        stage = ProbeStage(Probe(IDENTITY_DIM, CONTEXTS), scenes, restored, **self._stage_options("probe"))
        self._fit(stage, "probe")
        save_probe(stage.probe.eval(), self.options.out / "probe")

    def _figures(self) -> None:
        """Measure everything on held-out people and write `figures.json` and `samples.png` beside the weights."""
        scenes, vae, out = self._scene_set("validation"), self._vae().cpu(), self.options.out
        clip = open_clip.create_model(f"local-dir:{out / 'image_encoder'}").eval()
        probe = load_probe(out / "probe")
        restored = restore_all(vae, scenes.images, "cpu")
        pictures, prompts = sample_prior(self.options)
        shown = probe.context(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0).argmax(dim=1)
        asked = torch.tensor([next(i for i, context in enumerate(CONTEXTS) if context in text) for text in prompts])
        figures = {
            "vae_psnr_db": reconstruction_psnr(vae, scenes.images, "cpu"),
            "clip": retrieval(clip, self._tokenizer(), scenes, self.options.size, RETRIEVAL_COUNT),
            "probe_on_drawn_scenes": probe_figures(probe, scenes, scenes.images),
            "probe_on_restored_scenes": probe_figures(probe, scenes, restored),
            "prior_context_accuracy": float((shown == asked).float().mean()),
            "prior_samples": len(prompts),
            "megabytes": round(sum(f.stat().st_size for f in out.rglob("*.safetensors")) / 1e6, 2),
        }
        (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        _contact_sheet(pictures).save(out / "samples.png")
        _LOG.info("%s", json.dumps(figures, indent=2))


def sample_prior(options: PretrainOptions) -> tuple[np.ndarray, list[str]]:
    """Pictures of the finished prior, uint8 (n, h, w, 3), and their prompts: held-out people, briefly and in detail.

    Context k of picture i is i modulo the number of contexts, so every place is asked for equally often.
    """
    rng = np.random.default_rng([options.seed, 7])
    prompts = [
        scene_caption(
            [identity("validation", i, options.seed)], CONTEXTS[i % len(CONTEXTS)], i // len(CONTEXTS) % 2 == 1, rng
        )[0]
        for i in range(options.figure_samples)
    ]
    out = options.out
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32),
        scheduler=DDIMScheduler.from_pretrained(out / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pictures = []
    for start in range(0, len(prompts), 32):
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts[start : start + 32]))]
        images = pipe(
            prompts[start : start + 32],
            num_inference_steps=options.figure_steps,
            guidance_scale=options.figure_guidance,
            generator=generators,
            output_type="np",
        ).images
        pictures.append(np.round(images * 255.0).astype(np.uint8))
    return np.concatenate(pictures), prompts


def _contact_sheet(pictures: np.ndarray, columns: int = 8, scale: int = 2) -> Image.Image:
    """At most four rows; a column shows one context; rows of short and of detailed captions take turns."""
    rows = min(4, len(pictures) // columns)
    grid = [np.concatenate(list(pictures[row * columns : (row + 1) * columns]), axis=1) for row in range(rows)]
    sheet = Image.fromarray(np.concatenate(grid))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.BICUBIC)
