"""Writes pictures in the layout of FastComposer's preprocessed FFHQ."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CAPTION = "a man and a woman with a dog"
PEOPLE = [
    {"id": 5, "bbox": [0, 0, 9, 9], "coco_label": "person", "start": 0, "end": 5},
    {"id": 300, "bbox": [0, 0, 9, 9], "coco_label": "person", "start": 10, "end": 17},
    {"id": 7, "bbox": [0, 0, 9, 9], "coco_label": "dog", "start": 23, "end": 28},
]
"""A man on the left, a woman on the right whose id needs 16 bits, a dog; boxes are wrong on purpose."""


def label_map(width=48, height=40):
    labels = np.zeros((height, width), dtype=np.int64)
    labels[4:30, 2:20] = 5
    labels[10:36, 24:40] = 300
    labels[37:39, 0:9] = 7
    return labels


def jpeg(number=0, width=48, height=40):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def npy(labels):
    file = io.BytesIO()
    np.save(file, labels)
    return file.getvalue()


def picture(number=0, caption=CAPTION, segments=PEOPLE, labels=None):
    """The three files of one picture by suffix."""
    told = json.dumps({"caption": caption, "segments": segments}).encode()
    return {"jpg": jpeg(number), "json": told, "npy": npy(label_map() if labels is None else labels)}


def layout(pictures, train, test):
    """The files of a data set by their path; `pictures`: id -> files by suffix."""
    files = {f"{key[:5]}/{key}.{suffix}": content for key, own in pictures.items() for suffix, content in own.items()}
    lists = {"image_ids_train.txt": train, "image_ids_test.txt": test, "image_ids.txt": [*train, *test]}
    return files | {name: "".join(f"{key}\n" for key in ids).encode() for name, ids in lists.items()}


def write_folder(files, folder):
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_tar(files, path, root="", mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(root + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
