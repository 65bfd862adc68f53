"""Evaluations side by side: each picture in its place, each number with its interval."""

import json
from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from moa_train.cli.collect import gather, write_tables
from moa_train.data.sources.toyworld import identity
from moa_train.evaluation.comparison import comparable, comparison_figure, numbers_table, save_pictures
from moa_train.evaluation.gallery import Gallery, Person, ToyProtocol
from moa_train.inference.pictures import Picture

SIDE, GAP, CAPTION = 32, 4, 18
CONTEXTS, SEEDS = ("at the beach", "in the desert"), (3, 8)
PROTOCOL = ToyProtocol(seeds=SEEDS)


def solid(*colour):
    return Image.new("RGB", (SIDE, SIDE), colour)


def make_gallery(red, seeds=SEEDS):
    """Pictures whose colour is (method, 40 person + context, seed); the prior's (0, 40 noun + context, 200 + seed)."""
    found = {noun: next(i for n in range(50) if (i := identity("test", n)).noun == noun) for noun in ("man", "woman")}
    people = tuple(
        Person(found[noun], np.full((SIDE, SIDE, 3), 90 + 50 * i, dtype=np.uint8), np.ones((SIDE, SIDE), bool))
        for i, noun in enumerate(("man", "woman"))
    )
    moa, prior = (np.empty((2, len(CONTEXTS), len(seeds)), dtype=object) for _ in range(2))
    for (subject, context, g), _ in np.ndenumerate(moa):
        moa[subject, context, g] = Picture(solid(red, 40 * subject + context, seeds[g]), seeds[g], None)
        prior[subject, context, g] = Picture(solid(0, 40 * subject + context, 200 + seeds[g]), seeds[g], None)
    return Gallery(people, CONTEXTS, moa, prior)


def colour_at(sheet, row, column):
    middle = (GAP + column * (SIDE + GAP) + SIDE // 2, CAPTION + GAP + row * (SIDE + GAP) + SIDE // 2)
    return sheet.getpixel(middle)


def test_columns_are_places_and_below_the_prior_each_method_has_a_row(tmp_path):
    for name, red in (("one", 100), ("two", 250)):
        save_pictures(tmp_path / name, make_gallery(red), PROTOCOL)
    sheet = comparison_figure({name: tmp_path / name for name in ("one", "two")}, side=SIDE)
    for person in range(2):
        assert colour_at(sheet, 3 * person, 1) == (90 + 50 * person,) * 3
        for place in range(2):
            green = 40 * person + place
            column = [colour_at(sheet, 3 * person + row, 2 + place) for row in range(3)]
            assert column == [(0, green, 203), (100, green, 3), (250, green, 3)]


def test_only_evaluations_of_the_same_people_places_and_seeds_are_compared(tmp_path):
    other = (
        replace(PROTOCOL, seeds=(3, 9)),
        replace(PROTOCOL, split="validation"),
        replace(PROTOCOL, reference="portrait"),
    )
    for name, protocol in zip(("one", "a", "b", "c", "same"), (PROTOCOL, *other, PROTOCOL), strict=True):
        save_pictures(tmp_path / name, make_gallery(100, protocol.seeds), protocol)
    folders = {name: tmp_path / name for name in ("one", "a", "b", "c", "same", "none")}
    assert list(comparable(folders)) == ["one", "same"]


def make_numbers(value, routed):
    numbers = {"method": "moa", "identity": {"moa": value}, "intervals": {"identity.moa": [value - 0.1, value + 0.1]}}
    if routed:
        numbers |= {"routing_iou": 0.5}
        numbers["intervals"]["routing_iou"] = [0.25, 0.75]
    return numbers


def test_the_table_has_a_column_for_each_and_an_empty_cell_for_what_was_not_measured():
    lines = list(numbers_table({"A": make_numbers(0.5, True), "B": make_numbers(0.25, False)}))
    assert lines[0] == "| | | A | B |"
    assert "| | the method, the person whose photo was given | 0.5 [0.4, 0.6] | 0.25 [0.15, 0.35] |" in lines
    assert "| | the method | 0.5 [0.25, 0.75] |  |" in lines


@pytest.mark.parametrize("trial", [True, False])
def test_gathering_shows_evaluated_runs_side_by_side_with_curves_and_commands(tmp_path, trial):
    for number, (name, red) in enumerate((("moa", 100), ("fastcomposer", 250))):
        run = tmp_path / (str(number) if trial else name)
        save_pictures(run / "evaluation", make_gallery(red), PROTOCOL)
        (run / "evaluation" / "metrics.json").write_text(json.dumps(make_numbers(0.5, red == 100)))
        (run / "metrics.csv").write_text("step,val/identity_gap\n1,0.5\n2,0.75\n")
        given = [f"model={name}", "prior.source=a b"]
        config = OmegaConf.to_yaml(OmegaConf.create({"model": {"name": name}, "run_dir": str(run), "run_id": "r"}))
        (run / "config.yaml").write_text(f"# moa-train model={name} 'prior.source=a b'\n{config}")
        if trial:
            record = {"number": number, "overrides": given, "status": "finished"}
            (run / "trial.json").write_text(json.dumps(record))
    write_tables(gather(tmp_path), tmp_path)
    page = (tmp_path / "summary.md").read_text()
    titles = ["model=moa", "model=fastcomposer"] if trial else ["fastcomposer", "moa"]
    assert f"| | | {' | '.join(titles)} |" in page
    assert "moa-train model=fastcomposer 'prior.source=a b'" in page
    with Image.open(tmp_path / "comparison.png") as sheet, Image.open(tmp_path / "curves.png") as figure:
        assert sheet.width > 3 * SIDE
        curves = np.asarray(figure.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(curves[np.ptp(curves, axis=1) > 60], axis=0)) > 2  # coloured lines


def test_every_evaluation_of_every_run_has_its_column_whatever_runs_are_called(tmp_path):
    for run, places in (("a/run", ("evaluation",)), ("b/run", ("", "again"))):
        for place in places:
            folder = tmp_path / run / place
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.json").write_text(json.dumps(make_numbers(0.5, True)))
        OmegaConf.save(OmegaConf.create({"seed": run, "run_dir": run, "run_id": run}), tmp_path / run / "config.yaml")
    photos = tmp_path / "b/run/photos"
    photos.mkdir()
    (photos / "metrics.json").write_text(json.dumps(make_numbers(0.5, False) | {"benchmark": "fastcomposer"}))
    write_tables(gather(tmp_path), tmp_path)
    assert "| | | a/run | b/run | b/run again |" in (tmp_path / "summary.md").read_text().splitlines()
    assert not (tmp_path / "curves.png").exists()  # no run was validated
