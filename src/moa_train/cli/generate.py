"""`moa-generate`: pictures of the subjects of photos, from personalized weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.command import command
from moa_train.cli.paths import config_dir
from moa_train.cli.prior import prior_paths_as_source

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from moa_train.inference.pictures import Picture

HELP = """\
Make pictures of the people (or other subjects) in your photos.

  moa-generate prompt="a photo of a man <1> at the beach" subjects=[man.png]
  moa-generate prompt="a photo of a man <1> and a woman <2> in the forest" subjects=[man.jpg,woman.jpg] seeds=[0,1,2,3]
  moa-generate prior=FOLDER_OR_HUB_ID weights=personalized.safetensors prompt="..." subjects=[...]

<1> stands behind the noun that is the first photo's subject, <2> behind the second's. A prompt without a marker gives
the prior's own picture. What counts as the subject of a photo: its mask; else its alpha channel; else the person found.

  prior=toy                 network to personalise: toy (in this package), a Stable Diffusion folder, a hub id
  weights=toy               what moa-export wrote; toy: the file in this package; null: the prior alone
  masks=[man_mask.png]      one mask a photo, white on the subject
  seeds=[0,1,2,3]           one picture a seed; equal seeds and settings give equal files
  steps=25 guidance=5       denoising steps; classifier-free guidance
  negative_prompt="..."     what to guide away from
  size=[512,512]            width and height in pixels; null: the prior's own
  routing=false             no routing maps
  out=outputs/generate      where everything goes
  device=cuda dtype=float16

Writes seed=N.png (its settings inside), samples.png (all of them), routing.png (which pixels the personalized expert
drew) and config.yaml into `out`. Every setting with its meaning: configs/generate.yaml
"""


def run(cfg: DictConfig) -> None:
    """Make the pictures that the configuration describes."""
    from omegaconf import OmegaConf

    from moa_train.inference.device import device_and_dtype
    from moa_train.inference.pictures import generate
    from moa_train.inference.pipeline import MoAPipeline

    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    seeds, size = settings["seeds"], settings["size"] or [None, None]
    subjects = _subjects(settings["subjects"], settings["masks"])
    if not seeds:
        raise ValueError("seeds is empty: give at least one, seeds=[0]")
    if len(size) != 2:
        raise ValueError(f"size is {size}; expected width and height in pixels, size=[512,512], or null")
    device, dtype = device_and_dtype(settings["device"], settings["dtype"])
    pipe = MoAPipeline.from_pretrained(settings["prior"]["source"], settings["weights"], torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=not settings["progress"])
    pictures = list(
        generate(
            pipe,
            [settings["prompt"]] * len(seeds),
            [subjects] * len(seeds),
            seeds,
            settings["batch_size"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            negative_prompt=settings["negative_prompt"],
            width=size[0],
            height=size[1],
            record_routing=settings["routing"],
        )
    )
    out = Path(settings["out"])
    _write(out, pictures, settings)
    OmegaConf.save(cfg, out / "config.yaml")
    print(f"{len(pictures)} pictures in {out}/: see {out / 'samples.png'}")


def _subjects(photos: list[str], masks: list[str]) -> list[Any]:
    if masks and len(masks) != len(photos):
        raise ValueError(f"{len(masks)} masks were given for {len(photos)} subjects: give one mask a photo, or none")
    return list(zip(photos, masks, strict=True)) if masks else list(photos)


def _write(out: Path, pictures: list[Picture], settings: dict[str, Any]) -> None:
    from moa_train.inference.pictures import ROUTING_COLUMNS, contact_sheet, file_hash, routing_row, save_png
    from moa_train.inference.weights import weights_path

    facts = {name: settings[name] for name in ("prompt", "negative_prompt", "steps", "guidance")}
    facts["prior"] = settings["prior"]["source"]
    facts["subjects"] = [file_hash(Path(photo)) for photo in settings["subjects"]]
    weights = settings["weights"]
    facts["weights"] = None if weights is None else file_hash(weights_path(weights))
    for picture in pictures:
        save_png(out / f"seed={picture.seed}.png", picture.image, {**facts, "seed": picture.seed})
    rows = [[picture.image for picture in pictures[i : i + 4]] for i in range(0, len(pictures), 4)]
    save_png(out / "samples.png", contact_sheet(rows, side=max(128, pictures[0].image.width)), facts)
    if pictures[0].steps is not None:
        save_png(out / "routing.png", contact_sheet([routing_row(p) for p in pictures], ROUTING_COLUMNS), facts)


def main() -> None:
    """The command."""
    sys.argv[1:] = prior_paths_as_source(sys.argv[1:], config_dir())
    _main()


_main = command("generate", help=HELP, run="moa_train.cli.generate:run")
