"""A grid of pictures: one seed a column, other subjects in each row, the prior's own pictures above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from moa_train.inference.pictures import Picture, contact_sheet, generate, subject_region, subjects_tile, text_tile
from moa_train.inference.regions import Difference, difference, mean_difference
from moa_train.inference.subject_pipeline import SubjectPipeline
from moa_train.inference.subjects import Subject
from moa_train.prompts import parse_prompt


@dataclass(frozen=True)
class Row:
    """What one row of a grid is made of. `name` is part of its files' names, without spaces."""

    name: str
    prompt: str
    subjects: tuple[Subject, ...]


@dataclass(frozen=True)
class Grid:
    """Pictures by row and seed. `prior` holds the prior's own picture of each seed, `cells` one tuple a row."""

    rows: tuple[Row, ...]
    prior: tuple[Picture, ...]
    cells: tuple[tuple[Picture, ...], ...]

    @cached_property
    def regions(self) -> tuple[Bool[Tensor, "rows columns"], ...]:
        """Of each seed, where the router puts the subjects of any row: one region serves all cells of a column."""
        return tuple(subject_region(column) for column in zip(*self.cells, strict=True))

    @cached_property
    def differences(self) -> tuple[tuple[Difference, ...], ...]:
        """Of each cell to the prior's picture of its seed."""
        return tuple(
            tuple(
                difference(prior.image, cell.image, region)
                for prior, cell, region in zip(self.prior, cells, self.regions, strict=True)
            )
            for cells in self.cells
        )

    @property
    def other_seed(self) -> float | None:
        """Background difference of the prior's pictures of neighbouring seeds: the scale; None for a single seed."""
        if len(self.prior) < 2:
            return None
        pairs = [(column, (column + 1) % len(self.prior)) for column in range(len(self.prior))]
        found = [
            difference(self.prior[i].image, self.prior[j].image, self.regions[i] | self.regions[j]) for i, j in pairs
        ]
        return mean_difference(found).background

    def report(self) -> dict[str, Any]:
        """Mean squared differences to the prior's picture, in the subjects' region and in the background."""
        rows = [
            {
                "name": row.name,
                **mean_difference(found).rounded(),
                "by_seed": {str(cell.seed): each.rounded() for cell, each in zip(cells, found, strict=True)},
            }
            for row, cells, found in zip(self.rows, self.cells, self.differences, strict=True)
        ]
        other = self.other_seed
        return {
            "measure": "mean squared difference to the prior's picture of the same seed, values in [0, 1]",
            "mean": mean_difference([each for found in self.differences for each in found]).rounded(),
            "background_of_another_seed": None if other is None else round(other, 5),
            "region_share": {
                str(prior.seed): round(float(region.float().mean()), 3)
                for prior, region in zip(self.prior, self.regions, strict=True)
            },
            "rows": rows,
        }

    def sheet(self, side: int = 128) -> Image.Image:
        """All pictures; the first column shows the subjects that a row was given."""
        rows = [[text_tile("prior alone", side), *(picture.image for picture in self.prior)]]
        for row, cells in zip(self.rows, self.cells, strict=True):
            rows.append([subjects_tile(row.subjects, side), *(cell.image for cell in cells)])
        return contact_sheet(rows, ("subjects", *(f"seed {picture.seed}" for picture in self.prior)), side)


def make_grid(
    pipe: SubjectPipeline, prompt: str, rows: Sequence[Row], seeds: Sequence[int], batch_size: int, **options: Any
) -> Grid:
    """Make the prior's picture of each seed, from the prompt without its markers, and a picture a row and seed."""
    plain = parse_prompt(prompt).text
    prior = generate(pipe, [plain] * len(seeds), [[] for _ in seeds], seeds, batch_size, **options)
    first = tuple(prior)
    made = generate(
        pipe,
        [row.prompt for row in rows for _ in seeds],
        [row.subjects for row in rows for _ in seeds],
        [seed for _ in rows for seed in seeds],
        batch_size,
        **options,
    )
    cells = tuple(tuple(next(made) for _ in seeds) for _ in rows)
    return Grid(tuple(rows), first, cells)
