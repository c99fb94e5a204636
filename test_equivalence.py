"""
A book of proofs: what equals what in this project, checked on random numbers, values and gradients.

    python test_equivalence.py            # the whole book; exit 1 if a row fails
    python test_equivalence.py conv       # the rows about model_conv.py only; --all: every case under its row
    python -m pytest test_equivalence.py  # the same as tests

The left side of each row is the code of a model file. The right side is written here, as explicit matrices or sums,
and never calls what it checks. Exact claims are in float64. A difference is relative to the right side's largest entry.

Your own model_mine.py, beside this file or in baselines/, is found without an edit: chapter 7 checks what every model
promises. A wrong formula can keep these promises. To prove yours, write the layer a second time in model_mine.py, as
plain loops over single queries, and chapter 7 compares the two (baselines/model_alibi.py has an example):

    def equation(attention, x):  # your Attention, x (B, T, C) -> (B, T, C)

If your positions are absolute, so that moving a text changes its logits, write RELATIVE = False at the top level of
your file. Otherwise the rows about moved texts and padding on the left fail.
"""
import argparse
import contextlib
import math
import sys
import traceback
from functools import partial, wraps
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

import model_composite as composite
import model_conv as conv
import model_kernelized as kernelized
import model_nope as nope

CHAPTERS = {
    1: 'Relative positions are convolutions (Chang et al., ACL 2021, section 3)',
    2: 'Composite attention without a (T, T) matrix: far + near (this project)',
    3: 'Convolutions before, inside and after attention, or replacing it (Chang et al.; Wu et al., ICLR 2019)',
    4: 'Kernelized attention with relative positions (Luo et al., NeurIPS 2021)',
    5: 'No positions (Chi et al., ACL 2023)',
    6: 'Baselines: RoPE, ALiBi, TISA and sinusoids with CAPE (baselines/)',
    7: 'What every model promises',
    8: 'The same on a GPU',
}
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / 'baselines'))
SIDES = ((True, 'causal'), (False, 'both sides'))
# sizes of most cases
B = 2  # texts in a batch
H = 3  # heads
T = 11  # tokens: odd, and more than a kernel reaches
D = 4  # channels of a head
K = 2  # reach of a kernel: offsets -K ... K
WIDTH = 2 * K + 1  # its entries


# -------------------------------------------------------------------------------------------- how a claim is recorded

class Case(NamedTuple):
    row: str  # what equals what
    name: str  # which case of it
    shown: str  # the difference as printed; '' for a remark
    limit: str  # the tolerance as printed
    badness: float  # difference over tolerance: above 1 the case fails


CASES = []  # of the claim that runs


def proof(chapter, *models):
    """Mark a test as part of a chapter, about these models (none: about every model file). It fails if a case fails."""
    def mark(test):
        @wraps(test)
        def run():
            CASES.clear()
            missing = [name for name in models if name not in FILES]
            if missing:
                return remark(f'not checked: model_{missing[0]}.py is not here')
            if chapter == 8 and DEVICE is None:
                return remark('no GPU here: not checked; --rehearse runs it on the CPU')
            try:
                test()
            except Exception as error:  # whatever it is, it is a red row, and the book goes on
                message = ' '.join(str(error).split())
                text = f'{type(error).__name__}: {message}'
                frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(HERE) in frame.filename]
                place = f'{Path(frames[-1].filename).name}, line {frames[-1].lineno}: {text}'
                CASES.append(Case(place[:75], text, 'inf', 'no crash', math.inf))
            failed = [f'{case.row} [{case.name}]: {case.shown}' for case in CASES if case.badness > 1]
            assert not failed, '\n'.join(failed)
        run.chapter = chapter
        run.models = models
        return run
    return mark


def difference(a, b, least):
    """Largest |a - b| over the largest |b|, or over `least` if larger; nan where shapes differ or a is not finite."""
    if a.shape != b.shape:
        return math.nan
    ratio = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=least)).item()
    return ratio if math.isfinite(ratio) else math.nan


def check(row, case, ours, reference, tolerance=1e-12, least=1e-30):
    """Record how far two tensors, or lists of tensors, differ; least=1 where true gradients may be 0."""
    pairs = zip(ours, reference, strict=True) if isinstance(ours, list) else [(ours, reference)]
    ratios = [difference(a, b, least) for a, b in pairs]
    worst = math.nan if any(math.isnan(ratio) for ratio in ratios) else max(ratios)
    badness = math.inf if math.isnan(worst) else worst / max(tolerance, 1e-99)
    CASES.append(Case(row, case, f'{worst:.1e}', f'{tolerance:.0e}' if tolerance else 'equal', badness))


def compare(row, case, ours, reference, inputs, tolerance=1e-12, least=1e-30, **known):
    """Record how far two functions differ in value and in the gradient of every input; both get what is `known`."""
    ours, reference = partial(ours, **known), partial(reference, **known)
    check(row, case, with_gradients(ours, inputs), with_gradients(reference, inputs), tolerance, least)


def check_true(row, case, condition):
    """Record whether something holds."""
    CASES.append(Case(row, case, 'yes' if condition else 'no', 'yes', 0.0 if condition else math.inf))


def apart(a, b):
    """Whether two tensors differ: the control without which equality would mean nothing."""
    return (a - b).abs().max() > 1e-3


def remark(text):
    """Record what is not checked."""
    CASES.append(Case(text, '', '', '', 0.0))


# ------------------------------------------------------------------------------------------- models and random numbers

FILES = [path.stem.removeprefix('model_') for path in (*HERE.glob('model_*.py'), *HERE.glob('baselines/model_*.py'))]
FILES = sorted(set(FILES))  # names of all model files; one beside this file wins over one in baselines/
CHOSEN = list(FILES)  # those that are checked: the command line may choose
VARIANTS = {  # of our own files, at small sizes; any other file runs with its defaults
    'nope': ('nope', dict()),
    'absolute': ('nope', dict(absolute=True)),
    'composite': ('composite', dict(kernel_size=5, dynamic_key=True)),
    'composite, far + near': ('composite', dict(kernel_size=5, attention='fast')),
    'conv': ('conv', dict(kernel_size=5, queries_keys=True, values=True, output=True, bias=True)),
    'conv, far + near': ('conv', dict(kernel_size=5, attention='fast')),
    'conv, outside the scores': ('conv', dict(kernel_size=5, lightweight=False, dynamic=False, values=True)),
    'conv, dynamic mixer': ('conv', dict(kernel_size=5, mixer='dynamic', queries_keys=True, output=True)),
    'conv, lightweight mixer': ('conv', dict(kernel_size=5, mixer='lightweight', output=False)),
    'kernelized': ('kernelized', dict(max_distance=4, n_features=8)),
    'kernelized, chunked': ('kernelized', dict(max_distance=3, n_features=8, attention='chunked', feature_map='orf')),
    'kernelized, plain features': ('kernelized', dict(normalize=False, rpe=False, n_features=8)),
}
OURS = {file for file, _ in VARIANTS.values()}
BASELINES = ('rope', 'alibi', 'tisa', 'cape')  # in baselines/


def chosen(*modules):
    return [module for module in modules if module.__name__.removeprefix('model_') in CHOSEN]


def make(module, **fields):
    """A float64 model whose every parameter is random, so that no term of it is zero, and tokens (2, 21) for it."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16)
    model = module.Model(module.Config(**{**sizes, **fields})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model, torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(0))


def schemes(**fields):
    """(name, whether moving a text moves its logits, model, tokens) of every scheme that is checked."""
    others = {name: (name, {}) for name in CHOSEN if name not in OURS}
    for name, (file, own) in {**VARIANTS, **others}.items():
        if file in CHOSEN:
            module = import_module(f'model_{file}')
            relative = getattr(module, 'RELATIVE', True) and not own.get('absolute', False)
            yield name, relative, *make(module, **own, **fields)


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).mul_(scale).requires_grad_()


def random_qkv(tokens=T, batch=B, heads=H, channels=D):
    return [random(batch, heads, tokens, channels, seed=seed) for seed in range(3)]


def with_gradients(f, inputs, parameters=()):
    """[value, gradient of every input and parameter] of f(*inputs) under a fixed random cotangent."""
    y = f(*inputs)
    cotangent = random(*y.shape, seed=99).detach().to(y)
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *parameters], cotangent, materialize_grads=True)]


def check_layer(row, case, module, equation, tolerance=1e-11, tokens=T, **fields):
    """The Attention of a module = equation(attention, x), causal and on both sides, and every parameter's gradient."""
    for causal, side in SIDES:
        model, _ = make(module, causal=causal, n_layer=1, n_head=H, n_embd=H * D, **fields)
        attention = model.h[0].attn
        x = random(B, tokens, H * D)
        ours = with_gradients(attention, [x], attention.parameters())
        reference = with_gradients(partial(equation, attention), [x], attention.parameters())
        check(row, f'{side}, {case}', ours, reference, tolerance, least=1e-3)


def auto_takes(module, form, tokens, **fields):
    """Whether attention='auto' calls the function named form for a text of so many tokens."""
    model, _ = make(module, **fields)
    called = []
    original = getattr(module, form)

    def watched(*inputs):
        called.append(form)
        return original(*inputs)
    setattr(module, form, watched)
    model.hidden(torch.zeros(1, tokens, dtype=torch.int64))
    setattr(module, form, original)
    return len(called) == len(model.h)


def check_forms(module, forms, tokens, tolerance, **fields):
    """Whole models: logits and gradients of the loss are those of the dense form."""
    idx = torch.randint(50, (2, tokens), generator=torch.Generator().manual_seed(1))

    def results(model, form):
        for block in model.h:
            block.attn.attention = form
        logits, loss = model(idx, idx.roll(-1, 1))
        return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    for causal, side in SIDES:
        model, _ = make(module, causal=causal, **fields)
        dense = results(model, 'dense')
        for form in forms:
            case = f'{module.__name__}, {side}'
            check(f"whole model, attention={form!r} = 'dense'", case, results(model, form), dense, tolerance)


# ------------------------------------------------------------------- chapter 1: relative positions are convolutions

def clipped(n, k=K):
    """(n, n) int64: the entry of a kernel (2k+1,) that belongs to query i and key j."""
    return (torch.arange(n) - torch.arange(n)[:, None]).clamp(-k, k) + k


def softmax(scores, v, causal):
    """Softmax attention by hand: scores (B, nh, T, T), v (B, nh, T, hs) -> (B, nh, T, hs)."""
    n = v.size(2)
    future = torch.ones(n, n).triu(1).bool()
    if causal:
        scores = scores.masked_fill(future, -math.inf)
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def equation_6(q, k, fixed=None, dynamic=None, dynamic_key=None):
    """q_i.k_j / sqrt(hs) + q_i.W_{j-i} / sqrt(hs) + beta_{j-i}, and a kernel made by the keys: scores (B, nh, T, T)."""
    scores = torch.einsum('bhid,bhjd->bhij', q, k) / math.sqrt(D)
    entry = clipped(T)
    if dynamic is not None:
        scores = scores + torch.einsum('bhid,ijd->bhij', q, dynamic[entry]) / math.sqrt(D)
    if dynamic_key is not None:  # mirrored
        scores = scores + torch.einsum('bhjd,ijd->bhij', k, dynamic_key[entry.T]) / math.sqrt(D)
    if fixed is not None:
        scores = scores + fixed[:, entry]
    return scores


def projections(attention, x):
    """q, k, v (B, nh, T, hs) of a layer with H heads and no biases."""
    parts = [F.linear(x, weight) for weight in attention.c_attn.weight.split(x.size(2))]
    return [part.view(x.size(0), x.size(1), H, D).transpose(1, 2) for part in parts]


def output(attention, y):
    """y (B, nh, T, hs) through the layer's output projection -> (B, T, C)."""
    return F.linear(y.transpose(1, 2).flatten(2), attention.c_proj.weight)


@proof(1, 'composite')
def test_shaw_and_t5_are_convolutions():
    """Shaw's embedding of an offset is a kernel made by the query (equation 5), T5's bias a fixed one (equation 4)."""
    def shaw(attention, x):
        q, k, v = projections(attention, x)
        keys = k[:, :, None] + attention.dynamic[clipped(T)]  # (B, nh, T, T, hs): the keys as each query sees them
        return output(attention, softmax((q[:, :, :, None] * keys).sum(-1) / math.sqrt(D), v, attention.causal))

    def t5(attention, x):
        q, k, v = projections(attention, x)
        diagonals = [[attention.fixed[:, max(-K, min(K, j - i)) + K] for j in range(T)] for i in range(T)]
        toeplitz = torch.stack([torch.stack(row, -1) for row in diagonals], 1)  # (nh, T, T)
        return output(attention, softmax(q @ k.transpose(2, 3) / math.sqrt(D) + toeplitz, v, attention.causal))
    check_layer("content + query-made kernel = Shaw's embeddings added to the keys", 'fixed=False', composite, shaw,
                kernel_size=WIDTH, fixed=False)
    check_layer("content + fixed kernel = T5's bias as a Toeplitz matrix", 'dynamic=False', composite, t5,
                kernel_size=WIDTH, dynamic=False)


@proof(1, 'composite')
def test_composite_layer_is_equation_6():
    """Composite attention is content + query-made convolution + fixed convolution in one softmax (equation 6)."""
    def explicit_layer(attention, x):
        q, k, v = projections(attention, x)
        scores = equation_6(q, k, attention.fixed, attention.dynamic, attention.dynamic_key)
        if not attention.content:
            scores = scores - equation_6(q, k)
        return output(attention, softmax(scores, v, attention.causal))
    for fields in (dict(), dict(dynamic_key=True), dict(content=False), dict(dynamic=False),
                   dict(fixed=False, content=False, dynamic_key=True)):
        check_layer('composite layer = equation 6', f'{fields}', composite, explicit_layer, kernel_size=WIDTH, **fields)


@proof(1, 'composite')
def test_limits_of_composite_attention():
    """Without kernels it is plain attention (equation 1), without content a lightweight convolution (equation 3)."""
    zero = torch.zeros(1, H, T, WIDTH).double()
    q = torch.zeros(B, H, T, D).double()
    for causal, side in SIDES:
        def zero_kernels(q, k, v):
            return composite.attend_dense(q, k, v, zero, causal)
        plain = partial(F.scaled_dot_product_attention, is_causal=causal)
        compare('attention with zero kernels = scaled_dot_product_attention', side, zero_kernels, plain, random_qkv())
    beta = random(H, WIDTH).detach()
    v = random(B, H, T, D).detach()
    window = torch.full((1, H, T, WIDTH), -1e9).double()  # both ends shut: they stand for all farther tokens
    window[..., 1:-1] = beta[:, None, 1:-1]
    kernel = beta.exp()[:, None, 1:-1]  # (nh, 1, 2K-1)
    sums = F.conv1d(v.permute(0, 3, 1, 2).reshape(B * D, H, T), kernel, padding=K - 1, groups=H)  # (B hs, nh, T)
    norms = F.conv1d(torch.ones(1, H, T).double(), kernel, padding=K - 1, groups=H)
    reference = (sums / norms).view(B, D, H, T).permute(0, 2, 3, 1)  # (B, nh, T, hs)
    check('attention with a fixed kernel only = conv1d with normalized weights', 'both sides',
          composite.attend_dense(q, q, v, window, causal=False), reference)


# -------------------------------------------------------- chapter 2: composite attention without a (T, T) matrix

@proof(2, 'composite')
def test_skewing_is_a_clipped_index():
    """The dense form lays kernels along diagonals by skewing rows: entry (i, j) belongs to the clipped offset j - i."""
    for k, queries, more in product((0, 1, 3, 9), (1, 2, 7), (0, 1, 6)):
        keys = queries + more
        for rows, past, n in ((queries, more, keys), (keys, -more, queries)):  # kernels made by queries, by keys
            def indexed(kernel):
                entries = [[max(-k, min(k, j - past - i)) + k for j in range(n)] for i in range(rows)]
                return torch.stack([kernel[:, i, entries[i]] for i in range(rows)], 1)
            compare('kernels along diagonals = clipped index', f'{rows} rows, {past} before, {n} columns, k = {k}',
                    partial(composite.along_diagonals, past=past, n=n), indexed, [random(2, rows, 2 * k + 1)])


def explicit(q, k, v, kernel_scores, causal):
    """Softmax attention with kernel_scores (B, nh, T, 2k+1) added to the scores at each clipped offset."""
    n = q.size(2)
    reach = kernel_scores.size(-1) // 2
    bias = kernel_scores[:, :, torch.arange(n)[:, None], clipped(n, reach)]  # (B, nh, T, T)
    return softmax(q @ k.transpose(2, 3) / math.sqrt(q.size(-1)) + bias, v, causal)


def kernel_cases():
    """(how large the biases are, which case, [q, k, v, kernel_scores])."""
    for size in (300.0, -300.0):
        yield 'biases of hundreds of nats', f'scale {size:+.0f}', [*random_qkv(), random(B, H, T, WIDTH, scale=size)]
    for end in (500, -500):  # all the weight at one end
        slope = torch.linspace(-end, end, WIDTH).double().repeat(1, H, T, 1)
        yield 'biases from -500 to 500 nats', f'slope {end:+d}', [*random_qkv(), slope.requires_grad_()]
    for n, k, batch in product((1, 2, 8, 9, 10, 17, 67, 301), (0, 1, 2, 8), (1, B)):  # kernels for all texts, or each
        inputs = [*random_qkv(n), random(batch, H, n, 2 * k + 1, scale=3)]
        yield 'biases of some nats', f'{n} tokens, kernel of {2 * k + 1}, batch of {batch}', inputs


FORMS = {'dense': 'attend_dense', 'far + near': 'attend_far_and_near', 'blocks': 'attend_in_blocks'}


@proof(2, 'composite', 'conv')
def test_far_and_near_are_the_dense_form():
    """Flash attention to far keys and a convolution over near ones, joined by their log-sum-exp, is the dense form."""
    for module, (causal, side) in product(chosen(composite, conv), SIDES):
        where = f'{module.__name__}, {side}'
        for biases, case, inputs in kernel_cases():
            for name, form in FORMS.items():
                compare(f'{name} = explicit (T, T) matrix, {biases}', f'{where}, {case}', getattr(module, form),
                        explicit, inputs, 1e-11, least=1, causal=causal)
        across = [random(B, H, D, 20, seed=seed).transpose(2, 3) for seed in range(3)]  # channels not side by side
        across.append(random(1, H, 20, WIDTH))
        for name, form in FORMS.items():
            check(f'{name} = explicit (T, T) matrix, any memory layout', where,
                  getattr(module, form)(*across, causal), explicit(*across, causal))
        inputs = [*random_qkv(90), random(1, H, 90, WIDTH, scale=3)]
        small = partial(module.blocks, rows=16, largest=2 ** 12)  # several groups of heads, several of queries
        with mock.patch.object(module, 'blocks', small):
            compare('blocks = explicit (T, T) matrix, several blocks', where, module.attend_in_blocks, explicit, inputs,
                    1e-11, least=1, causal=causal)


@proof(2, 'composite')
def test_far_and_near_in_low_precision():
    """In float32 and bfloat16 the fast forms are not much farther from float64 than the dense form is."""
    def results(form, inputs, dtypes):
        inputs = [x.to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes)]
        return [x.double() for x in with_gradients(form, inputs)]
    for causal, side in SIDES:
        dense = partial(composite.attend_dense, causal=causal)
        formats = ((torch.float32, 6e-8), (torch.bfloat16, 4e-3))
        for form, (dtype, unit) in product(('far + near', 'blocks'), formats):
            fast = partial(getattr(composite, FORMS[form]), causal=causal)
            exact = [x.detach().to(dtype).double() for x in random_qkv(200, 2, 2, 16)]
            exact.append(random(2, 2, 200, 17, scale=3).detach().float().double())
            low = [dtype, dtype, dtype, torch.float32]
            high = [torch.float64] * 4
            three = zip(results(fast, exact, low), results(dense, exact, low), results(dense, exact, high))
            for name, (ours, other, reference) in zip(('value', 'dq', 'dk', 'dv', 'dkernel'), three):
                limit = 2 * difference(other, reference, 1e-30) + 16 * unit
                check(f'{form} in {str(dtype)[6:]} is as exact as dense', f'{side}, {name}', ours, reference, limit)


@proof(2, 'composite', 'conv')
def test_fast_and_dense_models_agree():
    """Whole models give the same logits and gradients in either form; 'auto' takes blocks from 128 tokens on."""
    for module in chosen(composite, conv):
        check_forms(module, ('fast', 'auto'), 260, 1e-9, kernel_size=WIDTH, block_size=260)
        for form, tokens in (('attend_in_blocks', 260), ('attend_far_and_near', 4096), ('attend_dense', 100)):
            case = f'{module.__name__}, {tokens} tokens: {form}'
            check_true("'auto' takes the quicker form", case, auto_takes(module, form, tokens, kernel_size=WIDTH))


@proof(2, 'composite')
def test_flash_kernels_see_one_side():
    """What is asked of torch's flash kernels: query i and the keys j <= i, on the right side j >= i."""
    n = 70
    for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
        low = device == 'cuda'
        exact = [random(B, H, n, 16, seed=seed).detach() for seed in range(3)]
        exact = [x.bfloat16().double() if low else x for x in exact]
        q, k, v = [x.to(device, torch.bfloat16) if low else x for x in exact]
        for right in (False, True):
            scores = exact[0] @ exact[1].transpose(2, 3) / 4
            hidden = torch.ones(n, n).bool().tril(-1) if right else torch.ones(n, n).bool().triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
            y, lse, rng = composite.flash(q, k, v, right)
            case = f'{device}, {"right" if right else "left"}'
            tolerance = 0.02 if low else 1e-11
            expected = scores.softmax(-1) @ exact[2]
            check('value of the flash kernel = explicit matrix', case, y.cpu(), expected, tolerance)
            check('log-sum-exp of the flash kernel = explicit matrix', case, lse.cpu(), scores.logsumexp(-1), tolerance)
            inputs = [x.clone().requires_grad_() for x in exact]
            scores = (inputs[0] @ inputs[1].transpose(2, 3) / 4).masked_fill(hidden, -math.inf)
            reference = torch.autograd.grad((scores.softmax(-1) @ inputs[2]).sum(), inputs)
            ours = composite.flash_backward(torch.ones_like(y), q, k, v, y, lse, rng, right)
            check('gradients of the flash kernel = explicit matrix', case, [x.cpu() for x in ours], list(reference),
                  0.05 if low else 1e-11)


# --------------------------------------- chapter 3: convolutions before, inside and after attention, or replacing it

def banded(w, n, causal):
    """Kernels w (..., width) as Toeplitz matrices (..., n, n): entry (i, j) is the weight of offset j - i."""
    width = w.size(-1)
    first = 1 - width if causal else -(width // 2)  # the smallest offset
    r = torch.arange(n) - torch.arange(n)[:, None] - first
    return w[..., r.clamp(0, width - 1)] * ((0 <= r) & (r < width))


def depthwise(x, w, causal):
    """x (B, T, C), w (C, width): a matrix for each channel."""
    return torch.einsum('cij,bjc->bic', banded(w, x.size(1), causal), x)


def lightweight(x, w, causal):
    """x (B, nh, T, hs), w (nh, width): a matrix for each head."""
    return torch.einsum('hij,bhjd->bhid', banded(w, x.size(2), causal), x)


def dynamic(x, w, causal):
    """x (B, nh, T, hs), w (B, nh, T, width): a kernel for each token, which takes its row of the kernel's matrix."""
    return torch.einsum('bhiij,bhjd->bhid', banded(w, x.size(2), causal), x)


@proof(3, 'conv')
def test_convolutions_are_banded_toeplitz_matrices():
    """A convolution is a banded Toeplitz matrix, per channel, head, or head and token (equations 2, 3; Wu et al.)."""
    for (n, width), (causal, side) in product(((1, 5), (3, 5), (11, 5), (11, 1), (11, 17)), SIDES):
        case = f'{side}, {n} tokens, kernel of {width}'
        compare('depthwise convolution = a banded matrix per channel', case, conv.depthwise_conv, depthwise,
                [random(B, n, D), random(D, width)], causal=causal)
        compare('lightweight convolution = a banded matrix per head', case, conv.lightweight_conv, lightweight,
                [random(B, H, n, D), random(H, width)], causal=causal)
        compare('dynamic convolution = a banded row per token', case, conv.dynamic_conv, dynamic,
                [random(B, H, n, D), random(B, H, n, width)], causal=causal)


SWITCHES = ('lightweight', 'dynamic', 'queries_keys', 'values', 'output')
CONV_LAYERS = (  # where the convolution is, the mixer, the switches that are on, the kernels that the layer then has
    ('inside attention', 'attention', ['lightweight'], {'lightweight'}),
    ('inside attention', 'attention', ['dynamic'], {'dynamic'}),
    ('before attention', 'attention', ['queries_keys'], {'conv_q', 'conv_k'}),
    ('before attention', 'attention', ['values'], {'conv_v'}),
    ('after attention', 'attention', ['output'], {'conv_out'}),
    ('everywhere', 'attention', SWITCHES, {'lightweight', 'dynamic', 'conv_q', 'conv_k', 'conv_v', 'conv_out'}),
    ('replacing attention', 'lightweight', [], {'lightweight'}),
    ('replacing attention', 'lightweight', ['output'], {'lightweight', 'conv_out'}),
    ('replacing attention', 'dynamic', ['queries_keys', 'values'], {'dynamic', 'conv_q', 'conv_v'}),
)


def conv_equation(attention, x):
    """The layer of model_conv.py from its own parameters: the kernels that exist are used (equations 2 to 5, 7)."""
    weights = dict(attention.named_parameters())
    causal = attention.causal
    biases = weights.get('c_attn.bias', x.new_zeros(3 * H * D)).split(H * D)
    qkv = []
    for name, weight, bias in zip(('conv_q', 'conv_k', 'conv_v'), weights['c_attn.weight'].split(H * D), biases):
        y = x @ weight.T + bias
        if name in weights:  # for the first of three heads
            y = torch.cat(((depthwise(x, weights[name], causal) @ weight.T + bias)[..., :D], y[..., D:]), 2)
        qkv.append(y.view(B, T, H, D).transpose(1, 2))
    q, k, v = qkv
    if attention.mixer == 'lightweight':  # the weights sum to one over the kernel's width
        y = lightweight(v, weights['lightweight'].softmax(-1), causal)
    elif attention.mixer == 'dynamic':
        y = dynamic(v, torch.einsum('bhid,rd->bhir', q, weights['dynamic']).softmax(-1), causal)
    else:
        y = softmax(equation_6(q, k, weights.get('lightweight'), weights.get('dynamic')), v, causal)
    y = y.transpose(1, 2).reshape(B, T, H * D)
    if 'conv_out' in weights:
        y = y + depthwise(v.transpose(1, 2).reshape(B, T, H * D), weights['conv_out'], causal)
    return y @ weights['c_proj.weight'].T + weights.get('c_proj.bias', 0)


@proof(3, 'conv')
def test_convolution_layer_is_its_equations():
    """At each place of the layer a convolution is the product with such a matrix (equations 2 to 5, 7; Wu et al.)."""
    for place, mixer, on, kernels in CONV_LAYERS:
        fields = dict(mixer=mixer, bias='values' in on, **{switch: switch in on for switch in SWITCHES})
        case = ', '.join([f'mixer {mixer}', *on])
        check_layer(f'layer with a convolution {place} = explicit matrices', case, conv, conv_equation,
                    kernel_size=WIDTH, **fields)
        names = [name for name, _ in make(conv, **fields)[0].h[0].attn.named_parameters()]
        check_true('the layer has the kernels of its switches and no others', case,
                   {name for name in names if not name.startswith('c_')} == kernels)


# ----------------------------------------------------- chapter 4: kernelized attention with relative positions

def equation_10(q, k, v, b, causal=True, valid=None):
    """Kernelized attention with relative positions from explicit (T, T) matrices -> (B, nh, T, hs)."""
    n = q.size(2)
    seen = torch.ones(n, n).bool()
    if causal:
        seen = seen.tril()
    if valid is not None:  # padding is seen by itself only
        seen = seen & (valid[:, None, None] | torch.eye(n).bool())
    toeplitz = b.exp()[:, clipped(n, b.size(1) // 2)]  # (nh, T, T)
    weights = torch.einsum('bhim,bhjm->bhij', q, k) * toeplitz * seen  # (B, nh, T, T)
    return weights / weights.sum(-1, keepdim=True) @ v


def kernelized_inputs(n, reach, m=6):
    """Positive features q, k (B, nh, n, m), values v (B, nh, n, hs), asymmetric b (nh, 2 reach + 1)."""
    q, k = (random(B, H, n, m, seed=seed).detach().exp().requires_grad_() for seed in (0, 1))
    return [q, k, random(B, H, n, D, seed=2), random(H, 2 * reach + 1)]


def decode(q, k, v, b, valid, pieces):
    """Feed a text in pieces -> (B, nh, T, hs) and the state at its end."""
    state = {}
    y = []
    end = 0
    for q, k, v in zip(q.split(pieces, 2), k.split(pieces, 2), v.split(pieces, 2)):
        end += q.size(2)
        y.append(kernelized.attend_recurrent(q, k, v, b, valid[:, :end], state))
    return torch.cat(y, 2), state


@proof(4, 'kernelized')
def test_dense_fft_and_chunked_are_equation_10():
    """Equation 10 takes O(T log T) by FFT, as a Toeplitz matrix is a convolution (section 3.2), and O(T) in chunks."""
    def sums(c, x):
        n = x.size(-1)
        return torch.stack([sum(c[:, j - i + n - 1] * x[:, :, j] for j in range(n)) for i in range(n)], -1)

    def product_by_hand(c, x):  # with a backward pass of its own
        return kernelized.CirculantProduct.apply(kernelized.circulant_column(c), x)
    for n, form in product((1, 2, 5, 16, 31), (kernelized.toeplitz_fft, product_by_hand)):
        compare('Toeplitz matrix times vector by FFT = explicit sums', f'{n} tokens, {form.__name__}', form, sums,
                [random(3, 2 * n - 1), random(2, 3, n)], 1e-11, least=1)  # asymmetric

    sizes = [(1, 0), (1, 3), *product([9], (0, 1, 4, 8, 20)), *product([23], (0, 1, 3, 4, 5, 22, 40))]
    for (causal, side), (n, reach), padded in product(SIDES, sizes, (False, True)):
        valid = torch.rand(B, n, generator=torch.Generator().manual_seed(n)) > 0.4 if padded else None
        inputs = kernelized_inputs(n, reach)
        known = dict(least=1, causal=causal, valid=valid)
        case = f'{side}, {n} tokens, reach of b {reach}, padded={padded}'
        compare('dense = equation 10', case, kernelized.attend_dense, equation_10, inputs, 1e-11, **known)
        compare('FFT in bounded memory = equation 10', case, kernelized.attend_fft, equation_10, inputs, 1e-10, **known)
        if not padded:
            compare('FFT = equation 10', case, kernelized.attend_fft_plain, equation_10, inputs, 1e-10, least=1,
                    causal=causal)
        if reach == 0 and not causal:
            zero = torch.zeros(H, 1).double()
            exact = with_gradients(lambda q, k, v: equation_10(q, k, v, zero, False, valid), inputs[:3])
            sums = with_gradients(lambda q, k, v: kernelized.attend_sums(q, k, v, valid), inputs[:3])
            check('plain sums = equation 10 without b, both sides', case, sums, exact, 1e-11, least=1)
        for chunk in (1, 2, 4, 7, 23, 64):
            chunked = partial(kernelized.attend_chunked, chunk=chunk)
            compare('chunked = equation 10', f'{case}, chunks of {chunk}', chunked, equation_10, inputs, 1e-11, **known)


@proof(4, 'kernelized')
def test_running_state_is_equation_10():
    """Decoding needs running sums and the last R keys only: a state of constant size gives what all keys would."""
    valid = torch.arange(23) >= torch.tensor([[0], [6]])  # (2, 23): the second text is padded on the left
    for reach, pieces in product((0, 1, 3, 30), ([1] * 23, [9, 1, 1, 5, 7], [23])):
        q, k, v, b = kernelized_inputs(23, reach)
        y, state = decode(q, k, v, b, valid, pieces)
        reference = equation_10(q, k, v, b, True, valid)
        case = f'reach of b {reach}, {len(pieces)} pieces'
        check('running state = equation 10', case, [y[0], y[1, :, 6:]], [reference[0], reference[1, :, 6:]])
        check_true('the state keeps R keys, and one sum per feature and channel', case,
                   state['k'].size(2) == min(reach, 23) and state['kv'].shape == (B, H, 6, D))


@proof(4, 'kernelized')
def test_kernelized_layer_is_its_equations():
    """The layer is Algorithm 1: queries and keys over their norm, random features, equation 10; each can be off."""
    def phi(attention, x):
        x = x / x.norm(dim=-1, keepdim=True) if attention.normalize else x / D ** 0.25
        square = x.pow(2).sum(-1)
        m = attention.w.size(0)
        if attention.kind == 'elu':
            return torch.where(x > 0, x + 1, x.exp())
        if attention.kind == 'trf':
            waves = torch.cat([torch.sin(x @ attention.w.T), torch.cos(x @ attention.w.T)], -1)
            return waves * (square / 2).exp()[..., None] / m ** 0.5
        return torch.stack([torch.exp(x @ w - square / 2) / m ** 0.5 for w in attention.w], -1)

    def algorithm_1(attention, x):
        q, k, v = projections(attention, x)
        b = torch.zeros(H, 1, dtype=x.dtype) if attention.b is None else attention.b
        return output(attention, equation_10(phi(attention, q), phi(attention, k), v, b, attention.causal))
    for fields in (dict(), dict(normalize=False), dict(rpe=False), dict(normalize=False, rpe=False),
                   dict(feature_map='trf'), dict(feature_map='trf', normalize=False, n_features=200),
                   dict(feature_map='orf'), dict(feature_map='sphere'), dict(feature_map='elu', normalize=False)):
        check_layer('kernelized layer = Algorithm 1 and equation 10', f'{fields}', kernelized, algorithm_1, 1e-9,
                    **{'max_distance': 3, 'n_features': 8, **fields})


@proof(4, 'kernelized')
def test_random_features_are_unbiased():
    """E[phi(x).phi(y)] = exp(x.y), with the variance (exp(|x + y|^2) - 1) exp(2 x.y) / m of Lemma 2."""
    x = F.normalize(random(D, seed=1).detach(), dim=0) * 0.6
    y = F.normalize(random(D, seed=2).detach(), dim=0) * 0.8
    torch.manual_seed(0)
    m = 16
    draws = 60000
    w = kernelized.random_matrix(m * draws, D).double()
    positive = kernelized.features(x, w) * kernelized.features(y, w) * m * draws  # one feature each, not averaged
    estimates = positive.view(draws, m).mean(1)
    check('mean of positive features = exp(x.y)', '60,000 draws', estimates.mean(), (x @ y).exp(), 0.01)
    variance = ((x + y).square().sum().exp() - 1) * (2 * x @ y).exp() / m
    check('variance of positive features = Lemma 2', '60,000 draws', estimates.var(), variance, 0.05)
    waves = kernelized.features(x, w, 'trf') * kernelized.features(y, w, 'trf')
    check('mean of trigonometric features = exp(x.y)', '60,000 draws', waves.sum(), (x @ y).exp(), 0.01)
    stable, plain = kernelized.features(x, w[:8], stable=True), kernelized.features(x, w[:8])
    factor = (x.square().sum() / 2 - (x @ w[:8].T).max()).exp()
    check("a query's stabilized features = the plain ones times one factor", '8 features', stable, plain * factor)
    check('features with x normalised = those of x / |x|', '8 features',
          kernelized.features(x, w[:8], normalize=True), kernelized.features(F.normalize(x, dim=0), w[:8]))
    one = torch.full((D,), D ** -0.5, dtype=torch.float64)
    w = kernelized.random_matrix(20000 * D, D, 'orf').double()
    for sign in (1.0, -1.0):
        mean = (kernelized.features(one, w) * kernelized.features(sign * one, w)).sum()
        check('mean of orthogonal features = exp(x.y)', f'20,000 draws, x.y = {sign}', mean,
              torch.tensor(sign).double().exp(), 0.06)
    w = w[:3 * D].view(3, D, D)
    squares = torch.diag_embed(w.square().sum(-1))
    check('rows of an orthogonal block times each other = 0', '3 blocks', w @ w.transpose(1, 2), squares, 1e-5)
    lengths = kernelized.random_matrix(20, D, 'sphere').norm(dim=1)
    check('length of directions on a sphere = sqrt(hs)', '20 features', lengths, torch.full((20,), D ** 0.5), 1e-5)


@proof(4, 'kernelized')
def test_error_of_the_features():
    """The error grows with the norm of queries and keys and falls with more features (Theorem 3)."""
    def error(size, m):
        """Mean L1 distance of one row of attention over 64 keys from the softmax."""
        q, k = (F.normalize(random(64, 32, seed=seed).detach(), dim=1) * size for seed in (3, 4))
        estimates = [kernelized.features(q, w) @ kernelized.features(k, w).T
                     for w in kernelized.random_matrix(50 * m, 32).double().split(m)]
        exact = (q @ k.T).softmax(1)
        return sum((a / a.sum(1, keepdim=True) - exact).abs().sum(1).mean().item() for a in estimates) / 50
    torch.manual_seed(0)
    check_true('error at norm 2 > 0.2 + error at norm 1', '64 features', error(2, 64) > 0.2 + error(1, 64))
    check_true('error of 16 features > 0.2 + error of 256', 'norm 1', error(1, 16) > 0.2 + error(1, 256))
    w = kernelized.random_matrix(2 ** 16, D)
    q, k, v = (x.detach() for x in random_qkv())
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    b = random(H, WIDTH).detach()
    ours = kernelized.attend_dense(kernelized.features(q, w), kernelized.features(k, w), v, b)
    exact = softmax(torch.einsum('bhid,bhjd->bhij', q, k) + b[:, clipped(T)], v, True)
    check('65,536 features = softmax with the same b (equation 6)', 'causal', ours, exact, 0.02)


@proof(4, 'kernelized')
def test_kernelized_extremes():
    """float32 survives b from -100 to 100 nats, vanishing vectors, one visible key, and inputs of any size."""
    n = 23
    w = random(8, D, seed=5).detach().float()
    one_key = torch.arange(n).expand(B, n) == 4
    for (causal, side), reach, slope, valid in product(SIDES, (3, 30), (1, -1), (None, one_key)):
        q, k, v = (x.detach().float() for x in random_qkv(n))
        q, k = kernelized.features(F.normalize(q, dim=-1), w), kernelized.features(F.normalize(k, dim=-1), w)
        q[:, :, 5] = k[:, :, 6] = kernelized.features(torch.zeros(D), w)
        b = slope * torch.linspace(-100, 100, 2 * reach + 1).repeat(H, 1)
        inputs = [x.requires_grad_() for x in (q, k, v, b)]
        known = dict(causal=causal, valid=valid)
        keys = 'all keys' if valid is None else 'one key'
        case = f'{side}, reach of b {reach}, slope {slope:+d}, {keys}'
        exact = with_gradients(partial(equation_10, **known), [x.detach().double().requires_grad_() for x in inputs])
        dense = with_gradients(partial(kernelized.attend_dense, **known), inputs)
        check('dense in float32 = equation 10 in float64', case, dense, exact, 2e-4, least=1)
        chunked = with_gradients(partial(kernelized.attend_chunked, **known, chunk=4), inputs)
        check('chunked in float32 = equation 10 in float64', case, chunked, exact, 2e-4, least=1)
        fft = with_gradients(partial(kernelized.attend_fft, **known), inputs)
        check_true('FFT in float32 is finite', case, all(x.isfinite().all() for x in fft))
        if causal and valid is None:
            y, _ = decode(q, k, v, b, torch.ones(B, n).bool(), [1] * n)
            check('running state in float32 = equation 10 in float64', case, y, exact[0], 2e-4, least=1)
    for normalize in (True, False):
        attention = make(kernelized, n_layer=1, normalize=normalize, max_distance=3)[0].float().h[0].attn
        for size, n in product((0.0, 1e-8, *range(1, 26), 1000.0), (1, 9)):
            y = attention(size * torch.randn(2, n, 16, generator=torch.Generator().manual_seed(0)))
            gradients = torch.autograd.grad(y.sum(), list(attention.parameters()))
            case = f'normalize={normalize}, inputs of size {size}, {n} tokens'
            check_true('the layer and its gradients in float32 are finite', case,
                       all(x.isfinite().all() for x in (y, *gradients)))


@proof(4, 'kernelized')
def test_forms_of_the_kernelized_model_agree():
    """Whole models agree in every form; 'auto' takes the chunked one at 300 tokens; running sums stay float32."""
    check_forms(kernelized, ('fft', 'chunked', 'auto'), 300, 1e-8, max_distance=5)
    for form, tokens in (('attend_chunked', 300), ('attend_dense', 100)):
        case = f'kernelized, {tokens} tokens: {form}'
        check_true("'auto' takes the quicker form", case, auto_takes(kernelized, form, tokens, max_distance=5))
    for case, dtype in (('autocast', torch.float32), ('a bfloat16 model', torch.bfloat16)):
        model = make(kernelized, max_distance=4, n_layer=1, n_features=8)[0].to(dtype)
        idx = torch.randint(50, (1, 700), generator=torch.Generator().manual_seed(0))
        state = model.new_state()
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=case == 'autocast'):
            whole = model(idx)[0].float()  # 700 tokens: the chunked form
            parts = torch.cat([model(token, state=state)[0] for token in idx.split(1, 1)], 1).float()
        check('bfloat16: 700 tokens from a state = all at once', case, parts, whole, 0.05)
        types = {state[0]['kv'].dtype, state[0]['k_sum'].dtype}
        check_true('its running sums are float32', case, types == {torch.float32})


# ------------------------------------------------------------------------------------------- chapter 5: no positions

@proof(5, 'nope')
def test_uniform_causal_attention_has_variance_1_over_m():
    """The variance of uniform causal attention at token m is 1/m: the mask leaks the position."""
    n = 32
    samples = 4000
    channels = 8
    attention = make(nope, n_layer=1, n_head=1, n_embd=channels)[0].h[0].attn
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
    """The layer is softmax attention. Without the causal mask its tokens are a bag; only the mask tells their order."""
    def plain(attention, x):
        q, k, v = projections(attention, x)
        return output(attention, softmax(equation_6(q, k), v, attention.causal))
    check_layer('layer without positions = softmax attention', 'no padding', nope, plain, 1e-12)
    for causal, side in SIDES:
        attention = make(nope, causal=causal, n_embd=H * D, n_head=H)[0].h[0].attn
        x = random(B, T, H * D)
        padded = attention(x, (torch.arange(T) < 8).expand(B, T))
        check('with padding = softmax attention to the real tokens', side, padded[:, :8], plain(attention, x[:, :8]))
    order = torch.randperm(21, generator=torch.Generator().manual_seed(3))

    def logits(module, **fields):
        model, idx = make(module, **fields)
        return model(idx[:, order])[0], model(idx)[0][:, order]
    check('no mask: logits of permuted tokens = permuted logits', 'nope', *logits(nope, causal=False))
    check_true('causal mask: they differ', 'nope', apart(*logits(nope)))
    check_true('no mask but positions: they differ', 'composite', apart(*logits(composite, causal=False)))
    check_true('no mask but positions: they differ', 'absolute', apart(*logits(nope, causal=False, absolute=True)))


# ----------------------------------------------------------------------------------------------- chapter 6: baselines

LENGTHS = (1, T, 40)  # 40 tokens: more than block_size


def check_baseline(name, module, equation, **fields):
    """The Attention of a baseline = its equation, at several lengths and in pieces from a state."""
    for tokens in LENGTHS:
        check_layer(f'{name} layer = its equation', f'{tokens} tokens', module, equation, tokens=tokens, **fields)
    attention = make(module, n_layer=1, n_head=H, n_embd=H * D, **fields)[0].h[0].attn
    x = random(B, T, H * D)
    state = {'seen': 0}
    parts = []
    for part in x.split((4, 1, 1, T - 6), 1):
        parts.append(attention(part, None, state))
        state['seen'] += part.size(1)
    check(f'{name} layer in pieces from a state = its equation', 'causal', torch.cat(parts, 1), equation(attention, x))


def turned(x, positions):
    """x (B, nh, T, hs): each token times the rotation matrix of its position, written entry by entry."""
    half = x.size(3) // 2
    rotations = torch.zeros(x.size(2), x.size(3), x.size(3)).double()
    for i, c in product(range(x.size(2)), range(half)):
        angle = positions[i] / 10000 ** (2 * c / x.size(3))
        rotations[i, c, c] = rotations[i, c + half, c + half] = math.cos(angle)
        rotations[i, c, c + half] = -math.sin(angle)
        rotations[i, c + half, c] = math.sin(angle)
    return (rotations @ x[..., None])[..., 0]


@proof(6, 'rope')
def test_rotary_positions_are_relative():
    """RoPE: each query and key times the rotation matrix of its position; the scores depend on the offset alone."""
    rope = import_module('model_rope')

    def equation(attention, x):
        q, k, v = projections(attention, x)
        positions = range(x.size(1))
        return output(attention, softmax(equation_6(turned(q, positions), turned(k, positions)), v, attention.causal))
    check_baseline('RoPE', rope, equation)
    q, k, _ = random_qkv()
    for past in (0, 7, 5000):
        compare('rotate = the rotation matrices', f'{past} tokens before', partial(rope.rotate, past=past),
                partial(turned, positions=range(past, past + T)), [q])
        scores = rope.rotate(q, past) @ rope.rotate(k, past).transpose(2, 3)
        pairs = [(turned(k, [j - i for j in range(T)]) * q[:, :, i, None]).sum(-1) for i in range(T)]
        check('scores = q_i.(R_{j-i} k_j): the offset alone', f'{past} tokens before', scores, torch.stack(pairs, 2))
    check_true('without the turns they differ', f'{T} tokens', apart(rope.rotate(q) @ rope.rotate(k).mT, q @ k.mT))
    x = random(B, H, T, 64).detach().bfloat16()
    exact = turned(x.double(), range(2001, 2001 + T))
    check('bfloat16: the angles are float32', 'from position 2001', rope.rotate(x, 2001), exact, 0.01)


@proof(6, 'alibi')
def test_linear_biases():
    """ALiBi: the score of head h = 1 ... n_head loses 2^(-8h/n_head) for each token of distance."""
    alibi = import_module('model_alibi')

    def equation(attention, x):
        q, k, v = projections(attention, x)
        scores = equation_6(q, k)
        bias = torch.zeros_like(scores)
        for h, i, j in product(range(H), range(x.size(1)), range(x.size(1))):
            bias[:, h, i, j] = -abs(i - j) / 2 ** (8 * (h + 1) / H)
        return output(attention, softmax(scores + bias, v, attention.causal))
    check_baseline('ALiBi', alibi, equation)


@proof(6, 'tisa')
def test_bumps_over_the_offset():
    """TISA: the score of an offset o gains sum_s a_s exp(-|b_s| (o - c_s)^2), with a, b and c of each head."""
    tisa = import_module('model_tisa')

    def equation(attention, x):
        q, k, v = projections(attention, x)
        n = x.size(1)
        gains = dict.fromkeys(range(1 - n, n), 0)  # of each offset, (nh,)
        for o, s in product(gains, range(attention.a.size(1))):
            bump = math.e ** (-attention.b[:, s].abs() * (o - attention.c[:, s]).square())
            gains[o] = gains[o] + attention.a[:, s] * bump
        bias = torch.stack([torch.stack([gains[j - i] for j in range(n)], 1) for i in range(n)], 1)  # (nh, T, T)
        return output(attention, softmax(equation_6(q, k) + bias, v, attention.causal))
    check_baseline('TISA', tisa, equation)
    check_layer('TISA layer = its equation', 'two bumps', tisa, equation, n_bumps=2)


def sinusoid_table(n, channels):
    """(n, channels): channel c is sin(p / 10000^(2c/channels)), the channel channels/2 after it the cosine."""
    table = torch.zeros(n, channels).double()
    for p, c in product(range(n), range(channels // 2)):
        angle = p / 10000 ** (2 * c / channels)
        table[p, c] = math.sin(angle)
        table[p, c + channels // 2] = math.cos(angle)
    return table


@proof(6, 'cape')
def test_sinusoids():
    """Sinusoids are absolute positions that are not learned: a NoPE model with --absolute and this very table."""
    cape = import_module('model_cape')
    for (causal, side), tokens in product(SIDES, LENGTHS):
        model, _ = make(cape, causal=causal, init_std=0.7)
        reference, _ = make(nope, causal=causal, absolute=True, block_size=tokens)
        reference.load_state_dict({**model.state_dict(), 'wpe.weight': 0.7 * sinusoid_table(tokens, 16)})
        reference.wpe.requires_grad_(False)
        idx = torch.randint(50, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        pair = []
        for each in (model, reference):
            trained = [p for p in each.parameters() if p.requires_grad]
            pair.append(with_gradients(lambda: each(idx)[0], [], trained))
        check('sinusoids = a table of absolute positions', f'{side}, {tokens} tokens', *pair, 1e-11, least=1e-3)
        if causal:
            state = model.new_state()
            parts = [model(part, state=state)[0] for part in idx.split(7, 1)]
            check('in pieces from a state = the table', f'{tokens} tokens', torch.cat(parts, 1), reference(idx)[0])


@proof(6, 'cape')
def test_augmentation_is_for_training():
    """CAPE moves positions in training only: a shift and a factor for each text, half a step at most for each token."""
    cape = import_module('model_cape')
    model, idx = make(cape, init_std=0.7)
    plain, _ = make(cape, init_std=0.7, augment=False)
    logits = model(idx)[0]
    check('evaluation = plain sinusoids', 'logits', logits, plain(idx)[0], 0)
    check('training with --no-augment = evaluation', 'logits', plain.train()(idx)[0], logits, 0)
    check_true('training with augmentation is another thing, each time', 'first', apart(model.train()(idx)[0], logits))
    check_true('training with augmentation is another thing, each time', 'second', apart(model(idx)[0], model(idx)[0]))
    torch.manual_seed(0)
    p = torch.arange(1000, 1009).double().expand(4000, 9)  # positions of 4,000 texts
    bounds = {  # what: (moved by, largest)
        'each token': (cape.augment(p, 0, 1) - p, 0.5),
        'a text': ((cape.augment(p, 5, 1) - p).mean(1), 5),
        'the logarithm of the factor': ((cape.augment(p, 0, 1.5) / p).log().mean(1), math.log(1.5)),
    }
    for what, (moved, largest) in bounds.items():
        ends = torch.stack((moved.min(), moved.max()))
        check('augmentation reaches its bounds and stays there', what, ends, torch.tensor((-largest, largest)), 0.07)
    within = cape.augment(p, 5, 1) - p
    check_true('tokens of a text share one shift', '5', ((within.amax(1) - within.amin(1)) <= 1).all())


# --------------------------------------------------------------------------- chapter 7: what every model promises

@proof(7)
def test_later_tokens_change_nothing_before_them():
    """Causality: a token changes no logit before it, and no gradient flows from there to it."""
    def changed_at_13(model, idx):
        return model(torch.cat((idx[:, :13], (idx[:, 13:] + 1) % 50), 1))[0]
    for name, _, model, idx in schemes():
        logits, changed = model(idx)[0], changed_at_13(model, idx)
        check('logits before a changed token = unchanged', name, changed[:, :13], logits[:, :13], 0)
        check_true('from there on they change', name, apart(changed[:, 13:], logits[:, 13:]))
        x = model.wte(idx[:1]).detach().requires_grad_()
        leak = torch.autograd.grad(model.h[0](x)[0, 5].sum(), x)[0][0, 6:]
        check('gradient of an output for later inputs = 0', name, leak, torch.zeros_like(leak), 0)
    if 'kernelized' in CHOSEN:
        model, idx = make(kernelized, max_distance=4, n_features=8, attention='fft')
        logits, changed = model(idx)[0], changed_at_13(model, idx)
        check('by FFT: the same except for rounding', 'kernelized', changed[:, :13], logits[:, :13])


@proof(7)
def test_padding_changes_nothing():
    """Padding that is marked as such changes neither logits nor loss."""
    valid = (torch.arange(21) < 14).expand(2, -1)
    for causal, side in SIDES:
        for name, relative, model, idx in schemes(causal=causal):
            case = f'{name}, {side}'
            short = model(idx[:, :14])[0]
            check('padding on the right = no padding', case, model(idx, valid=valid)[0][:, :14], short)
            if relative:
                turned = torch.cat((idx[:, 14:], idx[:, :14]), 1)
                check('padding on the left = no padding', case, model(turned, valid=valid.flip(1))[0][:, 7:], short)
            if not causal:
                check_true('padding that is not marked is seen', case, apart(model(idx)[0][:, :14], short))
            targets = torch.where(valid, idx.roll(-1, 1), -1)
            by_hand = -short.log_softmax(-1).gather(2, targets[:, :14, None]).mean()
            check('loss with padding = mean over the real tokens', case, model(idx, targets, valid=valid)[1], by_hand)


@proof(7)
def test_shifting_the_input_shifts_the_output():
    """Only offsets count: a text between paddings gives the same logits wherever it stands."""
    def logits(model, idx, n):
        """Of 12 tokens with n paddings before and 9 - n after them."""
        tokens = F.pad(idx[:, :12], (n, 9 - n))
        place = torch.arange(21)
        return model(tokens, valid=((place >= n) & (place < n + 12)).expand(2, -1))[0][:, n:n + 12]
    for name, relative, model, idx in schemes(causal=False):
        for n in (4, 9):
            case = f'{name}, moved by {n}'
            moved = logits(model, idx, n)
            start = logits(model, idx, 0)
            if relative:
                check('logits of a moved text = those at the start', case, moved, start)
            else:
                check_true('not relative: moving a text changes its logits', case, apart(moved, start))


@proof(7)
def test_decoding_is_the_parallel_form():
    """What is fed piece by piece from a state gives the logits of the whole text: sampling is what was trained."""
    valid = torch.ones(2, 21).bool()
    valid[1, :6] = False  # prompts of different lengths, padded on the left
    for name, _, model, idx in schemes():
        for row, pieces in (('one token at a time', [1] * 21), ('pieces of several tokens', [8, 1, 1, 5, 6])):
            state = model.new_state()
            parts = torch.cat([model(part, state=state)[0] for part in idx.split(pieces, 1)], 1)
            check(f'{row} = all at once', name, parts, model(idx)[0])
            check_true("every layer's state counts the tokens", name, all(layer['seen'] == 21 for layer in state))
        state = model.new_state()
        parts = [model(idx[:, :9], valid=valid[:, :9], state=state)[0]]
        parts += [model(token, state=state)[0] for token in idx[:, 9:].split(1, 1)]
        whole = model(idx, valid=valid)[0]
        check('decoding after a padded prompt = all at once', name, torch.cat(parts, 1)[valid], whole[valid])
        gap = torch.ones(2, 21).bool()
        gap[0, 10:12] = False
        state = model.new_state()
        parts = [model(idx[:, :9], state=state)[0], model(idx[:, 9:14], valid=gap[:, 9:14], state=state)[0]]
        parts += [model(token, state=state)[0] for token in idx[:, 14:].split(1, 1)]
        whole = model(idx, valid=gap)[0]
        check('decoding with padding in a later piece = all at once', name, torch.cat(parts, 1)[gap], whole[gap])


@proof(7)
def test_any_length():
    """A text may be longer than block_size, unless the scheme refuses it in words; its beginning does not notice."""
    for name, relative, model, idx in schemes():
        short = model(idx)[0]
        check('one token = the first of many', name, model(idx[:, :1])[0], short[:, :1])
        try:
            long = model(torch.cat((idx, idx, idx), 1))[0]  # 63 tokens, block_size 24
        except ValueError as refusal:
            promised = name != 'absolute' and name in (*VARIANTS, *BASELINES)
            check_true('refused: a ValueError names block_size', name, 'block_size' in str(refusal) and not promised)
        else:
            check('beyond block_size: the beginning = the beginning alone', name, long[:, :21], short)


@proof(7)
def test_predicting_some_places_is_predicting_all():
    """A masked model that predicts at some places only gives the logits and the loss of these places."""
    where = torch.tensor([[1, 4, 20], [0, 2, 3]])
    targets = torch.tensor([[3, 1, 4], [1, 5, -1]])
    predicted = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]  # those with a target
    for name, _, model, idx in schemes(causal=False):
        whole = model(idx)[0]
        picked = torch.stack([whole[b, where[b]] for b in range(2)])  # (2, 3, 50)
        loss = -sum(picked[b, m].log_softmax(-1)[targets[b, m]] for b, m in predicted) / len(predicted)
        ours = list(model(idx, targets, where=where))
        check('logits and loss at some places = those of all places', name, ours, [picked, loss])


@proof(7)
def test_equation_of_its_own():
    """A model file that has an equation is compared with it. Those of this project are proved in chapters 1 to 6."""
    others = [name for name in CHOSEN if name not in OURS]
    if not set(others) - set(BASELINES):
        remark('no other model file is checked; the top of test_equivalence.py says how to add yours')
    for name in others:
        module = import_module(f'model_{name}')
        if hasattr(module, 'equation'):
            row = f'Attention of model_{name}.py = its equation(attention, x)'
            check_layer(row, 'the defaults', module, module.equation, 1e-9)
        elif name not in BASELINES:
            remark(f'model_{name}.py has no equation(attention, x): the rows above cannot see a wrong formula')


# ----------------------------------------------------------------------------------- chapter 8: the same on a GPU

DEVICE = 'cuda' if torch.cuda.is_available() else None  # of this chapter; --rehearse: the CPU, at fewer lengths
COMPILER = 'inductor'  # a test rehearses with a quicker one


@proof(8)
def test_models_in_bfloat16():
    """Every model in bfloat16 is near to float64 on the CPU, with padding and without."""
    idx = torch.randint(50, (4, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(200).expand(4, -1) < torch.tensor([[200], [150], [100], [7]])
    for causal, side in SIDES:
        for name, _, model, _ in schemes(causal=causal, n_embd=128, block_size=256):
            padded = model.hidden(idx, mask)[mask]
            plain = model.hidden(idx)  # without padding, the fast forms
            model = model.float().to(DEVICE)
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
                ours = model.hidden(idx.to(DEVICE), mask.to(DEVICE)).cpu()[mask]
                check('bfloat16 with padding = float64 on the CPU', f'{name}, {side}', ours, padded, 0.1)
                ours = model.hidden(idx.to(DEVICE)).cpu()
                check('bfloat16 without padding = float64 on the CPU', f'{name}, {side}', ours, plain, 0.1)


def training_model(name, tokens, causal):
    """-> a float32 model with heads of 64 on the device, one with its weights and plain forms, and what both read."""
    module = import_module(f'model_{name}')
    torch.manual_seed(0)
    pair = []
    for _ in range(2):
        sizes = dict(vocab_size=64, block_size=tokens, n_layer=2, n_head=2, n_embd=128)
        pair.append(module.Model(module.Config(**sizes, causal=causal)).to(DEVICE).eval())
    model, plain = pair
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)  # else some kernels are zero
    plain.load_state_dict(model.state_dict())
    for block in plain.h:
        if name in OURS and hasattr(block.attn, 'attention'):
            block.attn.attention = 'dense'
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(64, (2, tokens), generator=generator).to(DEVICE)
    if causal:
        return model, plain, dict(idx=idx, targets=idx.roll(-1, 1))
    where = torch.rand(2, tokens, generator=generator).argsort(1)[:, :tokens // 7].to(DEVICE)
    return model, plain, dict(idx=idx, targets=idx.gather(1, where), where=where)


def loss_and_gradients(model, batch, dtype=torch.float32):
    """[loss, gradient of every parameter] as in train.py."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**batch)[1]
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [loss.detach(), *found]


@proof(8)
def test_compiled_training_steps():
    """Loss and all gradients, compiled as train.py does it, are those of the plain forms in float32, uncompiled."""
    lengths = (300, 1024) if DEVICE == 'cuda' else (300,)
    for tokens, (causal, side), name in product(lengths, SIDES, CHOSEN):
        case = f'{name}, {side}, {tokens} tokens'
        model, plain, batch = training_model(name, tokens, causal)
        exact = loss_and_gradients(plain, batch)
        ours = loss_and_gradients(model, batch, torch.bfloat16)
        check('bfloat16, not compiled = float32, not compiled', case, ours, exact, 0.1)
        torch._dynamo.reset()  # or it reaches its limit of recompilations and runs uncompiled
        model.compile(dynamic=False, backend=COMPILER)
        ours = loss_and_gradients(model, batch, torch.bfloat16)
        check('bfloat16, compiled = float32, not compiled', case, ours, exact, 0.1)
        if tokens == lengths[0]:  # compiles again
            check('float32, compiled = float32, not compiled', case, loss_and_gradients(model, batch), exact, 1e-3)


@proof(8)
def test_one_of_many_processes():
    """The same compiled models in DistributedDataParallel, by nccl on a GPU: a single process, as under torchrun."""
    backend = 'nccl' if DEVICE == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name in CHOSEN:
            model, plain, batch = training_model(name, 300, True)
            exact = loss_and_gradients(plain, batch)
            torch._dynamo.reset()
            model.compile(dynamic=False, backend=COMPILER)
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            ours = loss_and_gradients(parallel, batch, torch.bfloat16)
            check(f'{backend}, bfloat16, compiled = float32, not compiled', name, ours, exact, 0.1)
    finally:
        dist.destroy_process_group()


@proof(8, 'composite', 'kernelized')
def test_fast_forms_on_a_gpu():
    """The fast forms are the dense ones in float32: those of kernelized attention; far + near in half precision."""
    lengths = (1, 8, 9, 300, 1031) if DEVICE == 'cuda' else (1, 8, 9, 200)
    for (causal, side), (n, reach) in product(SIDES, ((1, 3), (200, 300), (lengths[-1], 7))):
        inputs = [x.detach().float().to(DEVICE).requires_grad_() for x in kernelized_inputs(n, reach)]
        for form in (kernelized.attend_fft, kernelized.attend_chunked):
            compare(f'{form.__name__} in float32 = dense', f'{side}, {n} tokens, reach of b {reach}',
                    form, kernelized.attend_dense, inputs, 1e-2, least=1, causal=causal)
    for (causal, side), n, dtype in product(SIDES, lengths, (torch.bfloat16, torch.float16)):
        torch._dynamo.reset()
        compiled = torch.compile(composite.attend_fast, dynamic=False, backend=COMPILER)  # dynamic crashes torch 2.11
        exact = [x.detach().to(DEVICE).to(dtype) for x in random_qkv(n, 2, 4, 64)]
        exact.append(random(2, 4, n, 17).detach().to(DEVICE))
        inputs = [x.float().requires_grad_() for x in exact]
        dense = with_gradients(partial(composite.attend_dense, causal=causal), inputs)
        forms = dict(uncompiled=composite.attend_fast)
        if dtype == torch.bfloat16:
            forms['compiled'] = compiled
        for name, form in forms.items():
            inputs = [*(x.clone().requires_grad_() for x in exact[:3]), exact[3].float().requires_grad_()]
            ours = with_gradients(partial(form, causal=causal), inputs)
            row = f'far + near in {str(dtype)[6:]}, {name} = dense, float32'
            check(row, f'{side}, {n} tokens', ours, dense, 0.03, least=1e-3)


def window_gradients(q, k, v, seen, dy, y, lse):
    """Gradients of q, k, v (B, n, nh, hs) through the weights p = exp(score - lse), for any y and lse (B, nh, n)."""
    scale = 1 / math.sqrt(q.size(-1))
    p = (torch.einsum('bind,bjnd->bnij', q, k) * scale - lse[..., None]).exp() * seen  # (B, nh, n, n)
    mean = (dy * y).sum(-1).transpose(1, 2)[..., None]  # (B, nh, n, 1)
    ds = p * (torch.einsum('bind,bjnd->bnij', dy, v) - mean) * scale
    dq = torch.einsum('bnij,bjnd->bind', ds, k)
    dk = torch.einsum('bnij,bind->bjnd', ds, q)
    return [dq, dk, torch.einsum('bnij,bind->bjnd', p, dy)]


@proof(8, 'composite')
def test_windows_of_the_flash_kernel():
    """Torch's flash kernel with a window: query i sees the keys i - left ... i + right, and -1 is no bound.

    Its backward kernel takes any log-sum-exp and output: those over more keys give their gradients through these.
    """
    if DEVICE == 'cpu':
        return remark('the CPU has no such kernel')
    for n, (left, right) in product((17, 300, 1024), ((-1, 0), (0, -1), (5, 3), (-1, -1))):
        seen = [[(left < 0 or i - j <= left) and (right < 0 or j - i <= right) for j in range(n)] for i in range(n)]
        seen = torch.tensor(seen, device=DEVICE)
        q, k, v, dy, y = [random(2, n, 4, 64, seed=seed).detach().to(DEVICE, torch.bfloat16) for seed in range(5)]
        window = dict(window_size_left=left, window_size_right=right)
        ours, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(q, k, v, None, None, n, n, 0.0, False,
                                                                            False, **window)
        wide = [x.float() for x in (q, k, v)]
        scores = torch.einsum('bind,bjnd->bnij', *wide[:2]) / 8  # (B, nh, n, n)
        scores = scores.masked_fill(~seen, -math.inf)
        case = f'{n} tokens, left {left}, right {right}'
        check('log-sum-exp in a window = by hand', case, lse, scores.logsumexp(-1), 0.01)
        check('output in a window = by hand', case, ours, torch.einsum('bnij,bjnd->bind', scores.softmax(-1), wide[2]),
              0.03)
        lse = lse + 0.5  # as if there were more keys
        gradients = torch.ops.aten._flash_attention_backward(dy, q, k, v, y, lse, None, None, n, n, 0.0, False, rng,
                                                             unused, **window)
        exact = window_gradients(*wide, seen, dy.float(), y.float(), lse)
        check('gradients in a window, at the log-sum-exp of more keys = by hand', case, list(gradients), exact, 0.03)


# ------------------------------------------------------------------------------------------------------- the book

def print_rows(show_all):
    """A line for each row of CASES with its worst case, below it the failed cases or all -> rows, rows failed."""
    rows = {}
    failed = 0
    for case in CASES:
        rows.setdefault(case.row, []).append(case)
    for row, cases in rows.items():
        worst = max(cases, key=lambda case: case.badness)
        if worst.shown:
            failed += worst.badness > 1
            verdict = 'FAIL' if worst.badness > 1 else 'PASS'
            print(f'  {row:75s} {len(cases):6d} {worst.shown:>9s} {worst.limit:>9s}  {verdict}')
        else:
            print(f'  {row}')  # a remark
        bad = [case for case in cases if case.badness > 1]
        for case in cases if show_all and worst.shown else bad[:5]:
            mark = 'failed: ' if case in bad else ''
            print(f'      {mark + case.name[:70]:78s} {case.shown:>9s} {case.limit:>9s}')
        if len(bad) > 5 and not show_all:
            print(f'      ... and {len(bad) - 5} more failed cases; --all prints them')
    return sum(bool(cases[0].shown) for cases in rows.values()), failed


def main():
    parser = argparse.ArgumentParser(description='What equals what in this project, checked. Exit 1 if a row fails.')
    parser.add_argument('models', nargs='*', metavar='MODEL', help=f'only the rows about these: {", ".join(FILES)}')
    parser.add_argument('--all', action='store_true', help='print every case under its row')
    parser.add_argument('--chapter', type=int, choices=CHAPTERS, help='only this one')
    parser.add_argument('--rehearse', action='store_true', help='chapter 8 on the CPU: what a GPU would run')
    parser.add_argument('--first', action='store_true', help='stop after the first claim that fails')
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in FILES]
    if unknown:
        print(f'test_equivalence.py: no model {unknown[0]!r}; choose from {", ".join(FILES)}', file=sys.stderr)
        return 2
    CHOSEN[:] = arguments.models or FILES
    global DEVICE
    if arguments.rehearse:
        DEVICE = 'cpu'
    torch.set_num_threads(1)  # many tiny tensors
    chapter = rows = cases = failed = 0
    for test in [value for name, value in globals().items() if name.startswith('test_')]:
        asked = set(arguments.models or test.models)  # the whole book also names what is missing
        if (test.models and not set(test.models) & asked) or arguments.chapter not in (None, test.chapter):
            continue
        with contextlib.suppress(AssertionError):  # CASES knows what failed
            test()
        if test.chapter != chapter:
            chapter = test.chapter
            print(f'\n\n{chapter}  {CHAPTERS[chapter]}')
            print('-' * 77, ' cases     worst     limit')
        print(f'\n{test.__doc__}')
        new_rows, new_failed = print_rows(arguments.all)
        sys.stdout.flush()
        rows += new_rows
        cases += len(CASES)
        failed += new_failed
        if failed and arguments.first:
            break
    print(f'\n{rows} rows, {cases:,} cases, {failed} rows failed')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
