"""`moa-data stats`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import progress, with_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Count what a split holds: captions, nouns, subject sizes, subjects per picture.

  moa-data stats data/toy/train
  moa-data stats data/mine/train out=runs/stats

  DIR                   folder of one split (it holds index.json)
  out=null              folder for stats.json and stats.png; null: only the table

Tokens are CLIP's, begin and end included: a caption of more than 77 is cut.
"""


def run(cfg: DictConfig) -> None:
    """Print the table, write numbers and plot."""
    from open_clip.tokenizer import SimpleTokenizer

    from moa_train.data.shards import ShardIndex
    from moa_train.data.stats import save_stats, split_stats, table

    index = ShardIndex.load(cfg.folder)
    tokenizer = SimpleTokenizer()
    with progress("counting", len(index)) as advance:
        stats = split_stats(index, lambda text: len(tokenizer.encode(text)) + 2, advance)
    print("\n".join(table(stats)))
    if cfg.out is not None:
        save_stats(stats, cfg.out)
        print(f"see {cfg.out}/stats.png and stats.json")


main = with_folder(command("data_stats", help=HELP, run="moa_train.cli.data.stats:run", name="moa-data stats"))
