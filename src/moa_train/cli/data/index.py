"""`moa-data index`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import progress, with_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Make the index of shards that other tools wrote: WebDataset tars of KEY.jpg, KEY.seg.png and KEY.json, any tar names.

  moa-data index foreign/train
  moa-data index foreign/train leave_out=true

  DIR                   folder with the tars of one split
  split=null            what the split is called; null: as the folder
  leave_out=false       true: leave damaged and incomplete samples out of the index, else nothing is written
  overwrite=false       true: replace an index that is there already
  workers=0             processes that check; 0: this one

Every sample is read and checked, and gets a checksum that reading compares from then on. The tars are not changed.
Ends with exit code 1 if samples are damaged and leave_out is not set; each is named.
"""


def run(cfg: DictConfig) -> None:
    """Write the index, or name what is damaged and leave with exit code 1."""
    from moa_train.data.validate import index_folder, tars_of

    with progress("indexing shards", len(tars_of(cfg.folder))) as advance:
        index, problems = index_folder(
            cfg.folder,
            cfg.split or Path(cfg.folder).resolve().name,
            leave_out=cfg.leave_out,
            overwrite=cfg.overwrite,
            workers=cfg.workers,
            on_shard=advance,
        )
    for problem in problems:
        print(problem)
    if index is None:
        print(f"{len(problems)} problems in {cfg.folder}: leave_out=true indexes the rest", file=sys.stderr)
        sys.exit(1)
    print(f"{cfg.folder}: {len(index)} samples in {len(index.shards)} shards, {len(problems)} problems left out")


main = with_folder(command("data_index", help=HELP, run="moa_train.cli.data.index:run", name="moa-data index"))
