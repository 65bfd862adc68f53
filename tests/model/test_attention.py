"""One MoA layer against a loop over pixels, heads and experts in numpy, and its record against explicit softmax."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from moa_train.model.attention import MoACall, MoAProcessor, subject_attention
from moa_train.model.control import Control
from moa_train.model.router import Router
from moa_train.symbols import Conditioning

DIM, TEXT, HEADS, SIZE, TOKENS = 8, 6, 2, (2, 3), 5
PIXELS = SIZE[0] * SIZE[1]


def case(cross, control=None):
    """A layer with random weights in both experts and the router, its input, and its filled call."""
    torch.manual_seed(0)
    attn = Attention(DIM, TEXT if cross else None, heads=HEADS, dim_head=DIM // HEADS).double()
    processor = MoAProcessor(attn, "layer", Router(DIM)).double()
    for parameter in processor.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    hidden, tokens = torch.randn(2, PIXELS, DIM).double(), torch.randn(2, TOKENS, TEXT).double()
    present, positions = torch.tensor([[True, True], [True, False]]), torch.tensor([[4, 1], [2, 0]])
    call = MoACall(Conditioning(tokens, torch.zeros(2, 2, 3).double(), positions, present), True, control)
    call.begin(SIZE, {"layer": torch.randn(2, 2, TEXT).double()})
    return attn, processor, hidden, tokens, call


def linear(layer, x):
    weight = layer.weight.detach().numpy()
    return weight @ x + (0 if layer.bias is None else layer.bias.detach().numpy())


def naive_expert(query, key, value, output, pixel, context):
    """One pixel's attention over `context` (list of vectors), and its probabilities by head."""
    q, width, mixed, probabilities = linear(query, pixel), DIM // HEADS, [], []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = [q[part] @ linear(key, c)[part] / math.sqrt(width) for c in context]
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed.append(sum(w * linear(value, c)[part] for w, c in zip(weights, context, strict=True)))
        probabilities.append(weights)
    return linear(output, np.concatenate(mixed)), probabilities


def naive_router(router, pixel):
    norm, first, _, last = router.layers
    x = (pixel - pixel.mean()) / math.sqrt(pixel.var() + norm.eps)
    x = x * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    x = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in linear(first, x)])
    logits = np.exp(linear(last, x))
    return logits / logits.sum()


@pytest.mark.parametrize("cross", [True, False])
def test_a_layer_equals_a_loop_over_pixels_heads_and_experts(cross):
    attn, processor, hidden, tokens, call = case(cross)
    output = processor(attn, hidden, tokens if cross else None, moa=call)
    z = hidden.numpy()
    c_prior = tokens.numpy() if cross else z
    c_pers = c_prior.copy()
    if cross:
        m = call.subject_tokens["layer"].numpy()
        c_pers[0, 4], c_pers[0, 1], c_pers[1, 2] = m[0, 0], m[0, 1], m[1, 0]
    expected, routing, attention = np.zeros_like(z), np.zeros((2, PIXELS, 2)), np.zeros((2, 2, PIXELS))
    for b in range(2):
        for n in range(PIXELS):
            prior, _ = naive_expert(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], z[b, n], c_prior[b])
            personal, weights = naive_expert(
                processor.query, processor.key, processor.value, processor.output, z[b, n], c_pers[b]
            )
            routing[b, n] = naive_router(processor.router, z[b, n])
            expected[b, n] = routing[b, n, 0] * prior + routing[b, n, 1] * personal
            if cross:
                mean = np.mean(weights, axis=0)
                attention[0, :, n] = attention[0, :, n] if b else (mean[4], mean[1])
                attention[1, 0, n] = mean[2] if b else 0
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    seen = call.observations()
    np.testing.assert_allclose(seen.routing["layer"].detach().numpy(), routing, rtol=1e-9)
    assert seen.sizes == {"layer": SIZE}
    assert list(seen.subject_attention) == (["layer"] if cross else [])
    if cross:
        np.testing.assert_allclose(seen.subject_attention["layer"].detach().numpy(), attention, rtol=1e-9)


@pytest.mark.parametrize("forced", [False, True])
def test_a_controlled_layer_equals_the_loop_with_hidden_tokens_left_out(forced):
    """Two subjects in row 0 (tokens 4 and 1), whose regions meet in the middle column; one in row 1 (token 2)."""
    left, right = torch.tensor([[1, 0.5, 0], [1, 0, 0]]), torch.tensor([[0, 0.25, 1], [0, 0, 0.5]])
    maps = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1))
    regions = [[left, right], [right, torch.zeros(1, 1)]]
    control = Control({"layer": 1.5, "other": 0.0}, list(maps) if forced else None, regions)
    attn, processor, hidden, tokens, call = case(True, control)
    output = processor(attn, hidden, tokens, moa=call)
    z, m, c_prior = hidden.numpy(), call.subject_tokens["layer"].numpy(), tokens.numpy()
    c_pers = c_prior.copy()
    c_pers[0, 4], c_pers[0, 1], c_pers[1, 2] = m[0, 0], m[0, 1], m[1, 0]
    west, east = left.flatten().numpy(), right.flatten().numpy()
    union = np.stack([np.maximum(west, east), east])
    for b in range(2):
        for n in range(PIXELS):
            hide = {4: west[n] < max(east[n], 1e-9), 1: east[n] < max(west[n], 1e-9)} if b == 0 else {2: east[n] == 0}
            context = [c for token, c in enumerate(c_pers[b]) if not hide.get(token, False)]
            prior, _ = naive_expert(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], z[b, n], c_prior[b])
            personal, _ = naive_expert(
                processor.query, processor.key, processor.value, processor.output, z[b, n], context
            )
            share = maps[b].flatten()[n].item() if forced else naive_router(processor.router, z[b, n])[1]
            share = min(1.0, 1.5 * share) * union[b, n]
            np.testing.assert_allclose(output[b, n].detach(), (1 - share) * prior + share * personal, rtol=1e-6)
            np.testing.assert_allclose(call.routing["layer"][b, n].detach(), [1 - share, share], rtol=1e-6, atol=1e-7)
            seen = call.subject_attention["layer"][b, :, n].detach()
            assert [bool(value) for value in seen] == ([not hide[4], not hide[1]] if b == 0 else [not hide[2], False])
    assert call.free_attention["layer"][0].min() > 0


def test_a_layer_of_strength_0_and_an_inactive_call_are_the_prior_bit_for_bit():
    attn, processor, hidden, tokens, call = case(True, Control({"layer": 0.0}))
    reference = processor(attn, hidden, tokens)
    assert torch.equal(processor(attn, hidden, tokens, moa=call), reference)
    attn, processor, hidden, tokens, call = case(True)
    call.active = False
    assert torch.equal(processor(attn, hidden, tokens, moa=call), reference)
    assert call.routing["layer"].tolist() == [[[1.0, 0.0]] * PIXELS] * 2


def test_subject_attention_equals_the_columns_of_the_explicit_softmax_and_so_do_its_gradients():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 10, 8, generator=generator).double().requires_grad_()
    key = torch.randn(2, 3, 77, 8, generator=generator).double().requires_grad_()
    positions = torch.tensor([[4, 70], [1, 0]])
    slots = torch.nn.functional.one_hot(positions, 77) * torch.tensor([[1, 1], [1, 0]])[..., None]
    columns = subject_attention(query, key, slots.double())
    probabilities = (query @ key.mT / math.sqrt(8)).softmax(-1).mean(1)
    expected = torch.stack([probabilities[b, :, positions[b]].T for b in range(2)])
    expected = expected * torch.tensor([[1.0, 1.0], [1.0, 0.0]]).double()[..., None]
    torch.testing.assert_close(columns, expected)
    weight = torch.randn(2, 2, 10, generator=generator).double()
    for given, wanted in zip(
        torch.autograd.grad((columns * weight).sum(), (query, key)),
        torch.autograd.grad((expected * weight).sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(given, wanted)


def test_rows_of_the_prior_are_never_seen_by_the_personalized_expert():
    attn, processor, hidden, tokens, call = case(cross=True)
    reference = processor(attn, hidden, tokens)
    whole = processor(attn, hidden, tokens, moa=call)
    conditioning = call.conditioning
    half = Conditioning(
        tokens, conditioning.image_features, conditioning.subject_positions, conditioning.subject_present, prior_rows=1
    )
    second = MoACall(half, record=True)
    second.begin(SIZE, {"layer": call.subject_tokens["layer"][1:]})
    widths = []
    processor.query.register_forward_hook(lambda module, inputs, output: widths.append(len(inputs[0])))
    output = processor(attn, hidden, tokens, moa=second)
    assert widths == [1]
    assert torch.equal(output[0], reference[0])
    torch.testing.assert_close(output[1], whole[1])
    assert second.observations().routing["layer"].shape[0] == 1


def test_an_attention_mask_is_refused():
    attn, processor, hidden, tokens, call = case(cross=True)
    with pytest.raises(ValueError, match="attention mask"):
        processor(attn, hidden, tokens, torch.zeros(2, 1, TOKENS).double(), moa=call)


@pytest.mark.parametrize(
    ("latent", "pixels", "expected"),
    [((64, 64), 64, (8, 8)), ((12, 20), 15, (3, 5)), ((9, 13), 35, (5, 7)), ((8, 8), 64, (8, 8))],
)
def test_the_size_of_a_layer_follows_from_its_pixels(latent, pixels, expected):
    call = MoACall(
        Conditioning(torch.zeros(1, 2, 3), torch.zeros(1, 1, 2), torch.zeros(1, 1).long(), torch.zeros(1, 1).bool())
    )
    call.begin(latent, {})
    assert call.size_of(pixels) == expected
    with pytest.raises(ValueError, match="no halving"):
        call.size_of(pixels + 1)
