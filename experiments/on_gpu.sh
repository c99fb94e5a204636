#!/usr/bin/env bash
# What to run when a GPU can be had: three parts of at most four minutes each. Each prints and writes row by row.
#
#     bash experiments/on_gpu.sh right       # are values and gradients right, do models train, resume, sample?
#     bash experiments/on_gpu.sh fast        # training steps, attention and decoding; NANOGPT=PATH: nanoGPT's model too
#     bash experiments/on_gpu.sh evidence    # loss over steps and seconds at GPT-2's size, on enwik8 as GPT-2 tokens
#
# TINY=1 rehearses a part on a CPU. RESULTS: folder of tables and logs (default out/gpu). SECONDS_LEFT: limit of a part.
# ENWIK8: enwik8.xz, for evidence; without a network the GPT-2 vocabulary must be in TIKTOKEN_CACHE_DIR.
# A command that fails does not stop a part: it is named at the end, and the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=8
part=${1:-} tiny=${TINY:-} results=${RESULTS:-out/gpu} limit=${SECONDS_LEFT:-240}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$results"
failed=()
size=(--preset small --max_iters 100 --warmup_iters 20 --eval_interval 100 --log_interval 1)
speed=(python3 experiments/speed.py)
lengths=(--lengths 512 1024 4096 16384 32768)
data=(--dataset enwik8 --data_dir out/gpu-data)
if [ -n "$tiny" ]; then
    size=(--max_iters 10 --eval_interval 5 --n_layer 2 --n_embd 32 --n_head 2 --batch_size 8 --eval_tokens 2048)
    speed+=(--quick)
    lengths=(--lengths 64)
    data=(--dataset shakespeare)
elif ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo 'on_gpu.sh: there is no CUDA GPU here; TINY=1 rehearses a part on a CPU' >&2
    exit 2
fi

run() {  # a command, within what is left of the part's time
    echo "+ $* ($SECONDS s)"
    timeout --foreground $((limit > SECONDS ? limit - SECONDS : 1)) "$@" || failed+=("$*")
}

right() {
    local loss_falls='import csv, sys  # and gradient norms stay below 10
rows = list(csv.DictReader(open(sys.argv[1])))
losses, norms = [[float(row[key]) for row in rows if row[key]] for key in ("val_loss", "grad_norm")]
sys.exit(not (losses[-1] < losses[0] and all(norm < 10 for norm in norms)))'
    run python3 -m pytest -q -x tests/test_gpu.py
    for model in composite conv kernelized; do
        run python3 train.py --model $model "${size[@]}" --out_dir "$scratch/$model"
        cp "$scratch/$model/log.csv" "$results/right-$model.csv"
        run python3 -c "$loss_falls" "$results/right-$model.csv"
    done
    run python3 train.py --resume --out_dir "$scratch/composite" --max_iters 110
    run python3 sample.py --out_dir "$scratch/composite" --prompt 'To be' --max_new_tokens 100
    run python3 -m torch.distributed.run --standalone --nproc_per_node=1 train.py --model composite "${size[@]}" \
        --out_dir "$scratch/torchrun"
}

fast() {
    local schemes=(nope composite 'dense: --model composite --attention dense' conv-output nprf+rpe rope alibi)
    run "${speed[@]}" --results "$results/steps" --parts steps --schemes "${schemes[@]}" \
        ${NANOGPT:+--nanogpt "$NANOGPT"}
    run "${speed[@]}" --results "$results/attention" --parts attention "${lengths[@]}"
    run "${speed[@]}" --results "$results/decode" --parts decode
}

evidence() {
    local long=(--preset gpt2 --batch_size 32 --max_iters 150 --warmup_iters 30 --eval_interval 50 --eval_tokens 262144)
    [ -z "$tiny" ] || long=("${size[@]}")
    [ -n "$tiny" ] || run python3 prepare_data.py "${data[@]}" --path "${ENWIK8:-enwik8.xz}" --tokenizer gpt2
    [ -n "$tiny" ] || [ -f out/gpu-data/enwik8/meta.json ] || return
    for scheme in nope rope alibi composite conv; do
        run python3 train.py --model $scheme "${data[@]}" "${long[@]}" --out_dir "$scratch/$scheme"
        install -D "$scratch/$scheme/log.csv" "$results/curves/$scheme/log.csv"
    done
    run python3 experiments/curves.py "$results"/curves/*/ --out "$results/curves.png"
}

case $part in
right | fast | evidence) $part > >(tee "$results/$part.log") 2>&1 ;;
*) echo "on_gpu.sh: right, fast or evidence, not '$part'" >&2 && exit 2 ;;
esac
for command in ${failed[@]+"${failed[@]}"}; do echo "FAILED: $command" | tee -a "$results/$part.log"; done
[ ${#failed[@]} -eq 0 ]
