"""(z_t, t, Conditioning) -> (prediction, Observations): the MoA U-Net as training and inference both call it."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from jaxtyping import Float, Num
from torch import Tensor, nn

from moa_train.model.attention import MoACall
from moa_train.symbols import Conditioning, Observations


class Denoiser(nn.Module):
    """A U-Net with MoA (`add_moa`), called with a conditioning."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        noisy: Float[Tensor, "b c h w"],
        timesteps: Num[Tensor, " b"],
        conditioning: Conditioning,
        record: bool = True,
    ) -> tuple[Float[Tensor, "b c h w"], Observations]:
        """The U-Net's prediction, and what its attention layers showed where `record` is set."""
        call = MoACall(conditioning, record)
        prediction = self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=conditioning.prior_tokens,
            cross_attention_kwargs={"moa": call},
            return_dict=False,
        )[0]
        return prediction, call.observations()
