"""What a person reads after an evaluation: metrics.json, report.md (a table), samples.png, routing.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from moa_train.checkpoint import atomic_write
from moa_train.data.sources.toyworld import NOUNS
from moa_train.evaluation.gallery import Gallery
from moa_train.inference.pictures import ROUTING_COLUMNS, contact_sheet, routing_row, save_png, text_tile


def _context(measure: str) -> tuple[tuple[str, str], ...]:
    return (
        ("MoA against the prior, same seed", f"{measure}.moa"),
        ("MoA against MoA with another subject", f"{measure}.other_subject"),
        ("the prior against itself, other seed (scale)", f"{measure}.other_seed"),
    )


_TABLE = (
    ("Is it the person of the photo?", "cosine of identity vectors, higher is better", (
        ("MoA, the person whose photo was given", "identity.moa"),
        ("MoA, somebody else of the same noun", "identity.wrong_subject"),
        ("the prior (sees no photo)", "identity.prior"),
        ("real scenes of the person (ceiling)", "identity.real"),
    )),
    ("Is it the first of the line-up?", "share of pictures whose nearest identity is the person's", (
        ("MoA", "rank1.moa"),
        ("the prior (sees no photo)", "rank1.prior"),
        ("real scenes of the person (ceiling)", "rank1.real"),
        ("chance", "rank1.chance"),
    )),
    ("Is it among the first five?", "share of pictures", (
        ("MoA", "rank5.moa"),
        ("the prior (sees no photo)", "rank5.prior"),
        ("real scenes of the person (ceiling)", "rank5.real"),
        ("chance", "rank5.chance"),
    )),
    ("Did the context stay?", "mean squared difference outside people, lower is better",
     _context("context_difference")),
    ("The same by structure", "SSIM outside people, higher is better", _context("context_ssim")),
    ("The same by features", "1 - cosine outside people, lower is better", _context("context_features")),
    ("Is it the place of the prompt?", "share of pictures that a classifier gets right", (
        ("MoA", "context_accuracy.moa"),
        ("the prior", "context_accuracy.prior"),
        ("real scenes (ceiling)", "context_accuracy.real"),
    )),
    ("Does the picture show its prompt?", "CLIP's cosine of picture and prompt, higher is better", (
        ("MoA", "clip_score.moa"),
        ("the prior", "clip_score.prior"),
        ("real scenes (ceiling)", "clip_score.real"),
        ("MoA and the prompt of another place (floor)", "clip_score.other_place"),
    )),
    ("Did the router find the person?", "IoU of its map and the person's pixels, higher is better", (
        ("MoA", "routing_iou"),
    )),
    ("Do seeds still differ?", "mean squared difference between seeds", (
        ("MoA", "diversity.moa"),
        ("the prior", "diversity.prior"),
    )),
    ("Do places still differ?", "distance of the person's centre between seeds, in picture sides", (
        ("MoA", "position_spread.moa"),
        ("the prior", "position_spread.prior"),
        ("real scenes", "position_spread.real"),
    )),
    ("Do sizes still differ?", "difference of the root of the person's share of the picture between seeds", (
        ("MoA", "size_spread.moa"),
        ("the prior", "size_spread.prior"),
        ("real scenes", "size_spread.real"),
    )),
    ("Of two people, are both there?", "share of pictures", (
        ("MoA", "pairs_found.moa"),
        ("real scenes (ceiling)", "pairs_found.real"),
    )),
    ("Are two people confused?", "share of people who are nearer to the other photo, lower is better; chance 0.5", (
        ("MoA", "pairs_confusion.moa"),
        ("real scenes (floor)", "pairs_confusion.real"),
    )),
    ("Are they the people of the photos?", "cosine of identity vectors, higher is better", (
        ("MoA, the person of the own photo", "pairs_identity.moa"),
        ("MoA, the person of the other photo", "pairs_identity.wrong_subject"),
        ("real scenes of the two (ceiling)", "pairs_identity.real"),
    )),
    ("Do pictures look real?", "Fréchet distance of features to real scenes, lower is better", (
        ("MoA", "frechet.moa"),
        ("other real scenes (floor)", "frechet.real"),
    )),
    ("What does a picture cost?", "seconds", (
        ("MoA", "seconds_per_picture.moa"),
        ("the prior", "seconds_per_picture.prior"),
        ("MoA, two people", "seconds_per_picture.pairs"),
    )),
    ("Is there a person at all?", "share of pictures", (
        ("MoA", "person_found.moa"),
        ("the prior", "person_found.prior"),
    )),
)  # fmt: skip


Line: TypeAlias = tuple[str, str, str, float, float, float]
"""Of a report: question, measure, whose, mean, and the ends of its 95 % interval."""


def table(numbers: Mapping[str, Any], title: str | None = None) -> list[Line]:
    """The lines of the report. title: the method's name in them.

    What was not measured (routing, of a method without a router) has no line.
    """
    name_of_method = title or method_title(numbers)
    return [
        (question, measure, whose.replace("MoA", name_of_method), _value(numbers, name), *numbers["intervals"][name])
        for question, measure, lines in _TABLE
        for whose, name in lines
        if name in numbers["intervals"]
    ]


def plain(table: Sequence[Line]) -> str:
    """A table for a terminal: a question, and below it one line for each whose answer it is."""
    lines: list[str] = []
    asked = None
    for question, measure, whose, mean, low, high in table:
        if question != asked:
            lines += ["", f"{question} ({measure})"]
        asked = question
        lines.append(f"   {whose:46} {mean:9.4f}   95 %: {low:.4f} to {high:.4f}")
    return "\n".join(lines[1:])


def markdown_table(table: Sequence[Line]) -> list[str]:
    """The same in Markdown."""
    lines = ["| | | mean | 95 % interval |", "|---|---|---|---|"]
    asked = None
    for question, measure, whose, mean, low, high in table:
        if question != asked:
            lines.append(f"| **{question}** | {measure} | | |")
        asked = question
        lines.append(f"| | {whose} | {mean:.4g} | {low:.4g} – {high:.4g} |")
    return lines


def markdown(numbers: Mapping[str, Any]) -> str:
    """The whole report as Markdown; it shows the figures beside it."""
    lines = [f"# {method_title(numbers)} on the toy world", ""]
    protocol, n = numbers["protocol"], numbers["n"]
    lines += [
        f"{n['people']} {protocol['split']} people that training never saw, {protocol['contexts']} contexts, "
        f"{len(protocol['seeds'])} seeds: {n['pictures']} pictures with {method_title(numbers)} "
        f"({protocol['steps']} steps, guidance {protocol['guidance']:g}), each beside the prior's picture of the "
        f"same prompt and seed. {numbers['seconds']:g} s.",
        "",
        *markdown_table(table(numbers)),
        "",
        *_memory(numbers),
        "Intervals: bootstrap over people (pairs of them; batches for seconds), jackknife for the Fréchet distance.",
        "Generated people are found and recognised by networks that were trained on real scenes and never see the",
        "router. What each figure means, and its limits: docs/evaluation.md.",
        "",
        *_confusion(numbers),
        "## Pictures",
        "Each column is one context and seed. The prior's own pictures, then one row a person: the photo, then "
        f"{method_title(numbers)}.",
        "",
        "![samples](samples.png)",
        "",
    ]
    if "routing_iou" in numbers["intervals"]:
        lines += [
            "## Routing",
            "The personalized expert's share of each pixel, each map stretched to its own range.",
            "",
            "![routing](routing.png)",
            "",
        ]
    return "\n".join(lines)


def _memory(numbers: Mapping[str, Any]) -> list[str]:
    kinds = {"device_gigabytes": "on the device", "resident_gigabytes": "of the whole process"}
    return [f"Peak memory {kinds[kind]}: {size:g} GB.  " for kind, size in numbers.get("memory", {}).items()]


def _confusion(numbers: Mapping[str, Any]) -> list[str]:
    """The matrix of two people in one picture; nothing where it was not measured."""
    lines = []
    for name, whose in (("moa", method_title(numbers)), ("real", "real scenes")):
        for slot, row in enumerate(numbers.get("confusion", {}).get(name, ()), 1):
            lines.append(f"| {whose}, in the place of <{slot}> | {row[0]:.3f} | {row[1]:.3f} |")
    if not lines:
        return []
    heading = ["| two people in one picture | nearer to person 1 | nearer to person 2 |", "|---|---|---|"]
    return [*heading, *lines, ""]


def samples_figure(gallery: Gallery, rows_per_noun: int = 3, contexts: int = 6, side: int = 128) -> Image.Image:
    """Columns are contexts at one seed; for each noun the prior's row, then rows of people, each behind its photo."""
    places = gallery.contexts[:contexts]
    rows: list[list[Image.Image]] = []
    for index, noun in enumerate(NOUNS):
        alone = [gallery.prior[index, c, 0].image for c in range(len(places))]
        rows.append([text_tile(f"prior:\n'a {noun}'", side), *alone])
        own = [p for p, person in enumerate(gallery.people) if person.identity.noun == noun][:rows_per_noun]
        rows += [
            [Image.fromarray(gallery.people[p].photo), *(gallery.moa[p, c, 0].image for c in range(len(places)))]
            for p in own
        ]
    return contact_sheet(rows, ("photo given", *places), side)


def routing_figure(gallery: Gallery, rows: int = 5, side: int = 128) -> Image.Image:
    """Different people in different contexts: the picture, its personalized part, and R_1 over time."""
    people, contexts, _ = gallery.moa.shape
    shown = [gallery.moa[i * people // rows % people, i % contexts, 0] for i in range(rows)]
    return contact_sheet([routing_row(picture) for picture in shown], ROUTING_COLUMNS, side)


def write_report(out: Path, gallery: Gallery, numbers: Mapping[str, Any]) -> None:
    """Write samples.png, routing.png (of a method with a router), report.md and, last, metrics.json into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {"protocol": numbers["protocol"]}
    save_png(out / "samples.png", samples_figure(gallery), facts)
    if gallery.routed:
        save_png(out / "routing.png", routing_figure(gallery), facts)
    text, data = markdown(numbers), json.dumps(numbers, indent=2) + "\n"
    atomic_write(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    atomic_write(out / "metrics.json", lambda path: path.write_text(data, encoding="utf-8"))


def method_title(numbers: Mapping[str, Any]) -> str:
    """The method's name as people write it."""
    names = {"moa": "MoA", "fastcomposer": "FastComposer", "ip_adapter": "IP-Adapter", "finetune": "Fine-tuning"}
    return names[numbers["method"]]


def _value(numbers: Mapping[str, Any], name: str) -> float:
    value: Any = numbers
    for key in name.split("."):
        value = value[key]
    return float(value)
