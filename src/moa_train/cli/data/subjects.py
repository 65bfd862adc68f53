"""`moa-data subjects`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import with_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Write photos of the subjects in the shards of a split: pictures for moa-generate of people that training never saw.

  moa-data subjects data/toy/test out=people
  moa-data subjects data/ffhq/validation out=people start=100 count=20
  moa-generate prompt="a photo of a man <1> in the forest" subjects=[people/00000000-man.png]

  DIR                   folder of one split (it holds index.json)
  out=subjects          folder for the photos
  count=8 start=0       samples whose subjects are written, and the first of them

Writes KEY-NOUN.png for each subject of a sample: the whole picture, its alpha channel the subject's mask. Beside each
name it prints the caption with the subject marked: the prompt that describes the photo (task=invert wants it).
"""


def run(cfg: DictConfig) -> None:
    """Write the photos."""
    import numpy as np
    from PIL import Image

    from moa_train.data.shards import ShardIndex, ShardReader
    from moa_train.prompts import mark_prompt

    reader = ShardReader(ShardIndex.load(cfg.folder))
    chosen = range(cfg.start, min(cfg.start + cfg.count, len(reader)))
    if cfg.start < 0 or not chosen:
        raise ValueError(f"count is {cfg.count}, start {cfg.start}: no sample of the {len(reader)} is among them")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    for number in chosen:
        sample = reader[number]
        nouns = [segment.noun for segment in sample.segments]
        for segment in sample.segments:
            which = f"-{segment.id}" if nouns.count(segment.noun) > 1 else ""
            name = f"{sample.key}-{segment.noun}{which}.png".replace("/", "_").replace(" ", "_")
            alpha = np.where(sample.labels == segment.id, 255, 0).astype(np.uint8)
            Image.fromarray(np.dstack([np.asarray(sample.image), alpha])).save(out / name)
            print(f"{out / name}   {mark_prompt(sample.caption, [(segment.start, segment.end)])}")


main = with_folder(command("data_subjects", help=HELP, run="moa_train.cli.data.subjects:run", name="moa-data subjects"))
