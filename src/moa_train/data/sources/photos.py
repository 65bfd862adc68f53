"""A folder of photos as samples: the person's mask from a face box and GrabCut (offline), a caption by template."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

from moa_train.data.schema import Sample, Segment, bounding_box

log = logging.getLogger(__name__)

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
MASK_SUFFIX = ".mask.png"

_CASCADES = ("haarcascade_frontalface_default.xml", "haarcascade_frontalface_alt2.xml", "haarcascade_profileface.xml")
_FACE_SIDES = (256, 384, 640)
"""Short sides, in pixels, at which a face is looked for, in this order."""
_GRABCUT_SIDE = 256
_GRABCUT_ROUNDS = 5

Box = tuple[int, int, int, int]
"""(x1, y1, x2, y2), ends exclusive."""


def read_photo(path: str | Path, max_side: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """A photo as RGB, upright; transparent pixels become white. `max_side`: the short side is reduced to this.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            picture = as_rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error
    if max_side is not None and min(picture.size) > max_side:
        scale = max_side / min(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture)


def as_rgb(picture: Image.Image) -> Image.Image:
    """Any picture (grey, 16 bit, palette, CMYK, transparent) as 8-bit RGB."""
    if picture.mode.startswith("I"):  # 16 or 32 bits of grey
        values = np.asarray(picture).astype(np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        picture = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
        over = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return picture.convert("RGB")


def find_face(image: UInt8[np.ndarray, "h w 3"]) -> Box | None:
    """The largest face, by OpenCV's Haar cascades at several scales; None where there is none."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    for name in _CASCADES:
        cascade = cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / name))
        for side in _FACE_SIDES:
            scale = side / min(grey.shape)
            small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            found = cascade.detectMultiScale(small, scaleFactor=1.1, minNeighbors=5, minSize=(side // 8, side // 8))
            if len(found):
                x, y, width, height = max(np.asarray(found).tolist(), key=lambda box: box[2] * box[3])
                return (
                    max(int(x / scale), 0),
                    max(int(y / scale), 0),
                    min(int((x + width) / scale), image.shape[1]),
                    min(int((y + height) / scale), image.shape[0]),
                )
    return None


def segment_person(image: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """The mask of the person with the largest face: GrabCut seeded with head and shoulders around the face box.

    Raises:
        ValueError: no face was found.
    """
    face = find_face(image)
    if face is None:
        raise ValueError("no face was found: give a photo that shows one from the front, or a mask of the subject")
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


def list_photos(folder: str | Path) -> list[Path]:
    """Photos of a folder and its subfolders, by name; masks (`NAME.mask.png`) are none.

    Raises:
        ValueError: the folder is missing or holds no photo.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder that holds the photos")
    found = (path for path in root.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    photos = sorted(path for path in found if not path.name.endswith(MASK_SUFFIX))
    if not photos:
        raise ValueError(f"{root} holds no photo: expected files that end in {', '.join(sorted(PHOTO_SUFFIXES))}")
    return photos


@dataclass(frozen=True)
class PhotoSource:
    """Photos as samples; one that cannot be used is left out, and the log says why.

    Beside `NAME.jpg` may lie `NAME.txt`, its caption, and `NAME.mask.png`, its subject's mask (white is the subject).

    Args:
        root: the folder the photos are told relative to.
        photos: the files.
        noun: what the subject is called.
        caption: the template where there is no caption; `{noun}` stands for the noun.
        max_side: short side that larger photos are reduced to, pixels.
    """

    root: Path
    photos: list[Path] = field(repr=False)
    noun: str = "person"
    caption: str = "a photo of a {noun}"
    max_side: int = 1024

    def __post_init__(self) -> None:
        if "{noun}" not in self.caption:
            raise ValueError(f"caption is {self.caption!r}; it must hold {{noun}}, the place of the subject")

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> Sample | None:
        path = self.photos[number]
        try:
            return self._sample(path, f"{number:08d}")
        except ValueError as error:
            told = str(error)
            log.warning("left out: %s", told if str(path) in told else f"{path}: {told}")
            return None

    def _sample(self, path: Path, key: str) -> Sample:
        image = read_photo(path, self.max_side)
        mask = self._mask(path, image)
        caption = self.caption.format(noun=self.noun)
        if path.with_suffix(".txt").is_file():
            caption = " ".join(path.with_suffix(".txt").read_text().split())
        place = re.search(rf"\b{re.escape(self.noun)}\b", caption)
        if place is None:
            raise ValueError(f"its caption {caption!r} does not hold the noun {self.noun!r}")
        segment = Segment(1, self.noun, place.start(), place.end(), bounding_box(mask), int(mask.sum()))
        source = {"file": str(path.relative_to(self.root))}
        return Sample(key, image, mask.astype(np.uint8), caption, (segment,), source)

    def _mask(self, path: Path, image: np.ndarray) -> np.ndarray:
        given = path.with_name(path.stem + MASK_SUFFIX)
        if not given.is_file():
            return segment_person(image)
        with Image.open(given) as opened:
            picture = opened.convert("L")
        size = (image.shape[1], image.shape[0])
        mask = np.asarray(picture.resize(size, Image.Resampling.NEAREST)) > 127
        if not mask.any():
            raise ValueError(f"its mask {given.name} is empty")
        return mask
