"""
Time and memory of every form of attention over the length of the text, and of a whole training step of every model.

    python experiments/speed.py --quick              # a CPU, small, a few minutes
    python experiments/speed.py                      # a GPU: 32,768 tokens, 12 heads of 64, m = 64, bf16, n = 512 ... 65,536
    python experiments/speed.py --steps              # training steps of every model at GPT-2 124M size (with --quick: the tiny preset)
    python experiments/speed.py --convs              # conv1d against shifted multiply-adds, both layouts

Answers Figure 1a of Luo et al. 2021 (forward time over n, one head of 64 on a V100: softmax 51.8 ms at 32k, kernelized by FFT with m = 32
29.3 ms), with what stands against it today: flash attention. Kernelized forms start from q and k, features included. All forms of one length
are timed in turns, so that their ratios belong to one moment; each figure is the median.
Writes experiments/results/speed-<device>.csv and .png (or speed-steps-, speed-convs-<device>.csv).
"""
import argparse
import csv
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lib import REPO, positive, pyplot
from torch.nn.attention import SDPBackend, sdpa_kernel

import model_composite as composite
import model_conv as conv
import model_kernelized as kernelized
import model_nope as nope


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


def forms(device, hs, compiled):
    """{name: (function of q, k, v, dynamic, fixed, b, w; largest n it is asked for, by memory)}; all causal."""
    wrap = torch.compile if compiled else lambda f, **_: f

    def backend(which):
        def attention(q, k, v, *_):
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attention

    def explicit(q, k, v, *_):
        mask = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).tril()
        return (q @ k.transpose(2, 3) / math.sqrt(hs)).masked_fill(~mask, float('-inf')).softmax(-1) @ v

    def with_features(form):
        def attention(q, k, v, dynamic, fixed, b, w):
            with torch.autocast(device, torch.bfloat16, enabled=gpu):  # as in training: the features are float32, their products bfloat16
                q, k = (kernelized.features(F.normalize(x, dim=-1, eps=1e-4), w) for x in (q, k))
                return form(q, k, v, b)
        return attention
    gpu = device == 'cuda'

    def with_table(form):
        def attention(q, k, v, dynamic, fixed, *_):
            return form(q, k, v, q @ dynamic.T.to(q.dtype) / math.sqrt(hs) + fixed[:, None])  # (B, nh, n, 2k+1)
        return attention
    return {
        'softmax, explicit matrix': (explicit, 8192 if gpu else 2048),
        'softmax, flash': (backend(SDPBackend.FLASH_ATTENTION), 10 ** 9),
        **({'softmax, cuDNN': (backend(SDPBackend.CUDNN_ATTENTION), 10 ** 9)} if gpu else {}),
        'composite, dense': (wrap(with_table(composite.attend_dense), dynamic=False), 8192 if gpu else 2048),
        'composite, far + near': (wrap(with_table(composite.attend_fast), dynamic=False), 10 ** 9),
        'kernelized, dense': (wrap(with_features(kernelized.attend_dense), dynamic=False), 8192 if gpu else 2048),
        'kernelized, plain FFT': (with_features(plain_fft), 32768 if gpu else 2048),
        'kernelized, FFT': (with_features(kernelized.attend_fft), 10 ** 9),
        'kernelized, chunked': (wrap(with_features(kernelized.attend_chunked), dynamic=False), 10 ** 9),
    }


def clock(device):
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(jobs, device, repeats):
    """{name: median seconds} of each job, taken in turns after a first run of each; a job without memory is left out."""
    times = {}
    for r in range(repeats + 1):
        for name, job in list(jobs.items()):
            start = clock(device)
            try:
                job()
            except torch.OutOfMemoryError:
                print(f'{name}: out of memory')
                del jobs[name]
                continue
            if r:
                times.setdefault(name, []).append(clock(device) - start)
    return {name: statistics.median(t) for name, t in times.items()}


def attention(args, device):
    """Rows (n, form, forward ms, forward and backward ms, peak GiB above the inputs, tokens in all texts)."""
    gpu, rows = device == 'cuda', []
    tokens, nh, hs, m = (4096, 4, 32, 64) if args.quick or not gpu else (32768, 12, 64, 64)
    tokens = args.tokens or tokens
    dtype, repeats = (torch.bfloat16, 10) if gpu else (torch.float32, 3)
    for n in args.lengths or ([512, 1024, 2048, 4096] if args.quick or not gpu else [2 ** i for i in range(9, 17)]):
        torch._dynamo.reset()
        shape = (max(1, tokens // n), nh, n)
        q, k, v = (torch.randn(*shape, hs, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        learned = [torch.randn(*size, device=device).mul_(0.1).requires_grad_() for size in ((17, hs), (nh, 17), (nh, 257))]  # dynamic, fixed, b
        inputs = [q, k, v, *learned, torch.randn(m, hs, device=device)]
        grad = torch.randn_like(q)
        known = {name: f for name, (f, most) in forms(device, hs, gpu).items() if n <= most}

        def both(f):
            f(*inputs).backward(grad)
            for x in inputs:
                x.grad = None
        peak = {}
        for name, f in list(known.items()):  # memory, and compilation before the clock runs
            try:
                both(f)
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    both(f)
            except torch.OutOfMemoryError:
                print(f'n = {n}: {name}: out of memory')
                del known[name]
                continue
            peak[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 30 if gpu else math.nan
        with torch.no_grad():
            forward = alternate({name: lambda f=f: f(*inputs) for name, f in known.items()}, device, repeats)
        whole = alternate({name: lambda f=f: both(f) for name, f in known.items()}, device, repeats)
        for name in whole:
            rows.append((n, name, forward[name] * 1e3, whole[name] * 1e3, peak[name], shape[0] * n))
            print(f'n = {n:6d}  {name:26s} forward {forward[name] * 1e3:9.3f} ms  forward+backward {whole[name] * 1e3:9.3f} ms  '
                  f'{whole[name] / whole["softmax, flash"]:7.2f}x flash' + (f'  peak {peak[name]:6.2f} GiB' if gpu else ''), flush=True)
    return ('n', 'form', 'forward_ms', 'forward_backward_ms', 'peak_gib', 'tokens'), rows


def crossovers(rows):
    """From which n on each form is no slower than flash attention, forward and backward."""
    flash = {n: whole for n, name, _, whole, *_ in rows if name == 'softmax, flash'}
    print('\n| form | no slower than flash attention from n = | times flash at each n (forward + backward) |\n|---|---|---|')
    for form in dict.fromkeys(name for _, name, *_ in rows):
        ratio = {n: whole / flash[n] for n, name, _, whole, *_ in rows if name == form}
        first = next((n for n in ratio if all(r <= 1 for m, r in ratio.items() if m >= n)), 'never here')
        print(f'| {form} | {first} | {", ".join(f"{n}: {r:.2f}" for n, r in ratio.items())} |')


def plot(rows, title, path):
    plt, memory = pyplot(), not math.isnan(rows[0][4])
    fig, axes = plt.subplots(1, 2 + memory, figsize=(5.2 * (2 + memory), 4.2), layout='constrained')
    for ax, column, label in zip(axes, (2, 3, 4), ('forward', 'forward + backward', 'peak memory above the inputs')):
        for i, form in enumerate(dict.fromkeys(row[1] for row in rows)):
            ax.plot(*zip(*((row[0], row[column] * (2 ** 20 if column == 4 else 1e3) / row[5]) for row in rows if row[1] == form)), 'o-', ms=3, color=f'C{i}', label=form)
        ax.set(xscale='log', yscale='log', xlabel='n (tokens in a text)', ylabel=f'{label} ({"KiB" if column == 4 else "us"} per token)')
        ax.set_xticks(lengths := sorted({row[0] for row in rows}), lengths)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', fontsize=7, ncols=4)
    fig.suptitle(title)
    fig.savefig(path, dpi=120)


def steps(args, device):
    """Rows (model, ms per training step, times nope): forward, backward and AdamW, the same batch, in turns."""
    gpu = device == 'cuda'
    size = dict(block_size=128) if args.quick or not gpu else dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    B = 24 if args.quick or not gpu else 32
    variants = {'nope': (nope, {}), 'composite': (composite, {}), 'conv': (conv, {}),
                'conv, output alone': (conv, dict(lightweight=False, dynamic=False, values=False, queries_keys=False, output=True)), 'kernelized': (kernelized, {})}
    jobs = {}
    for name, (module, fields) in variants.items():
        model = module.Model(module.Config(**size, **fields)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu)
        run = torch.compile(model) if gpu else model
        idx = torch.randint(size.get('vocab_size', 256), (B, size['block_size']), device=device)

        def job(run=run, optimizer=optimizer, idx=idx):
            with torch.autocast(device, torch.bfloat16, enabled=gpu):
                run(idx, idx)[1].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for _ in range(3):  # compile and warm up
            job()
        jobs[name] = job
    times = alternate(jobs, device, 10)
    rows = [(name, t * 1e3, t / times['nope']) for name, t in times.items()]
    print('| model | ms per step | times nope |\n|---|---|---|\n' + '\n'.join(f'| {name} | {ms:.1f} | {ratio:.2f} |' for name, ms, ratio in rows))
    return ('model', 'ms', 'times_nope'), rows


def convs(args, device):
    """Rows (form, ms): a depthwise convolution of 17 taps, forward and backward, by conv1d in two layouts and by shifts."""
    gpu = device == 'cuda'
    B, T, C, K = (8, 128, 128, 17) if args.quick or not gpu else (32, 1024, 768, 17)
    x = torch.randn(B, T, C, device=device, dtype=torch.bfloat16 if gpu else torch.float32, requires_grad=True)
    w = torch.randn(C, K, device=device, dtype=x.dtype, requires_grad=True)
    wrap = torch.compile if gpu else lambda f: f

    def contiguous(x, w):
        return F.conv1d(F.pad(x.transpose(1, 2).contiguous(), (K - 1, 0)), w[:, None], groups=C).transpose(1, 2)

    def shifts(x, w):
        padded = F.pad(x, (0, 0, K - 1, 0))
        return sum(w[:, r] * padded[:, r:r + T] for r in range(K))
    known = {'depthwise_conv (conv1d)': conv.depthwise_conv, 'conv1d, contiguous (B, C, T)': contiguous, 'conv1d, compiled': wrap(contiguous), 'shifts, compiled': wrap(shifts)}
    if not gpu:
        known = {name.replace(', compiled', ''): f for name, f in known.items() if name != 'conv1d, compiled'}

    def both(f):
        f(x, w).backward(x.detach())
        x.grad = w.grad = None
    for f in known.values():
        both(f)
    times = alternate({name: lambda f=f: both(f) for name, f in known.items()}, device, 10)
    rows = [(name, t * 1e3) for name, t in times.items()]
    print('| form | ms, forward and backward |\n|---|---|\n' + '\n'.join(f'| {name} | {ms:.2f} |' for name, ms in rows))
    return ('form', 'forward_backward_ms'), rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='4,096 tokens, 4 heads of 32, n up to 4,096; always so on a CPU')
    parser.add_argument('--steps', action='store_true', help='training steps of whole models instead')
    parser.add_argument('--convs', action='store_true', help='forms of the depthwise convolution instead')
    parser.add_argument('--lengths', nargs='+', type=positive, help='n, tokens in a text (default: powers of two)')
    parser.add_argument('--tokens', type=positive, help='in all texts together (default 32,768; 4,096 if quick)')
    parser.add_argument('--results', default=str(REPO / 'experiments' / 'results'), help='folder of the table and the picture')
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    name = torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    print(f'{name}, torch {torch.__version__}')
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(0)
    header, rows = (steps if args.steps else convs if args.convs else attention)(args, device)
    kind = 'speed-steps' if args.steps else 'speed-convs' if args.convs else 'speed'
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    with open(results / f'{kind}-{device}.csv', 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([header, *([x if not isinstance(x, float) else f'{x:.4g}' for x in row] for row in rows)])
    if kind == 'speed':
        crossovers(rows)
        plot(rows, name, results / f'speed-{device}.png')
    print(f'\nwrote {results / f"{kind}-{device}.csv"}')


if __name__ == '__main__':
    main()
