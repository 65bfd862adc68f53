"""The fusion of picture and token against its equation, and where it starts."""

import math

import pytest
import torch
from torch.nn import functional as F

from moa_train.conditioning.multimodal import MultimodalTokens
from moa_train.symbols import Conditioning

LAYERS, TEXT, IMAGE, SINUSOIDS = 3, 6, 5, 8


@pytest.fixture
def conditioning():
    torch.manual_seed(0)
    return Conditioning(
        torch.randn(2, 7, TEXT),
        torch.randn(2, 2, IMAGE),
        torch.tensor([[4, 1], [2, 0]]),
        torch.tensor([[True, True], [True, False]]),
    )


def random_tokens(**options):
    module = MultimodalTokens(LAYERS, TEXT, IMAGE, SINUSOIDS, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_before_training_every_token_is_the_token_of_the_noun(conditioning):
    result = MultimodalTokens(LAYERS, TEXT, IMAGE, SINUSOIDS)(torch.tensor([3, 800]), conditioning)
    for layer in range(LAYERS):
        for b, s, position in ((0, 0, 4), (0, 1, 1), (1, 0, 2)):
            assert torch.equal(result[layer, b, s], conditioning.prior_tokens[b, position])


@pytest.mark.parametrize("use_timestep", [True, False])
@pytest.mark.parametrize("use_layer", [True, False])
def test_tokens_follow_the_equation_one_by_one(conditioning, use_timestep, use_layer):
    module = random_tokens(use_timestep=use_timestep, use_layer=use_layer)
    timestep = torch.tensor([3, 800])
    result = module(timestep, conditioning)
    norm, first, _, last = module.fusion
    for layer in range(LAYERS):
        for b, s, position in ((0, 0, 4), (0, 1, 1), (1, 0, 2)):
            f = conditioning.image_features[b, s]
            if use_timestep:
                rates = [math.exp(-math.log(10000) * i / (SINUSOIDS // 2)) for i in range(SINUSOIDS // 2)]
                angles = [float(timestep[b]) * rate for rate in rates]
                waves = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
                inner, _, outer = module.timestep_position
                f = f + outer(F.silu(inner(waves)))
            if use_layer:
                f = f + module.layer_position[layer]
            token = conditioning.prior_tokens[b, position]
            expected = token + last(F.gelu(first(norm(torch.cat([f, token])))))
            torch.testing.assert_close(result[layer, b, s], expected, rtol=1e-3, atol=1e-4)


def test_half_precision_weights_take_full_precision_inputs(conditioning):
    module = random_tokens()
    reference = module(torch.tensor([3, 800]), conditioning)
    half = module.bfloat16()(torch.tensor([3, 800]), conditioning)
    assert half.dtype == torch.bfloat16
    assert (half - reference).std() < 0.05 * reference.std()
