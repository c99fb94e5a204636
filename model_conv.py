"""
Convolutions before, inside and after self-attention, or in place of it.

Chang, Xu, Xu, Tu, "Convolutions and Self-Attention: Re-interpreting Relative Positions in Pre-trained Language Models",
ACL 2021. https://arxiv.org/abs/2106.05505

    depthwise convolution            y_ic = sum_o beta_oc x_{i+o,c}              one kernel per channel (equation 2)
    lightweight convolution          y_ic = sum_o beta_o  x_{i+o,c}              one kernel per head (equation 3)
    dynamic convolution              y_ic = sum_o (q_i.W_o) x_{i+o,c}            one kernel per head and token

Each place where a convolution enters the layer has its own switch:

    lightweight, dynamic   in the scores: a_ij = q_i.k_j / sqrt(hs) + beta_{j-i} + q_i.W_{j-i} / sqrt(hs)    (eq. 4, 5)
    queries_keys, values   before attention: a depthwise convolution precedes the projection in half of the heads
    output                 after attention (equation 7): softmax(a) v + depthwise(v)
    mixer                  'lightweight' or 'dynamic': that convolution in place of attention, its kernel normalized by
                           a softmax over its entries (Wu et al. 2019)

In the scores, offsets beyond +-k share the end entry, as in model_composite.py. Elsewhere the kernel of a causal model
covers the token itself and the 2k tokens before it. The default is `output` alone.

Glossary (paper = code): 2k+1 = kernel_size, beta = lightweight (scores) or conv_out (output), W^C = dynamic.
Departures: causal models too, pre-norm blocks, no dropout of attention weights, no bias in depthwise convolutions.
Forms: equation() as loops; attend() without and attend_dense() with kernels in the scores.
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
    kernel_size: int = 17  # entries of a kernel, 2k+1: offsets -k ... k in the scores; elsewhere -2k ... 0 if causal
    lightweight: bool = False  # kernel in the scores that is the same for every query
    dynamic: bool = False  # query-dependent kernel in the scores
    queries_keys: bool = False  # convolution before the projection to queries and keys, in half of the heads
    values: bool = False  # convolution before the projection to values, in half of the heads
    output: bool = True  # convolution of the values, added after the softmax
    mixer: Literal['attention', 'lightweight', 'dynamic'] = 'attention'  # attention, or a convolution in its place


def equation(attention, x):
    """The layer as loops over single tokens: x (B, T, C) -> (B, T, C)."""
    B, T, C = x.shape
    K = attention.kernel_size

    def convolve(x, weight):  # weight(i, r): kernel entry r of token i
        left = K - 1 if attention.causal else K // 2
        y = [sum(weight(i, r) * x[:, i + r - left] for r in range(K) if 0 <= i + r - left < T) for i in range(T)]
        return torch.stack(y, 1)

    parts = []
    for i, kernel in enumerate((attention.conv_q, attention.conv_k, attention.conv_v)):
        part = attention.c_attn(x).split(C, 2)[i]  # (B, T, C)
        if kernel is not None:
            convolved = attention.c_attn(convolve(x, lambda i, r: kernel[:, r])).split(C, 2)[i]
            half = attention.n_head // 2 * (C // attention.n_head)
            part = torch.cat((convolved[..., :half], part[..., half:]), 2)
        parts.append(part.view(B, T, attention.n_head, -1))
    q, k, v = parts  # each (B, T, nh, hs)
    if attention.mixer == 'lightweight':
        y = convolve(v, lambda i, r: attention.lightweight.softmax(-1)[:, r, None])
    elif attention.mixer == 'dynamic':
        y = convolve(v, lambda i, r: (q[:, i] @ attention.dynamic.T).softmax(-1)[..., r, None])
    else:
        y = torch.zeros_like(v)
        for i in range(T):
            scores = []  # each (B, nh)
            for j in range(i + 1 if attention.causal else T):
                entry = max(0, min(K - 1, j - i + K // 2))
                key = k[:, j] if attention.dynamic is None else k[:, j] + attention.dynamic[entry]
                beta = 0 if attention.lightweight is None else attention.lightweight[:, entry]
                scores.append((q[:, i] * key).sum(-1) / math.sqrt(q.size(-1)) + beta)
            y[:, i] = sum(weight[..., None] * v[:, j] for j, weight in enumerate(torch.stack(scores).softmax(0)))
    y = y.view(B, T, C)
    if attention.conv_out is not None:
        y = y + convolve(v.reshape(B, T, C), lambda i, r: attention.conv_out[:, r])
    return attention.c_proj(y)


def score_mask(T, S, causal, valid, x):
    """Additive mask for the scores of the last T of S tokens: 0 for visible keys, -inf for the others.

    valid (B, S) bool or None: False marks padding, which is visible only to itself, so that no softmax row is empty.
    Returns (T, S), or (B, 1, T, S) with padding, in the dtype and on the device of x.
    """
    offset = torch.arange(S, device=x.device) - torch.arange(S - T, S, device=x.device)[:, None]  # (T, S): j - i
    masked = offset > (0 if causal else S)  # S: nothing is masked
    if valid is not None:
        masked = masked | (~valid[:, None, None] & (offset != 0))  # (B, 1, T, S)
    return torch.zeros(masked.shape, dtype=x.dtype, device=x.device).masked_fill_(masked, -math.inf)


def attend(q, k, v, causal=True, valid=None):
    """Softmax attention of the last T of S tokens: q (B, nh, T, hs), k and v (B, nh, S, hs) -> (B, nh, T, hs)."""
    T, S = q.size(2), k.size(2)
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and S <= 256:  # explicit matmuls are faster here
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, nh, T, S)
        return (scores + score_mask(T, S, causal, valid, q)).softmax(-1) @ v
    mask = None if valid is None and T in (1, S) else score_mask(T, S, causal, valid, q)  # T = 1 sees all keys
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and causal and T > 1)


def attend_dense(q, k, v, kernel_scores, causal=True, valid=None):
    """Softmax attention with convolution kernels in its scores (equations 4, 5). Time and memory O(T S).

    q (B, nh, T, hs), k and v (B, nh, S, hs): the queries are the last T of S tokens.
    kernel_scores (B or 1, nh, T, 2k+1): entry clip(j - i, -k, k) + k is added to the score of query i and key j.
    valid (B, S) bool: False marks padding. Returns (B, nh, T, hs).
    """
    T, S = q.size(2), k.size(2)
    half_width = kernel_scores.size(-1) // 2
    offset = torch.arange(S, device=q.device) - torch.arange(S - T, S, device=q.device)[:, None]  # (T, S): j - i
    entry = offset.clamp(-half_width, half_width) + half_width
    att = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, nh, T, S)
    att = att + kernel_scores.gather(-1, entry.expand(*kernel_scores.shape[:2], -1, -1))
    att = att + score_mask(T, S, causal, valid, att)
    return att.softmax(-1).to(v.dtype) @ v  # (B, nh, T, S) x (B, nh, S, hs) -> (B, nh, T, hs)


def dynamic_conv(x, w, causal=True, past=0):
    """Dynamic convolution (Wu et al. 2019): one kernel per token and head, shared by the channels of the head.

    x (B, nh, past + T, hs): the first `past` tokens precede the outputs. w (B or 1, nh, T or 1, K): entry r multiplies
    the token at offset r - (K-1) if causal, else r - K//2. x is zero-padded. Returns (B, nh, T, hs).
    """
    K, T = w.size(-1), x.size(2) - past
    left = K - 1 if causal else K // 2
    x = F.pad(x, (0, 0, left - past, K - 1 - left))  # (B, nh, T+K-1, hs)
    return sum(w[..., r:r + 1] * x[:, :, r:r + T] for r in range(K))


def lightweight_conv(x, w, causal=True, past=0):
    """Lightweight convolution (equation 3): w (nh, K), one kernel per head; x (B, nh, past + T, hs)."""
    return dynamic_conv(x, w[None, :, None], causal, past)


def depthwise_conv(x, w, causal=True, past=0):
    """Depthwise convolution (equation 2): w (C, K), one kernel per channel; x (B, past + T, C) -> (B, T, C)."""
    K = w.size(-1)
    left = K - 1 if causal else K // 2
    x = F.pad(x.transpose(1, 2), (left - past, K - 1 - left))  # (B, C, T+K-1)
    return F.conv1d(x, w[:, None], groups=x.size(1)).transpose(1, 2)


def with_past(x, valid, state, name, keep):
    """Prepend up to `keep` cached tokens to x (B, T, C), which is zeroed at padding -> (B, past + T, C), past."""
    x = x if valid is None else x * valid[..., None]
    if state is None:
        return x, 0
    old = state.get(name, x[:, :0])
    x = torch.cat((old, x), 1)
    state[name] = x[:, max(0, x.size(1) - keep):].clone()  # a view would hold the whole prompt
    return x, old.size(1)


class Attention(nn.Module):
    """Self-attention with convolutions before, inside and after its softmax, or a convolution in its place."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        if config.kernel_size < 1 or config.kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and positive, not {config.kernel_size}')
        if (config.queries_keys or config.values) and config.n_head < 2:
            raise ValueError('queries_keys and values convolve in half of the heads: n_head must be at least 2')
        if config.queries_keys and config.mixer == 'lightweight':
            raise ValueError('the mixer lightweight has no queries and keys: queries_keys must be False')
        self.n_head = config.n_head
        self.causal = config.causal
        self.kernel_size = config.kernel_size
        self.mixer = config.mixer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

        def kernel(enabled, *shape):  # Conv1d's initialization
            a = config.kernel_size ** -0.5
            return nn.Parameter(torch.empty(*shape).uniform_(-a, a)) if enabled else None

        C, K, hs = config.n_embd, config.kernel_size, config.n_embd // config.n_head
        attends = config.mixer == 'attention'
        lightweight = config.lightweight if attends else config.mixer == 'lightweight'
        self.lightweight = nn.Parameter(torch.zeros(config.n_head, K)) if lightweight else None
        self.dynamic = kernel(config.dynamic if attends else config.mixer == 'dynamic', K, hs)  # shared by the heads
        self.conv_q = kernel(config.queries_keys, C, K)
        self.conv_k = kernel(config.queries_keys and attends, C, K)
        self.conv_v = kernel(config.values, C, K)
        self.conv_out = kernel(config.output, C, K)
        self.half = config.n_head // 2 * hs  # channels of the heads whose q, k or v are convolved

    def project(self, x, valid, state):
        """x (B, T, C) -> q, k, v, each (B, T, C); in half of the heads a convolution may precede the projection."""
        C = x.size(2)
        qkv = list(self.c_attn(x).split(C, 2))
        kernels = (self.conv_q, self.conv_k, self.conv_v)
        if any(kernel is not None for kernel in kernels):
            x, past = with_past(x, valid, state, 'past_x', self.kernel_size - 1)
        for i, kernel in enumerate(kernels):
            if kernel is not None:
                rows = slice(i * C, i * C + self.half)
                bias = None if self.c_attn.bias is None else self.c_attn.bias[rows]
                convolved = depthwise_conv(x, kernel, self.causal, past)
                convolved = F.linear(convolved, self.c_attn.weight[rows], bias)
                qkv[i] = torch.cat((convolved, qkv[i][..., self.half:]), 2)
        return qkv

    def forward(self, x, valid=None, state=None):
        B, T, C = x.shape
        q, k, v = self.project(x, valid, state)  # each (B, T, C)
        v_and_past, past = with_past(v, valid, state, 'past_v', self.kernel_size - 1)  # (B, past + T, C)
        q, k, v, v_mixed = [z.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v, v_and_past)]
        if self.mixer == 'lightweight':
            y = lightweight_conv(v_mixed, self.lightweight.softmax(-1), self.causal, past)
        elif self.mixer == 'dynamic':
            y = dynamic_conv(v_mixed, (q @ self.dynamic.T).softmax(-1), self.causal, past)
        else:
            y = self.attend(q, k, v, valid, state)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        if self.conv_out is not None:
            y = y + depthwise_conv(v_and_past, self.conv_out, self.causal, past)
        return self.c_proj(y)

    def attend(self, q, k, v, valid, state):
        """Softmax attention, with or without kernels in its scores: q, k, v (B, nh, T, hs) -> (B, nh, T, hs)."""
        if state is not None:  # decoding: x holds the new tokens, the cache the earlier ones
            if 'k' in state:
                k = torch.cat((state['k'], k), 2)  # (B, nh, S, hs)
                v = torch.cat((state['v'], v), 2)
            state.update(k=k, v=v)
        if self.lightweight is None and self.dynamic is None:
            return attend(q, k, v, self.causal, valid)
        kernel_scores = q.new_zeros(1, self.n_head, q.size(2), self.kernel_size)
        if self.lightweight is not None:
            kernel_scores = kernel_scores + self.lightweight[:, None].to(q.dtype)  # (1, nh, T, 2k+1)
        if self.dynamic is not None:
            kernel_scores = kernel_scores + q @ self.dynamic.T / math.sqrt(q.size(-1))  # (B, nh, T, 2k+1)
        return attend_dense(q, k, v, kernel_scores, self.causal, valid)


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
