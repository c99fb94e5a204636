"""
Rotary position embedding (RoPE): queries and keys are turned by an angle that grows with their position.

Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
https://arxiv.org/abs/2104.09864

The channels c and c + hs/2 of a head are the two coordinates of a point in a plane, c = 0 ... hs/2 - 1. At position i
the point is turned by the angle i theta_c, theta_c = 10000^(-2c/hs). The dot product of two points depends only on
their lengths and the angle between them. So the scores depend on the offset j - i alone, although each turn depends on
one position alone:

    a_ij  =  (R_i q_i).(R_j k_j) / sqrt(hs)  =  q_i.(R_{j-i} k_j) / sqrt(hs)          R_i: the turn at position i

A baseline: the text of model_nope.py and the few lines of the scheme. It departs from the paper in the pairs of
channels: (c, c + hs/2), as in most code since, instead of (2c, 2c + 1). That only reorders the channels.
Plain form: loops in test_equivalence.py. Fast form: torch's scaled_dot_product_attention.
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
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads in a block
    n_embd: int = 128  # channels of the residual stream, a multiple of n_head
    dropout: float = 0.0  # on the embedding and on what each branch adds to the residual stream
    bias: bool = False  # biases in Linear and LayerNorm
    causal: bool = True  # False: every token sees every token (masked language model)
    absolute: bool = False  # learned absolute positions added to the embedding: the baseline that every scheme replaces
    init_std: float = 0.02  # standard deviation of the initial Linear and Embedding weights
    scale_residual_init: bool = True  # scale the residual projections by 1/sqrt(2 n_layer), as GPT-2 does
    nope_every: int = 0  # TEMPORARY, does nothing here: the field of the model issue


def visible(T, S, causal=True, valid=None, device=None):
    """Which of S keys each of the last T tokens sees: bool (T, S), or (B, 1, T, S) with padding.

    valid (B, S) bool: False is padding, seen by its own query alone, so that no row of the softmax is empty.
    """
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)
    see = j <= i if causal else (j >= 0).expand(T, S)
    return see if valid is None else see & (valid[:, None, None, :] | (i == j))


def rotate(x, past=0):
    """Turn the channels (c, c + hs/2) of token i of x (B, nh, T, hs) by the angle (past + i) 10000^(-2c/hs)."""
    wide = torch.promote_types(x.dtype, torch.float32)  # in bfloat16 position 2001 would be 2000
    theta = 10000 ** (-torch.arange(0, x.size(-1), 2, device=x.device, dtype=wide) / x.size(-1))  # (hs/2,)
    angle = torch.arange(past, past + x.size(2), device=x.device, dtype=wide)[:, None] * theta  # (T, hs/2)
    a, b = x.to(wide).chunk(2, -1)  # each (B, nh, T, hs/2)
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


class Attention(nn.Module):
    """Softmax attention with turned queries and keys."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        if config.n_embd // config.n_head % 2:
            raise ValueError(f'a head must have an even number of channels, not {config.n_embd // config.n_head}')
        self.n_head = config.n_head
        self.causal = config.causal
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, valid=None, state=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, 2)  # each (B, T, C)
        q, k, v = [z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v)]  # (B, nh, T, hs)
        past = 0 if state is None else state['seen']  # tokens fed before these
        q = rotate(q, past)
        k = rotate(k, past)  # the state holds turned keys
        if state is not None:  # decoding: the keys and values of the past come first
            if 'k' in state:
                k = torch.cat((state['k'], k), 2)  # (B, nh, S, hs)
                v = torch.cat((state['v'], v), 2)
            state.update(k=k, v=v)
        S = k.size(2)
        masked = valid is not None or 1 < T < S  # padding, or several tokens that follow a past
        mask = visible(T, S, self.causal, valid, x.device) if masked else None
        triangle = self.causal and T == S and not masked  # torch's own causal mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=triangle)  # (B, nh, T, hs)
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
