"""`moa-data fastcomposer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import pack, plain, progress, with_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Make shards of FastComposer's preprocessing of FFHQ: a folder, or its tar, which is read in place and never unpacked.

  moa-data fastcomposer ffhq_wild_files/ out=data/ffhq
  moa-data fastcomposer ffhq_wild_files.tar out=data/ffhq workers=8

  DIR_OR_TAR            holds image_ids_train.txt, image_ids_test.txt and, in a folder named by an id's first five
                        characters, ID.jpg, ID.json and ID.npy. A compressed tar must be decompressed first
  out=FOLDER            gets train/ (image_ids_train.txt) and validation/ (image_ids_test.txt)
  no_person=leave_out   or keep: what becomes of a picture in which no person can be used; kept, it has no subject
  max_side=null         pictures are stored byte for byte; a number: larger ones are reduced to this short side, in
                        pixels, and their label maps without mixing values
  max_megapixels=100.0  larger pictures are left out
  workers=0             processes

Only segments that are a person become subjects. Of two whose nouns end at the same place the larger stays. What is left
out is counted by reason, and listed by name in OUT/SPLIT/report.json. An interrupted run goes on where it stopped when
started again. Every setting with its meaning: configs/data_fastcomposer.yaml
"""


def run(cfg: DictConfig) -> None:
    """Convert both splits."""
    from moa_train.data.sources.archive import open_archive
    from moa_train.data.sources.fastcomposer import LISTS, FastComposerSplit, read_splits

    settings = plain(cfg)
    location = Path(settings["folder"])
    with progress(
        f"finding the files in {location.name}", location.stat().st_size if location.is_file() else 1
    ) as passed:
        archive = open_archive(location, LISTS["train"], passed)
    look = {name: settings[name] for name in ("no_person", "max_side", "max_megapixels")}
    for split, (ids, remarks) in read_splits(archive).items():
        source = FastComposerSplit(archive, ids, remarks, **look)
        pack(source, split, {**settings, "image_format": "jpg"}, {"folder": settings["folder"], **look})


main = with_folder(
    command("data_fastcomposer", help=HELP, run="moa_train.cli.data.fastcomposer:run", name="moa-data fastcomposer")
)
