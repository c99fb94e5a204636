"""
What equals what: every identity this project rests on, checked forward and backward.

    python test_equivalence.py            # a table: what equals what, largest difference, tolerance; exit 1 if one fails
    python test_equivalence.py conv       # those about model_conv.py alone; --first: ends at the first failure
    python -m pytest test_equivalence.py  # the same as tests

The left side of each row is the code of a model file, the right side is written here, with explicit loops or explicit
matrices, and never calls what it checks. Exact claims are in float64.
"""
import inspect
import math
import sys

import torch
import torch.nn.functional as F

import model_composite as composite
import model_conv as conv
import model_kernelized as kernelized
import model_nope as nope

ROWS = []  # (claim, difference, tolerance): what the script prints


def check(claim, ours, reference, tolerance=1e-12, least=1e-30):
    """Record and assert that two tensors, or lists of tensors, agree to `tolerance` of the reference's largest entry (or of `least`)."""
    pairs = list(zip(*[x if isinstance(x, (list, tuple)) else [x] for x in (ours, reference)], strict=True))
    assert all(a.shape == b.shape and a.isfinite().all() and b.isfinite().all() for a, b in pairs), f'{claim}: shapes differ or not finite'
    difference = max(((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=least)).item() for a, b in pairs)
    ROWS.append((claim, difference, tolerance))
    assert difference <= tolerance, f'{claim}: {difference:.1e} > {tolerance:.1e}'


def check_apart(claim, a, b, least=1e-3):
    """Record and assert that two tensors differ by at least `least`: a control, or a test of equality would mean nothing."""
    difference = (a - b).abs().max().item()
    ROWS.append((claim, difference, f'>{least:.0e}'))
    assert difference >= least, f'{claim}: {difference:.1e} < {least:.0e}'


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))).mul_(scale).requires_grad_()


def with_gradients(f, inputs):
    """[value, gradient of every input] under a fixed random cotangent."""
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, random(*y.shape, seed=99).detach().to(y))]


def make(module, seed=0, **fields):
    """A float64 model whose every parameter is random, so that no term of it is zero, and tokens for it."""
    torch.manual_seed(seed)
    config = module.Config(**{**dict(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16), **fields})
    model = module.Model(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model, torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(seed))


def schemes(**fields):
    """(name, model, tokens) of every scheme with relative positions or none."""
    yield 'nope', *make(nope, **fields)
    yield 'composite', *make(composite, kernel_size=5, dynamic_key=True, **fields)
    yield 'composite, far + near', *make(composite, kernel_size=5, attention='fast', **fields)
    yield 'conv', *make(conv, kernel_size=5, queries_keys=True, values=True, output=True, bias=True, **fields)
    yield 'conv, outside the scores', *make(conv, kernel_size=5, lightweight=False, dynamic=False, values=True, **fields)
    yield 'conv, dynamic convolution alone', *make(conv, kernel_size=5, mixer='dynamic', queries_keys=True, output=True, **fields)
    yield 'kernelized', *make(kernelized, max_distance=4, n_features=8, **fields)
    yield 'kernelized, chunked', *make(kernelized, max_distance=3, n_features=8, attention='chunked', feature_map='orf', **fields)
    yield 'kernelized, plain random features', *make(kernelized, normalize=False, rpe=False, n_features=8, **fields)
    yield 'conv, lightweight convolution alone', *make(conv, kernel_size=5, mixer='lightweight', output=False, **fields)


# ---------------------------------------------------------------------------------------------------------------------
# relative positions are convolutions (Chang et al., section 3)

B, H, T, D, K = 2, 3, 11, 4, 2  # an odd length, and more tokens than a kernel is wide
WIDTH = 2 * K + 1


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


def clip(offset):
    return max(-K, min(K, offset)) + K


def test_shaw_is_a_dynamic_convolution():
    """Equation 5: Shaw's embedding of the offset added to the key = a kernel made by the query, laid along the keys."""
    for causal in (True, False):
        q, k, v, w = inputs = random(B, H, T, D), random(B, H, T, D, seed=1), random(B, H, T, D, seed=2), random(WIDTH, D)
        shaw = lambda q, k, v, w: softmax_loops(lambda b, h, i, j: q[b, h, i] @ (k[b, h, j] + w[clip(j - i)]) / math.sqrt(D), v, causal)
        ours = lambda q, k, v, w: composite.attend_dense(q, k, v, q @ w.T / math.sqrt(D), causal)
        check(f'Shaw embeddings = query-made convolution in the scores, {"causal" if causal else "both sides"}',
              with_gradients(ours, inputs), with_gradients(shaw, inputs))


def test_t5_is_a_fixed_convolution():
    """Equation 4: T5's bias as an explicit Toeplitz matrix per head = the fixed kernel."""
    for causal in (True, False):
        inputs = random(B, H, T, D), random(B, H, T, D, seed=1), random(B, H, T, D, seed=2), random(H, WIDTH)

        def t5(q, k, v, beta):
            toeplitz = torch.stack([torch.stack([torch.stack([beta[h, clip(j - i)] for j in range(T)]) for i in range(T)]) for h in range(H)])
            scores = torch.einsum('bhid,bhjd->bhij', q, k) / math.sqrt(D) + toeplitz  # (B, nh, T, T)
            return softmax_loops(lambda b, h, i, j: scores[b, h, i, j], v, causal)
        ours = lambda q, k, v, beta: composite.attend_dense(q, k, v, beta[None, :, None].expand(1, H, T, WIDTH), causal)
        check(f'T5 bias as a Toeplitz matrix = fixed kernel, {"causal" if causal else "both sides"}',
              with_gradients(ours, inputs), with_gradients(t5, inputs))


def test_kernel_alone_is_a_convolution():
    """Without content, exp(fixed kernel) over a zero-padded window is a convolution: its weights are normalised by the window's sum."""
    beta = random(H, WIDTH)
    v = random(B, H, T, D)
    window = torch.full((1, H, T, WIDTH), -1e9, dtype=torch.float64)  # shut both ends: they stand for all farther tokens
    window[..., 1:-1] = beta[:, None, 1:-1].detach()
    q = torch.zeros(B, H, T, D, dtype=torch.float64)
    kernel = beta.detach().exp()[:, 1:-1]  # (H, 2K-1)
    conv = F.conv1d(v.detach().permute(0, 3, 1, 2).reshape(B * D, H, T), kernel[:, None], padding=K - 1, groups=H)  # (B hs, nh, T)
    norm = F.conv1d(torch.ones(1, H, T, dtype=torch.float64), kernel[:, None], padding=K - 1, groups=H)
    reference = (conv / norm).view(B, D, H, T).permute(0, 2, 3, 1)
    check('attention with a fixed kernel alone = lightweight conv1d', composite.attend_dense(q, q, v.detach(), window, causal=False), reference)


def test_composite_layer_is_equation_6():
    """The whole Attention module, all four terms, against equation 6 as loops over its own parameters."""
    for causal in (True, False):
        for terms in (dict(), dict(dynamic_key=True), dict(content=False), dict(dynamic=False), dict(fixed=False, content=False, dynamic_key=True)):
            model, _ = make(composite, causal=causal, kernel_size=WIDTH, n_layer=1, n_head=H, n_embd=H * D, **terms)
            att = model.h[0].attn
            x = random(B, T, H * D)

            def loops(x):
                q, k, v = (F.linear(x, w).view(B, T, H, D).transpose(1, 2) for w in att.c_attn.weight.split(H * D))

                def score(b, h, i, j):
                    a = 0 * q[b, h, i, 0]
                    if att.content:
                        a = a + q[b, h, i] @ k[b, h, j] / math.sqrt(D)
                    if att.dynamic is not None:
                        a = a + q[b, h, i] @ att.dynamic[clip(j - i)] / math.sqrt(D)
                    if att.dynamic_key is not None:
                        a = a + k[b, h, j] @ att.dynamic_key[clip(i - j)] / math.sqrt(D)
                    return a if att.fixed is None else a + att.fixed[h, clip(j - i)]
                y = softmax_loops(score, v, causal).transpose(1, 2).reshape(B, T, H * D)
                return F.linear(y, att.c_proj.weight)
            inputs = [x, *att.parameters()]
            name = ', '.join(f'{k}={v}' for k, v in terms.items()) or 'the defaults'
            check(f'composite attention = equation 6 as loops, {"causal" if causal else "both sides"}: {name}',
                  with_gradients(lambda x, *_: att(x), inputs), with_gradients(lambda x, *_: loops(x), inputs), 1e-11)


def test_zero_kernels_are_plain_attention():
    for causal in (True, False):
        inputs = random(B, H, T, D), random(B, H, T, D, seed=1), random(B, H, T, D, seed=2)
        zero = torch.zeros(1, H, T, WIDTH, dtype=torch.float64)
        check(f'composite attention with zero kernels = scaled_dot_product_attention, {"causal" if causal else "both sides"}',
              with_gradients(lambda q, k, v: composite.attend_dense(q, k, v, zero, causal), inputs),
              with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), inputs))


def test_spread_is_a_clipped_index():
    """The skew that lays kernels along the diagonals, at every combination of lengths, against the index itself."""
    for k in (0, 1, 3, 9):
        for queries in (1, 2, 7):
            for keys in (queries, queries + 1, queries + 6):
                for rows, past, n in ((queries, keys - queries, keys), (keys, queries - keys, queries)):  # made by queries, by keys
                    kernel = random(2, rows, 2 * k + 1)
                    index = [[max(-k, min(k, j - past - i)) + k for j in range(n)] for i in range(rows)]
                    explicit = lambda kernel: torch.stack([kernel[:, i, index[i]] for i in range(rows)], 1)
                    check('kernels spread by skewing = clipped index, all lengths', with_gradients(lambda kernel: composite.along_diagonals(kernel, past, n), [kernel]),
                          with_gradients(explicit, [kernel]))


def test_extreme_biases():
    """Hundreds of nats either way: nothing overflows, no digit is lost."""
    for size in (300.0, -300.0):
        inputs = random(1, 1, T, D), random(1, 1, T, D, seed=1), random(1, 1, T, D, seed=2), random(1, 1, T, WIDTH, scale=size)
        check(f'composite attention = loops with biases of {size:+.0f} nats',
              with_gradients(lambda q, k, v, t: composite.attend_dense(q, k, v, t), inputs),
              with_gradients(lambda q, k, v, t: softmax_loops(lambda b, h, i, j: q[b, h, i] @ k[b, h, j] / math.sqrt(D) + t[b, h, i, clip(j - i)], v, True), inputs),
              1e-11, least=1)  # saturated: most gradients vanish


def test_far_and_near_are_the_dense_form():
    """attend_fast against loops over single queries, and against attend_dense at more lengths than loops can take."""
    for causal in (True, False):
        side = 'causal' if causal else 'both sides'
        for size in (1.0, 300.0, -300.0):
            inputs = random(B, H, T, D), random(B, H, T, D, seed=1), random(B, H, T, D, seed=2), random(B, H, T, WIDTH, scale=size)
            check(f'far + near = loops, {side}, {"biases of hundreds of nats" if size != 1 else "biases of a nat"}',
                  with_gradients(lambda q, k, v, t: composite.attend_fast(q, k, v, t, causal), inputs),
                  with_gradients(lambda q, k, v, t: softmax_loops(lambda b, h, i, j: q[b, h, i] @ k[b, h, j] / math.sqrt(D) + t[b, h, i, clip(j - i)], v, causal), inputs),
                  1e-11, least=1)
        for n in (1, 2, 8, 9, 10, 17, 67, 301):
            for k in (0, 1, 2, 8):
                for heads in (1, B):  # one table for the whole batch, or one each
                    inputs = random(B, H, n, D), random(B, H, n, D, seed=1), random(B, H, n, D, seed=2), random(heads, H, n, 2 * k + 1, scale=3)
                    for module in (composite, conv):
                        check(f'far + near = dense, {side}, 1 to 301 tokens, kernels of 1 to 17', with_gradients(lambda q, k, v, t: module.attend_fast(q, k, v, t, causal), inputs),
                              with_gradients(lambda q, k, v, t: composite.attend_dense(q, k, v, t, causal), inputs), 1e-11, least=1)
        across = [random(B, H, D, 20, seed=s).transpose(2, 3) for s in (0, 1, 2)]  # channels not side by side
        check(f'far + near = dense, {side}, inputs of any layout', composite.attend_fast(*across, random(1, H, 20, WIDTH), causal), composite.attend_dense(*across, random(1, H, 20, WIDTH), causal))
        slope = torch.linspace(-500, 500, WIDTH, dtype=torch.float64).expand(1, H, T, WIDTH)
        for sign in (1, -1):  # all the weight on one end or the other
            inputs = random(B, H, T, D), random(B, H, T, D, seed=1), random(B, H, T, D, seed=2), (sign * slope).clone().requires_grad_()
            check(f'far + near = dense, {side}, biases from -500 to +500 nats', with_gradients(lambda q, k, v, t: composite.attend_fast(q, k, v, t, causal), inputs),
                  with_gradients(lambda q, k, v, t: composite.attend_dense(q, k, v, t, causal), inputs), 1e-11, least=1)


def test_far_and_near_in_low_precision():
    """float32 and bfloat16: far + near is not much farther from float64 than the dense form is."""
    for causal in (True, False):
        for dtype, unit in ((torch.float32, 6e-8), (torch.bfloat16, 4e-3)):
            exact = [random(2, 2, 200, 16, seed=i).detach().to(dtype).double() for i in range(3)] + [random(2, 2, 200, 17, scale=3).detach().float().double()]
            ours, dense, reference = (with_gradients(lambda q, k, v, t: f(q, k, v, t, causal).double(), [x.to(d).requires_grad_() for x, d in zip(exact, dtypes)])
                                      for f, dtypes in ((composite.attend_fast, [dtype] * 3 + [torch.float32]), (composite.attend_dense, [dtype] * 3 + [torch.float32]),
                                                        (composite.attend_dense, [torch.float64] * 4)))
            for name, a, b, c in zip(('value', 'dq', 'dk', 'dv', 'dtable'), ours, dense, reference):
                limit = 2 * ((b - c).abs().max() / c.abs().max()).item() + 16 * unit
                check(f'far + near in {str(dtype)[6:]} is as exact as dense, {"causal" if causal else "both sides"}: {name}', a, c, limit)


def test_fast_and_dense_models_agree():
    """Whole models: attention='fast', 'auto' at a length where it takes the fast form, and 'dense'."""
    for causal in (True, False):
        for module in (composite, conv):
            model, _ = make(module, causal=causal, kernel_size=WIDTH, block_size=260)
            idx = torch.randint(50, (2, 260), generator=torch.Generator().manual_seed(1))
            outs = []
            for form in ('dense', 'fast', 'auto'):
                for block in model.h:
                    block.attn.attention = form
                logits, loss = model(idx, idx.roll(-1, 1))
                outs.append([logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
            for form, out in zip(('fast', 'auto'), outs[1:]):
                check(f'{module.__name__}, attention={form!r} = dense, {"causal" if causal else "both sides"}', out, outs[0], 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# convolutions before, inside, behind and instead of the softmax (model_conv.py)

def banded(w, T, causal):
    """The (T, T) Toeplitz matrix of a kernel w (K,): entry (i, j) is the weight of offset j - i."""
    first = -(len(w) - 1) if causal else -(len(w) // 2)
    zero = 0 * w[0]
    return torch.stack([torch.stack([w[j - i - first] if 0 <= j - i - first < len(w) else zero for j in range(T)]) for i in range(T)])


def test_convolutions_are_banded_toeplitz_matrices():
    """Equations 2 and 3, and the dynamic convolution: each is a banded matrix times x, one per channel, head, or head and token."""
    for causal in (True, False):
        side = 'causal' if causal else 'both sides'
        for T, WIDTH in ((1, 5), (3, 5), (11, 5), (11, 1), (11, 17)):
            x, w = random(B, T, D), random(D, WIDTH)
            explicit = lambda x, w: torch.stack([x[:, :, c] @ banded(w[c], T, causal).T for c in range(D)], 2)
            check(f'depthwise convolution = banded Toeplitz matrix per channel, {side}',
                  with_gradients(lambda x, w: conv.depthwise_conv(x, w, causal), [x, w]), with_gradients(explicit, [x, w]))
            x, w = random(B, H, T, D), random(H, WIDTH)
            explicit = lambda x, w: torch.stack([banded(w[h], T, causal) @ x[:, h] for h in range(H)], 1)
            check(f'lightweight convolution = banded Toeplitz matrix per head, {side}',
                  with_gradients(lambda x, w: conv.lightweight_conv(x, w, causal), [x, w]), with_gradients(explicit, [x, w]))
            x, w = random(B, H, T, D), random(B, H, T, WIDTH)
            explicit = lambda x, w: torch.stack([torch.stack([torch.stack([banded(w[b, h, i], T, causal)[i] @ x[b, h] for i in range(T)])
                                                              for h in range(H)]) for b in range(B)])
            check(f'dynamic convolution = a banded row per token, {side}',
                  with_gradients(lambda x, w: conv.dynamic_conv(x, w, causal), [x, w]), with_gradients(explicit, [x, w]))


def test_convolution_layer_is_its_equations():
    """The whole Attention module of model_conv.py, each injection point, against explicit matrices made of its own parameters."""
    makes = {'queries_keys': ('conv_q', 'conv_k'), 'values': ('conv_v',), 'output': ('conv_out',), 'lightweight': ('lightweight',), 'dynamic': ('dynamic',)}
    off = dict.fromkeys(makes, False)
    for causal in (True, False):
        for points in (('lightweight',), ('dynamic',), ('queries_keys',), ('values',), ('output',), tuple(makes), ('mixer lightweight',), ('mixer lightweight', 'output'),
                       ('mixer dynamic', 'queries_keys', 'values')):
            mixer = points[0].split()[1] if points[0].startswith('mixer') else 'attention'
            fields = {**off, **{p: True for p in points if p in makes}, 'mixer': mixer}
            heads, bias = 3, 'values' in points  # the first of three heads is convolved
            model, _ = make(conv, causal=causal, kernel_size=WIDTH, n_layer=1, n_head=heads, n_embd=heads * D, bias=bias, **fields)
            att, x = model.h[0].attn, random(B, T, heads * D)
            p = dict(att.named_parameters())
            expected = {name for point in points for name in makes.get(point, ())} | ({mixer} if mixer != 'attention' else set())
            if mixer == 'dynamic':
                expected -= {'conv_k'}  # nobody reads keys
            assert {n for n in p if not n.startswith('c_')} == expected, f'{points}: the parameters are {set(p)}'

            def explicit(x):
                depthwise = lambda x, w: torch.stack([x[:, :, c] @ banded(w[c], T, causal).T for c in range(w.size(0))], 2)
                biases = p['c_attn.bias'].split(heads * D) if bias else (0, 0, 0)
                qkv = []
                for weight, b, name in zip(p['c_attn.weight'].split(heads * D), biases, ('conv_q', 'conv_k', 'conv_v')):
                    plain = x @ weight.T + b
                    if name in expected:
                        plain = torch.cat(((depthwise(x, p[name]) @ weight.T + b)[..., :D], plain[..., D:]), 2)
                    qkv.append(plain.view(B, T, heads, D).transpose(1, 2))
                q, k, v = qkv
                if mixer == 'attention':
                    def score(b, h, i, j):
                        a = q[b, h, i] @ k[b, h, j] / math.sqrt(D)
                        if 'dynamic' in points:
                            a = a + q[b, h, i] @ p['dynamic'][clip(j - i)] / math.sqrt(D)
                        return a + p['lightweight'][h, clip(j - i)] if 'lightweight' in points else a
                    y = softmax_loops(score, v, causal)
                else:  # one row of a banded matrix per token; its weights sum to one over the kernel's width
                    kernel = lambda b, h, i: (p['lightweight'][h] if mixer == 'lightweight' else p['dynamic'] @ q[b, h, i]).softmax(0)
                    y = torch.stack([torch.stack([torch.stack([banded(kernel(b, h, i), T, causal)[i] @ v[b, h] for i in range(T)])
                                                  for h in range(heads)]) for b in range(B)])
                y = y.transpose(1, 2).reshape(B, T, heads * D)
                if 'output' in points:
                    y = y + depthwise(v.transpose(1, 2).reshape(B, T, heads * D), p['conv_out'])
                return y @ p['c_proj.weight'].T + (p['c_proj.bias'] if bias else 0)
            inputs = [x, *p.values()]
            gradients = lambda f: [f(x).detach(), *torch.autograd.grad(f(x), inputs, random(B, T, heads * D, seed=99).detach(), materialize_grads=True)]
            check(f'convolutional layer = explicit matrices, {"causal" if causal else "both sides"}: {", ".join(points)}', gradients(att), gradients(explicit), 1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# kernelized attention with relative positions (Luo et al.)

def test_toeplitz_is_circulant_fft():
    for n in (1, 2, 5, 16, 31):
        c, x = random(3, 2 * n - 1), random(2, 3, n)  # asymmetric
        explicit = lambda c, x: torch.stack([sum(c[:, j - i + n - 1] * x[:, :, j] for j in range(n)) for i in range(n)], -1)
        check('Toeplitz matrix times vector = circulant FFT', with_gradients(kernelized.toeplitz_fft, [c, x]), with_gradients(explicit, [c, x]), 1e-11, least=1)


def equation_10(q, k, v, b, causal, valid=None):
    """Kernelized attention with relative positions, one query at a time -> (B, nh, T, hs)."""
    R, rows = b.size(1) // 2, []
    for i in range(q.size(2)):
        weights = []
        for j in range(k.size(2)):
            seen = (j <= i or not causal) * (torch.ones(q.size(0)) if valid is None or i == j else valid[:, j])  # (B,)
            weights.append((q[:, :, i] * k[:, :, j]).sum(-1) * b[:, max(-R, min(R, j - i)) + R].exp() * seen[:, None])
        a = torch.stack(weights, -1)  # (B, nh, T)
        rows.append(torch.einsum('bhj,bhjd->bhd', a / a.sum(-1, keepdim=True), v))
    return torch.stack(rows, 2)


def kernelized_inputs(n, R, seed=0, m=6):
    positive = lambda seed: random(B, H, n, m, seed=seed).detach().exp().requires_grad_()
    return positive(seed), positive(seed + 1), random(B, H, n, D, seed=seed + 2), random(H, 2 * R + 1, seed=seed)


def test_dense_fft_and_chunked_are_equation_10():
    """Three forms against loops over single queries: every length against every reach of b and every chunk, padded or not."""
    for causal in (True, False):
        side = 'causal' if causal else 'both sides'
        for n, R in ((1, 0), (1, 3), (9, 0), (9, 1), (9, 4), (9, 8), (9, 20), (23, 0), (23, 1), (23, 3), (23, 4), (23, 5), (23, 22), (23, 40)):
            for valid in (None, torch.rand(B, n, generator=torch.Generator().manual_seed(n)) > 0.4):
                inputs, padded = kernelized_inputs(n, R), 'padded' if valid is not None else 'no padding'
                reference = with_gradients(lambda *x: equation_10(*x, causal, valid), inputs)
                check(f'kernelized, dense = equation 10 as loops, {side}, {padded}', with_gradients(lambda *x: kernelized.attend_dense(*x, causal, valid), inputs), reference, 1e-11, least=1)
                check(f'kernelized, FFT = equation 10 as loops, {side}, {padded}', with_gradients(lambda *x: kernelized.attend_fft(*x, causal, valid), inputs), reference, 1e-10, least=1)
                for chunk in (1, 2, 4, 7, 23, 64):
                    check(f'kernelized, chunked = equation 10 as loops, {side}, {padded}',
                          with_gradients(lambda *x: kernelized.attend_chunked(*x, causal, valid, chunk), inputs), reference, 1e-11, least=1)


def test_running_state_is_equation_10():
    """Pieces of any size, prompts of several lengths: the state's sums and last R keys give what all keys would."""
    for R in (0, 1, 3, 30):
        for pieces in ([1] * 23, [9, 1, 1, 5, 7], [23]):
            q, k, v, b = kernelized_inputs(23, R)
            valid = torch.arange(23) >= torch.tensor([[0], [6]])  # the second is padded on the left
            state = {}
            y = torch.cat([kernelized.attend_recurrent(*part, b, ok, state) for *part, ok in zip(*(x.split(pieces, 2) for x in (q, k, v)), valid.split(pieces, 1))], 2)
            reference = equation_10(q, k, v, b, True, valid)
            check('kernelized, running state = equation 10 as loops', [y[0], y[1, :, 6:]], [reference[0], reference[1, :, 6:]])
            assert state['k'].size(2) == min(R, 23) and state['kv'].shape == (B, H, 6, D), 'the state grows with the text'


def test_kernelized_layer_is_its_equations():
    """The whole Attention module, each feature map, with and without normalisation and b, from its own parameters."""
    for causal in (True, False):
        for fields in (dict(), dict(normalize=False), dict(rpe=False), dict(normalize=False, rpe=False), dict(feature_map='trf'), dict(feature_map='trf', normalize=False, n_features=200),
                       dict(feature_map='orf'), dict(feature_map='sphere'), dict(feature_map='elu', normalize=False)):
            model, _ = make(kernelized, causal=causal, n_layer=1, n_head=H, n_embd=H * D, **{**dict(max_distance=3, n_features=8), **fields})
            att, x, m = model.h[0].attn, random(B, T, H * D), model.config.n_features

            def phi(x):
                x = x / x.norm(dim=-1, keepdim=True) if att.normalize else x / D ** 0.25
                if model.config.feature_map == 'elu':
                    return torch.where(x > 0, x + 1, x.exp())
                if model.config.feature_map == 'trf':
                    scale = (x.pow(2).sum(-1, keepdim=True) / 2).exp() / m ** 0.5
                    return torch.cat([scale * torch.sin(x @ att.w.T), scale * torch.cos(x @ att.w.T)], -1)
                return torch.stack([torch.exp(x @ w - x.pow(2).sum(-1) / 2) / m ** 0.5 for w in att.w], -1)

            def explicit(x):
                q, k, v = (F.linear(x, w).view(B, T, H, D).transpose(1, 2) for w in att.c_attn.weight.split(H * D))
                y = equation_10(phi(q), phi(k), v, torch.zeros(H, 1, dtype=torch.float64) if att.b is None else att.b, causal)
                return F.linear(y.transpose(1, 2).reshape(B, T, H * D), att.c_proj.weight)
            inputs = [x, *att.parameters()]
            check(f'kernelized attention = its equations, {"causal" if causal else "both sides"}: {", ".join(f"{k}={v}" for k, v in fields.items()) or "the defaults"}',
                  with_gradients(lambda x, *_: att(x), inputs), with_gradients(lambda x, *_: explicit(x), inputs), 1e-9)


def test_positive_random_features():
    """Lemma 2: unbiased, with variance (exp(|x+y|^2) - 1) exp(2 x.y) / m. Theorem 3's direction: larger norms, larger error; more features, smaller."""
    x, y = F.normalize(random(D, seed=1).detach(), dim=0) * 0.6, F.normalize(random(D, seed=2).detach(), dim=0) * 0.8
    torch.manual_seed(0)
    m, draws = 16, 60000
    w = kernelized.random_matrix(m * draws, D).double()
    product = lambda kind: (kernelized.features(x, w, kind) * kernelized.features(y, w, kind)) * m * draws  # one feature each, not averaged
    estimates = product('prf').view(draws, m).mean(1)
    check('positive random features are unbiased (60,000 draws)', estimates.mean(), (x @ y).exp(), 0.01)
    variance = ((x + y).square().sum().exp() - 1) * (2 * x @ y).exp() / m
    check('their variance is that of Lemma 2', estimates.var(), variance, 0.05)
    check('trigonometric features are unbiased', product('trf').view(2, draws * m).sum(0).mean(), (x @ y).exp(), 0.01)
    check('features for queries differ by one factor per token', kernelized.features(x, w[:8], 'prf', stable=True) / kernelized.features(x, w[:8]),
          (-(x @ w[:8].T).max() + x.square().sum() / 2).exp().expand(8))
    w = kernelized.random_matrix(3 * D, D, 'orf').view(3, D, D).double()
    for sign in (1, -1):
        one = torch.full((D,), D ** -0.5, dtype=torch.float64)
        draws = torch.stack([kernelized.features(one, blocks) * kernelized.features(sign * one, blocks) * D for blocks in kernelized.random_matrix(20000 * D, D, 'orf').double().split(D)])
        check('orthogonal random features are unbiased (20,000 draws)', draws.mean(), torch.tensor(sign, dtype=torch.float64).exp(), 0.06)
    check('orthogonal features: the rows of a block are', w @ w.transpose(1, 2), torch.diag_embed(w.square().sum(-1)), 1e-5)
    check('features on a sphere have one length', kernelized.random_matrix(20, D, 'sphere').norm(dim=1), torch.full((20,), D ** 0.5), 1e-5)

    def error(size, m):
        """Mean L1 distance of one row of attention over 64 keys from the softmax."""
        q, k = (F.normalize(random(64, 32, seed=s).detach(), dim=1) * size for s in (3, 4))
        a = [kernelized.features(q, w) @ kernelized.features(k, w).T for w in kernelized.random_matrix(50 * m, 32).double().split(m)]
        exact = (q @ k.T).softmax(1)
        return sum((p / p.sum(1, keepdim=True) - exact).abs().sum(1).mean() for p in a) / 50
    check_apart('Theorem 3: error at norm 2 less that at norm 1', error(2, 64), error(1, 64), 0.2)
    check_apart('Theorem 3: error of 16 features less that of 256', error(1, 16), error(1, 256), 0.2)
    assert error(2, 64) > error(1, 64) and error(1, 16) > error(1, 256)


def test_many_features_are_softmax_attention():
    """With many features, kernelized attention with b is softmax attention of the normalised queries and keys with T5's bias b."""
    torch.manual_seed(0)
    w = kernelized.random_matrix(2 ** 16, D)
    q, k = (F.normalize(random(B, H, T, D, seed=s).detach(), dim=-1) for s in (0, 1))
    v, b = random(B, H, T, D, seed=2).detach(), random(H, WIDTH).detach()
    exact = softmax_loops(lambda n, h, i, j: q[n, h, i] @ k[n, h, j] + b[h, clip(j - i)], v, True)
    check('kernelized attention with 65,536 features = softmax with the same b', kernelized.attend_dense(kernelized.features(q, w), kernelized.features(k, w), v, b), exact, 0.02)


def test_kernelized_extremes():
    """float32, b from -100 to +100 nats either way, vanishing vectors, one token, one valid key: finite, and equal to float64 loops."""
    n, w = 23, random(8, D, seed=5).detach().float()
    for causal in (True, False):
        side = 'causal' if causal else 'both sides'
        for R in (3, 30):
            for slope in (1, -1):
                b = (slope * torch.linspace(-100, 100, 2 * R + 1)).expand(H, -1)
                for valid in (None, torch.arange(n).expand(B, n) == 4):
                    q, k = (kernelized.features(F.normalize(random(B, H, n, D, seed=s).detach().float(), dim=-1), w) for s in (0, 1))
                    q[:, :, 5], k[:, :, 6] = kernelized.features(torch.zeros(D), w), kernelized.features(torch.zeros(D), w)
                    inputs = [x.clone().requires_grad_() for x in (q, k, random(B, H, n, D, seed=2).detach().float(), b)]
                    reference = with_gradients(lambda *x: equation_10(*x, causal, valid), [x.detach().double().requires_grad_() for x in inputs])
                    for name, form in (('dense', kernelized.attend_dense), ('chunked', lambda *x: kernelized.attend_chunked(*x, chunk=4))):
                        check(f'kernelized, {name}, float32, b from -100 to 100 nats = float64 loops, {side}', with_gradients(lambda *x: form(*x, causal, valid), inputs), reference, 2e-4, least=1)
                    values = with_gradients(lambda *x: kernelized.attend_fft(*x, causal, valid), inputs)
                    assert all(x.isfinite().all() for x in values), 'attend_fft is not finite'
                    if causal and valid is None:
                        state = {}
                        y = torch.cat([kernelized.attend_recurrent(*(x[:, :, i:i + 1] for x in inputs[:3]), inputs[3], torch.ones(B, 1, dtype=torch.bool), state) for i in range(n)], 2)
                        check('kernelized, running state, float32, b from -100 to 100 nats = float64 loops', y, reference[0], 2e-4, least=1)
    for normalize in (True, False):  # inputs of any size through the whole module
        model, _ = make(kernelized, n_layer=1, normalize=normalize, max_distance=3)
        for size in (0.0, 1e-8, *range(1, 26), 1000.0):
            for n in (1, 9):
                y = model.float().h[0].attn(size * torch.randn(2, n, 16, generator=torch.Generator().manual_seed(0)))
                assert y.isfinite().all(), f'normalize={normalize}, input of size {size}: not finite'
                assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(model.h[0].attn.parameters()))), f'gradient, normalize={normalize}, size {size}'


def test_running_state_in_low_precision():
    """bfloat16 autocast over a long text: the running sums stay float32, and what is decoded stays near the parallel form."""
    for dtype in (torch.float32, torch.bfloat16):  # autocast, and a model that is bfloat16 itself
        model, _ = make(kernelized, max_distance=4, n_layer=1, n_features=8)
        model, idx = model.to(dtype), torch.randint(50, (1, 700), generator=torch.Generator().manual_seed(0))
        state = model.new_state()
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.float32):
            whole = model(idx)[0].float()  # 700 tokens: the chunked form
            parts = torch.cat([model(idx[:, i:i + 1], state=state)[0] for i in range(700)], 1).float()
        check(f'kernelized, {"autocast" if dtype == torch.float32 else "bfloat16 model"}: 700 tokens from a state = all at once', parts, whole, 0.05)
        assert state[0]['kv'].dtype == state[0]['k_sum'].dtype == torch.float32


def test_forms_of_the_kernelized_model_agree():
    """Whole models at a length where auto takes the chunked form: auto = dense = FFT."""
    for causal in (True, False):
        model, _ = make(kernelized, causal=causal, max_distance=5)
        idx = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(1))
        outs = []
        for form in ('dense', 'fft', 'chunked', 'auto'):
            for block in model.h:
                block.attn.attention = form
            logits, loss = model(idx, idx.roll(-1, 1))
            outs.append([logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        for form, out in zip(('fft', 'chunked', 'auto'), outs[1:]):
            check(f'model_kernelized, attention={form!r} = dense, {"causal" if causal else "both sides"}', out, outs[0], 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# no positions (Chi et al.)

def test_uniform_causal_attention_has_variance_1_over_m():
    """Zero queries make attention uniform: the output at token m is the mean of m values, of variance 1/m."""
    T, samples = 32, 4000
    v = torch.randn(samples, 1, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, _ = make(nope, n_layer=1, n_head=1, n_embd=8)
    att = model.h[0].attn
    with torch.no_grad():
        att.c_attn.weight.zero_()
        att.c_attn.weight[16:] = torch.eye(8)  # q = k = 0, v = x
        att.c_proj.weight.copy_(torch.eye(8))
        y = att(v[:, 0])
    m = torch.arange(1, T + 1, dtype=torch.float64)
    check('uniform causal attention = running mean', y, v[:, 0].cumsum(1) / m[:, None])
    check('its variance at token m = 1/m (32,000 samples)', y.var(dim=(0, 2)) * m, torch.ones(T, dtype=torch.float64), 0.05)


def test_nope_is_plain_attention():
    """The Attention module of model_nope.py, with and without padding, against softmax attention as loops."""
    for causal in (True, False):
        model, _ = make(nope, causal=causal, n_layer=1, n_head=H, n_embd=H * D)
        att, x = model.h[0].attn, random(B, T, H * D)

        def loops(x):
            q, k, v = (F.linear(x, w).view(x.size(0), -1, H, D).transpose(1, 2) for w in att.c_attn.weight.split(H * D))
            y = softmax_loops(lambda b, h, i, j: q[b, h, i] @ k[b, h, j] / math.sqrt(D), v, causal)
            return F.linear(y.transpose(1, 2).reshape(x.shape), att.c_proj.weight)
        valid = (torch.arange(T) < 8).expand(B, T)
        side = 'causal' if causal else 'both sides'
        check(f'attention without positions = softmax attention as loops, {side}',
              with_gradients(lambda x, *_: att(x), [x, *att.parameters()]), with_gradients(lambda x, *_: loops(x), [x, *att.parameters()]))
        check(f'attention without positions = loops over the real tokens, {side}', att(x, valid)[:, :8], loops(x[:, :8]))


def test_permutation():
    """Without the causal mask the tokens are a bag; the mask alone tells their order."""
    order = torch.randperm(21, generator=torch.Generator().manual_seed(3))
    model, idx = make(nope, causal=False)
    check('NoPE without the causal mask: permuted tokens = permuted logits', model(idx[:, order])[0], model(idx)[0][:, order])
    model, idx = make(nope, causal=True)
    check_apart('NoPE with the causal mask: they differ', model(idx[:, order])[0], model(idx)[0][:, order])
    for fields in (dict(), dict(absolute=True)):
        model, idx = make(composite if not fields else nope, causal=False, **fields)
        check_apart(f'{"absolute positions" if fields else "composite attention"} without the causal mask: they differ',
                    model(idx[:, order])[0], model(idx)[0][:, order])


# ---------------------------------------------------------------------------------------------------------------------
# every model: the future, padding, shifts, decoding, the loss

def test_later_tokens_change_nothing_before_them():
    for name, model, idx in (*schemes(), ('absolute', *make(nope, absolute=True))):
        other = idx.clone()
        other[:, 13:] = (other[:, 13:] + 1) % 50
        check(f'{name}: logits before a changed token are unchanged', model(other)[0][:, :13], model(idx)[0][:, :13], 0)
        check_apart(f'{name}: and from there on they change', model(other)[0][:, 13:], model(idx)[0][:, 13:])
        leak = torch.autograd.functional.jacobian(lambda e: model.h[0](e)[0, 5].sum(), model.wte(idx[:1]))[0, 6:]
        assert leak.abs().max() == 0, f'{name}: token 5 has a gradient from later tokens'
    model, idx = make(kernelized, max_distance=4, n_features=8, attention='fft')
    other = torch.cat((idx[:, :13], (idx[:, 13:] + 1) % 50), 1)
    check('kernelized, FFT: logits before a changed token are unchanged but for its rounding', model(other)[0][:, :13], model(idx)[0][:, :13])


def test_padding_changes_nothing():
    for causal in (True, False):
        for name, model, idx in (*schemes(causal=causal), ('absolute', *make(nope, absolute=True, causal=causal))):
            short = model(idx[:, :14])[0]
            valid = torch.arange(21) < 14
            side = 'causal' if causal else 'both sides'
            check(f'{name}, {side}: padding on the right = none', model(idx, valid=valid.expand(2, -1))[0][:, :14], short)
            if name != 'absolute':
                padded = torch.cat((idx[:, 14:], idx[:, :14]), 1)
                check(f'{name}, {side}: padding on the left = none', model(padded, valid=valid.flip(0).expand(2, -1))[0][:, 7:], short)
            if not causal:
                check_apart(f'{name}, {side}: unmarked padding is seen', model(idx)[0][:, :14], short)
            targets = torch.where(valid, idx.roll(-1, 1), -1)
            by_hand = -model(idx[:, :14])[0].log_softmax(-1).gather(2, targets[:, :14, None]).mean()
            check(f'{name}, {side}: loss with padding = mean over real tokens', model(idx, targets, valid=valid.expand(2, -1))[1], by_hand)


def test_shifting_the_input_shifts_the_output():
    """Only offsets count: a text between paddings of any length gives the same logits."""
    for name, model, idx in schemes(causal=False):
        start = lambda n: (torch.cat((idx[:, :n] * 0, idx[:, :12], idx[:, :9 - n] * 0), 1), ((torch.arange(21) >= n) & (torch.arange(21) < n + 12)).expand(2, -1))
        outs = [model(tokens, valid=valid)[0][:, n:n + 12] for n in (0, 4, 9) for tokens, valid in [start(n)]]
        check(f'{name}: a text moved by 4 and 9 places gives the same logits', outs[1:], [outs[0]] * 2)
    model, idx = make(nope, absolute=True)
    check_apart('absolute positions: it does not', model(idx[:, :5])[0], model(idx[:, [0, *range(5)]])[0][:, 1:])


def test_decoding_is_the_parallel_form():
    for name, model, idx in (*schemes(), ('absolute', *make(nope, absolute=True))):
        whole = model(idx)[0]
        for steps in ([1] * 21, [8, 1, 1, 5, 6]):
            state = model.new_state()
            parts = [model(part, state=state)[0] for part in idx.split(steps, 1)]
            check(f'{name}: {"one token" if steps[0] == 1 else "pieces"} at a time from a state = all at once', torch.cat(parts, 1), whole)
        valid = torch.ones(2, 21, dtype=torch.bool)
        valid[1, :6] = False  # prompts of different lengths, padded on the left
        state = model.new_state()
        parts = [model(idx[:, :9], valid=valid[:, :9], state=state)[0], *(model(idx[:, i:i + 1], state=state)[0] for i in range(9, 21))]
        check(f'{name}: decoding behind a padded prompt = all at once', torch.cat(parts, 1)[valid], model(idx, valid=valid)[0][valid])


def test_any_length():
    """Relative schemes take texts longer than block_size; their first tokens do not notice."""
    for name, model, idx in schemes():
        long = torch.cat((idx, idx, idx), 1)  # 63 tokens, block_size 24
        check(f'{name}: beyond block_size, the beginning = the beginning alone', model(long)[0][:, :21], model(idx)[0])
        check(f'{name}: one token alone = the first of many', model(idx[:, :1])[0], model(idx)[0][:, :1])


def test_predicting_some_places_is_predicting_all():
    for name, model, idx in schemes(causal=False):
        where = torch.tensor([[1, 4, 20], [0, 2, 3]])
        targets = torch.tensor([[3, 1, 4], [1, 5, -1]])
        logits, loss = model(idx, targets, where=where)
        whole = model(idx)[0]
        picked = torch.stack([whole[b, where[b]] for b in range(2)])
        by_hand = -sum(picked[b, m].log_softmax(-1)[targets[b, m]] for b in range(2) for m in range(3) if targets[b, m] >= 0) / 5
        check(f'{name}: logits and loss at some places = those of all places', [logits, loss], [picked, by_hand])


def test_bfloat16_and_compile_on_a_gpu():
    """On a GPU: the models in bf16, eager and compiled, against float32."""
    if not torch.cuda.is_available():
        ROWS.append(('bf16 and torch.compile on a GPU', None, 'skipped: no GPU'))
        return
    for causal in (True, False):
        for name, model, _ in schemes(causal=causal, n_embd=128, block_size=256):
            model = model.float().cuda()
            idx = torch.randint(50, (4, 200), device='cuda')
            valid = torch.arange(200, device='cuda').expand(4, -1) < torch.tensor([[200], [150], [100], [7]], device='cuda')
            with torch.no_grad():
                reference = model.hidden(idx, valid)
                with torch.autocast('cuda', torch.bfloat16):
                    check(f'{name}: bf16 = float32 on a GPU', model.hidden(idx, valid)[valid], reference[valid], 0.1)
                    check(f'{name}: bf16 compiled = float32 on a GPU', torch.compile(model.hidden)(idx, valid)[valid], reference[valid], 0.1)
                plain = model.hidden(idx)
                with torch.autocast('cuda', torch.bfloat16):  # without padding, the fast forms
                    check(f'{name}: bf16 = float32 on a GPU', model.hidden(idx), plain, 0.1)
                    check(f'{name}: bf16 compiled = float32 on a GPU', torch.compile(model.hidden)(idx), plain, 0.1)
        for T, R in ((1, 3), (200, 300), (1031, 7)):
            inputs = [x.detach().float().cuda().requires_grad_() for x in kernelized_inputs(T, R)]
            dense = with_gradients(lambda *x: kernelized.attend_dense(*x, causal), inputs)
            for form in (kernelized.attend_fft, kernelized.attend_chunked):
                check(f'kernelized, {form.__name__[7:]} = dense in float32 on a GPU', with_gradients(lambda *x: form(*x, causal), inputs), dense, 1e-2)
        for T in (1, 8, 9, 200, 1031):
            exact = [torch.randn(2, 4, T, n, device='cuda').to(dtype) for n, dtype in ((64, torch.bfloat16),) * 3 + ((17, torch.float32),)]
            reference = with_gradients(lambda *x: composite.attend_dense(*x, causal), [x.float().requires_grad_() for x in exact])
            for form, f in (('eager', composite.attend_fast), ('compiled', torch.compile(composite.attend_fast))):
                check(f'far + near in bf16 = dense in float32 on a GPU, {form}, {"causal" if causal else "both sides"}',
                      with_gradients(lambda *x: f(*x, causal), [x.clone().requires_grad_() for x in exact]), reference, 0.03)


def main():
    torch.set_num_threads(1)  # many tiny tensors
    failures = 0
    models = [word for word in sys.argv[1:] if not word.startswith('--')]
    for name, test in [(n, t) for n, t in globals().items() if n.startswith('test_')]:
        if models and not any(model in inspect.getsource(test) or 'schemes(' in inspect.getsource(test) for model in models):
            continue
        try:
            test()
        except Exception as e:  # whatever it is, the table goes on and the row is red
            failures += 1
            if not ROWS or not str(e).startswith(ROWS[-1][0]):  # failed before its row could be written
                ROWS.append((f'{name}: {type(e).__name__} {" ".join(str(e).split())[:60]}', math.inf, 0.0))
            if '--first' in sys.argv:
                break
    table = {}
    for claim, difference, tolerance in ROWS:  # the same claim checked many times: the worst of them
        worse = min if isinstance(tolerance, str) else max
        if claim not in table or worse(difference, table[claim][0]) == difference:
            table[claim] = difference, tolerance
    for claim, (difference, tolerance) in table.items():
        if difference is None:
            print(f'{claim:92s} {tolerance}')
        elif isinstance(tolerance, str):
            print(f'{claim:92s} {difference:8.1e} {tolerance:>8s}  {"PASS" if difference >= float(tolerance[1:]) else "FAIL"}')
        else:
            print(f'{claim:92s} {difference:8.1e} {tolerance:8.0e}  {"PASS" if difference <= tolerance else "FAIL"}')
    print(f'{len(table)} rows, {failures} failed')
    return failures > 0


if __name__ == '__main__':
    sys.exit(main())
