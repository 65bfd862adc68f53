"""The toy world's measuring instruments: who is in a picture, where the person stands, and which place it shows.

Used for measuring only: no output of these networks ever conditions a generation.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

SIZE = 64
"""Pictures and crops are looked at in this size, in pixels."""
_MARGIN = 1.1


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_convolution(inputs, outputs, stride), *_convolution(outputs, outputs, 1))


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()


def _pyramid(width: int, first_stride: int) -> list[nn.Sequential]:
    """Four blocks of growing width, each but perhaps the first at half the resolution of the one before."""
    return [
        _block(3, width, first_stride),
        _block(width, 2 * width, 2),
        _block(2 * width, 3 * width, 2),
        _block(3 * width, 4 * width, 2),
    ]


class IdentityNet(nn.Module):
    """Crop of a person to the identity vector."""

    def __init__(self, identity_dim: int, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(*_pyramid(width, 2))
        self.head = nn.Linear(4 * width * 16, identity_dim)

    def forward(self, crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b i"]:
        """The identity vector of each crop with values in [0, 1]."""
        return self.head(self.features(2.0 * crops - 1.0).flatten(1))


class SceneNet(nn.Module):
    """Picture to context logits and to the logit that a pixel belongs to a person: a small U-Net."""

    def __init__(self, contexts: int, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList(_pyramid(width, 1))
        self.up = nn.ModuleList(
            [_block(7 * width, 3 * width, 1), _block(5 * width, 2 * width, 1), _block(3 * width, width, 1)]
        )
        self.person = nn.Conv2d(width, 1, 1)
        self.context = nn.Linear(4 * width, contexts)

    def encode(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Features at each resolution, the finest first, of pictures with values in [0, 1]."""
        hidden, levels = 2.0 * pictures - 1.0, []
        for block in self.down:
            hidden = block(hidden)
            levels.append(hidden)
        return levels

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b h w"]]:
        """Context logits and person logits of pictures with values in [0, 1]."""
        skips = self.encode(pictures)
        hidden = skips.pop()
        context = self.context(hidden.mean(dim=(2, 3)))
        for block in self.up:
            hidden = torch.cat([functional.interpolate(hidden, scale_factor=2.0), skips.pop()], dim=1)
            hidden = block(hidden)
        return context, self.person(hidden)[:, 0]


class Probe(nn.Module):
    """Both networks with the names that measuring code uses."""

    def __init__(self, identity_dim: int, contexts: tuple[str, ...]) -> None:
        super().__init__()
        self.identity_net = IdentityNet(identity_dim)
        self.scene_net = SceneNet(len(contexts))
        self.contexts = contexts

    @torch.no_grad()
    def identity(self, crops: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b i"]:
        """Identity vector of each person crop (`crop_people`), values in [0, 1]."""
        return self.identity_net(crops)

    @torch.no_grad()
    def context(self, pictures: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b c"]:
        """Context logits, in the order of `contexts`."""
        return self.scene_net.context(self.scene_net.encode(pictures)[-1].mean(dim=(2, 3)))

    @torch.no_grad()
    def person(self, pictures: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b 64 64"]:
        """Probability that a pixel belongs to a person."""
        return self.scene_net(pictures)[1].sigmoid()

    @torch.no_grad()
    def scene_features(self, pictures: Float[Tensor, "b 3 64 64"]) -> list[Float[Tensor, "b _ _ _"]]:
        """What the network of places sees at 64, 32, 16 and 8 pixels; the mean of the last tells the context."""
        return self.scene_net.encode(pictures)


def crop_people(pictures: Float[Tensor, "b 3 h w"], masks: Bool[Tensor, "b h w"]) -> Float[Tensor, "b 3 64 64"]:
    """The square around each mask with a margin of a tenth, background kept, resized; an empty mask takes the whole."""
    return torch.cat([_crop(picture, mask) for picture, mask in zip(pictures, masks, strict=True)])


def _crop(picture: Float[Tensor, "3 h w"], mask: Bool[Tensor, "h w"]) -> Float[Tensor, "1 3 64 64"]:
    height, width = mask.shape
    rows, columns = mask.any(dim=1).nonzero().flatten().tolist(), mask.any(dim=0).nonzero().flatten().tolist()
    top, bottom, left, right = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if rows else (0, height, 0, width)
    half = _MARGIN * max(bottom - top, right - left) / 2.0
    y, x = (top + bottom) / 2.0, (left + right) / 2.0
    lines = (torch.arange(SIZE) + 0.5) / SIZE * 2.0 * half - half
    grid_y, grid_x = torch.meshgrid((y + lines) / height * 2.0 - 1.0, (x + lines) / width * 2.0 - 1.0, indexing="ij")
    grid = torch.stack([grid_x, grid_y], dim=-1)[None].to(picture)
    return functional.grid_sample(picture[None], grid, padding_mode="border", align_corners=False)


def save_probe(probe: Probe, folder: Path) -> None:
    """Write the probe's weights in float16 and its description."""
    folder.mkdir(parents=True, exist_ok=True)
    identity_dim = probe.identity_net.head.out_features
    description = {"identity_dim": identity_dim, "contexts": list(probe.contexts)}
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in probe.state_dict().items()}
    save_file(state, folder / "probe.safetensors")


def load_probe(folder: Path) -> Probe:
    """Read a folder that `save_probe` wrote; float32, frozen, in evaluation mode.

    Raises:
        ValueError: there is no probe in the folder.
    """
    if not (folder / "probe.safetensors").is_file():
        raise ValueError(f"no probe in {folder}: expected probe.safetensors there, as moa-pretrain writes it")
    description = json.loads((folder / "config.json").read_text())
    probe = Probe(description["identity_dim"], tuple(description["contexts"]))
    probe.load_state_dict({name: value.float() for name, value in load_file(folder / "probe.safetensors").items()})
    return probe.requires_grad_(False).eval()
