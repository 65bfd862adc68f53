"""`moa-data validate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import progress, with_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Check the shards of a split against the schema and the index; one line a problem: SHARD KEY PROBLEM. Changes nothing.

  moa-data validate data/toy/train
  moa-data validate data/mine/train max_subjects=4
  moa-data validate data/mine/train repair=data/mended/train

  DIR                   folder of one split (it holds index.json)
  max_subjects=null     samples with more subjects are problems; null: any number is fine, training takes some of them
  repair=null           folder for a clean copy: sound samples as they are, boxes, areas and offsets mended where there
                        is no doubt, all else left out; report.json beside it says what and why
  workers=0             processes that check; 0: this one

Found are: truncated and damaged tars, missing members, duplicate keys, unreadable pictures, masks of another size,
empty masks, segment ids that the mask lacks, nouns not at their offsets, and a count, size, hash or member offset
or checksum unlike the index. Ends with exit code 0 if there is no problem (or the copy was written), 1 if there is one,
2 if there is no shard.
"""


def run(cfg: DictConfig) -> None:
    """Print every problem; leave with exit code 1 if there is one."""
    from moa_train.data.repair import repair
    from moa_train.data.shards import ShardIndex
    from moa_train.data.validate import find_problems, tars_of

    if cfg.repair is not None:
        with progress("repairing shards", len(tars_of(cfg.folder))) as advance:
            copy, report = repair(cfg.folder, cfg.repair, advance, cfg.workers)
        print(f"{cfg.repair}: {len(copy)} samples in {len(copy.shards)} shards")
        print("\n".join([*report.lines(), f"  by name in {cfg.repair}/report.json"]))
        return
    problems = 0
    with progress("checking shards", len(tars_of(cfg.folder))) as advance:
        for problem in find_problems(cfg.folder, cfg.max_subjects, advance, cfg.workers):
            print(problem)
            problems += 1
    if problems:
        print(f"{problems} problems in {cfg.folder}", file=sys.stderr)
        sys.exit(1)
    index = ShardIndex.load(cfg.folder)
    print(f"{cfg.folder}: {len(index)} samples in {len(index.shards)} shards, no problem")


main = with_folder(command("data_validate", help=HELP, run="moa_train.cli.data.validate:run", name="moa-data validate"))
