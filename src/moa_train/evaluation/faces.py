"""Identity: the faces of a picture as unit vectors, by an embedder that a configuration names."""

from __future__ import annotations

from importlib import import_module
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from moa_train.conditioning.encoders import build_image_encoder
from moa_train.data.sources.grabcut import Box, find_face, find_faces


@runtime_checkable
class FaceEmbedder(Protocol):
    """What finds the faces of a picture and tells whose they are; `_target_` of the config group `embedder`.

    It is built with `device=` beside its own settings. Of another package: MOA_TRAIN_TARGETS=PACKAGE allows it.

    name: what the report calls it.
    """

    name: str

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], most: int = 1) -> Float[Tensor, "n d"]:
        """Unit vectors (on the CPU) of at most `most` faces, the largest first; n is 0 where none is found."""


class OpenClipFaces:
    """A stand-in that needs no face recognition weights: features of an open_clip image encoder, of each face's square.

    CLIP's features tell hair, age, glasses and light apart before they tell people apart: good to see whether something
    of the photo arrives, no measure of identity to compare with published ones.

    Args:
        model, pretrained: as `build_image_encoder` takes them.
        crop: "face": the square around each face that OpenCV's cascades find; "picture": the whole picture, always.
        margin: what is added on each side of a face, as a fraction of its longer side.
        device: where it computes.

    Raises:
        ValueError: an unknown crop, or nothing loadable.
    """

    def __init__(
        self, model: str, pretrained: str | None, crop: str = "face", margin: float = 0.2, device: str = "cpu"
    ) -> None:
        if crop not in ("face", "picture"):
            raise ValueError(f"embedder.crop is {crop}; expected face or picture")
        self.encoder = build_image_encoder(model, pretrained).float().to(device)
        self.crop, self.margin = crop, margin
        self.name = f"open_clip {model}{f' ({pretrained})' if pretrained else ''}, {crop}"

    @torch.no_grad()
    def __call__(self, image: UInt8[np.ndarray, "h w 3"], most: int = 1) -> Float[Tensor, "n d"]:
        """See `FaceEmbedder`."""
        side = self.encoder.image_size
        whole = Image.fromarray(image)
        if self.crop == "picture":
            crops = [ImageOps.fit(whole, (side, side), Image.Resampling.BICUBIC)]
        else:
            crops = [self._square(whole, box).resize((side, side), Image.Resampling.BICUBIC)
                     for box in _boxes(image, most)]  # fmt: skip
        if not crops:
            return torch.zeros(0, self.encoder.dim)
        pixels = rearrange(torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])), "n h w c -> n 1 c h w")
        present = torch.ones(len(crops), 1, dtype=torch.bool, device=self.encoder.device)
        features = self.encoder(pixels.to(self.encoder.device).float() / 255, present)[:, 0]
        return functional.normalize(features, dim=1).cpu()

    def _square(self, image: Image.Image, box: Box) -> Image.Image:
        """The face with its margin; what lies beyond the picture's edge is black."""
        x1, y1, x2, y2 = box
        half = max(x2 - x1, y2 - y1) * (0.5 + self.margin)
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        return image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))


def _boxes(image: UInt8[np.ndarray, "h w 3"], most: int) -> list[Box]:
    if most > 1:
        return find_faces(image)[:most]
    face = find_face(image)
    return [] if face is None else [face]


class FacenetFaces:
    """FastComposer's own measure: MTCNN finds faces, an Inception ResNet trained on VGGFace2 tells whose they are.

    Needs the package facenet-pytorch, which carries MTCNN's weights, and a file with those of the ResNet.

    Args:
        weights: `.safetensors`, or a PyTorch file that holds tensors alone.
        device: where it computes.

    Raises:
        ValueError: the package is not installed; the file is missing, holds more than tensors, or other ones.
    """

    def __init__(self, weights: str | None, device: str = "cpu") -> None:
        try:
            package: Any = import_module("facenet_pytorch")
        except ImportError as error:
            raise ValueError(
                "embedder=facenet needs the package facenet-pytorch, which is not installed: pip install --no-deps "
                "facenet-pytorch (its pin of an old torch is not needed), or take embedder=openclip"
            ) from error
        if weights is None:
            raise ValueError("embedder.weights is not given: embedder.weights=FILE, those of its InceptionResnetV1")
        self.name = "MTCNN and FaceNet (facenet-pytorch)"
        self.device = device
        # min_face_size and thresholds are the package's own, and FastComposer's; the largest face comes first.
        self.detector = package.MTCNN(image_size=160, margin=0, keep_all=True, select_largest=True, device=device)
        self.network = package.InceptionResnetV1(pretrained=None, classify=False).eval().to(device)
        state = {name: value for name, value in read_tensors(weights).items() if not name.startswith("logits.")}
        own = self.network.state_dict()
        if own.keys() != state.keys() or any(own[name].shape != value.shape for name, value in state.items()):
            raise ValueError(f"embedder.weights={weights} is not of facenet-pytorch's InceptionResnetV1")
        self.network.load_state_dict(state)

    @torch.no_grad()
    def __call__(self, image: UInt8[np.ndarray, "h w 3"], most: int = 1) -> Float[Tensor, "n d"]:
        """See `FaceEmbedder`."""
        faces = self.detector(Image.fromarray(image))
        if faces is None:
            return torch.zeros(0, 512)
        return functional.normalize(self.network(faces[:most].to(self.device)), dim=1).cpu()


def read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a file; nothing else in it is ever run."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"embedder.weights={path} cannot be read as tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"embedder.weights={path} holds more than tensors by name: give a state dict")
    return state
