"""
Kernelized attention with relative positions: a Toeplitz matrix by FFT in O(T log T), and beyond the paper in O(T).

Luo, Li, Cai, He, Peng, Zheng, Ke, Wang, Liu, "Stable, Fast and Accurate: Kernelized Attention with Relative Positional
Encoding", NeurIPS 2021. https://arxiv.org/abs/2106.12566

Random features phi turn the exponential of a dot product into a dot product, exp(q.k) ~ phi(q).phi(k), so that the sums
over the keys come first. Relative positions multiply each weight by e^{b_{j-i}} (equation 10):

    z_i = phi(q_i) sum_j e^{b_{j-i}} phi(k_j)^T v_j  /  phi(q_i) sum_j e^{b_{j-i}} phi(k_j)^T

C_ij = e^{b_{j-i}} is a Toeplitz matrix, and a Toeplitz matrix times a vector is a convolution: attend_fft. With q and k
divided by their L2 norm (Algorithm 1) the features' error stays small and training is stable; sharp attention is then
left to b. `--no-normalize --no-rpe` is the plain random-feature attention of the literature, scaled by hs^-1/4. The
missing control of the paper's tables, softmax with the same b, is model_composite.py --no-dynamic --kernel_size 257.

Departures from the paper: b is per layer and head (the paper shares it over the layers), and offsets beyond
+-max_distance share the end weight (max_distance >= block_size is the paper's b). Clipped like that b is constant for
far keys, which then enter by running sums, as in linear attention: attend_chunked, exact and O(T), on tensor cores; and
a text is continued from a state of fixed size. The random matrix is drawn once per layer, shared by the heads, and kept.
Plain form: attend_dense. Fast forms: attend_fft, attend_chunked, attend_recurrent. test_equivalence.py proves all equal,
and the plain one equal to loops. What they do to extreme b: dense, chunked and recurrent take off the largest b that
each query sees, and lose nothing. The FFT rounds all rows to one scale, 1e-7 of the largest sum in float32: rows that
see only weights far below the largest lose their digits, and feel what comes after them. So does a causal b that favours
far offsets by more than some 5 nats, and --no-normalize, whose features span as many. `auto` never takes it.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    vocab_size: int = 256  # rows of the embedding; train.py sets it from the data, padded up to a multiple of 64
    block_size: int = 128  # training length in tokens
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads in a block
    n_embd: int = 128  # channels of the residual stream, a multiple of n_head
    dropout: float = 0.0  # on the embedding and on what each branch adds to the residual stream
    bias: bool = False  # biases in Linear and LayerNorm
    causal: bool = True  # False: every token sees every token (masked language model)
    absolute: bool = False  # learned absolute positions added to the embedding: the baseline that every scheme replaces
    init_std: float = 0.02  # standard deviation of the initial Linear and Embedding weights
    scale_residual_init: bool = True  # GPT-2: residual projections scaled by 1/sqrt(2 n_layer); the variance theory needs it off
    # the position scheme
    n_features: int = 64  # random features m; trf makes two of each, elu none: it has hs
    feature_map: Literal['prf', 'trf', 'orf', 'sphere', 'elu'] = 'prf'  # positive, trigonometric; positive with orthogonal or equally long rows; elu(x) + 1
    normalize: bool = True  # queries and keys divided by their L2 norm; else by hs^(1/4)
    rpe: bool = True  # relative positions b_{j-i}
    max_distance: int = 128  # offsets beyond it share the end weight; from block_size on none does
    attention: Literal['auto', 'dense', 'fft', 'chunked'] = 'auto'  # form; auto: dense for short texts, else chunked


def random_matrix(m, hs, kind='prf'):
    """m random directions w (m, hs): rows N(0, I); 'orf' orthogonal in blocks of hs; 'sphere' all of length sqrt(hs)."""
    w = torch.randn(m, hs)
    if kind == 'orf':
        blocks = [torch.linalg.qr(torch.randn(hs, hs)) for _ in range(0, m, hs)]
        blocks = [Q * R.diagonal().sign() for Q, R in blocks]  # or the signs of Q would be those that the algorithm prefers
        return torch.cat(blocks)[:m] * w.norm(dim=1, keepdim=True)
    return F.normalize(w) * math.sqrt(hs) if kind == 'sphere' else w


def features(x, w, kind='prf', stable=False):
    """phi with E[phi(x).phi(y)] = exp(x.y): x (..., hs), w (m, hs) -> (..., m), all positive; 'trf' (..., 2m) of either sign.

    prf: exp(w.x - |x|^2 / 2) / sqrt(m), trf: exp(|x|^2 / 2) [sin(w.x), cos(w.x)] / sqrt(m); orf and sphere are prf with another
    w ('sphere' is unbiased for large hs only). Each exponent of prf is at most |w|^2 / 2, those of trf have no limit: it is
    for normalised x, or overflows from norms of 13 on. 'elu' estimates nothing: elu(x) + 1 (Katharopoulos et al. 2020), no w,
    (..., hs), 0 from -17 on. At least float32. stable: less a number per token that makes the largest
    exponent 0, for queries: it is in numerator and normaliser. Keys have no such number that does not look ahead.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if kind == 'elu':
            return F.elu(x) + 1
        wx, square = x @ w.to(x.dtype).T, x.square().sum(-1, keepdim=True) / 2  # (..., m), (..., 1)
        if kind == 'trf':
            return torch.cat((wx.sin(), wx.cos()), -1) * (0 * square if stable else square).exp() / math.sqrt(w.size(0))
        return (wx - (wx.detach().amax(-1, keepdim=True) if stable else square)).exp() / math.sqrt(w.size(0))


def visible(T, S, causal=True, valid=None, device=None):
    """Which of S keys each of the last T tokens sees: bool (T, S), or (B, 1, T, S) where valid (B, S) marks padding False.

    Padding is seen by nobody but itself, so that no row of the softmax is empty.
    """
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)
    see = j <= i if causal else (j >= 0).expand(T, S)
    return see if valid is None else see & (valid[:, None, None, :] | (i == j))


def spread(kernel, past, n):
    """Lay each row's kernel along its diagonal: (..., T, 2k+1) -> (..., T, n).

    Row i stands at position past + i and column j gets the entry of offset clip(j - past - i, -k, k). There is no index
    tensor: the end entries are expanded and the rows skewed, so the backward pass is sums, where a gather's would be
    a scatter onto few addresses.
    """
    T, k = kernel.size(-2), kernel.size(-1) // 2
    left, right = T - 1 + past - k, n - past - k  # entries wanted beyond either end; negative: too many
    first, last = kernel[..., :1], kernel[..., -1:]
    rows = torch.cat((first.expand(*first.shape[:-1], max(left, 0)),
                      kernel[..., max(-left, 0):2 * k + 1 - max(-right, 0)],
                      last.expand(*last.shape[:-1], max(right, 0))), -1)  # (..., T, T+n): offsets 1-T-past ... n-past
    return rows.flatten(-2)[..., T - 1:-1].unflatten(-1, (T, T + n - 1))[..., :n]  # each row starts one further left


def attend_dense(q, k, v, b, causal=True, valid=None, past=None):
    """Kernelized attention with relative positions (equation 10) as a (T, S) matrix.

    q (B, nh, T, m), k (B, nh, S, m) features, v (B, nh, S, hs), S >= T: the queries are the last T of S tokens.
    b (nh, 2R+1): log-weight of offset j - i at entry clip(j - i, -R, R) + R. valid (B, S) bool: False is padding.
    past: sums over keys at least R before every query, as attend_recurrent keeps them. Returns (B, nh, T, hs).
    """
    T, S = q.size(2), k.size(2)
    bias = spread(b[:, None].expand(-1, T, -1), S - T, S)[None]  # (1, nh, T, S), Toeplitz
    bias = bias.masked_fill(~visible(T, S, causal, valid, q.device), float('-inf'))
    top = bias.detach().amax(-1, keepdim=True)  # (1 or B, nh, T, 1): the largest log-weight that each query sees
    if past is not None:
        far = b[:, :1, None].masked_fill(~past['any'][:, None, None, None], float('-inf'))  # (B, nh, 1, 1)
        top = torch.maximum(top, far.detach())
    att = (q @ k.transpose(-2, -1)) * (bias - top).exp()  # (B, nh, T, m) x (B, nh, m, S) -> (B, nh, T, S)
    y, total = att.to(v.dtype) @ v, att.sum(-1, keepdim=True)  # (B, nh, T, hs), (B, nh, T, 1)
    if past is not None:
        y = y + (far - top).exp() * (q @ past['kv'])
        total = total + (far - top).exp() * (q * past['k_sum']).sum(-1, keepdim=True)
    return divide(y, total).to(v.dtype)


def divide(y, total, least=1e-30):
    """y / total, and 0 where the features of a row have vanished: its normaliser is `least` or less. The gradient has y / total^2."""
    gone = total.abs() <= least
    return (y / total.masked_fill(gone, 1)).masked_fill(gone, 0)


class CirculantProduct(torch.autograd.Function):
    """Rows 0 ... T-1 of the circulant matrix with first column `column` (..., n) times x (..., T) padded with zeros, T <= n even.

    By hand, for autograd would take a complex transform of twice the size where a real one does.
    """

    @staticmethod
    def forward(ctx, column, x):
        n, T = column.size(-1), x.size(-1)
        c, X = torch.fft.rfft(column), torch.fft.rfft(x, n)  # (..., n/2+1) complex
        ctx.save_for_backward(c, X)
        ctx.sizes = column.shape, n, T
        return torch.fft.irfft(X * c, n)[..., :T]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (c, X), (shape, n, T) = ctx.saved_tensors, ctx.sizes
        dY = torch.fft.rfft(dy, n)
        d_column = (X.conj() * dY).sum_to_size(*shape[:-1], n // 2 + 1)  # a correlation
        return torch.fft.irfft(d_column, n), torch.fft.irfft(dY * c.conj(), n)[..., :T]


def toeplitz_fft(c, x):
    """sum_j c_{j-i} x_j for c (..., 2T-1), offsets 1-T ... T-1, and x (..., T), by FFT in O(T log T) -> (..., T)."""
    T = x.size(-1)
    past, future = c[..., :T].flip(-1), c[..., T:].flip(-1)  # c_0, c_-1 ... c_{1-T}; c_{T-1} ... c_1
    column = torch.cat((past, torch.zeros_like(c[..., :1]), future), -1)  # (..., 2T): the circulant matrix that holds the Toeplitz one
    return CirculantProduct.apply(column, x)


@torch.compiler.disable  # there is no code generation for complex numbers
def attend_fft(q, k, v, b, causal=True, valid=None):
    """The value of attend_dense in O(T log T) (section 3.2), for any R; as many queries as keys. float32, or float64 if q is.

    Features go in groups, each forgotten and made again for the backward pass, so that memory does not grow with m.
    """
    with torch.autocast(q.device.type, enabled=False):
        B, nh, T, m = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, values = q.to(dtype), k.to(dtype), torch.cat((v, torch.ones_like(v[..., :1])), -1).to(dtype)  # the last column counts: the normaliser
        bias = spread(b[:, None], T - 1, 2 * T - 1)  # (nh, 1, 2T-1): offsets 1-T ... T-1
        if causal:
            bias = bias[..., :T]
        c = F.pad((bias - bias.detach().amax(-1, keepdim=True)).exp(), (0, T - 1 if causal else 0)).to(dtype)[:, :, None]  # (nh, 1, 1, 2T-1)
        kept = k if valid is None else k * valid[:, None, :, None]

        def part(q, k):
            kv = k.transpose(2, 3)[:, :, :, None] * values.transpose(2, 3)[:, :, None]  # (B, nh, g, hs+1, T)
            return (q.transpose(2, 3)[:, :, :, None] * toeplitz_fft(c, kv)).sum(2).transpose(2, 3)  # (B, nh, T, hs+1)
        group = max(1, 2 ** (25 if q.is_cuda else 18) // values.numel())  # features at once: what a cache holds, or fills a GPU
        groups = zip(q.split(group, -1), kept.split(group, -1))
        y = sum(checkpoint(part, *pair, use_reentrant=False, preserve_rng_state=False) for pair in groups)
        if valid is not None:  # padding sees itself
            self_weight = (q * (k - kept)).sum(-1, keepdim=True) * c[..., 0, T - 1:T]  # (B, nh, T, 1)
            y = y + self_weight * values
        noise = 4 * torch.finfo(dtype).eps * y[..., -1:].detach().amax((2, 3), keepdim=True)
        return divide(y[..., :-1], y[..., -1:], noise).to(v.dtype)


def attend_chunked(q, k, v, b, causal=True, valid=None, chunk=64):
    """The value of attend_dense in O(T): chunks nearer than R as matrices, the farther ones as running sums. q, k, v, b: see there.

    As many queries as keys. Exact, for b is one constant beyond R on either side. Any T, R and chunk (tokens); the running
    sums are in at least float32. Memory per token and head: R + chunk weights, (1 + R / chunk) m features, m hs / chunk sums.
    """
    B, nh, T, m = q.shape
    R, c, N = b.size(-1) // 2, chunk, -(-T // chunk)
    P = min(max(0, -(-(R - 1) // c)), N - 1)  # chunks n-P ... n+P are near to chunk n: all others are at R tokens or more
    valid = q.new_ones(1, T, dtype=torch.bool) if valid is None else valid
    valid = F.pad(valid, (0, N * c - T)).view(-1, 1, N, c, 1)
    q, k, v = (F.pad(x, (0, 0, 0, N * c - T)).view(B, nh, N, c, -1) for x in (q, k, v))

    def near(x):  # (B, nh, N, c, f) -> (B, nh, N, W, f): the chunks near to each, zeros beyond the ends
        shifts = P + 1 if causal else 2 * P + 1
        x = F.pad(x, (0, 0, 0, 0, P, shifts - P - 1))
        return torch.cat([x[:, :, r:r + N] for r in range(shifts)], 3)

    def before(x):  # (B, nh, N, ., .) -> running sums over the chunks before the near ones
        return F.pad(x.cumsum(2), (0, 0, 0, 0, P + 1, 0))[:, :, :N]

    i, j = torch.arange(c, device=q.device)[:, None], torch.arange((P + 1 if causal else 2 * P + 1) * c, device=q.device) - P * c
    see = near(valid).transpose(3, 4) | (i == j)  # (1 or B, 1, N, c, W)
    if causal:
        see = see & (j <= i)
    bias = spread(b[:, None].expand(-1, c, -1), P * c, j.numel())[:, None].masked_fill(~see, float('-inf'))  # (1 or B, nh, N, c, W)
    top = bias.detach().amax(-1, keepdim=True)
    kept = k * valid
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = (kept.transpose(3, 4) @ v.to(kept.dtype)).to(wide), kept.sum(3, keepdim=True, dtype=wide), valid.sum(3, keepdim=True)
    sides = [(b[:, 0], [before(x) for x in sums])]  # (B, nh, N, m, hs), (B, nh, N, 1, m), (1 or B, 1, N, 1, 1)
    if not causal:
        sides.append((b[:, -1], [before(x.flip(2)).flip(2) for x in sums]))
    sides = [(end[:, None, None, None].masked_fill(count == 0, float('-inf')), kv, k_sum) for end, (kv, k_sum, count) in sides]
    for end, _, _ in sides:
        top = torch.maximum(top, end.detach())
    att = (q @ near(k).transpose(3, 4)) * (bias - top).exp()  # (B, nh, N, c, W)
    y, total = att.to(v.dtype) @ near(v), att.sum(-1, keepdim=True)
    for end, kv, k_sum in sides:
        y = y + (end - top).exp() * (q @ kv.to(q.dtype))
        total = total + (end - top).exp() * (q * k_sum).sum(-1, keepdim=True)
    return divide(y, total).to(v.dtype).view(B, nh, N * c, -1)[:, :, :T]


def attend_recurrent(q, k, v, b, valid, state):
    """The next tokens of a text: causal, in time and memory that do not grow with what came before. q, k, v, b, valid: of these.

    state keeps the last R keys and values, and of all before them kv (B, nh, m, hs) and k_sum (B, nh, 1, m), sums in at least
    float32, and any (B,), whether there were any. The first piece is cheap at any length, a later one of T tokens makes a
    (T, R+T) matrix. Returns (B, nh, T, hs).
    """
    if 'k' in state:
        k, v, valid = torch.cat((state['k'], k), 2), torch.cat((state['v'], v), 2), torch.cat((state['valid'], valid), 1)
        past = {name: state[name] for name in ('kv', 'k_sum', 'any')}
        y = attend_dense(q, k, v, b, True, valid, past)
    else:
        past = dict(kv=0, k_sum=0, any=valid.new_zeros(valid.size(0)))
        y = attend_chunked(q, k, v, b, True, valid)
    old = max(0, k.size(2) - b.size(-1) // 2)  # tokens at R or more from all that will come
    with torch.autocast(k.device.type, enabled=False):  # a sum in bfloat16 would soon stop growing
        kept = (k[:, :, :old] * valid[:, None, :old, None]).to(torch.promote_types(k.dtype, torch.float32))
        state.update(kv=past['kv'] + kept.transpose(2, 3) @ v[:, :, :old].to(kept.dtype), k_sum=past['k_sum'] + kept.sum(2, keepdim=True),
                     any=past['any'] | valid[:, :old].any(1), k=k[:, :, old:].clone(), v=v[:, :, old:].clone(), valid=valid[:, old:])
    return y


class Attention(nn.Module):
    """Kernelized self-attention with a learned weight for each offset."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        if config.n_features < 1 or config.max_distance < 0:
            raise ValueError(f'n_features must be positive and max_distance not negative, not {config.n_features} and {config.max_distance}')
        if config.feature_map not in ('prf', 'trf', 'orf', 'sphere', 'elu'):
            raise ValueError(f'feature_map must be prf, trf, orf, sphere or elu, not {config.feature_map!r}')
        if config.attention not in ('auto', 'dense', 'fft', 'chunked'):
            raise ValueError(f'attention must be auto, dense, fft or chunked, not {config.attention!r}')
        self.n_head, self.causal, self.normalize = config.n_head, config.causal, config.normalize
        self.kind, self.attention = config.feature_map, config.attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.register_buffer('w', random_matrix(config.n_features, config.n_embd // config.n_head, self.kind))  # (m, hs)
        self.b = nn.Parameter(torch.zeros(config.n_head, 2 * config.max_distance + 1)) if config.rpe else None

    def forward(self, x, valid=None, state=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, 2))  # (B, nh, T, hs)
        if self.normalize:  # Algorithm 1; the limit bounds the gradient where a vector is zero
            q, k = F.normalize(q, dim=-1, eps=1e-4), F.normalize(k, dim=-1, eps=1e-4)
        else:
            q, k = q * q.size(-1) ** -0.25, k * k.size(-1) ** -0.25
        q, k = features(q, self.w, self.kind, stable=not self.normalize), features(k, self.w, self.kind)  # (B, nh, T, m)
        b = self.w.new_zeros(self.n_head, 1) if self.b is None else self.b
        if state is not None:
            y = attend_recurrent(q, k, v, b, valid, state)
        elif self.attention == 'fft':
            y = attend_fft(q, k, v, b, self.causal, valid)
        elif self.attention == 'chunked' or self.attention == 'auto' and T >= 256 and T > b.size(-1):
            y = attend_chunked(q, k, v, b, self.causal, valid)
        else:
            y = attend_dense(q, k, v, b, self.causal, valid)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, valid=None, state=None):
        x = x + self.drop(self.attn(self.ln_1(x), valid, state))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class Model(nn.Module):
    """A GPT-2 (causal) or a pre-norm BERT (not causal) around the Attention above."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.absolute else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.apply(self.init_weights)
        if config.scale_residual_init:
            for name, p in self.named_parameters():
                if name.endswith('c_proj.weight'):
                    nn.init.normal_(p, std=config.init_std / math.sqrt(2 * config.n_layer))

    def init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def new_state(self):
        """An empty memory for decoding: one dict per layer, filled by forward(..., state=...)."""
        return [{'seen': 0} for _ in self.h]

    def hidden(self, idx, valid=None, state=None):
        """idx (B, T) int64 -> (B, T, C) after the last norm: what the head, probes and classifiers read.

        valid (B, T) bool: False marks padding, which no other token sees. state: see new_state(); idx are then the
        tokens that follow those already fed. ValueError where absolute positions end or a state meets causal=False.
        """
        B, T = idx.shape
        past = 0 if state is None else state[0]['seen']  # tokens fed before these
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            if past + T > self.config.block_size:
                raise ValueError(f'absolute positions end at block_size={self.config.block_size}, got {past + T} tokens')
            x = x + self.wpe.weight[past:past + T]
        if state is not None:
            if not self.config.causal:
                raise ValueError('decoding from a state needs causal=True')
            if valid is None:
                valid = torch.ones_like(idx, dtype=torch.bool)
        x = self.drop(x)
        for i, block in enumerate(self.h):
            x = block(x, valid, None if state is None else state[i])
            if state is not None:
                state[i]['seen'] += T
        return self.ln_f(x)

    def forward(self, idx, targets=None, where=None, valid=None, state=None):
        """-> logits (B, T, vocab_size), and the mean cross entropy in nats or None.

        targets (B, T) int64, -1 = not predicted. where (B, M) int64: predict at these places alone (masked language
        model); logits are then (B, M, vocab_size) and targets (B, M). idx, valid, state: see hidden().
        """
        x = self.hidden(idx, valid, state)
        if where is not None:
            x = x.gather(1, where[..., None].expand(-1, -1, x.size(2)))  # (B, M, C)
        logits = F.linear(x, self.wte.weight)  # the head is the embedding
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss
