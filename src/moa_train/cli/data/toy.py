"""`moa-data toy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import pack, plain

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
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
  contexts=["at the beach"]     places that occur, of the eight; null: all
  seed=0                another seed, another world
  workers=0             processes that draw; 0: this one

An interrupted run goes on where it stopped when started again; a complete data set is left as it is.
Every setting with its meaning: configs/data_toy.yaml
"""


def run(cfg: DictConfig) -> None:
    """Draw the toy world's splits."""
    from moa_train.data.sources.toy_scenes import ToyScenes

    settings = plain(cfg)
    look = {name: settings[name] for name in ("empty", "detailed", "size", "seed")}
    low, high = _pair(settings["subjects"])
    places = None if settings["contexts"] is None else tuple(settings["contexts"])
    told = look if places is None else {**look, "contexts": list(places)}
    made = 0
    for split in ("train", "validation", "test"):
        people = settings["train_people"] if split == "train" else settings["held_out_people"]
        if settings[split] > 0:
            source = ToyScenes(split, settings[split], people, (low, high), **look, contexts=places)
            pack(source, split, settings, {**told, "world": "toy", "people": people, "subjects": [low, high]})
            made += 1
    if not made:
        raise ValueError("train, validation and test are all 0: there is nothing to draw")


def _pair(values: list[int]) -> tuple[int, int]:
    if len(values) != 2:
        raise ValueError(f"subjects is {values}; expected fewest and most, subjects=[1,2]")
    return values[0], values[1]


main = command("data_toy", help=HELP, run="moa_train.cli.data.toy:run", name="moa-data toy")
