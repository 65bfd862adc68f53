"""Several evaluations side by side: the same person, place and seed by each method, numbers with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moa_train.data.sources.toyworld import NOUNS
from moa_train.evaluation.gallery import Gallery, ToyProtocol
from moa_train.evaluation.report import table
from moa_train.inference.pictures import contact_sheet, text_tile

PICTURES, GRID = "pictures", "grid.json"
"""Folder of an evaluation with every picture of it by itself, and in it what the numbers in their names stand for."""


def save_pictures(out: Path, gallery: Gallery, protocol: ToyProtocol) -> None:
    """Write photo-PERSON.png, PERSON-CONTEXT-SEED.png and prior-NOUN-CONTEXT-SEED.png into `out`/pictures."""
    folder = out / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for number, person in enumerate(gallery.people):
        Image.fromarray(person.photo).save(folder / f"photo-{number}.png")
    for prefix, pictures in (("", gallery.moa), ("prior-", gallery.prior)):
        for (subject, context, seed), picture in np.ndenumerate(pictures):
            picture.image.save(folder / f"{prefix}{subject}-{context}-{seed}.png")
    grid = {
        "split": protocol.split,
        "reference": protocol.reference,
        "people": [person.identity.noun for person in gallery.people],
        "contexts": gallery.contexts,
        "seeds": protocol.seeds,
    }
    (folder / GRID).write_text(json.dumps(grid) + "\n")


def comparable(evaluations: Mapping[str, Path]) -> dict[str, Path]:
    """Those whose pictures show the same people, places and seeds as the first one's; by title, the folder."""
    grids = {title: folder / PICTURES / GRID for title, folder in evaluations.items()}
    texts = {title: path.read_text() for title, path in grids.items() if path.is_file()}
    first = next(iter(texts.values()), None)
    return {title: evaluations[title] for title, text in texts.items() if text == first}


def comparison_figure(evaluations: Mapping[str, Path], people: int = 4, places: int = 6, side: int = 96) -> Image.Image:
    """For some people, a row of the prior's pictures and below it one row a method: columns are places at one seed.

    Args:
        evaluations: what `comparable` gave.
    """
    folders = {title: folder / PICTURES for title, folder in evaluations.items()}
    grid = json.loads((next(iter(folders.values())) / GRID).read_text())
    contexts, nouns, first = grid["contexts"][:places], grid["people"], next(iter(folders.values()))
    count = min(people, len(nouns))
    rows: list[list[Image.Image]] = []
    for number in (each * len(nouns) // count for each in range(count)):
        alone = [first / f"prior-{NOUNS.index(nouns[number])}-{place}-0.png" for place in range(len(contexts))]
        photo = Image.open(first / f"photo-{number}.png")
        rows.append([text_tile(f"the prior:\n'a {nouns[number]}'", side), photo, *map(Image.open, alone)])
        for title, folder in folders.items():
            own = [Image.open(folder / f"{number}-{place}-0.png") for place in range(len(contexts))]
            rows.append([text_tile(_broken(title), side), text_tile("", side), *own])
    return contact_sheet(rows, ("", "photo given", *contexts), side)


def _broken(title: str, width: int = 14) -> str:
    """A title in lines that fit a tile."""
    from textwrap import fill

    return fill(title.replace("_", " "), width)


def numbers_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a row a measure, a column an evaluation (its metrics.json): mean and 95 % interval."""
    found = {
        title: {row[:3]: row[3:] for row in table(numbers, "the method")} for title, numbers in evaluations.items()
    }
    rows = dict.fromkeys(key for values in found.values() for key in values)
    yield f"| | | {' | '.join(found)} |"
    yield f"|---|---|{'---|' * len(found)}"
    asked = None
    for key in rows:
        question, measure, whose = key
        if question != asked:
            yield f"| **{question}** | {measure} |{' |' * len(found)}"
        asked = question
        cells = ["{:.3g} [{:.3g}, {:.3g}]".format(*values[key]) if key in values else "" for values in found.values()]
        yield f"| | {whose} | {' | '.join(cells)} |"
