"""Control at sampling: what equals the prior, what the recorded routing says, what a pixel sees, what is refused."""

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from drawing import PLAIN, PROMPT, TWO, close, make
from moa_train.inference.steps import owned, slot_owners

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def calls(pipe, *args, **options):
    """The attention of each slot at each step, in the layers of the latent's resolution, beside the picture."""
    seen = []

    def note(module, args, kwargs, output):
        maps = kwargs["cross_attention_kwargs"]["moa"].subject_attention
        seen.append(torch.stack([a for a in maps.values() if a.shape[-1] == 64]).unflatten(-1, (8, 8)))

    with pipe.unet.register_forward_hook(note, with_kwargs=True):
        image = make(pipe, *args, **options)
    return image, torch.stack(seen)


def test_strength_0_and_a_start_after_the_last_step_are_the_prior_bit_for_bit(pipe, photo):
    options = {"seeds": (0, 1, 2, 3), "num_images_per_prompt": 2, "negative_prompt": ["red", "blue"]}
    prompts = ["a woman at sea", PLAIN]
    expected = make(pipe, prompts, **options)
    marked = ["a woman <1> at sea", PROMPT]
    for control in ({"subject_strength": 0}, {"subject_start": 1.0}, {"routing_override": 0.0}):
        assert np.array_equal(make(pipe, marked, [photo], **control, **options), expected), control
        assert not pipe.routing.mean.any()


def test_controls_at_their_neutral_values_change_nothing(pipe, photo):
    expected = make(pipe, PROMPT, [photo])
    same = {"subject_strength": {"*": 1.0}, "subject_start": 0.0, "separate_subjects": True}
    assert np.array_equal(make(pipe, PROMPT, [photo], **same), expected)
    assert close(make(pipe, PROMPT, [photo], regions=[None]), expected)
    assert close(make(pipe, PROMPT, [photo], regions=[(0, 0, 1, 1)]), expected)


def test_strength_scales_the_share_up_to_1_and_the_last_pattern_counts(pipe, photo):
    make(pipe, PROMPT, [photo], num_inference_steps=1)
    learned = pipe.routing.layer_steps
    first, *others = learned
    make(pipe, PROMPT, [photo], num_inference_steps=1, subject_strength={"*": 0.25, first: 0.5})
    assert torch.allclose(pipe.routing.layer_steps[first], 0.5 * learned[first])  # no layer before it has changed
    make(pipe, PROMPT, [photo], num_inference_steps=1, subject_strength=1e6)
    assert all((maps == 1).all() for maps in pipe.routing.layer_steps.values())
    make(pipe, PROMPT, [photo], num_inference_steps=1, subject_strength={"*.attn1": 0, "mid_block.*": 0, "*.attn2": 0})
    assert not pipe.routing.mean.any()
    make(pipe, PROMPT, [photo], num_inference_steps=1, subject_strength={"*": 0, first: 1.0})
    assert torch.equal(pipe.routing.layer_steps[first], learned[first])
    assert not any(pipe.routing.layer_steps[layer].any() for layer in others)


def test_a_forced_map_is_what_every_layer_takes_at_its_own_resolution(pipe, photo, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "map.png")
    images = []
    for given in (grey, torch.from_numpy(grey / 255), tmp_path / "map.png", [Image.fromarray(grey)]):
        images.append(make(pipe, PROMPT, [photo], num_inference_steps=1, routing_override=given))
        for maps in pipe.routing.layer_steps.values():
            side = maps.shape[-1]
            blocks = (grey / 255).reshape(side, 16 // side, side, 16 // side).mean((1, 3))
            np.testing.assert_allclose(maps[0, 0], blocks, atol=1e-6)
    assert all(close(image, images[0]) for image in images)


def test_the_first_steps_see_the_prior_alone_until_the_start(pipe, photo):
    def latents_of(*args, **options):
        latents = []

        def note(pipeline, step, timestep, tensors):
            latents.append(tensors["latents"].clone())
            return tensors

        make(pipe, *args, num_inference_steps=4, callback_on_step_end=note, **options)
        return latents

    prior, late = latents_of(PLAIN), latents_of(PROMPT, [photo], subject_start=0.5)
    assert [torch.equal(*pair) for pair in zip(prior, late, strict=True)] == [True, True, False, False]
    assert [bool(step.any()) for step in pipe.routing.steps] == [False, False, True, True]


def test_a_region_holds_the_share_and_the_attention_of_its_subject(pipe, photo, other_photo):
    mask = np.zeros((16, 16), dtype=bool)
    mask[:, :8] = True
    boxes, attention = calls(pipe, TWO, [photo, other_photo], regions=[LEFT, RIGHT])
    assert (attention[:, :, 0, 0, :, :4] > 0).all()
    assert not attention[:, :, 0, 0, :, 4:].any()
    assert (attention[:, :, 0, 1, :, 4:] > 0).all()
    assert not attention[:, :, 0, 1, :, :4].any()
    assert np.array_equal(make(pipe, TWO, [photo, other_photo], regions=[mask, ~mask]), boxes)
    make(pipe, TWO, [photo, other_photo], regions=[LEFT, (0.0, 0.0, 0.5, 0.5)])
    for maps in pipe.routing.layer_steps.values():
        half = maps.shape[-1] // 2
        assert (maps[..., :half] > 0).all()
        assert not maps[..., half:].any()


def test_both_nouns_of_a_subject_share_its_region(pipe, photo, other_photo):
    _, attention = calls(pipe, "a man <1>, a woman <2>, his twin <1>", [photo, other_photo], regions=[LEFT, RIGHT])
    seen = (attention[:, :, 0] > 0).flatten(0, 1)
    for slot, west, east in ((0, True, False), (1, True, False), (2, False, True)):
        assert (seen[:, slot, :, :4] == west).all()
        assert (seen[:, slot, :, 4:] == east).all()


def test_rows_with_controls_line_up_with_single_calls(pipe, photo, other_photo):
    prompts, subjects, regions = [PROMPT, TWO], [[photo], [photo, other_photo]], [[LEFT], [RIGHT, None]]
    maps = [np.full((8, 8), 0.9), np.eye(8)]
    shared = {"separate_subjects": True, "subject_start": 0.4, "num_inference_steps": 3}
    together = make(
        pipe,
        prompts,
        subjects,
        seeds=(0, 1, 2, 3),
        num_images_per_prompt=2,
        regions=regions,
        routing_override=maps,
        **shared,
    )
    for row in range(4):
        which = row // 2
        control = {"regions": regions[which], "routing_override": maps[which], **shared}
        assert close(together[row], make(pipe, prompts[which], subjects[which], seeds=(row,), **control)[0]), row


def test_kept_apart_no_pixel_sees_two_subjects_after_the_first_step(pipe, photo, other_photo):
    mixed, before = calls(pipe, TWO, [photo, other_photo])
    apart, after = calls(pipe, TWO, [photo, other_photo], separate_subjects=True)
    assert torch.equal(before[0], after[0])
    assert (before.prod(dim=3) > 0).all()
    assert not after[1:].prod(dim=3).any()
    assert (after[1:].sum(dim=3) > 0).all()
    assert not close(mixed, apart, 1e-5)


def test_a_callback_that_switches_guidance_off_works(pipe, photo):
    def options():
        return {"num_inference_steps": 3, "callback_on_step_end": SDCFGCutoffCallback(None, 1)}

    expected = make(pipe, PLAIN, **options())
    assert np.array_equal(make(pipe, PROMPT, [photo], subject_strength=0.0, **options()), expected)
    assert not close(expected, make(pipe, PLAIN, num_inference_steps=3), 1e-4)
    make(pipe, PROMPT, [photo], **options())
    assert pipe.routing.steps.shape == (3, 1, 8, 8)


def test_regions_are_found_around_people_and_each_subject_keeps_its_own():
    """Two blobs; the first subject looks at both, so that half way between the first centres is inside a blob."""
    rows, columns = np.mgrid[:12, :16]
    blobs = [np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8.0) for y, x in ((3, 3), (8, 12))]
    first, second = 0.6 * blobs[0] + 0.4 * blobs[1], 3 * blobs[0]
    maps = torch.from_numpy(np.stack([0.3 * first, second, 0.7 * first]))[None]
    found = owned(maps, torch.tensor([[0, 1, 0]]))[0]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0] + found[1], torch.ones(12, 16).double())
    for y, x, subject in ((3, 3, 1), (8, 12, 0)):
        assert found[subject, y - 2 : y + 3, x - 2 : x + 3].all()


def test_a_row_with_one_subject_sees_it_everywhere_beside_rows_with_two():
    maps = torch.rand(2, 2, 4, 4)
    maps[0, 1] = 0
    found = owned(maps, torch.tensor([[0, -1], [0, 1]]))
    assert found[0, 0].all()
    assert not found[0, 1].any()
    assert torch.equal(found[1].sum(0), torch.ones(4, 4))


def test_slot_owners_are_those_of_the_rows_of_the_batch():
    assert slot_owners([(0,), (0, 0, 1)], 2).tolist() == [[0, -1, -1]] * 2 + [[0, 0, 1]] * 2
    assert slot_owners([(0,), (0, 0)], 1) is None


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"subject_strength": -0.1}, "subject_strength is -0.1"),
        ({"subject_strength": float("nan")}, "subject_strength is nan"),
        ({"subject_strength": {"upper": 1}}, "no layer is called 'upper'; one is 'down_blocks"),
        ({"subject_start": 1.5}, "subject_start is 1.5"),
        ({"routing_override": 1.5}, "values from 1.5 to 1.5"),
        ({"routing_override": np.full((2, 2), np.nan)}, "must lie in"),
        ({"routing_override": np.zeros((3, 4, 4))}, "routing_override has shape"),
        ({"routing_override": [0.5, 0.5]}, "has 2 maps for 1 prompts"),
        ({"routing_override": "none.png"}, "routing_override none.png: no such file"),
        ({"regions": [LEFT, RIGHT]}, "marks 1 subjects, 2 regions"),
        ({"regions": [[LEFT], [LEFT]]}, "2 lists of regions were given for 1 prompts"),
        ({"regions": [(0, 0, 32, 64)]}, "fractions of the picture"),
        ({"regions": [(0.5, 0, 0.5, 1)]}, "fractions of the picture"),
        ({"regions": [np.zeros((4, 4))]}, "a region is empty"),
        ({"regions": "left.png"}, "regions is a str: give a list"),
    ],
)
def test_control_outside_its_domain_is_refused(pipe, photo, control, message):
    with pytest.raises(ValueError, match=message):
        make(pipe, PROMPT, [photo], **control)
