"""`moa-data latents`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.command import command
from moa_train.cli.data.common import plain, progress, with_folder
from moa_train.cli.paths import config_dir
from moa_train.cli.prior import prior_paths_as_source

if TYPE_CHECKING:
    import numpy as np
    from omegaconf import DictConfig

    from moa_train.latents import LatentCodec

HELP = """\
Encode pictures with a prior's VAE once, not in every training step. Writes a copy of the set; DIR stays as it is.

  moa-data latents data/mine prior=/models/sd15 out=data/mine-latents
  moa-train experiment=ffhq_sd15 data.train=data/mine-latents/train data.latents=true ...

  DIR                   a set (a subfolder a split) or one split of it
  prior=toy             whose VAE encodes: toy, a Stable Diffusion folder, a hub id. Training refuses another
  resolution=512        side of a picture in pixels; training must have the same
  flips=true            store each view also mirrored: data.flip_probability needs it
  crops=1               views of each picture. More: crops=4 crop=random zoom=[1.0,1.3], and so in training
  subject_side=224      subjects' pictures are stored up to this size in pixels; best the image encoder's input
  device=auto           cpu or cuda

An interrupted run goes on at the shard where it stopped. Every setting with its meaning: configs/data_latents.yaml
"""


def run(cfg: DictConfig) -> None:
    """Encode the splits."""
    from moa_train.data.shards import INDEX_NAME, ShardIndex
    from moa_train.data.views import ViewSettings, write_views
    from moa_train.latents import LatentCodec
    from moa_train.prior.load import load_prior, weights_fingerprint

    settings = plain(cfg)
    names = ("resolution", "crops", "flips", "crop", "pad", "hold_subjects", "subject_side")
    wanted = ViewSettings(zoom=tuple(settings["zoom"]), **{name: settings[name] for name in names})
    folder = Path(settings["folder"])
    splits = [folder] if (folder / INDEX_NAME).exists() else sorted(p.parent for p in folder.glob(f"*/{INDEX_NAME}"))
    indexes = [ShardIndex.load(split) for split in splits or [folder]]
    for index in indexes:
        if (Path(settings["out"]) / index.split).resolve() == Path(index.storage.location).resolve():
            raise ValueError(f"out={settings['out']} is the set itself: give another folder")
    prior = load_prior(settings["prior"]["source"])
    vae = {"name": settings["prior"]["source"], "weights": weights_fingerprint(prior.vae)}
    codec = LatentCodec(prior.vae, vae["weights"]).to(_device(settings["device"]))
    codec.latent_shape(wanted.resolution, wanted.resolution)
    for index in indexes:
        with progress(f"{index.split}: {len(index)} samples", len(index)) as advance:
            made = write_views(
                index, settings["out"], _Encoder(codec), wanted, vae, settings["batch_size"], on_sample=advance
            )
        print(f"{made.storage.location}: {len(made)} samples in {len(made.shards)} shards")


class _Encoder:
    """Pictures -> mean and standard deviation in float16, on the codec's device."""

    def __init__(self, codec: LatentCodec) -> None:
        self.codec = codec

    def __call__(self, views: np.ndarray) -> np.ndarray:
        import torch

        device = next(self.codec.parameters()).device
        pixels = torch.from_numpy(views).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        return self.codec.moments(pixels).to(torch.float16).cpu().numpy()


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


_main = with_folder(command("data_latents", help=HELP, run="moa_train.cli.data.latents:run", name="moa-data latents"))


def main() -> None:
    """Run the command; `prior=` may be a path."""
    sys.argv[1:] = prior_paths_as_source(sys.argv[1:], config_dir())
    _main()
