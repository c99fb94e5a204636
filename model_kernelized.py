"""
Kernelized attention with relative positions: a Toeplitz matrix by FFT in O(T log T), and beyond the paper in O(T).

Luo, Li, Cai, He, Peng, Zheng, Ke, Wang, Liu, "Stable, Fast and Accurate: Kernelized Attention with Relative Positional
Encoding", NeurIPS 2021. https://arxiv.org/abs/2106.12566

    z_i = phi(q_i) sum_j e^{b_{j-i}} phi(k_j)^T v_j  /  phi(q_i) sum_j e^{b_{j-i}} phi(k_j)^T          (equation 10)

Random features phi turn the exponential of a dot product into a dot product, exp(q.k) ~ phi(q).phi(k), so that the sums
over the keys can be computed first. Relative positions multiply each weight by C_ij = e^{b_{j-i}}. C is a Toeplitz
matrix, and a Toeplitz matrix times a vector is a convolution: an FFT computes it. With q and k divided by their L2 norm
(Algorithm 1), the error of the features stays small and training is stable; b then sharpens the attention.
--no-normalize --no-rpe is plain random-feature attention (Performer), with q and k divided by hs^(1/4).

Glossary (paper = code): m = n_features, w_1 ... w_m = w, b = b, one per head; n = T, d = hs (channels per head).
Departures: each layer has its own b; the random matrix is drawn once per layer, shared by the heads, and kept. Offsets
beyond +-max_distance share the end entries of b. If max_distance >= block_size, b is that of the paper, but training
never reaches its end entries: to decode longer sequences, train with a smaller max_distance.
Forms, all with the same result up to rounding: equation() as loops, attend_dense as matrices, attend_fft (the paper's
algorithm), attend_chunked in O(T) for a fixed max_distance, attend_recurrent for decoding. They equal softmax attention
only in the limit of many features. In float32 the visible entries of b may span about 80 nats. The error of the FFT is
1e-7 of the largest sum: much smaller sums are inaccurate and may depend on later tokens. This happens if a causal b
favors far offsets by more than about 5 nats, and with --no-normalize. `auto` never takes the FFT.
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
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 128  # channels of the residual stream, a multiple of n_head
    dropout: float = 0.0  # applied to the embedding and to the output of each branch
    bias: bool = False  # biases in Linear and LayerNorm
    causal: bool = True  # False: every token attends to every token (masked language model)
    absolute: bool = False  # learned absolute positions, added to the embedding
    init_std: float = 0.02  # standard deviation of the initial Linear and Embedding weights
    scale_residual_init: bool = True  # scale the residual projections by 1/sqrt(2 n_layer), as GPT-2 does
    # the position scheme
    n_features: int = 64  # random features m; trf computes two of each, elu does not use them
    feature_map: Literal['prf', 'trf', 'orf', 'sphere', 'elu'] = 'prf'  # see features()
    normalize: bool = True  # divide queries and keys by their L2 norm; otherwise by hs^(1/4)
    rpe: bool = True  # relative positions b_{j-i}
    max_distance: int = 128  # R: offsets beyond +-R share the end entries of b
    attention: Literal['auto', 'dense', 'fft', 'chunked'] = 'auto'  # auto: dense, or chunked for long sequences


def equation(attention, x):
    """Equation 10, one query and one key at a time: x (B, T, C) -> (B, T, C)."""
    B, T, C = x.shape
    q, k, v = [z.view(B, T, attention.n_head, -1) for z in attention.c_attn(x).split(C, 2)]  # (B, T, nh, hs)
    b = x.new_zeros(attention.n_head, 1) if attention.b is None else attention.b
    R = b.size(1) // 2

    def phi(x):  # (B, nh, hs) -> (B, nh, m)
        x = x / x.norm(dim=-1, keepdim=True) if attention.normalize else x / x.size(-1) ** 0.25
        if attention.kind == 'elu':
            return torch.where(x > 0, x + 1, x.exp())
        wx = torch.stack([(w * x).sum(-1) for w in attention.w], -1)
        half_square = (x * x).sum(-1, keepdim=True) / 2
        if attention.kind == 'trf':
            return half_square.exp() * torch.cat((wx.sin(), wx.cos()), -1) / math.sqrt(len(attention.w))
        return (wx - half_square).exp() / math.sqrt(len(attention.w))

    y = torch.zeros_like(v)
    for i in range(T):
        keys = range(i + 1 if attention.causal else T)
        weights = [(phi(q[:, i]) * phi(k[:, j])).sum(-1) * b[:, max(-R, min(R, j - i)) + R].exp() for j in keys]
        y[:, i] = sum(weights[j][..., None] * v[:, j] for j in keys) / sum(weights)[..., None]
    return attention.c_proj(y.view(B, T, C))


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
    """phi with E[phi(x).phi(y)] = exp(x.y): x (..., hs), w (m, hs) -> (..., m), in the dtype of x.

    prf: exp(w.x - |x|^2 / 2) / sqrt(m), positive; orf and sphere are prf with another w (sphere: unbiased for large hs
    only). trf: exp(|x|^2 / 2) [sin(w.x), cos(w.x)] / sqrt(m), (..., 2m), signed; it overflows for |x| > 13.
    elu: elu(x) + 1 (Katharopoulos et al. 2020), (..., hs), not an estimate of exp(x.y).
    stable: drop a factor per query, which cancels in equation 10 (a factor per key would not): nothing overflows.
    normalize: x / |x| first (Algorithm 1): bfloat16 is then enough, otherwise use float32. Squares overflow float16.
    """
    square = x.square().sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))  # |x|^2 (..., 1)
    if normalize:
        x = x * square.clamp_min(1e-8).rsqrt().to(x.dtype)  # norm at least 1e-4: bounds the gradient
        square = x.new_ones(1)
    if kind == 'elu':
        return F.elu(x) + 1
    wx = x.contiguous() @ w.to(x.dtype).T  # (..., m)
    if kind == 'trf':
        waves = torch.cat((wx.sin(), wx.cos()), -1) / math.sqrt(w.size(0))
        return waves if stable else waves * (square / 2).exp()
    shift = wx.detach().amax(-1, keepdim=True) if stable else square / 2
    return (wx - (shift + math.log(w.size(0)) / 2)).exp()


def along_diagonals(kernel, past, n, future=None):
    """Write each row's kernel along the diagonals of a matrix ("skewing"): (..., T, 2k+1) -> (..., T, n).

    Row i is the token at position past + i. Column j gets the entry of offset clip(j - past - i, -k, k), or `future`
    (if given) at positive offsets. For three rows with the kernels abc, def, ghi (k = 1), past = 0 and n = 3:

        ends repeated        flat, from element T-1 on, in rows of T + n - 1 = 5        first n columns
        a a b c c c          b c c c d                                                  b c c
        d d e f f f          d e f f f                                                  d e f
        g g h i i i          g g h i i                                                  g g h
    """
    T, k = kernel.size(-2), kernel.size(-1) // 2
    left, right = T - 1 + past - k, n - past - k  # repeats of the end entries; negative: entries to drop
    first = kernel[..., :1].expand(*kernel.shape[:-1], max(left, 0))
    middle = kernel[..., max(-left, 0):2 * k + 1 - max(-right, 0) if future is None else k + 1]
    last = kernel[..., -1:] if future is None else kernel.new_full((1,), future)
    last = last.expand(*kernel.shape[:-1], max(right, 0) if future is None else n - past)
    rows = torch.cat((first, middle, last), -1)  # (..., T, T+n); the row stride T+n-1 then shifts each row by one
    return rows.as_strided((*rows.shape[:-1], n), (*rows.stride()[:-2], T + n - 1, 1), T - 1)


def relative_weights(b, causal):
    """e^b divided by its largest visible entry (cancels in equation 10): b (nh, 2R+1) -> (nh, 2R+1)."""
    R = b.size(-1) // 2
    visible = b[:, :R + 1] if causal else b
    c = (visible - visible.detach().amax(-1, keepdim=True)).exp()
    return F.pad(c, (0, R)) if causal else c


def divide(y):
    """Divide by the normalizer, the last column; where all features have underflowed, the result is 0 and not nan."""
    total = y[..., -1:]
    return y[..., :-1] / total.masked_fill(total.abs() <= 1e-30, math.inf)


def attend_dense(q, k, v, b, causal=True, valid=None):
    """Kernelized attention with relative positions (equation 10) as (T, T) matrices.

    q, k (B, nh, T, m): features; v (B, nh, T, hs). b (nh, 2R+1): the log-weight of offset j - i is entry
    clip(j - i, -R, R) + R. valid (B, T) bool: False marks padding, visible only to itself. Returns (B, nh, T, hs).
    """
    T = q.size(2)
    c = relative_weights(b, causal).to(q.dtype)
    toeplitz = along_diagonals(c[:, None].expand(-1, T, -1), 0, T, 0.0 if causal else None)  # (nh, T, T)
    att = (q @ k.transpose(-2, -1)) * toeplitz  # (B, nh, T, T)
    if valid is not None:
        att = att * (valid[:, None, None] | torch.eye(T, dtype=torch.bool, device=q.device))
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)  # the last column gives the normalizer
    return divide(att.to(v.dtype) @ values)


def toeplitz_fft(c, x):
    """sum_j c_{j-i} x_j in O(T log T): c (..., 2T-1), offsets 1-T ... T-1, and x (..., T) -> (..., T).

    A Toeplitz matrix is the upper left part of a circulant matrix of twice the size, here for T = 3:

        c0  c1  c2 |  0  c-2 c-1
        c-1 c0  c1 |  c2  0  c-2        A circulant matrix times a vector is the circular convolution of its first
        c-2 c-1 c0 |  c1  c2  0         column with the vector (x and zeros): in Fourier space a product.
    """
    T = x.size(-1)
    column = torch.cat((c[..., :T].flip(-1), torch.zeros_like(c[..., :1]), c[..., T:].flip(-1)), -1)  # (..., 2T)
    return torch.fft.irfft(torch.fft.rfft(column) * torch.fft.rfft(x, 2 * T), 2 * T)[..., :T]


@torch.compiler.disable  # torch.compile generates no code for complex numbers
def attend_fft(q, k, v, b, causal=True, valid=None, group=8):
    """The same result as attend_dense in O(T log T) (section 3.2), in float32, `group` features at a time."""
    with torch.autocast(q.device.type, enabled=False):
        T = q.size(2)
        q, k, values = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
        values = torch.cat((values, torch.ones_like(values[..., :1])), -1)  # (B, nh, T, hs+1)
        visible_k = k if valid is None else k * valid[:, None, :, None]
        c = along_diagonals(relative_weights(b, causal).to(q.dtype)[:, None], T - 1, 2 * T - 1, 0.0 if causal else None)

        def part(q, k):  # (B, nh, T, g) -> (B, nh, T, hs+1)
            kv = torch.einsum('bhjm,bhjd->bhmdj', k, values)  # (B, nh, g, hs+1, T): phi(k_j)^T v_j
            return torch.einsum('bhim,bhmdi->bhid', q, toeplitz_fft(c[:, None], kv))

        y = 0
        for q_part, k_part in zip(q.split(group, -1), visible_k.split(group, -1)):  # recomputed in the backward pass
            y = y + checkpoint(part, q_part, k_part, use_reentrant=False, preserve_rng_state=False)
        if valid is not None:  # padding attends to itself
            y = y + (q * (k - visible_k)).sum(-1, keepdim=True) * c[:, :, T - 1:T] * values
        return divide(y).to(v.dtype)


class Attention(nn.Module):
    """Kernelized self-attention with a learned weight for each offset."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        if config.n_features < 1 or config.max_distance < 0:
            raise ValueError('n_features must be positive, and max_distance must not be negative')
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
        with torch.autocast(x.device.type, enabled=False):
            if self.normalize:
                q, k = features(qk, self.w, self.kind, normalize=True)  # each (B, nh, T, m)
            else:
                q, k = qk.to(torch.promote_types(qk.dtype, torch.float32)) * qk.size(-1) ** -0.25
                q = features(q, self.w, self.kind, stable=True).to(v.dtype)
                k = features(k, self.w, self.kind).to(v.dtype)
        b = self.w.new_zeros(self.n_head, 1) if self.b is None else self.b
        long = T >= max(512 if self.causal else 1024, b.size(1))  # from there on chunks are faster on a CPU
        if state is not None:
            y = attend_recurrent(q, k, v, b, state)
        elif self.attention == 'fft':
            y = attend_fft(q, k, v, b, self.causal, valid)
        elif self.attention == 'chunked' or (self.attention == 'auto' and long):
            y = attend_chunked(q, k, v, b, self.causal, valid, 128 if x.is_cuda else 64)
        else:
            y = attend_dense(q, k, v, b, self.causal, valid)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):  # MLP, Block and Model are identical in every model file, but for lines of a scheme
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
        return x + self.drop(self.mlp(self.ln_2(x)))


class Model(nn.Module):
    """A GPT-2 (causal) or a pre-norm BERT (not causal) with the Attention above."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.absolute else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.apply(self.init_weights)
        for name, p in self.named_parameters():
            if config.scale_residual_init and name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=config.init_std / math.sqrt(2 * config.n_layer))

    def init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def new_state(self):
        """An empty cache for decoding: one dict per layer, filled by forward(..., state=...)."""
        return [{'seen': 0} for _ in self.h]

    def hidden(self, idx, valid=None, state=None):
        """Token ids (B, T) int64 -> hidden states (B, T, C) after the last LayerNorm.

        valid (B, T) bool: False marks padding, invisible to other tokens; absolute positions start after it.
        state: the cache from new_state(); idx then holds only the new tokens. Raises ValueError for a state with
        padding or causal=False, and for more than block_size tokens with absolute=True.
        """
        T = idx.size(1)
        past = 0 if state is None else state[0]['seen']  # tokens in the cache
        if state is not None and (valid is not None or not self.config.causal):
            raise ValueError('decoding from a state needs causal=True and no padding (valid=None)')
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            if past + T > self.config.block_size:
                raise ValueError(f'absolute positions: {past + T} tokens exceed block_size={self.config.block_size}')
            first = 0 if valid is None else valid.int().argmax(1, keepdim=True)  # index of the first real token, (B, 1)
            pos = (torch.arange(past, past + T, device=idx.device) - first).clamp_min(0)  # (T,) or (B, T)
            x = x + self.wpe(pos)
        x = self.drop(x)
        for i, block in enumerate(self.h):
            x = block(x, valid, None if state is None else state[i])
            if state is not None:
                state[i]['seen'] += T
        return self.ln_f(x)

    def forward(self, idx, targets=None, where=None, valid=None, state=None):
        """Returns logits (B, T, vocab_size), and None or, with targets, the mean cross entropy in nats.

        targets (B, T) int64: -1 is ignored. where (B, M) int64: positions to predict (masked language model);
        logits are then (B, M, vocab_size) and targets (B, M). idx, valid, state: see hidden().
        """
        x = self.hidden(idx, valid, state)
        if where is not None:
            x = x.gather(1, where[..., None].expand(-1, -1, x.size(2)))  # (B, M, C)
        logits = F.linear(x, self.wte.weight)  # the output head shares the embedding's weights
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits.detach(), loss  # detached logits make a compiled backward pass smaller


# ---------------------------------------------------------------------------------------------------------------------
# Not in the paper: chunks in O(T), and decoding from a state of constant size.

def attend_chunked(q, k, v, b, causal=True, valid=None, chunk=64):
    """The same result as attend_dense in O(T): near chunks of keys as matrices, far chunks as running sums.

    Exact, because all keys R or more tokens away share one weight. Rows: chunks of queries; columns: chunks of keys.
    With one near chunk on the left (n_left = 1):

        n               n: near, one matrix of chunk x 2 chunk weights, the same for every row (Toeplitz)
        n n             f: far, one weight c_-R for all keys: phi(q_i) times the running sum of phi(k_j)^T v_j
        f n n
        f f n n         Without the causal mask also the mirror image, with c_R.
    """
    T, R = q.size(2), b.size(-1) // 2
    n, filler = -(-T // chunk), -T % chunk  # chunks, and zero tokens that complete the last one
    n_left = max(0, -(-(R - 1) // chunk))  # near chunks on the left; all others are R or more tokens away
    n_near = n_left + 1 if causal else 2 * n_left + 1
    c = relative_weights(b, causal).to(q.dtype)  # (nh, 2R+1)
    c_rows = c[:, None].expand(-1, chunk, -1)  # (nh, chunk, 2R+1)
    toeplitz = along_diagonals(c_rows, n_left * chunk, n_near * chunk, 0.0 if causal else None)
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)  # the last column gives the normalizer
    visible_k = k if valid is None else k * valid[:, None, :, None]
    qs, ks, vs = [F.pad(x, (0, 0, 0, filler)).unflatten(2, (n, chunk)) for x in (q, visible_k, values)]

    def near(x):  # (B, nh, n, chunk, f) -> (B, nh, n, n_near * chunk, f): each chunk with its neighbors
        x = F.pad(x, (0, 0, 0, 0, n_left, n_near - n_left - 1))
        return torch.cat([x[:, :, r:r + n] for r in range(n_near)], 3)

    def sum_before(x):  # running sum over the chunks before the near ones
        return F.pad(x.cumsum(2), (0, 0, 0, 0, n_left + 1, 0))[:, :, :n].to(q.dtype)

    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    att = (qs @ near(ks).transpose(-2, -1)) * toeplitz[:, None]  # (B, nh, n, chunk, n_near * chunk)
    y = (att @ near(vs)).to(acc_dtype)  # (B, nh, n, chunk, hs+1)
    sums = (ks.transpose(-2, -1) @ vs).to(acc_dtype)  # (B, nh, n, m, hs+1)
    y = y + c[:, :1, None, None] * (qs @ sum_before(sums))
    if not causal:
        y = y + c[:, -1:, None, None] * (qs @ sum_before(sums.flip(2)).flip(2))
    y = y.flatten(2, 3)[:, :, :T]
    if valid is not None:  # padding attends to itself
        y = y + (q * (k - visible_k)).sum(-1, keepdim=True) * c[:, R, None, None] * values
    return divide(y).to(v.dtype)


def attend_recurrent(q, k, v, b, state):
    """The next T tokens of a causal sequence, in time and memory that do not grow with its length.

    Shapes as in attend_dense. state holds the last R keys and values, the weights c, and kv (B, nh, m, hs+1): the sum
    of phi(k_j)^T v_j over all keys before them.
    """
    T, R = q.size(2), b.size(-1) // 2
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    if 'kv' not in state:  # the first call has the whole prompt
        y = attend_chunked(q, k, v, b)
        state['c'] = relative_weights(b, True).to(q.dtype)  # (nh, 2R+1)
    else:
        k, values = [torch.cat((state[name], x), 2) for name, x in (('k', k), ('values', values))]  # (B, nh, S, ...)
        toeplitz = along_diagonals(state['c'][:, None].expand(-1, T, -1), k.size(2) - T, k.size(2), 0.0)
        near = ((q @ k.transpose(-2, -1)) * toeplitz) @ values  # (B, nh, T, hs+1)
        y = divide(near.to(acc_dtype) + state['c'][:, :1, None] * (q.to(acc_dtype) @ state['kv'])).to(v.dtype)
    old = max(0, k.size(2) - R)  # keys R or more tokens away from all that follow
    with torch.autocast(q.device.type, enabled=False):  # in bfloat16 long sums lose precision
        kv = k[:, :, :old].transpose(-2, -1).to(acc_dtype) @ values[:, :, :old].to(acc_dtype)
    state['kv'] = state.get('kv', 0) + kv
    for name, x in (('k', k), ('values', values)):
        state[name] = x[:, :, old:].clone() if T > 1 else x[:, :, old:]  # a view would hold the whole prompt
    return y
