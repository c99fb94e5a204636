"""
Convolutions at every injection point of self-attention, and in its place.

Chang, Xu, Xu, Tu, "Convolutions and Self-Attention: Re-interpreting Relative Positions in Pre-trained Language Models",
ACL 2021. https://arxiv.org/abs/2106.05505

    depthwise convolution            y_ic = sum_o beta_oc x_{i+o,c}              a kernel per channel (equation 2)
    lightweight convolution          y_ic = sum_o beta_o  x_{i+o,c}              a kernel per head (equation 3)
    dynamic convolution              y_ic = sum_o (q_i.W_o) x_{i+o,c}            a kernel per head and token (Wu et al. 2019)

Where they enter, each a switch of its own:

    lightweight, dynamic   in the scores: a_ij = q_i.k_j / sqrt(hs) + beta_{j-i} + q_i.W_{j-i} / sqrt(hs)   (equations 4, 5)
    queries_keys, values   in half the heads a depthwise-separable convolution (depthwise, then the Linear) makes them
    output                 softmax(a) v + depthwise(v)                                                  (equation 7)
    mixer                  'lightweight' or 'dynamic': in place of attention, softmax-normalised over its width (Wu et al.)

With a mixer the kernels of the scores have no place, and --no-output makes it the convolution alone. In a causal model
the convolutions have all their kernel_size taps in the past; in the scores, as in model_composite.py, offsets beyond
+-k share the end entry and the future is masked. Departures from the papers: pre-norm blocks, no dropout on the
attention weights, no bias in the depthwise convolutions, the dynamic kernel of a mixer is made by the query and its W
shared by the heads. The default, scores and output, ended lowest of eight combinations, causal and masked
(experiments/README.md). Plain forms: loops and banded Toeplitz matrices in test_equivalence.py. Fast forms: conv1d for the
depthwise convolution (4.6 times faster than shifts on a CPU), attend_fast (as in model_composite.py) for the scores.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F


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
    kernel_size: int = 17  # entries of a kernel, odd; 2k+1 offsets -k ... k, or 2k+1 taps in the past
    lightweight: bool = True  # learned kernel in the scores
    dynamic: bool = True  # query-made kernel in the scores
    queries_keys: bool = False  # convolution makes the queries and keys of half the heads
    values: bool = False  # convolution makes the values of half the heads
    output: bool = True  # convolution of the values, added after the softmax
    mixer: Literal['attention', 'lightweight', 'dynamic'] = 'attention'  # attention, or a convolution in its place
    attention: Literal['auto', 'dense', 'fast'] = 'auto'  # with a (T, T) matrix or without (not for padding, key-made kernels, decoding); auto: without from 256 tokens and 8 kernels on


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


def attend_dense(q, k, v, table, causal=True, valid=None, key_table=None):
    """Softmax attention whose scores get a number for each clipped offset (equation 6).

    q (B, nh, T, hs), k and v (B, nh, S, hs), S >= T: the queries are the last T of S tokens.
    table (B, nh, T, 2k+1): added to the score of query i and key j at entry clip(j - i, -k, k) + k; B may be 1.
    key_table (B, nh, S, 2k+1): likewise made by the keys, at entry clip(i - j, -k, k) + k.
    valid (B, S) bool: False is padding. Returns (B, nh, T, hs). Time and memory O(T S).
    """
    T, S = q.size(2), k.size(2)
    att = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, hs) x (B, nh, hs, S) -> (B, nh, T, S)
    att = att + spread(table, S - T, S)
    if key_table is not None:
        att = att + spread(key_table, T - S, T).transpose(-2, -1)
    att = att.masked_fill(~visible(T, S, causal, valid, q.device), float('-inf')).softmax(-1)
    return att.to(v.dtype) @ v  # (B, nh, T, S) x (B, nh, S, hs) -> (B, nh, T, hs)


def shifted(x, offset):
    """Row i of the result is row i + offset of x (B, nh, T, hs), zero beyond the ends; |offset| < T."""
    return F.pad(x, (0, 0, -offset, offset))


def near_scores(q, k, near, first):
    """q_i.k_{i+o} / sqrt(hs) + near_io for the offsets o = first, first+1, ...: (B, nh, T, W), -inf beyond the ends."""
    T, offsets = q.size(2), range(first, first + near.size(-1))
    s = torch.stack([(q * shifted(k, o)).sum(-1) for o in offsets], -1) / math.sqrt(q.size(-1)) + near
    j = torch.arange(T, device=q.device)[:, None] + torch.arange(first, offsets.stop, device=q.device)  # (T, W)
    return s.masked_fill((j < 0) | (j >= T), float('-inf'))


def rows_in_order(*tensors):
    """The flash kernels read channels side by side, and do not check that they are."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def flash(q, k, v, far):
    """Softmax attention of every query to the keys at least `far` tokens before it, by torch's own flash kernels.

    q, k, v (B, nh, T, hs) -> (B, nh, T, hs), its log-sum-exp (B, nh, T) in nats, and what the kernel's backward asks for.
    """
    q, k, v = rows_in_order(q[:, :, far:], k[:, :, :-far], v[:, :, :-far])
    if q.is_cuda:  # output, log-sum-exp, two unused, two lengths, two for dropout's random numbers, a debug mask
        y, lse, _, _, _, _, *rng, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    else:
        (y, lse), rng = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True), []
    return F.pad(y, (0, 0, far, 0)), F.pad(lse, (far, 0), value=float('-inf')), rng  # the first queries see nothing so far


def flash_backward(dy, q, k, v, y, lse, far, rng):
    """Gradients of q, k, v (B, nh, T, hs) through the weights exp(q_i.k_j / sqrt(hs) - lse_i) of flash(): lse may count more keys."""
    dy, q, y, k, v = rows_in_order(dy[:, :, far:], q[:, :, far:], y[:, :, far:], k[:, :, :-far], v[:, :, :-far])
    lse, n = lse[:, :, far:].contiguous(), q.size(2)
    if q.is_cuda:
        d = torch.ops.aten._scaled_dot_product_flash_attention_backward(dy, q, k, v, y, lse, None, None, n, n, 0.0, True, *rng)
    else:
        d = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dy, q, k, v, y, lse, 0.0, True)
    return F.pad(d[0], (0, 0, far, 0)), F.pad(d[1], (0, 0, 0, far)), F.pad(d[2], (0, 0, 0, far))


class FarNear(torch.autograd.Function):
    """Attention as flash attention to the far keys and a dynamic convolution over the near ones, one softmax over all.

    near (B, nh, T, W) is added to the scores at offsets 1-far, 2-far, ...; right (B, nh, T), or None if causal, to those
    from +far on. The forward pass joins the parts by their log-sum-exps. Given the log-sum-exp of all keys, the weights
    of any part are exp(score - lse) and its gradients need nothing of the others, so the backward pass runs part by part; the
    right part's scores have `right` added, exp(q.k + right - lse), which is its flash kernel's exp(q.k - lse) at lse - right.
    """

    @staticmethod
    def forward(ctx, q, k, v, near, right, far):
        wide = near.dtype  # sums in at least float32
        s = near_scores(q.to(wide), k.to(wide), near, 1 - far)  # (B, nh, T, W)
        left, lse, rng = flash(q, k, v, far)
        parts = [(left, lse.to(wide))]
        if right is not None:  # the mirror image
            y, lse, more = flash(q.flip(2), k.flip(2), v.flip(2), far)
            parts.append((y.flip(2), lse.flip(2).to(wide) + right))
            rng = rng + more
        lse = torch.cat([s, *(l[..., None] for _, l in parts)], -1).logsumexp(-1)  # (B, nh, T)
        p = (s - lse[..., None]).exp()
        y = sum(p[..., r:r + 1] * shifted(v, r + 1 - far) for r in range(p.size(-1)))
        y = (y + sum((l - lse).exp()[..., None] * o for o, l in parts)).to(v.dtype)
        ctx.far = far
        ctx.save_for_backward(q, k, v, near, right, y, lse, *(parts[1] if right is not None else (None, None)), *rng)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        far = ctx.far
        q, k, v, near, right, y, lse, y_right, l_right, *rng = ctx.saved_tensors
        d_far = flash_backward(dy, q, k, v, y, lse, far, rng[:2])
        wide = near.dtype
        Q, K, V, dY = q.to(wide), k.to(wide), v.to(wide), dy.to(wide)
        mean = (dY * y).sum(-1)  # (B, nh, T): of the weights' gradients, under the weights
        p = (near_scores(Q, K, near, 1 - far) - lse[..., None]).exp()
        offsets = [(r, r + 1 - far) for r in range(p.size(-1))]
        ds = p * (torch.stack([(dY * shifted(V, o)).sum(-1) for _, o in offsets], -1) - mean[..., None])  # (B, nh, T, W)
        scaled = ds / math.sqrt(q.size(-1))
        dq = sum(scaled[..., r:r + 1] * shifted(K, o) for r, o in offsets)
        dk = sum(shifted(scaled[..., r:r + 1] * Q, -o) for r, o in offsets)
        dv = sum(shifted(p[..., r:r + 1] * dY, -o) for r, o in offsets)
        d_right = None
        if right is not None:
            d_right = (l_right - lse).exp() * ((dY * y_right).sum(-1) - mean)
            mirrored = flash_backward(*(t.flip(2) for t in (dy, q, k, v, y, lse - right)), far, rng[2:])
            d_far = [d + m.flip(2) for d, m in zip(d_far, mirrored)]
        return *((d + f).to(q.dtype) for d, f in zip((dq, dk, dv), d_far)), ds, d_right, None


def has_flash(q):
    """Whether torch has a flash kernel for q (B, nh, T, hs): on a CPU always, on a CUDA GPU in half precision."""
    return q.device.type == 'cpu' or q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.size(-1) % 8 == 0 and q.size(-1) <= 256


def attend_fast(q, k, v, table, causal=True):
    """The value of attend_dense in memory O(T (hs + k)): no (T, T) tensor, forward or backward. q, k, v (B, nh, T, hs), no padding.

    Clipping makes all tokens at distance >= k alike, and a softmax does not notice a number added to its whole row: less
    the end entry, the far scores are plain q_i.k_j. ValueError where has_flash(q) is False.
    """
    if not has_flash(q):
        raise ValueError(f'attend_fast wants a CPU, or a CUDA GPU with bfloat16 or float16 and heads of 8, 16, ... 256 channels; '
                         f'got {q.dtype}, heads of {q.size(-1)}, on {q.device.type}')
    if table.size(-1) == 1:  # all offsets share the one entry
        table = table.expand(*table.shape[:-1], 3)
    far = table.size(-1) // 2
    if q.size(2) <= far:  # nobody is far
        return attend_dense(q, k, v, table, causal)
    table = table.to(torch.promote_types(q.dtype, torch.float32)).expand(q.size(0), -1, -1, -1)
    near = table[..., 1:far + 1 if causal else -1] - table[..., :1]
    return FarNear.apply(q, k, v, near, None if causal else table[..., -1] - table[..., 0], far)


def dynamic_conv(x, w, causal=True, past=0):
    """Dynamic convolution (Wu et al. 2019): every token brings its own kernel, shared by the channels of a head.

    x (B, nh, past + T, hs): the first `past` tokens come before the outputs. w (B or 1, nh, T or 1, K): entry r weighs the
    token at offset r - (K-1) where causal, else r - K//2; beyond the ends x is zero. Returns (B, nh, T, hs).
    """
    K, T = w.size(-1), x.size(2) - past
    left = K - 1 if causal else K // 2
    x = F.pad(x, (0, 0, left - past, K - 1 - left))  # (B, nh, T+K-1, hs); drops what no kernel reaches
    return sum(w[..., r:r + 1] * x[:, :, r:r + T] for r in range(K))


def lightweight_conv(x, w, causal=True, past=0):
    """Lightweight convolution (equation 3): x (B, nh, past + T, hs), w (nh, K), a kernel per head; else as dynamic_conv."""
    return dynamic_conv(x, w[None, :, None], causal, past)


def depthwise_conv(x, w, causal=True, past=0):
    """Depthwise convolution (equation 2): x (B, past + T, C), w (C, K), a kernel per channel; else as dynamic_conv -> (B, T, C)."""
    K = w.size(-1)
    left = K - 1 if causal else K // 2
    x = F.pad(x.transpose(1, 2), (left - past, K - 1 - left))  # (B, C, T+K-1)
    return F.conv1d(x, w[:, None], groups=x.size(1)).transpose(1, 2)


def remember(state, name, x, keep):
    """x (..., T, c) -> x behind the rows that the state holds of earlier tokens, and their number; the state keeps the newest."""
    if state is None:
        return x, 0
    past = state[name].size(-2) if name in state else 0
    x = torch.cat((state[name], x), -2) if past else x
    state[name] = x[..., max(0, x.size(-2) - keep):, :]
    return x, past


class Attention(nn.Module):
    """Self-attention with convolutions before, inside and behind its softmax, or a convolution instead."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        if config.kernel_size < 1 or config.kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and positive, not {config.kernel_size}')
        if (config.queries_keys or config.values) and config.n_head < 2:
            raise ValueError('queries_keys and values convolve in half the heads: n_head must be at least 2')
        if config.queries_keys and config.mixer == 'lightweight':
            raise ValueError('queries_keys needs queries or keys, and the mixer lightweight has neither')
        if config.mixer not in ('attention', 'lightweight', 'dynamic'):
            raise ValueError(f'mixer must be attention, lightweight or dynamic, not {config.mixer!r}')
        if config.attention not in ('auto', 'dense', 'fast'):
            raise ValueError(f'attention must be auto, dense or fast, not {config.attention!r}')
        self.n_head, self.causal, self.kernel_size = config.n_head, config.causal, config.kernel_size
        self.mixer, self.attention, hs = config.mixer, config.attention, config.n_embd // config.n_head
        self.half = config.n_head // 2 * hs  # channels of the heads whose q, k or v are convolved
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

        K, a, attention = config.kernel_size, config.kernel_size ** -0.5, config.mixer == 'attention'
        uniform = lambda wanted, *shape: nn.Parameter(torch.empty(*shape).uniform_(-a, a)) if wanted else None  # as Conv1d
        lightweight = config.lightweight if attention else config.mixer == 'lightweight'
        self.lightweight = nn.Parameter(torch.zeros(config.n_head, K)) if lightweight else None
        self.dynamic = uniform(config.dynamic if attention else config.mixer == 'dynamic', K, hs)  # shared by the heads
        self.conv_q = uniform(config.queries_keys, config.n_embd, K)
        self.conv_k = uniform(config.queries_keys and attention, config.n_embd, K)
        self.conv_v = uniform(config.values, config.n_embd, K)
        self.conv_out = uniform(config.output, config.n_embd, K)

    def forward(self, x, valid=None, state=None):
        B, T, C = x.shape
        seen, past = remember(state, 'x', x if valid is None else x * valid[..., None], self.kernel_size - 1)
        parts = list(self.c_attn(x).split(C, 2))  # 3 x (B, T, C)
        for i, kernel in enumerate((self.conv_q, self.conv_k, self.conv_v)):
            if kernel is not None:
                rows = slice(i * C, i * C + self.half)
                bias = None if self.c_attn.bias is None else self.c_attn.bias[rows]
                mixed = F.linear(depthwise_conv(seen, kernel, self.causal, past), self.c_attn.weight[rows], bias)
                parts[i] = torch.cat((mixed, parts[i][..., self.half:]), 2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in parts)  # (B, nh, T, hs)
        flow, before = remember(state, 'flow', v if valid is None else v * valid[:, None, :, None], self.kernel_size - 1)
        if self.mixer == 'lightweight':
            y = lightweight_conv(flow, self.lightweight.softmax(-1), self.causal, before)
        elif self.mixer == 'dynamic':
            y = dynamic_conv(flow, (q @ self.dynamic.T).softmax(-1), self.causal, before)
        else:
            if state is not None:  # decoding: the keys and values of the past come first
                k, v, valid = (torch.cat((state[name], t), dim) if name in state else t
                               for name, t, dim in (('k', k, 2), ('v', v, 2), ('valid', valid, 1)))
                state.update(k=k, v=v, valid=valid)
            if self.lightweight is None and self.dynamic is None:  # no kernel in the scores
                mask = None if valid is None else visible(T, k.size(2), self.causal, valid, x.device)
                y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
            else:
                table = x.new_zeros(1, self.n_head, T, self.kernel_size)  # (1, nh, T, 2k+1)
                if self.lightweight is not None:
                    table = table + self.lightweight[:, None]
                if self.dynamic is not None:
                    table = table + q @ self.dynamic.T / math.sqrt(q.size(-1))  # (B, nh, T, 2k+1)
                if valid is None and (self.attention == 'fast' or self.attention == 'auto' and T >= max(256, 8 * self.kernel_size) and has_flash(q)):
                    y = attend_fast(q, k, v, table, self.causal)
                else:
                    y = attend_dense(q, k, v, table, self.causal, valid)
        y = y.transpose(1, 2).reshape(B, T, C)
        if self.conv_out is not None:
            y = y + depthwise_conv(flow.transpose(1, 2).reshape(B, -1, C), self.conv_out, self.causal, before)
        return self.c_proj(y)  # (B, T, C)


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
