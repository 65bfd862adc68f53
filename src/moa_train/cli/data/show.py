"""`moa-data show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import with_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Draw a contact sheet of a split: pictures with their masks tinted, captions with the subjects' nouns in colour.

  moa-data show data/toy/train
  moa-data show data/toy/train out=sheet.png count=32 columns=8

  DIR                   folder of one split (it holds index.json)
  out=sheet.png         picture to write
  count=16              samples, spread evenly over the split; start=N: from sample N on instead
  columns=4 tile=256    samples in a row; pixels of a picture
"""


def run(cfg: DictConfig) -> None:
    """Draw a contact sheet."""
    import numpy as np

    from moa_train.data.shards import ShardIndex, ShardReader
    from moa_train.data.sheet import contact_sheet

    reader = ShardReader(ShardIndex.load(cfg.folder))
    count = min(cfg.count, len(reader))
    numbers = np.linspace(0, len(reader) - 1, count).round().astype(int).tolist()
    if cfg.start is not None:
        numbers = list(range(cfg.start, min(cfg.start + cfg.count, len(reader))))
    if not numbers:
        raise ValueError(f"count is {cfg.count}, start {cfg.start}: no sample of the {len(reader)} is among them")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([reader[number] for number in numbers], min(cfg.columns, len(numbers)), cfg.tile).save(out)
    print(f"{len(numbers)} of {len(reader)} samples of {cfg.folder}: see {out}")


main = with_folder(command("data_show", help=HELP, run="moa_train.cli.data.show:run", name="moa-data show"))
