"""Pictures by seed and the figures made of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.inference.device import device_and_dtype
from moa_train.inference.pictures import (
    ROUTING_COLUMNS,
    Picture,
    contact_sheet,
    generate,
    heat_map,
    overlay,
    routing_row,
    save_png,
)


def test_each_picture_depends_on_its_own_seed_alone(pipe, photo):
    def made(seeds, batch_size):
        options = {"num_inference_steps": 2, "guidance_scale": 3.0}
        prompts, subjects = ["a man <1> at sea"] * len(seeds), [[photo]] * len(seeds)
        return list(generate(pipe, prompts, subjects, seeds, batch_size, **options))

    together, alone = made([5, 6, 7], 2), made([7], 1)[0]
    assert [picture.seed for picture in together] == [5, 6, 7]
    difference = np.asarray(together[2].image, dtype=int) - np.asarray(alone.image, dtype=int)
    assert np.abs(difference).max() <= 1
    assert torch.allclose(together[2].steps, alone.steps, atol=1e-5)
    assert together[0].image.tobytes() != together[1].image.tobytes()


def test_a_picture_without_subject_has_no_routing(pipe):
    picture = next(generate(pipe, ["a man"], [[]], [0], 1, num_inference_steps=2))
    assert picture.steps is None
    with pytest.raises(ValueError, match="no routing was recorded"):
        _ = picture.routing


def test_png_holds_its_facts_and_equal_inputs_give_equal_bytes(tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    for name in ("first.png", "second.png"):
        save_png(tmp_path / name, image, {"prompt": "a man <1> – at sea", "seed": 3})
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    with Image.open(tmp_path / "first.png") as read:
        assert read.text == {"prompt": "a man <1> – at sea", "seed": "3"}


def test_overlay_keeps_what_is_routed_to_the_personalized_expert():
    routing = torch.zeros(4, 4)
    routing[:, 2:] = 0.4
    shown = np.asarray(overlay(Image.new("RGB", (4, 4), (200, 200, 200)), routing))
    assert (shown[:, 3] == 200).all()
    assert (shown[:, 0] == 30).all()
    heat = np.asarray(heat_map(routing, (4, 4))).astype(int).sum(-1)
    assert heat[0, 3] > heat[0, 0]


def test_long_titles_stay_above_their_columns():
    row = [Image.new("RGB", (64, 64), "white")] * 3
    sheet = np.asarray(contact_sheet([row], ("", "on a snowy mountain by night", ""), side=64))
    written = np.nonzero((sheet < 128).any(axis=(0, 2)))[0]
    assert 4 + 64 <= written.min() < written.max() < 4 + 2 * 64 + 4 + 4
    plain = np.asarray(contact_sheet([row], ("", "sea", ""), side=64))
    assert (plain < 128).sum() > 0


def test_contact_sheet_places_every_picture_in_its_cell():
    colours = [["red", "lime"], ["blue"]]
    rows = [[Image.new("RGB", (8, 8), colour) for colour in row] for row in colours]
    sheet = contact_sheet(rows, side=32)
    centres = {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): (255, 255, 255)}
    for (x, y), colour in centres.items():
        assert sheet.getpixel((4 + 16 + x * 36, 4 + 16 + y * 36)) == colour
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])


def test_routing_row_has_one_picture_a_column():
    row = routing_row(Picture(Image.new("RGB", (16, 16)), 0, torch.rand(3, 8, 8)))
    assert len(row) == len(ROUTING_COLUMNS)
    assert {image.size for image in row} == {(16, 16)}


def test_device_words():
    assert device_and_dtype("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert device_and_dtype("cpu", "bfloat16")[1] == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is int8"):
        device_and_dtype("cpu", "int8")
    with pytest.raises(ValueError, match="device is nowhere"):
        device_and_dtype("nowhere", "auto")
