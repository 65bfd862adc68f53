"""Tiny U-Nets of the two Stable Diffusion families, and conditionings for them."""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from moa_train.model.unet import MoAConfig, add_moa, trainable_parameters
from moa_train.symbols import Conditioning

TOKENS, TEXT_DIM, IMAGE_DIM = 7, 32, 12
FAMILIES = {
    "sd1": {"attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
    "sd2": {
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    },
}
UP = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}


def make_unet(family="sd1", **changes):
    """A pretrained U-Net's stand-in, in evaluation mode."""
    torch.manual_seed(0)
    options = FAMILIES[family] | changes
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        up_block_types=tuple(UP[name] for name in reversed(options["down_block_types"])),
        layers_per_block=1,
        cross_attention_dim=TEXT_DIM,
        norm_num_groups=8,
        **options,
    ).eval()


def make_conditioning(dtype=torch.float32, **changes):
    """Two prompts: one with two subjects, one with one subject and a padded slot."""
    generator = torch.Generator().manual_seed(1)
    present = torch.tensor([[True, True], [True, False]])
    features = torch.randn(2, 2, IMAGE_DIM, generator=generator).to(dtype)
    values = {
        "prior_tokens": torch.randn(2, TOKENS, TEXT_DIM, generator=generator).to(dtype),
        "image_features": features * present[..., None],
        "subject_positions": torch.tensor([[2, 5], [3, 0]]),
        "subject_present": present,
    }
    return Conditioning(**(values | changes))


def randomize(unet, scale=0.3):
    """Give everything that MoA trains random values, as if trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for group in trainable_parameters(unet).values():
            for _, parameter in group:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return unet


@dataclass
class Toolbox:
    """What the tests of the model build their cases from."""

    make_unet = staticmethod(make_unet)
    make_conditioning = staticmethod(make_conditioning)
    randomize = staticmethod(randomize)
    config = MoAConfig(image_dim=IMAGE_DIM, sinusoids=16)

    def trained(self, family="sd1", dtype=torch.float32, **changes):
        """A U-Net with MoA and random trained weights."""
        return randomize(add_moa(make_unet(family).to(dtype), MoAConfig(**(self.config.to_dict() | changes))))

    @staticmethod
    def latents(dtype=torch.float32, size=(8, 8)):
        """z_t of two samples, and their timesteps."""
        return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(3)).to(dtype), torch.tensor([3, 700])
