"""Learning curves of a run as one picture: losses, identity gap, and what routers and subject tokens do.

python scripts/plot_run.py runs/toy/2026-01-01_12-00-00/metrics.csv curves.png
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

PANELS = {
    "masked loss, held-out people": ("val/masked", "val/masked_wrong_subject"),
    "identity gap": ("val/identity_gap",),
    "routing to the prior, R_0": ("val/routing_inside", "val/routing_outside"),
    "attention to the subject's token, A_s": ("val/attention_inside", "val/attention_outside"),
}


def main(metrics: str, picture: str) -> None:
    """Draw the validation curves of `metrics` (a run's metrics.csv) to `picture`."""
    with Path(metrics).open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3), constrained_layout=True)
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        for name in names:
            points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
            axis.plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("val/"))
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
