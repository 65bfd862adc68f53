"""`moa-data photos`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.command import command
from moa_train.cli.data.common import pack, plain, with_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Make shards of a folder of photos. What lies beside a photo is used: its caption, its mask. The rest is made: masks by a
face detector and GrabCut, both offline, and captions from a template; or both by models of your choice.

  moa-data photos photos/ out=data/mine
  moa-data photos photos/ out=data/mine noun=woman caption="a portrait of a {noun}"
  moa-data photos photos/ out=data/mine captioner=Salesforce/blip2-opt-2.7b \\
      segmenter=facebook/mask2former-swin-large-coco-panoptic

  FOLDER                the photos, subfolders too: JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF
  out=FOLDER            gets train/ and, with validation=0.1, validation/
  noun=person           what a subject is called; man, woman, child ... in a caption count as well (nouns=[...])
  caption="a photo of a {noun}"       the caption of a photo that has none
  no_noun=append        a caption that does not name a subject gets ", with a person" at its end; keep: that subject is
                        not used, the photo is; leave_out: the photo is left out
  captioner=null        model id or folder (transformers, image-text-to-text); captioner_prompt="..." for one that chats
  segmenter=grabcut     or model id or folder (transformers, image-segmentation); segmenter_labels=[person]
  max_people=4          most people of one photo, the largest
  validation=0.0        fraction of the photos for validation
  max_side=1024         larger photos are reduced to this short side, in pixels
  max_megapixels=100.0  larger photos are left out
  workers=0             processes

Beside NAME.jpg may lie NAME.txt, its caption, or NAME.json, {"caption": ..., "nouns": [...]}; and NAME.mask.png, its
mask (white: subject), or NAME.seg.png, a label map of several subjects. A photo without a face or that cannot be read
is named and left out; OUT/SPLIT/report.json lists them. Look at the masks with moa-data show OUT/train
Every setting with its meaning: configs/data_photos.yaml
"""


_LOOK = ("noun", "caption", "max_side", "nouns", "no_noun", "max_people", "min_area", "max_megapixels")
_MODELS = ("captioner", "captioner_prompt", "segmenter", "segmenter_labels", "segmenter_threshold")


def run(cfg: DictConfig) -> None:
    """Make shards of photos."""
    import numpy as np

    from moa_train.data.sources.annotators import Captioner, Segmenter
    from moa_train.data.sources.photos import PhotoSource, list_photos

    settings = plain(cfg)
    photos = list_photos(settings["folder"])
    held_out = round(settings["validation"] * len(photos))
    if not 0 <= held_out < len(photos):
        raise ValueError(f"validation is {settings['validation']}; expected a fraction that leaves photos to train on")
    order = np.random.default_rng(settings["seed"]).permutation(len(photos)).tolist()
    named = {name: settings[name] for name in _LOOK}
    models: dict[str, Any] = {"captioner": None, "segmenter": None}
    if settings["captioner"] is not None:
        models["captioner"] = Captioner(settings["captioner"], settings["captioner_prompt"], device=settings["device"])
    if settings["segmenter"] != "grabcut":
        labels, threshold = settings["segmenter_labels"], settings["segmenter_threshold"]
        models["segmenter"] = Segmenter(settings["segmenter"], labels, threshold, settings["device"])
    config = {name: settings[name] for name in ("folder", "validation", *_LOOK, *_MODELS)}
    for split, chosen in (("train", order[held_out:]), ("validation", order[:held_out])):
        if chosen:
            files = [photos[i] for i in sorted(chosen)]
            pack(PhotoSource(Path(settings["folder"]), files, **named, **models), split, settings, config)


main = with_folder(command("data_photos", help=HELP, run="moa_train.cli.data.photos:run", name="moa-data photos"))
