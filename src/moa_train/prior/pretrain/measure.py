"""Stage (d) of the toy prior: the networks that measure identity, place and person, trained on real scenes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from moa_train.prior.pretrain.scenes import SceneSet
from moa_train.prior.pretrain.stage import Stage
from moa_train.prior.probe import Probe, crop_people


class ProbeStage(Stage):
    """Learn identity vectors of people's crops, the context, and the pixels of people.

    restored: the first pictures of the set after the auto-encoder, as generated pictures look; each is taken half of
        the time instead of the drawn one.
    """

    def __init__(self, probe: Probe, scenes: SceneSet, restored: UInt8[np.ndarray, "m h w 3"], **options: Any) -> None:
        super().__init__(**options)
        self.probe = probe
        self.scenes = scenes
        self.restored = restored

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Squared error of the identity vector + cross-entropies of context and person pixels."""
        chosen = rng.integers(len(self.scenes), size=self.batch_size)
        take = (chosen < len(self.restored)) & (rng.random(self.batch_size) < 0.5)
        images = self.scenes.images[chosen]
        images[take] = self.restored[chosen[take]]
        pictures = _jitter(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0, rng)
        labels = torch.from_numpy(self.scenes.labels[chosen].astype(np.int64))
        context, person = self.probe.scene_net(pictures.to(self.device))
        contexts = torch.from_numpy(self.scenes.contexts[chosen])
        loss = functional.cross_entropy(context, contexts.to(self.device))
        loss = loss + functional.binary_cross_entropy_with_logits(person, (labels > 0).float().to(self.device))
        return loss + self._identity_loss(chosen, pictures, labels, rng)

    def _identity_loss(self, chosen: np.ndarray, pictures: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
        rows = [
            (row, int(rng.integers(len(self.scenes.people[i]))))
            for row, i in enumerate(chosen)
            if self.scenes.people[i]
        ]
        places = torch.tensor([row for row, _ in rows])
        masks = torch.stack([labels[row] == person + 1 for row, person in rows])
        crops = crop_people(pictures[places], _shift(masks, rng))
        truth = np.stack([self.scenes.people[chosen[row]][person].vector() for row, person in rows])
        return functional.mse_loss(
            self.probe.identity_net(crops.to(self.device)), torch.from_numpy(truth).to(self.device)
        )


def _shift(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Move all masks by up to two pixels: a crop found on a generated picture is not exact either."""
    return masks.roll(tuple(int(step) for step in rng.integers(-2, 3, size=2)), dims=(1, 2))


def _jitter(pictures: Float[Tensor, "b 3 h w"], rng: np.random.Generator) -> Tensor:
    """A little noise and, half of the time, a little blur."""
    if rng.random() < 0.5:
        pictures = 0.5 * pictures + 0.5 * functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    noise = torch.from_numpy(rng.normal(0.0, 0.03 * rng.random(), size=pictures.shape).astype(np.float32))
    return (pictures + noise).clamp(0.0, 1.0)


@torch.no_grad()
def probe_figures(probe: Probe, scenes: SceneSet, images: UInt8[np.ndarray, "n h w 3"]) -> dict[str, float]:
    """On held-out people: cosine with the true and with another's identity vector, context accuracy, person IoU."""
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
    labels = torch.from_numpy(scenes.labels[: len(images)].astype(np.int64))
    rows = [row for row in range(len(images)) if len(scenes.people[row]) == 1]
    vectors = probe.identity(crop_people(pictures[rows], labels[rows] > 0))
    truth = torch.from_numpy(np.stack([scenes.people[row][0].vector() for row in rows]))
    person = probe.person(pictures) > 0.5
    union = (person | (labels > 0)).sum(dim=(1, 2))
    overlap = (person & (labels > 0)).sum(dim=(1, 2))
    held = union > 0
    contexts = torch.from_numpy(scenes.contexts[: len(images)])
    return {
        "identity_cosine": float(functional.cosine_similarity(vectors, truth).mean()),
        "identity_cosine_of_others": float(functional.cosine_similarity(vectors, truth.roll(1, 0)).mean()),
        "identity_rmse": float((vectors - truth).square().mean().sqrt()),
        "context_accuracy": float((probe.context(pictures).argmax(dim=1) == contexts).float().mean()),
        "person_iou": float((overlap[held] / union[held]).mean()),
    }
