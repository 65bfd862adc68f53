"""`moa-data`: makes, draws and checks shards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.command import command, command_group

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from moa_train.data.packing import Source

HELP = """\
Make and check the data that moa-train reads: shards of pictures, masks and captions.

  moa-data toy                       draw the toy world: needs nothing, takes about a minute
  moa-data photos FOLDER out=OUT     your own photos: finds the person in each, writes shards
  moa-data show DIR out=sheet.png    look at what is in the shards of a split
  moa-data validate DIR              find everything that is wrong with them

`moa-data COMMAND --help` says more. A data set is a folder with a subfolder a split (OUT/train, OUT/validation). Each
holds WebDataset tars (KEY.jpg, KEY.seg.png, KEY.json), which `tar tf` and webdataset read, and an index. To train:

  moa-train data.train=OUT/train data.validation=OUT/validation
"""

HELP_TOY = """\
Draw the toy world: cartoon people in eight places, with exact masks and captions. No download.

  moa-data toy                              20,000 scenes to train on, 500 to validate, 500 to test, in data/toy
  moa-data toy out=small train=500          fewer
  moa-data toy size=128 subjects=[2,2]      larger pictures, always two people

  out=data/toy          folder; gets train/, validation/, test/. Nobody lives in two of them
  train=20000 validation=500 test=500       scenes of each split; 0: leave it out
  size=64               side of a picture in pixels
  subjects=[1,2]        fewest and most people in a scene
  empty=0.0             fraction of scenes without people
  detailed=0.0          fraction of captions that describe the people
  seed=0                another seed, another world
  workers=0             processes that draw; 0: this one

An interrupted run goes on where it stopped when started again; a complete data set is left as it is.
Every setting with its meaning: configs/data_toy.yaml
"""

HELP_PHOTOS = """\
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

HELP_SHOW = """\
Draw a contact sheet of a split: pictures with their masks tinted, captions with the subjects' nouns in colour.

  moa-data show data/toy/train
  moa-data show data/toy/train out=sheet.png count=32 columns=8

  DIR                   folder of one split (it holds index.json)
  out=sheet.png         picture to write
  count=16              samples, spread evenly over the split; start=N: from sample N on instead
  columns=4 tile=256    samples in a row; pixels of a picture
"""

HELP_VALIDATE = """\
Check the shards of a split against the schema and the index; one line a problem: SHARD KEY PROBLEM. Changes nothing.

  moa-data validate data/toy/train
  moa-data validate data/mine/train max_subjects=4

  DIR                   folder of one split (it holds index.json)
  max_subjects=null     samples with more subjects are problems; null: any number is fine, training takes some of them

Found are: truncated and damaged tars, missing members, duplicate keys, unreadable pictures, masks of another size,
empty masks, segment ids that the mask lacks, nouns not at their offsets, and a count, size, hash or member offset
unlike the index. Ends with exit code 0 if there is no problem, 1 if there is one, 2 if there is no index.
"""


def run_toy(cfg: DictConfig) -> None:
    """Draw the toy world's splits."""
    from moa_train.data.sources.toy_scenes import ToyScenes

    settings = _plain(cfg)
    look = {name: settings[name] for name in ("empty", "detailed", "size", "seed")}
    low, high = _pair(settings["subjects"])
    made = 0
    for split in ("train", "validation", "test"):
        people = settings["train_people"] if split == "train" else settings["held_out_people"]
        if settings[split] > 0:
            source = ToyScenes(split, settings[split], people, (low, high), **look)
            _pack(source, split, settings, {**look, "world": "toy", "people": people, "subjects": [low, high]})
            made += 1
    if not made:
        raise ValueError("train, validation and test are all 0: there is nothing to draw")


def run_photos(cfg: DictConfig) -> None:
    """Make shards of photos."""
    import numpy as np

    from moa_train.data.sources.photos import PhotoSource, list_photos

    settings = _plain(cfg)
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
            _pack(PhotoSource(Path(settings["folder"]), files, **named), split, settings, config)


def run_show(cfg: DictConfig) -> None:
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


def run_validate(cfg: DictConfig) -> None:
    """Print every problem; leave with exit code 1 if there is one."""
    from moa_train.data.shards import ShardIndex
    from moa_train.data.validate import find_problems

    index = ShardIndex.load(cfg.folder)
    problems = 0
    with _progress("checking shards", len(index.shards)) as advance:
        for problem in find_problems(cfg.folder, cfg.max_subjects, advance):
            print(problem)
            problems += 1
    if problems:
        print(f"{problems} problems in {cfg.folder}", file=sys.stderr)
        sys.exit(1)
    print(f"{cfg.folder}: {len(index)} samples in {len(index.shards)} shards, no problem")


def _pack(source: Source, split: str, settings: dict[str, Any], config: dict[str, Any]) -> None:
    from moa_train.data.packing import write_shards

    with _progress(f"{split}: {len(source)} samples", len(source)) as advance:
        index = write_shards(
            source,
            settings["out"],
            split,
            seed=settings["seed"],
            shard_bytes=settings["shard_megabytes"] * 1_000_000,
            image_format=settings["image_format"],
            workers=settings["workers"],
            command=" ".join(["moa-data", settings["command"]]),
            config=config,
            on_sample=advance,
        )
    left_out = f"; {len(source) - len(index)} were left out" if len(index) < len(source) else ""
    print(f"{index.storage.location}: {len(index)} samples in {len(index.shards)} shards{left_out}")


@contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left; call what it yields with the number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def _pair(values: list[int]) -> tuple[int, int]:
    if len(values) != 2:
        raise ValueError(f"subjects is {values}; expected fewest and most, subjects=[1,2]")
    return values[0], values[1]


def _with_folder(main: Callable[[], None]) -> Callable[[], None]:
    """`moa-data show DIR ...` is `moa-data show folder=DIR ...`."""

    def chosen() -> None:
        for place, argument in enumerate(sys.argv[1:], 1):
            if "=" not in argument and not argument.startswith("-"):
                sys.argv[place] = f"folder={argument}"
                break
        main()

    return chosen


_RUN = "moa_train.cli.data:run_"
main = command_group(
    "moa-data",
    help=HELP,
    commands={
        "toy": command("data_toy", help=HELP_TOY, run=f"{_RUN}toy", name="moa-data toy"),
        "photos": _with_folder(command("data_photos", help=HELP_PHOTOS, run=f"{_RUN}photos", name="moa-data photos")),
        "show": _with_folder(command("data_show", help=HELP_SHOW, run=f"{_RUN}show", name="moa-data show")),
        "validate": _with_folder(
            command("data_validate", help=HELP_VALIDATE, run=f"{_RUN}validate", name="moa-data validate")
        ),
    },
)
