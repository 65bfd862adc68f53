"""FastComposer's evaluation on photos: subjects by prompts by seeds, prompt consistency (CLIP) and identity (faces)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moa_train.evaluation.clip_score import ClipScore
from moa_train.evaluation.faces import FaceEmbedder
from moa_train.evaluation.photo_prompts import Template
from moa_train.evaluation.photo_shots import PhotoProtocol, Progress, Shot, Studio, plan_shots, read_shot
from moa_train.evaluation.photo_subjects import PhotoSubject
from moa_train.evaluation.summary import counted
from moa_train.inference.pipeline import MoAPipeline
from moa_train.prompts import parse_prompt


def identity(found: Float[Tensor, "n d"], references: Float[Tensor, "s d"]) -> float:
    """How well the faces of a picture are those of its subjects, as FastComposer counts it: at least 0.

    Face and subject that fit best are a pair, then the best of the rest; the lowest of their cosines counts, and 0
    where there are fewer faces than subjects.
    """
    cosines = (found.double() @ references.double().T).numpy().copy()
    lowest = 1.0
    for _ in range(len(references)):
        if not cosines.size:
            return 0.0
        face, subject = np.unravel_index(np.argmax(cosines), cosines.shape)
        lowest = min(lowest, float(cosines[face, subject]))
        cosines = np.delete(np.delete(cosines, face, axis=0), subject, axis=1)
    return max(lowest, 0.0)


def reference_faces(subjects: Sequence[PhotoSubject], embedder: FaceEmbedder) -> Float[Tensor, "s d"]:
    """The face of each subject's photo.

    Raises:
        ValueError: no face is found in one of them; names it.
    """
    vectors = []
    for subject in subjects:
        found = embedder(subject.photo)
        if not len(found):
            raise ValueError(
                f"{embedder.name} finds no face in the photo of {subject.name}, so nothing can be compared with it: "
                "give another photo or embedder"
            )
        vectors.append(found[0])
    return torch.stack(vectors)


@dataclass(frozen=True)
class Scores:
    """What was measured in pictures: prompt consistency, all faces (each n x d), and whether as many as subjects."""

    prompt: Float[Tensor, " b"]
    faces: list[Tensor]

    def found(self, wanted: int) -> Float[Tensor, " b"]:
        """1 where at least `wanted` faces were found."""
        return torch.tensor([float(len(faces) >= wanted) for faces in self.faces])


def look(
    shots: Sequence[Shot], folder: Path, clip: ClipScore, embedder: FaceEmbedder, together: int, progress: Progress
) -> Scores:
    """Read the pictures of the shots and score them, 16 at a time."""
    prompts, faces = [], []
    with progress(f"measuring {len(shots)} pictures", len(shots)) as advance:
        for start in range(0, len(shots), 16):
            rows = shots[start : start + 16]
            images = [read_shot(folder, shot) for shot in rows]
            prompts.append(clip(images, [parse_prompt(shot.prompt).text for shot in rows]))
            faces += [embedder(np.asarray(image), together) for image in images]
            advance(start + len(rows))
    return Scores(torch.cat(prompts), faces)


def run_photos(
    pipe: MoAPipeline,
    subjects: Sequence[PhotoSubject],
    templates: Sequence[Template],
    protocol: PhotoProtocol,
    clip: ClipScore,
    embedder: FaceEmbedder,
    folder: Path,
    weights: str,
    progress: Progress,
) -> dict[str, Any]:
    """Draw what is missing in `folder`, measure everything, and give the numbers.

    Raises:
        ValueError: too few subjects, or a photo without a face; before anything is drawn.
    """
    begin = time.perf_counter()
    shots, without = plan_shots(subjects, templates, protocol)
    references = reference_faces(subjects, embedder)
    plain = list(dict.fromkeys(without.values()))
    row_of = {shot: row for row, shot in enumerate(plain, len(shots))}
    made = Studio(pipe, subjects, protocol, folder, weights).draw([*shots, *plain], progress)
    seen = look([*shots, *plain], folder, clip, embedder, protocol.together, progress)
    values = _values(shots, [row_of[without[shot]] for shot in shots if without], seen, references)
    groups = [shot.group for shot in shots]
    numbers = counted(values, groups)
    numbers["by_category"] = {}
    for category in dict.fromkeys(shot.category for shot in shots):
        rows = [row for row, shot in enumerate(shots) if shot.category == category]
        own = {name: value[rows] for name, value in values.items()}
        numbers["by_category"][category] = counted(own, [groups[row] for row in rows])
    return numbers | {
        "method": pipe.unet.moa.config.name,
        "benchmark": "fastcomposer",
        "protocol": {**asdict(protocol), "prompts": len(templates), "subjects": len(subjects)},
        "clip": clip.name,
        "embedder": embedder.name,
        "weights": weights,
        "made": made,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _values(
    shots: Sequence[Shot], plain: Sequence[int], seen: Scores, references: Float[Tensor, "s d"]
) -> dict[str, Float[Tensor, " b"]]:
    """Each score, one value a shot. `plain` are the rows of the pictures without a photo, one a shot, or none."""
    together = len(shots[0].who)
    own = [references[list(shot.who)] for shot in shots]
    rows = {"moa": range(len(shots))} | ({"no_photo": plain} if plain else {})
    found = seen.found(together)
    values = {f"prompt_consistency.{whose}": seen.prompt[list(which)] for whose, which in rows.items()}
    for whose, which in rows.items():
        each = [identity(seen.faces[row], mine) for row, mine in zip(which, own, strict=True)]
        values[f"identity.{whose}"] = torch.tensor(each, dtype=torch.float64)
    if together == 1 and len(references) > 1:
        each = [_of_others(seen.faces[row], references, shot.who[0]) for row, shot in enumerate(shots)]
        values["identity.wrong_subject"] = torch.tensor(each, dtype=torch.float64)
    return values | {f"face_found.{whose}": found[list(which)] for whose, which in rows.items()}


def _of_others(faces: Float[Tensor, "n d"], references: Float[Tensor, "s d"], who: int) -> float:
    """The mean over all other subjects of the score that a picture would have as one of theirs."""
    others = [place for place in range(len(references)) if place != who]
    return float(np.mean([identity(faces[:1], references[place : place + 1]) for place in others]))
