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

  DIR                   folder of one split (it holds index.json)
  max_subjects=null     samples with more subjects are problems; null: any number is fine, training takes some of them

Found are: truncated and damaged tars, missing members, duplicate keys, unreadable pictures, masks of another size,
empty masks, segment ids that the mask lacks, nouns not at their offsets, and a count, size, hash or member offset
unlike the index. Ends with exit code 0 if there is no problem, 1 if there is one, 2 if there is no index.
"""


def run(cfg: DictConfig) -> None:
    """Print every problem; leave with exit code 1 if there is one."""
    from moa_train.data.shards import ShardIndex
    from moa_train.data.validate import find_problems

    index = ShardIndex.load(cfg.folder)
    problems = 0
    with progress("checking shards", len(index.shards)) as advance:
        for problem in find_problems(cfg.folder, cfg.max_subjects, advance):
            print(problem)
            problems += 1
    if problems:
        print(f"{problems} problems in {cfg.folder}", file=sys.stderr)
        sys.exit(1)
    print(f"{cfg.folder}: {len(index)} samples in {len(index.shards)} shards, no problem")


main = with_folder(command("data_validate", help=HELP, run="moa_train.cli.data.validate:run", name="moa-data validate"))
