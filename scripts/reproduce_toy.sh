#!/usr/bin/env bash
# The comparison of docs/toy_benchmark.md from nothing: MoA, the baselines and an ablation, each trained for as many steps from the
# bundled toy prior, exported, measured, and gathered into one page with pictures.
#
#   scripts/reproduce_toy.sh                            # to runs/toy-benchmark: about 20 minutes a method on two CPU cores
#   STEPS=50 METHODS="moa ip_adapter" scripts/reproduce_toy.sh /tmp/short data.batch_size=8     # further words go to moa-train
#
# What was begun goes on where it stopped: run the same command again.
set -euo pipefail

out=${1:-runs/toy-benchmark}
shift || true
steps=${STEPS:-600}
methods=${METHODS:-moa fastcomposer ip_adapter no_router}
people=${PEOPLE:-8}
[ -d data/toy/train ] || moa-data toy

# The subject's error alone for 60 % of the run, then the background's and the router loss, too
recipe=(loss.mask_warmup=0.6 loss.router.weight=0.1 loss.router.warmup=0.6 loss.router.ramp=0.1)
for method in $methods; do
    case $method in
        moa) settings=("${recipe[@]}") ;;
        no_router) settings=("${recipe[@]}" loss.router.weight=0.0) ;;
        fastcomposer) settings=(model=fastcomposer optim.lr=3e-4) ;; # the whole U-Net trains
        *) settings=(model="$method") ;;
    esac
    moa-train run_dir="$out/$method" ckpt=auto max_steps="$steps" validate_every=200 optim=adamw_cosine \
        evaluate="{people:$people}" "${settings[@]}" "$@"
done
moa-eval collect="$out"
