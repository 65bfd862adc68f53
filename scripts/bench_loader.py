"""Speed of the way from shards to batches: ratios of medians, taken in turns on one machine.

    python scripts/bench_loader.py                      # toy scenes as large as FFHQ's photos, read at 512 px, one core
    python scripts/bench_loader.py --repeats 15 --parts decode million

Parts: decode (against Pillow alone and plain webdataset), workers (two against one), latents (packed against pictures),
million (an index of a million samples: load, resume in the middle, memory). Writes benchmarks/results/loader.json:
versions, shapes, commit, and of each figure the median and the quartiles. Other work on the machine widens them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from moa_train.data.packing import write_shards
from moa_train.data.shards import Shard, ShardIndex, ShardReader
from moa_train.data.sources.toy_scenes import ToyScenes
from moa_train.data.storage import Storage
from moa_train.data.views import ViewSettings, write_views
from moa_train.training.datamodule import MoADataModule

ROOT = Path(__file__).resolve().parents[1]
PICTURE, RESOLUTION, SUBJECT_SIZE, LATENT, MILLION = 1024, 512, 224, 64, 1_000_000
LIMITS = {
    "stream_over_pillow": 0.9,
    "two_workers_over_one": 1.8,
    "latents_over_pillow": 10.0,
    "latents_over_pictures": 10.0,
    "stream_over_webdataset": 1.0,
    "stream_over_sequential": 1.0,
    "first_batch_seconds": 2.0,
    "index_load_seconds": 1.0,
    "index_bytes": 200e6,
}


class Words:
    """One token a word; the interface of a CLIP tokenizer, without files."""

    model_max_length = 77

    def __call__(self, text: str, padding: Any = None, max_length: int = 0, **options: Any) -> SimpleNamespace:
        ids = [3 + sum(word.encode()) % 1000 for word in text.split()]
        if options.get("add_special_tokens", True):
            ids = [1, *ids, 2]
        return SimpleNamespace(input_ids=ids + [0] * (max_length - len(ids)) if padding else ids)


class Bench:
    """Every method returns figures for the report."""

    def __init__(self, folder: Path, samples: int, batch: int, repeats: int) -> None:
        self.folder, self.samples, self.batch, self.repeats = folder, samples, batch, repeats
        scenes = ToyScenes("train", samples, people=50, size=PICTURE)
        self.index = write_shards(scenes, folder, "train", shard_bytes=16_000_000, image_format="jpg")

    def decode(self) -> dict[str, Any]:
        """The whole way (decode, crop, masks, cut-outs, tokens) against Pillow's decode and resize alone.

        Both decode the whole picture at its full size: after JPEG's own scaling, pixels at a subject's edge would hold
        background, and masks that follow them exactly would be smaller. The stream reduces by a box filter before it
        resizes, Pillow resizes in one go.

        webdataset: its pipeline decodes and resizes the picture alone, too; sequential: it feeds the whole way.
        """
        urls = [str(path) for path in sorted((self.folder / "train").glob("*.tar"))]
        stream = self._batches(self.folder / "train")
        bare = iter(wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").repeat())

        def webdataset() -> None:
            for sample in islice(bare, self.batch):
                np.asarray(sample["jpg"].convert("RGB").resize((RESOLUTION, RESOLUTION)))

        urls_of_all = str(self.folder / "train" / "*.tar")
        sequential = self._batches(urls_of_all, stream="sequential", shard_samples=self.index.shards[0].count)
        runs = {"stream": lambda: next(stream), "pillow": self._pillow(), "webdataset": webdataset}
        told = self._in_turns(runs | {"sequential": lambda: next(sequential)})
        return told | {
            "stream_over_sequential": _ratio(told, "sequential", "stream"),
            "stream_over_pillow": _ratio(told, "pillow", "stream"),
            "stream_over_webdataset": _ratio(told, "webdataset", "stream"),
        }

    def _pillow(self) -> Callable[[], None]:
        """Decodes and resizes a batch of pictures by Pillow alone."""
        reader = ShardReader(self.index)
        places = iter(np.random.default_rng(0).integers(0, self.samples, 10**6).tolist())

        def pillow() -> None:
            for number in islice(places, self.batch):
                image = next(v for k, v in reader.read(number)[1].items() if k == "jpg")
                picture = Image.open(io.BytesIO(image)).convert("RGB").resize((RESOLUTION, RESOLUTION))
                np.asarray(picture)

        return pillow

    def workers(self) -> dict[str, Any]:
        """Batches in order with one process and with two."""
        made = {f"{count}": lambda count=count: self._epochs(count) for count in (1, 2)}
        told = self._in_turns(made, warm=1)
        return told | {"two_workers_over_one": _ratio(told, "1", "2"), "cores": os.cpu_count()}

    def latents(self) -> dict[str, Any]:
        """Batches of stored views against decoded pictures (masks, cut-outs, tokens in both) and Pillow alone.

        Four in a turn: a stream follows its own batches, not those of another that has filled the processor's caches.
        """

        def encode(views: np.ndarray) -> np.ndarray:
            return np.random.default_rng(len(views)).standard_normal((len(views), 2, 4, LATENT, LATENT)).astype("f2")

        write_views(self.index, self.folder / "latents", encode, ViewSettings(RESOLUTION), {"name": "random"})
        pictures = self._batches(self.folder / "train")
        packed = self._batches(self.folder / "latents" / "train", latents=True)
        once = {"pictures": lambda: next(pictures), "latents": lambda: next(packed), "pillow": self._pillow()}
        told = self._in_turns({name: lambda run=run: [run() for _ in range(4)] for name, run in once.items()})
        return told | {
            "latents_over_pillow": _ratio(told, "pillow", "latents"),
            "latents_over_pictures": _ratio(told, "pictures", "latents"),
        }

    def million(self) -> dict[str, Any]:
        """An index of a million samples that lie in a few real shards."""
        location = self._million()
        before = _resident()
        start = time.perf_counter()
        index = ShardIndex.load(location)
        told: dict[str, Any] = {"index_load_seconds": time.perf_counter() - start}
        index.members["shard"].max()  # every page of the map is touched
        told["index_bytes"] = _resident() - before
        data = self._module(location)
        start = time.perf_counter()
        state = {**data.state_dict(), "epoch": 1, "samples_done": MILLION // 2 // self.batch * self.batch}
        data = self._module(location)
        data.load_state_dict(state)
        batches = iter(data.train_dataloader())
        next(batches)
        told["first_batch_seconds"] = time.perf_counter() - start
        reader = ShardReader(index)
        order, resident = data._order().epoch(0)[:, 1], []
        for quarter in np.array_split(order[:200_000], 4):
            for number in quarter.tolist():
                reader.read(number)
            resident.append(_resident())
        told["resident_bytes_after_each_50000_samples"] = resident
        told["growth_bytes"] = resident[-1] - resident[0]
        return told

    def _million(self) -> str:
        folder = self.folder / "million"
        folder.mkdir()
        shard = self.index.shards[0]
        rows = self.index.members[self.index.members["shard"] == 0]
        count = -(-MILLION // len(rows))
        members = np.tile(rows, count)
        members["shard"] = np.repeat(np.arange(count), len(rows))
        shards = []
        for number in range(count):
            name = f"train-{number:06d}.tar"
            (folder / name).symlink_to(self.folder / "train" / shard.name)
            shards.append(Shard(name, shard.count, shard.bytes, shard.sha256))
        ShardIndex(Storage(folder), "train", tuple(shards), members, {}).save()
        return str(folder)

    def _module(self, train: Path | str, **settings: Any) -> MoADataModule:
        chosen = {"num_workers": 0, "batch_size": self.batch, **settings}
        return MoADataModule(train, None, Words(), RESOLUTION, SUBJECT_SIZE, **chosen)

    def _batches(self, train: Path | str, **settings: Any) -> Any:
        return iter(self._module(train, **settings).train_dataloader())

    def _epochs(self, workers: int) -> None:
        """Start-up apart, the time of a fixed number of batches; loaders are kept between turns."""
        kept = self.__dict__.setdefault("_kept", {})
        if workers not in kept:
            kept[workers] = self._batches(self.folder / "train", num_workers=workers)
        for _ in islice(kept[workers], 8):
            pass

    def _in_turns(self, runs: dict[str, Callable[[], Any]], warm: int = 2) -> dict[str, Any]:
        """Seconds of each run: median and quartiles, taken A B A B ... after rounds that do not count."""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.repeats + warm):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if turn >= warm:
                    taken[name].append(time.perf_counter() - start)
        return {"seconds": {name: statistics.quantiles(times, n=4) for name, times in taken.items()}}


def _ratio(told: dict[str, Any], over: str, under: str) -> float:
    return told["seconds"][over][1] / told["seconds"][under][1]


def _resident() -> int:
    """Bytes of memory in use by this process."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def source() -> dict[str, Any]:
    """Versions and commit."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    names = ("torch", "numpy", "pillow", "webdataset")
    versions = {name: version(name) for name in names}
    return {"python": platform.python_version(), "versions": versions, "commit": commit or None}


def main() -> None:
    """Measure, write, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("decode", "workers", "latents", "million")
    parser.add_argument("--samples", type=int, default=64, help="scenes")
    parser.add_argument("--batch", type=int, default=8, help="samples in a batch")
    parser.add_argument("--repeats", type=int, default=11, help="rounds that count")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {
        "picture": PICTURE,
        "resolution": RESOLUTION,
        "subject": SUBJECT_SIZE,
        "batch": args.batch,
        "samples": args.samples,
    }
    report: dict[str, Any] = {"what": "loader", "source": source(), "shapes": shapes | {"repeats": args.repeats}}
    report["limits"] = LIMITS
    report["stream_is"] = (
        "whole batches in bytes: picture and label map decoded at full size, checked, cropped and resized (box filter, "
        "then bicubic), subjects cut out, prompt tokenised; pillow, webdataset: picture decoded and resized (bicubic)"
    )
    report["seconds_are"] = "of a batch (workers: of 8 batches, latents: of 4): lower quartile, median, upper quartile"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.samples, args.batch, args.repeats)
        for part in args.parts:
            report[part] = getattr(bench, part)()
            print(part, json.dumps(report[part], indent=2), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "loader.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
