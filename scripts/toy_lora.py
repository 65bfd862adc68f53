"""A LoRA of the toy prior for a style, outlines in ink, and what it does to MoA's pictures.

    python scripts/toy_lora.py                              # to outputs/toy_lora: some minutes on two CPU cores
    python scripts/toy_lora.py --steps 0                    # only measure the LoRA that is there

Any trainer of LoRAs gives such a file for Stable Diffusion; this one is here because none exists for the toy prior.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageFilter
from torch.nn import functional

from moa_train.data.sources.toyworld import CONTEXTS, draw_scene, identity
from moa_train.diffusion import NoiseSchedule
from moa_train.evaluation.gallery import ToyProtocol, held_out_people
from moa_train.evaluation.metrics import bootstrap_interval, cosine
from moa_train.evaluation.seen import look, pixels_in
from moa_train.inference.lora import load_lora
from moa_train.inference.pictures import contact_sheet, generate, save_png
from moa_train.inference.pipeline import MoAPipeline
from moa_train.latents import LatentCodec
from moa_train.prior.load import load_prior, toy_prior_folder
from moa_train.prior.pretrain.tokens import encode_captions
from moa_train.prior.probe import load_probe

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]


def inked(image: Image.Image) -> Image.Image:
    """The style: dark outlines. The probe still knows people and places in it."""
    edges = np.asarray(image.filter(ImageFilter.FIND_EDGES).convert("L"), dtype=np.float32) / 255
    outline = np.clip(1.5 * edges, 0, 1)[..., None]
    return Image.fromarray((np.asarray(image, dtype=np.float32) * (1 - 0.6 * outline)).round().astype(np.uint8))


def train(out: Path, steps: int, scenes: int, batch: int, rate: float, seed: int = 0) -> None:
    """Learn the style from drawn scenes of training people, captions as the prior has seen them."""
    torch.manual_seed(seed)
    prior, rng = load_prior("toy"), np.random.default_rng(seed)
    prior.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=LAYERS))
    trained = [value for value in prior.unet.parameters() if value.requires_grad]
    optimizer, schedule = torch.optim.AdamW(trained, rate), NoiseSchedule.from_config(prior.scheduler.config)
    drawn = [draw_scene(rng, [identity("train", number)]) for number in range(scenes)]
    styled = pixels_in([np.asarray(inked(Image.fromarray(scene.image))) for scene in drawn])
    codec = LatentCodec(prior.vae)
    moments = torch.cat([codec.moments(part * 2 - 1) for part in styled.split(64)])
    captions = encode_captions(prior.tokenizer, [scene.caption for scene in drawn])
    captions[::10] = encode_captions(prior.tokenizer, [""])[0]
    text = torch.cat([prior.text_encoder(part)[0] for part in captions.split(64)]).detach()
    for step in range(1, steps + 1):
        chosen = torch.from_numpy(rng.integers(scenes, size=batch))
        latents = codec.sample(moments[chosen], torch.randn_like(moments[chosen, 0]))
        noise, t = torch.randn_like(latents), torch.randint(schedule.steps, (batch,))
        predicted = prior.unet(schedule.add_noise(latents, noise, t), t, text[chosen]).sample
        loss = functional.mse_loss(predicted, schedule.target(latents, noise, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=get_peft_model_state_dict(prior.unet))


def measure(out: Path, people: int, contexts: int, sampler_steps: int) -> dict[str, dict[str, float | list[float]]]:
    """Validation people in places, one seed: pictures without the LoRA, and with it at two scales."""
    probe, shown = (
        load_probe(toy_prior_folder() / "probe"),
        held_out_people(ToyProtocol(people=people, split="validation")),
    )
    cells = [(p, c) for p in range(people) for c in range(contexts)]
    prompts = [f"a photo of a {shown[p].identity.noun} <1> {CONTEXTS[c]}" for p, c in cells]
    subjects = [[(shown[p].photo, shown[p].mask)] for p, _ in cells]
    truth = torch.from_numpy(np.stack([shown[p].identity.vector() for p, _ in cells]))
    place = torch.tensor([probe.contexts.index(CONTEXTS[c]) for _, c in cells])
    groups, drawn = [p for p, _ in cells], {}
    for name, scale in (("without", None), ("scale 0.5", 0.5), ("scale 1", 1.0)):
        pipe = MoAPipeline.from_pretrained("toy", weights="toy")
        pipe.set_progress_bar_config(disable=True)
        if scale is not None:
            load_lora(pipe, out / "pytorch_lora_weights.safetensors", scale)
        made = generate(
            pipe, prompts, subjects, [0] * len(cells), 16, num_inference_steps=sampler_steps, guidance_scale=3.0
        )
        drawn[name] = [picture.image for picture in made]
    drawn["ink over 'without'"] = [inked(image) for image in drawn["without"]]
    plain, goal = (pixels_in([np.asarray(i) for i in drawn[k]]) for k in ("without", "ink over 'without'"))
    numbers = {}
    for name, images in drawn.items():
        pixels = pixels_in([np.asarray(image) for image in images])
        seen = look(probe, pixels)
        style = ((pixels - plain) * (goal - plain)).sum((1, 2, 3)) / (goal - plain).square().sum((1, 2, 3))
        own = cosine(seen.vectors, truth)
        numbers[name] = {
            "style": round(float(style.mean()), 3),
            "identity": round(float(own.mean()), 3),
            "identity_interval": [round(bound, 3) for bound in bootstrap_interval(own.tolist(), groups)],
            "wrong_subject": round(float(cosine(seen.vectors, truth.roll(contexts, 0)).mean()), 3),
            "places": round(float((seen.contexts.argmax(1) == place).float().mean()), 3),
        }
    rows = [
        [Image.fromarray(shown[p].photo), *(drawn[k][i] for k in drawn)]
        for i, (p, c) in enumerate(cells)
        if c == p % contexts
    ]
    save_png(out / "samples.png", contact_sheet(rows[:6], ("photo given", *drawn), 128), {"lora": "toy ink"})
    return numbers


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training; 0: measure only")
    parser.add_argument("--scenes", type=int, default=1000, help="drawn to train on")
    parser.add_argument("--batch", type=int, default=16, help="scenes in a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--people", type=int, default=8, help="held-out people, even")
    parser.add_argument("--contexts", type=int, default=4, help="places, at most 8")
    parser.add_argument("--sampler-steps", type=int, default=25, help="denoising steps of a measured picture")
    parser.add_argument("--out", type=Path, default=Path("outputs/toy_lora"), help="folder of the LoRA and the figures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.steps:
        train(given.out, given.steps, given.scenes, given.batch, given.rate)
    numbers = measure(given.out, given.people, given.contexts, given.sampler_steps)
    (given.out / "figures.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
