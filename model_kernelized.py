"""
Kernelized attention with relative positions: a Toeplitz matrix by FFT in O(T log T), and beyond the paper in O(T).

Luo, Li, Cai, He, Peng, Zheng, Ke, Wang, Liu, "Stable, Fast and Accurate: Kernelized Attention with Relative Positional
Encoding", NeurIPS 2021. https://arxiv.org/abs/2106.12566

Random features phi turn the exponential of a dot product into a dot product, exp(q.k) ~ phi(q).phi(k), so that the sums
over the keys can be computed first. Relative positions multiply each weight by e^{b_{j-i}} (equation 10):

    z_i = phi(q_i) sum_j e^{b_{j-i}} phi(k_j)^T v_j  /  phi(q_i) sum_j e^{b_{j-i}} phi(k_j)^T

C_ij = e^{b_{j-i}} is a Toeplitz matrix, and a Toeplitz matrix times a vector is a convolution: attend_fft_plain. With q
and k divided by their L2 norm (Algorithm 1), the error of the features stays small and training is stable; b then makes
attention sharp. `--no-normalize --no-rpe` is the plain random-feature attention of the literature, scaled by hs^-1/4.
The paper's tables lack one control, softmax with the same b: model_composite.py --no-dynamic --kernel_size 257.

Departures from the paper: each layer has its own b (the paper shares it over the layers), and offsets beyond
+-max_distance share the end weight. (max_distance >= block_size is the paper's b; the end weight is untrained then:
choose less for texts longer than that.) The random matrix is drawn once per layer, shared by the heads, and kept.
Plain forms: attend_dense and attend_fft_plain. Fast forms: attend_fft in bounded memory; attend_chunked in O(T), exact
because b is constant far away; attend_recurrent for decoding, in constant memory. Extreme b: all but the FFT subtract
the largest b that a query sees. The FFT rounds all rows to one scale, 1e-7 of the largest sum in float32: rows whose
weights are all far smaller lose their digits, and rounding lets later tokens leak in. This happens with a causal b that
favours far offsets by more than about 5 nats, and with --no-normalize. `auto` never chooses the FFT.
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
    scale_residual_init: bool = True  # scale the residual projections by 1/sqrt(2 n_layer), as GPT-2 does
    # the position scheme
    n_features: int = 64  # random features m; trf makes two of each, elu does not use them
    feature_map: Literal['prf', 'trf', 'orf', 'sphere', 'elu'] = 'prf'  # see features()
    normalize: bool = True  # divide queries and keys by their L2 norm; otherwise by hs^(1/4)
    rpe: bool = True  # relative positions b_{j-i}
    max_distance: int = 128  # offsets beyond share the end weight; from block_size on none does, and it stays untrained
    attention: Literal['auto', 'dense', 'fft', 'chunked'] = 'auto'  # auto: dense or in O(T), by length


def random_matrix(m, hs, kind='prf'):
    """m random directions (m, hs): rows N(0, I); 'orf' orthogonal in blocks of hs; 'sphere' all of length sqrt(hs)."""
    w = torch.randn(m, hs)
    if kind == 'sphere':
        return F.normalize(w) * math.sqrt(hs)
    if kind == 'orf':
        blocks = [torch.linalg.qr(torch.randn(hs, hs)) for _ in range(0, m, hs)]
        blocks = [Q * R.diagonal().sign() for Q, R in blocks]  # without the signs Q is not uniformly distributed
        return torch.cat(blocks)[:m] * w.norm(dim=1, keepdim=True)
    return w


def features(x, w, kind='prf', stable=False, normalize=False):
    """phi with E[phi(x).phi(y)] = exp(x.y): x (..., hs), w (m, hs) -> (..., m), in at least float32.

    prf: exp(w.x - |x|^2 / 2) / sqrt(m), positive. orf and sphere are prf with another w (sphere is unbiased for large
    hs only). trf: exp(|x|^2 / 2) [sin(w.x), cos(w.x)] / sqrt(m), (..., 2m), of either sign; it overflows for norms
    above 13, so use it with normalised x. elu: elu(x) + 1 (Katharopoulos et al. 2020), (..., hs); it estimates nothing.
    stable, for queries: without factors of a whole token that cancel in the fraction (prf: no exponent is above 0).
    normalize: x / |x| first (Algorithm 1), |x| at least 1e-4 to bound the gradient; prf, orf, sphere keep the dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = x.dtype
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if normalize:
            x = x * x.square().sum(-1, keepdim=True).clamp_min(1e-8).rsqrt()
            if kind not in ('trf', 'elu'):  # exponents near 0: in bfloat16 the product is as good as its exponential
                shift = x.new_full(w.shape[:1], -0.5 - math.log(w.size(0)) / 2, dtype=dtype)  # (m,)
                return F.linear(x.to(dtype).contiguous(), w.to(dtype), shift).exp()  # (..., m)
        if kind == 'elu':
            return F.elu(x) + 1
        wx = x @ w.to(x.dtype).T  # (..., m)
        half_square = x.square().sum(-1, keepdim=True) / 2  # (..., 1)
        if kind == 'trf':
            scale = torch.ones_like(half_square) if stable else half_square.exp()
            return torch.cat((wx.sin(), wx.cos()), -1) * scale / math.sqrt(w.size(0))
        shift = wx.detach().amax(-1, keepdim=True) if stable else half_square
        return wx.sub_(shift + math.log(w.size(0)) / 2).exp_()  # in place: the backward pass needs the result only


def visible(T, S, causal=True, valid=None, device=None):
    """Which of S keys each of the last T tokens sees: bool (T, S), or (B, 1, T, S) with padding.

    valid (B, S) bool: False is padding, seen by its own query alone, so that no row of the softmax is empty.
    """
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)
    see = j <= i if causal else (j >= 0).expand(T, S)
    return see if valid is None else see & (valid[:, None, None, :] | (i == j))


def along_diagonals(kernel, past, n):
    """Write each row's kernel along the diagonals of a matrix: (..., T, 2k+1) -> (..., T, n).

    Row i stands at position past + i; its column j gets the entry of offset clip(j - past - i, -k, k). For three rows
    with the kernels abc, def, ghi (k = 1), past = 0 and n = 3:

        ends repeated        from the T-th number on, in rows of T + n - 1 = 5       first 3 columns
        a a b c c c          b c c c d                                               b c c
        d d e f f f          d e f f f                                               d e f
        g g h i i i          g g h i i                                               g g h

    An index tensor would do the same, but its backward pass is a scatter onto few addresses; here it is sums.
    """
    T = kernel.size(-2)
    k = kernel.size(-1) // 2
    left = T - 1 + past - k  # how often the first entry is repeated; negative: entries to leave out
    right = n - past - k
    first = kernel[..., :1].expand(*kernel.shape[:-1], max(left, 0))
    middle = kernel[..., max(-left, 0):2 * k + 1 - max(-right, 0)]
    last = kernel[..., -1:].expand(*kernel.shape[:-1], max(right, 0))
    rows = torch.cat((first, middle, last), -1)  # (..., T, T+n): offsets 1-T-past ... n-past
    return rows.as_strided((*rows.shape[:-1], n), (*rows.stride()[:-2], T + n - 1, 1), T - 1)


def attend_dense(q, k, v, b, causal=True, valid=None):
    """Kernelized attention with relative positions (equation 10) as a (T, T) matrix.

    q, k (B, nh, T, m): features; v (B, nh, T, hs). b (nh, 2R+1): the log-weight of offset j - i is entry
    clip(j - i, -R, R) + R. valid (B, T) bool: False is padding. Returns (B, nh, T, hs).
    """
    T = q.size(2)
    bias = along_diagonals(b[:, None].expand(-1, T, -1), 0, T)[None]  # (1, nh, T, T), a Toeplitz matrix per head
    bias = bias.masked_fill(~visible(T, T, causal, valid, q.device), float('-inf'))
    largest = bias.detach().amax(-1, keepdim=True)  # it cancels in the fraction, and exp cannot overflow
    att = (q @ k.transpose(-2, -1)) * (bias - largest).exp().to(q.dtype)  # (B, nh, T, T)
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)  # the last column gives the normaliser
    y = att.to(v.dtype) @ values  # (B, nh, T, hs+1)
    return divide(y[..., :-1], y[..., -1:]).to(v.dtype)


def divide(y, total, least=1e-30):
    """y / total, and 0 where |total| <= least: there all features have vanished, and the gradient has 1 / total^2."""
    return y / total.masked_fill(total.abs() <= least, math.inf)


def toeplitz_fft(c, x):
    """sum_j c_{j-i} x_j in O(T log T): c (..., 2T-1), offsets 1-T ... T-1, times x (..., T) -> (..., T).

    A Toeplitz matrix is the upper left part of a circulant one of twice the size, here for T = 3:

        c0  c1  c2 |  0  c-2 c-1
        c-1 c0  c1 |  c2  0  c-2        A circulant matrix times a vector is the circular convolution of its first
        c-2 c-1 c0 |  c1  c2  0         column with the vector, x padded with zeros: in Fourier space a product.
    """
    T = x.size(-1)
    return torch.fft.irfft(torch.fft.rfft(circulant_column(c)) * torch.fft.rfft(x, 2 * T), 2 * T)[..., :T]


def circulant_column(c):
    """First column of the circulant matrix, c_0 c_-1 ... c_{1-T} 0 c_{T-1} ... c_1: c (..., 2T-1) -> (..., 2T)."""
    T = (c.size(-1) + 1) // 2
    return torch.cat((c[..., :T].flip(-1), torch.zeros_like(c[..., :1]), c[..., T:].flip(-1)), -1)


def toeplitz_weights(b, T, causal):
    """e^b of the offsets 1-T ... T-1, divided by the largest: b (nh, 2R+1) -> (nh, 2T-1). Causal: the future is 0."""
    bias = along_diagonals(b[:, None], T - 1, 2 * T - 1).squeeze(1)  # (nh, 2T-1)
    bias = bias[:, :T] if causal else bias
    c = (bias - bias.detach().amax(-1, keepdim=True)).exp()
    return F.pad(c, (0, T - 1 if causal else 0))


def attend_fft_plain(q, k, v, b, causal=True):
    """The value of attend_dense in O(T log T) time and O(T m hs) memory (section 3.2). Same arguments, no padding."""
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)  # (B, nh, T, hs+1); the last column gives the normaliser
    kv = torch.einsum('bhjm,bhjd->bhmdj', k, values)  # (B, nh, m, hs+1, T): phi(k_j)^T v_j
    c = toeplitz_weights(b, q.size(2), causal)[:, None, None]  # (nh, 1, 1, 2T-1)
    y = torch.einsum('bhim,bhmdi->bhid', q, toeplitz_fft(c, kv))  # (B, nh, T, hs+1)
    return divide(y[..., :-1], y[..., -1:])


class Attention(nn.Module):
    """Kernelized self-attention with a learned weight for each offset."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        if config.n_features < 1:
            raise ValueError(f'n_features must be positive, not {config.n_features}')
        if config.max_distance < 0:
            raise ValueError(f'max_distance must not be negative, not {config.max_distance}')
        if config.feature_map not in ('prf', 'trf', 'orf', 'sphere', 'elu'):
            raise ValueError(f'feature_map must be prf, trf, orf, sphere or elu, not {config.feature_map!r}')
        if config.attention not in ('auto', 'dense', 'fft', 'chunked'):
            raise ValueError(f'attention must be auto, dense, fft or chunked, not {config.attention!r}')
        self.n_head = config.n_head
        self.causal = config.causal
        self.normalize = config.normalize
        self.kind = config.feature_map
        self.attention = config.attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        hs = config.n_embd // config.n_head
        self.register_buffer('w', random_matrix(config.n_features, hs, self.kind))  # (m, hs)
        self.b = nn.Parameter(torch.zeros(config.n_head, 2 * config.max_distance + 1)) if config.rpe else None

    def forward(self, x, valid=None, state=None):
        B, T, C = x.shape
        qk, v = self.c_attn(x).split((2 * C, C), 2)
        qk = qk.view(B, T, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (2, B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if self.normalize:
            q, k = features(qk, self.w, self.kind, normalize=True).to(v.dtype)  # each (B, nh, T, m)
        else:
            qk = qk * qk.size(-1) ** -0.25
            q = features(qk[0], self.w, self.kind, stable=True).to(v.dtype)
            k = features(qk[1], self.w, self.kind).to(v.dtype)
        b = self.w.new_zeros(self.n_head, 1) if self.b is None else self.b
        least = (256 if self.causal else 512) * (1.5 if v.dtype == torch.bfloat16 else 1) + b.size(-1) // 4
        long = T > max(b.size(-1), least)  # then chunks are quicker, by laptop.py on a CPU
        if state is not None:
            y = attend_recurrent(q, k, v, b, valid, state)
        elif self.attention == 'fft':
            y = attend_fft(q, k, v, b, self.causal, valid)
        elif self.attention == 'auto' and self.b is None and not self.causal:
            y = attend_sums(q, k, v, valid)
        elif self.attention == 'chunked' or (self.attention == 'auto' and long):
            y = attend_chunked(q, k, v, b, self.causal, valid, 128 if x.is_cuda else 64)
        else:
            y = attend_dense(q, k, v, b, self.causal, valid)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


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
        """An empty memory for decoding: a dict per layer, which forward(..., state=...) fills."""
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
                raise ValueError(f'absolute positions end at block_size={self.config.block_size}, not at {past + T}')
            x = x + self.wpe.weight[past:past + T]
        if state is not None:
            if not self.config.causal:
                raise ValueError('decoding from a state needs causal=True')
            if valid is not None or 'valid_so_far' in state[0]:  # padding, now or before
                now = torch.ones_like(idx, dtype=torch.bool) if valid is None else valid
                before = state[0].get('valid_so_far', now.new_ones(B, past))
                valid = state[0]['valid_so_far'] = torch.cat((before, now), 1)  # (B, past + T)
        x = self.drop(x)
        for i, block in enumerate(self.h):
            x = block(x, valid, None if state is None else state[i])
            if state is not None:
                state[i]['seen'] += T
        return self.ln_f(x)

    def forward(self, idx, targets=None, where=None, valid=None, state=None):
        """-> logits (B, T, vocab_size), mean cross entropy in nats or None. With a loss, logits have no gradient.

        targets (B, T) int64, -1 = not predicted. where (B, M) int64: predict at these places only (masked language
        model); logits are then (B, M, vocab_size) and targets (B, M). idx, valid, state: see hidden().
        """
        x = self.hidden(idx, valid, state)
        if where is not None:
            x = x.gather(1, where[..., None].expand(-1, -1, x.size(2)))  # (B, M, C)
        logits = F.linear(x, self.wte.weight)  # the head is the embedding
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
            logits = logits.detach()  # only the loss has a gradient: a compiled backward pass is smaller then
        return logits, loss


# ---------------------------------------------------------------------------------------------------------------------
# The paper ends here. What follows makes it fast: the FFT in bounded memory, chunks in O(T), and decoding from a state.


class CirculantProduct(torch.autograd.Function):
    """The first T entries of the circular convolution of column (..., 2T) and x (..., T), padded with zeros.

    By hand, because autograd would use complex transforms of twice the size where real ones are enough.
    """

    @staticmethod
    def forward(ctx, column, x):
        T = x.size(-1)
        c = torch.fft.rfft(column)  # (..., T+1) complex
        X = torch.fft.rfft(x, 2 * T)  # (..., T+1) complex
        ctx.save_for_backward(c, X)
        ctx.column_shape = column.shape
        return torch.fft.irfft(X * c, 2 * T)[..., :T]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        c, X = ctx.saved_tensors
        T = dy.size(-1)
        dY = torch.fft.rfft(dy, 2 * T)
        d_column = (X.conj() * dY).sum_to_size(*ctx.column_shape[:-1], T + 1)  # a correlation
        return torch.fft.irfft(d_column, 2 * T), torch.fft.irfft(dY * c.conj(), 2 * T)[..., :T]


@torch.compiler.disable  # torch.compile generates no code for complex numbers
def attend_fft(q, k, v, b, causal=True, valid=None):
    """The value of attend_dense in O(T log T), for any R, in float32 (float64 if q is). Arguments as there.

    Like attend_fft_plain, but a group of features at a time, each computed again in the backward pass, so that memory
    does not grow with m.
    """
    with torch.autocast(q.device.type, enabled=False):
        T = q.size(2)
        dtype = torch.promote_types(q.dtype, torch.float32)
        q = q.to(dtype)
        k = k.to(dtype)
        values = torch.cat((v, torch.ones_like(v[..., :1])), -1).to(dtype)  # the last column gives the normaliser
        c = toeplitz_weights(b, T, causal).to(dtype)[:, None, None]  # (nh, 1, 1, 2T-1)
        column = circulant_column(c)  # (nh, 1, 1, 2T)
        shown = k if valid is None else k * valid[:, None, :, None]

        def part(q, k):
            kv = k.transpose(2, 3)[:, :, :, None] * values.transpose(2, 3)[:, :, None]  # (B, nh, g, hs+1, T)
            y = q.transpose(2, 3)[:, :, :, None] * CirculantProduct.apply(column, kv)
            return y.sum(2).transpose(2, 3)  # (B, nh, T, hs+1)

        numbers = 2 ** (25 if q.is_cuda else 18)  # in a group: what fills a GPU, or what fits into the cache of a CPU
        group = max(1, numbers // values.numel())
        y = 0
        for q_part, k_part in zip(q.split(group, -1), shown.split(group, -1)):
            y = y + checkpoint(part, q_part, k_part, use_reentrant=False, preserve_rng_state=False)
        if valid is not None:  # padding sees itself
            y = y + (q * (k - shown)).sum(-1, keepdim=True) * c[..., 0, T - 1:T] * values
        noise = 4 * torch.finfo(dtype).eps * y[..., -1:].detach().amax((2, 3), keepdim=True)
        return divide(y[..., :-1], y[..., -1:], noise).to(v.dtype)


def attend_sums(q, k, v, valid=None):
    """attend_dense without b, both sides, in O(T): all keys have the same weight, so that one sum serves every query.

    q, k (B, nh, T, m): features; v (B, nh, T, hs). valid (B, T) bool: False is padding. Returns (B, nh, T, hs).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    shown = k if valid is None else k * valid[:, None, :, None]
    kv = shown.transpose(2, 3) @ v  # (B, nh, m, hs)
    k_sum = shown.sum(2, dtype=wide)  # (B, nh, m)
    y = q @ kv
    with torch.autocast(q.device.type, enabled=False):
        total = q.to(wide) @ k_sum[..., None]  # (B, nh, T, 1)
        if valid is not None:  # padding sees itself
            own = (q * (k - shown)).sum(-1, keepdim=True, dtype=wide)
            y = y + own * v
            total = total + own
        return divide(y, total).to(v.dtype)


def relative_weights(bias, far):
    """exp(bias), and of each log-weight of far keys its exp, all divided by the largest of a row.

    bias (..., T, S): log-weights, -inf where a key is not seen. far: a list of log-weights (..., 1, 1).
    """
    largest = bias.detach().amax(-1, keepdim=True)  # (..., T, 1)
    for log_weight in far:
        largest = torch.maximum(largest, log_weight.detach())
    return (bias - largest).exp(), [(log_weight - largest).exp() for log_weight in far]


def attend_near_and_far(q, k, v, weights, far, near=lambda x: x):
    """Attention to near keys by a matrix, and to far keys, which share one weight, by their sums.

    q (..., T, m), near(k) (..., S, m), near(v) (..., S, hs), weights (..., T, S).
    far: a list of (weight (..., T, 1), sum of phi(k)^T v (..., m, hs), sum of phi(k) (..., 1, m)).
    """
    def near_sums(q, k, v, weights):
        att = (q @ near(k).transpose(-2, -1)) * weights  # (..., T, S)
        return att.to(v.dtype) @ near(v), att.sum(-1, keepdim=True)

    if torch.compiler.is_compiling():  # made again in the backward pass: a third less is kept for it
        y, total = checkpoint(near_sums, q, k, v, weights, use_reentrant=False, preserve_rng_state=False)
    else:
        y, total = near_sums(q, k, v, weights)
    for weight, kv, k_sum in far:
        y = y + weight * (q @ kv.to(q.dtype))
        total = total + weight * (q * k_sum).sum(-1, keepdim=True)
    return divide(y, total).to(v.dtype)


def attend_chunked(q, k, v, b, causal=True, valid=None, chunk=64):
    """The value of attend_dense in O(T): near chunks of keys by matrices, far ones by running sums. Arguments as there.

    Exact, because all keys at R tokens or more share one weight. With reach = 1 near chunk on each side:

        chunk of keys       0 1 2 3 4           n: near, the offsets differ: a matrix of chunk x 2 chunk weights
        queries, chunk 0    n                   f: far, one weight b_-R for all: sums of phi(k)^T v and phi(k)
                 chunk 1    n n
                 chunk 2    f n n               Without the causal mask also the mirror image, with b_R.
                 chunk 3    f f n n
                 chunk 4    f f f n n           Chunk 3 has the weights of chunk 2: without padding they are made once.
    """
    B, nh, T, m = q.shape
    R = b.size(-1) // 2
    n_chunks = -(-T // chunk)
    reach = min(max(0, -(-(R - 1) // chunk)), n_chunks - 1)  # all other chunks are at R tokens or more
    n_near = reach + 1 if causal else 2 * reach + 1
    filler = n_chunks * chunk - T
    q, k, v = [(F.pad(x, (0, 0, 0, filler)) if filler else x).unflatten(2, (n_chunks, chunk)) for x in (q, k, v)]

    def near(x):  # (B, nh, n_chunks, chunk, f) -> (B, nh, n_chunks, n_near chunk, f), zeros beyond the ends
        padded = F.pad(x, (0, 0, 0, 0, reach, n_near - reach - 1))
        return torch.cat([padded[:, :, r:r + x.size(2)] for r in range(n_near)], 3)

    def sum_before(x):  # running sums over the chunks before the near ones; the same shape
        return F.pad(x.cumsum(2), (0, 0, 0, 0, reach + 1, 0))[:, :, :x.size(2)]

    def sum_after(x):
        return sum_before(x.flip(2)).flip(2)

    few = n_chunks
    if valid is None:  # the weights are those of a short text, whose middle chunk stands for many
        few = min(n_chunks, reach + 3 if causal else 2 * reach + 3)
    seen = b.new_ones(1, few * chunk - filler, dtype=torch.bool) if valid is None else valid
    seen = F.pad(seen, (0, filler)).view(-1, 1, few, chunk, 1)
    shown = k if valid is None else k * seen

    def spread(x):  # (..., few, i, j) -> (..., n_chunks, i, j)
        middle = x[:, :, reach + 1:reach + 2].expand(-1, -1, n_chunks - few, -1, -1)
        return x if few == n_chunks else torch.cat((x[:, :, :reach + 1], middle, x[:, :, reach + 1:]), 2)

    i = torch.arange(chunk, device=q.device)[:, None]
    j = torch.arange(n_near * chunk, device=q.device) - reach * chunk
    see = near(seen).transpose(3, 4) | (i == j)  # (1 or B, 1, few, chunk, n_near chunk)
    if causal:
        see = see & (j <= i)
    bias = along_diagonals(b[:, None].expand(-1, chunk, -1), reach * chunk, n_near * chunk)[:, None]
    bias = bias.masked_fill(~see, float('-inf'))  # (1 or B, nh, few, chunk, n_near chunk)
    count = seen.sum(3, keepdim=True)  # (1 or B, 1, few, 1, 1)
    sides = ((b[:, 0], sum_before), (b[:, -1], sum_after))[:1 if causal else 2]
    ends = [end[:, None, None, None].masked_fill(add_up(count) == 0, float('-inf')) for end, add_up in sides]
    weights, ends = relative_weights(bias, ends)

    wide = torch.promote_types(q.dtype, torch.float32)
    kv = (shown.transpose(3, 4) @ v.to(shown.dtype)).to(wide)  # (B, nh, n_chunks, m, hs)
    k_sum = shown.sum(3, keepdim=True, dtype=wide)  # (B, nh, n_chunks, 1, m)
    far = [(spread(end), add_up(kv), add_up(k_sum)) for end, (_, add_up) in zip(ends, sides)]
    y = attend_near_and_far(q, k, v, spread(weights), far, near)  # (B, nh, n_chunks, chunk, hs)
    return y.view(B, nh, n_chunks * chunk, -1)[:, :, :T]


def attend_recurrent(q, k, v, b, valid, state):
    """The next T tokens of a text, causal, in time and memory that do not grow with its length.

    state keeps the last R keys and values, and of all keys before them kv (B, nh, m, hs) and k_sum (B, nh, 1, m), sums
    in at least float32. valid (B, all tokens so far) bool, or None: False is padding. A first piece is cheap at any
    length, a later one of T tokens makes a (T, R+T) matrix. Only `valid` grows. Returns (B, nh, T, hs).
    """
    T = q.size(2)
    if 'k' in state:
        k = torch.cat((state['k'], k), 2)  # (B, nh, S, m)
        v = torch.cat((state['v'], v), 2)
        S = k.size(2)
        bias = along_diagonals(b[:, None].expand(-1, T, -1), S - T, S)[None]  # (1, nh, T, S)
        if T > 1 or valid is not None:
            near = None if valid is None else valid[:, -S:]
            bias = bias.masked_fill(~visible(T, S, True, near, q.device), float('-inf'))  # (B, nh, T, S)
        ends = [b[:, :1, None]] if state['far'] else []  # (nh, 1, 1)
        if ends and valid is not None:
            seen = valid[:, :-S].any(1)[:, None, None, None]  # whether there is a far key
            ends = [ends[0].masked_fill(~seen, float('-inf'))]  # (B, nh, 1, 1)
        weights, ends = relative_weights(bias, ends)
        y = attend_near_and_far(q, k, v, weights, [(end, state['kv'], state['k_sum']) for end in ends])
    else:
        y = attend_chunked(q, k, v, b, True, valid)
    S = k.size(2)
    old = max(0, S - b.size(-1) // 2)  # keys at R tokens or more from all that follows
    if old or 'kv' not in state:
        with torch.autocast(k.device.type, enabled=False):  # a sum in bfloat16 would soon stop growing
            wide = torch.promote_types(k.dtype, torch.float32)
            shown = k[:, :, :old].to(wide)
            if valid is not None:
                shown = shown * valid[:, -S:][:, None, :old, None]
            state['kv'] = state.get('kv', 0) + shown.transpose(2, 3) @ v[:, :, :old].to(wide)
            state['k_sum'] = state.get('k_sum', 0) + shown.sum(2, keepdim=True)
            state['far'] = state.get('far', 0) + old  # how many keys are in the sums
        k = k[:, :, old:]
        v = v[:, :, old:]
    state['k'] = k.clone() if T > 1 else k  # a clone, or the whole of a long piece would be kept
    state['v'] = v.clone() if T > 1 else v
    return y
