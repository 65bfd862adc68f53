"""Stage (c) of the toy prior: a small open_clip model on scenes and cut-out people with their detailed captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from moa_train.data.cutout import cut_out
from moa_train.prior.pretrain.scenes import SceneSet
from moa_train.prior.pretrain.stage import Stage
from moa_train.prior.pretrain.tokens import CONTEXT_LENGTH, encode_captions

PREPROCESSING = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}


def clip_config(size: int, vocabulary: int) -> dict[str, Any]:
    """open_clip's description of the model: a vision transformer with 8-pixel patches and a text transformer."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": size,
            "layers": 4,
            "width": 128,
            "head_width": 32,
            "patch_size": 8,
            "pool_type": "avg",
        },
        "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 2},
    }


def person_cut_out(scenes: SceneSet, index: int, size: int, rng: np.random.Generator, augment: bool) -> np.ndarray:
    """The first person of a scene without the background, from the scene or from the portrait with equal chance."""
    labels = scenes.labels[index]
    if rng.random() < 0.5 and (labels == 1).sum() > 64:
        picture = cut_out(scenes.images[index], labels == 1, size, rng, augment=augment)
    else:
        picture = cut_out(scenes.portraits[index], scenes.portrait_masks[index] > 0, size, rng, augment=augment)
    return picture.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


class ContrastiveStage(Stage):
    """CLIP's loss in two halves: scenes against detailed captions, cut-out people against their descriptions."""

    def __init__(
        self, model: open_clip.CLIP, tokenizer: CLIPTokenizer, scenes: SceneSet, *, size: int, **options: Any
    ) -> None:
        super().__init__(**options)
        self.model = model
        self.scenes = scenes
        self.size = size
        self.scene_tokens = encode_captions(tokenizer, [detailed for _, detailed in scenes.captions])
        self.person_tokens = encode_captions(tokenizer, [scenes.portrait_caption(i) for i in range(len(scenes))])
        self.criterion = open_clip.ClipLoss()

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Sum of the two halves' contrastive losses."""
        chosen = rng.integers(len(self.scenes), size=self.batch_size)
        pictures = self.scenes.images[chosen].transpose(0, 3, 1, 2).astype(np.float32) / 255.0
        people = np.stack([person_cut_out(self.scenes, int(i), self.size, rng, augment=True) for i in chosen])
        scene_loss = self._pair_loss(torch.from_numpy(pictures), self.scene_tokens[chosen])
        return scene_loss + self._pair_loss(torch.from_numpy(people), self.person_tokens[chosen])

    def _pair_loss(self, pictures: Float[Tensor, "b 3 h w"], tokens: Int[Tensor, "b k"]) -> Tensor:
        image = self.model.encode_image((pictures.to(self.device) - 0.5) / 0.5, normalize=True)
        text = self.model.encode_text(tokens.to(self.device), normalize=True)
        return self.criterion(image.float(), text.float(), self.model.logit_scale.exp())

    def after_step(self) -> None:
        """Keep the temperature within CLIP's bound."""
        self.model.logit_scale.data.clamp_(max=4.6052)


@torch.no_grad()
def retrieval(
    model: open_clip.CLIP, tokenizer: CLIPTokenizer, scenes: SceneSet, size: int, count: int
) -> dict[str, float]:
    """Share of pictures whose own text is the best of `count`: scenes with captions, people with descriptions."""
    rng = np.random.default_rng(0)
    chosen = range(count)
    pictures = scenes.images[:count].transpose(0, 3, 1, 2).astype(np.float32) / 255.0
    people = np.stack([person_cut_out(scenes, i, size, rng, augment=False) for i in chosen])
    captions = [scenes.captions[i][1] for i in chosen]
    descriptions = [scenes.portrait_caption(i) for i in chosen]
    scores = {}
    for name, pixels, texts in (("scene", pictures, captions), ("person", people, descriptions)):
        image = model.encode_image((torch.from_numpy(pixels) - 0.5) / 0.5, normalize=True)
        text = model.encode_text(encode_captions(tokenizer, texts), normalize=True)
        found = (image @ text.T).argmax(dim=1)
        scores[f"{name}_top1_of_{count}"] = float(np.mean([texts[int(j)] == texts[i] for i, j in enumerate(found)]))
    return scores


def save_clip(model: open_clip.CLIP, config: dict[str, Any], folder: Path) -> None:
    """Write a folder that open_clip loads as `local-dir:`."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {"model_cfg": config, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(description, indent=2) + "\n")
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
