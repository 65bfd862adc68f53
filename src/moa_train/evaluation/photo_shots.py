"""The pictures of FastComposer's evaluation on photos: which there are to be, and files that are drawn once.

Pictures are files first, and what is measured is read from the files: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from moa_train import __version__
from moa_train.checkpoint import atomic_write
from moa_train.evaluation.photo_prompts import Template
from moa_train.evaluation.photo_subjects import PhotoSubject
from moa_train.inference.pictures import generate, save_png
from moa_train.inference.pipeline import MoAPipeline

Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A bar: its text and total; called with the number done."""

DELAYED = {"fastcomposer": 0.5}
"""`subject_start` that a method's own authors evaluate with; 0 for all others."""


@dataclass(frozen=True)
class PhotoProtocol:
    """What is drawn, and how.

    together: subjects in one picture, 1, or 2: every pair. seeds: of the sampler's noise, the same for everyone. steps,
    guidance, size (width, height; None: the prior's own), batch_size: of the sampler. subject_start: the fraction of
    the steps before subjects come in. without_photo: draw each prompt without its photo, too: the scale of the scores.
    """

    together: int = 1
    seeds: tuple[int, ...] = (42, 43, 44, 45)
    steps: int = 50
    guidance: float = 5.0
    subject_start: float = 0.0
    size: tuple[int, int] | None = None
    batch_size: int = 4
    without_photo: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if self.together not in (1, 2):
            raise ValueError(f"together is {self.together}; expected 1 or 2 subjects in one picture")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; expected at least one, each once")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")


def delayed(protocol: PhotoProtocol, start: float | int | str, pipe: MoAPipeline) -> PhotoProtocol:
    """The protocol with `subject_start` as given, or, of "auto", as the authors of the weights' method evaluate it.

    Raises:
        ValueError: another word, or a number outside [0, 1].
    """
    if start == "auto":
        start = DELAYED.get(pipe.unet.moa.config.name, 0.0)
    if isinstance(start, (str, bool)) or not 0 <= start <= 1:
        raise ValueError(f"subject_start is {start}; expected a fraction of the steps from 0 to 1, or auto")
    return replace(protocol, subject_start=float(start))


@dataclass(frozen=True)
class Shot:
    """One picture that is to be: whom it shows (indices of subjects; empty: drawn without a photo), and where it lies.

    group: whose scores it counts to in intervals: the subject, or the pair.
    """

    path: str
    prompt: str
    category: str
    who: tuple[int, ...]
    group: int
    seed: int


def plan_shots(
    subjects: Sequence[PhotoSubject], templates: Sequence[Template], protocol: PhotoProtocol
) -> tuple[list[Shot], dict[Shot, Shot]]:
    """All pictures with subjects, and for each the one of equal nouns, prompt and seed without a photo, if wanted.

    Raises:
        ValueError: fewer subjects than a picture shows.
    """
    if len(subjects) < protocol.together:
        raise ValueError(f"{len(subjects)} subject was given; together={protocol.together} needs two photos or more")
    shots, without = [], {}
    for group, who in enumerate(combinations(range(len(subjects)), protocol.together)):
        nouns = [subjects[place].noun for place in who]
        folders = "+".join(subjects[place].name for place in who), "+".join(nouns).replace(" ", "-")
        for number, template in enumerate(templates):
            for seed in protocol.seeds:
                name = f"{number:02d}-{template.category}_seed={seed}.png"
                shot = Shot(f"subjects/{folders[0]}/{name}", template.fill(nouns), template.category, who, group, seed)
                plain = template.fill(nouns, marked=False)
                shots.append(shot)
                without[shot] = Shot(f"without/{folders[1]}/{name}", plain, template.category, (), 0, seed)
    return shots, without if protocol.without_photo else {}


class Studio:
    """Draws shots into files, each once: a picture whose file says that it was made in the same way is not made again.

    Batches are cut from the whole plan, whatever is there already, so that a run in two parts gives the same bytes.
    """

    def __init__(
        self,
        pipe: MoAPipeline,
        subjects: Sequence[PhotoSubject],
        protocol: PhotoProtocol,
        folder: Path,
        weights: str,
    ) -> None:
        """`weights` is the hash of the personalized weights, which the pipeline does not know."""
        self.pipe, self.subjects, self.protocol, self.folder = pipe, subjects, protocol, folder
        width, height = protocol.size or (None, None)
        self.sampling: dict[str, Any] = {
            "num_inference_steps": protocol.steps,
            "guidance_scale": protocol.guidance,
            "width": width,
            "height": height,
        }
        self.facts = {
            "benchmark": "fastcomposer",
            "weights": weights,
            "method": pipe.unet.moa.config.name,
            "prior": dict(pipe.prior_identity),
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "background": pipe.subject_background,
            "sampling": self.sampling,
            "versions": {"moa_train": __version__, **{name: version(name) for name in ("torch", "diffusers")}},
        }

    def draw(self, shots: Sequence[Shot], progress: Progress) -> int:
        """Make the pictures that are missing; returns how many were made."""
        pending = [batch for batch in self._batches(shots) if not all(map(self._is_there, batch))]
        total = sum(map(len, pending))
        if not pending:
            return 0
        shown = sorted({place for batch in pending for shot in batch for place in shot.who})
        given = {place: (self.subjects[place].photo, self.subjects[place].mask) for place in shown}
        features = {place: self.pipe.subject_features([given[place]])[0] for place in shown}
        done = 0
        with progress(f"drawing {total} pictures", total) as advance:
            for batch in pending:
                self._draw(batch, features)
                done += len(batch)
                advance(done)
        return total

    def _batches(self, shots: Sequence[Shot]) -> list[list[Shot]]:
        size = self.protocol.batch_size
        kinds = ([shot for shot in shots if shot.who], [shot for shot in shots if not shot.who])
        return [kind[start : start + size] for kind in kinds for start in range(0, len(kind), size)]

    def _draw(self, batch: Sequence[Shot], features: Mapping[int, Float[Tensor, " f"]]) -> None:
        pictures = generate(
            self.pipe,
            [shot.prompt for shot in batch],
            [[features[place] for place in shot.who] for shot in batch],
            [shot.seed for shot in batch],
            len(batch),
            record_routing=False,
            subject_start=self.protocol.subject_start,
            **self.sampling,
        )
        for shot, picture in zip(batch, pictures, strict=True):
            self._save(shot, picture.image)

    def _save(self, shot: Shot, image: Image.Image) -> None:
        facts = self._facts(shot)
        atomic_write(self.folder / shot.path, lambda path: save_png(path, image, facts))

    def _facts(self, shot: Shot) -> dict[str, Any]:
        own = {"prompt": shot.prompt, "seed": shot.seed, "category": shot.category}
        if not shot.who:
            return self.facts | own
        digests = [self.subjects[place].digest for place in shot.who]
        return self.facts | own | {"subjects": digests, "subject_start": float(self.protocol.subject_start)}

    def _is_there(self, shot: Shot) -> bool:
        """Whether the file holds a whole picture made with these facts."""
        path = self.folder / shot.path
        if not path.is_file():
            return False
        try:
            with Image.open(path) as picture:
                picture.load()
                told = dict(picture.text)
        except (OSError, SyntaxError, AttributeError):
            return False
        facts = self._facts(shot).items()
        return told == {name: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for name, v in facts}


def read_shot(folder: Path, shot: Shot) -> Image.Image:
    """A picture that was drawn."""
    with Image.open(folder / shot.path) as picture:
        return picture.convert("RGB")
