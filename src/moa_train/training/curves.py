"""Learning curves of runs as one picture, for readers that need no other library than matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_PANELS = {
    "identity gap, held-out people": "val/identity_gap",
    "masked loss, held-out people": "val/masked",
    "R_0 inside the subject": "val/routing_inside",
    "R_0 outside the subject": "val/routing_outside",
}


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, str]]], path: Path) -> bool:
    """Draw the validation curves of runs (title -> rows of its metrics.csv); False and no file if there are none."""
    if not any(row.get(name) for rows in runs.values() for row in rows for name in _PANELS.values()):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(_PANELS), 3.2), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for axis, (title, name) in zip(axes, _PANELS.items(), strict=True):
        for number, (run, rows) in enumerate(runs.items()):  # a run has one colour in all panels
            points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=run, color=f"C{number}")
        axis.set(title=title, xlabel="step")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    return True
