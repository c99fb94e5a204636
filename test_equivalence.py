"""
A book of proofs: what equals what in this project, checked on random numbers, values and gradients.

    python test_equivalence.py            # the whole book; exit 1 if a row fails
    python test_equivalence.py conv       # the rows about model_conv.py only
    python test_equivalence.py --all      # every case under its row
    python test_equivalence.py --first    # stop after the first claim that fails
    python -m pytest test_equivalence.py  # the same as tests

The left side of each row is the code of a model file. The right side is written here, as explicit loops or explicit
matrices, and never calls what it checks. Exact claims are in float64. A difference is relative to the largest entry of
the right side; a row shows the worst of its cases.

Your own model_mine.py, beside this file or in baselines/, is found without an edit: chapter 6 checks what every model
promises. A wrong formula can keep all these promises. To prove the formula, write your layer a second time in
model_mine.py, as plain loops over single queries:

    def equation(attention, x):  # your Attention, x (B, T, C) -> (B, T, C)

Chapter 6 compares the two. If your positions are absolute, so that moving a text changes its logits, write
RELATIVE = False at the top level of your file; otherwise the rows about shifts and padding on the left fail.
"""
import argparse
import contextlib
import functools
import importlib.util
import inspect
import math
import sys
import textwrap
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import model_composite as composite
import model_conv as conv
import model_kernelized as kernelized
import model_nope as nope

CHAPTERS = {
    1: 'Relative positions are convolutions (Chang et al., ACL 2021, section 3)',
    2: 'Composite attention without a (T, T) matrix: far + near (this project)',
    3: 'Convolutions before, inside and after attention, or replacing it (Chang et al., ACL 2021; Wu et al., ICLR 2019)',
    4: 'Kernelized attention with relative positions (Luo et al., NeurIPS 2021)',
    5: 'No positions (Chi et al., ACL 2023)',
    6: 'What every model promises',
    7: 'The same on a GPU',
}
HERE = Path(__file__).resolve().parent
OURS = {'composite': composite, 'conv': conv, 'kernelized': kernelized, 'nope': nope}
SIDES = ((True, 'causal'), (False, 'both sides'))
# the sizes of most cases: batch, heads, tokens, channels of a head, reach of a kernel; T is odd and larger than a kernel
B, H, T, D, K = 2, 3, 11, 4, 2
WIDTH = 2 * K + 1  # entries of a kernel


# ---------------------------------------------------------------------------------------------------------------------
# how a claim is recorded

class Case(NamedTuple):
    row: str  # what equals what
    name: str  # which case of it
    shown: str  # the difference as printed; '' for a remark
    limit: str  # the tolerance as printed
    badness: float  # difference over tolerance: above 1 the case fails
    error: Exception | None = None  # of a crash


CASES = []  # of the claim that runs


def proof(chapter, *models):
    """Mark a test as part of a chapter, about these models (none: about every model file). It fails if a case fails."""
    def mark(test):
        @functools.wraps(test)
        def run():
            CASES.clear()
            with attempt('the test'):
                test()
            failed = [case for case in CASES if case.badness > 1]
            if failed:
                lines = [f'{case.row} [{case.name}]: {case.shown}, limit {case.limit}' for case in failed]
                raise AssertionError('\n'.join(lines)) from failed[0].error
        run.chapter, run.models = chapter, models
        return run
    return mark


@contextlib.contextmanager
def attempt(name):
    """A crash inside is recorded as a failed case, and the book goes on."""
    try:
        yield
    except Exception as error:  # whatever it is, it belongs in the table
        text = ' '.join(str(error).split())
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent in (HERE, HERE / 'baselines')]
        place = f'{Path(frames[-1].filename).name}, line {frames[-1].lineno}' if frames else 'no line of this project'
        row = textwrap.shorten(f'{name}: {type(error).__name__}: {text}', 72, placeholder=' ...')
        CASES.append(Case(row, f'{place}: {text}', 'inf', 'no crash', math.inf, error))


def check(row, case, ours, reference, tolerance=1e-12, least=1e-30):
    """Record how far two tensors, or lists of tensors, differ, relative to the reference's largest entry.

    That entry counts as at least `least`: where the true gradient is 0, rounding must not be divided by rounding.
    """
    ours = ours if isinstance(ours, list) else [ours]
    reference = reference if isinstance(reference, list) else [reference]
    limit = f'{tolerance:.0e}' if tolerance else 'equal'
    if [a.shape for a in ours] != [b.shape for b in reference]:
        CASES.append(Case(row, case, 'shapes', limit, math.inf))
    elif not all(x.isfinite().all() for x in ours + reference):
        CASES.append(Case(row, case, 'not finite', limit, math.inf))
    else:
        difference = 0.0
        for a, b in zip(ours, reference):
            a, b = a.double(), b.double()
            difference = max(difference, ((a - b).abs().max() / b.abs().max().clamp(min=least)).item())
        CASES.append(Case(row, case, f'{difference:.1e}', limit, difference / max(tolerance, 1e-99)))


def check_apart(row, case, a, b, least=1e-3):
    """Record that two tensors differ by `least` or more. Such a control shows that equality is not trivial."""
    difference = (a - b).abs().max().item()
    CASES.append(Case(row, case, f'{difference:.1e}', f'> {least:.0e}', least / max(difference, 1e-99)))


def check_true(row, case, condition):
    """Record whether something holds."""
    CASES.append(Case(row, case, 'yes' if condition else 'no', 'yes', 0.0 if condition else math.inf))


def remark(text):
    """A line of the table without a number: what is not checked, and why."""
    CASES.append(Case(text, '', '', '', 0.0))


# ---------------------------------------------------------------------------------------------------------------------
# models and random numbers

def model_files():
    """{name: path} of every model file: those beside this file, then those in baselines/."""
    files = {}
    for path in [*sorted(HERE.glob('model_*.py')), *sorted(HERE.glob('baselines/model_*.py'))]:
        files.setdefault(path.stem.removeprefix('model_'), path)
    return files


FILES = model_files()
CHOSEN = list(FILES)  # names of the model files that are checked; the command line may shorten it


@functools.cache
def load(name):
    """The module of a model file."""
    if name in OURS:
        return OURS[name]
    spec = importlib.util.spec_from_file_location(f'model_{name}', FILES[name])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def chosen(*modules):
    """Those of the modules that are to be checked."""
    return [module for module in modules if module.__name__.removeprefix('model_') in CHOSEN]


VARIANTS = {  # name: fields of the Config, at small sizes; any other model file runs with its defaults
    'nope': {
        'nope': dict(),
        'nope, absolute': dict(absolute=True),
    },
    'composite': {
        'composite': dict(kernel_size=5, dynamic_key=True),
        'composite, far + near': dict(kernel_size=5, attention='fast'),
    },
    'conv': {
        'conv': dict(kernel_size=5, queries_keys=True, values=True, output=True, bias=True),
        'conv, outside the scores': dict(kernel_size=5, lightweight=False, dynamic=False, values=True),
        'conv, dynamic convolution only': dict(kernel_size=5, mixer='dynamic', queries_keys=True, output=True),
        'conv, lightweight convolution only': dict(kernel_size=5, mixer='lightweight', output=False),
    },
    'kernelized': {
        'kernelized': dict(max_distance=4, n_features=8),
        'kernelized, chunked': dict(max_distance=3, n_features=8, attention='chunked', feature_map='orf'),
        'kernelized, plain random features': dict(normalize=False, rpe=False, n_features=8),
    },
}


def schemes():
    """(name, model file, fields of its Config) of every scheme that is to be checked."""
    for file in CHOSEN:
        for name, fields in VARIANTS.get(file, {file: {}}).items():
            yield name, file, fields


def is_relative(file, fields):
    """Whether a scheme promises that moving a text moves its logits."""
    return getattr(load(file), 'RELATIVE', True) and not fields.get('absolute', False)


def make(module, **fields):
    """A float64 model whose every parameter is random, so that no term of it is zero, and tokens (2, 21) for it."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16)
    model = module.Model(module.Config(**{**sizes, **fields})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model, torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(0))


def make_layer(module, causal, **fields):
    """The Attention of a model of one layer, H heads of D channels, and an input x (B, T, H * D)."""
    model, _ = make(module, causal=causal, n_layer=1, n_head=H, n_embd=H * D, **fields)
    return model.h[0].attn, random(B, T, H * D)


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).mul_(scale).requires_grad_()


def random_qkv(batch=B, heads=H, tokens=T, channels=D):
    return [random(batch, heads, tokens, channels, seed=seed) for seed in range(3)]


def with_gradients(f, inputs, parameters=()):
    """[value, gradient of every input and parameter] of f(*inputs) under a fixed random cotangent."""
    y = f(*inputs)
    cotangent = random(*y.shape, seed=99).detach().to(y)
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *parameters], cotangent, materialize_grads=True)]


def described(fields):
    return ', '.join(f'{name}={value}' for name, value in fields.items()) or 'the defaults'


# ---------------------------------------------------------------------------------------------------------------------
# chapter 1: relative positions are convolutions

def clip(offset):
    """The entry of a kernel that belongs to an offset j - i."""
    return max(-K, min(K, offset)) + K


def softmax_loops(score, v, causal):
    """score(b, h, i, j) and a softmax by hand, one query at a time -> (B, nh, T, hs)."""
    rows = []
    for b in range(v.size(0)):
        for h in range(v.size(1)):
            for i in range(v.size(2)):
                seen = range(i + 1 if causal else v.size(2))
                a = torch.stack([score(b, h, i, j) for j in seen])
                a = (a - a.max()).exp()
                rows.append(sum(w * v[b, h, j] for w, j in zip(a / a.sum(), seen)))
    return torch.stack(rows).view(v.shape)


def kernel_loops(q, k, v, kernel_scores, causal):
    """Softmax attention with kernel_scores (B, nh, T, 2K+1) added at each clipped offset, one query at a time."""
    def score(b, h, i, j):
        return q[b, h, i] @ k[b, h, j] / math.sqrt(D) + kernel_scores[b, h, i, clip(j - i)]
    return softmax_loops(score, v, causal)


def projections(attention, x):
    """q, k, v (B, nh, T, hs) from the layer's own weights, no biases."""
    parts = [F.linear(x, weight) for weight in attention.c_attn.weight.split(x.size(2))]
    return [part.view(x.size(0), x.size(1), H, D).transpose(1, 2) for part in parts]


def output(attention, y):
    """y (B, nh, T, hs) through the layer's output projection -> (B, T, C)."""
    return F.linear(y.transpose(1, 2).flatten(2), attention.c_proj.weight)


@proof(1, 'composite')
def test_shaw_is_a_dynamic_convolution():
    """Shaw's embedding of an offset, added to the key, is a kernel that the query makes (equation 5)."""
    for causal, side in SIDES:
        def shaw(q, k, v, w):
            def score(b, h, i, j):
                return q[b, h, i] @ (k[b, h, j] + w[clip(j - i)]) / math.sqrt(D)
            return softmax_loops(score, v, causal)

        def ours(q, k, v, w):
            return composite.attend_dense(q, k, v, q @ w.T / math.sqrt(D), causal)
        inputs = [*random_qkv(), random(WIDTH, D)]
        check("query-made kernel in the scores = Shaw's embeddings as loops", side,
              with_gradients(ours, inputs), with_gradients(shaw, inputs))


@proof(1, 'composite')
def test_t5_is_a_fixed_convolution():
    """T5's bias of an offset is a fixed kernel, one per head (equation 4)."""
    for causal, side in SIDES:
        def t5(q, k, v, beta):
            entries = [[clip(j - i) for j in range(T)] for i in range(T)]
            toeplitz = torch.stack([torch.stack([beta[:, e] for e in row], -1) for row in entries], 1)  # (nh, T, T)
            scores = torch.einsum('bhid,bhjd->bhij', q, k) / math.sqrt(D) + toeplitz  # (B, nh, T, T)

            def score(b, h, i, j):
                return scores[b, h, i, j]
            return softmax_loops(score, v, causal)

        def ours(q, k, v, beta):
            return composite.attend_dense(q, k, v, beta[None, :, None].expand(1, H, T, WIDTH), causal)
        inputs = [*random_qkv(), random(H, WIDTH)]
        check("fixed kernel in the scores = T5's bias as a Toeplitz matrix", side,
              with_gradients(ours, inputs), with_gradients(t5, inputs))


@proof(1, 'composite')
def test_kernel_alone_is_a_convolution():
    """Without content, attention with a fixed kernel is a lightweight convolution with normalized weights (equation 3)."""
    beta, v = random(H, WIDTH).detach(), random(B, H, T, D).detach()
    window = torch.full((1, H, T, WIDTH), -1e9, dtype=torch.float64)  # both ends shut: they stand for all farther tokens
    window[..., 1:-1] = beta[:, None, 1:-1]
    q = torch.zeros(B, H, T, D, dtype=torch.float64)
    kernel = beta.exp()[:, None, 1:-1]  # (nh, 1, 2K-1)
    sums = F.conv1d(v.permute(0, 3, 1, 2).reshape(B * D, H, T), kernel, padding=K - 1, groups=H)  # (B hs, nh, T)
    norms = F.conv1d(torch.ones(1, H, T, dtype=torch.float64), kernel, padding=K - 1, groups=H)
    reference = (sums / norms).view(B, D, H, T).permute(0, 2, 3, 1)  # (B, nh, T, hs)
    check('attention with a fixed kernel only = normalized conv1d', 'both sides',
          composite.attend_dense(q, q, v, window, causal=False), reference)


@proof(1, 'composite')
def test_composite_layer_is_equation_6():
    """Composite attention is content + query-made convolution + fixed convolution in one softmax (equation 6)."""
    switches = (dict(), dict(dynamic_key=True), dict(content=False), dict(dynamic=False),
                dict(fixed=False, content=False, dynamic_key=True))
    for causal, side in SIDES:
        for fields in switches:
            attention, x = make_layer(composite, causal, kernel_size=WIDTH, **fields)

            def loops(x):
                q, k, v = projections(attention, x)

                def score(b, h, i, j):
                    a = 0 * q[b, h, i, 0]
                    if fields.get('content', True):
                        a = a + q[b, h, i] @ k[b, h, j] / math.sqrt(D)
                    if fields.get('dynamic', True):
                        a = a + q[b, h, i] @ attention.dynamic[clip(j - i)] / math.sqrt(D)
                    if fields.get('dynamic_key', False):
                        a = a + k[b, h, j] @ attention.dynamic_key[clip(i - j)] / math.sqrt(D)
                    if fields.get('fixed', True):
                        a = a + attention.fixed[h, clip(j - i)]
                    return a
                return output(attention, softmax_loops(score, v, causal))
            check('composite layer = equation 6 as loops', f'{side}, {described(fields)}',
                  with_gradients(attention, [x], attention.parameters()),
                  with_gradients(loops, [x], attention.parameters()), 1e-11)


@proof(1, 'composite')
def test_zero_kernels_are_plain_attention():
    """With kernels of zeros composite attention is plain attention (equation 1)."""
    zero = torch.zeros(1, H, T, WIDTH, dtype=torch.float64)
    for causal, side in SIDES:
        def ours(q, k, v):
            return composite.attend_dense(q, k, v, zero, causal)
        plain = partial(F.scaled_dot_product_attention, is_causal=causal)
        check('composite attention with zero kernels = scaled_dot_product_attention', side,
              with_gradients(ours, random_qkv()), with_gradients(plain, random_qkv()))


# ---------------------------------------------------------------------------------------------------------------------
# chapter 2: composite attention without a (T, T) matrix

@proof(2, 'composite')
def test_skewing_is_a_clipped_index():
    """The dense form lays kernels along diagonals by skewing rows: entry (i, j) is that of the clipped offset j - i."""
    def compare(k, rows, past, n):
        def skewed(kernel):
            return composite.spread(kernel, past, n)

        def indexed(kernel):
            index = [[max(-k, min(k, j - past - i)) + k for j in range(n)] for i in range(rows)]
            return torch.stack([kernel[:, i, index[i]] for i in range(rows)], 1)
        inputs = [random(2, rows, 2 * k + 1)]
        check('kernels along diagonals = clipped index', f'{rows} rows, {n} columns, {past} before, k = {k}',
              with_gradients(skewed, inputs), with_gradients(indexed, inputs))

    for k in (0, 1, 3, 9):
        for queries in (1, 2, 7):
            for keys in (queries, queries + 1, queries + 6):
                compare(k, queries, keys - queries, keys)  # kernels made by queries
                compare(k, keys, queries - keys, queries)  # kernels made by keys


@proof(2, 'composite')
def test_dense_form_at_extreme_biases():
    """Biases of hundreds of nats overflow nowhere and cost no digit."""
    for size in (300.0, -300.0):
        inputs = [*random_qkv(1, 1), random(1, 1, T, WIDTH, scale=size)]
        check('dense = loops, biases of hundreds of nats', f'causal, scale {size:+.0f}',
              with_gradients(composite.attend_dense, inputs), with_gradients(partial(kernel_loops, causal=True), inputs),
              1e-11, least=1)  # the softmax is saturated: most gradients vanish


@proof(2, 'composite', 'conv')
def test_far_and_near_are_the_dense_form():
    """Flash attention to far keys and a convolution over near ones, joined by their log-sum-exp, is composite attention."""
    def compare(row, case, module, inputs, reference, causal, tolerance=1e-11):
        ours = with_gradients(partial(module.attend_fast, causal=causal), inputs)
        check(row, case, ours, with_gradients(partial(reference, causal=causal), inputs), tolerance, least=1)

    slope = torch.linspace(-500, 500, WIDTH, dtype=torch.float64).expand(1, H, T, WIDTH)  # all the weight on one end
    for module in chosen(composite, conv):
        for causal, side in SIDES:
            case = f'{module.__name__}, {side}'
            for size in (1.0, 300.0, -300.0):
                inputs = [*random_qkv(), random(B, H, T, WIDTH, scale=size)]
                compare('far + near = loops', f'{case}, biases of scale {size:+.0f}', module, inputs, kernel_loops, causal)
            for tokens in (1, 2, 8, 9, 10, 17, 67, 301):
                for k in (0, 1, 2, 8):
                    for batch in (1, B):  # one kernel for the whole batch, or one for each text
                        inputs = [*random_qkv(tokens=tokens), random(batch, H, tokens, 2 * k + 1, scale=3)]
                        compare('far + near = dense, 1 to 301 tokens, kernels of 1 to 17',
                                f'{case}, {tokens} tokens, kernel of {2 * k + 1}, batch of {batch}',
                                module, inputs, composite.attend_dense, causal)
            for sign in (1, -1):
                inputs = [*random_qkv(), (sign * slope).clone().requires_grad_()]
                compare('far + near = dense, biases from -500 to +500 nats', f'{case}, slope {sign:+d}',
                        module, inputs, composite.attend_dense, causal)
            across = [random(B, H, D, 20, seed=seed).transpose(2, 3) for seed in range(3)]  # channels not side by side
            across.append(random(1, H, 20, WIDTH))
            check('far + near = dense, inputs of any memory layout', case,
                  module.attend_fast(*across, causal), composite.attend_dense(*across, causal))


@proof(2, 'composite')
def test_far_and_near_in_low_precision():
    """In float32 and bfloat16 far + near is not much farther from float64 than the dense form is."""
    for causal, side in SIDES:
        for dtype, unit in ((torch.float32, 6e-8), (torch.bfloat16, 4e-3)):
            exact = [x.detach().to(dtype).double() for x in random_qkv(2, 2, 200, 16)]
            exact.append(random(2, 2, 200, 17, scale=3).detach().float().double())

            def results(form, dtypes):
                inputs = [x.to(d).requires_grad_() for x, d in zip(exact, dtypes)]
                return [x.double() for x in with_gradients(partial(form, causal=causal), inputs)]
            low = [dtype, dtype, dtype, torch.float32]
            ours, dense = results(composite.attend_fast, low), results(composite.attend_dense, low)
            reference = results(composite.attend_dense, [torch.float64] * 4)
            for name, a, b, c in zip(('value', 'dq', 'dk', 'dv', 'dkernel'), ours, dense, reference):
                limit = 2 * ((b - c).abs().max() / c.abs().max()).item() + 16 * unit
                check(f'far + near in {str(dtype)[6:]} is as exact as dense', f'{side}, {name}', a, c, limit)


@proof(2, 'composite', 'conv')
def test_fast_and_dense_models_agree():
    """Whole models give the same logits and gradients in either form; 'auto' takes the fast one at 260 tokens."""
    for module in chosen(composite, conv):
        for causal, side in SIDES:
            model, _ = make(module, causal=causal, kernel_size=WIDTH, block_size=260)
            dense = logits_and_gradients(model, 'dense', 260)
            for form in ('fast', 'auto'):
                check(f'whole model, attention={form!r} = dense', f'{module.__name__}, {side}',
                      logits_and_gradients(model, form, 260), dense, 1e-9)


def logits_and_gradients(model, form, tokens):
    """Of the loss on a random text, with the attention of all layers in one form."""
    idx = torch.randint(50, (2, tokens), generator=torch.Generator().manual_seed(1))
    for block in model.h:
        block.attn.attention = form
    logits, loss = model(idx, idx.roll(-1, 1))
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


# ---------------------------------------------------------------------------------------------------------------------
# chapter 3: convolutions before, inside and after attention, or replacing it

def banded_row(w, i, n, causal):
    """Row i of the (n, n) Toeplitz matrix of a kernel w (width,): entry j is the weight of offset j - i."""
    first = 1 - len(w) if causal else -(len(w) // 2)
    row = []
    for j in range(n):
        inside = 0 <= j - i - first < len(w)
        row.append(w[j - i - first] if inside else 0 * w[0])
    return torch.stack(row)


def banded(w, n, causal):
    """The (n, n) Toeplitz matrix of a kernel w (width,)."""
    return torch.stack([banded_row(w, i, n, causal) for i in range(n)])


def depthwise_matrices(x, w, causal):
    """x (B, T, C), w (C, width): each channel times its own banded matrix."""
    return torch.stack([banded(w[c], x.size(1), causal) @ x[:, :, c, None] for c in range(w.size(0))], 2).squeeze(-1)


def lightweight_matrices(x, w, causal):
    """x (B, nh, T, hs), w (nh, width): each head times its own banded matrix."""
    return torch.stack([banded(w[h], x.size(2), causal) @ x[:, h] for h in range(w.size(0))], 1)


def dynamic_matrices(x, w, causal):
    """x (B, nh, T, hs), w (B, nh, T, width): each token has its own row of a banded matrix."""
    rows = []
    for b in range(x.size(0)):
        for h in range(x.size(1)):
            for i in range(x.size(2)):
                rows.append(banded_row(w[b, h, i], i, x.size(2), causal) @ x[b, h])
    return torch.stack(rows).view(x.shape)


@proof(3, 'conv')
def test_convolutions_are_banded_toeplitz_matrices():
    """A convolution is a banded Toeplitz matrix: one per channel, head, or head and token (equations 2, 3; Wu et al.)."""
    def compare(row, case, ours, reference, inputs, causal):
        check(row, case, with_gradients(partial(ours, causal=causal), inputs),
              with_gradients(partial(reference, causal=causal), inputs))

    for causal, side in SIDES:
        for n, width in ((1, 5), (3, 5), (11, 5), (11, 1), (11, 17)):
            case = f'{side}, {n} tokens, kernel of {width}'
            compare('depthwise convolution = one banded matrix per channel', case,
                    conv.depthwise_conv, depthwise_matrices, [random(B, n, D), random(D, width)], causal)
            compare('lightweight convolution = one banded matrix per head', case,
                    conv.lightweight_conv, lightweight_matrices, [random(B, H, n, D), random(H, width)], causal)
            compare('dynamic convolution = one banded row per token', case,
                    conv.dynamic_conv, dynamic_matrices, [random(B, H, n, D), random(B, H, n, width)], causal)


CONV_PARAMETERS = {'lightweight': {'lightweight'}, 'dynamic': {'dynamic'}, 'queries_keys': {'conv_q', 'conv_k'},
                   'values': {'conv_v'}, 'output': {'conv_out'}}  # what each switch of model_conv.py adds
CONV_LAYERS = (  # where the convolution is, the switches that are on, the mixer
    ('inside attention', ['lightweight'], 'attention'),
    ('inside attention', ['dynamic'], 'attention'),
    ('before attention', ['queries_keys'], 'attention'),
    ('before attention', ['values'], 'attention'),
    ('after attention', ['output'], 'attention'),
    ('everywhere at once', list(CONV_PARAMETERS), 'attention'),
    ('replacing attention', [], 'lightweight'),
    ('replacing attention', ['output'], 'lightweight'),
    ('replacing attention', ['queries_keys', 'values'], 'dynamic'),
)


def conv_projection(weights, i, name, x, causal):
    """Queries (i = 0), keys (1) or values (2): if the kernel `name` exists, it convolves x for the first of three heads."""
    weight = weights['c_attn.weight'].split(H * D)[i]
    bias = weights['c_attn.bias'].split(H * D)[i] if 'c_attn.bias' in weights else 0
    y = x @ weight.T + bias
    if name in weights:
        convolved = depthwise_matrices(x, weights[name], causal) @ weight.T + bias
        y = torch.cat((convolved[..., :D], y[..., D:]), 2)
    return y.view(B, T, H, D).transpose(1, 2)  # (B, nh, T, hs)


def conv_layer(weights, x, mixer, causal):
    """The layer of model_conv.py from its own parameters, as loops and explicit matrices."""
    q, k, v = (conv_projection(weights, i, name, x, causal) for i, name in enumerate(('conv_q', 'conv_k', 'conv_v')))

    def score(b, h, i, j):
        a = q[b, h, i] @ k[b, h, j] / math.sqrt(D)
        if 'dynamic' in weights:
            a = a + q[b, h, i] @ weights['dynamic'][clip(j - i)] / math.sqrt(D)
        if 'lightweight' in weights:
            a = a + weights['lightweight'][h, clip(j - i)]
        return a
    if mixer == 'attention':
        y = softmax_loops(score, v, causal)
    elif mixer == 'lightweight':  # the weights sum to one over the kernel's width
        y = lightweight_matrices(v, weights['lightweight'].softmax(-1), causal)
    else:
        y = dynamic_matrices(v, torch.einsum('bhid,rd->bhir', q, weights['dynamic']).softmax(-1), causal)
    y = y.transpose(1, 2).reshape(B, T, H * D)
    if 'conv_out' in weights:
        y = y + depthwise_matrices(v.transpose(1, 2).reshape(B, T, H * D), weights['conv_out'], causal)
    return y @ weights['c_proj.weight'].T + weights.get('c_proj.bias', 0)


@proof(3, 'conv')
def test_convolution_layer_is_its_equations():
    """Each injection point of the layer is a product with such a matrix (equations 2 to 5, 7; Wu et al.)."""
    for causal, side in SIDES:
        for place, on, mixer in CONV_LAYERS:
            fields = {switch: switch in on for switch in CONV_PARAMETERS}
            attention, x = make_layer(conv, causal, kernel_size=WIDTH, bias='values' in on, mixer=mixer, **fields)
            weights = dict(attention.named_parameters())
            expected = {name for switch in on for name in CONV_PARAMETERS[switch]}
            if mixer != 'attention':
                expected.add(mixer)
            if mixer == 'dynamic':
                expected.remove('conv_k')  # nobody reads keys
            case = f'{side}, mixer {mixer}, {", ".join(on) or "nothing else"}'
            check_true('the layer has the parameters of its switches and no others', case,
                       {name for name in weights if not name.startswith('c_')} == expected)
            explicit = partial(conv_layer, weights, mixer=mixer, causal=causal)
            check(f'layer with a convolution {place} = explicit matrices', case,
                  with_gradients(attention, [x], weights.values()), with_gradients(explicit, [x], weights.values()), 1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# chapter 4: kernelized attention with relative positions

def equation_10(q, k, v, b, causal=True, valid=None):
    """Kernelized attention with relative positions, one query at a time -> (B, nh, T, hs)."""
    reach = b.size(1) // 2
    rows = []
    for i in range(q.size(2)):
        seen = range(i + 1 if causal else k.size(2))
        weights = []
        for j in seen:
            entry = max(-reach, min(reach, j - i)) + reach
            weight = (q[:, :, i] * k[:, :, j]).sum(-1) * b[:, entry].exp()  # (B, nh)
            if valid is not None and j != i:  # padding is seen by itself only
                weight = weight * valid[:, j, None]
            weights.append(weight)
        total = sum(weights)
        rows.append(sum(weight[..., None] * v[:, :, j] for weight, j in zip(weights, seen)) / total[..., None])
    return torch.stack(rows, 2)


def kernelized_inputs(n, reach, m=6):
    """Positive features q, k (B, nh, n, m), values v (B, nh, n, hs), asymmetric b (nh, 2 reach + 1)."""
    q, k = (random(B, H, n, m, seed=seed).detach().exp().requires_grad_() for seed in (0, 1))
    return [q, k, random(B, H, n, D, seed=2), random(H, 2 * reach + 1)]


@proof(4, 'kernelized')
def test_toeplitz_is_circulant_fft():
    """A Toeplitz matrix times a vector is a circulant one of twice the size, and that is two FFTs (section 3.2)."""
    def explicit(c, x):
        n = x.size(-1)
        return torch.stack([sum(c[:, j - i + n - 1] * x[:, :, j] for j in range(n)) for i in range(n)], -1)
    for n in (1, 2, 5, 16, 31):
        inputs = [random(3, 2 * n - 1), random(2, 3, n)]  # asymmetric
        check('Toeplitz matrix times vector by FFT = explicit sums', f'{n} tokens',
              with_gradients(kernelized.toeplitz_fft, inputs), with_gradients(explicit, inputs), 1e-11, least=1)


@proof(4, 'kernelized')
def test_dense_fft_and_chunked_are_equation_10():
    """Dense, by FFT in O(T log T), or in chunks in O(T): all are equation 10, for every length and reach of b."""
    sizes = ((1, 0), (1, 3), (9, 0), (9, 1), (9, 4), (9, 8), (9, 20),
             (23, 0), (23, 1), (23, 3), (23, 4), (23, 5), (23, 22), (23, 40))
    for causal, side in SIDES:
        for n, reach in sizes:
            mask = torch.rand(B, n, generator=torch.Generator().manual_seed(n)) > 0.4
            for valid, padding in ((None, 'no padding'), (mask, 'padded')):
                inputs = kernelized_inputs(n, reach)
                case = f'{side}, {n} tokens, reach {reach}, {padding}'
                known = dict(causal=causal, valid=valid)
                loops = with_gradients(partial(equation_10, **known), inputs)
                dense = with_gradients(partial(kernelized.attend_dense, **known), inputs)
                check('dense = equation 10 as loops', case, dense, loops, 1e-11, least=1)
                fft = with_gradients(partial(kernelized.attend_fft, **known), inputs)
                check('FFT = equation 10 as loops', case, fft, loops, 1e-10, least=1)
                for chunk in (1, 2, 4, 7, 23, 64):
                    chunked = with_gradients(partial(kernelized.attend_chunked, **known, chunk=chunk), inputs)
                    check('chunked = equation 10 as loops', f'{case}, chunks of {chunk}', chunked, loops, 1e-11, least=1)


@proof(4, 'kernelized')
def test_running_state_is_equation_10():
    """Decoding needs running sums and the last R keys only: a state of constant size gives what all keys would."""
    valid = torch.arange(23) >= torch.tensor([[0], [6]])  # (2, 23): the second text is padded on the left
    for reach in (0, 1, 3, 30):
        q, k, v, b = kernelized_inputs(23, reach)
        reference = equation_10(q, k, v, b, True, valid)
        for pieces in ([1] * 23, [9, 1, 1, 5, 7], [23]):
            case = f'reach {reach}, {len(pieces)} pieces'
            state = {}
            parts = zip(*(x.split(pieces, 2) for x in (q, k, v)), valid.split(pieces, 1))
            y = torch.cat([kernelized.attend_recurrent(*qkv, b, seen, state) for *qkv, seen in parts], 2)
            check('running state = equation 10 as loops', case, [y[0], y[1, :, 6:]], [reference[0], reference[1, :, 6:]])
            check_true('the state keeps R keys and one sum per feature and channel', case,
                       state['k'].size(2) == min(reach, 23) and state['kv'].shape == (B, H, 6, D))


@proof(4, 'kernelized')
def test_kernelized_layer_is_its_equations():
    """The layer is Algorithm 1: queries and keys over their norm, random features, equation 10; each part can be off."""
    variants = (dict(), dict(normalize=False), dict(rpe=False), dict(normalize=False, rpe=False),
                dict(feature_map='trf'), dict(feature_map='trf', normalize=False, n_features=200),
                dict(feature_map='orf'), dict(feature_map='sphere'), dict(feature_map='elu', normalize=False))
    for causal, side in SIDES:
        for fields in variants:
            attention, x = make_layer(kernelized, causal, **{'max_distance': 3, 'n_features': 8, **fields})
            m = fields.get('n_features', 8)

            def phi(x):
                x = x / x.norm(dim=-1, keepdim=True) if fields.get('normalize', True) else x / D ** 0.25
                square = x.pow(2).sum(-1)
                if fields.get('feature_map') == 'elu':
                    return torch.where(x > 0, x + 1, x.exp())
                if fields.get('feature_map') == 'trf':
                    waves = torch.cat([torch.sin(x @ attention.w.T), torch.cos(x @ attention.w.T)], -1)
                    return waves * (square / 2).exp()[..., None] / m ** 0.5
                return torch.stack([torch.exp(x @ w - square / 2) / m ** 0.5 for w in attention.w], -1)

            def explicit(x):
                q, k, v = projections(attention, x)
                b = attention.b if fields.get('rpe', True) else torch.zeros(H, 1, dtype=torch.float64)
                return output(attention, equation_10(phi(q), phi(k), v, b, causal))
            check('kernelized layer = Algorithm 1 and equation 10 as loops', f'{side}, {described(fields)}',
                  with_gradients(attention, [x], attention.parameters()),
                  with_gradients(explicit, [x], attention.parameters()), 1e-9)


@proof(4, 'kernelized')
def test_random_features_are_unbiased():
    """E[phi(x).phi(y)] = exp(x.y), with the variance (exp(|x + y|^2) - 1) exp(2 x.y) / m of Lemma 2."""
    x = F.normalize(random(D, seed=1).detach(), dim=0) * 0.6
    y = F.normalize(random(D, seed=2).detach(), dim=0) * 0.8
    torch.manual_seed(0)
    m, draws = 16, 60000
    w = kernelized.random_matrix(m * draws, D).double()
    positive = (kernelized.features(x, w) * kernelized.features(y, w)) * m * draws  # one feature each, not averaged
    estimates = positive.view(draws, m).mean(1)
    case = f'{draws} draws'
    check('mean of positive features = exp(x.y)', case, estimates.mean(), (x @ y).exp(), 0.01)
    variance = ((x + y).square().sum().exp() - 1) * (2 * x @ y).exp() / m
    check('variance of positive features = Lemma 2', case, estimates.var(), variance, 0.05)
    waves = kernelized.features(x, w, 'trf') * kernelized.features(y, w, 'trf')
    check('mean of trigonometric features = exp(x.y)', case, waves.sum(), (x @ y).exp(), 0.01)
    ratio = kernelized.features(x, w[:8], 'prf', stable=True) / kernelized.features(x, w[:8])
    factor = (x.square().sum() / 2 - (x @ w[:8].T).max()).exp()
    check("a query's stabilized features = the plain ones times one factor", '8 features', ratio, factor.expand(8))
    one, draws = torch.full((D,), D ** -0.5, dtype=torch.float64), 20000
    w = kernelized.random_matrix(draws * D, D, 'orf').double()
    for sign in (1, -1):
        mean = (kernelized.features(one, w) * kernelized.features(sign * one, w)).sum()
        exact = torch.tensor(sign, dtype=torch.float64).exp()
        check('mean of orthogonal features = exp(x.y)', f'{draws} draws, x.y = {sign}', mean, exact, 0.06)
    w = kernelized.random_matrix(3 * D, D, 'orf').view(3, D, D).double()
    check('rows of an orthogonal block times each other = 0', '3 blocks', w @ w.transpose(1, 2),
          torch.diag_embed(w.square().sum(-1)), 1e-5)
    check('length of features on a sphere = sqrt(hs)', '20 features',
          kernelized.random_matrix(20, D, 'sphere').norm(dim=1), torch.full((20,), D ** 0.5), 1e-5)


@proof(4, 'kernelized')
def test_error_grows_with_the_norm():
    """The error of the features grows with the norm of queries and keys and falls with their number (Theorem 3)."""
    def error(size, m):
        """Mean L1 distance of one row of attention over 64 keys from the softmax."""
        q, k = (F.normalize(random(64, 32, seed=seed).detach(), dim=1) * size for seed in (3, 4))
        exact = (q @ k.T).softmax(1)
        distances = []
        for w in kernelized.random_matrix(50 * m, 32).double().split(m):
            a = kernelized.features(q, w) @ kernelized.features(k, w).T
            distances.append((a / a.sum(1, keepdim=True) - exact).abs().sum(1).mean())
        return sum(distances) / len(distances)
    torch.manual_seed(0)
    large, small = error(2, 64), error(1, 64)
    check_apart('error at norm 2 > error at norm 1', '64 features', large, small, 0.2)
    check_true('and not the other way round', 'norms', large > small)
    few, many = error(1, 16), error(1, 256)
    check_apart('error of 16 features > error of 256', 'norm 1', few, many, 0.2)
    check_true('and not the other way round', 'features', few > many)


@proof(4, 'kernelized')
def test_many_features_are_softmax_attention():
    """With many features kernelized attention is softmax attention of normalized q and k with the bias b (equation 6)."""
    torch.manual_seed(0)
    w = kernelized.random_matrix(2 ** 16, D)
    q, k, v = (x.detach() for x in random_qkv())
    q, k, b = F.normalize(q, dim=-1), F.normalize(k, dim=-1), random(H, WIDTH).detach()

    def score(n, h, i, j):
        return q[n, h, i] @ k[n, h, j] + b[h, clip(j - i)]
    ours = kernelized.attend_dense(kernelized.features(q, w), kernelized.features(k, w), v, b)
    check('65,536 features = softmax with the same b as loops', 'causal', ours, softmax_loops(score, v, True), 0.02)


@proof(4, 'kernelized')
def test_kernelized_at_extreme_biases():
    """float32 survives b from -100 to +100 nats, vanishing vectors and one visible key: equal to loops in float64."""
    n, w, nothing = 23, random(8, D, seed=5).detach().float(), torch.zeros(D)

    def compare(case, reach, slope, causal, valid):
        q, k, v = (x.detach().float() for x in random_qkv(tokens=n))
        q, k = kernelized.features(F.normalize(q, dim=-1), w), kernelized.features(F.normalize(k, dim=-1), w)
        q[:, :, 5] = k[:, :, 6] = kernelized.features(nothing, w)
        b = (slope * torch.linspace(-100, 100, 2 * reach + 1)).repeat(H, 1)
        inputs = [x.requires_grad_() for x in (q, k, v, b)]
        known = dict(causal=causal, valid=valid)
        loops = with_gradients(partial(equation_10, **known), [x.detach().double().requires_grad_() for x in inputs])
        dense = with_gradients(partial(kernelized.attend_dense, **known), inputs)
        check('dense in float32 = loops in float64', case, dense, loops, 2e-4, least=1)
        chunked = with_gradients(partial(kernelized.attend_chunked, **known, chunk=4), inputs)
        check('chunked in float32 = loops in float64', case, chunked, loops, 2e-4, least=1)
        fft = with_gradients(partial(kernelized.attend_fft, **known), inputs)
        check_true('FFT in float32 is finite', case, all(x.isfinite().all() for x in fft))
        if causal and valid is None:
            state, seen = {}, torch.ones(B, 1, dtype=torch.bool)
            parts = zip(*(x.split(1, 2) for x in (q, k, v)))
            y = torch.cat([kernelized.attend_recurrent(*qkv, b, seen, state) for qkv in parts], 2)
            check('running state in float32 = loops in float64', case, y, loops[0], 2e-4, least=1)

    one_key = torch.arange(n).expand(B, n) == 4
    for causal, side in SIDES:
        for reach in (3, 30):
            for slope in (1, -1):
                case = f'{side}, reach {reach}, slope {slope:+d}'
                compare(case, reach, slope, causal, None)
                compare(f'{case}, one key', reach, slope, causal, one_key)


@proof(4, 'kernelized')
def test_kernelized_layer_is_finite():
    """Inputs of any size give finite values and gradients in float32."""
    for normalize in (True, False):
        model, _ = make(kernelized, n_layer=1, normalize=normalize, max_distance=3)
        attention = model.float().h[0].attn
        for size in (0.0, 1e-8, *range(1, 26), 1000.0):
            for n in (1, 9):
                y = attention(size * torch.randn(2, n, 16, generator=torch.Generator().manual_seed(0)))
                gradients = torch.autograd.grad(y.sum(), list(attention.parameters()))
                check_true('the layer and its gradients are finite', f'normalize={normalize}, size {size}, {n} tokens',
                           all(x.isfinite().all() for x in (y, *gradients)))


@proof(4, 'kernelized')
def test_running_state_in_low_precision():
    """In bfloat16 the running sums stay float32, and 700 tokens decoded one by one stay near the parallel form."""
    for autocast in (True, False):
        model, _ = make(kernelized, max_distance=4, n_layer=1, n_features=8)
        model.to(torch.float32 if autocast else torch.bfloat16)
        idx = torch.randint(50, (1, 700), generator=torch.Generator().manual_seed(0))
        state = model.new_state()
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            whole = model(idx)[0].float()  # 700 tokens: the chunked form
            parts = torch.cat([model(token, state=state)[0] for token in idx.split(1, 1)], 1).float()
        case = 'autocast' if autocast else 'a bfloat16 model'
        check('bfloat16: 700 tokens from a state = all at once', case, parts, whole, 0.05)
        check_true('its sums are float32', case, state[0]['kv'].dtype == state[0]['k_sum'].dtype == torch.float32)


@proof(4, 'kernelized')
def test_forms_of_the_kernelized_model_agree():
    """Whole models give the same logits and gradients in every form; 'auto' takes the chunked one at 300 tokens."""
    for causal, side in SIDES:
        model, _ = make(kernelized, causal=causal, max_distance=5)
        dense = logits_and_gradients(model, 'dense', 300)
        for form in ('fft', 'chunked', 'auto'):
            check(f'whole model, attention={form!r} = dense', side, logits_and_gradients(model, form, 300), dense, 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# chapter 5: no positions

@proof(5, 'nope')
def test_uniform_causal_attention_has_variance_1_over_m():
    """The variance of uniform causal attention at token m is 1/m: the mask leaks the position."""
    n, samples, channels = 32, 4000, 8
    model, _ = make(nope, n_layer=1, n_head=1, n_embd=channels)
    attention = model.h[0].attn
    x = torch.randn(samples, n, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.c_attn.weight.zero_()
        attention.c_attn.weight[2 * channels:] = torch.eye(channels)  # q = k = 0, v = x
        attention.c_proj.weight.copy_(torch.eye(channels))
        y = attention(x)
    m = torch.arange(1, n + 1, dtype=torch.float64)
    check('attention with zero queries = running mean', f'{n} tokens', y, x.cumsum(1) / m[:, None])
    check('its variance at token m = 1/m', '32,000 samples', y.var(dim=(0, 2)) * m, torch.ones_like(m), 0.05)


@proof(5, 'nope')
def test_nope_is_plain_attention():
    """The layer without positions is softmax attention and nothing else, with or without padding."""
    valid = (torch.arange(T) < 8).expand(B, T)
    for causal, side in SIDES:
        attention, x = make_layer(nope, causal)

        def loops(x):
            q, k, v = projections(attention, x)

            def score(b, h, i, j):
                return q[b, h, i] @ k[b, h, j] / math.sqrt(D)
            return output(attention, softmax_loops(score, v, causal))
        check('layer without positions = softmax attention as loops', side,
              with_gradients(attention, [x], attention.parameters()), with_gradients(loops, [x], attention.parameters()))
        check('with padding = loops over the real tokens', side, attention(x, valid)[:, :8], loops(x[:, :8]))


@proof(5, 'nope')
def test_permutation():
    """Without the causal mask the tokens are a bag; the mask alone tells their order."""
    order = torch.randperm(21, generator=torch.Generator().manual_seed(3))

    def logits(module, **fields):
        model, idx = make(module, **fields)
        return model(idx[:, order])[0], model(idx)[0][:, order]
    check('both sides: logits of permuted tokens = permuted logits', 'nope', *logits(nope, causal=False))
    check_apart('with the causal mask they differ', 'nope', *logits(nope))
    check_apart('with positions they differ on both sides', 'composite', *logits(composite, causal=False))
    check_apart('with positions they differ on both sides', 'absolute', *logits(nope, causal=False, absolute=True))


# ---------------------------------------------------------------------------------------------------------------------
# chapter 6: what every model promises, and a new model file too

@proof(6)
def test_later_tokens_change_nothing_before_them():
    """Causality: a token changes no logit before it, and all rounding aside, no gradient flows back from it."""
    for name, file, fields in schemes():
        with attempt(name):
            model, idx = make(load(file), **fields)
            other = torch.cat((idx[:, :13], (idx[:, 13:] + 1) % 50), 1)
            ours, changed = model(idx)[0], model(other)[0]
            check('logits before a changed token = unchanged', name, changed[:, :13], ours[:, :13], 0)
            check_apart('from there on they change', name, changed[:, 13:], ours[:, 13:])
            x = model.wte(idx[:1]).detach().requires_grad_()
            leak = torch.autograd.grad(model.h[0](x)[0, 5].sum(), x)[0][0, 6:]
            check('gradient that reaches a token from later ones = 0', name, leak, torch.zeros_like(leak), 0)
    if 'kernelized' in CHOSEN:
        model, idx = make(kernelized, max_distance=4, n_features=8, attention='fft')
        other = torch.cat((idx[:, :13], (idx[:, 13:] + 1) % 50), 1)
        check('by FFT: the same but for its rounding', 'kernelized, FFT', model(other)[0][:, :13], model(idx)[0][:, :13])


@proof(6)
def test_padding_changes_nothing():
    """Padding that is marked as such changes neither logits nor loss."""
    valid = torch.arange(21) < 14
    for name, file, fields in schemes():
        for causal, side in SIDES:
            case = f'{name}, {side}'
            with attempt(case):
                model, idx = make(load(file), causal=causal, **fields)
                short = model(idx[:, :14])[0]
                padded = model(idx, valid=valid.expand(2, -1))[0][:, :14]
                check('padding on the right = no padding', case, padded, short)
                if is_relative(file, fields):
                    turned = torch.cat((idx[:, 14:], idx[:, :14]), 1)
                    padded = model(turned, valid=valid.flip(0).expand(2, -1))[0][:, 7:]
                    check('padding on the left = no padding', case, padded, short)
                if not causal:
                    check_apart('padding that is not marked is seen', case, model(idx)[0][:, :14], short)
                targets = torch.where(valid, idx.roll(-1, 1), -1)
                by_hand = -short.log_softmax(-1).gather(2, targets[:, :14, None]).mean()
                loss = model(idx, targets, valid=valid.expand(2, -1))[1]
                check('loss with padding = mean over the real tokens', case, loss, by_hand)


@proof(6)
def test_shifting_the_input_shifts_the_output():
    """Only offsets count: a text between paddings gives the same logits wherever it stands."""
    def logits(model, idx, n):
        """Of 12 tokens that have n paddings before and 9 - n after them."""
        place = torch.arange(21)
        tokens = torch.cat((idx[:, :n] * 0, idx[:, :12], idx[:, :9 - n] * 0), 1)
        return model(tokens, valid=((place >= n) & (place < n + 12)).expand(2, -1))[0][:, n:n + 12]
    for name, file, fields in schemes():
        with attempt(name):
            model, idx = make(load(file), causal=False, **fields)
            start = logits(model, idx, 0)
            for n in (4, 9):
                if is_relative(file, fields):
                    check('logits of a text moved by n tokens = those at the start', f'{name}, n = {n}',
                          logits(model, idx, n), start)
                else:
                    check_apart('not relative: moving the text changes its logits', f'{name}, n = {n}',
                                logits(model, idx, n), start)


@proof(6)
def test_decoding_is_the_parallel_form():
    """What is fed token by token from a state gives the logits of the whole text, so sampling is what was trained."""
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[1, :6] = False  # prompts of different lengths, padded on the left
    for name, file, fields in schemes():
        with attempt(name):
            model, idx = make(load(file), **fields)
            whole = model(idx)[0]
            for row, steps in (('one token at a time', [1] * 21), ('pieces of several tokens', [8, 1, 1, 5, 6])):
                state = model.new_state()
                parts = torch.cat([model(part, state=state)[0] for part in idx.split(steps, 1)], 1)
                check(f'{row} = all at once', name, parts, whole)
            state = model.new_state()
            parts = [model(idx[:, :9], valid=valid[:, :9], state=state)[0]]
            parts += [model(token, state=state)[0] for token in idx[:, 9:].split(1, 1)]
            check('after a padded prompt = all at once', name, torch.cat(parts, 1)[valid], model(idx, valid=valid)[0][valid])


@proof(6)
def test_any_length():
    """A text may be longer than block_size, unless the scheme refuses it in words, and the beginning does not notice."""
    for name, file, fields in schemes():
        with attempt(name):
            model, idx = make(load(file), **fields)
            short = model(idx)[0]
            check('one token = the first of many', name, model(idx[:, :1])[0], short[:, :1])
            try:
                long = model(torch.cat((idx, idx, idx), 1))[0]  # 63 tokens, block_size 24
            except ValueError as refusal:
                if file in OURS and is_relative(file, fields):
                    raise
                check_true('no length beyond block_size: a ValueError names block_size', name, 'block_size' in str(refusal))
                continue
            check('beyond block_size, the beginning = the beginning alone', name, long[:, :21], short)


@proof(6)
def test_predicting_some_places_is_predicting_all():
    """A masked model that predicts at some places only gives the logits and the loss of these places."""
    where = torch.tensor([[1, 4, 20], [0, 2, 3]])
    targets = torch.tensor([[3, 1, 4], [1, 5, -1]])
    for name, file, fields in schemes():
        with attempt(name):
            model, idx = make(load(file), causal=False, **fields)
            logits, loss = model(idx, targets, where=where)
            whole = model(idx)[0]
            picked = torch.stack([whole[b, where[b]] for b in range(2)])  # (2, 3, 50)
            losses = [-picked[b, m].log_softmax(-1)[targets[b, m]] for b in range(2) for m in range(3) if targets[b, m] >= 0]
            check('logits and loss at some places = those of all places', name, [logits, loss], [picked, sum(losses) / 5])


@proof(6)
def test_equation_of_its_own():
    """Any other model file is compared with its own equation; those of this project have theirs in chapters 1 to 5."""
    others = [name for name in CHOSEN if name not in OURS]
    if not others:
        remark('no other model file among those checked; see the top of test_equivalence.py for how to add yours')
    for name in others:
        with attempt(name):
            module = load(name)
            if not hasattr(module, 'equation'):
                remark(f'model_{name}.py has no equation(attention, x): the rows above cannot see a wrong formula')
                continue
            for causal, side in SIDES:
                attention, x = make_layer(module, causal)
                ours = with_gradients(attention, [x], attention.parameters())
                reference = with_gradients(partial(module.equation, attention), [x], attention.parameters())
                check(f'Attention of model_{name}.py = its equation(attention, x)', side, ours, reference, 1e-9, least=1)


# ---------------------------------------------------------------------------------------------------------------------
# chapter 7: the same on a GPU

@proof(7)
def test_models_on_a_gpu():
    """Every model in bfloat16, eager and compiled, is near to float64 on the CPU."""
    if not torch.cuda.is_available():
        return remark('no GPU here: bfloat16 and torch.compile are not checked')
    idx = torch.randint(50, (4, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(200).expand(4, -1) < torch.tensor([[200], [150], [100], [7]])
    everything = torch.ones_like(mask)
    for name, file, fields in schemes():
        for causal, side in SIDES:
            for valid, padding in ((mask, 'padded'), (None, 'no padding')):  # without padding, the fast forms
                case = f'{name}, {side}, {padding}'
                with attempt(case), torch.no_grad():
                    model, _ = make(load(file), causal=causal, n_embd=128, block_size=256, **fields)
                    shown = everything if valid is None else valid
                    exact = model.hidden(idx, valid)[shown]
                    model = model.float().cuda()
                    inputs = [idx.cuda(), None if valid is None else valid.cuda()]
                    torch._dynamo.reset()  # or it reaches its limit of recompilations and runs eager
                    with torch.autocast('cuda', torch.bfloat16):
                        eager, compiled = model.hidden(*inputs), torch.compile(model.hidden)(*inputs)
                    check('bfloat16 on the GPU = float64 on the CPU', case, eager.cpu()[shown], exact, 0.1)
                    check('bfloat16 compiled on the GPU = float64 on the CPU', case, compiled.cpu()[shown], exact, 0.1)


@proof(7, 'composite', 'kernelized')
def test_fast_forms_on_a_gpu():
    """The fast forms on a GPU are the dense forms in float32 there."""
    if not torch.cuda.is_available():
        return remark('no GPU here: the fast forms are checked on the CPU only')
    for causal, side in SIDES:
        for n, reach in ((1, 3), (200, 300), (1031, 7)) if 'kernelized' in CHOSEN else ():
            inputs = [x.detach().float().cuda().requires_grad_() for x in kernelized_inputs(n, reach)]
            dense = with_gradients(partial(kernelized.attend_dense, causal=causal), inputs)
            for form in (kernelized.attend_fft, kernelized.attend_chunked):
                check(f'{form.__name__} of model_kernelized.py = dense, float32', f'{side}, {n} tokens, reach {reach}',
                      with_gradients(partial(form, causal=causal), inputs), dense, 1e-2, least=1)
        for n in (1, 8, 9, 200, 1031) if 'composite' in CHOSEN else ():
            exact = [x.detach().cuda().bfloat16() for x in random_qkv(2, 4, n, 64)]
            exact.append(random(2, 4, n, 17).detach().cuda().float())
            dense = with_gradients(partial(composite.attend_dense, causal=causal), [x.float().requires_grad_() for x in exact])
            torch._dynamo.reset()
            compiled = torch.compile(composite.attend_fast, dynamic=False)  # torch 2.11 crashes without it at far + 1 tokens
            for name, form in (('eager', composite.attend_fast), ('compiled', compiled)):
                inputs = [x.clone().requires_grad_() for x in exact]
                check(f'far + near in bfloat16, {name} = dense, float32', f'{side}, {n} tokens',
                      with_gradients(partial(form, causal=causal), inputs), dense, 0.03)


# ---------------------------------------------------------------------------------------------------------------------
# the book

def print_rows(cases, show_all):
    """A line per row with the worst of its cases; below it all of them, or those that failed -> number of rows, failed."""
    rows = {}
    for case in cases:
        rows.setdefault(case.row, []).append(case)
    counted = failed = 0
    for row, cases in rows.items():
        worst = max(cases, key=lambda case: case.badness)
        if not worst.shown:
            print(f'  {row}')
            continue
        verdict = 'PASS' if worst.badness <= 1 else 'FAIL'
        print(f'  {row:74s} {len(cases):6d} {worst.shown:>11s} {worst.limit:>9s}  {verdict}')
        counted += 1
        failed += worst.badness > 1
        shown = cases if show_all else [case for case in cases if case.badness > 1][:5]
        for case in shown:
            mark = 'failed' if case.badness > 1 else ''
            print(f'      {textwrap.shorten(case.name, 76):77s} {case.shown:>11s} {case.limit:>9s}  {mark}'.rstrip())
    return counted, failed


def main():
    parser = argparse.ArgumentParser(description='What equals what in this project, checked. Exit 1 if a row fails.')
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help=f'check the rows about these models only: {", ".join(FILES)} (default: all)')
    parser.add_argument('--all', action='store_true', help='print every case under its row')
    parser.add_argument('--first', action='store_true', help='stop after the first claim that fails')
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in FILES:
            print(f'test_equivalence.py: there is no model {name!r}; choose from {", ".join(FILES)}', file=sys.stderr)
            return 2
    CHOSEN[:] = arguments.models or FILES
    torch.set_num_threads(1)  # many tiny tensors
    began, chapter, counts, cases, failed = time.time(), None, 0, 0, 0
    tests = [value for name, value in globals().items() if name.startswith('test_')]
    for test in tests:
        if test.models and not set(test.models) & set(CHOSEN):
            continue
        with contextlib.suppress(AssertionError):  # CASES knows what failed
            test()
        if test.chapter != chapter:
            chapter = test.chapter
            print(f'\n{chapter}  {CHAPTERS[chapter]}')
            print(f'{"-" * 77}{"cases":>6s} {"worst":>11s} {"limit":>9s}')
        print(f'\n{textwrap.fill(inspect.getdoc(test), 118)}')
        rows, wrong = print_rows(CASES, arguments.all)
        sys.stdout.flush()
        counts, cases, failed = counts + rows, cases + len(CASES), failed + wrong
        if failed and arguments.first:
            break
    print(f'\n{counts} rows, {cases:,} cases, {failed} rows failed, {time.time() - began:.0f} seconds')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
