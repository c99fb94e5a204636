"""
Translation-invariant self-attention (TISA): a smooth function of the offset is added to the scores.

Wennberg, Henter, "The Case for Translation-Invariant Self-Attention in Transformer-Based Language Models", ACL 2021.
https://arxiv.org/abs/2106.01950

    a_ij  =  q_i.k_j / sqrt(hs) + f(j - i)          f(o) = sum_s a_s exp(-|b_s| (o - c_s)^2)

f is a sum of n_kernels Gaussian kernels with height a_s, sharpness |b_s| and center c_s, all learned, separately for
each head of each layer. f is defined at every offset, so no offset is clipped. The initial values are those of the
authors' code. Departure: causal models too; the paper has masked ones.
A baseline: model_nope.py plus the lines of the scheme.
"""
import math
from dataclasses import dataclass

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
    n_kernels: int = 5  # Gaussian kernels per head in the function of the offset


def equation(attention, x):
    """The layer as in the equation above, one query and one key at a time: x (B, T, C) -> (B, T, C)."""
    B, T, C = x.shape
    q, k, v = [z.view(B, T, attention.n_head, -1) for z in attention.c_attn(x).split(C, 2)]  # (B, T, nh, hs)
    y = torch.zeros_like(q)
    for i in range(T):
        keys = range(i + 1 if attention.causal else T)
        scores = []
        for j in keys:
            kernels = attention.a * torch.exp(-attention.b.abs() * (j - i - attention.c) ** 2)  # (nh, n_kernels)
            scores.append((q[:, i] * k[:, j]).sum(-1) / math.sqrt(q.size(-1)) + kernels.sum(-1))  # (B, nh)
        y[:, i] = sum(weight[..., None] * v[:, j] for j, weight in zip(keys, torch.stack(scores).softmax(0)))
    return attention.c_proj(y.view(B, T, C))


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


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(hs) + bias) v: q (B, nh, T, hs), k and v (B, nh, S, hs), bias (..., nh, T, S)."""
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and k.size(2) <= 256:  # explicit matmuls are faster here
        return ((q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias)


class Attention(nn.Module):
    """Softmax attention with a sum of Gaussian kernels of the offset in its scores."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        self.n_head = config.n_head
        self.causal = config.causal
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.n_kernels < 1:
            raise ValueError(f'n_kernels must be 1 or more, not {config.n_kernels}')
        self.a = nn.Parameter(0.1 + 0.01 * torch.randn(config.n_head, config.n_kernels))  # height
        self.b = nn.Parameter(0.1 + 0.01 * torch.randn(config.n_head, config.n_kernels))  # sharpness
        self.c = nn.Parameter(5 * torch.randn(config.n_head, config.n_kernels))  # center, in tokens

    def forward(self, x, valid=None, state=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, 2)  # each (B, T, C)
        q, k, v = [z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v)]  # (B, nh, T, hs)
        if state is not None:  # decoding: x holds the new tokens, the cache the earlier ones
            if 'k' in state:
                k = torch.cat((state['k'], k), 2)  # (B, nh, S, hs)
                v = torch.cat((state['v'], v), 2)
            state.update(k=k, v=v)
        S = k.size(2)
        offsets = torch.arange(1 - S, T, device=x.device)  # all offsets j - i, (S+T-1,)
        acc_dtype = torch.promote_types(q.dtype, torch.float32)
        a, b, c = [z.to(acc_dtype)[..., None] for z in (self.a, self.b, self.c)]  # (nh, n_kernels, 1)
        f = (a * torch.exp(-b.abs() * (offsets - c) ** 2)).sum(1)  # (nh, S+T-1)
        bias = f.unfold(1, S, 1).flip(1).to(q.dtype)  # (nh, T, S); the row of the last query starts at offset 1-S
        y = attend(q, k, v, bias + score_mask(T, S, self.causal, valid, q))  # (B, nh, T, hs)
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
