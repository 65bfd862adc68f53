"""Speed and memory of the MoA U-Net against the plain one: ratios of medians, taken in turns on one machine.

    python scripts/bench_unet.py                         # Stable Diffusion 1.5's size, random weights, on CUDA
    python scripts/bench_unet.py --size tiny --device cpu

Writes benchmarks/results/unet-SIZE-DEVICE-LATENT.json: machine, versions, shapes, commit, times, ratios, limits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moa_train import losses
from moa_train.checkpoint import export_personalized
from moa_train.denoiser import Denoiser
from moa_train.model.unet import add_moa, cast_prior, personalized_state_dict, trainable_parameters
from moa_train.symbols import Conditioning

ROOT = Path(__file__).resolve().parents[1]
TOKENS, SLOTS, SUBJECTS = 77, 4, 2
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "tiny": {
        "sample_size": 16,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}
LIMITS = {
    "forward": {32: 1.205, 64: 1.29, 96: 1.415},  # by latent, SD 1.5: 1.03 x the FLOPs that the second attention adds
    "generation": 1.07,
    "training_step": 0.92,
    "training_memory": 0.55,
    "losses_and_recorder_share": 0.02,
    "checkpoint_bytes": 1.6e9,
    "export_bytes": 190e6,
}


class Bench:
    """One size on one device; every method returns numbers for the report."""

    def __init__(
        self, size: str, device: torch.device, latent: int, batch: int, train_batch: int, repeats: int
    ) -> None:
        self.settings = SIZES[size]
        self.device, self.latent, self.batch, self.train_batch, self.repeats = (
            device,
            latent,
            batch,
            train_batch,
            repeats,
        )
        self.half = torch.bfloat16
        self.image_dim = 768 if size == "sd15" else 16

    # -------------------------------------------------------------------------------------------------------- inference
    def forward(self) -> dict[str, Any]:
        """Dense forward, and one guided step (half of the rows see the prior alone), against the plain U-Net."""
        plain = nn.Module.to(self._plain(), self.half).eval()
        denoiser = nn.Module.to(Denoiser(add_moa(self._plain(), self.image_dim)), self.half).eval()
        with torch.no_grad():
            runs = {
                "plain": lambda: self._call(plain, self.batch),
                "moa": lambda: self._moa(denoiser, self.batch, 0),
                "plain_guided": lambda: self._call(plain, 2 * self.batch),
                "moa_guided": lambda: self._moa(denoiser, 2 * self.batch, self.batch),
            }
            seconds = self._in_turns(runs)
            flops = {name: _flops(run) for name, run in runs.items()}
        return {
            "seconds": seconds,
            "flops": flops,
            "forward": seconds["moa"] / seconds["plain"],
            "forward_flop_ratio": flops["moa"] / flops["plain"],
            "generation": seconds["moa_guided"] / seconds["plain_guided"],
            "generation_flop_ratio": flops["moa_guided"] / flops["plain_guided"],
        }

    # --------------------------------------------------------------------------------------------------------- training
    def training(self) -> dict[str, Any]:
        """MoA's step against fine-tuning the whole U-Net (what FastComposer does), each also alone for its memory."""
        memory = {name: self._peak(make) for name, make in (("whole", self._whole), ("moa", self._personalized))}
        seconds = self._in_turns(
            {"whole": self._whole(), "moa": self._personalized(), "moa_bare": self._personalized(bare=True)}
        )
        return {
            "seconds": seconds,
            "memory_bytes": memory,
            "training_step": seconds["moa"] / seconds["whole"],
            "training_memory": memory["moa"] / memory["whole"] if memory["whole"] else None,
            "losses_and_recorder_share": 1.0 - seconds["moa_bare"] / seconds["moa"],
        }

    def files(self) -> dict[str, Any]:
        """Bytes and seconds of an export (bfloat16); bytes, counted, of a checkpoint (float32 weights, EMA, Adam)."""
        state = personalized_state_dict(add_moa(self._plain("cpu"), self.image_dim))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "personalized.safetensors"
            start = time.perf_counter()
            half = {name: value.to(self.half) for name, value in state.items()}
            export_personalized(path, half, {"moa": {}, "prior": {}, "step": 0})
            seconds, size = time.perf_counter() - start, path.stat().st_size
        count = sum(value.numel() for value in state.values())
        counted = 4 * 4 * count
        return {
            "trained_parameters": count,
            "export_bytes": size,
            "export_seconds": seconds,
            "checkpoint_bytes": counted,
        }

    # ---------------------------------------------------------------------------------------------------------- helpers
    def _plain(self, device: torch.device | str | None = None) -> UNet2DConditionModel:
        torch.manual_seed(0)
        with torch.device(device or self.device):
            return UNet2DConditionModel(**self.settings)

    def _whole(self) -> Callable[[], None]:
        unet = self._plain().train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=self.device.type == "cuda")
        return self._step(optimizer, lambda: self._call(unet, self.train_batch).float().square().mean())

    def _personalized(self, bare: bool = False) -> Callable[[], None]:
        unet = cast_prior(add_moa(self._plain(), self.image_dim), self.half)
        denoiser = Denoiser(unet)
        trained = [parameter for group in trainable_parameters(unet).values() for _, parameter in group]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=self.device.type == "cuda")
        mask = torch.zeros(self.train_batch, SLOTS, self.latent, self.latent, device=self.device)
        mask[:, :SUBJECTS, : self.latent // 2, : self.latent // 2] = 1.0

        def loss() -> torch.Tensor:
            noisy, timesteps, conditioning = self._inputs(self.train_batch, 0)
            prediction, seen = denoiser(noisy, timesteps, conditioning, record=not bare)
            foreground = mask.amax(dim=1, keepdim=True)
            total = losses.masked_reconstruction(prediction, torch.zeros_like(prediction), foreground)
            if not bare:
                total = total + 0.01 * losses.router_loss(losses.mean_prior_routing(seen, mask.shape[-2:]), foreground)
                attention = losses.mean_subject_attention(seen, mask.shape[-2:])
                total = total + 0.001 * losses.object_loss(attention, mask, conditioning.subject_present)
            return total.mean()

        return self._step(optimizer, loss)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            with torch.autocast(self.device.type, self.half):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _inputs(self, rows: int, prior_rows: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        generator = torch.Generator(self.device).manual_seed(0)
        draw = {"device": self.device, "generator": generator}
        present = torch.arange(SLOTS, device=self.device).expand(rows, SLOTS) < SUBJECTS
        conditioning = Conditioning(
            torch.randn(rows, TOKENS, self.settings["cross_attention_dim"], **draw),
            torch.randn(rows, SLOTS, self.image_dim, **draw),
            torch.arange(SLOTS, device=self.device).expand(rows, SLOTS) + 4,
            present,
            prior_rows,
        )
        noisy = torch.randn(rows, 4, self.latent, self.latent, **draw)
        return noisy, torch.full((rows,), 500, device=self.device), conditioning

    def _call(self, unet: nn.Module, rows: int) -> torch.Tensor:
        noisy, timesteps, conditioning = self._inputs(rows, 0)
        kind = unet.dtype
        return unet(noisy.to(kind), timesteps, conditioning.prior_tokens.to(kind), return_dict=False)[0]

    def _moa(self, denoiser: Denoiser, rows: int, prior_rows: int) -> torch.Tensor:
        noisy, timesteps, conditioning = self._inputs(rows, prior_rows)
        conditioning = conditioning.to(self.device, self.half)
        return denoiser(noisy.to(self.half), timesteps, conditioning, record=False)[0]

    def _in_turns(self, runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each run, taken A B A B ... after two rounds that do not count."""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.repeats + 2):
            for name, run in runs.items():
                self._wait()
                start = time.perf_counter()
                run()
                self._wait()
                if turn >= 2:
                    taken[name].append(time.perf_counter() - start)
        return {name: statistics.median(times) for name, times in taken.items()}

    def _peak(self, make: Callable[[], Callable[[], None]]) -> int | None:
        """Peak bytes on the device over two steps with nothing else there; None without CUDA."""
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = make()
        step()
        step()
        self._wait()
        return torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def machine(device: torch.device) -> dict[str, Any]:
    """Where the numbers were taken, and of which source."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True).stdout
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cpu_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "commit": commit or None,
        "uncommitted_changes": bool(changed),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure, write, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd15", help="architecture (default: sd15)")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--latent", type=int, help="latent pixels along an edge (default: the architecture's own)")
    parser.add_argument("--batch", type=int, default=4, help="pictures in a forward pass")
    parser.add_argument("--train-batch", type=int, default=4, help="pictures in a training step")
    parser.add_argument("--repeats", type=int, default=20, help="rounds that count")
    parser.add_argument(
        "--parts", nargs="+", choices=("forward", "training", "files"), default=["forward", "training", "files"]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    latent = args.latent or SIZES[args.size]["sample_size"]
    bench = Bench(args.size, device, latent, args.batch, args.train_batch, args.repeats)
    shapes = {"latent": latent, "batch": args.batch, "train_batch": args.train_batch, "repeats": args.repeats}
    report: dict[str, Any] = {
        "what": f"unet {args.size}",
        "machine": machine(device),
        "shapes": shapes,
        "limits": LIMITS,
    }
    for part in args.parts:
        report[part] = getattr(bench, part)()
        print(part, json.dumps({k: v for k, v in report[part].items() if not isinstance(v, dict)}, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"unet-{args.size}-{device.type}-{latent}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
