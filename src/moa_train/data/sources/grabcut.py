"""People in a photo without any download: faces by OpenCV's Haar cascades, masks by GrabCut around each."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

_CASCADES = ("haarcascade_frontalface_default.xml", "haarcascade_frontalface_alt2.xml", "haarcascade_profileface.xml")
_FACE_SIDES = (256, 384, 640)
"""Short sides, in pixels, at which a face is looked for, in this order."""
_SMALLEST_FACE = 0.35
"""Width of the smallest face that counts, over that of the first."""
_GRABCUT_SIDE = 256
_GRABCUT_ROUNDS = 5

Box = tuple[int, int, int, int]
"""(x1, y1, x2, y2), ends exclusive."""


def find_face(image: UInt8[np.ndarray, "h w 3"]) -> Box | None:
    """The largest face, by OpenCV's Haar cascades at several scales; None where there is none."""
    for name in _CASCADES:
        for side in _FACE_SIDES:
            found = _detect(image, name, side)
            if found:
                return max(found, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    return None


def _detect(image: UInt8[np.ndarray, "h w 3"], cascade: str, side: int) -> list[Box]:
    """The faces that one cascade finds with the short side of the picture reduced to `side` pixels."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = side / min(grey.shape)
    small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    detector = cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / cascade))
    found = detector.detectMultiScale(small, scaleFactor=1.1, minNeighbors=5, minSize=(side // 8, side // 8))
    return [
        (
            max(int(x / scale), 0),
            max(int(y / scale), 0),
            min(int((x + width) / scale), image.shape[1]),
            min(int((y + height) / scale), image.shape[0]),
        )
        for x, y, width, height in np.asarray(found).reshape(-1, 4).tolist()
    ]


def segment_person(image: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """The mask of the person with the largest face: GrabCut seeded with head and shoulders around the face box.

    Raises:
        ValueError: no face was found.
    """
    face = find_face(image)
    if face is None:
        raise ValueError("no face was found: give a photo that shows one from the front, or a mask of the subject")
    return _around(image, face)


def segment_people(image: UInt8[np.ndarray, "h w 3"], most: int = 4) -> list[Bool[np.ndarray, "h w"]]:
    """The masks of up to `most` people by their faces, which do not overlap: where two could, the nearer face wins.

    Distances are in widths of the face. Empty where no face is found.
    """
    faces = find_faces(image)[:most]
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    distances = [np.hypot(columns - (x1 + x2) / 2, rows - (y1 + y2) / 2) / max(x2 - x1, 1) for x1, y1, x2, y2 in faces]
    nearest = np.argmin(distances, axis=0) if faces else None
    return [_around(image, face) & (nearest == place) for place, face in enumerate(faces)]


def find_faces(image: UInt8[np.ndarray, "h w 3"]) -> list[Box]:
    """All faces, the largest first: the one of `find_face`, and others that two cascades agree on."""
    first = find_face(image)
    if first is None:
        return []
    found = [[box for side in _FACE_SIDES for box in _detect(image, name, side)] for name in _CASCADES[:2]]
    agreed = [box for box in found[0] if any(_overlap(box, other) > 0.4 for other in found[1])]
    faces = [first]
    for box in sorted(agreed, key=lambda box: box[0] - box[2]):
        large = box[2] - box[0] >= _SMALLEST_FACE * (first[2] - first[0])
        if large and all(_overlap(box, other) < 0.1 for other in faces):
            faces.append(box)
    return sorted(faces, key=lambda box: box[0] - box[2])


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _around(image: UInt8[np.ndarray, "h w 3"], face: Box) -> Bool[np.ndarray, "h w"]:
    """The mask of the person with this face."""
    scale = min(1.0, _GRABCUT_SIDE / min(image.shape[:2]))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
    seeds = _seeds(small.shape[:2], tuple(round(value * scale) for value in face))
    core = seeds == cv2.GC_FGD
    cv2.setRNGSeed(0)  # GrabCut starts from k-means with OpenCV's own generator
    bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    cv2.grabCut(bgr, seeds, None, np.zeros((1, 65)), np.zeros((1, 65)), _GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    mask = _one_piece((seeds == cv2.GC_FGD) | (seeds == cv2.GC_PR_FGD), core)
    size = (image.shape[1], image.shape[0])
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5


def _seeds(shape: tuple[int, ...], face: tuple[int, ...]) -> UInt8[np.ndarray, "h w"]:
    """GrabCut's start: the middle of the face is the person, head and shoulders probably, all beyond them not."""
    x1, y1, x2, y2 = map(float, face)
    width, height = max(x2 - x1, 2.0), max(y2 - y1, 2.0)
    centre, middle, bottom = (x1 + x2) / 2, (y1 + y2) / 2, float(shape[0])

    def outline(*points: tuple[float, float]) -> np.ndarray:
        """A shape symmetric about the face: (half width in face widths, y) from top to bottom."""
        right = [(centre + half * width, y) for half, y in points]
        left = [(centre - half * width, y) for half, y in reversed(points)]
        return np.array(right + left).round().astype(np.int32)

    seeds = np.full(shape, cv2.GC_BGD, dtype=np.uint8)
    shoulders = y2 + 0.2 * height
    # what may be the person: hair around the head, shoulders and arms down to the lower edge
    may = outline((0.7, y1 - 0.6 * height), (1.2, y1), (1.2, shoulders), (2.0, y2 + 0.4 * height), (2.2, bottom))
    cv2.fillPoly(seeds, [may], cv2.GC_PR_BGD)
    # what probably is: the head with its hair, neck and chest
    axes = (round(0.68 * width), round(0.85 * height))
    cv2.ellipse(seeds, (round(centre), round(middle - 0.1 * height)), axes, 0, 0, 360, cv2.GC_PR_FGD, thickness=-1)
    chest = outline((0.4, middle), (0.45, y2), (1.05, y2 + 0.45 * height), (1.15, max(y2 + height, bottom)))
    cv2.fillPoly(seeds, [chest], cv2.GC_PR_FGD)
    # what is: the face, the neck and a wedge of the chest
    axes = (max(round(width / 3), 1), round(0.42 * height))
    cv2.ellipse(seeds, (round(centre), round(middle)), axes, 0, 0, 360, cv2.GC_FGD, thickness=-1)
    wedge = outline((0.2, middle), (0.2, y2 + 0.4 * height), (0.45, y2 + 0.7 * height), (0.45, bottom))
    cv2.fillPoly(seeds, [wedge], cv2.GC_FGD)
    return seeds


def _one_piece(mask: Bool[np.ndarray, "h w"], core: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The connected part that holds most of the core, its outline smoothed and its holes filled."""
    side = max(3, min(mask.shape) // 60 * 2 + 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    smooth = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel)
    _, labels = cv2.connectedComponents(smooth | core.astype(np.uint8))
    part = np.argmax(np.bincount(labels[core & (labels > 0)])) if core.any() else 0
    outline, _ = cv2.findContours((labels == part).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, dtype=np.uint8)
    cv2.drawContours(filled, outline, -1, 1, thickness=-1)
    return cv2.morphologyEx(filled, cv2.MORPH_CLOSE, kernel).astype(bool)
