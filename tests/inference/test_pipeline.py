"""Pictures with subjects: what must equal the prior, what must line up, what is refused."""

import copy
import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from drawing import PLAIN, PROMPT, TWO, close, make, seeded, vanilla
from moa_train.inference.pipeline import MoAPipeline
from moa_train.inference.subjects import subject_pixels
from moa_train.model.unet import add_moa


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_prompt_without_marker_gives_the_prior_s_picture_bit_for_bit(pipe, prior_folder, guidance):
    from moa_train.prior.load import load_prior

    reference = vanilla(load_prior(str(prior_folder)))
    options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "np"}
    expected = reference([PLAIN, "a forest"], generator=seeded(0, 1), **options).images
    assert np.array_equal(make(pipe, [PLAIN, "a forest"], seeds=(0, 1), guidance_scale=guidance), expected)
    assert pipe.routing is None


def test_freshly_added_moa_gives_the_prior_s_picture(fresh, photo):
    expected = make(fresh, PLAIN)
    assert close(make(fresh, PROMPT, [photo]), expected)
    assert fresh.routing.mean.shape == (1, 8, 8)
    assert torch.allclose(fresh.routing.mean, torch.full((1, 8, 8), 0.5))


def test_the_subject_changes_the_picture(pipe, photo, other_photo):
    first, second = make(pipe, PROMPT, [photo]), make(pipe, PROMPT, [other_photo])
    assert not close(first, make(pipe, PLAIN), 1e-3)
    assert not close(first, second, 1e-4)


def test_the_same_seed_gives_the_same_bytes(pipe, photo):
    first = make(pipe, PROMPT, [photo])
    assert np.array_equal(first, make(pipe, PROMPT, [photo]))
    assert not close(first, make(pipe, PROMPT, [photo], seeds=(1,)), 1e-3)


def test_rows_of_prompts_and_copies_line_up_with_single_calls(pipe, photo, other_photo):
    prompts, subjects = [PROMPT, "a woman <1> in the forest"], [[photo], [other_photo]]
    together = make(
        pipe, prompts, subjects, seeds=(0, 1, 2, 3), num_images_per_prompt=2, negative_prompt=["blue", "red"]
    )
    routing = pipe.routing
    for row in range(4):
        which = row // 2
        negative = ["blue", "red"][which]
        alone = make(pipe, prompts[which], subjects[which], seeds=(row,), negative_prompt=negative)
        assert close(together[row], alone[0]), row
        assert torch.allclose(routing.mean[row], pipe.routing.mean[0], atol=1e-5), row
        assert torch.allclose(routing.steps[:, row], pipe.routing.steps[:, 0], atol=1e-5), row


def test_one_list_of_subjects_serves_every_prompt(pipe, photo):
    prompts = [PROMPT, "a woman <1> in the forest"]
    shared = make(pipe, prompts, [photo], seeds=(0, 1))
    assert np.array_equal(shared, make(pipe, prompts, [[photo], [photo]], seeds=(0, 1)))


def test_prompts_with_different_numbers_of_subjects_are_padded(pipe, photo, other_photo):
    together = make(pipe, [PROMPT, TWO], [[photo], [photo, other_photo]], seeds=(0, 1))
    assert close(together[0], make(pipe, PROMPT, [photo])[0])
    assert close(together[1], make(pipe, TWO, [photo, other_photo], seeds=(1,))[0])


def test_the_null_half_of_guidance_sees_the_prior_alone(pipe, photo):
    """The null half of each step's prediction equals the plain U-Net's for the same latents."""
    plain = copy.deepcopy(pipe.unet)
    seen = []

    def compare(module, args, kwargs, output):
        kwargs = {**kwargs, "cross_attention_kwargs": None}
        seen.append((output[0].chunk(2), plain(*args, **kwargs)[0].chunk(2)))

    with pipe.unet.register_forward_hook(compare, with_kwargs=True):
        make(pipe, PROMPT, [photo])
    assert len(seen) == 2
    for (null, cond), (plain_null, plain_cond) in seen:
        assert torch.allclose(null, plain_null, atol=1e-6)
        assert not torch.allclose(cond, plain_cond, atol=1e-2)


def test_each_marker_s_noun_carries_its_own_photo_and_null_rows_carry_none(pipe, photo, other_photo):
    given = []

    def note(module, args, kwargs):
        given.append(kwargs["cross_attention_kwargs"]["moa"].conditioning)

    with pipe.unet.register_forward_pre_hook(note, with_kwargs=True):
        make(pipe, TWO, [photo, other_photo], num_inference_steps=1)
    conditioning = given[0]
    for slot, subject in enumerate((photo, other_photo)):
        pixels = subject_pixels(subject, pipe.image_encoder.image_size)[None, None]
        expected = pipe.image_encoder(pixels, torch.ones(1, 1, dtype=torch.bool))[0, 0]
        assert torch.allclose(conditioning.image_features[1, slot], expected, atol=1e-6)
    # The tiny tokenizer has one token a letter, behind the start token.
    letters = [len(before.replace(" ", "")) for before in ("a man", "a man and a woman")]
    assert conditioning.subject_positions[1].tolist() == letters
    assert conditioning.subject_present.tolist() == [[False, False], [True, True]]
    assert conditioning.prior_rows == 1


def test_two_subjects_swapped_together_with_their_markers_give_the_same_picture(pipe, photo, other_photo):
    first = make(pipe, TWO, [photo, other_photo])
    swapped = make(pipe, "a man <2> and a woman <1> in the forest", [other_photo, photo])
    assert close(first, swapped)
    assert not close(first, make(pipe, TWO, [other_photo, photo]), 1e-4)


def test_without_guidance_the_picture_is_the_conditional_half(pipe, photo):
    """Guidance at scale 1 is the conditional prediction alone: 1 + epsilon goes through the guided path."""
    alone = make(pipe, PROMPT, [photo], guidance_scale=1.0)
    guided = make(pipe, PROMPT, [photo], guidance_scale=1.0 + 1e-6)
    assert close(alone, guided, 1e-4)
    assert pipe.routing.mean.shape[0] == 1


def test_routing_is_a_mean_over_layers_and_steps(pipe, photo):
    make(pipe, PROMPT, [photo])
    routing = pipe.routing
    layers = list(routing.layers)
    assert routing.steps.shape == (2, 1, 8, 8)
    assert len(layers) == 14
    assert {len(maps) for maps in routing.layer_steps.values()} == {2}
    assert routing.timesteps == tuple(sorted(routing.timesteps, reverse=True))
    assert torch.allclose(routing.mean, routing.steps.mean(0), atol=1e-6)
    assert all(torch.equal(routing.layers[name], maps.mean(0)) for name, maps in routing.layer_steps.items())
    for step in range(2):
        maps = [routing.layer_steps[name][step][:, None] for name in layers[2:-2]]
        resized = [torch.nn.functional.interpolate(x, (8, 8), mode="bilinear")[:, 0] for x in maps]
        assert torch.allclose(routing.steps[step], torch.stack(resized).mean(0), atol=1e-5)
    kept = [routing.layers[name] for name in layers[2:-2]]
    resized = [torch.nn.functional.interpolate(x[:, None], (8, 8), mode="bilinear")[:, 0] for x in kept]
    assert torch.allclose(routing.mean, torch.stack(resized).mean(0), atol=1e-5)
    assert all(((x >= 0) & (x <= 1)).all() for x in (routing.mean, *kept))


def test_recording_does_not_change_the_picture_and_the_user_s_callback_still_runs(pipe, photo):
    steps = []

    def note(pipeline, step, timestep, tensors):
        steps.append((step, sorted(tensors)))
        return tensors

    options = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    recorded = make(pipe, PROMPT, [photo], **options)
    assert steps == [(step, ["prompt_embeds"]) for step in range(2)]
    assert np.array_equal(recorded, make(pipe, PROMPT, [photo], record_routing=False))
    assert pipe.routing is None


def test_a_path_a_pair_an_alpha_channel_and_a_cut_out_are_the_same_subject(pipe, photo, photo_files):
    picture, mask, both = photo_files
    expected = make(pipe, PROMPT, [photo])
    cut = subject_pixels(photo, pipe.image_encoder.image_size)
    for subject in ((picture, mask), (str(picture), str(mask)), both, cut):
        assert np.array_equal(make(pipe, PROMPT, [subject]), expected)


def test_from_pretrained_gives_the_pipeline_that_was_exported(pipe, prior_folder, weights, photo):
    loaded = MoAPipeline.from_pretrained(prior_folder, weights)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler).__name__ == "UniPCMultistepScheduler"
    loaded.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert np.array_equal(make(loaded, PROMPT, [photo]), make(pipe, PROMPT, [photo]))
    assert not any(p.requires_grad for part in (loaded.unet, loaded.vae) for p in part.parameters())


def test_weights_on_another_prior_are_named_in_a_warning(prior_folder, weights, tmp_path, caplog):
    from diffusers import UNet2DConditionModel

    other = tmp_path / "other"
    other.mkdir()
    for part in prior_folder.iterdir():
        (other / part.name).symlink_to(part)
    caplog.set_level(logging.WARNING, logger="moa_train")
    MoAPipeline.from_pretrained(other, weights)  # the same prior at another place
    assert not caplog.records
    (other / "unet").unlink()
    unet = UNet2DConditionModel.from_pretrained(prior_folder / "unet")
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
    unet.save_pretrained(other / "unet")
    MoAPipeline.from_pretrained(other, weights)
    assert str(other) in caplog.text


def test_weights_of_another_architecture_are_refused(prior_folder, tmp_path, prior):
    from moa_train.checkpoint import export_personalized
    from moa_train.model.unet import personalized_state_dict

    add_moa(prior.unet, prior.image_encoder.dim + 1)
    path = tmp_path / "other.safetensors"
    metadata = {"moa": {"image_dim": prior.image_encoder.dim}, "prior": prior.identity, "step": 0}
    export_personalized(path, personalized_state_dict(prior.unet), metadata)
    with pytest.raises(ValueError, match="shape"):
        MoAPipeline.from_pretrained(prior_folder, path)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        (PROMPT, 0, "marks 1 subjects and 0"),
        (PROMPT, 2, "marks 1 subjects and 2"),
        (TWO, 1, "marks 2 subjects and 1"),
        (PLAIN, 1, "marks 0 subjects and 1"),
    ],
)
def test_markers_and_subjects_must_match(pipe, photo, prompt, count, message):
    with pytest.raises(ValueError, match=message):
        make(pipe, prompt, [photo] * count)


def test_mixed_prompts_and_unequal_lists_are_refused(pipe, photo):
    with pytest.raises(ValueError, match="two calls"):
        make(pipe, [PROMPT, PLAIN], [[photo], []], seeds=(0, 1))
    with pytest.raises(ValueError, match="1 lists of subjects were given for 2 prompts"):
        make(pipe, [PROMPT, PROMPT], [[photo]], seeds=(0, 1))
    with pytest.raises(ValueError, match="give a list"):
        make(pipe, PROMPT, "photo.png")


def test_subjects_without_moa_are_refused(prior, photo):
    bare = MoAPipeline(prior.vae, prior.text_encoder, prior.tokenizer, prior.unet, prior.scheduler, prior.image_encoder)
    with pytest.raises(ValueError, match="no MoA"):
        make(bare, PROMPT, [photo])
    blind = MoAPipeline(prior.vae, prior.text_encoder, prior.tokenizer, prior.unet, prior.scheduler)
    with pytest.raises(ValueError, match="no image encoder"):
        make(blind, PROMPT, [photo])


@pytest.mark.parametrize(
    "name",
    [
        "enable_attention_slicing",
        "disable_attention_slicing",
        "enable_xformers_memory_efficient_attention",
        "fuse_qkv_projections",
        "load_ip_adapter",
        "unload_ip_adapter",
    ],
)
def test_what_would_replace_moa_s_attention_is_refused_and_leaves_it_alone(pipe, name):
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(ValueError, match="attention processors"):
        getattr(pipe, name)()
    assert pipe.unet.attn_processors == before


def test_attention_replaced_behind_our_back_is_noticed(pipe, photo):
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="lost its MoA expert"):
        make(pipe, PROMPT, [photo])


@pytest.mark.parametrize("name", ["ip_adapter_image", "prompt_embeds", "negative_prompt_embeds"])
def test_options_that_bypass_the_prompt_are_refused(pipe, photo, name):
    with pytest.raises(ValueError, match=name):
        make(pipe, PROMPT, [photo], **{name: torch.zeros(1, 77, 16)})
