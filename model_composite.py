"""
Composite attention: relative positions as convolutions inside self-attention.

Chang, Xu, Xu, Tu, "Convolutions and Self-Attention: Re-interpreting Relative Positions in Pre-trained Language Models",
ACL 2021. https://arxiv.org/abs/2106.05505

    a_ij = q_i.k_j / sqrt(hs)  +  q_i.W_{j-i} / sqrt(hs)  +  beta_{j-i}          softmax over j          (equation 6)
           content                dynamic kernel            fixed kernel

To convolve values v with a kernel beta, y_i = sum_j beta_{j-i} v_j, multiply v by a matrix with the kernel along its
diagonals. A relative position embedding adds such a matrix to the scores. Three tokens, kernel (a, b, c):

    b c c          Row i: query, column j: key, b: offset 0. Offsets beyond +-k share the end entries (authors' code).
    a b c          Fixed kernel: learned, the same for every query (T5). Dynamic kernel: each query computes its own,
    a a b          q_i.W (Shaw et al. 2018). The causal mask is a kernel too: 0 on the left, -inf on the right.

Glossary (paper = code): k = half_width, 2k+1 = kernel_size, W^C = dynamic (shared by the heads), beta = fixed (one per
head), d_h = hs (channels per head). Departures: causal models too, pre-norm blocks, no dropout of attention weights.
"""
import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


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
    kernel_size: int = 17  # 2k+1, odd: one entry for each offset -k ... k; offsets beyond share the end entries
    content: bool = True  # q_i.k_j
    dynamic: bool = True  # query-dependent kernel (Shaw et al. 2018)
    fixed: bool = True  # kernel that is the same for every query (T5)
    dynamic_key: bool = False  # key-dependent kernel k_j.W'_{i-j} / sqrt(hs), with offsets i - j
    attention: Literal['auto', 'dense', 'fast'] = 'auto'  # fast: no (T, T) matrix, unless padded, cached, dynamic_key


def equation(attention, x):
    """Equation 6, one query and one key at a time: x (B, T, C) -> (B, T, C)."""
    B, T, C = x.shape
    q, k, v = [z.view(B, T, attention.n_head, -1) for z in attention.c_attn(x).split(C, 2)]  # (B, T, nh, hs)
    y = torch.zeros_like(q)
    for i in range(T):
        scores = []  # each (B, nh)
        for j in range(i + 1 if attention.causal else T):
            offset = max(-attention.half_width, min(attention.half_width, j - i))
            score = (q[:, i] * k[:, j]).sum(-1) if attention.content else 0
            if attention.dynamic is not None:
                score = score + q[:, i] @ attention.dynamic[attention.half_width + offset]
            if attention.dynamic_key is not None:
                score = score + k[:, j] @ attention.dynamic_key[attention.half_width - offset]
            fixed = 0 if attention.fixed is None else attention.fixed[:, attention.half_width + offset]
            scores.append(score / math.sqrt(q.size(-1)) + fixed)
        y[:, i] = sum(weight[..., None] * v[:, j] for j, weight in enumerate(torch.stack(scores).softmax(0)))
    return attention.c_proj(y.view(B, T, C))


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


def attend_dense(q, k, v, kernel_scores, causal=True, valid=None, key_kernel_scores=None, past=None):
    """Softmax attention with convolution kernels in its scores (equation 6). Time and memory O(T S).

    q (B, nh, T, hs), k and v (B, nh, S, hs): the queries are tokens past ... past + T - 1, by default the last T.
    kernel_scores (B or 1, nh, T, 2k+1): entry clip(j - i, -k, k) + k is added to the score of query i and key j.
    key_kernel_scores (B, nh, S, 2k+1): key-dependent; entry clip(i - j, -k, k) + k is added.
    valid (B, S) bool: False marks padding. Returns (B, nh, T, hs).
    """
    T, S = q.size(2), k.size(2)
    past = S - T if past is None else past
    att = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, nh, T, hs) x (B, nh, hs, S) -> (B, nh, T, S)
    att = att + along_diagonals(kernel_scores, past, S, -math.inf if causal else None)
    if key_kernel_scores is not None:
        att = att + along_diagonals(key_kernel_scores, -past, T).transpose(-2, -1)  # row j: key j, column i: query i
    if valid is not None:  # padding is visible only to itself, so that no softmax row is empty
        visible = valid[:, None, None] | torch.eye(S, dtype=torch.bool, device=q.device)
        att = att.masked_fill(~visible, -math.inf)
    return att.softmax(-1).to(v.dtype) @ v  # (B, nh, T, S) x (B, nh, S, hs) -> (B, nh, T, hs)


class Attention(nn.Module):
    """Self-attention with fixed, query-dependent and key-dependent convolution kernels in its scores."""
    fast_on_cuda = False  # whether 'auto' may be fast on CUDA: set by choose_attention()

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        if config.kernel_size < 1 or config.kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and positive, not {config.kernel_size}')
        self.n_head = config.n_head
        self.causal = config.causal
        self.content = config.content
        self.half_width = config.kernel_size // 2
        self.attention = config.attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        K, hs = config.kernel_size, config.n_embd // config.n_head
        W, W_key = torch.empty(2, K, hs).uniform_(-K ** -0.5, K ** -0.5)  # shared by the heads; the authors' init
        self.fixed = nn.Parameter(torch.zeros(config.n_head, K)) if config.fixed else None
        self.dynamic = nn.Parameter(W.clone()) if config.dynamic else None
        self.dynamic_key = nn.Parameter(W_key.clone()) if config.dynamic_key else None

    def forward(self, x, valid=None, state=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, 2)  # each (B, T, C)
        q, k, v = [z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v)]  # (B, nh, T, hs)
        if state is not None:  # decoding: x holds the new tokens, the cache the earlier ones
            if 'k' in state:
                k = torch.cat((state['k'], k), 2)  # (B, nh, S, hs)
                v = torch.cat((state['v'], v), 2)
            state.update(k=k, v=v)
        scale = q.size(-1) ** -0.5
        fixed = q.new_zeros(self.n_head, 2 * self.half_width + 1) if self.fixed is None else self.fixed.to(q.dtype)
        kernel_scores = fixed[None, :, None].expand(-1, -1, T, -1)  # (1, nh, T, 2k+1)
        if self.dynamic is not None:
            kernel_scores = kernel_scores + q @ self.dynamic.T * scale  # (B, nh, T, 2k+1)
        key_kernel_scores = None if self.dynamic_key is None else k @ self.dynamic_key.T * scale  # (B, nh, S, 2k+1)
        q = q if self.content else torch.zeros_like(q)
        long = (T >= 512 and self.fast_on_cuda) if x.is_cuda else (T >= 256 and x.device.type == 'cpu')
        fast = self.attention == 'fast' or (self.attention == 'auto' and long)
        if fast and valid is None and T == k.size(2) and key_kernel_scores is None:
            y = attend_fast(q, k, v, kernel_scores, self.causal)
        else:
            y = attend_dense(q, k, v, kernel_scores, self.causal, valid, key_kernel_scores)
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
# Not in the paper: attend_fast computes the same result as attend_dense without a (T, T) matrix.
compile_once = functools.cache(functools.partial(torch.compile, dynamic=False))


def attend_fast(q, k, v, kernel_scores, causal=True):
    """The same result as attend_dense for T = S without padding. On a CPU: 128 queries at a time."""
    if q.is_cuda:
        return attend_near_and_far(q, k, v, kernel_scores, causal)
    parts = []
    for start in range(0, q.size(2), 128):
        i, j = slice(start, start + 128), slice(start + 128 if causal else None)  # queries, keys
        parts.append(attend_dense(q[:, :, i], k[:, :, j], v[:, :, j], kernel_scores[:, :, i], causal, past=start))
    return torch.cat(parts, 2)


def attend_near_and_far(q, k, v, kernel_scores, causal=True):
    """The paper's idea as an algorithm in O(T) memory: global content (far keys) + local convolution (near keys).

    Keys k or more tokens away share an end entry of the kernel. softmax(x + c) = softmax(x), so far keys need no bias:
    the entry is added to their log-sum-exp. The parts are averaged with weights softmax(log-sum-exps). Causal, k = 2:

        n          n: near keys, offsets 1-k ... 0; f: far keys, offsets -k and less
        n n        Without the causal mask, near keys have offsets 1-k ... k-1, and a third part has the offsets k and
        f n n      more; its entry is the right end of the kernel.
    """
    T, reach = q.size(2), max(1, kernel_scores.size(-1) // 2)
    bias = kernel_scores.expand(q.size(0), -1, -1, -1).contiguous()  # (B, nh, T, 2k+1)
    parts = [attend_to_offsets(q, k, v, 1 - reach, 0 if causal else reach - 1, bias)]
    for low, high, end in ((-T, -reach, 0), (reach, T, -1))[:1 if causal else 2]:
        y, lse = attend_to_offsets(q, k, v, low, high)
        parts.append((y, lse + bias[..., end]))
    weights = torch.stack([lse for _, lse in parts], -1).softmax(-1)  # (B, nh, T, parts)
    return sum(weights[..., n:n + 1] * y for n, (y, _) in enumerate(parts)).to(v.dtype)


def attend_to_offsets(q, k, v, low, high, bias=None):
    """Softmax attention to the keys at offsets low ... high -> y (B, nh, T, hs), log-sum-exp (B, nh, T).

    bias (B, nh, T, 2k+1) is added to the scores at the clipped offsets. FlexAttention has no backward pass on a CPU:
    there, explicit matrices are used. A query without such keys gets a log-sum-exp that makes its weight 0.
    """
    T, reach = q.size(2), 0 if bias is None else bias.size(-1) // 2

    def visible(b, h, i, j):
        return (low <= j - i) & (j - i <= high)

    def add_bias(score, b, h, i, j):
        return score + bias[b, h, i, (j - i).clamp(-reach, reach) + reach]
    if q.is_cuda:
        flex = (create_block_mask, flex_attention)  # not compiled, they would write (T, T) matrices
        make_mask, attention = flex if torch.compiler.is_compiling() else map(compile_once, flex)
        mask = make_mask(visible, None, None, T, T, device=q.device)
        y, aux = attention(q, k, v, None if bias is None else add_bias, mask, return_aux=AuxRequest(lse=True))
        return y, aux.lse
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, nh, T, T)
    scores = scores if bias is None else scores + along_diagonals(bias, 0, T)
    scores = scores.masked_fill(~visible(0, 0, torch.arange(T)[:, None], torch.arange(T)), -1e30)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def choose_attention(model, dtype):
    """Enable the fast form on CUDA if it matches dense there; called once per run. Returns a line to print."""
    layer, hs = model.h[0].attn, model.config.n_embd // model.config.n_head
    if layer.attention != 'auto' or not layer.c_attn.weight.is_cuda:
        return None
    shapes = [(2, layer.n_head, 600, size) for size in (hs, hs, hs, 2 * layer.half_width + 1, hs)]
    *inputs, dy = [torch.randn(shape, device='cuda', dtype=dtype, requires_grad=True) for shape in shapes]
    try:
        ys = [form(*inputs, layer.causal) for form in (attend_dense, attend_fast)]
        pairs = zip(*[(y, *torch.autograd.grad(y, inputs, dy)) for y in ys])
        error = torch.stack([(a - b).abs().max() / a.abs().max() for a, b in pairs]).max().item()
    except Exception as e:  # no Triton, small heads, a bug of FlexAttention on this GPU: printed, not hidden
        error = f'{type(e).__name__}: {" ".join(str(e).split())[:100]}'
    fast = isinstance(error, float) and error <= 3e-2  # dense attention in bfloat16 is itself up to 1.4e-2 off
    for block in model.h:
        block.attn.fast_on_cuda = fast
    return f'attention from 512 tokens on: {"fast" if fast else "dense"} (difference: {error})'
