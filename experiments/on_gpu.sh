#!/usr/bin/env bash
# What needs a GPU, in parts of some minutes each. Minutes are estimates for one H100 with 16 CPU cores; compiling takes
# most of them. One call runs any parts, in the order given:
#
#     bash experiments/on_gpu.sh check steps speed
#
#     part       minutes  what                                                            needs
#     mend             4  what was wrong in the first run and is mended since: composite and conv, compiled; whether the
#                         kernels of triton_forms.py, which no GPU has run, are right
#     proofs           4  chapter 8 of test_equivalence.py on the GPU, the others on the CPU
#     trainings        4  every model trains, resumes, samples; torchrun; GPT-2's size
#     check            8  proofs, then trainings
#     candidates       5  forms of single parts of a layer; training steps with the kernels of triton_forms.py
#     steps            5  training steps at GPT-2 124M size, the kernels that take their time
#     more-steps       6  the same with texts of 8,192 tokens and by cuDNN
#     speed            4  every form of attention, 512 to 65,536 tokens: time and memory
#     variance         1  variance of attention at the paper's size
#     probes           5  probes of the position at the paper's size
#     curves           9  seven schemes at GPT-2 124M size, equal steps                   $CORPORA/enwik8.xz
#     glue             9  five schemes as BERT-small read enwik8, then learn GLUE         $CORPORA/enwik8.xz, glue/
#     evidence        24  variance, probes, curves, glue
#
# Where a command may take ten minutes and only what it leaves in a folder comes back, end it before and pack the
# results. Nine commands, each under ten minutes, in this order; the first two are for a GPU that is had for fifteen:
#
#     export TMPDIR=/dev/shm CORPORA=corpora RESULTS=out/gpu
#     timeout 540 bash experiments/on_gpu.sh mend candidates;                          tar czf FOLDER/0.tgz out/gpu
#     timeout 300 bash experiments/on_gpu.sh steps;                                    tar czf FOLDER/1.tgz out/gpu
#     timeout 560 bash experiments/on_gpu.sh check;                                    tar czf FOLDER/2.tgz out/gpu
#     timeout 560 bash experiments/on_gpu.sh more-steps;                               tar czf FOLDER/3.tgz out/gpu
#     timeout 560 bash experiments/on_gpu.sh speed variance;                           tar czf FOLDER/4.tgz out/gpu
#     SCHEMES='nope absolute composite' timeout 560 bash experiments/on_gpu.sh curves; tar czf FOLDER/5.tgz out/gpu
#     SCHEMES='rope alibi conv nprf+rpe' timeout 560 bash experiments/on_gpu.sh curves; tar czf FOLDER/6.tgz out/gpu
#     timeout 560 bash experiments/on_gpu.sh glue;                                     tar czf FOLDER/7.tgz out/gpu
#     timeout 560 bash experiments/on_gpu.sh probes;                                   tar czf FOLDER/8.tgz out/gpu
#
# A table is written row by row, a log line by line, so what was done when the time ended is there. A command that fails
# does not stop a part: it is named at the end, and the script exits with 1. Nothing is downloaded. Without `datasets`
# all works; without matplotlib there are no pictures.
#
# RESULTS: folder of tables, pictures and logs (default experiments/results). CORPORA: folder with enwik8.xz, with
# glue/CoLA/train.tsv.xz, ..., and with tiktoken_cache/, the vocabulary of GPT-2 (default corpora). TMPDIR: checkpoints,
# up to 3 GB at a time. NANOGPT: a checkout of nanoGPT, timed in the steps, too. SCHEMES: of curves and glue. STEPS: of
# their trainings. SEEDS: of fine-tuning. QUICK=--quick tries a part on a CPU at small sizes (proofs compile there, too:
# many minutes); RESULTS is out/quick then.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=8
quick=${QUICK:-}
results=${RESULTS:-$([ -n "$quick" ] && echo out/quick || echo experiments/results)}
corpora=${CORPORA:-corpora}
export TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-$corpora/tiktoken_cache}
models='nope composite conv kernelized rope alibi tisa cape'
tiny=(--max_iters 4 --n_layer 2 --n_embd 32 --n_head 2 --block_size 64 --batch_size 8 --micro_batch_size 4
    --eval_tokens 2048 --warmup_iters 1 --log_interval 2)  # if quick
small=(--preset small --n_layer 2 --max_iters 200 --warmup_iters 20)
rehearse=${quick:+--rehearse}
failed=()

run() {
    echo "+ $*"
    timeout --foreground 540 "$@" || failed+=("$*")
}

experiment() {
    run python3 "experiments/$1.py" "${@:2}" $quick --results "$results"
}

# at_once WORD...: the function `job` with each word, all at the same time (quick: in turn); the output of each is in
# $results/<part>-<word>.log and follows when all are done
at_once() {
    local word
    local -A process
    for word in "$@"; do
        (failed=(); job "$word"; tell_failed) >"$results/$part-$word.log" 2>&1 &
        process[$word]=$!
        [ -z "$quick" ] || wait $!
    done
    for word in "$@"; do
        wait "${process[$word]}" || failed+=("$part $word")
        cat "$results/$part-$word.log"
    done
}

tell_failed() {
    local command
    for command in ${failed[@]+"${failed[@]}"}; do echo "FAILED: $command"; done
    [ ${#failed[@]} -eq 0 ]
}

proofs() {
    job() {
        case $1 in
        cpu) for chapter in 1 2 3 4 5 6 7; do run python3 test_equivalence.py --chapter $chapter; done ;;
        baselines) run python3 test_equivalence.py --chapter 8 $rehearse rope alibi tisa cape ;;
        *) run python3 test_equivalence.py --chapter 8 $rehearse "$1" ;;
        esac
    }
    at_once composite conv kernelized nope baselines cpu
}

mend() {
    job() {
        case $1 in
        proof-*) run python3 test_equivalence.py --chapter 8 $rehearse "${1#proof-}" ;;
        kernels-*) run python3 experiments/triton_forms.py --only "${1#kernels-}" ;;
        masked-*) train --model "${1#masked-}" "${small[@]}" --objective masked --out_dir "$scratch/$1" ;;
        *) train --model "$1" "${small[@]}" --out_dir "$scratch/$1" ;;
        esac
    }
    local kernels='kernels-near kernels-cudnn kernels-convolution kernels-chunks'
    [ -z "$quick" ] || kernels=
    run python3 prepare_data.py --dataset python
    at_once proof-composite proof-conv composite masked-conv $kernels
}

# train.py; the last line is the peak memory of the GPU
train() {
    local peak='print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")'
    run python3 -c "import torch, train; train.main(); $peak" "$@" ${quick:+"${tiny[@]}"}
}

trainings() {
    local longer=220
    [ -z "$quick" ] || longer=6
    job() {
        local out=$scratch/$1
        case $1 in
        masked-*)
            train --model "${1#masked-}" "${small[@]}" --objective masked --out_dir "$out"
            run python3 sample.py --out_dir "$out" --prompt 'if self._na[MASK]e is not None:' ;;
        torchrun)
            run python3 -m torch.distributed.run --standalone --nproc_per_node=1 \
                train.py --model composite "${small[@]}" --out_dir "$out" ${quick:+"${tiny[@]}"} ;;
        *)
            train --model "$1" "${small[@]}" --out_dir "$out"
            run python3 sample.py --out_dir "$out" --prompt 'def ' --max_new_tokens 100 ;;
        esac
    }
    run python3 prepare_data.py --dataset python
    at_once $models masked-composite masked-conv masked-kernelized torchrun
    run python3 train.py --resume --out_dir "$scratch/composite" --max_iters $longer
    run python3 train.py --eval_only --out_dir "$scratch/composite"
    for model in nope composite; do  # the vocabulary of GPT-2: 50,257, padded
        train --model $model --preset gpt2 --vocab_size 50304 --batch_size 64 --max_iters 20 --warmup_iters 10 \
            --log_interval 5 --eval_tokens 65536 --out_dir "$scratch/gpt2-$model"
        rm -rf "$scratch/gpt2-$model"
    done
}

enwik8() {  # as GPT-2's tokens; a quarter of a minute
    run python3 prepare_data.py --dataset enwik8-gpt2 --path "$corpora/enwik8.xz" --tokenizer gpt2
}

flags() {  # of a scheme, as in compare.py
    case $1 in
    absolute) echo --model nope --absolute ;;
    fixed) echo --model composite --no-dynamic ;;
    dynamic) echo --model composite --no-fixed ;;
    nprf+rpe) echo --model kernelized ;;
    *) echo --model "$1" ;;
    esac
}

curves() {
    local steps=${STEPS:-300} out
    enwik8
    for scheme in ${SCHEMES:-nope absolute rope alibi composite conv nprf+rpe}; do
        out=$scratch/curves/$scheme
        train $(flags "$scheme") --dataset enwik8-gpt2 --preset gpt2 --batch_size 32 --max_iters "$steps" \
            --warmup_iters 30 --eval_interval 150 --eval_tokens 262144 --out_dir "$out"
        mkdir -p "$results/curves/$scheme"
        run cp "$out/log.csv" "$out/config.json" "$results/curves/$scheme"
        rm -rf "$out"
    done
    run python3 experiments/curves.py "$results"/curves/*/ --out "$results/curves.png"
}

glue() {
    local steps=${STEPS:-4000}
    job() {
        local out=$scratch/$1 results=$results/glue-$1
        mkdir -p "$results"
        train $(flags "$1") --preset bert_small --dataset enwik8-gpt2 --max_iters "$steps" --warmup_iters 400 \
            --eval_interval 2000 --out_dir "$out"
        run cp "$out/log.csv" "$out/config.json" "$results"
        for task in order cola sst2 mrpc stsb rte; do
            experiment finetune_glue --out_dirs "$out" --tasks $task --seeds "${SEEDS:-1}" --glue "$corpora/glue"
        done
    }
    enwik8
    at_once ${SCHEMES:-composite absolute fixed dynamic nope}
}

other=(${NANOGPT:+--nanogpt "$NANOGPT"})

steps() {
    job() { run python3 experiments/speed.py --steps --models "$1" --results "$scratch/$1"; }
    [ -n "$quick" ] || at_once composite conv kernelized  # compiled at the same time, and then in the cache
    experiment speed --steps --models nope composite conv kernelized ${NANOGPT:+nanoGPT} \
        ${other[@]+"${other[@]}"} --kernels
}

candidates() {
    local by_hand=(composite-triton composite-triton-cudnn conv-triton conv-triton-cudnn kernelized-triton)
    if [ -z "$quick" ]; then
        job() { run python3 experiments/speed.py --steps --models "$1" --results "$scratch/$1"; }
        at_once composite-triton composite-triton-cudnn kernelized-triton
        run python3 experiments/speed.py --steps --models nope "${by_hand[@]}" --kernels --results "$results/candidates"
    fi
    experiment speed --parts
}

more_steps() {
    [ -z "$quick" ] || return
    experiment speed --steps ${other[@]+"${other[@]}"} --cudnn
    experiment speed --steps ${other[@]+"${other[@]}"} --block_size 8192
}

one_part() {
    case $part in
    more-steps) more_steps ;;
    speed) experiment speed ;;
    variance) experiment attention_variance ;;
    probes) experiment probe_position ;;
    mend | candidates | proofs | trainings | steps | curves | glue) $part ;;
    esac
    rm -rf "$scratch"
    tell_failed
}

parts=()
for part in "${@:-}"; do
    case $part in
    mend | candidates | proofs | trainings | steps | more-steps | speed | variance | probes | curves | glue)
        parts+=("$part") ;;
    check) parts+=(proofs trainings) ;;
    evidence) parts+=(variance probes curves glue) ;;
    *)
        echo "on_gpu.sh: any of mend, candidates, check (proofs, trainings), steps, more-steps, speed," \
            "evidence (variance, probes, curves, glue), not '$part'" >&2
        exit 2 ;;
    esac
done
if [ -z "$quick" ] && ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null; then
    echo 'on_gpu.sh: there is no CUDA GPU here; QUICK=--quick tries a part on a CPU' >&2
    exit 2
fi
mkdir -p "$results"
code=0
for part in "${parts[@]}"; do
    scratch=$(mktemp -d)
    began=$SECONDS
    one_part 2>&1 | tee "$results/$part.log"
    [ "${PIPESTATUS[0]}" = 0 ] || code=1
    echo "$part: $((SECONDS - began)) seconds"
done
exit $code
