"""Captions and masks by pretrained models: any image-text-to-text and image-segmentation model of `transformers`."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image


@dataclass(frozen=True)
class Captioner:
    """One sentence about a picture.

    Args:
        model: id or folder of an image-text-to-text model: BLIP, BLIP-2, GIT, or one that chats, as LLaVA.
        prompt: of a model that chats, what it is asked; of another, how its captions begin.
        max_tokens: most tokens of a caption.
        device: cpu, cuda, ...; auto: the first GPU if there is one.
    """

    model: str
    prompt: str = ""
    max_tokens: int = 40
    device: str = "auto"

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> str:
        """The caption on one line, without a closing period."""
        picture = Image.fromarray(image)
        limit = {"generate_kwargs": {"max_new_tokens": self.max_tokens, "do_sample": False}}
        if getattr(self._pipeline.processor, "chat_template", None):
            asked = [
                {"type": "image", "image": picture},
                {"type": "text", "text": self.prompt or "Describe the picture."},
            ]
            chat = [{"role": "user", "content": asked}]
            told = self._pipeline(text=chat, return_full_text=False, **limit)
        else:
            told = self._pipeline(images=picture, text=self.prompt, **limit)
        return " ".join(told[0]["generated_text"].split()).rstrip(" .")

    @cached_property
    def _pipeline(self) -> Any:
        return _load("image-text-to-text", "captioner", self.model, self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pipeline"}


@dataclass(frozen=True)
class Segmenter:
    """The masks of the subjects in a picture.

    A panoptic or instance model tells one subject from the next; a semantic one gives one mask for all of a label.

    Args:
        model: id or folder of an image-segmentation model.
        labels: the model's names of what is a subject.
        threshold: least score of a mask, where the model scores them.
        device: cpu, cuda, ...; auto: the first GPU if there is one.
    """

    model: str
    labels: Sequence[str] = field(default=("person",))
    threshold: float = 0.9
    device: str = "auto"

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> list[Bool[np.ndarray, "h w"]]:
        """Raises `ValueError` if the model knows none of the labels."""
        wanted = {label.lower() for label in self.labels}
        known = sorted(str(label) for label in self._pipeline.model.config.id2label.values())
        if not wanted & {label.lower() for label in known}:
            raise ValueError(
                f"segmenter {self.model} knows none of {', '.join(self.labels)}: give segmenter_labels=[...] of "
                f"{', '.join(known[:20])}{' ...' if known[20:] else ''}"
            )
        found = self._pipeline(Image.fromarray(image), threshold=self.threshold)
        masks = [np.asarray(one["mask"]) > 127 for one in found if one["label"].lower() in wanted]
        return [mask for mask in masks if mask.any()]

    @cached_property
    def _pipeline(self) -> Any:
        return _load("image-segmentation", "segmenter", self.model, self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pipeline"}


def _load(task: str, role: str, model: str, device: str) -> Any:
    import torch
    from transformers import pipeline

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # each worker has a core
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return pipeline(task, model=model, device=device)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{role} {model} cannot be loaded as {task} ({reason}): give the id or the folder of such a model"
        ) from error
