"""
Time and memory of every form of attention over the length of the text, and of a whole training step of every model.

    python experiments/speed.py --quick    # small, a few minutes on a CPU
    python experiments/speed.py            # on a GPU: 32,768 tokens, 12 heads of 64, m = 64, bf16, n = 512 ... 65,536
    python experiments/speed.py --steps    # training steps of every model at GPT-2 124M size (--quick: the tiny preset)
    python experiments/speed.py --steps --nanogpt ../nanoGPT --block_size 8192 --cudnn
    python experiments/speed.py --steps --models nope composite --kernels    # and where the time of a step goes
    python experiments/speed.py --parts    # a convolution, a query-made kernel, attention, each in several forms

Answers Figure 1a of Luo et al. 2021 (forward time over n, one head of 64 on a V100: softmax 51.8 ms at 32k, kernelized
by FFT with m = 32 29.3 ms), with what it competes with today: flash attention. Kernelized forms start from q and k,
features included. All forms of one length are timed in turns, so that their ratios belong to one moment; each figure is
the median. A form without enough memory is left out, and said so. The column `backend` names the attention kernels of
torch that were called, as its profiler saw them: flash, cuDNN, efficient, math, or none.
--steps trains as train.py does: 32,768 tokens a step (--block_size: in texts of another length), AdamW fused on a GPU,
bfloat16 and torch.compile there; peak memory is that of one model with its optimizer. --nanogpt takes nanoGPT's own
model from a checkout of github.com/karpathy/nanoGPT into the same turns; --cudnn lets torch prefer cuDNN's attention;
--kernels adds the table speed-steps-<device>...-kernels.csv: what a step of each model does, longest first. Where there
is a GPU and triton, the steps and the parts have the kernels of triton_forms.py among them.
Writes experiments/results/speed-<device>.csv and .png (or speed-steps-<device>[-<block_size>][-cudnn].csv,
speed-parts-<device>.csv); with --quick in out/quick. A row is written as soon as its form has run once, and again when
its medians are known: a run that is cut off has what it measured.
"""
import argparse
import contextlib
import importlib
import math
import statistics
import sys
import time
import traceback
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from lib import common_flags, parse, positive, pyplot, save, write_csv
from torch.nn.attention import SDPBackend, sdpa_kernel

import model_composite as composite
import model_conv as conv
import model_kernelized as kernelized
import model_nope as nope
from common import die

FAILED = []  # models and forms that ended in an error: it is printed, the rest is timed, the exit code is 1
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def plain_fft(q, k, v, b):
    """Section 3.2 of the paper as written, causal: complex transforms of all features at once."""
    T, R = q.size(2), b.size(1) // 2
    past = b[:, (R - torch.arange(T, device=b.device)).clamp(min=0)].exp()  # c_0, c_-1, ...
    column = torch.fft.fft(torch.cat((past, torch.zeros_like(past)), 1))[:, :, None, None]  # (nh, 2T, 1, 1)
    v1 = torch.cat((v, torch.ones_like(v[..., :1])), -1).float()
    kv = k.float()[..., None] * v1[..., None, :]  # (B, nh, T, m, hs+1)
    d = torch.fft.ifft(torch.fft.fft(kv, 2 * T, dim=2) * column, dim=2).real[:, :, :T]
    y = torch.einsum('bhtm,bhtmd->bhtd', q.float(), d)
    return (y[..., :-1] / y[..., -1:]).to(v.dtype)


def with_backend(which):
    """torch's attention by one of its backends, as a form (see forms)."""
    def attention(q, k, v, *_):
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention


def explicit(q, k, v, *_):
    """Softmax attention with its matrix written out."""
    n, hs = q.shape[2:]
    mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    return (q @ k.transpose(2, 3) / math.sqrt(hs)).masked_fill(~mask, float('-inf')).softmax(-1) @ v


def with_features(form):
    def attention(q, k, v, dynamic, fixed, b, w):
        # as in training on a GPU: the features are float32, their products bfloat16
        with torch.autocast(q.device.type, torch.bfloat16, enabled=q.is_cuda):
            q = kernelized.features(F.normalize(q, dim=-1, eps=1e-4), w)
            k = kernelized.features(F.normalize(k, dim=-1, eps=1e-4), w)
            return form(q, k, v, b)
    return attention


def with_kernel_scores(form):
    def attention(q, k, v, dynamic, fixed, *_):
        scores = q @ dynamic.T.to(q.dtype) / math.sqrt(q.size(-1)) + fixed[:, None]  # (B, nh, n, 2k+1)
        return form(q, k, v, scores)
    return attention


def forms(gpu):
    """{name: (function of q, k, v, dynamic, fixed, b, w; largest n it is run at, by memory)}; all causal."""
    def compiled(f):
        return torch.compile(f, dynamic=False) if gpu else f
    any_n = 10 ** 9
    matrix = 8192 if gpu else 2048  # of n x n numbers per head
    known = {'softmax, explicit matrix': (explicit, matrix),
             'softmax, flash': (with_backend(SDPBackend.FLASH_ATTENTION), any_n)}
    if gpu:
        known['softmax, cuDNN'] = (with_backend(SDPBackend.CUDNN_ATTENTION), any_n)
    known |= {
        'composite, dense': (compiled(with_kernel_scores(composite.attend_dense)), matrix),
        'composite, fast': (compiled(with_kernel_scores(composite.attend_fast)), any_n),
        'kernelized, dense': (compiled(with_features(kernelized.attend_dense)), matrix),
        'kernelized, plain FFT': (with_features(plain_fft), 32768 if gpu else 2048),
        'kernelized, FFT': (with_features(kernelized.attend_fft), any_n),
        'kernelized, chunked': (compiled(with_features(kernelized.attend_chunked)), any_n),
    }
    if by_hand := kernels_by_hand():
        attend_fast = by_hand.with_kernels(composite).attend_fast
        known['composite, Triton'] = (compiled(with_kernel_scores(attend_fast)), any_n)
        known['kernelized, Triton'] = (compiled(with_features(by_hand.attend_chunked)), any_n)
    return known


def clock(device):
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def backend(job):
    """The attention kernels of torch that a job calls: 'flash', 'cuDNN', 'efficient', 'math', two of them, or ''."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        job()
    called = ' '.join(event.key for event in profile.key_averages())
    kernels = {'flash': 'flash_attention', 'cuDNN': 'cudnn_attention', 'efficient': 'efficient_attention',
               'math': '_attention_math'}
    return ' and '.join(name for name, part in kernels.items() if part in called)


def alternate(jobs, device, repeats):
    """{name: median seconds} of jobs that run in turns, after a first run of each; one without memory is left out."""
    times = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name in list(times):
            start = clock(device)
            try:
                jobs[name]()
            except torch.OutOfMemoryError:
                print(f'{name}: out of memory while it was timed, left out', flush=True)
                del times[name]
                continue
            except Exception:
                FAILED.append(name)
                traceback.print_exc()
                del times[name]
                continue
            if repeat:
                times[name].append(clock(device) - start)
    return {name: statistics.median(t) for name, t in times.items()}


def forward_backward(f, inputs, grad):
    f(*inputs).backward(grad)
    for x in inputs:
        x.grad = None


@torch.no_grad()
def forward_only(f, inputs):
    f(*inputs)


def peak_memory(job, gpu, before=None):
    """GiB above `before` (by default what is allocated now) that a job needs; NaN on a CPU."""
    if not gpu:
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if before is None else before
    job()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def at_length(n, tokens, args, device, put):
    """Measure every form in texts of n tokens.

    put(n, form, forward ms, forward and backward ms, peak GiB above the inputs, tokens in all texts, backend) is called
    after a form has run once (forward: NaN), and again with the medians; put(n, form) when it is left out.
    """
    gpu = device == 'cuda'
    nh, hs, m = (12, 64, 64) if gpu and not args.quick else (4, 32, 64)
    dtype = torch.bfloat16 if gpu else torch.float32
    torch._dynamo.reset()
    shape = (max(1, tokens // n), nh, n)
    q, k, v = (torch.randn(*shape, hs, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    learned = []
    for size in ((17, hs), (nh, 17), (nh, 257)):  # dynamic, fixed, b
        learned.append(torch.randn(*size, device=device).mul_(0.1).requires_grad_())
    inputs = [q, k, v, *learned, torch.randn(m, hs, device=device)]
    grad = torch.randn_like(q)
    both = {}
    seen = {}
    for name, (form, largest) in forms(gpu).items():
        if n > largest:
            continue
        job = partial(forward_backward, form, inputs, grad)
        try:
            job()  # compiles
            start = clock(device)
            memory = peak_memory(job, gpu)
            once = (clock(device) - start) * 1e3
            seen[name] = memory, shape[0] * n, backend(job)
        except torch.OutOfMemoryError:
            print(f'n = {n}: {name}: out of memory', flush=True)
            continue
        except Exception:  # of one form
            FAILED.append(f'n = {n}: {name}')
            traceback.print_exc()
            continue
        both[name] = job
        put(n, name, math.nan, once, *seen[name])
    repeats = 10 if gpu else 3
    known = forms(gpu)
    forward = alternate({name: partial(forward_only, known[name][0], inputs) for name in both}, device, repeats)
    whole = alternate({name: both[name] for name in forward}, device, repeats)
    for name in both:
        put(n, name, *((forward[name] * 1e3, whole[name] * 1e3, *seen[name]) if name in whole else ()))


def attention(args, device, write):
    """Measure every form at every length -> rows as in at_length. write(header, rows) is called when a row is new."""
    small = args.quick or device == 'cpu'
    tokens = args.tokens or (4096 if small else 32768)
    lengths = args.lengths or [2 ** i for i in (range(9, 13) if small else range(9, 17))]
    rows = {}

    def put(n, name, *figures):
        rows.pop((n, name), None)
        if figures:
            rows[n, name] = (n, name, *figures)
        header = ('n', 'form', 'forward_ms', 'forward_backward_ms', 'peak_gib', 'tokens', 'backend')
        write(header, rows.values())
    for n in lengths:
        at_length(n, tokens, args, device, put)
        here = [row for row in rows.values() if row[0] == n]
        flash = next((row[3] for row in here if row[1] == 'softmax, flash'), math.nan)
        for _, name, forward, whole, peak, _, kernel in here:
            memory = '' if math.isnan(peak) else f'  peak {peak:6.2f} GiB'
            print(f'n = {n:6d}  {name:26s} forward {forward:9.3f} ms  forward+backward {whole:9.3f} ms  '
                  f'{whole / flash:7.2f}x flash{memory}  {kernel}', flush=True)
    return list(rows.values())


def crossovers(rows):
    """From which n on each form is no slower than flash attention, forward and backward."""
    flash = {n: whole for n, name, _, whole, *_ in rows if name == 'softmax, flash'}
    print('\n| form | no slower than flash attention from n = | times flash at each n (forward + backward) |')
    print('|---|---|---|')
    for form in dict.fromkeys(name for _, name, *_ in rows):
        ratio = {n: whole / flash[n] for n, name, _, whole, *_ in rows if name == form and n in flash}
        first = next((n for n in ratio if all(r <= 1 for m, r in ratio.items() if m >= n)), 'never here')
        ratios = ', '.join(f'{n}: {r:.2f}' for n, r in ratio.items())
        print(f'| {form} | {first} | {ratios} |')


def draw(rows, title):
    panels = [(2, 'forward (us per token)', 1e3), (3, 'forward + backward (us per token)', 1e3)]
    if not math.isnan(rows[0][4]):
        panels.append((4, 'peak memory above the inputs (KiB per token)', 2 ** 20))
    size = (5.2 * len(panels), 4.2)
    fig, axes = pyplot().subplots(1, len(panels), figsize=size, layout='constrained')
    lengths = sorted({row[0] for row in rows})
    for ax, (column, label, unit) in zip(axes, panels):
        for i, form in enumerate(dict.fromkeys(row[1] for row in rows)):
            line = [row for row in rows if row[1] == form]
            ax.plot([row[0] for row in line], [row[column] * unit / row[5] for row in line], 'o-', ms=3,
                    color=f'C{i}', label=form)
        ax.set(xscale='log', yscale='log', xlabel='n (tokens in a text)', ylabel=label)
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', fontsize=7, ncols=4)
    fig.suptitle(title)
    return fig


def nanogpt(path, size):
    """nanoGPT's own model from a checkout of its repository, at the size of ours: without biases or dropout."""
    if not Path(path, 'model.py').is_file():
        die(f'--nanogpt {path} is no checkout of nanoGPT: it has no model.py')
    sys.path.append(str(path))
    module = importlib.import_module('model')
    with contextlib.redirect_stdout(None):  # it prints its number of parameters
        return module.GPT(module.GPTConfig(**size, bias=False))


def training_step(model, idx, bf16, compiled):
    """-> a function that makes one step: forward, backward and AdamW, always on the same batch idx (B, T)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=idx.is_cuda)
    run = torch.compile(model, dynamic=False) if compiled else model

    def step():
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=bf16):
            run(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def kernels(job, gpu):
    """What a job does, longest first: rows (name, calls, ms) of GPU kernels, or on a CPU of torch's operators."""
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        job()
        clock('cuda' if gpu else 'cpu')  # waits
    events = [(event.key, event.count, (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3)
              for event in profile.key_averages()]
    return sorted([event for event in events if event[2] > 0], key=lambda event: -event[2])


def kernels_by_hand():
    """The module triton_forms where its kernels run: on a GPU with triton; None elsewhere."""
    return importlib.import_module('triton_forms') if torch.cuda.is_available() and find_spec('triton') else None


def variants(args, size):
    """{name: function that makes the model} of the models asked for."""
    output_alone = dict(lightweight=False, dynamic=False, values=False, queries_keys=False, output=True)
    fields = {'nope': (nope, {}), 'composite': (composite, {}), 'conv': (conv, {}),
              'conv, output alone': (conv, output_alone), 'kernelized': (kernelized, {})}
    known = {name: partial(ours, module, size | own) for name, (module, own) in fields.items()}
    if args.nanogpt:
        known['nanoGPT'] = partial(nanogpt, args.nanogpt, size)
    if by_hand := kernels_by_hand():
        for name, module in (('composite', composite), ('conv', conv)):
            known[f'{name}-triton'] = partial(ours, by_hand.with_kernels(module), size)
            known[f'{name}-triton-cudnn'] = partial(ours, by_hand.with_kernels(module, by_cudnn=True), size)
        known['kernelized-triton'] = partial(ours, by_hand.with_kernels(kernelized), size)
    unknown = [name for name in args.models or [] if name not in known]
    if unknown:
        die(f'--models takes {", ".join(known)}, not {unknown[0]!r}')
    return {name: known[name] for name in args.models or known}


def steps(args, device, write, write_kernels):
    """Time a training step of each model, in turns: rows (model, ms, tokens/s, times nope, peak GiB, backend)."""
    gpu = device == 'cuda'
    small = args.quick or not gpu
    size = dict(vocab_size=320, block_size=128, n_layer=4, n_head=4, n_embd=128)
    if not small:
        size = dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    tokens = (24 if small else 32) * size['block_size']
    size['block_size'] = args.block_size or size['block_size']
    idx = torch.randint(256, (max(1, tokens // size['block_size']), size['block_size']), device=device)
    rows = {}
    times = {}

    def put(name, ms, *figures):
        times[name] = ms
        rows[name] = name, ms, idx.numel() / ms * 1e3, ms / times.get('nope', math.nan), *figures
        return write(('model', 'ms', 'tokens_per_s', 'times_nope', 'peak_gib', 'backend'), rows.values())
    jobs = {}
    for name, build in variants(args, size).items():
        job = None  # frees a model that was too large
        try:
            before = torch.cuda.memory_allocated() if gpu else 0
            job = training_step(build().to(device), idx, gpu, gpu)
            for _ in range(3 if gpu else 1):  # compile and warm up
                job()
            start = clock(device)
            memory = peak_memory(job, gpu, before)
            put(name, (clock(device) - start) * 1e3, memory, backend(job))
            jobs[name] = job
        except torch.OutOfMemoryError:
            print(f'{name}: out of memory', flush=True)
        except Exception:  # of one model: the others are timed all the same
            FAILED.append(name)
            traceback.print_exc()
    job = path = None
    ms = {name: seconds * 1e3 for name, seconds in alternate(jobs, device, 10).items()}
    seen = {name: rows[name][4:] for name in ms}
    rows.clear()
    for name in ms:
        path = put(name, ms[name], *seen[name])
    print('| model | ms per step | tokens/s | times nope | peak GiB | attention |\n|---|---|---|---|---|---|')
    for name, time_of_step, rate, ratio, memory, kernel in rows.values():
        print(f'| {name} | {time_of_step:.1f} | {rate:,.0f} | {ratio:.2f} | {memory:.1f} | {kernel} |')
    print(f'\nwrote {path}')
    if args.kernels:
        table = [(name, *row) for name, job in jobs.items() for row in kernels(job, gpu)]
        print(f'wrote {write_kernels(("model", "kernel", "calls", "ms"), table)}')


def ours(module, fields):
    return module.Model(module.Config(**fields))


def heads(qkv, nh):
    """(B, T, 3C), as c_attn returns it -> q, k, v, each (B, nh, T, hs)."""
    return [z.unflatten(2, (nh, -1)).transpose(1, 2) for z in qkv.chunk(3, 2)]


def convolutions(T, C, K):
    """Forms of the causal depthwise convolution of x (B, T, C) with kernels w (C, K)."""
    def conv1d(x, w):
        return F.conv1d(F.pad(x.transpose(1, 2).contiguous(), (K - 1, 0)), w[:, None], groups=C).transpose(1, 2)

    def shifts(x, w):
        padded = F.pad(x, (0, 0, K - 1, 0))
        return sum(w[:, r] * padded[:, r:r + T] for r in range(K))

    known = {'depthwise_conv (conv1d)': conv.depthwise_conv, 'conv1d, contiguous (B, C, T)': conv1d, 'shifts': shifts}
    if by_hand := kernels_by_hand():
        known['Triton'] = by_hand.depthwise_conv
    return known


def query_made(nh, far):
    """Forms of q_i.(W_o - W_-far) for the near offsets o = 1-far ... 0 of a causal kernel: (B, nh, T, far)."""
    def product(qkv, w):
        scores = heads(qkv, nh)[0] @ w.T
        return scores[..., 1:far + 1] - scores[..., :1]

    def wider(qkv, w):
        scores = heads(qkv, nh)[0] @ F.pad(w, (0, 0, 0, -w.size(0) % 8)).T  # rows of 24 numbers: 48 bytes
        return scores[..., 1:far + 1] - scores[..., :1]

    def near_columns(qkv, w):
        return heads(qkv, nh)[0] @ (w[1:far + 1] - w[:1]).T

    def head_by_head(qkv, w):  # without a copy of q
        B, T, C = qkv.shape
        q = qkv[..., :C // 3].view(B * T, nh, -1).transpose(0, 1)
        scores = q @ (w[1:far + 1] - w[:1]).T.expand(nh, -1, -1)
        return scores.view(nh, B, T, far).transpose(0, 1)

    return {'product': product, 'product, 24 columns': wider, 'near columns alone': near_columns,
            'near columns alone, head by head': head_by_head}


def near_scores(nh, far):
    """Forms of q_i.(k_{i+o} + W_o - W_-far): of the causal near offsets, (B, nh, T, far)."""
    def near_keys(k):
        padded = F.pad(k, (0, 0, far - 1, 0))
        return [padded[:, :, r:r + k.size(2)].float() for r in range(far)]

    def and_product(qkv, w):
        q, k, _ = heads(qkv, nh)
        scores = torch.stack([(q.float() * keys).sum(-1) for keys in near_keys(k)], -1)
        return scores + query_made(nh, far)['product'](qkv, w)

    def in_one(qkv, w):
        q, k, _ = heads(qkv, nh)
        return torch.stack([(q.float() * (keys + w[r] - w[0])).sum(-1) for r, keys in enumerate(near_keys(k), 1)], -1)

    return {'near keys, and product': and_product, 'kernel added to the near keys': in_one}


def attentions(nh, far):
    """Forms of composite attention without a fixed kernel, causal."""
    def attention(far_near, form):
        def run(qkv, w):
            near = query_made(nh, far)[form](qkv, w).float() / math.sqrt(w.size(1))
            return far_near.apply(*heads(qkv, nh), near, None, far)
        return run

    files = {'FarNear': composite.FarNear}
    if by_hand := kernels_by_hand():
        files |= {'Triton': by_hand.far_and_near(False), 'Triton and cuDNN': by_hand.far_and_near(True)}
    return {f'{name}, {form}': attention(far_near, form) for name, far_near in files.items()
            for form in ('product', 'near columns alone')}


def parts(gpu, small):
    """{part of a layer: (its inputs, {form: function of them})}: parts that can be written in several ways."""
    B, T, nh, hs, K = (8, 128, 4, 32, 17) if small else (32, 1024, 12, 64, 17)
    C, far = nh * hs, K // 2
    options = dict(device='cuda' if gpu else 'cpu', dtype=torch.bfloat16 if gpu else torch.float32, requires_grad=True)
    x = torch.randn(B, T, C, **options)
    taps = torch.randn(C, K, **options)
    qkv = torch.randn(B, T, 3 * C, **options)
    kernel = torch.randn(K, hs, **options)
    backends = {'flash': SDPBackend.FLASH_ATTENTION} | ({'cuDNN': SDPBackend.CUDNN_ATTENTION} if gpu else {})
    softmaxes = {name: lambda qkv, form=with_backend(which): form(*heads(qkv, nh)) for name, which in backends.items()}
    return {
        'depthwise convolution': ((x, taps), convolutions(T, C, K)),
        'query-made kernel': ((qkv, kernel), query_made(nh, far)),
        'near scores': ((qkv, kernel), near_scores(nh, far)),
        'composite attention': ((qkv, kernel), attentions(nh, far)),
        'softmax attention': ((qkv,), softmaxes),
    }


def time_parts(args, device, write):
    """Time each form of each part, forward and backward; on a GPU in bfloat16, compiled."""
    gpu = device == 'cuda'
    rows = []
    print('| part | form | ms, forward and backward |\n|---|---|---|')
    for part, (inputs, known) in parts(gpu, not gpu or args.quick).items():
        jobs = {}
        for name, f in known.items():
            f = torch.compile(f, dynamic=False) if gpu else f
            try:
                job = partial(forward_backward, f, inputs, torch.randn_like(f(*inputs)))
                job()
                jobs[name] = job
            except Exception:  # of one form
                FAILED.append(f'{part}: {name}')
                traceback.print_exc()
        for name, seconds in alternate(jobs, device, 10).items():
            rows.append((part, name, seconds * 1e3))
            print(f'| {part} | {name} | {seconds * 1e3:.2f} |', flush=True)
        path = write(('part', 'form', 'forward_backward_ms'), rows)
    print(f'\nwrote {path}')


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', action='store_true', help='training steps of whole models instead')
    parser.add_argument('--models', nargs='+', metavar='NAME', help='with --steps: only these (default all)')
    parser.add_argument('--kernels', action='store_true', help='with --steps: a table of the kernels of a step, too')
    parser.add_argument('--nanogpt', metavar='PATH', help='with --steps: a checkout of nanoGPT, timed, too')
    parser.add_argument('--block_size', type=positive, help='with --steps: tokens in a text (default 1024 or 128)')
    parser.add_argument('--cudnn', action='store_true', help="with --steps: prefer cuDNN's attention (CUDA only)")
    parser.add_argument('--parts', action='store_true', help='parts of a layer instead, each in several forms')
    parser.add_argument('--lengths', nargs='+', type=positive, help='n, tokens in a text (default: powers of two)')
    parser.add_argument('--tokens', type=positive, help='in all texts together (default 32,768; 4,096 if small)')
    common_flags(parser, '4,096 tokens, 4 heads of 32, n up to 4,096 (on a CPU the default, too)', dataset=False)
    return parse(parser)


def main():
    args = arguments()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    name = torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    print(f'{name}, torch {torch.__version__}', flush=True)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(0)

    def writer(name):
        return partial(write_csv, args.results, name)
    if args.steps:
        steps_name = f'speed-steps-{device}'
        if args.block_size:
            steps_name += f'-{args.block_size}'
        if args.cudnn:
            steps_name += '-cudnn'
        with sdpa_kernel(CUDNN_FIRST, set_priority=True) if args.cudnn else contextlib.nullcontext():
            steps(args, device, writer(steps_name), writer(f'{steps_name}-kernels'))
    elif args.parts:
        time_parts(args, device, writer(f'speed-parts-{device}'))
    else:
        rows = attention(args, device, writer(f'speed-{device}'))
        crossovers(rows)
        save(draw(rows, name), Path(args.results, f'speed-{device}.csv'))
    if FAILED:
        print(f'FAILED: {", ".join(FAILED)}')
        sys.exit(1)


if __name__ == '__main__':
    main()
