"""What a person reads after the photo benchmark: metrics.json, report.md and samples.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moa_train.checkpoint import atomic_write
from moa_train.evaluation.photo_shots import Shot, read_shot
from moa_train.evaluation.photo_subjects import PhotoSubject
from moa_train.evaluation.report import Line, markdown_table, method_title
from moa_train.inference.pictures import contact_sheet, save_png, subjects_tile, text_tile

_TABLE = (
    ("Is it what the prompt says?", "CLIP cosine of picture and prompt", "prompt_consistency", (
        ("{method}", "moa"),
        ("the same prompts without a photo", "no_photo"),
    )),
    ("Is it the person of the photo?", "cosine of face vectors; 0 where no face is found", "identity", (
        ("{method}", "moa"),
        ("{method}, against the other subjects' photos", "wrong_subject"),
        ("the same prompts without a photo", "no_photo"),
    )),
    ("Is there a face for each subject?", "share of pictures", "face_found", (
        ("{method}", "moa"),
        ("the same prompts without a photo", "no_photo"),
    )),
)  # fmt: skip


def table(numbers: Mapping[str, Any]) -> list[Line]:
    """The lines of the report."""
    return [
        (
            question,
            measure,
            whose.format(method=method_title(numbers)),
            numbers[group][leaf],
            *numbers["intervals"][name],
        )
        for question, measure, group, lines in _TABLE
        for whose, leaf in lines
        if (name := f"{group}.{leaf}") in numbers["intervals"]
    ]


def markdown(numbers: Mapping[str, Any]) -> str:
    """The whole report as Markdown; it shows the sheet beside it."""
    protocol, n = numbers["protocol"], numbers["n"]
    of = "subjects" if protocol["together"] == 1 else f"pairs of {protocol['subjects']} subjects"
    lines = [
        f"# {method_title(numbers)} by FastComposer's evaluation",
        "",
        f"{n['people']} {of}, {protocol['prompts']} prompts, {len(protocol['seeds'])} seeds: {n['pictures']} pictures "
        f"({protocol['steps']} steps, guidance {protocol['guidance']:g}, subjects from {protocol['subject_start']:g} "
        f"of the steps on). {numbers['seconds']:g} s, {numbers['made']} pictures made in them.",
        "",
        f"Prompts: {numbers['clip']}. Faces: {numbers['embedder']}.",
        "",
        *markdown_table(table(numbers)),
    ]
    lines += ["", "| | prompt | identity | face found |", "|---|---|---|---|"]
    for category, own in numbers["by_category"].items():
        values = (own[group]["moa"] for group in ("prompt_consistency", "identity", "face_found"))
        lines.append(f"| {category} | {' | '.join(f'{value:.4g}' for value in values)} |")
    pairs = ", which share people: too narrow, therefore" if protocol["together"] > 1 else ""
    lines += [
        "",
        f"Intervals: bootstrap over {of}{pairs}. Figures of different face embedders or CLIP models do not compare.",
        "",
        "![samples](samples.png)",
        "",
    ]
    return "\n".join(lines)


def samples_figure(
    subjects: Sequence[PhotoSubject], shots: Sequence[Shot], without: Mapping[Shot, Shot], folder: Path, side: int = 160
) -> Image.Image:
    """A row a cast, at most eight: its photos, then the first prompt of each category at the first seed.

    Above the first row of each set of nouns: the same prompts without a photo.
    """
    first = {(shot.group, shot.category): shot for shot in reversed(shots)}
    categories = list(dict.fromkeys(shot.category for shot in shots))
    rows, shown = [], set[tuple[str, ...]]()
    for group in list(dict.fromkeys(shot.group for shot in shots))[:8]:
        chosen = [first[group, category] for category in categories]
        cast = [subjects[place] for place in chosen[0].who]
        nouns = tuple(one.noun for one in cast)
        if without and nouns not in shown:
            tile = text_tile("without a photo:\n" + " and ".join(nouns), side)
            rows.append([tile, *(read_shot(folder, without[shot]) for shot in chosen)])
        shown.add(nouns)
        photos = subjects_tile([(one.photo, one.mask) for one in cast], side)
        rows.append([photos, *(read_shot(folder, shot) for shot in chosen)])
    return contact_sheet(rows, ("photo given", *categories), side)


def write_report(out: Path, numbers: Mapping[str, Any], sheet: Image.Image) -> None:
    """Write samples.png, report.md and, last, metrics.json into `out`."""
    save_png(out / "samples.png", sheet, {"protocol": numbers["protocol"], "weights": numbers["weights"]})
    text, data = markdown(numbers), json.dumps(numbers, indent=2) + "\n"
    atomic_write(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    atomic_write(out / "metrics.json", lambda path: path.write_text(data, encoding="utf-8"))
