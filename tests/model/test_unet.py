"""The properties that always hold for a U-Net with MoA, and that it comes out as it went in."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from moa_train.denoiser import Denoiser
from moa_train.model.attention import MoACall
from moa_train.model.unet import (
    MoAConfig,
    add_moa,
    attention_layers,
    cast_prior,
    load_personalized_state_dict,
    personalized_state_dict,
    remove_moa,
    trainable_parameters,
)
from moa_train.symbols import Conditioning

BOTH = pytest.mark.parametrize("family", ["sd1", "sd2"])


def pretrained_output(tools, family, conditioning, size=(8, 8)):
    z, t = tools.latents(size=size)
    return tools.make_unet(family)(z, t, conditioning.prior_tokens).sample


def prior_parameters(unet):
    trained = personalized_state_dict(unet)
    return {name: parameter for name, parameter in unet.named_parameters() if name not in trained}


def force_routing(unet, prior):
    """Send every pixel to one expert."""
    bias = torch.tensor([1e4, -1e4]) if prior else torch.tensor([-1e4, 1e4])
    with torch.no_grad():
        for name, parameter in trainable_parameters(unet)["router"]:
            if name.endswith("layers.3.bias"):
                parameter.copy_(bias)


@BOTH
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_before_training_the_unet_equals_the_pretrained_one(tools, family, size):
    conditioning = tools.make_conditioning()
    z, t = tools.latents(size=size)
    unet = add_moa(tools.make_unet(family), tools.config)
    prediction, _ = Denoiser(unet)(z, t, conditioning)
    torch.testing.assert_close(prediction, pretrained_output(tools, family, conditioning, size), rtol=0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("way", ["prior_rows", "routing", "no call"])
def test_forced_prior_routing_equals_the_pretrained_unet_to_the_bit(tools, family, way):
    conditioning, unet = tools.make_conditioning(), tools.trained(family)
    z, t = tools.latents()
    expected = pretrained_output(tools, family, conditioning)
    free, _ = Denoiser(unet)(z, t, conditioning)
    assert (free - expected).abs().max() > 1e-3
    if way == "no call":
        prediction = unet(z, t, conditioning.prior_tokens).sample
    else:
        if way == "routing":
            force_routing(unet, prior=True)
        rows = 2 if way == "prior_rows" else 0
        prediction, _ = Denoiser(unet)(z, t, replace(conditioning, prior_rows=rows))
    assert torch.equal(prediction, expected)


def test_forced_personalized_routing_forgets_the_prior_experts(tools):
    conditioning, unet = tools.make_conditioning(), tools.trained()
    z, t = tools.latents()
    force_routing(unet, prior=False)
    before, _ = Denoiser(unet)(z, t, conditioning)
    for layer in attention_layers(unet):
        torch.nn.init.normal_(unet.get_submodule(layer).to_v.weight)
    after, _ = Denoiser(unet)(z, t, conditioning)
    assert torch.equal(before, after)


@BOTH
def test_null_rows_of_guidance_equal_the_pretrained_unet_and_leave_the_others_alone(tools, family):
    conditioning, unet = tools.make_conditioning(), tools.trained(family)
    z, t = tools.latents()
    expected = pretrained_output(tools, family, conditioning)
    whole, _ = Denoiser(unet)(z, t, conditioning)
    prediction, seen = Denoiser(unet)(z, t, replace(conditioning, prior_rows=1))
    assert torch.equal(prediction[0], expected[0])
    # products of other shapes round otherwise
    torch.testing.assert_close(prediction[1], whole[1], atol=1e-4, rtol=1e-4)
    assert {len(routing) for routing in seen.routing.values()} == {1}
    assert {len(attention) for attention in seen.subject_attention.values()} == {1}


@BOTH
def test_routing_sums_to_one_and_no_gradient_reaches_the_prior(tools, family):
    unet = tools.trained(family)
    prediction, seen = Denoiser(unet)(*tools.latents(), tools.make_conditioning())
    assert list(seen.routing) == attention_layers(unet)
    for routing in seen.routing.values():
        torch.testing.assert_close(routing.sum(-1), torch.ones(routing.shape[:-1]))
    prediction.square().mean().backward()
    for name, parameter in prior_parameters(unet).items():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
    for group in trainable_parameters(unet).values():
        for name, parameter in group:
            assert parameter.grad.abs().sum() > 0, name


def swap(conditioning):
    return replace(
        conditioning,
        image_features=conditioning.image_features.flip(1),
        subject_positions=conditioning.subject_positions.flip(1),
        subject_present=conditioning.subject_present.flip(1),
    )


def test_swapping_two_subjects_permutes_their_attention_and_leaves_the_output_unchanged(tools):
    conditioning, unet = tools.make_conditioning(torch.float64), tools.trained(dtype=torch.float64)
    z, t = tools.latents(torch.float64)
    prediction, seen = Denoiser(unet)(z, t, conditioning)
    swapped, seen_swapped = Denoiser(unet)(z, t, swap(conditioning))
    torch.testing.assert_close(swapped, prediction, rtol=1e-10, atol=1e-12)
    for layer, attention in seen.subject_attention.items():
        torch.testing.assert_close(seen_swapped.subject_attention[layer], attention.flip(1))
        assert (attention[0, 0] - attention[0, 1]).abs().max() > 1e-4
    wrong = replace(conditioning, image_features=conditioning.image_features.flip(1))
    assert (Denoiser(unet)(z, t, wrong)[0] - prediction).abs().max() > 1e-4


def test_a_padded_slot_changes_nothing(tools):
    unet, conditioning = tools.trained(dtype=torch.float64), tools.make_conditioning(torch.float64)
    z, t = tools.latents(torch.float64)
    one = Conditioning(
        conditioning.prior_tokens,
        conditioning.image_features[:, :1],
        conditioning.subject_positions[:, :1],
        conditioning.subject_present[:, :1],
    )
    expected, seen = Denoiser(unet)(z, t, one)
    for position in (0, 2, 6):
        padded = replace(
            conditioning,
            image_features=torch.cat([one.image_features, torch.full_like(one.image_features, 1e3)], 1),
            subject_positions=torch.cat([one.subject_positions, torch.full((2, 1), position)], 1),
            subject_present=torch.tensor([[True, False], [True, False]]),
        )
        prediction, seen_padded = Denoiser(unet)(z, t, padded)
        torch.testing.assert_close(prediction, expected, rtol=1e-10, atol=1e-12)
        for layer, attention in seen_padded.subject_attention.items():
            torch.testing.assert_close(attention[:, :1], seen.subject_attention[layer])
            assert (attention[:, 1] == 0).all()


def test_without_subjects_only_the_weights_of_the_experts_matter(tools):
    unet, conditioning = tools.trained(), tools.make_conditioning()
    z, t = tools.latents()
    nobody = replace(conditioning, subject_present=torch.zeros(2, 2, dtype=torch.bool))
    other = replace(nobody, image_features=conditioning.image_features + 1, subject_positions=torch.ones(2, 2).long())
    assert torch.equal(Denoiser(unet)(z, t, nobody)[0], Denoiser(unet)(z, t, other)[0])


def test_recording_changes_nothing(tools):
    unet, conditioning = tools.trained(), tools.make_conditioning()
    prediction, _ = Denoiser(unet)(*tools.latents(), conditioning)
    silent, seen = Denoiser(unet)(*tools.latents(), conditioning, record=False)
    assert torch.equal(prediction, silent)
    assert not seen.routing
    assert not seen.subject_attention


@BOTH
def test_removing_moa_restores_the_unet(tools, family):
    unet, conditioning = tools.make_unet(family), tools.make_conditioning()
    unet.conv_in.requires_grad_(False)
    z, t = tools.latents()
    state = copy.deepcopy(unet.state_dict())
    trainable = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    processors = unet.attn_processors
    expected = unet(z, t, conditioning.prior_tokens).sample
    for _ in range(2):
        assert remove_moa(tools.randomize(add_moa(unet, tools.config))) is unet
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert [name for name, parameter in unet.named_parameters() if parameter.requires_grad] == trainable
    assert unet.attn_processors == processors
    assert not unet._forward_pre_hooks
    assert torch.equal(unet(z, t, conditioning.prior_tokens).sample, expected)


def test_a_copy_of_the_unet_stands_on_its_own(tools):
    unet, conditioning = tools.trained(), tools.make_conditioning()
    expected, _ = Denoiser(unet)(*tools.latents(), conditioning)
    twin = copy.deepcopy(unet)
    force_routing(unet, prior=True)
    assert torch.equal(Denoiser(twin)(*tools.latents(), conditioning)[0], expected)
    remove_moa(twin)
    assert hasattr(unet, "moa")
    assert unet._forward_pre_hooks


def test_layers_are_in_order_of_execution(tools):
    unet, order = tools.make_unet("sd2"), []
    for layer in attention_layers(unet):
        unet.get_submodule(layer).register_forward_pre_hook(lambda *_, layer=layer: order.append(layer))
    unet(*tools.latents(), tools.make_conditioning().prior_tokens)
    assert order == attention_layers(unet)
    assert len(set(order)) == len(order) == 14


def test_personalized_weights_move_to_another_unet_to_the_bit(tools):
    unet, conditioning = tools.trained(), tools.make_conditioning()
    other = add_moa(tools.make_unet(), tools.config)
    load_personalized_state_dict(other, personalized_state_dict(unet))
    assert torch.equal(
        Denoiser(other)(*tools.latents(), conditioning)[0], Denoiser(unet)(*tools.latents(), conditioning)[0]
    )


def test_weights_that_do_not_fit_are_refused_by_name(tools):
    unet = tools.trained()
    state = personalized_state_dict(unet)
    first = min(state)
    with pytest.raises(ValueError, match=f"lack 1 tensors, such as {first}"):
        load_personalized_state_dict(unet, {name: value for name, value in state.items() if name != first})
    with pytest.raises(ValueError, match="unknown 1 tensors, such as extra"):
        load_personalized_state_dict(unet, state | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"{first} has shape"):
        load_personalized_state_dict(unet, state | {first: torch.zeros(3, 1)})
    assert all(torch.equal(value, state[name]) for name, value in personalized_state_dict(unet).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"use_timestep": False},
        {"use_layer": False},
        {"use_timestep": False, "use_layer": False},
        {"self_attention": False},
        {"router_kind": "linear"},
        {"initial_prior": 0.9},
        {"hard_routing": True},
        {"cross_attention": False},
        {"exclude": ("down_blocks.0",)},
    ],
)
def test_each_ablation_starts_as_the_prior_and_trains_all_it_has(tools, changes):
    conditioning = tools.make_conditioning()
    config = replace(tools.config, **changes)
    unet = add_moa(tools.make_unet(), config)
    prediction, seen = Denoiser(unet)(*tools.latents(), conditioning)
    torch.testing.assert_close(prediction, pretrained_output(tools, "sd1", conditioning), rtol=0, atol=1e-6)
    assert len(seen.routing) == 8 - {"self_attention": 4, "cross_attention": 4, "exclude": 2}.get(min(changes), 0)
    assert not any(layer.startswith("down_blocks.0") for layer in seen.routing) or "exclude" not in changes
    tools.randomize(unet)
    Denoiser(unet)(*tools.latents(), conditioning)[0].square().mean().backward()
    for group in trainable_parameters(unet).values():
        assert all(parameter.grad is not None for _, parameter in group)
    assert MoAConfig(**config.to_dict()) == config


def test_without_cross_attention_experts_the_photo_enters_by_the_priors_weights(tools):
    """The layers' output against diffusers' own attention over the prompt whose nouns carry the photo."""
    unet, conditioning = tools.trained(cross_attention=False), tools.make_conditioning()
    layer = next(name for name in unet.moa.cross_layers)
    attn, (z, t) = unet.get_submodule(layer), tools.latents()
    kept = {}
    handle = attn.register_forward_hook(lambda _, inputs, out: kept.update(hidden=inputs[0], out=out))
    Denoiser(unet)(z, t, conditioning)
    handle.remove()
    prompt = conditioning.prior_tokens.clone()
    for row, slot in conditioning.subject_present.nonzero().tolist():
        prompt[row, conditioning.subject_positions[row, slot]] = unet.moa.tokens(t, conditioning)[0, row, slot]
    torch.testing.assert_close(kept["out"], AttnProcessor2_0()(attn, kept["hidden"], prompt), rtol=0, atol=1e-5)
    assert (kept["out"] - AttnProcessor2_0()(attn, kept["hidden"], conditioning.prior_tokens)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("exclude", "message"),
    [(["down_blocks.9"], "exclude names 'down_blocks.9'"), (["up_blocks", "down_blocks", "mid_block"], "no photo")],
)
def test_exclusions_that_fit_no_layer_or_every_one_are_refused(tools, exclude, message):
    with pytest.raises(ValueError, match=message):
        add_moa(tools.make_unet(), replace(tools.config, exclude=exclude))


def test_a_config_that_leaves_no_layer_is_refused(tools):
    with pytest.raises(ValueError, match="no layer is left"):
        replace(tools.config, self_attention=False, cross_attention=False)


def test_timestep_and_layer_reach_the_output_only_when_switched_on(tools):
    conditioning = tools.make_conditioning()
    for use in (True, False):
        unet = tools.trained(use_timestep=use, use_layer=use)
        twice = Conditioning(
            conditioning.prior_tokens[[0, 0]],
            conditioning.image_features[[0, 0]],
            conditioning.subject_positions[[0, 0]],
            conditioning.subject_present[[0, 0]],
        )
        tokens = unet.moa.tokens(torch.tensor([1, 900]), twice)
        assert torch.allclose(tokens[:, 0], tokens[:, 1]) is not use
        assert torch.allclose(tokens[0], tokens[1]) is not use


def test_frozen_weights_in_bfloat16_train_with_and_without_autocast(tools):
    conditioning = tools.make_conditioning()
    z, t = tools.latents()
    reference, _ = Denoiser(tools.trained())(z, t, conditioning)
    for autocast in (True, False):
        unet = cast_prior(tools.trained(), torch.bfloat16)
        assert {parameter.dtype for parameter in prior_parameters(unet).values()} == {torch.bfloat16}
        inputs = (z, conditioning) if autocast else (z.bfloat16(), conditioning.to("cpu", torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction, seen = Denoiser(unet)(inputs[0], t, inputs[1])
        assert prediction.dtype == torch.bfloat16
        assert (prediction - reference).std() < 0.1 * reference.std()
        (prediction.float().square().mean() + sum(m.float().mean() for m in seen.subject_attention.values())).backward()
        for group in trainable_parameters(unet).values():
            for name, parameter in group:
                assert parameter.dtype == parameter.grad.dtype == torch.float32, name
                assert parameter.grad.isfinite().all(), name


def test_anything_that_replaces_the_processors_is_named(tools):
    unet, conditioning = tools.trained(), tools.make_conditioning()
    unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="attn1 lost its MoA expert to AttnProcessor"):
        Denoiser(unet)(*tools.latents(), conditioning)


def test_unets_that_moa_does_not_serve_are_refused(tools):
    unet = tools.trained()
    with pytest.raises(ValueError, match="has MoA already"):
        add_moa(unet, tools.config)
    with pytest.raises(ValueError, match="has no MoA"):
        remove_moa(tools.make_unet())
    other = tools.make_unet()
    other.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="has a AttnProcessor"):
        add_moa(other, tools.config)
    with_attention_in_resnets = tools.make_unet(down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"))
    with pytest.raises(ValueError, match=r"down_blocks.1.attentions.0 has group_norm, residual_connection"):
        add_moa(with_attention_in_resnets, tools.config)
    assert not hasattr(with_attention_in_resnets, "moa")


def test_a_conditioning_of_another_batch_size_is_refused(tools):
    z, t = tools.latents()
    with pytest.raises(ValueError, match="conditioning has 2 rows, the latents have 1"):
        Denoiser(tools.trained())(z[:1], t[:1], tools.make_conditioning())


def test_a_scalar_timestep_serves_the_whole_batch(tools):
    unet, conditioning = tools.trained(), tools.make_conditioning()
    z, _ = tools.latents()
    expected, _ = Denoiser(unet)(z, torch.tensor([700, 700]), conditioning)
    for timestep in (700, torch.tensor(700), torch.tensor([700])):
        call = {"moa": MoACall(conditioning)}
        prediction = unet(z, timestep, conditioning.prior_tokens, cross_attention_kwargs=call).sample
        assert torch.equal(prediction, expected)


SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
WIDTHS = 5 * [320] + 5 * [640] + 6 * [1280]


def test_stable_diffusion_has_the_counted_size():
    with torch.device("meta"):
        unet = add_moa(UNet2DConditionModel(**SD15), 768)
        conditioning = Conditioning(
            torch.zeros(1, 77, 768), torch.zeros(1, 4, 768), torch.zeros(1, 4).long(), torch.zeros(1, 4).bool()
        )
        prediction, seen = Denoiser(unet)(torch.zeros(1, 4, 64, 64), torch.zeros(1), conditioning)
    counts = {
        group: sum(parameter.numel() for _, parameter in parameters)
        for group, parameters in trainable_parameters(unet).items()
    }
    assert counts["experts"] == sum(4 * d * d + d + 2 * d * d + 2 * 768 * d + d for d in WIDTHS)
    assert round(counts["experts"] / 1e6, 1) == 93.5
    assert counts["router"] == 2 * sum(2 * d + d * d // 4 + d // 4 + 2 * d // 4 + 2 for d in WIDTHS)
    position = 256 * 768 + 768 + 768 * 768 + 768 + 16 * 768
    assert counts["fusion"] == position + 2 * 1536 + 1536 * 768 + 768 + 768 * 768 + 768
    assert len(seen.routing) == 32
    assert len(seen.subject_attention) == 16
    sizes = [seen.sizes[layer] for layer in attention_layers(unet)]
    expected = 4 * [64] + 4 * [32] + 4 * [16] + 2 * [8] + 6 * [16] + 6 * [32] + 6 * [64]
    assert sizes == [(side, side) for side in expected]
    assert prediction.shape == (1, 4, 64, 64)
