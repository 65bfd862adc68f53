"""A Stable Diffusion folder and shards of a few thousand random numbers, equal at every call: what tests train on."""

import json
import string
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from moa_train.data.packing import write_shards
from moa_train.data.schema import Sample, Segment

TEXT_DIM, IMAGE_DIM, IMAGE_SIZE, RESOLUTION = 16, 12, 8, 16


def save_prior(folder: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Unet, vae, text_encoder, tokenizer, scheduler and image_encoder, as `load_prior(folder)` reads them."""
    torch.manual_seed(seed)
    tokenizer = _letters_tokenizer()
    _unet().save_pretrained(folder / "unet")
    _vae().save_pretrained(folder / "vae")
    _text_encoder(len(tokenizer)).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        steps_offset=1, clip_sample=False, beta_schedule="scaled_linear", prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    save_open_clip(folder / "image_encoder")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_shards(folder: Path, train: int = 24, validation: int = 6) -> tuple[Path, Path]:
    """Folders of a train and a validation split; every third sample has two subjects."""
    for split, count in (("train", train), ("validation", validation)):
        write_shards([_sample(split, number) for number in range(count)], folder, split, shard_bytes=40_000)
    return folder / "train", folder / "validation"


def load(run_dir: Path, name: str = "last.ckpt") -> dict:
    """A checkpoint of a run."""
    return torch.load(run_dir / "checkpoints" / name, weights_only=True)


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_DIM,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=RESOLUTION,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _letters_tokenizer() -> CLIPTokenizer:
    """One token a letter; a word's last token carries `</w>`, as CLIP's does."""
    symbols = [c + end for c in string.ascii_lowercase + string.punctuation for end in ("", "</w>")]
    vocabulary = {name: i for i, name in enumerate(["<|startoftext|>", "<|endoftext|>", *symbols])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def save_open_clip(folder: Path, vocabulary: int = 16, length: int = 8) -> Path:
    """An open_clip model of one block a tower, in `local-dir:`'s layout; CLIP's own vocabulary has 49408."""
    vision = {"image_size": IMAGE_SIZE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4}
    text = {"context_length": length, "vocab_size": vocabulary, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": IMAGE_DIM, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    model = open_clip.CLIP(IMAGE_DIM, vision, text)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def _sample(split: str, number: int) -> Sample:
    """Noise, with a bright rectangle for each subject."""
    rng = np.random.default_rng([number, len(split)])
    image = rng.integers(0, 120, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    labels = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
    caption = "a man and a woman" if number % 3 == 0 else "a man at sea"
    segments = []
    for label, noun, left in ((1, "man", 1), (2, "woman", 9))[: 2 if number % 3 == 0 else 1]:
        labels[4:14, left : left + 6] = label
        image[labels == label] = rng.integers(120, 255, 3, dtype=np.uint8)
        start = caption.index(noun)
        segments.append(Segment(label, noun, start, start + len(noun), (left, 4, left + 6, 14), 60))
    return Sample(f"{split}-{number:04d}", image, labels, caption, tuple(segments), {"number": number})
