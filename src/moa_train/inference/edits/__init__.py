"""Edits of pictures with trained weights: swap, morph, compose, invert, and the figure of the routing."""

from moa_train.inference.edits.compose import compose
from moa_train.inference.edits.grid import Grid
from moa_train.inference.edits.invert import EditedPhoto, Inversion, edit_photo, invert, reconstruct, swap_into
from moa_train.inference.edits.morph import Morph, morph
from moa_train.inference.edits.routing import routing_figure
from moa_train.inference.edits.swap import swap

__all__ = [
    "EditedPhoto",
    "Grid",
    "Inversion",
    "Morph",
    "compose",
    "edit_photo",
    "invert",
    "morph",
    "reconstruct",
    "routing_figure",
    "swap",
    "swap_into",
]
