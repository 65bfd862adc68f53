#!/usr/bin/env bash
# Everything that needs an accelerator: correctness on CUDA against the CPU, a short run with a resume, speed and memory tables.
#
#   scripts/on_gpu.sh              on a machine with CUDA; about 25 minutes; writes benchmarks/results/*.json
#   scripts/on_gpu.sh --dry-run    the same commands on the CPU at toy size, to see that they work; writes to a temporary folder
#
# PYTHON=... picks the interpreter (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 WANDB_MODE=offline

case "${1:-}" in
  "") device=cuda trainer=gpu results=benchmarks/results ;;
  --dry-run) device=cpu trainer=cpu results=$(mktemp -d) ;;
  *) echo "usage: scripts/on_gpu.sh [--dry-run]" >&2; exit 2 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }

say "correctness on $device"
MOA_TEST_DEVICE=$device "$python" -m pytest tests/gpu -q -p no:cacheprovider

say "a short run, and its resume"
"$python" -m moa_train.data toy out="$work/toy" train=64 validation=16 test=0
run=("$python" -m moa_train.train experiment=toy trainer=$trainer run_dir="$work/run" data.batch_size=8
     data.train="$work/toy/train" data.validation="$work/toy/validation" validate_every=null callbacks.samples=null)
"${run[@]}" max_steps=2
last="$work/run/checkpoints/last.ckpt"
"${run[@]}" max_steps=4 ckpt="$last"
one=(trainer.accelerator=${device/cuda/gpu} trainer.devices=1)
"${run[@]}" trainer=fsdp "${one[@]}" max_steps=6 ckpt="$last"
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)'; then
  "${run[@]}" trainer=deepspeed "${one[@]}" max_steps=8 ckpt="$last"
fi
"$python" -m moa_train.export ckpt="$work/run/checkpoints/last.ckpt" out="$work/personalized.safetensors"

say "pictures and the benchmark"
"$python" -m moa_train.eval weights="$work/personalized.safetensors" out="$work/eval" device=$device \
  people=4 contexts=1 steps=2

say "the toy prior, trained for longer than a CPU allows"
pretrain=("$python" -m moa_train.pretrain work="$work/pretrain" out="$work/toy_prior" accelerator=$device)
if [ "$device" = cuda ]; then
  "${pretrain[@]}" autoencoder.steps=6000 text_to_image.steps=12000 text_to_image.batch_size=64
else
  "${pretrain[@]}" scenes=200 held_out_scenes=100 autoencoder.steps=2 text_to_image.steps=2 image_encoder.steps=2 \
    probe.steps=2 figure_samples=8 figure_steps=2
fi
mkdir -p "$results"
cp "$work/toy_prior/figures.json" "$results/toy_prior-$device.json"

say "speed and memory: $results"
if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  for latent in 32 64 96; do
    "$python" scripts/bench_unet.py --size sd15 --device cuda --latent $latent --out "$results"
  done
else
  "$python" scripts/bench_unet.py --size tiny --device cpu --repeats 2 --out "$results"
fi
say "done; results in $results"
