"""Where the toy world's people stand: eight places in large smooth shapes, each with its own random detail."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from moa_train.data.sources.toyworld.canvas import Canvas, Colour, Draws, mix, shade, sky
from moa_train.data.sources.toyworld.captions import CONTEXTS

_DRAWS = 64
_WHITE: Colour = (250, 250, 250)


def _beach(side: int, u: Draws) -> Image.Image:
    horizon, shore = u.between(0.36, 0.46), u.between(0.58, 0.68)
    sea = mix((20, 130, 190), (40, 170, 200), u.share())
    sand = mix((244, 220, 150), (236, 205, 140), u.share())
    picture = sky(
        side,
        [
            (0.0, (90, 180, 245)),
            (horizon, (205, 235, 250)),
            (horizon + 0.005, shade(sea, 0.85)),
            (shore, mix(sea, _WHITE, 0.35)),
            (shore + 0.02, (250, 245, 220)),
            (shore + 0.06, sand),
            (1.0, shade(sand, 0.9)),
        ],
    )
    canvas = Canvas(picture)
    canvas.ellipse(u.between(0.1, 0.9), u.between(0.1, 0.2), 0.08, 0.08, (255, 235, 110))
    x, y = u.between(0.08, 0.92), u.between(0.42, 0.5)
    stripe = ((225, 60, 60), (240, 130, 40), (60, 90, 200))[u.below(3)]
    canvas.stroke([(x, y), (x + 0.02, y + 0.36)], 0.03, (245, 240, 230))
    canvas.dome(x, y + 0.06, 0.2, 0.17, stripe)
    canvas.dome(x, y + 0.06, 0.08, 0.17, _WHITE)
    return picture


def _forest(side: int, u: Draws) -> Image.Image:
    ground = u.between(0.66, 0.78)
    picture = sky(
        side,
        [(0.0, (60, 120, 80)), (ground, (165, 205, 140)), (ground + 0.01, (62, 105, 48)), (1.0, (38, 72, 32))],
    )
    canvas = Canvas(picture)
    count = 4 + u.below(3)
    for i in range(count):
        x, foot = (i + u.between(0.2, 0.8)) / count, ground + u.between(0.02, 0.1)
        width, crown = u.between(0.035, 0.055), mix((24, 88, 42), (58, 130, 50), u.share())
        canvas.box(x - width, 0.2, x + width, foot, (92, 62, 38))
        canvas.ellipse(x, u.between(0.1, 0.2), u.between(0.13, 0.19), u.between(0.18, 0.26), crown)
    return picture


def _city(side: int, u: Draws) -> Image.Image:
    glow = mix((110, 60, 120), (60, 70, 140), u.share())
    picture = sky(side, [(0.0, (12, 14, 46)), (0.75, glow), (0.82, (40, 40, 52)), (1.0, (58, 58, 70))])
    canvas = Canvas(picture)
    canvas.ellipse(u.between(0.1, 0.9), u.between(0.08, 0.16), 0.07, 0.07, (245, 240, 205))
    count = 5 + u.below(2)
    for i in range(count):
        left, right = i / count, (i + 1) / count
        top, tone = u.between(0.22, 0.55), mix((20, 24, 44), (44, 46, 78), u.share())
        canvas.box(left, top, right - 0.01, 0.86, tone)
        middle = (left + right) / 2
        for y in (top + 0.08, top + 0.24):
            lit = (255, 214, 100) if u.chance(0.75) else tone
            canvas.box(middle - 0.045, y - 0.03, middle + 0.035, y + 0.04, lit)
    return picture


def _mountain(side: int, u: Draws) -> Image.Image:
    base = u.between(0.66, 0.76)
    picture = sky(
        side,
        [(0.0, (120, 170, 225)), (base, (222, 235, 248)), (base + 0.01, (246, 249, 253)), (1.0, (205, 218, 236))],
    )
    canvas = Canvas(picture)
    for x in (u.between(0.0, 0.3), u.between(0.7, 1.0), u.between(0.35, 0.65)):
        top, half = u.between(0.08, 0.3), u.between(0.36, 0.5)
        rock = mix((88, 104, 136), (118, 128, 152), u.share())
        canvas.polygon([(x - half, base + 0.02), (x, top), (x + half, base + 0.02)], rock)
        drop, wide = 0.42 * (base - top), 0.42 * half
        snow = [(x, top), (x - wide, top + drop), (x - 0.3 * wide, top + 0.7 * drop), (x + 0.2 * wide, top + drop)]
        canvas.polygon([*snow, (x + 0.5 * wide, top + 0.75 * drop), (x + wide, top + drop)], _WHITE)
    canvas.ellipse(u.between(0.0, 1.0), 1.02, 0.7, 1.04 - base, (240, 245, 252))
    return picture


def _desert(side: int, u: Draws) -> Image.Image:
    horizon = u.between(0.48, 0.58)
    dusk = mix((245, 170, 100), (240, 200, 130), u.share())
    picture = sky(
        side, [(0.0, dusk), (horizon, (252, 228, 170)), (horizon + 0.01, (226, 158, 80)), (1.0, (190, 112, 50))]
    )
    canvas = Canvas(picture)
    canvas.ellipse(u.between(0.1, 0.9), u.between(0.12, 0.28), 0.09, 0.09, (255, 246, 200))
    for _ in range(2):
        x, top = u.between(0.0, 1.0), horizon + u.between(-0.05, 0.06)
        canvas.ellipse(x, top + 0.5, u.between(0.5, 0.8), 0.5, mix((232, 170, 92), (206, 134, 66), u.share()))
    x, y, green = u.between(0.06, 0.94), u.between(0.36, 0.46), (62, 122, 62)
    canvas.box(x - 0.035, y, x + 0.035, y + 0.36, green, 0.035)
    side_arm = 0.11 if u.chance(0.5) else -0.11
    canvas.stroke([(x, y + 0.2), (x + side_arm, y + 0.2), (x + side_arm, y + 0.06)], 0.05, green)
    return picture


def _living_room(side: int, u: Draws) -> Image.Image:
    wall = ((236, 212, 176), (205, 190, 170), (214, 178, 160))[u.below(3)]
    floor = u.between(0.74, 0.82)
    picture = sky(side, [(0.0, wall), (floor, shade(wall, 0.92)), (floor + 0.005, (134, 88, 54)), (1.0, (108, 68, 40))])
    canvas = Canvas(picture)
    x, y = u.between(0.2, 0.8), u.between(0.18, 0.24)
    canvas.box(x - 0.17, y - 0.14, x + 0.17, y + 0.18, (250, 246, 238))
    canvas.box(x - 0.135, y - 0.105, x - 0.0175, y + 0.145, (150, 205, 240))
    canvas.box(x + 0.0175, y - 0.105, x + 0.135, y + 0.145, (150, 205, 240))
    sofa, left = ((120, 60, 60), (70, 90, 110), (90, 100, 70))[u.below(3)], u.between(-0.1, 0.35)
    canvas.box(left, 0.52, left + 0.75, 0.86, sofa, 0.07)
    canvas.box(left - 0.04, 0.68, left + 0.79, 0.9, shade(sofa, 1.2), 0.06)
    lamp = 0.92 if left < 0.12 else 0.08
    canvas.stroke([(lamp, 0.4), (lamp, 0.88)], 0.03, (80, 60, 50))
    canvas.polygon([(lamp - 0.06, 0.3), (lamp + 0.06, 0.3), (lamp + 0.11, 0.45), (lamp - 0.11, 0.45)], (255, 226, 130))
    return picture


def _space(side: int, u: Draws) -> Image.Image:
    picture = sky(side, [(0.0, (8, 6, 26)), (1.0, mix((44, 16, 70), (14, 30, 74), u.share()))])
    canvas = Canvas(picture)
    for _ in range(6):
        r = u.between(0.016, 0.024)
        canvas.ellipse(u.between(0.03, 0.97), u.between(0.03, 0.9), r, r, (225, 225, 245))
    x, y, r = u.between(0.1, 0.9), u.between(0.12, 0.34), u.between(0.11, 0.17)
    planet = ((225, 120, 70), (90, 160, 210), (200, 100, 170), (120, 190, 130))[u.below(4)]
    canvas.ellipse(x, y, r, r, shade(planet, 0.75))
    canvas.ellipse(x - 0.15 * r, y - 0.15 * r, 0.8 * r, 0.8 * r, planet)
    w, tilt = 1.8 * r, 0.5 * r
    ring = [(x - w, y + tilt), (x + w, y - tilt), (x + w, y - tilt + 0.3 * r), (x - w, y + tilt + 0.3 * r)]
    canvas.polygon(ring, mix(planet, _WHITE, 0.6))
    ground = u.between(0.84, 0.9)
    canvas.ellipse(u.between(0.3, 0.7), ground + 0.6, 1.1, 0.6, (122, 120, 134))
    canvas.ellipse(u.between(0.1, 0.9), ground + 0.1, 0.1, 0.03, (88, 86, 102))
    return picture


def _meadow(side: int, u: Draws) -> Image.Image:
    horizon = u.between(0.46, 0.56)
    picture = sky(
        side,
        [(0.0, (80, 165, 240)), (horizon, (200, 230, 250)), (horizon + 0.01, (120, 195, 80)), (1.0, (76, 152, 52))],
    )
    canvas = Canvas(picture)
    x, y = u.between(0.1, 0.9), u.between(0.1, 0.2)
    canvas.ellipse(x, y, 0.14, 0.06, _WHITE)
    canvas.ellipse(x + 0.05, y - 0.04, 0.08, 0.06, _WHITE)
    for _ in range(2):
        hill = mix((104, 178, 74), (140, 208, 92), u.share())
        canvas.ellipse(u.between(0.0, 1.0), horizon + u.between(0.42, 0.52), u.between(0.5, 0.8), 0.5, hill)
    petal = ((240, 70, 90), (250, 215, 70), (245, 245, 245), (190, 90, 210))[u.below(4)]
    for _ in range(6):
        canvas.ellipse(u.between(0.03, 0.97), u.between(0.7, 0.97), 0.03, 0.03, petal)
    return picture


_PAINTERS: dict[str, Callable[[int, Draws], Image.Image]] = dict(
    zip(CONTEXTS, (_beach, _forest, _city, _mountain, _desert, _living_room, _space, _meadow), strict=True)
)


def draw_context(rng: np.random.Generator, context: str, side: int) -> Image.Image:
    """An empty place.

    Args:
        rng: gives the random detail; the same count of numbers is used in every place.
        context: one of `CONTEXTS`.
        side: pixels along an edge, before any reduction.

    Raises:
        ValueError: if the context is unknown.
    """
    if context not in _PAINTERS:
        raise ValueError(f"context is {context!r}; expected one of {CONTEXTS}")
    return _PAINTERS[context](side, Draws(rng, _DRAWS))


def draw_backdrop(rng: np.random.Generator, side: int) -> Image.Image:
    """A plain backdrop for a portrait: one soft random colour, a little darker towards the bottom."""
    u = Draws(rng, 3)
    colour = (int(u.between(130.0, 235.0)), int(u.between(130.0, 235.0)), int(u.between(130.0, 235.0)))
    return sky(side, [(0.0, colour), (1.0, shade(colour, 0.8))])
