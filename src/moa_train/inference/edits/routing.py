"""The paper's figure of the routing: each layer's R_1 at several timesteps, laid over the picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional

from moa_train.inference.routing import Routing

_COLOURS = "inferno"
_CELL = 0.62
"""Side of one map, inches."""
_DOTS = 110
"""Per inch."""


def routing_figure(picture: Image.Image, routing: Routing, row: int = 0, columns: int = 8) -> Image.Image:
    """Layers from top to bottom in the order of execution, timesteps from left to right as they were run.

    Each map has its layer's own resolution, is enlarged without smoothing and laid over the grey picture. One colour
    scale, from the lowest to the highest value of the figure, serves all maps, so that they can be compared. The last
    column is the mean over all steps, the last line the mean over the layers of the router loss.

    Args:
        picture: the final picture.
        routing: of the call that made it (`pipe.routing`).
        row: of the batch.
        columns: at most so many steps, spread evenly from the first to the last.

    Raises:
        ValueError: fewer than one column.
    """
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected 1 or more timesteps")
    shown = np.unique(np.linspace(0, len(routing.timesteps) - 1, columns).round().astype(int)).tolist()
    maps = {layer_label(name, maps.shape[-2:]): maps[:, row] for name, maps in routing.layer_steps.items()}
    lines = {**maps, "mean of layers": routing.steps[:, row]}
    return _drawn(
        picture,
        [[*(line[step] for step in shown), line.mean(dim=0)] for line in lines.values()],
        list(lines),
        [*(f"t = {routing.timesteps[step]}" for step in shown), "mean"],
    )


def layer_label(name: str, size: Sequence[int]) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0.attn2` of 64 x 64 pixels: "down 0.1 cross 64x64"."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdigit()]
    kind = "self" if parts[-1] == "attn1" else "cross"
    return f"{parts[0].split('_')[0]} {'.'.join(numbers[:-1])} {kind} {size[1]}x{size[0]}"


def _drawn(
    picture: Image.Image, grid: Sequence[Sequence[Tensor]], lines: Sequence[str], titles: Sequence[str]
) -> Image.Image:
    """The maps as one mosaic on one pair of axes, whose ticks name lines and columns."""
    values = torch.cat([cell.flatten() for line in grid for cell in line])
    scale = Normalize(float(values.min()), float(values.max()))
    grey = np.asarray(picture.convert("L").convert("RGB")) / 255.0
    gap = max(2, picture.width // 24)
    cells = [[np.pad(_blended(grey, cell, scale), _around(gap), constant_values=1.0) for cell in row] for row in grid]
    mosaic = np.concatenate([np.concatenate(row, axis=1) for row in cells])
    rows, columns = picture.height + 2 * gap, picture.width + 2 * gap
    width, height = _CELL * len(titles), _CELL * len(lines) * rows / columns
    left, right, top, bottom = 1.7, 0.9, 0.4, 0.35
    size = (left + width + right, top + height + bottom)
    figure = Figure(figsize=size, dpi=_DOTS)
    axis = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    axis.imshow(mosaic, aspect="auto", interpolation="nearest", resample=False)
    axis.set_xticks([(column + 0.5) * columns for column in range(len(titles))], titles, fontsize=6)
    axis.set_yticks([(line + 0.5) * rows for line in range(len(lines))], lines, fontsize=6)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("timestep, from noise to picture", fontsize=7)
    axis.set_ylabel("attention layer, in order of execution", fontsize=7)
    beside = figure.add_axes((1 - 0.7 * right / size[0], 0.3, 0.12 / size[0], 0.4))
    bar = figure.colorbar(ScalarMappable(scale, _COLOURS), cax=beside)
    bar.ax.tick_params(labelsize=6)
    bar.set_label("R_1, share of the personalized expert", fontsize=6)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return Image.open(file).convert("RGB")


def _blended(grey: np.ndarray, cell: Float[Tensor, "h w"], scale: Normalize) -> np.ndarray:
    """The map in colour over the grey picture, values in [0, 1]."""
    enlarged = functional.interpolate(cell[None, None].float(), grey.shape[:2], mode="nearest")[0, 0]
    return 0.4 * grey + 0.6 * colormaps[_COLOURS](scale(enlarged.numpy()))[..., :3]


def _around(gap: int) -> tuple[tuple[int, int], ...]:
    return (gap, gap), (gap, gap), (0, 0)
