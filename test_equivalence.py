"""
Equivalence checks on random tensors: values and gradients, in float64 on a CPU.

    python test_equivalence.py            # the whole report; exit 1 if a check fails
    python test_equivalence.py conv       # only the checks of model_conv.py; --all prints every case
    python -m pytest test_equivalence.py  # the same checks as tests

The left side of each check is the code of a model file. The right side is written here, or in the file's equation(), as
explicit sums or matrices. An error is relative to the largest entry of the right side.

`python test_equivalence.py mine` checks your own model_mine.py, next to this file or in baselines/: section 7, what
every model file guarantees. To check its formula as well, write the layer a second time in model_mine.py, as loops over
single queries and keys (example: baselines/model_alibi.py). Start from a copy of model_nope.py:

    def equation(attention, x):  # your Attention, x (B, T, C) -> (B, T, C)

If your positions are absolute, write RELATIVE = False at the top level of your file.
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

import torch
import torch.nn.functional as F

import model_composite as composite
import model_conv as conv
import model_kernelized as kernelized
import model_nope as nope

SECTIONS = {
    1: 'Relative positions are convolutions (Chang et al., ACL 2021, section 3)',
    2: 'Composite attention without a (T, T) matrix (this project)',
    3: 'Convolutions as banded Toeplitz matrices (Chang et al., equations 2, 3; Wu et al., ICLR 2019)',
    4: 'Kernelized attention with relative positions (Luo et al., NeurIPS 2021)',
    5: 'No positions (Chi et al., ACL 2023)',
    6: 'Baselines: RoPE, sinusoids with CAPE (ALiBi and TISA: their equation in section 7)',
    7: 'What every model file guarantees',
}
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / 'baselines'))
MASKS = ((True, 'causal'), (False, 'not causal'))
B, H, T, D = 2, 3, 11, 4  # sizes of most cases: sequences, heads, tokens (more than a kernel covers), channels per head
K = 2  # half width of a kernel: offsets -K ... K
WIDTH = 2 * K + 1  # its entries


# ------------------------------------------------------------------------------------------- how checks are recorded

class Case(NamedTuple):
    check: str  # what equals what
    name: str  # which case of it
    error: str  # as printed; '' for a note
    limit: str  # the tolerance as printed
    ratio: float  # error over tolerance: above 1 the case fails


CASES = []  # of the test that runs


def section(number, *models):
    """Mark a test as part of a section, about these models (none: about every model file)."""
    def mark(test):
        @wraps(test)
        def run():
            CASES.clear()
            try:
                test()
            except Exception as error:  # any error is a failed check, and the report goes on
                message = f'{type(error).__name__}: {" ".join(str(error).split())}'
                frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(HERE) in frame.filename]
                place = f'{Path(frames[-1].filename).name}, line {frames[-1].lineno}: {message}'
                CASES.append(Case(place[:75], message, 'inf', 'no crash', math.inf))
            failed = [f'{case.check} [{case.name}]: {case.error}' for case in CASES if case.ratio > 1]
            assert not failed, '\n'.join(failed)
        run.section = number
        run.models = models
        return run
    return mark


def difference(a, b, floor):
    """Largest |a - b| over the largest |b| (at least `floor`); nan if shapes differ or a is not finite."""
    if a.shape != b.shape:
        return math.nan
    ratio = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=floor)).item()
    return ratio if math.isfinite(ratio) else math.nan


def check(text, case, ours, reference, tolerance=1e-12, floor=1e-30):
    """Record how far two tensors, or lists of tensors, differ; floor=1 where true gradients may be 0."""
    pairs = zip(ours, reference, strict=True) if isinstance(ours, list) else [(ours, reference)]
    errors = [difference(a, b, floor) for a, b in pairs]
    worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
    ratio = math.inf if math.isnan(worst) else worst / max(tolerance, 1e-99)
    CASES.append(Case(text, case, f'{worst:.1e}', f'{tolerance:.0e}' if tolerance else 'equal', ratio))


def compare(text, case, ours, reference, inputs, tolerance=1e-12, floor=1e-30, **known):
    """Record how far two functions differ, in value and in the gradient of every input."""
    ours, reference = [with_gradients(partial(f, **known), inputs) for f in (ours, reference)]
    check(text, case, ours, reference, tolerance, floor)


def check_true(text, case, condition):
    """Record a condition."""
    CASES.append(Case(text, case, 'yes' if condition else 'no', 'yes', 0.0 if condition else math.inf))


def differ(a, b):
    """Whether two tensors differ: a control for the equality checks."""
    return (a - b).abs().max() > 1e-3


def note(text):
    """Record a skipped check."""
    CASES.append(Case(text, '', '', '', 0.0))


# -------------------------------------------------------------------------------------------- models and random numbers

FILES = [path.stem.removeprefix('model_') for path in (*HERE.glob('model_*.py'), *HERE.glob('baselines/model_*.py'))]
FILES = sorted(set(FILES))  # names of all model files; one next to this file takes precedence over one in baselines/
CHOSEN = list(FILES)  # those to check: the command line may choose
VARIANTS = {  # (file, fields) of our own files, at small sizes; any other file runs with its defaults
    'nope': ('nope', dict()),
    'nope, absolute': ('nope', dict(absolute=True)),
    'composite': ('composite', dict(kernel_size=5, bias=True)),
    'composite, key-dependent': ('composite', dict(kernel_size=5, dynamic_key=True)),
    'composite, no content': ('composite', dict(kernel_size=3, content=False, fixed=False)),
    'composite, fixed only': ('composite', dict(kernel_size=1, dynamic=False)),
    'conv': ('conv', dict(kernel_size=5, bias=True)),
    'conv, everywhere': ('conv', dict(kernel_size=5, lightweight=True, dynamic=True, queries_keys=True, values=True)),
    'conv, in the scores': ('conv', dict(kernel_size=5, lightweight=True, dynamic=True, output=False)),
    'conv, before attention': ('conv', dict(kernel_size=5, queries_keys=True, values=True, output=False, bias=True)),
    'conv, dynamic mixer': ('conv', dict(kernel_size=5, mixer='dynamic', queries_keys=True)),
    'conv, lightweight mixer': ('conv', dict(kernel_size=5, mixer='lightweight', output=False)),
    'kernelized': ('kernelized', dict(max_distance=4, n_features=8)),
    'kernelized, chunked': ('kernelized', dict(max_distance=3, n_features=8, attention='chunked', feature_map='orf')),
    'kernelized, plain': ('kernelized', dict(normalize=False, rpe=False, n_features=8)),
    'kernelized, trf': ('kernelized', dict(feature_map='trf', n_features=200, max_distance=0)),
    'kernelized, elu': ('kernelized', dict(feature_map='elu', normalize=False, max_distance=30)),
    'rope': ('rope', dict()),
    'rope, every second layer': ('rope', dict(nope_every=2)),
    'tisa, two kernels': ('tisa', dict(n_kernels=2)),
}


def make(module, **fields):
    """A float64 model with random parameters, so that no term is zero, and tokens (2, 21) for it."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16)
    model = module.Model(module.Config(**{**sizes, **fields})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model, torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(0))


def schemes(**fields):
    """(name, module, model, tokens) of every scheme that is checked, ours in their variants."""
    unlisted = {name: (name, {}) for name in set(CHOSEN) - {file for file, _ in VARIANTS.values()}}
    for name, (file, own) in {**VARIANTS, **unlisted}.items():
        if file in CHOSEN:
            module = import_module(f'model_{file}')
            yield name, module, *make(module, **own, **fields)


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).mul_(scale).requires_grad_()


def random_qkv(tokens=T):
    return [random(B, H, tokens, D, seed=seed) for seed in range(3)]


def with_gradients(f, inputs, parameters=()):
    """[value, gradient of every input and parameter] of f(*inputs) for a fixed random output gradient."""
    y = f(*inputs)
    dy = random(*y.shape, seed=99).detach().to(y)
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *parameters], dy, materialize_grads=True)]


def check_layer(text, case, module, equation, tolerance=1e-11, tokens=T, **fields):
    """The Attention of a module = equation(attention, x), and the gradient of every parameter; causal and not."""
    for causal, mask in MASKS:
        attention = make(module, **{**dict(causal=causal, n_layer=1, n_head=H, n_embd=H * D), **fields})[0].h[0].attn
        x = random(B, tokens, H * D)
        ours = with_gradients(attention, [x], attention.parameters())
        reference = with_gradients(partial(equation, attention), [x], attention.parameters())
        check(text, f'{mask}, {case}', ours, reference, tolerance, floor=1e-3)


# --------------------------------------------------------------------- section 1: relative positions are convolutions

def clipped_index(n, k=K):
    """(n, n) int64: the entry of a kernel (2k+1,) for query i and key j."""
    return (torch.arange(n) - torch.arange(n)[:, None]).clamp(-k, k) + k


def reference_softmax(scores, v, causal):
    """Softmax attention from explicit exponentials: scores (B, nh, T, T), v (B, nh, T, hs) -> (B, nh, T, hs)."""
    n = v.size(2)
    if causal:
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def projections(attention, x):
    """q, k, v (B, nh, T, hs) of a layer with H heads and no biases."""
    parts = [F.linear(x, weight) for weight in attention.c_attn.weight.split(x.size(2))]
    return [part.view(x.size(0), x.size(1), H, D).transpose(1, 2) for part in parts]


def project_out(attention, y):
    """y (B, nh, T, hs) through the output projection -> (B, T, C)."""
    return F.linear(y.transpose(1, 2).flatten(2), attention.c_proj.weight)


@section(1, 'composite')
def test_shaw_and_t5_are_convolutions():
    """Shaw's relative embedding is a query-dependent kernel (equation 5), T5's bias a fixed kernel (equation 4)."""
    def shaw(attention, x):
        q, k, v = projections(attention, x)
        keys = k[:, :, None] + attention.dynamic[clipped_index(T)]  # (B, nh, T, T, hs): keys as seen by each query
        scores = (q[:, :, :, None] * keys).sum(-1) / math.sqrt(D)
        return project_out(attention, reference_softmax(scores, v, attention.causal))

    def t5(attention, x):
        q, k, v = projections(attention, x)
        toeplitz = attention.fixed[:, clipped_index(T)]  # (nh, T, T)
        scores = q @ k.transpose(2, 3) / math.sqrt(D) + toeplitz
        return project_out(attention, reference_softmax(scores, v, attention.causal))
    check_layer("content + dynamic kernel = Shaw's embeddings added to the keys", 'fixed=False', composite, shaw,
                kernel_size=WIDTH, fixed=False)
    check_layer("content + fixed kernel = T5's bias as a Toeplitz matrix", 'dynamic=False', composite, t5,
                kernel_size=WIDTH, dynamic=False)


@section(1, 'composite')
def test_limits_of_composite_attention():
    """Without kernels it is plain attention (equation 1), without content a lightweight convolution (equation 3)."""
    zero = torch.zeros(1, H, T, WIDTH).double()
    for causal, mask in MASKS:
        compare('attention with zero kernels = scaled_dot_product_attention', mask,
                lambda q, k, v: composite.attend_dense(q, k, v, zero, causal),
                partial(F.scaled_dot_product_attention, is_causal=causal), random_qkv())
    q = torch.zeros(B, H, T, D).double()
    beta = random(H, WIDTH).detach()
    v = random(B, H, T, D).detach()
    window = F.pad(beta[None, :, None, 1:-1], (1, 1), value=-1e9)  # the end entries, of all farther tokens, are masked
    window = window.expand(1, H, T, WIDTH)
    kernel = beta.exp()[:, None, 1:-1]  # (nh, 1, 2K-1)
    sums = F.conv1d(v.permute(0, 3, 1, 2).reshape(B * D, H, T), kernel, padding=K - 1, groups=H)  # (B hs, nh, T)
    norms = F.conv1d(torch.ones(1, H, T).double(), kernel, padding=K - 1, groups=H)
    reference = (sums / norms).view(B, D, H, T).permute(0, 2, 3, 1)  # (B, nh, T, hs)
    check('attention with a fixed kernel only = conv1d with normalized weights', 'not causal',
          composite.attend_dense(q, q, v, window, causal=False), reference)


@section(1, 'composite')
def test_skewing_is_a_clipped_index():
    """Skewing writes kernels along diagonals: entry (i, j) is that of the clipped offset j - i."""
    for k, queries, more, future in product((0, 1, 3, 9), (1, 2, 7), (0, 1, 6), (None, -7.0)):
        keys = queries + more
        shapes = [(queries, more, keys)] + [(keys, -more, queries)] * (future is None)  # query- and key-dependent
        for rows, past, n in shapes:
            def indexed(kernel):
                offsets = torch.arange(n) - past - torch.arange(rows)[:, None]
                matrix = kernel.gather(2, (offsets.clamp(-k, k) + k).expand(2, -1, -1))
                return matrix if future is None else matrix.masked_fill(offsets > 0, future)
            compare('kernels along diagonals = clipped index', f'{rows} rows, {past} before, {n} columns, k = {k}',
                    partial(composite.along_diagonals, past=past, n=n, future=future), indexed,
                    [random(2, rows, 2 * k + 1)])


# ------------------------------------------------------ section 2: composite attention without a (T, T) matrix

def reference_attention(q, k, v, kernel_scores, causal):
    """Softmax attention with kernel_scores (B, nh, T, 2k+1) added to the scores at the clipped offsets."""
    n = q.size(2)
    bias = kernel_scores[:, :, torch.arange(n)[:, None], clipped_index(n, kernel_scores.size(-1) // 2)]  # (B, nh, T, T)
    return reference_softmax(q @ k.transpose(2, 3) / math.sqrt(q.size(-1)) + bias, v, causal)


def kernel_cases():
    """(size of the biases, case, [q, k, v, kernel_scores])."""
    for end in (500, -500):  # all the weight at one end
        slope = torch.linspace(-end, end, WIDTH).double().repeat(1, H, T, 1)
        yield 'biases of hundreds of nats', f'slope {end:+d}', [*random_qkv(), slope.requires_grad_()]
    for n, k, batch in product((1, 2, 8, 9, 17, 67, 301), (0, 1, 2, 8), (1, B)):  # a kernel for all sequences, or each
        inputs = [*random_qkv(n), random(batch, H, n, 2 * k + 1, scale=3)]
        yield 'biases of some nats', f'{n} tokens, kernel of {2 * k + 1}, batch of {batch}', inputs


@section(2, 'composite')
def test_near_and_far_are_the_dense_form():
    """Near keys (a convolution) and far keys (no bias left), joined by their log-sum-exps, equal the dense form."""
    forms = {'dense': composite.attend_dense, 'near + far': composite.attend_near_and_far,
             '128 queries at a time': composite.attend_fast}
    for causal, mask in MASKS:
        for biases, case, inputs in kernel_cases():
            for name, form in forms.items():
                compare(f'{name} = explicit (T, T) matrix, {biases}', f'{mask}, {case}', form, reference_attention,
                        inputs, 1e-11, floor=1, causal=causal)


# ------------------------------------------------------- section 3: convolutions as banded Toeplitz matrices

def banded(w, n, causal):
    """Kernels w (..., width) as Toeplitz matrices (..., n, n): entry (i, j) is the weight of offset j - i."""
    width = w.size(-1)
    first = 1 - width if causal else -(width // 2)  # the smallest offset
    r = torch.arange(n) - torch.arange(n)[:, None] - first
    return w[..., r.clamp(0, width - 1)] * ((0 <= r) & (r < width))


@section(3, 'conv')
def test_convolutions_are_banded_toeplitz_matrices():
    """A convolution is a banded Toeplitz matrix, per channel, per head, or per head and token."""
    def depthwise(x, w, causal):
        return torch.einsum('cij,bjc->bic', banded(w, x.size(1), causal), x)

    def lightweight(x, w, causal):
        return banded(w, x.size(2), causal) @ x

    def dynamic(x, w, causal):  # each token uses its own row of its own matrix
        return torch.einsum('bhiij,bhjd->bhid', banded(w, x.size(2), causal), x)
    for (n, width), (causal, mask) in product(((1, 5), (3, 5), (11, 5), (11, 1), (11, 17)), MASKS):
        case = f'{mask}, {n} tokens, kernel of {width}'
        compare('depthwise convolution = a banded matrix per channel', case, conv.depthwise_conv, depthwise,
                [random(B, n, D), random(D, width)], causal=causal)
        compare('lightweight convolution = a banded matrix per head', case, conv.lightweight_conv, lightweight,
                [random(B, H, n, D), random(H, width)], causal=causal)
        compare('dynamic convolution = a banded row per token', case, conv.dynamic_conv, dynamic,
                [random(B, H, n, D), random(B, H, n, width)], causal=causal)


# ----------------------------------------------------- section 4: kernelized attention with relative positions

def equation_10(q, k, v, b, causal=True, valid=None):
    """Kernelized attention with relative positions from explicit (T, T) matrices -> (B, nh, T, hs)."""
    n = q.size(2)
    visible = torch.ones(n, n).bool().tril(0 if causal else n)
    if valid is not None:  # padding is visible only to itself
        visible = visible & (valid[:, None, None] | torch.eye(n).bool())
    toeplitz = b.exp()[:, clipped_index(n, b.size(1) // 2)]  # (nh, T, T)
    weights = torch.einsum('bhim,bhjm->bhij', q, k) * toeplitz * visible  # (B, nh, T, T)
    return weights / weights.sum(-1, keepdim=True) @ v


def kernelized_inputs(n, R, m=6):
    """Positive features q, k (B, nh, n, m), values v (B, nh, n, hs), asymmetric b (nh, 2R+1)."""
    q, k = (random(B, H, n, m, seed=seed).detach().exp().requires_grad_() for seed in (0, 1))
    return [q, k, random(B, H, n, D, seed=2), random(H, 2 * R + 1)]


def decode(q, k, v, b, pieces):
    """Feed a sequence in pieces -> (B, nh, T, hs) and the state at its end."""
    state = {}
    parts = zip(*[x.split(pieces, 2) for x in (q, k, v)])
    return torch.cat([kernelized.attend_recurrent(*part, b, state) for part in parts], 2), state


@section(4, 'kernelized')
def test_dense_fft_and_chunked_are_equation_10():
    """Equation 10 by FFT in O(T log T), since a Toeplitz matrix is a convolution (section 3.2), by chunks in O(T)."""
    def sums(c, x):
        n = x.size(-1)
        return torch.stack([sum(c[:, j - i + n - 1] * x[:, :, j] for j in range(n)) for i in range(n)], -1)
    for n in (1, 2, 5, 16, 31):
        compare('Toeplitz matrix times vector by FFT = explicit sums', f'{n} tokens', kernelized.toeplitz_fft, sums,
                [random(3, 2 * n - 1), random(2, 3, n)], 1e-11, floor=1)  # asymmetric
    sizes = [(1, 0), (1, 3), *product([9], (0, 1, 4, 8, 20)), *product([23], (0, 1, 3, 4, 5, 22, 40))]
    for (causal, mask), (n, R), padded in product(MASKS, sizes, (False, True)):
        valid = torch.rand(B, n, generator=torch.Generator().manual_seed(n)) > 0.4 if padded else None
        inputs = kernelized_inputs(n, R)
        known = dict(floor=1, causal=causal, valid=valid)
        case = f'{mask}, {n} tokens, R = {R}, padded={padded}'
        compare('dense = equation 10', case, kernelized.attend_dense, equation_10, inputs, 1e-11, **known)
        compare('FFT = equation 10', case, partial(kernelized.attend_fft, group=4), equation_10, inputs, 1e-10, **known)
        for chunk in (1, 2, 4, 7, 23, 64):
            chunked = partial(kernelized.attend_chunked, chunk=chunk)
            compare('chunked = equation 10', f'{case}, chunks of {chunk}', chunked, equation_10, inputs, 1e-11, **known)


@section(4, 'kernelized')
def test_running_state_is_equation_10():
    """Decoding needs running sums and the last R keys only: a state of constant size."""
    for R, pieces in product((0, 1, 3, 30), ([1] * 23, [9, 1, 1, 5, 7], [2, 21], [23])):
        q, k, v, b = kernelized_inputs(23, R)
        y, state = decode(q, k, v, b, pieces)
        case = f'R = {R}, {len(pieces)} pieces'
        check('running state = equation 10', case, y, equation_10(q, k, v, b))
        check_true('the state keeps R keys and one sum of fixed size', case,
                   state['k'].size(2) == min(R, 23) and state['kv'].shape == (B, H, 6, D + 1))


@section(4, 'kernelized')
def test_random_features_are_unbiased():
    """E[phi(x).phi(y)] = exp(x.y), with the variance (exp(|x + y|^2) - 1) exp(2 x.y) / m of Lemma 2."""
    x = F.normalize(random(D, seed=1).detach(), dim=0) * 0.6
    y = F.normalize(random(D, seed=2).detach(), dim=0) * 0.8
    torch.manual_seed(0)
    m, draws = 16, 60000
    w = kernelized.random_matrix(m * draws, D).double()
    positive = kernelized.features(x, w) * kernelized.features(y, w) * m * draws  # one feature each, not averaged
    estimates = positive.view(draws, m).mean(1)
    check('mean of positive features = exp(x.y)', '60,000 draws', estimates.mean(), (x @ y).exp(), 0.01)
    variance = ((x + y).square().sum().exp() - 1) * (2 * x @ y).exp() / m
    check('variance of positive features = Lemma 2', '60,000 draws', estimates.var(), variance, 0.05)
    waves = kernelized.features(x, w, 'trf') * kernelized.features(y, w, 'trf')
    check('mean of trigonometric features = exp(x.y)', '60,000 draws', waves.sum(), (x @ y).exp(), 0.01)
    for kind, factor in (('prf', (x.square().sum() / 2 - (x @ w[:8].T).max()).exp()), ('trf', (-x @ x / 2).exp())):
        check("a query's stable features = the plain ones times one factor", kind,
              kernelized.features(x, w[:8], kind, stable=True), kernelized.features(x, w[:8], kind) * factor)
        ours, unit = [kernelized.features(z, w[:8], kind, normalize=z is x) for z in (x, F.normalize(x, dim=0))]
        check('normalized features of x = features of x / |x|', kind, ours, unit)
    one = torch.ones(D).double() / D ** 0.5
    w = kernelized.random_matrix(20000 * D, D, 'orf').double()
    for y in (one, -one):
        mean = (kernelized.features(one, w) * kernelized.features(y, w)).sum()
        check('mean of orthogonal features = exp(x.y)', f'x.y = {one @ y:.0f}', mean, (one @ y).exp(), 0.06)
    w = kernelized.random_matrix(2 ** 16, D)
    q, k, v, b = [x.detach() for x in (*random_qkv(), random(H, WIDTH))]
    ours = kernelized.attend_dense(*[kernelized.features(x, w, normalize=True) for x in (q, k)], v, b)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) + b[:, clipped_index(T)]
    check('65,536 features = softmax with the same b', 'causal', ours, reference_softmax(scores, v, True), 0.02)


# -------------------------------------------------------------------------------------------- section 5: no positions

@section(5, 'nope')
def test_uniform_causal_attention_has_variance_1_over_m():
    """The variance of uniform causal attention at token m is 1/m: the mask reveals the position."""
    n, samples, channels = 32, 4000, 8
    attention = make(nope, n_layer=1, n_head=1, n_embd=channels)[0].h[0].attn
    x = torch.randn(samples, n, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.c_attn.weight.zero_()
        attention.c_attn.weight[2 * channels:] = torch.eye(channels)  # q = k = 0, v = x
        attention.c_proj.weight.copy_(torch.eye(channels))
        y = attention(x)
    m = torch.arange(1, n + 1).double()
    check('attention with zero queries = running mean', f'{n} tokens', y, x.cumsum(1) / m[:, None])
    check('its variance at token m = 1/m', '32,000 samples', y.var(dim=(0, 2)) * m, torch.ones_like(m), 0.05)


@section(5, 'nope', 'composite')
def test_order_comes_from_the_mask():
    """Without positions and without the causal mask, permuted tokens give permuted logits."""
    order = torch.randperm(21, generator=torch.Generator().manual_seed(3))

    def logits(module, **fields):
        model, idx = make(module, **fields)
        return model(idx[:, order])[0], model(idx)[0][:, order]
    check('no mask: logits of permuted tokens = permuted logits', 'nope', *logits(nope, causal=False))
    check_true('causal mask: they differ', 'nope', differ(*logits(nope)))
    check_true('no mask but positions: they differ', 'composite', differ(*logits(composite, causal=False)))
    check_true('no mask but positions: they differ', 'absolute', differ(*logits(nope, causal=False, absolute=True)))


# ----------------------------------------------------------------------------------------------- section 6: baselines

@section(6, 'rope')
def test_rotary_positions_are_relative():
    """RoPE: each query and key times the rotation matrix of its position; the scores depend on the offset alone."""
    rope = import_module('model_rope')

    def rotated(x, positions):
        """x (B, nh, T, hs): each token times the rotation matrix of its position, written entry by entry."""
        half = x.size(3) // 2
        rotations = torch.zeros(x.size(2), x.size(3), x.size(3)).double()
        for i, c in product(range(x.size(2)), range(half)):
            angle = positions[i] / 10000 ** (2 * c / x.size(3))
            rotations[i, c, c] = rotations[i, c + half, c + half] = math.cos(angle)
            rotations[i, c, c + half] = -math.sin(angle)
            rotations[i, c + half, c] = math.sin(angle)
        return (rotations @ x[..., None])[..., 0]
    q, k, _ = random_qkv()
    for past in (0, 7, 5000):
        compare('rotate = the rotation matrices', f'{past} tokens before', partial(rope.rotate, past=past),
                partial(rotated, positions=range(past, past + T)), [q])
        scores = rope.rotate(q, past) @ rope.rotate(k, past).transpose(2, 3)
        pairs = [(rotated(k, [j - i for j in range(T)]) * q[:, :, i, None]).sum(-1) for i in range(T)]
        check('scores = q_i.(R_{j-i} k_j): the offset alone', f'{past} tokens before', scores, torch.stack(pairs, 2))
    for every, expected in ((0, [True] * 5), (1, [False] * 5), (2, [True, False, True, False, True])):
        layers = make(rope, n_layer=5, nope_every=every)[0].h
        check_true('every n-th layer is without rotation', f'n = {every}', [b.attn.rotates for b in layers] == expected)


@section(6, 'cape')
def test_sinusoids():
    """Sinusoids are absolute positions that are not learned: a NoPE model with --absolute and this very table."""
    cape = import_module('model_cape')

    def table(n, channels):  # channel c: sin(p / 10000^(2c/channels)); channel c + channels/2: the cosine
        angles = [[p / 10000 ** (2 * c / channels) for c in range(channels // 2)] for p in range(n)]
        rows = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]
        return torch.tensor(rows, dtype=torch.float64)
    for (causal, mask), tokens in product(MASKS, (1, T, 40)):
        model, _ = make(cape, causal=causal, init_std=0.7)
        reference, _ = make(nope, causal=causal, absolute=True, block_size=tokens)
        reference.load_state_dict({**model.state_dict(), 'wpe.weight': 0.7 * table(tokens, 16)})
        reference.wpe.requires_grad_(False)
        idx = torch.randint(50, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        pair = []
        for each in (model, reference):
            trained = [p for p in each.parameters() if p.requires_grad]
            pair.append(with_gradients(lambda: each(idx)[0], [], trained))
        check('sinusoids = a table of absolute positions', f'{mask}, {tokens} tokens', *pair, 1e-11, floor=1e-3)


# ------------------------------------------------------------------------- section 7: what every model file guarantees

@section(7)
def test_layer_is_its_equation():
    """The Attention of a file computes its equation(attention, x), written as loops; values and all gradients."""
    for name, module, model, _ in schemes():
        if not hasattr(module, 'equation'):
            note(f'model_{name}.py has no equation(attention, x): the other checks cannot see a wrong formula')
            continue
        fields = vars(model.config) | dict(n_layer=1, n_head=H, n_embd=H * D)
        fields.pop('causal')
        for tokens in (1, T):
            check_layer('layer = its equation', f'{name}, {tokens} tokens', module, module.equation, 1e-9, tokens,
                        **fields)


@section(7)
def test_later_tokens_change_nothing_before_them():
    """Causality: logits and gradients do not depend on later tokens."""
    def changed_at_13(model, idx):
        return model(torch.cat((idx[:, :13], (idx[:, 13:] + 1) % 50), 1))[0]
    for name, _, model, idx in schemes():
        logits, changed = model(idx)[0], changed_at_13(model, idx)
        check('logits before a changed token = unchanged', name, changed[:, :13], logits[:, :13], 0)
        check_true('from there on they change', name, differ(changed[:, 13:], logits[:, 13:]))
        x = model.wte(idx[:1]).detach().requires_grad_()
        leak = torch.autograd.grad(model.h[0](x)[0, 5].sum(), x)[0][0, 6:]
        check('gradient of an output for later inputs = 0', name, leak, torch.zeros_like(leak), 0)
    if 'kernelized' in CHOSEN:
        model, idx = make(kernelized, max_distance=4, n_features=8, attention='fft')
        logits, changed = model(idx)[0], changed_at_13(model, idx)
        check('by FFT: unchanged up to rounding', 'kernelized', changed[:, :13], logits[:, :13])


@section(7)
def test_padding_changes_nothing():
    """Marked padding changes neither logits nor loss, on the left, on the right, and next to longer sequences."""
    valid = (torch.arange(21) < 14).expand(2, -1)
    for causal, mask in MASKS:
        for name, _, model, idx in schemes(causal=causal):
            case = f'{name}, {mask}'
            short = model(idx[:, :14])[0]
            check('padding on the right = no padding', case, model(idx, valid=valid)[0][:, :14], short)
            rolled = idx.roll(7, 1)
            check('padding on the left = no padding', case, model(rolled, valid=valid.flip(1))[0][:, 7:], short)
            ragged = valid.clone()
            ragged[1] = True
            check('next to a longer sequence = alone', case, model(idx, valid=ragged)[0][:1, :14], short[:1])
            check('next to a shorter sequence = alone', case, model(idx, valid=ragged)[0][1:], model(idx)[0][1:])
            if not causal:
                check_true('padding that is not marked is visible', case, differ(model(idx)[0][:, :14], short))
            targets = torch.where(valid, idx.roll(-1, 1), -1)
            by_hand = -short.log_softmax(-1).gather(2, targets[:, :14, None]).mean()
            check('loss with padding = mean over the real tokens', case, model(idx, targets, valid=valid)[1], by_hand)


@section(7)
def test_decoding_is_the_full_pass():
    """Cached decoding computes the logits of the full pass, and with relative positions only offsets matter."""
    for name, module, model, idx in schemes():
        full = model(idx)[0]
        for how, pieces in (('one token at a time', [1] * 21), ('pieces of several tokens', [8, 1, 1, 5, 6])):
            state = model.new_state()
            parts = torch.cat([model(part, state=state)[0] for part in idx.split(pieces, 1)], 1)
            check(f'{how} = full pass', name, parts, full)
            check_true("every layer's state counts the tokens", name, all(layer['seen'] == 21 for layer in state))
        state = [{**layer, 'seen': 3} for layer in model.new_state()]  # as if three tokens came before
        moved = model(idx, state=state)[0]
        if getattr(module, 'RELATIVE', True) and not model.config.absolute:
            check('logits of a shifted sequence = those at the start', name, moved, full)
        else:
            check_true('absolute: shifting a sequence changes its logits', name, differ(moved, full))


@section(7)
def test_any_length():
    """A sequence may be longer than block_size, or is refused by a ValueError that names block_size."""
    for name, module, model, idx in schemes():
        short = model(idx)[0]
        check('one token = the first of many', name, model(idx[:, :1])[0], short[:, :1])
        try:
            long = model(torch.cat((idx, idx, idx), 1))[0]  # 63 tokens, block_size 24
            check('beyond block_size: the beginning = the beginning alone', name, long[:, :21], short)
        except ValueError as error:
            check_true('refused: the ValueError names block_size', name, 'block_size' in str(error))
            check_true('refused: only absolute positions', name, model.config.absolute or name not in VARIANTS)


@section(7)
def test_predicting_some_positions_is_predicting_all():
    """With `where`, the logits and the loss are those of the given positions."""
    where = torch.tensor([[1, 4, 20], [0, 2, 3]])
    targets = torch.tensor([[3, 1, 4], [1, 5, -1]])
    predicted = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]  # those with a target
    for name, _, model, idx in schemes(causal=False):
        full = model(idx)[0]
        picked = torch.stack([full[b, where[b]] for b in range(2)])  # (2, 3, 50)
        loss = -sum(picked[b, m].log_softmax(-1)[targets[b, m]] for b, m in predicted) / len(predicted)
        check('logits and loss at some positions = those of all positions', name,
              list(model(idx, targets, where=where)), [picked, loss])


# ---------------------------------------------------------------------------------------------------------- the report

def print_checks(show_all):
    """One line per check with its worst case, then failed cases or all -> number of checks, number failed."""
    checks, failed = {}, 0
    for case in CASES:
        checks.setdefault(case.check, []).append(case)
    for text, cases in checks.items():
        worst = max(cases, key=lambda case: case.ratio)
        if not worst.error:
            print(f'  {text}')  # a note
            continue
        failed += worst.ratio > 1
        verdict = 'FAIL' if worst.ratio > 1 else 'PASS'
        print(f'  {text:75s} {len(cases):6d} {worst.error:>9s} {worst.limit:>9s}  {verdict}')
        bad = [case for case in cases if case.ratio > 1]
        for case in cases if show_all else bad[:5]:
            print(f'      {("failed: " if case in bad else "") + case.name[:70]:78s} {case.error:>9s} {case.limit:>9s}')
    return sum(bool(cases[0].error) for cases in checks.values()), failed


def main():
    parser = argparse.ArgumentParser(description='What equals what in this project, checked. Exit 1 if a check fails.')
    parser.add_argument('models', nargs='*', metavar='MODEL', help=f'only the checks of these: {", ".join(FILES)}')
    parser.add_argument('--all', action='store_true', help='print every case')
    parser.add_argument('--first', action='store_true', help='stop after the first failure')
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in FILES]
    if unknown:
        print(f'test_equivalence.py: no model {unknown[0]!r}; choose from {", ".join(FILES)}', file=sys.stderr)
        return 2
    CHOSEN[:] = arguments.models or FILES
    torch.set_num_threads(1)  # many tiny tensors
    current = checks = cases = failed = 0
    for test in [value for name, value in globals().items() if name.startswith('test_')]:
        if test.models and not set(test.models) & set(CHOSEN):
            continue
        with contextlib.suppress(AssertionError):  # CASES holds what failed
            test()
        if test.section != current:
            current = test.section
            print(f'\n\n{current}  {SECTIONS[current]}')
            print('-' * 77, ' cases     error     limit')
        print(f'\n{test.__doc__}')
        new_checks, new_failed = print_checks(arguments.all)
        checks, cases, failed = checks + new_checks, cases + len(CASES), failed + new_failed
        sys.stdout.flush()
        if failed and arguments.first:
            break
    print(f'\n{checks} checks, {cases:,} cases, {failed} checks failed')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
