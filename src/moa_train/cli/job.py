"""One call of `moa-generate`: its settings as Python objects, the pipeline, and the files with their facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from moa_train import __version__
from moa_train.checkpoint import atomic_write
from moa_train.inference.controls import Controls
from moa_train.inference.device import device_and_dtype
from moa_train.inference.lora import load_lora
from moa_train.inference.pictures import file_hash, save_gif, save_png
from moa_train.inference.pipeline import MoAControlNetPipeline, MoAPipeline
from moa_train.inference.subjects import Views, read_picture
from moa_train.inference.weights import weights_path
from moa_train.prior.controlnet import control_map, load_controlnet
from moa_train.prior.load import weights_fingerprint

_SETTINGS = ("task", "prompt", "negative_prompt", "seeds", "steps", "guidance", "size", "batch_size", "frames")
_CONTROLS = ("subject_strength", "routing_override", "subject_start", "regions", "separate_subjects")


class Job:
    """What a task needs: `subjects`, `seeds`, `pipe`, `sampling`; and `save`, `save_gif`, `report` for its results.

    settings: of configs/generate.yaml, as plain Python.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        """Check what can be checked without the network.

        Raises:
            ValueError: a setting outside its domain, or a file that does not exist.
        """
        self.settings = settings
        self.out = Path(settings["out"])
        self.prompt: str = settings["prompt"]
        self.seeds: list[int] = settings["seeds"]
        self.width, self.height = _size(settings["size"])
        if not self.seeds:
            raise ValueError("seeds is empty: give at least one, seeds=[0]")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}: each once, for equal seeds give equal pictures")
        if (settings["controlnet"] is None) != (settings["control_image"] is None):
            raise ValueError("controlnet and control_image go together: give both, controlnet=toy control_image=a.png")
        if settings["controlnet"] is not None and settings["task"] == "invert":
            raise ValueError("task=invert takes no controlnet: the real picture leads the drawing already")
        if settings["regions"] is not None and settings["task"] == "compose":
            raise ValueError("task=compose takes no regions, for its number of subjects changes: leave regions out")
        self.subjects = _subjects(settings["subjects"], settings["masks"])
        Controls(start=settings["subject_start"])
        self.facts = self._facts()

    @cached_property
    def pipe(self) -> MoAPipeline | MoAControlNetPipeline:
        """Prior, personalized weights, LoRA and ControlNet, on their device; the facts get their hashes."""
        settings = self.settings
        device, dtype = device_and_dtype(settings["device"], settings["dtype"])
        where, weights, controlnet = settings["prior"]["source"], settings["weights"], settings["controlnet"]
        pipe: MoAPipeline | MoAControlNetPipeline
        if controlnet is None:
            pipe = MoAPipeline.from_pretrained(where, weights, torch_dtype=dtype)
        else:
            net = load_controlnet(controlnet)
            self.facts["controlnet"] = {"name": controlnet, "weights": weights_fingerprint(net)}
            pipe = MoAControlNetPipeline.from_pretrained(where, weights, torch_dtype=dtype, controlnet=net)
        if settings["lora"] is not None:
            load_lora(pipe, settings["lora"], settings["lora_scale"])
        self.facts["prior"] = dict(pipe.prior_identity)
        pipe.set_progress_bar_config(disable=not settings["progress"])
        return pipe.to(device)

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of the pipeline's call that every task gives it."""
        return {
            "num_inference_steps": self.settings["steps"],
            "guidance_scale": self.settings["guidance"],
            "negative_prompt": self.settings["negative_prompt"],
            "width": self.width,
            "height": self.height,
            **self._control(),
            **self.asked,
        }

    @cached_property
    def control(self) -> Image.Image:
        """What the ControlNet sees, of the pictures' size."""
        own = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        picture = read_picture(self.settings["control_image"], "control_image")
        return control_map(picture, (self.width or own, self.height or own), self.settings["control_kind"])

    def _control(self) -> dict[str, Any]:
        if self.settings["controlnet"] is None:
            return {}
        return {"image": self.control, "controlnet_conditioning_scale": float(self.settings["control_scale"])}

    @property
    def asked(self) -> dict[str, Any]:
        """Control at sampling; what is not asked for is left out."""
        given = {name: self.settings[name] for name in _CONTROLS}
        return {name: value for name, value in given.items() if value is not None and value is not False}

    def save(self, name: str, image: Image.Image, **more: Any) -> None:
        """Write a PNG with the facts in it; `more` are its own, such as its seed."""
        save_png(self.out / name, image, {**self.facts, **more})

    def save_gif(self, name: str, frames: Sequence[Image.Image]) -> None:
        """Write a GIF with the facts as its comment."""
        save_gif(self.out / name, frames, self.facts)

    def report(self, measured: dict[str, Any]) -> None:
        """Write what the task measured, as TASK.json."""
        self._write_json(f"{self.settings['task']}.json", measured)

    def write_facts(self) -> None:
        """Write what made the pictures, as facts.json, and what the ControlNet saw, as control.png."""
        if self.settings["controlnet"] is not None:
            self.save("control.png", self.control)
        self._write_json("facts.json", self.facts)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write(self.out / name, lambda path: path.write_text(text, encoding="utf-8"))

    def _facts(self) -> dict[str, Any]:
        """The settings that decide the picture, with each file by the SHA-256 of its bytes."""
        settings = self.settings
        weights, lora = settings["weights"], settings["lora"]
        facts = {name: settings[name] for name in _SETTINGS}
        facts["prior"] = settings["prior"]["source"]
        facts["weights"] = None if weights is None else _hash("weights", weights_path(weights))
        facts["subjects"] = [_hashes("subject", entry) for entry in settings["subjects"]]
        facts["masks"] = [_hashes("mask", entry) for entry in settings["masks"]]
        if settings["controlnet"] is not None:
            facts |= {name: settings[name] for name in ("controlnet", "control_scale", "control_kind")}
        facts |= {name: _with_hashes(name, value) for name, value in self.asked.items()}
        for name in ("input", "input_mask", "lora", "control_image"):
            facts[name] = None if settings[name] is None else _hash(name, Path(settings[name]))
        facts["lora_scale"] = None if lora is None else settings["lora_scale"]
        facts["versions"] = {"moa_train": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
        return {name: value for name, value in facts.items() if value not in (None, [])} | {"weights": facts["weights"]}


def _size(size: list[int] | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    if len(size) != 2:
        raise ValueError(f"size is {size}; expected width and height in pixels, size=[512,512], or null")
    return size[0], size[1]


def _subjects(photos: list[Any], masks: list[Any]) -> list[Any]:
    """Each subject as the pipeline takes it: a path, a pair (path, mask), or `Views` of several."""
    if masks and len(masks) != len(photos):
        raise ValueError(f"{len(masks)} masks were given for {len(photos)} subjects: give one mask a photo, or none")
    return [_subject(photo, mask) for photo, mask in zip(photos, masks or [None] * len(photos), strict=True)]


def _subject(photo: Any, mask: Any) -> Any:
    if isinstance(photo, list):
        return Views(_subjects(photo, mask or []))
    return photo if mask is None else (photo, mask)


def _hashes(what: str, entry: Any) -> Any:
    return [_hashes(what, each) for each in entry] if isinstance(entry, list) else _hash(what, Path(entry))


def _with_hashes(what: str, value: Any) -> Any:
    """A setting with the hash of each file in the place of its path."""
    if isinstance(value, list):
        return [_with_hashes(what, each) for each in value]
    return _hash(what, Path(value)) if isinstance(value, str) else value


def _hash(what: str, path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{what}: {path} is not a file")
    return file_hash(path)
