"""Puts MoA into a pretrained diffusers U-Net and takes it out again: experts, routers, multimodal tokens, freezing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from moa_train.conditioning.multimodal import MultimodalTokens
from moa_train.model.attention import MoACall, MoAProcessor, PriorProcessor
from moa_train.model.one_expert import MultimodalProcessor
from moa_train.model.router import Router, RouterKind

_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
_UNSUPPORTED = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")


@runtime_checkable
class Method(Protocol):
    """A way to personalise a U-Net, as `install` needs it: MoA itself, or a baseline (`moa_train.baselines`).

    name: in the metadata of an export. trains_unet: whether the U-Net's own weights train, too.
    """

    name: ClassVar[str]
    trains_unet: ClassVar[bool]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which the same method can be made."""

    def tokens(self, layers: int, text_dim: int) -> nn.Module:
        """(timestep, Conditioning) -> what each of `layers` cross-attention layers takes for each subject: l b s ..."""

    def processor(self, attn: Attention, layer: str) -> Any:
        """The attention processor of a layer; it takes a `MoACall` as `moa` and says so by `takes_moa`."""


@dataclass(frozen=True)
class MoAConfig:
    """Everything that shapes the trained weights; kept in the metadata of an export.

    image_dim: width of an image feature. router_kind, initial_prior, hard_routing: see `Router`. sinusoids,
    use_timestep, use_layer: see `MultimodalTokens`.
    self_attention: False leaves self-attention to the prior alone. cross_attention: False leaves cross-attention to the
    prior's weights, which read the multimodal prompt; no router keeps its subjects in their place.
    exclude: layers (names, or what they begin with) that stay the prior's in every respect.
    """

    name: ClassVar[str] = "moa"
    trains_unet: ClassVar[bool] = False

    image_dim: int
    router_kind: RouterKind = "mlp"
    initial_prior: float = 0.5
    hard_routing: bool = False
    self_attention: bool = True
    cross_attention: bool = True
    sinusoids: int = 256
    use_timestep: bool = True
    use_layer: bool = True
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not (self.self_attention or self.cross_attention):
            raise ValueError("self_attention and cross_attention are both false: no layer is left to personalize")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; `MoAConfig(**values)` is the inverse."""
        return asdict(self)

    def tokens(self, layers: int, text_dim: int) -> MultimodalTokens:
        """m_{t,l} for each cross-attention layer."""
        return MultimodalTokens(layers, text_dim, self.image_dim, self.sinusoids, self.use_timestep, self.use_layer)

    def processor(self, attn: Attention, layer: str) -> MoAProcessor | MultimodalProcessor | PriorProcessor:
        """Two experts and a router; or the prior alone, without or with the photo in its prompt."""
        if any(_begins(layer, name) for name in self.exclude):
            return PriorProcessor()
        if not attn.is_cross_attention and not self.self_attention:
            return PriorProcessor()
        if attn.is_cross_attention and not self.cross_attention:
            return MultimodalProcessor(layer)
        router = Router(attn.query_dim, self.router_kind, self.initial_prior, self.hard_routing)
        return MoAProcessor(attn, layer, router.to(attn.to_q.weight))


class InstalledMoA(nn.Module):
    """`unet.moa`: the multimodal tokens, the config, and what `remove_moa` needs to restore the U-Net."""

    def __init__(self, config: Method, tokens: nn.Module, cross_layers: list[str]) -> None:
        super().__init__()
        self.config, self.tokens, self.cross_layers = config, tokens, cross_layers
        self.replaced: dict[str, Any] = {}
        self.were_trainable: list[str] = []
        self.hook: torch.utils.hooks.RemovableHandle | None = None


def attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """Names of the attention layers in order of execution: down, middle, up."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return sorted(names, key=lambda name: _ORDER[name.split(".")[0]])


def add_moa(unet: UNet2DConditionModel, config: MoAConfig | int) -> UNet2DConditionModel:
    """Give every attention layer a personalized expert and a router, and freeze everything that was there before.

    Args:
        unet: a U-Net of Stable Diffusion 1.x or 2.x, changed in place.
        config: a config, or just the width of an image feature.

    Raises:
        ValueError: MoA is there already, or an attention layer is not a plain one.
    """
    return install(unet, MoAConfig(image_dim=config) if isinstance(config, int) else config)


def install(unet: UNet2DConditionModel, method: Method) -> UNet2DConditionModel:
    """Put a method's processors and tokens into a U-Net, in place; what the method does not train is frozen.

    Raises:
        ValueError: a method is there already, or an attention layer is not a plain one.
    """
    if hasattr(unet, "moa"):
        raise ValueError("this U-Net has MoA already: call remove_moa first")
    layers = attention_layers(unet)
    for layer in layers:
        _check_attention(layer, unet.get_submodule(layer))
    cross = [layer for layer in layers if unet.get_submodule(layer).is_cross_attention]
    if isinstance(method, MoAConfig):
        _check_excluded(method.exclude, layers, cross)
    tokens = method.tokens(len(cross), unet.get_submodule(cross[0]).cross_attention_dim)
    moa = InstalledMoA(method, tokens.to(unet.device, unet.dtype), cross)
    moa.were_trainable = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    unet.requires_grad_(method.trains_unet)
    for layer in layers:
        attn = unet.get_submodule(layer)
        moa.replaced[layer] = attn.processor
        attn.set_processor(method.processor(attn, layer))
    unet.moa = moa
    moa.hook = unet.register_forward_pre_hook(_begin_call, with_kwargs=True)
    return unet


def remove_moa(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Make the U-Net what it was before `install`, in place; weights that a baseline trained stay changed."""
    moa = _installed(unet)
    for layer, processor in moa.replaced.items():
        unet.get_submodule(layer).set_processor(processor)
    assert moa.hook is not None
    moa.hook.remove()
    del unet.moa
    for name in moa.were_trainable:
        unet.get_parameter(name).requires_grad_(True)
    return unet


def trainable_parameters(unet: UNet2DConditionModel) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The named parameters that the method trains, in groups: "experts", "router", "fusion"."""
    whole = _installed(unet).config.trains_unet
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"experts": [], "router": [], "fusion": []}
    for name, parameter in unet.named_parameters():
        if name.startswith("moa."):
            groups["fusion"].append((name, parameter))
        elif ".processor.router." in name:
            groups["router"].append((name, parameter))
        elif ".processor." in name or whole:
            groups["experts"].append((name, parameter))
    return groups


def personalized_state_dict(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """All that the method trains, by its name in the U-Net; of MoA never a prior weight."""
    groups = trainable_parameters(unet)
    return {name: parameter.detach() for group in groups.values() for name, parameter in group}


def load_personalized_state_dict(unet: UNet2DConditionModel, state: Mapping[str, Tensor]) -> None:
    """Fill experts, routers and fusion from `state`, cast to their dtype.

    Raises:
        ValueError: names or shapes that are not exactly those of this U-Net.
    """
    own = personalized_state_dict(unet)
    for problem, names in (("lack", own.keys() - state.keys()), ("have unknown", state.keys() - own.keys())):
        if names:
            raise ValueError(f"the weights {problem} {len(names)} tensors, such as {min(names)}: other architecture")
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            expected, given = tuple(parameter.shape), tuple(state[name].shape)
            raise ValueError(f"{name} has shape {given}, this U-Net expects {expected}: other architecture or config")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def cast_prior(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """Store the frozen weights in `dtype` and leave the trained ones as they are."""
    trained = personalized_state_dict(unet).keys()
    for name, parameter in unet.named_parameters():
        if name not in trained:
            parameter.data = parameter.data.to(dtype)
    return unet


def compile_blocks(unet: UNet2DConditionModel, **options: Any) -> UNet2DConditionModel:
    """Compile each transformer block by itself (`compile_repeated_blocks`), with room for a variant of each.

    Layers record by name, so each is a variant of one code; torch would silently leave all beyond the eighth eager.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * len(attention_layers(unet)))
    unet.compile_repeated_blocks(**options)
    return unet


def _installed(unet: UNet2DConditionModel) -> InstalledMoA:
    if not hasattr(unet, "moa"):
        raise ValueError("this U-Net has no MoA: call add_moa first")
    return unet.moa


def _check_excluded(exclude: Sequence[str], layers: list[str], cross: list[str]) -> None:
    for name in exclude:
        if not any(_begins(layer, name) for layer in layers):
            raise ValueError(f"exclude names {name!r}, which no attention layer begins with; they are {layers}")
    if all(any(_begins(layer, name) for name in exclude) for layer in cross):
        raise ValueError(f"exclude={list(exclude)} leaves out every cross-attention layer: no photo would enter")


def _begins(layer: str, name: str) -> bool:
    """Whether `name` is the layer's, or that of a module around it."""
    return f"{layer}.".startswith(f"{name}.")


def _check_attention(layer: str, attn: Attention) -> None:
    """Refuse attention layers whose arithmetic is not that of Stable Diffusion's U-Net."""
    found = [name for name in _UNSUPPORTED if getattr(attn, name, None)]
    found += ["residual_connection"] if attn.residual_connection else []
    found += ["rescale_output_factor"] if attn.rescale_output_factor != 1 else []
    if found:
        raise ValueError(
            f"{layer} has {', '.join(found)}: MoA serves the attention of Stable Diffusion 1.x and 2.x only"
        )
    if type(attn.processor) is not AttnProcessor2_0:
        raise ValueError(
            f"{layer} has a {type(attn.processor).__name__}: call unet.set_attn_processor(AttnProcessor2_0()) first"
        )
    if not all(isinstance(linear, nn.Linear) for linear in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])):
        raise ValueError(f"{layer} has wrapped weights: load LoRA after add_moa, not before")


def _begin_call(unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: only here are the timestep and the size known, of which the multimodal tokens are made."""
    call = (kwargs.get("cross_attention_kwargs") or {}).get("moa")
    if call is None:
        return
    sample = kwargs["sample"] if "sample" in kwargs else args[0]
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    conditioning, skip = call.conditioning, call.conditioning.prior_rows
    _check_call(unet, call, len(sample))
    timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
    moa = unet.moa
    by_layer = {}
    if skip < len(sample):
        tokens = _beside(moa.tokens, sample)(timestep[skip:], conditioning.personalized())
        by_layer = dict(zip(moa.cross_layers, tokens, strict=True))
    call.begin((sample.shape[-2], sample.shape[-1]), by_layer)


def _beside(tokens: nn.Module, sample: Tensor) -> nn.Module:
    """The tokens' weights on the device of the sample.

    Model offloading moves a U-Net in its forward, which runs behind this hook, and takes these weights back with the
    rest. Weights on meta are those that sequential offloading fetches by itself.
    """
    device = next(tokens.parameters()).device
    return tokens if device in (sample.device, torch.device("meta")) else tokens.to(sample.device)


def _check_call(unet: UNet2DConditionModel, call: MoACall, rows: int) -> None:
    if len(call.conditioning.prior_tokens) != rows:
        raise ValueError(f"the conditioning has {len(call.conditioning.prior_tokens)} rows, the latents have {rows}")
    for layer in unet.moa.replaced:
        processor = unet.get_submodule(layer).processor
        if not getattr(processor, "takes_moa", False):
            raise ValueError(
                f"{layer} lost its MoA expert to {type(processor).__name__}: do not fuse projections, slice attention, "
                "enable xformers or load an IP-Adapter after add_moa"
            )
