"""Features in the place of pictures, several pictures of one subject, one subject at several nouns, ControlNet."""

import copy

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from drawing import PROMPT, TWO, close, make
from moa_train.inference.pipeline import MoAControlNetPipeline
from moa_train.inference.subjects import Views


def test_the_feature_of_several_pictures_is_the_mean_of_theirs_in_any_order(pipe, photo, other_photo, photo_files):
    cut_out = torch.rand(3, pipe.image_encoder.image_size, pipe.image_encoder.image_size)
    pictures = [photo, other_photo, cut_out]
    single = np.stack([pipe.subject_features([picture])[0].numpy() for picture in pictures])
    both = pipe.subject_features([Views(pictures), Views(pictures[::-1]), photo_files[2]]).numpy()
    np.testing.assert_allclose(both[0], single.sum(0) / 3, atol=1e-6)
    np.testing.assert_allclose(both[1], both[0], atol=1e-6)
    assert np.array_equal(both[2], single[0])
    assert np.abs(single[0] - single[1]).max() > 1e-3


def test_one_picture_twice_and_its_feature_are_the_picture(pipe, photo, other_photo):
    expected = make(pipe, PROMPT, [photo])
    assert np.array_equal(make(pipe, PROMPT, [Views([photo, photo])]), expected)
    features = pipe.subject_features([photo, other_photo])
    assert np.array_equal(make(pipe, PROMPT, [features[0]]), expected)
    assert np.array_equal(make(pipe, PROMPT, [Views([photo, other_photo])]), make(pipe, PROMPT, [features.mean(0)]))


def test_one_subject_at_two_nouns_is_its_picture_given_for_each(pipe, photo, other_photo):
    twins = make(pipe, "a man <1> and his twin <1>", [photo])
    assert np.array_equal(twins, make(pipe, "a man <1> and his twin <2>", [photo, photo]))
    assert not close(twins, make(pipe, "a man <1> and his twin", [photo]), 1e-4)
    third = make(pipe, "a man <1> and a woman <2> and his twin <1>", [photo, other_photo])
    assert np.array_equal(third, make(pipe, "a man <1> and a woman <3> and his twin <2>", [photo, photo, other_photo]))


@pytest.mark.parametrize(("width", "value"), [(3, 0.0), (12, float("nan"))])
def test_a_vector_that_is_no_feature_of_this_encoder_is_refused(pipe, width, value):
    with pytest.raises(ValueError, match=f"has {width} values; this image encoder gives 12 finite"):
        make(pipe, PROMPT, [torch.full((width,), value)])


@pytest.mark.parametrize("pictures", [[], "photo.png"])
def test_views_without_a_list_of_pictures_are_refused(pictures):
    with pytest.raises(ValueError, match="Views holds the pictures of one subject"):
        Views(pictures)


def test_controlnet_steers_both_experts_and_never_sees_the_subject(pipe, photo, other_photo):
    torch.manual_seed(2)
    factor_2 = (16, 32)  # one halving less than there are widths
    plain = ControlNetModel.from_unet(pipe.unet, "rgb", factor_2, load_weights_from_unet=False)
    steering = copy.deepcopy(plain)
    for value in steering.parameters():
        value.data.add_(torch.randn_like(value) * 0.1)
    parts = {name: part for name, part in pipe.components.items() if name != "feature_extractor"}
    edges = torch.rand(1, 3, 16, 16)

    def controlled(network, subjects, prompt):
        model = MoAControlNetPipeline(**parts, controlnet=network)
        model.set_progress_bar_config(disable=True)
        return make(model, prompt, subjects, image=edges, negative_prompt="blue"), model.routing

    unsteered, _ = controlled(plain, [photo, other_photo], TWO)
    assert np.array_equal(unsteered, make(pipe, TWO, [photo, other_photo], negative_prompt="blue"))
    steered, routing = controlled(steering, [photo, other_photo], TWO)
    assert not close(steered, unsteered, 1e-3)
    assert routing.mean.shape == (1, 8, 8)
    reference = StableDiffusionControlNetPipeline(**parts, controlnet=steering, feature_extractor=None)
    reference.set_progress_bar_config(disable=True)
    text = "a man and a woman in the forest"
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np", "negative_prompt": "blue"}
    expected = reference(text, edges, generator=[torch.Generator().manual_seed(0)], **options).images
    assert np.array_equal(controlled(steering, [], text)[0], expected)
