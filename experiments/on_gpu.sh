#!/usr/bin/env bash
# What needs a GPU, in parts of some minutes each: checks, speed, and experiments too large for a CPU.
#
#     bash experiments/on_gpu.sh check      # all equalities, also the GPU rows; 200 steps of every model in bf16
#     bash experiments/on_gpu.sh speed      # every form of attention, 512 to 65,536 tokens: time and memory
#     bash experiments/on_gpu.sh steps      # training steps at GPT-2 124M size; depthwise convolutions
#     bash experiments/on_gpu.sh variance   # variance of attention at the paper's size
#     bash experiments/on_gpu.sh probes     # probes of the position at the paper's size
#     bash experiments/on_gpu.sh evidence   # variance, then probes
#
# A command that fails does not stop the part: it goes on, names what failed at the end and exits with 1.
# Tables, pictures and <part>.log go to ${RESULTS:-experiments/results}. QUICK=--quick tries a part on a CPU; they go
# to ${RESULTS:-out/quick} then.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
part=${1:-}
results=${RESULTS:-experiments/results}
if [ -n "${QUICK:-}" ]; then results=${RESULTS:-out/quick}; fi
iters=200
if [ -n "${QUICK:-}" ]; then iters=2; fi
failed=()

run() {
    echo "+ $*"
    "$@" || failed+=("$*")
}

experiment() {
    run python "experiments/$1.py" "${@:2}" ${QUICK:-} --results "$results"
}

check() {
    run python test_equivalence.py
    for model in nope composite conv kernelized; do
        run python train.py --model $model --preset small --max_iters $iters --out_dir "$(mktemp -d)/$model"
    done
}

parts() {
    case $part in
    check) check ;;
    speed) experiment speed ;;
    steps) experiment speed --steps; experiment speed --convs ;;
    variance) experiment attention_variance ;;
    probes) experiment probe_position ;;
    evidence) experiment attention_variance; experiment probe_position ;;
    esac
    for command in ${failed[@]+"${failed[@]}"}; do echo "FAILED: $command"; done
    [ ${#failed[@]} -eq 0 ]
}

case $part in
check | speed | steps | variance | probes | evidence) ;;
*) echo "on_gpu.sh: one of check, speed, steps, variance, probes, evidence, not '$part'" >&2; exit 2 ;;
esac
if [ -z "${QUICK:-}" ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null; then
    echo 'on_gpu.sh: there is no CUDA GPU here; QUICK=--quick tries a part on a CPU' >&2
    exit 2
fi
mkdir -p "$results"
parts 2>&1 | tee "$results/$part.log"
