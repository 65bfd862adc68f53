"""`moa-data photos`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import pack, plain, with_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Make shards of a folder of photos. The person's mask comes from a face detector and GrabCut, both offline.

  moa-data photos photos/ out=data/mine
  moa-data photos photos/ out=data/mine noun=woman caption="a portrait of a {noun}"

  FOLDER                the photos, subfolders too: JPEG, PNG, WebP, BMP, TIFF
  out=FOLDER            gets train/ and, with validation=0.1, validation/
  noun=person           what the subject is called in captions
  caption="a photo of a {noun}"       the caption of a photo that has none
  validation=0.0        fraction of the photos for validation
  max_side=1024         larger photos are reduced to this short side, in pixels
  workers=0             processes

Beside NAME.jpg may lie NAME.txt, its caption (it must hold the noun), and NAME.mask.png, its mask (white: subject).
A photo without a face or that cannot be read is named and left out. Look at the masks with moa-data show OUT/train
Every setting with its meaning: configs/data_photos.yaml
"""


def run(cfg: DictConfig) -> None:
    """Make shards of photos."""
    import numpy as np

    from moa_train.data.sources.photos import PhotoSource, list_photos

    settings = plain(cfg)
    photos = list_photos(settings["folder"])
    held_out = round(settings["validation"] * len(photos))
    if not 0 <= held_out < len(photos):
        raise ValueError(f"validation is {settings['validation']}; expected a fraction that leaves photos to train on")
    order = np.random.default_rng(settings["seed"]).permutation(len(photos)).tolist()
    config = {name: settings[name] for name in ("folder", "noun", "caption", "max_side", "validation")}
    for split, chosen in (("train", order[held_out:]), ("validation", order[:held_out])):
        if chosen:
            files = [photos[i] for i in sorted(chosen)]
            named = {name: settings[name] for name in ("noun", "caption", "max_side")}
            pack(PhotoSource(Path(settings["folder"]), files, **named), split, settings, config)


main = with_folder(command("data_photos", help=HELP, run="moa_train.cli.data.photos:run", name="moa-data photos"))
