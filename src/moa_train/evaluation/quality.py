"""Do pictures look like real scenes? The Fréchet distance (Heusel et al. 2017) between features of the probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moa_train.evaluation.metrics import Interval
from moa_train.evaluation.summary import add


def frechet_distance(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> float:
    """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the Gaussians fitted to two sets of features.

    tr (S_1 S_2)^(1/2) is the sum of the roots of the eigenvalues of S_1^(1/2) S_2 S_1^(1/2), which is symmetric.
    """
    (mean_1, cov_1), (mean_2, cov_2) = _gaussian(first.double()), _gaussian(second.double())
    values, axes = torch.linalg.eigh(cov_1)
    root = axes * values.clamp_min(0.0).sqrt() @ axes.T
    overlap = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp_min(0.0).sqrt().sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + cov_1.trace() + cov_2.trace() - 2.0 * overlap
    return max(float(distance), 0.0)


def _gaussian(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    return features.mean(dim=0), torch.atleast_2d(torch.cov(features.T))


def jackknife_interval(
    statistic: Callable[[Bool[Tensor, " b"]], float], groups: Int[Tensor, " b"]
) -> tuple[float, Interval]:
    """A statistic of all rows and its 95 % interval, from leaving out one group (person) at a time.

    The bootstrap would not do for a distance of covariances: rows that are drawn twice lower a covariance's rank.

    Args:
        statistic: of the rows that are kept.
        groups: at least two.
    """
    whole = statistic(torch.ones_like(groups, dtype=torch.bool))
    without = torch.tensor([statistic(groups != group) for group in groups.unique()], dtype=torch.double)
    error = float(((len(without) - 1) * without.var(unbiased=False)).sqrt())
    return whole, (max(whole - 1.96 * error, 0.0), whole + 1.96 * error)


def measure_quality(
    moa: Float[Tensor, "b d"], real: Float[Tensor, "b d"], again: Float[Tensor, "b d"], person: Int[Tensor, " b"]
) -> dict[str, Any]:
    """How far the method's pictures are from real scenes of the same people and places, and other real ones from them.

    Args:
        moa, real, again: features, row by row of equal person and context; the last two of scenes drawn independently.
        person: of each row; one at a time is left out of all three.
    """
    numbers: dict[str, Any] = {"intervals": {}}
    for name, drawn in (("moa", moa), ("real", again)):
        add(
            numbers,
            f"frechet.{name}",
            *jackknife_interval(lambda kept, drawn=drawn: frechet_distance(drawn[kept], real[kept]), person),  # type: ignore[misc]
        )
    return numbers
