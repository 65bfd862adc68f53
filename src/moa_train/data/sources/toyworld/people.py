"""How one person of the toy world is drawn: pose and expression at random, everything else as the identity says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from moa_train.data.sources.toyworld.canvas import Colour, Draws, Point, mix, shade
from moa_train.data.sources.toyworld.identities import Identity

_HUES: tuple[Colour, ...] = (
    (218, 36, 40),
    (246, 132, 26),
    (250, 218, 44),
    (52, 168, 64),
    (44, 200, 208),
    (44, 82, 218),
    (138, 56, 200),
    (246, 112, 184),
)
_SKINS: tuple[Colour, ...] = ((255, 230, 212), (240, 198, 162), (212, 158, 112), (150, 98, 62), (92, 58, 40))
_INK: Colour = (28, 24, 30)
_TROUSERS: Colour = (66, 66, 84)
_POSE_DRAWS = 16


def hue_colour(hue: float) -> Colour:
    """The saturated colour of a hue in [0, 1)."""
    place = hue * len(_HUES)
    low = int(place)
    return mix(_HUES[low % len(_HUES)], _HUES[(low + 1) % len(_HUES)], place - low)


def skin_colour(skin: float) -> Colour:
    """The colour of a skin tone in [0, 1]; the named tones lie in the middle of their fifths."""
    place = min(max(skin * len(_SKINS) - 0.5, 0.0), len(_SKINS) - 1.0)
    low = min(int(place), len(_SKINS) - 2)
    return mix(_SKINS[low], _SKINS[low + 1], place - low)


@dataclass(frozen=True)
class Pose:
    """What changes between two pictures of one person; lengths in head radii.

    `lean` moves the hips sideways against the head, `turn` and `nod` the face on the head; `arms` holds for the left
    and the right arm how high it is (0 down .. 1 up), `smile` the mouth's bend (-1 .. 1), `mouth_open` its height.
    """

    lean: float
    turn: float
    nod: float
    arms: tuple[float, float]
    smile: float
    mouth_open: float


def random_pose(rng: np.random.Generator) -> Pose:
    """A pose; always the same count of numbers from the generator."""
    u = Draws(rng, _POSE_DRAWS)
    arms = tuple(u.between(0.75, 1.0) if u.chance(0.25) else u.between(0.0, 0.25) for _ in range(2))
    return Pose(
        lean=u.between(-0.25, 0.25),
        turn=u.between(-0.16, 0.16),
        nod=u.between(-0.06, 0.06),
        arms=(arms[0], arms[1]),
        smile=u.between(-0.6, 1.0),
        mouth_open=u.between(0.1, 0.3) if u.chance(0.35) else 0.0,
    )


class Figure:
    """Draws one person on a picture and, with each shape of its outline, on a map of labels.

    Points are in head radii around the head's centre, y downwards: the chin is at 1, the shoulders at 1.5.
    """

    def __init__(
        self, picture: Image.Image, labels: Image.Image, label: int, centre: Point, radius: float, pose: Pose
    ) -> None:
        """Draw around `centre` with a head of `radius`, in pixels of the picture; `labels` is its 'L' companion."""
        self._draw = ImageDraw.Draw(picture)
        self._map = ImageDraw.Draw(labels)
        self._label = label
        self._height = picture.height
        self._x, self._y = centre
        self._radius = radius
        self._pose = pose

    def draw(self, who: Identity) -> None:
        """Draw the whole person, back to front."""
        skin, hair = skin_colour(who.skin), hue_colour(who.hair_hue)
        width, height = 0.98 - 0.14 * who.head_shape, 0.94 + 0.16 * who.head_shape
        self._hair_behind(who, hair, width, height)
        self._body(who, skin, hue_colour(who.shirt_hue))
        if who.hair_style != "long":
            self._ellipse(-width, 0.1, 0.18, 0.24, shade(skin, 0.9))
            self._ellipse(width, 0.1, 0.18, 0.24, shade(skin, 0.9))
        if who.hat and who.hair_style in ("short", "spiky"):
            self._ellipse(-width, -0.15, 0.24, 0.3, hair)
            self._ellipse(width, -0.15, 0.24, 0.3, hair)
        self._ellipse(0.0, 0.0, width, height, skin)
        self._face(who, skin, hair, width, height)
        if who.hair_style != "bald":
            self._chord(0.0, 0.0, width + 0.05, height + 0.05, (204.0, 336.0), hair)
        if who.hat:
            self._hat(hue_colour(who.hat_hue), width, height)

    def _hair_behind(self, who: Identity, hair: Colour, width: float, height: float) -> None:
        if who.hair_style == "short":
            self._ellipse(0.0, -0.2, width + 0.17, height, hair)
        elif who.hair_style == "long":
            self._ellipse(0.0, -0.12, width + 0.28, height + 0.08, hair)
            self._box(-width - 0.28, -0.15, width + 0.28, 1.85, 0.4, hair)
        elif who.hair_style == "spiky":
            self._ellipse(0.0, -0.2, width + 0.08, height - 0.05, hair)
            rim = [(math.radians(a), 0.95 if i % 2 == 0 else 1.6) for i, a in enumerate(range(165, 376, 21))]
            if who.hat:
                rim = [(a, f if math.sin(a) > -0.6 else 0.95) for a, f in rim]
            self._polygon([(width * f * math.cos(a), -0.1 + height * f * math.sin(a)) for a, f in rim], hair)

    def _body(self, who: Identity, skin: Colour, shirt: Colour) -> None:
        lean, man = self._pose.lean, who.noun == "man"
        bottom = (self._height - self._y) / self._radius + 0.5
        hem, shoulder = 3.5, 1.3 if man else 1.0
        waist, hip = (1.15, 1.1) if man else (0.8, 1.55)
        if bottom > hem:
            legs = [(lean - 0.95, hem - 0.1), (lean + 0.95, hem - 0.1), (lean + 0.9, bottom), (lean - 0.9, bottom)]
            self._polygon(legs, _TROUSERS if man else skin)
        for side, lift in zip((-1.0, 1.0), self._pose.arms, strict=True):
            self._arm(side, lift, lean + side * (shoulder - 0.12), man, skin, shade(shirt, 0.82))
        self._polygon(
            [
                (lean / 3 - shoulder, 1.6),
                (lean / 3 - shoulder + 0.4, 1.3),
                (lean / 3 + shoulder - 0.4, 1.3),
                (lean / 3 + shoulder, 1.6),
                (lean + waist, 2.5),
                (lean + hip, hem),
                (lean - hip, hem),
                (lean - waist, 2.5),
            ],
            shirt,
        )
        self._box(-0.33, 0.6, 0.33, 1.5, 0.2, shade(skin, 0.85))
        if not man:
            self._polygon([(-0.5, 1.3), (0.5, 1.3), (0.0, 1.95)], shade(skin, 0.95), outline=False)

    def _arm(self, side: float, lift: float, x: float, man: bool, skin: Colour, sleeve: Colour) -> None:
        """An arm whose hand goes from beside the hips (lift 0) to beside the head (lift 1)."""
        angle = math.radians(72.0 - 100.0 * lift)
        elbow = (x + side * (0.35 + 0.75 * math.cos(angle)), 1.65 + 0.9 * math.sin(angle))
        hand = (elbow[0] + side * 0.1 * (1.0 - lift), elbow[1] + 0.85 * (1.0 - 2.0 * lift))
        self._stroke([(x - side * 0.1, 1.68), elbow, hand], 0.56 if man else 0.46, sleeve)
        self._ellipse(*hand, 0.3, 0.3, skin)

    def _face(self, who: Identity, skin: Colour, hair: Colour, width: float, height: float) -> None:
        x, y = self._pose.turn, self._pose.nod
        if who.beard:
            colour = shade(hair, 0.7) if who.hair_style != "bald" else (96, 64, 40)
            self._chord(0.0, 0.0, width + 0.02, height + 0.06, (12.0, 168.0), colour)
        for side in (-0.38, 0.38):
            if who.glasses:
                self._ellipse(x + side, y + 0.02, 0.38, 0.35, _INK, outline=False)
                self._ellipse(x + side, y + 0.02, 0.24, 0.21, (190, 225, 250), outline=False)
            else:
                self._ellipse(x + side, y + 0.02, 0.24, 0.22, (252, 252, 252), outline=False)
                self._ellipse(x + side, y + 0.03, 0.14, 0.17, _INK, outline=False)
        lips = (206, 40, 66) if who.noun == "woman" else mix(skin, (110, 30, 30), 0.75)
        self._mouth(x, y + 0.5, (238, 208, 190) if who.beard else lips)

    def _mouth(self, x: float, y: float, colour: Colour) -> None:
        smile, gap = self._pose.smile, self._pose.mouth_open
        if gap > 0.0:
            self._ellipse(x, y + 0.05, 0.26, gap, colour, outline=False)
            return
        bend = 0.2 * smile
        points = [(x + t * 0.36, y + 0.05 + bend * (0.5 - t * t)) for t in (-1.0, -0.5, 0.0, 0.5, 1.0)]
        self._stroke(points, 0.17, colour, outline=False)

    def _hat(self, colour: Colour, width: float, height: float) -> None:
        self._chord(0.0, -0.38 * height, width + 0.12, 1.0, (180.0, 360.0), colour)
        self._box(-width - 0.42, -0.62 * height, width + 0.42, -0.62 * height + 0.3, 0.14, shade(colour, 0.72))

    def _frame(self, x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
        r, cx, cy = self._radius, self._x + x * self._radius, self._y + y * self._radius
        return cx - rx * r, cy - ry * r, cx + rx * r, cy + ry * r

    def _ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour, outline: bool = True) -> None:
        frame = self._frame(x, y, rx, ry)
        self._draw.ellipse(frame, fill=fill)
        if outline:
            self._map.ellipse(frame, fill=self._label)

    def _chord(self, x: float, y: float, rx: float, ry: float, angles: tuple[float, float], fill: Colour) -> None:
        frame = self._frame(x, y, rx, ry)
        self._draw.chord(frame, *angles, fill=fill)
        self._map.chord(frame, *angles, fill=self._label)

    def _box(self, x1: float, y1: float, x2: float, y2: float, radius: float, fill: Colour) -> None:
        frame = self._frame((x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2)
        self._draw.rounded_rectangle(frame, radius * self._radius, fill=fill)
        self._map.rounded_rectangle(frame, radius * self._radius, fill=self._label)

    def _polygon(self, points: Sequence[Point], fill: Colour, outline: bool = True) -> None:
        placed = [(self._x + x * self._radius, self._y + y * self._radius) for x, y in points]
        self._draw.polygon(placed, fill=fill)
        if outline:
            self._map.polygon(placed, fill=self._label)

    def _stroke(self, points: Sequence[Point], width: float, fill: Colour, outline: bool = True) -> None:
        placed = [(self._x + x * self._radius, self._y + y * self._radius) for x, y in points]
        thick = max(round(width * self._radius), 1)
        self._draw.line(placed, fill=fill, width=thick, joint="curve")
        if outline:
            self._map.line(placed, fill=self._label, width=thick, joint="curve")
