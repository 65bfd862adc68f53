"""From one value a picture to a report's numbers: means under nested keys, intervals under dotted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moa_train.evaluation.metrics import Interval, bootstrap_interval

_DECIMALS = 5


def summarise(values: Mapping[str, Float[Tensor, " b"]], groups: Sequence[int]) -> dict[str, Any]:
    """Means ("identity.moa" -> identity: {moa: ...}) and, in `intervals`, their bootstrap over groups.

    Rows that are NaN were not measured (no person was found) and do not count; what no row has measured is left out.
    """
    numbers: dict[str, Any] = {"intervals": {}}
    for name, each in values.items():
        measured = ~each.isnan()
        if measured.any():
            kept = [group for group, has in zip(groups, measured.tolist(), strict=True) if has]
            interval = bootstrap_interval(each[measured].tolist(), kept)
            add(numbers, name, float(each[measured].double().mean()), interval)
    return numbers


def counted(values: Mapping[str, Float[Tensor, " b"]], people: Sequence[int]) -> dict[str, Any]:
    """The summary with `n`: of how many people and pictures."""
    return {**summarise(values, people), "n": {"people": len(set(people)), "pictures": len(people)}}


def add(numbers: dict[str, Any], name: str, value: float, interval: Interval) -> None:
    """Enter one number with its interval, in place."""
    group, _, leaf = name.rpartition(".")
    (numbers.setdefault(group, {}) if group else numbers)[leaf] = round(value, _DECIMALS)
    numbers["intervals"][name] = [round(bound, _DECIMALS) for bound in interval]


def joined(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Several summaries as one; they may share a measure ("identity"), not its entries ("identity.moa")."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, Mapping) else value
    return whole
