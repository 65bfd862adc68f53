"""The denoiser is the U-Net's own call with the conditioning in it."""

import torch
from diffusers import UNet2DConditionModel

from moa_train.denoiser import Denoiser
from moa_train.model.attention import MoACall
from moa_train.model.unet import add_moa, trainable_parameters
from moa_train.symbols import Conditioning


def test_the_denoiser_equals_the_call_that_a_pipeline_makes():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    add_moa(unet, 6)
    for group in trainable_parameters(unet).values():
        for _, parameter in group:
            torch.nn.init.normal_(parameter, std=0.3)
    conditioning = Conditioning(
        torch.randn(2, 5, 8), torch.randn(2, 1, 6), torch.tensor([[2], [3]]), torch.tensor([[True], [True]])
    )
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    prediction, seen = Denoiser(unet)(z, t, conditioning)
    call = MoACall(conditioning, record=True)
    expected = unet(z, t, conditioning.prior_tokens, cross_attention_kwargs={"moa": call}).sample
    assert torch.equal(prediction, expected)
    for layer, routing in call.observations().routing.items():
        assert torch.equal(seen.routing[layer], routing)
    again = unet(z, t, conditioning.prior_tokens, cross_attention_kwargs={"moa": call}).sample
    assert torch.equal(again, expected)
