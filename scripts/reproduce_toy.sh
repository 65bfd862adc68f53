#!/usr/bin/env bash
# The comparison of docs/toy_benchmark.md from nothing: MoA, the baselines and an ablation, each trained for as many steps from the
# bundled toy prior, exported, measured, and gathered into one page with pictures.
#
#   scripts/reproduce_toy.sh                            # to runs/toy-benchmark: about 20 minutes a method on two CPU cores
#   SEEDS="0 1" scripts/reproduce_toy.sh                # each method trained with two seeds
#   METHODS="narrow_moa narrow_fastcomposer" scripts/reproduce_toy.sh runs/toy-narrow     # trained on one place, measured in all
#   STEPS=50 METHODS="moa ip_adapter" scripts/reproduce_toy.sh /tmp/short data.batch_size=8     # further words go to moa-train
#
# What was begun goes on where it stopped: run the same command again.
set -euo pipefail

out=${1:-runs/toy-benchmark}
shift || true
steps=${STEPS:-600}
methods=${METHODS:-moa fastcomposer ip_adapter no_router}
seeds=${SEEDS:-0}
people=${PEOPLE:-8}
[ -d data/toy/train ] || moa-data toy

for seed in $seeds; do
    for method in $methods; do
        settings=(seed="$seed")
        case $method in narrow_*)
            [ -d data/toy-narrow/train ] || moa-data toy out=data/toy-narrow 'contexts=[in the living room]' 'subjects=[1,1]'
            settings+=(data.train=data/toy-narrow/train)
            ;;
        esac
        case ${method#narrow_} in
            no_router) settings+=(loss.router.weight=0.0) ;;
            unmasked) settings+=(loss.mask_probability=0.0 loss.mask_warmup=0.0) ;;
            fastcomposer | finetune) settings+=(model="${method#narrow_}" optim.lr=3e-4) ;; # the whole U-Net trains
            *) settings+=(model="${method#narrow_}") ;;
        esac
        moa-train run_dir="$out/$method-$seed" ckpt=auto max_steps="$steps" validate_every=200 optim=adamw_cosine \
            evaluate="{people:$people}" "${settings[@]}" "$@"
    done
done
moa-eval collect="$out"
