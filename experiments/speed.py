"""
How fast are training steps, attention alone, and decoding?

    python experiments/speed.py --quick                              # small, a minute on a CPU: does it run?
    python experiments/speed.py --nanogpt ../nanoGPT --chang ../BERT_Convolutions
    python experiments/speed.py --recipe --nanogpt ../nanoGPT        # minutes: both programs train on Shakespeare

The parts:
    steps       whole training steps: on a CPU the tiny preset in float32 and bfloat16, on CUDA GPT-2 124M with 32
                sequences of 1,024 tokens, bfloat16, compiled. The ratio is over nope. With --nanogpt, nanoGPT's model
                takes part; `speed` is its time (on a CPU in float32) over each model's
    attention   attention alone over the length, forward and backward, kernel scores and features included. The ratio
                is over scaled_dot_product_attention
    decode      milliseconds per token, one token at a time after a prompt of 75. The ratio is over nope
    chang       with --chang: model_composite.py's attention, not causal, against the module of Chang et al. with equal
                weights. The outputs are compared first. `speed` is the module's time over ours
--nanogpt and --chang name checkouts of github.com/karpathy/nanoGPT and github.com/tylerachang/BERT_Convolutions.
All forms of a comparison run in turns in one process, so that a ratio belongs to one moment; each time is a median.
A form that fails is named, the others are timed, and the exit code is 1. --recipe runs nanoGPT's CPU recipe for
Shakespeare and `train.py --model composite`: seconds to a validation loss of 1.886 (nanoGPT's last), and the last loss.
Writes experiments/results/speed-<device>.csv after each turn (with --quick in out/quick), or speed-recipe.csv.
"""
import ast
import contextlib
import importlib
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from lib import REPO, Parser, die, new_model, positive, print_table, read_schemes, write_csv
from torch import nn

import model_composite as composite
import model_kernelized as kernelized
from train import keep_freed_memory

HEADER = 'part', 'name', 'setting', 'ms', 'ratio', 'speed', 'tokens_per_s', 'peak_gib'
TINY = dict(vocab_size=320, block_size=128, n_layer=4, n_head=4, n_embd=128)
GPT2 = dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768)
TARGET = 1.886
VAL_LOSS = r'(?<!best )val loss (\d+\.\d+)'  # as nanoGPT's and our train.py print it
RECIPE = ('config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 '
          '--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 '
          '--dropout=0.0').split()  # nanoGPT's README, "I only have a macbook"
FAILED = []  # names of forms that ended in an error


def attempt(name, job):
    """job(), or None and a name in FAILED if it ends in an error."""
    try:
        return job() or True
    except Exception:  # of one form: the others are measured
        FAILED.append(name)
        traceback.print_exc()


def turns(jobs, repeats):
    """Run jobs {name: function} in turns, after a first run of each; yield {name: median ms so far} after each turn."""
    times = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name in list(times):
            start = clock()
            if attempt(name, jobs[name]) is None:
                del times[name]
            elif turn:
                times[name].append((clock() - start) * 1e3)
        if turn and times:
            yield {name: statistics.median(ms) for name, ms in times.items()}


def in_turns(jobs, repeats):
    """-> {name: median ms}."""
    return [{}, *turns(jobs, repeats)][-1]


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(job):
    """GiB that a job allocates on top of what is allocated; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def training_step(model, idx, bf16, compiled):
    """-> a function that makes one step of AdamW, always on the same batch idx (B, T)."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    choice = getattr(sys.modules[type(model).__module__], 'choose_attention', lambda *_: None)(model, dtype)
    if choice:
        print(choice, flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model, dynamic=False) if compiled else model

    def step():
        with torch.autocast(idx.device.type, dtype, enabled=bf16):
            run(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def nanogpt(path, size):
    """nanoGPT's model from a checkout of its repository, without biases and dropout."""
    if not Path(path, 'model.py').is_file():
        die(f'--nanogpt {path} is no checkout of nanoGPT: it has no model.py')
    sys.path.append(str(path))
    module = importlib.import_module('model')
    with contextlib.redirect_stdout(None):  # it prints its number of parameters
        return module.GPT(module.GPTConfig(**size, bias=False))


def steps(args, device, put):
    cuda = device == 'cuda'
    size = dict(TINY, n_layer=1, block_size=32) if args.quick else GPT2 if cuda else TINY
    B = 2 if args.quick else 32 if cuda else 24
    idx = torch.randint(256, (B, size['block_size']), device=device)
    builds = {name: partial(new_model, flags, **size) for name, flags in args.schemes.items()}
    if args.nanogpt:
        builds['nanoGPT'] = partial(nanogpt, args.nanogpt, size)
    dtypes = ['bfloat16'] if cuda else ['float32', 'bfloat16']
    jobs, memory = {}, {}
    for dtype in dtypes:
        for name, build in builds.items():
            def prepare(name=name, build=build, dtype=dtype):
                job = training_step(build().to(device), idx, dtype == 'bfloat16', cuda)
                job()  # compiles
                memory[name, dtype] = peak_memory(job)
                jobs[name, dtype] = job
            attempt(f'{name} {dtype}', prepare)
    for ms in turns(jobs, args.repeats):
        base = ms.get(('nanoGPT', dtypes[0]), math.nan)
        for (name, dtype), x in ms.items():
            put('steps', name, dtype, x, x / ms.get(('nope', dtype), math.nan), base / x, idx.numel() / x * 1e3,
                memory[name, dtype])


def attention_forms(nh, hs, device):
    """{name: (form of (q, k, v, causal), whether it writes the (T, T) matrix)} and the parameters of all forms."""
    cuda = device == 'cuda'
    dynamic, fixed, b = (torch.randn(size, device=device).mul_(0.1).requires_grad_()
                         for size in ((17, hs), (nh, 17), (nh, 257)))
    w = torch.randn(64, hs, device=device)

    def with_scores(attend):
        def form(q, k, v, causal):
            scores = q @ dynamic.T.to(q.dtype) / math.sqrt(hs) + fixed[:, None].to(q.dtype)  # (B, nh, T, 17)
            return attend(q, k, v, scores, causal)
        return form

    def with_features(attend):
        def form(q, k, v, causal):
            q, k = (kernelized.features(F.normalize(x, dim=-1, eps=1e-4), w) for x in (q, k))  # (B, nh, T, m)
            return attend(q, k, v, b, causal)
        return form

    def compiled(form):
        return torch.compile(form, dynamic=False) if cuda else form

    return {
        'sdpa': (lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal), False),
        'composite, dense': (compiled(with_scores(composite.attend_dense)), True),
        'composite, fast': (compiled(with_scores(composite.attend_fast)), False),
        'kernelized, dense': (compiled(with_features(kernelized.attend_dense)), True),
        'kernelized, chunked': (compiled(with_features(kernelized.attend_chunked)), False),
        'kernelized, fft': (with_features(kernelized.attend_fft), False),  # no FFT inside compiled code
    }, (dynamic, fixed, b)


def attention(args, device, put):
    cuda = device == 'cuda'
    nh, hs = (12, 64) if cuda and not args.quick else (4, 32)
    tokens = 256 if args.quick else 32768 if cuda else 4096
    for T, causal, dtype in ((T, causal, dtype) for T in args.lengths for causal in (True, False)
                             for dtype in (['bfloat16'] if cuda else ['float32', 'bfloat16'])):
        torch._dynamo.reset()
        forms, parameters = attention_forms(nh, hs, device)
        options = dict(device=device, dtype=getattr(torch, dtype), requires_grad=True)
        q, k, v = (torch.randn(max(1, tokens // T), nh, T, hs, **options) for _ in range(3))

        def job(form, q=q, k=k, v=v, causal=causal, parameters=parameters):
            with torch.autocast(device, torch.bfloat16, enabled=q.dtype == torch.bfloat16):  # as in training
                y = form(q, k, v, causal)
            torch.autograd.grad(y.float().square().sum(), [q, k, v, *parameters], allow_unused=True)
        setting = f'{T} tokens, {"causal" if causal else "not causal"}, {dtype}'
        jobs, memory = {}, {}
        for name, (form, dense) in forms.items():
            if not (dense and T > (4096 if cuda else 2048)):
                def prepare(name=name, form=form):
                    job(form)  # compiles
                    memory[name] = peak_memory(partial(job, form))
                    jobs[name] = partial(job, form)
                attempt(f'{name}, {setting}', prepare)
        for ms in turns(jobs, args.repeats):
            for name, x in ms.items():
                put('attention', name, setting, x, x / ms.get('sdpa', math.nan), None, q.size(0) * T / x * 1e3,
                    memory[name])


@torch.no_grad()
def decode(args, device, put):
    prompt, n = (3, 4) if args.quick else (75, 50)
    ids = torch.randint(256, (1, prompt + n), device=device)
    jobs = {}
    for name, flags in args.schemes.items():
        model = new_model(flags, **TINY).to(device).eval()

        def job(model=model):
            state = model.new_state()
            model(ids[:, :prompt], state=state)
            for token in ids[0, prompt:]:
                model(token[None, None], state=state)
        jobs[name] = job
    for ms in turns(jobs, args.repeats):
        for name, x in ms.items():
            put('decode', name, f'per token after {prompt}', x / n, x / ms.get('nope', math.nan))


def chang_module(path, layer, T):
    """The attention module of Chang et al., from a checkout, with the weights of a layer of model_composite.py."""
    file = Path(path, 'src', 'transformers', 'modeling_bert.py')
    if not file.is_file():
        die(f'--chang {path} is no checkout of BERT_Convolutions: it has no {file.relative_to(path)}')
    classes = [n for n in ast.parse(file.read_text(encoding='utf-8')).body if isinstance(n, ast.ClassDef)]
    wanted = ast.Module([n for n in classes if n.name == 'BertSelfAttention'], [])
    space = dict(math=math, torch=torch, nn=nn, print=str)  # without what it prints
    exec(compile(wanted, file, 'exec'), space)
    C, K = layer.c_attn.in_features, layer.dynamic.size(0)
    theirs = space['BertSelfAttention'](SimpleNamespace(
        attention_kernel=f'qk_convfixed_convq {K // 2}', value_forward='linear', qk='linear', remove_qk=False,
        max_position_embeddings=T, num_attention_heads=layer.n_head, hidden_size=C, attention_head_size=-1,
        attention_probs_dropout_prob=0.0))
    with torch.no_grad():
        for i, linear in enumerate((theirs.query, theirs.key, theirs.value)):
            linear.weight.copy_(layer.c_attn.weight[i * C:(i + 1) * C])
            linear.bias.copy_(layer.c_attn.bias[i * C:(i + 1) * C])
        theirs.convfixed_param.copy_(layer.fixed[None, :, None])
        theirs.convq_param.copy_(layer.dynamic.T)
    return theirs


def chang(args, device, put):
    """Without the output projection: their module has none."""
    for T in (16, 24) if args.quick else (128, 512):
        layer = composite.Attention(composite.Config(n_embd=256, bias=True, causal=False))
        layer.c_proj = nn.Identity()
        nn.init.normal_(layer.fixed)
        theirs = chang_module(args.chang, layer, T)
        x = torch.randn(4096 // (64 if args.quick else 1) // T, T, 256, requires_grad=True)
        torch.testing.assert_close(layer(x), theirs(x)[0], rtol=1e-4, atol=1e-5)
        jobs = {'composite': lambda: layer(x).sum().backward(), 'module': lambda: theirs(x)[0].sum().backward()}
        for ms in turns(jobs, args.repeats):
            for name, ms_of in ms.items():
                put('chang', name, f'{T} tokens, not causal, float32', ms_of, speed=ms.get('module', math.nan) / ms_of)


def watch(command, folder):
    """Run a training; -> [(seconds since the start, validation loss)] as it prints them, and the seconds at the end."""
    start, found = time.perf_counter(), []
    env = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
            if match := re.search(VAL_LOSS, line):
                found.append((time.perf_counter() - start, float(match[1])))
    if process.returncode or not found:
        raise RuntimeError(f'{command} ended with exit code {process.returncode}')
    return found, time.perf_counter() - start


def recipe(args):
    """Seconds to TARGET, seconds in all, last loss: nanoGPT's CPU recipe, and train.py. In a temporary folder."""
    rows = []

    def measure(name, command, folder):
        losses, seconds = watch([sys.executable, *command], folder)
        first = next((when for when, loss in losses if loss <= TARGET), None)
        rows.append((name, first, seconds, losses[-1][1]))
        write_csv(args.results / 'speed-recipe.csv', ('name', f'seconds_to_{TARGET}', 'seconds', 'last_loss'), rows)
    with tempfile.TemporaryDirectory() as folder:
        if args.nanogpt:
            copy = Path(folder, 'nanoGPT')
            shutil.copytree(args.nanogpt, copy, ignore=shutil.ignore_patterns('.git'))
            shutil.copy(REPO / 'shakespeare.txt', copy / 'data/shakespeare_char/input.txt')
            subprocess.run([sys.executable, 'prepare.py'], cwd=copy / 'data/shakespeare_char', check=True)
            attempt('nanoGPT', partial(measure, 'nanoGPT', ['train.py', *RECIPE], copy))
        ours = [str(REPO / 'train.py'), '--model', 'composite', *(['--max_iters', '20'] if args.quick else [])]
        attempt('composite', partial(measure, 'train.py --model composite', ours, folder))
    cells = [(name, '-' if first is None else f'{first:.0f}', f'{seconds:.0f}', f'{loss:.3f}')
             for name, first, seconds, loss in rows]
    print_table((('program', f'seconds to {TARGET}', 'seconds in all', 'last validation loss'), cells))


def speed_table(rows):
    """Rows of the CSV -> the table, without columns that are empty in all of them."""
    def cell(x):
        return x if isinstance(x, str) else '' if x is None or x != x else f'{x:,.{0 if x >= 1000 else 2}f}'
    used = [n for n in range(len(HEADER)) if any(row[n] not in (None, '') for row in rows)]
    return tuple(HEADER[n] for n in used), [tuple(cell(row[n]) for n in used) for row in rows]


def main():
    parser = Parser(__doc__, 'small sizes, one turn')
    parser.add('--parts', ['steps', 'attention', 'decode'], nargs='+', choices=['steps', 'attention', 'decode'])
    parser.add('--schemes', ['nope', 'composite', 'conv-output', 'nprf+rpe', 'rope', 'alibi'], nargs='+',
               metavar='SCHEME', note="those of compare.py, or 'name: flags of train.py'")
    parser.add('--lengths', [128, 256, 512, 1024, 2048, 4096], [64], 'of attention', nargs='+', type=positive)
    parser.add('--repeats', 10, 1, 'turns')
    parser.add_argument('--nanogpt', metavar='PATH', help='a checkout of nanoGPT')
    parser.add_argument('--chang', metavar='PATH', help="a checkout of Chang et al.'s BERT_Convolutions")
    parser.add_argument('--recipe', action='store_true', help="only compare nanoGPT's CPU recipe with train.py")
    args = parser.parse_args()
    args.schemes = read_schemes(args.schemes)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    name = torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    print(f'{name}, torch {torch.__version__}', flush=True)
    torch.set_float32_matmul_precision('high')
    keep_freed_memory()  # as train.py does, and here for nanoGPT's model, too
    torch.manual_seed(0)
    rows = {}

    def put(part, name, setting, ms, ratio=None, speed=None, tokens_per_s=None, peak_gib=None):
        rows[part, name, setting] = part, name, setting, ms, ratio, speed, tokens_per_s, peak_gib
        write_csv(args.results / f'speed-{device}.csv', HEADER, rows.values())
    if args.recipe:
        recipe(args)
    else:
        for part in [*args.parts, *(['chang'] if args.chang else [])]:
            dict(steps=steps, attention=attention, decode=decode, chang=chang)[part](args, device, put)
            print_table(speed_table(row for row in rows.values() if row[0] == part))
    if FAILED:
        print(f'FAILED: {", ".join(map(str, FAILED))}')
        sys.exit(1)


if __name__ == '__main__':
    main()
