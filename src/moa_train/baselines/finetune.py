"""Plain fine-tuning: the whole U-Net trains on MoA's multimodal tokens; no prior branch, so nothing is kept of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from diffusers.models.attention_processor import Attention

from moa_train.conditioning.multimodal import MultimodalTokens
from moa_train.model.attention import PriorProcessor
from moa_train.model.one_expert import MultimodalProcessor


@dataclass(frozen=True)
class FinetuneConfig:
    """image_dim: width of an image feature. sinusoids, use_timestep, use_layer: see `MultimodalTokens`."""

    name: ClassVar[str] = "finetune"
    trains_unet: ClassVar[bool] = True

    image_dim: int
    sinusoids: int = 256
    use_timestep: bool = True
    use_layer: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `FinetuneConfig(**values)` is the inverse."""
        return asdict(self)

    def tokens(self, layers: int, text_dim: int) -> MultimodalTokens:
        """m_{t,l} as MoA has it."""
        return MultimodalTokens(layers, text_dim, self.image_dim, self.sinusoids, self.use_timestep, self.use_layer)

    def processor(self, attn: Attention, layer: str) -> PriorProcessor | MultimodalProcessor:
        """Attention over C_pers; self-attention as it was."""
        return MultimodalProcessor(layer) if attn.is_cross_attention else PriorProcessor()
