"""What the paper compares MoA with, each against its own formulas."""

import copy

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import nn

from moa_train.baselines.fastcomposer import FastComposerConfig, PostFuse
from moa_train.baselines.finetune import FinetuneConfig
from moa_train.baselines.ip_adapter import IPAdapterConfig, IPAdapterProcessor
from moa_train.conditioning.multimodal import noun_tokens
from moa_train.denoiser import Denoiser
from moa_train.methods import METHODS, method_of
from moa_train.model.attention import MoACall
from moa_train.model.unet import (
    MoAConfig,
    add_moa,
    install,
    load_personalized_state_dict,
    personalized_state_dict,
    remove_moa,
    trainable_parameters,
)
from moa_train.symbols import Conditioning
from unets import IMAGE_DIM, TEXT_DIM, Toolbox, make_conditioning, make_unet

BASELINES = (FastComposerConfig(IMAGE_DIM), FinetuneConfig(IMAGE_DIM, sinusoids=16), IPAdapterConfig(IMAGE_DIM))


def each_baseline(test):
    return pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)(test)


def shaken(unet):
    """The same U-Net with what was added to it at random values, as if trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.startswith("moa.") or ".processor." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet


@torch.no_grad()
def predict(unet, conditioning, record=False):
    return Denoiser(unet)(*Toolbox.latents(), conditioning, record=record)


@torch.no_grad()
def plain(unet, tokens):
    latents, timesteps = Toolbox.latents()
    return unet(latents, timesteps, encoder_hidden_states=tokens).sample


# ------------------------------------------------------------------------------------------------------ all of them
@each_baseline
def test_without_subjects_it_is_the_u_net_alone(method):
    none = make_conditioning(subject_present=torch.zeros(2, 2, dtype=torch.bool))
    expected = plain(make_unet(), none.prior_tokens)
    assert torch.equal(predict(shaken(install(make_unet(), method)), none)[0], expected)


@each_baseline
def test_the_null_half_of_guidance_sees_the_text_alone(method):
    given = make_conditioning()
    unet, expected = shaken(install(make_unet(), method)), plain(make_unet(), given.prior_tokens)
    half = predict(unet, make_conditioning(prior_rows=1))[0]
    assert torch.allclose(half[0], expected[0], atol=1e-5)
    assert torch.equal(half[1], predict(unet, given)[0][1]) or torch.allclose(
        half[1], predict(unet, given)[0][1], atol=1e-5
    )
    assert not torch.allclose(half[1], expected[1], atol=1e-3)
    assert torch.equal(predict(unet, make_conditioning(prior_rows=2))[0], expected)


@each_baseline
def test_a_padded_slot_changes_nothing(method):
    unet, given = shaken(install(make_unet(), method)), make_conditioning()
    features = given.image_features.clone()
    features[1, 1] = 7.0
    expected = predict(unet, given)[0]
    assert torch.equal(predict(unet, make_conditioning(image_features=features))[0], expected)


@each_baseline
def test_swapping_two_subjects_changes_nothing(method):
    unet, given = shaken(install(make_unet(), method)), make_conditioning()
    names = ("image_features", "subject_positions", "subject_present")
    swapped = {name: getattr(given, name).flip(1) for name in names}
    expected, seen = predict(unet, given, record=True)
    found, seen_swapped = predict(unet, make_conditioning(**swapped), record=True)
    assert torch.allclose(found, expected, atol=1e-5)
    for layer, attention in seen.subject_attention.items():
        assert torch.allclose(seen_swapped.subject_attention[layer][0], attention[0].flip(0), atol=1e-6)


@each_baseline
def test_what_trains_has_gradients_and_comes_back_from_a_state(method):
    unet = shaken(install(make_unet(), method))
    latents, timesteps = Toolbox.latents()
    Denoiser(unet)(latents, timesteps, make_conditioning())[0].square().mean().backward()
    groups = trainable_parameters(unet)
    chosen = {name for group in groups.values() for name, _ in group}
    assert chosen == {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert not groups["router"]
    for name, parameter in unet.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in chosen), name
    with torch.no_grad():
        for name in chosen:
            unet.get_parameter(name).add_(0.01)
    state = {name: value.clone() for name, value in personalized_state_dict(unet).items()}
    other = install(make_unet(), method)
    load_personalized_state_dict(other, state)
    given = make_conditioning()
    assert torch.equal(predict(other, given)[0], predict(unet, given)[0])


@each_baseline
def test_how_much_of_the_u_net_trains(method):
    before = {name for name, _ in make_unet().named_parameters()}
    trained = set(personalized_state_dict(install(make_unet(), method)))
    assert trained & before == (before if method.trains_unet else set())


@each_baseline
def test_taking_it_out_gives_back_the_processors(method):
    unet = remove_moa(shaken(install(make_unet(), method)))
    tokens = make_conditioning().prior_tokens
    assert torch.equal(plain(unet, tokens), plain(make_unet(), tokens))


@each_baseline
def test_gradients_are_the_same_with_activation_checkpointing(method):
    gradients = []
    for checkpointing in (False, True):
        unet = shaken(install(make_unet(), method)).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        prediction, seen = Denoiser(unet)(*Toolbox.latents(), make_conditioning())
        attention = sum(maps.square().sum() for maps in seen.subject_attention.values())
        (prediction.square().mean() + attention).backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_again_by_its_metadata(name):
    method = METHODS[name](image_dim=5)
    assert method_of({"method": name, "moa": method.to_dict()}) == method


def test_metadata_without_a_name_are_of_moa():
    assert method_of({"moa": MoAConfig(5).to_dict()}) == MoAConfig(5)


@pytest.mark.parametrize("metadata", [{"method": "lora", "moa": {}}, {"moa": {"image_dim": 5, "colour": 1}}])
def test_an_unknown_method_or_setting_is_refused(metadata):
    with pytest.raises(ValueError, match=r"the weights (are of the method 'lora'|have settings of moa)"):
        method_of(metadata)


# ------------------------------------------------------------------------------------------------------ FastComposer
def numpy_mlp(mlp, x):
    """LayerNorm, Linear, exact GELU, Linear."""
    weights = {name: value.detach().double().numpy() for name, value in mlp.named_parameters()}
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
    x = weights["first.weight"] @ x + weights["first.bias"]
    x = np.array([value * 0.5 * (1 + torch.erf(torch.tensor(value / np.sqrt(2))).item()) for value in x])
    return weights["second.weight"] @ x + weights["second.bias"]


def test_fastcomposers_fused_token_is_its_formula():
    torch.manual_seed(0)
    fuse, given = PostFuse(3, TEXT_DIM, IMAGE_DIM).double(), make_conditioning(torch.float64)
    nn.init.normal_(fuse.norm.weight)
    found = fuse(torch.tensor([3, 700]), given)
    token = given.prior_tokens[0, 5].numpy()
    y = token + numpy_mlp(fuse.first, np.concatenate([token, given.image_features[0, 1].numpy()]))
    y = y + numpy_mlp(fuse.second, y)
    y = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * fuse.norm.weight.detach().numpy()
    assert np.allclose(found[0, 0, 1].detach().numpy(), y)
    assert torch.equal(found, found[:1].expand(3, -1, -1, -1))


def test_fastcomposers_fusion_has_its_2_96_million_parameters():
    assert sum(parameter.numel() for parameter in PostFuse(16, 768, 768).parameters()) == 2_958_336


def test_fastcomposer_is_the_u_net_called_with_the_fused_prompt():
    unet, given = shaken(install(make_unet(), BASELINES[0])), make_conditioning()
    tokens = given.prior_tokens.clone()
    fused = unet.moa.tokens(torch.tensor([0, 0]), given)[0]
    tokens[0, 2], tokens[0, 5], tokens[1, 3] = fused[0, 0], fused[0, 1], fused[1, 0]
    assert torch.allclose(predict(unet, given)[0], plain(make_unet(), tokens.detach()), atol=1e-5)


def test_fastcomposer_localises_the_attention_of_its_blocks_alone():
    _, seen = predict(install(make_unet("sd2"), BASELINES[0]), make_conditioning(), record=True)
    blocks = {".".join(layer.split(".")[:2]) for layer in seen.subject_attention}
    assert blocks == {"down_blocks.1", "mid_block.attentions", "up_blocks.1"}
    assert not seen.routing


# ------------------------------------------------------------------------------------------------------- fine-tuning
def test_fine_tuning_is_moa_with_all_routing_to_untrained_experts():
    """Its only expert has the U-Net's own weights: those that MoA's personalized experts start from."""
    tuned, moa = install(make_unet(), BASELINES[1]), add_moa(make_unet(), MoAConfig(IMAGE_DIM, sinusoids=16))
    torch.manual_seed(5)
    for mine, theirs in zip(tuned.moa.tokens.parameters(), moa.moa.tokens.parameters(), strict=True):
        nn.init.normal_(mine, std=0.3)
        theirs.data.copy_(mine.data)
    for name, parameter in trainable_parameters(moa)["router"]:
        if name.endswith("layers.3.bias"):
            parameter.data.copy_(torch.tensor([-100.0, 100.0]))
    given = make_conditioning()
    one, seen = predict(tuned, given, record=True)
    two, expected = predict(moa, given, record=True)
    assert torch.allclose(one, two, atol=1e-5)
    assert seen.subject_attention.keys() == expected.subject_attention.keys()
    for layer, attention in seen.subject_attention.items():
        assert torch.allclose(attention, expected.subject_attention[layer], atol=1e-6)


def test_fine_tuning_begins_at_the_pretrained_u_net():
    given = make_conditioning()
    found = predict(install(make_unet(), BASELINES[1]), given)[0]
    assert torch.allclose(found, plain(make_unet(), given.prior_tokens), atol=1e-5)


# -------------------------------------------------------------------------------------------------------- IP-Adapter
def test_an_ip_adapter_layer_equals_diffusers_own():
    torch.manual_seed(0)
    attn = Attention(8, 6, heads=2, dim_head=4)
    ours, theirs = IPAdapterProcessor(attn, "layer", scale=0.7), IPAdapterAttnProcessor2_0(8, 6, (8,), [0.7])
    for linear, other in ((ours.key, theirs.to_k_ip[0]), (ours.value, theirs.to_v_ip[0])):
        nn.init.normal_(linear.weight)
        other.load_state_dict(linear.state_dict())
    hidden, text, image = torch.randn(1, 9, 8), torch.randn(1, 5, 6), torch.randn(1, 2, 4 * 6)
    present = torch.ones(1, 2, dtype=torch.bool)
    call = MoACall(Conditioning(text, torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), present))
    call.begin((3, 3), {"layer": image})
    expected = theirs(attn, hidden, encoder_hidden_states=(text, [image.reshape(1, 1, 8, 6)]))
    assert torch.allclose(ours(attn, hidden, text, moa=call), expected, atol=1e-5)


def test_ip_adapters_image_attention_begins_as_the_texts():
    attn = Attention(8, 6, heads=2, dim_head=4)
    processor = IPAdapterProcessor(attn, "layer", 1.0)
    assert torch.equal(processor.key.weight, attn.to_k.weight)
    assert torch.equal(processor.value.weight, attn.to_v.weight)


def test_the_noun_token_of_a_subject_is_the_one_at_its_position():
    given = make_conditioning()
    assert torch.equal(noun_tokens(given)[0, 1], given.prior_tokens[0, 5])


def test_a_copied_u_net_keeps_its_method():
    unet, given = shaken(install(make_unet(), BASELINES[2])), make_conditioning()
    assert torch.equal(predict(copy.deepcopy(unet), given)[0], predict(unet, given)[0])
