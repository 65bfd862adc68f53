"""A drawn face that OpenCV's cascades take for a real one."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def portrait(width=320, height=400):
    """A drawn person before a blue wall, and the exact mask."""
    picture, mask = Image.new("RGB", (width, height), (60, 110, 170)), Image.new("L", (width, height))
    x, y, r = width // 2, int(height * 0.4), width * 0.22
    draw, inside = ImageDraw.Draw(picture), ImageDraw.Draw(mask)

    def both(shape, box, colour, **more):
        getattr(draw, shape)(box, fill=colour, **more)
        getattr(inside, shape)(box, fill=255, **more)

    both("rounded_rectangle", (x - 2 * r, y + 1.6 * r, x + 2 * r, height + 40), (150, 40, 40), radius=60)
    both("rectangle", (x - 0.45 * r, y + r, x + 0.45 * r, y + 1.9 * r), (205, 160, 130))
    both("ellipse", (x - 1.1 * r, y - 1.5 * r, x + 1.1 * r, y + 0.9 * r), (50, 30, 20))
    both("ellipse", (x - 0.95 * r, y - 1.15 * r, x + 0.95 * r, y + 1.3 * r), (225, 180, 150))
    for side in (-1, 1):
        e = x + side * 0.42 * r
        draw.ellipse((e - 0.3 * r, y - 0.32 * r, e + 0.3 * r, y + 0.12 * r), fill=(165, 115, 95))
        draw.rectangle((e - 0.28 * r, y - 0.42 * r, e + 0.28 * r, y - 0.28 * r), fill=(60, 40, 30))
        draw.ellipse((e - 0.2 * r, y - 0.18 * r, e + 0.2 * r, y + 0.06 * r), fill=(240, 240, 240))
        draw.ellipse((e - 0.1 * r, y - 0.16 * r, e + 0.1 * r, y + 0.05 * r), fill=(40, 25, 20))
    nose = [
        (x - 0.06 * r, y - 0.1 * r),
        (x + 0.06 * r, y - 0.1 * r),
        (x + 0.2 * r, y + 0.45 * r),
        (x - 0.2 * r, y + 0.45 * r),
    ]
    draw.polygon(nose, fill=(235, 195, 165))
    draw.ellipse((x - 0.2 * r, y + 0.4 * r, x + 0.2 * r, y + 0.5 * r), fill=(150, 100, 80))
    draw.ellipse((x - 0.38 * r, y + 0.68 * r, x + 0.38 * r, y + 0.86 * r), fill=(150, 60, 60))
    return picture.filter(ImageFilter.GaussianBlur(width / 130)), np.asarray(mask) > 0
