"""Edits on the toy prior with the weights that ship with the package: what has to change, and what has to stay.

People are of the validation split. The probe, which sees neither router nor photo, tells where a person is and who.
"""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.data.sources.toyworld import draw_scene
from moa_train.evaluation.gallery import ToyProtocol, held_out_people
from moa_train.inference import edits
from moa_train.inference.edits.compose import compose_rows, keep_subjects
from moa_train.inference.edits.morph import slerp
from moa_train.inference.edits.routing import layer_label
from moa_train.inference.edits.swap import swap_rows
from moa_train.inference.pipeline import MoAPipeline
from moa_train.inference.regions import difference, dilate, mean_difference, psnr
from moa_train.prior.load import toy_prior_folder
from moa_train.prior.probe import crop_people, load_probe
from moa_train.prompts import parse_prompt

# diffusers' UniPC scheduler calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SAMPLING = {"num_inference_steps": 8, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def toy() -> MoAPipeline:
    pipe = MoAPipeline.from_pretrained("toy", "toy")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def people():
    """Three men, then three women."""
    return held_out_people(ToyProtocol(people=6, split="validation"))


@pytest.fixture(scope="module")
def photos(people):
    return [(person.photo, person.mask) for person in people]


@pytest.fixture(scope="module")
def probe():
    return load_probe(toy_prior_folder() / "probe")


@pytest.fixture(scope="module")
def swapped(toy, photos):
    """The prior and two men, at two seeds."""
    return edits.swap(toy, "a photo of a man <1> in the meadow", [photos[0], photos[2]], [0, 1], 8, **SAMPLING)


def pixels(images):
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255.0


def where_people_are(probe, *images):
    """The union of the people in some pictures, with the benchmark's margin."""
    found = (probe.person(pixels(images)) > 0.5).any(dim=0, keepdim=True)
    return dilate(found, ToyProtocol().margin)[0]


def differences(probe, *pairs):
    """Of each pair of pictures, inside and outside the people of both; their mean."""
    return mean_difference([difference(a.image, b.image, where_people_are(probe, a.image, b.image)) for a, b in pairs])


def who(probe, images):
    seen = pixels(images)
    return probe.identity(crop_people(seen, probe.person(seen) > 0.5))


def cosine(first, second):
    return torch.nn.functional.cosine_similarity(first, second, dim=1).numpy()


def rank_correlation(values):
    """Spearman's, against the order in which the values come."""
    ranks = np.argsort(np.argsort(values))
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def test_swap_changes_the_subject_and_keeps_the_context(swapped, probe):
    first, second = swapped.cells
    to_prior = differences(probe, *zip(swapped.prior, first, strict=True), *zip(swapped.prior, second, strict=True))
    between = differences(probe, *zip(first, second, strict=True))
    other_seed = differences(probe, swapped.prior)
    for found in (to_prior, between):
        assert found.subject > 5 * found.background
        assert other_seed.background > 2 * found.background


def test_swap_puts_the_person_of_each_row_s_photo_into_it(swapped, probe, people):
    truth = torch.stack([torch.from_numpy(person.identity.vector()) for person in (people[0], people[2])])
    for number, row in enumerate(swapped.cells):
        seen = who(probe, [cell.image for cell in row])
        own, other = (cosine(seen, truth[i].expand_as(seen)).mean() for i in (number, 1 - number))
        assert own > other + 0.1


def test_a_grid_reports_what_can_be_counted_in_its_pictures(swapped):
    report = swapped.report()
    assert [row["name"] for row in report["rows"]] == ["swap-1", "swap-2"]
    region = swapped.regions[1].numpy()
    squared = (pixels([swapped.prior[1].image]) - pixels([swapped.cells[0][1].image]))[0].square().mean(0).numpy()
    told = report["rows"][0]["by_seed"]["1"]
    assert told["subject"] == pytest.approx(squared[region].mean(), abs=1e-5)
    assert told["background"] == pytest.approx(squared[~region].mean(), abs=1e-5)
    assert report["region_share"]["1"] == pytest.approx(region.mean(), abs=1e-3)
    assert report["mean"]["subject"] > 5 * report["mean"]["background"]
    assert report["background_of_another_seed"] > 3 * report["mean"]["background"]
    sheet = swapped.sheet()
    assert sheet.size == (3 * 132 + 4, 3 * 132 + 4 + 18)


def test_morph_goes_from_the_one_to_the_other(toy, photos, probe):
    """Six pairs at one seed, 7 frames: the last comes nearer with every frame, the first is left behind."""
    falls, rises = [], []
    for noun, group in (("man", photos[:3]), ("woman", photos[3:])):
        for pair in itertools.combinations(group, 2):
            made = edits.morph(toy, f"a photo of a {noun} <1> in the forest", pair, 1, 7, 7, **SAMPLING)
            seen = who(probe, [frame.image for frame in made.frames])
            to_first, to_last = (cosine(seen, end.expand_as(seen)) for end in (seen[:1], seen[-1:]))
            falls.append(rank_correlation(to_first))
            rises.append(rank_correlation(to_last))
            way = to_last - to_first
            assert (np.diff(way) > -0.2).all(), pair
            assert np.diff(way).max() < 0.8 * (way[-1] - way[0])
            report = made.report()
            assert report["from_first_to_last"]["subject"] > 5 * report["from_first_to_last"]["background"]
            assert len(report["from_the_frame_before"]) == 6
    assert min(rises) > 0.7
    assert np.median(rises) > 0.9
    assert np.median(falls) < -0.7


def test_the_ends_of_a_morph_are_the_subjects_own_pictures(pipe, photo, other_photo):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    made = edits.morph(pipe, "a man <1> at sea", [photo, other_photo], 3, 3, 1, **options)
    for subject, frame in ((photo, made.frames[0]), (other_photo, made.frames[-1])):
        own = pipe("a man <1> at sea", [subject], generator=torch.Generator().manual_seed(3), **options).images[0]
        assert np.array_equal(own, frame.image)
    assert made.strip().width == 5 * 132 + 4


def test_a_morph_needs_two_ends_and_two_frames(pipe, photo):
    with pytest.raises(ValueError, match="marks 1 subjects and 1 were given"):
        edits.morph(pipe, "a man <1> at sea", [photo], 0, 3, 1)
    with pytest.raises(ValueError, match="frames is 1"):
        edits.morph(pipe, "a man <1> at sea", [photo, photo], 0, 1, 1)


def test_slerp_keeps_lengths_between_those_of_its_ends_and_turns_evenly():
    start, end = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    quarter = slerp(start, end, 0.25)
    angle = np.pi / 8
    assert torch.allclose(quarter[0], 2.5 * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32))
    assert torch.allclose(quarter[1], torch.tensor([0.0, 2.5]))
    assert torch.equal(slerp(start, end, 0.0), start)
    assert torch.equal(slerp(start, end, 1.0), end)


def test_compose_adds_one_subject_at_a_time_and_what_it_leaves_out_is_the_prior_s(toy, photos, probe):
    prompt = "a photo of a man <1> and a woman <2> in the forest"
    made = edits.compose(toy, prompt, [photos[0], photos[3]], [0], 4, **SAMPLING)
    assert [row.name for row in made.rows] == ["with-1", "with-1-2", "with-2"]
    prior = made.prior[0].image
    for (cell,) in made.cells:
        found = differences(probe, (made.prior[0], cell))
        assert found.background < 0.01
        assert found.subject > 4 * found.background
    without = toy(parse_prompt(prompt).text, generator=torch.Generator().manual_seed(0), **SAMPLING).images[0]
    assert np.abs(np.asarray(without, dtype=int) - np.asarray(prior, dtype=int)).max() <= 1


def test_the_stages_of_compose_differ_by_one_subject_and_keep_the_words(photo):
    prompt = "a man <2>, a girl <1> and a dog<3> with his twin, a boy <2>"
    rows = compose_rows(prompt, ["one", "two", "three"])
    assert [row.subjects for row in rows] == [
        ("one",), ("one", "two"), ("one", "two", "three"), ("two", "three"), ("three",)
    ]  # fmt: skip
    assert {parse_prompt(row.prompt).text for row in rows} == {parse_prompt(prompt).text}
    assert [parse_prompt(row.prompt).count for row in rows] == [1, 2, 3, 2, 1]
    assert rows[3].prompt == "a man <1>, a girl and a dog<2> with his twin, a boy <1>"
    assert keep_subjects("a man<1>walks", []) == "a man walks"


@pytest.fixture(scope="module")
def edited(toy, people, photos):
    """A drawn scene of the first man, with the third put into it, in 12 steps."""
    scene = draw_scene(np.random.default_rng(5), [people[0].identity], "in the desert")
    mask = torch.from_numpy(scene.labels > 0)
    prompt = "a photo of a man <1> in the desert"
    return edits.edit_photo(toy, Image.fromarray(scene.image), mask, prompt, [photos[2]], 12, 3.0)


def test_inversion_reconstructs_the_picture_far_better_than_fresh_noise(edited):
    reconstructed = psnr(edited.picture, edited.reconstruction)
    assert reconstructed > 24.0
    assert reconstructed > psnr(edited.picture, edited.control) + 10.0
    assert psnr(edited.picture, edited.encoded) >= reconstructed
    report = edited.report()
    assert report["psnr_to_the_picture"]["reconstruction"] == round(reconstructed, 2)
    assert report["mse_of_the_reconstruction"] == pytest.approx(10 ** (-reconstructed / 10), rel=1e-3)


def test_a_swap_into_a_picture_changes_the_person_and_keeps_the_background(edited, people, probe):
    held, free = (difference(edited.picture, swap[0].image, edited.region) for swap in (edited.held, edited.free))
    assert held.background < 0.003
    assert held.background < free.background / 2
    assert held.subject > 5 * held.background
    seen = who(probe, [edited.picture, edited.held[0].image])
    old, new = (cosine(seen, torch.from_numpy(people[i].identity.vector()).expand_as(seen)) for i in (0, 2))
    assert old[0] > new[0] + 0.2
    assert new[1] > old[1] + 0.2
    assert edited.sheet().width == 6 * 132 + 4


def test_the_pipeline_has_its_own_scheduler_again_after_an_inversion(toy, edited):
    assert type(toy.scheduler).__name__ == "UniPCMultistepScheduler"


def test_the_routing_figure_shows_every_layer_and_the_steps_asked_for(pipe, photo):
    made = pipe("a man <1>", [photo], num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    few, many = (edits.routing_figure(made.images[0], pipe.routing, columns=columns) for columns in (1, 3))
    assert many.width > few.width
    assert many.height == few.height
    labels = {layer_label(name, (8, 4)) for name in pipe.routing.layer_steps}
    assert len(labels) == 14
    assert layer_label("down_blocks.1.attentions.0.transformer_blocks.0.attn2", (8, 4)) == "down 1.0 cross 4x8"
    assert layer_label("mid_block.attentions.0.transformer_blocks.0.attn1", (8, 8)) == "mid 0 self 8x8"
    with pytest.raises(ValueError, match="columns is 0"):
        edits.routing_figure(made.images[0], pipe.routing, columns=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swap_rows("a man", ["a"]), "marks no subject"),
        (lambda: swap_rows("a man <1> and a dog <2>", ["a"] * 3), "marks 2 subjects and 3 were given"),
        (lambda: swap_rows("a man <1>", []), "marks 1 subjects and 0 were given"),
        (lambda: compose_rows("a man", []), "marks no subject"),
        (lambda: compose_rows("a man <1>", ["a", "b"]), "marks 1 subjects and 2 were given"),
    ],
)
def test_a_wrong_number_of_subjects_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
