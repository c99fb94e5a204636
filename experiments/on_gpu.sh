#!/usr/bin/env bash
# What wants a GPU, in parts of some minutes each: checks, speed, and the experiments whose full setting is too large for a CPU.
#
#     bash experiments/on_gpu.sh check       # all equalities, those of the GPU too; two hundred steps of every model in bf16, compiled
#     bash experiments/on_gpu.sh speed       # every form of attention, 512 to 65,536 tokens: time and memory
#     bash experiments/on_gpu.sh steps       # training steps at GPT-2 124M size; depthwise convolutions
#     bash experiments/on_gpu.sh evidence    # variance and probes at the paper's size
#
# Tables, pictures and <part>.log go to ${RESULTS:-experiments/results}. QUICK=--quick tries a part out on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-} results=${RESULTS:-experiments/results}
run() { echo "+ $*" && "$@" ${QUICK:-} --results "$results"; }
case $part in
check) parts() {
    python test_equivalence.py
    for model in nope composite conv kernelized; do
        python train.py --model $model --preset small --max_iters $([ "${QUICK:-}" ] && echo 2 || echo 200) --out_dir "$(mktemp -d)/$model"
    done
} ;;
speed) parts() { run python experiments/speed.py; } ;;
steps) parts() { run python experiments/speed.py --steps && run python experiments/speed.py --convs; } ;;
evidence) parts() { run python experiments/attention_variance.py && run python experiments/probe_position.py; } ;;
*) echo "on_gpu.sh: one of check, speed, steps, evidence, not '$part'" >&2; exit 2 ;;
esac
mkdir -p "$results"
parts 2>&1 | tee "$results/$part.log"
