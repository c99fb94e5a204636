"""
Convolutions before, inside and after self-attention, or replacing it.

Chang, Xu, Xu, Tu, "Convolutions and Self-Attention: Re-interpreting Relative Positions in Pre-trained Language Models",
ACL 2021. https://arxiv.org/abs/2106.05505

    depthwise convolution            y_ic = sum_o beta_oc x_{i+o,c}              a kernel per channel (equation 2)
    lightweight convolution          y_ic = sum_o beta_o  x_{i+o,c}              a kernel per head (equation 3)
    dynamic convolution              y_ic = sum_o (q_i.W_o) x_{i+o,c}            a kernel per head and token

Where they enter, each with a switch of its own:

    lightweight, dynamic   in the scores: a_ij = q_i.k_j / sqrt(hs) + beta_{j-i} + q_i.W_{j-i} / sqrt(hs)   (eq. 4, 5)
    queries_keys, values   before attention: a depthwise convolution, then the Linear, makes them in half of the heads
    output                 after attention (equation 7): softmax(a) v + depthwise(v)
    mixer                  'lightweight' or 'dynamic' replaces attention by that convolution, its kernel normalised by
                           a softmax over its width (Wu et al. 2019); --no-output makes it the convolution alone

In the scores offsets beyond +-k share the end entry, as in model_composite.py. Elsewhere the kernel of a causal model
weighs the token itself and the 2k before it. Departures from the paper: causal models too, pre-norm blocks, no dropout
on the attention weights, no bias in the depthwise convolutions; the mixer 'dynamic' has a query-made kernel whose W the
heads share. The default, scores and output, has the lowest loss of the pairs in experiments/README.md after 600 steps.
Plain forms: loops and banded Toeplitz matrices in test_equivalence.py. Fast forms: conv1d, and attend_fast (last part
of this file) for the scores.
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
    scale_residual_init: bool = True  # scale the residual projections by 1/sqrt(2 n_layer), as GPT-2 does
    # the position scheme
    kernel_size: int = 17  # entries of a kernel, 2k+1: offsets -k ... k in the scores; elsewhere -2k ... 0 if causal
    lightweight: bool = True  # learned kernel in the scores
    dynamic: bool = True  # query-made kernel in the scores
    queries_keys: bool = False  # convolution makes the queries and keys of half the heads
    values: bool = False  # convolution makes the values of half the heads
    output: bool = True  # convolution of the values, added after the softmax
    mixer: Literal['attention', 'lightweight', 'dynamic'] = 'attention'  # attention, or a convolution in its place
    attention: Literal['auto', 'dense', 'fast'] = 'auto'  # fast: no (T, T) matrix for long texts; auto: by length


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


def attend_dense(q, k, v, kernel_scores, causal=True, valid=None):
    """Softmax attention whose scores get a number for each clipped offset (equations 4, 5). Time and memory O(T S).

    q (B, nh, T, hs), k and v (B, nh, S, hs), S >= T: the queries are the last T of S tokens.
    kernel_scores (B or 1, nh, T, 2k+1): entry clip(j - i, -k, k) + k is added to the score of query i and key j.
    valid (B, S) bool: False is padding. Returns (B, nh, T, hs).
    """
    T, S = q.size(2), k.size(2)
    att = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, nh, T, hs) x (B, nh, hs, S) -> (B, nh, T, S)
    att = att + along_diagonals(kernel_scores, S - T, S)
    att = att.masked_fill_(~visible(T, S, causal, valid, q.device), -math.inf).softmax(-1)
    return att.to(v.dtype) @ v  # (B, nh, T, S) x (B, nh, S, hs) -> (B, nh, T, hs)


def dynamic_conv(x, w, causal=True, past=0):
    """Dynamic convolution (Wu et al. 2019): every token brings its own kernel, which the channels of a head share.

    x (B, nh, past + T, hs): the first `past` tokens come before the outputs. w (B or 1, nh, T or 1, K): entry r weighs
    the token at offset r - (K-1) if causal, else r - K//2; beyond the ends x is zero. Returns (B, nh, T, hs).
    """
    K, T = w.size(-1), x.size(2) - past
    left = K - 1 if causal else K // 2
    x = F.pad(x, (0, 0, left - past, K - 1 - left))  # (B, nh, T+K-1, hs)
    return sum(w[..., r:r + 1] * x[:, :, r:r + T] for r in range(K))


def lightweight_conv(x, w, causal=True, past=0):
    """Lightweight convolution (equation 3): w (nh, K), a kernel per head; x (B, nh, past + T, hs), see dynamic_conv."""
    return dynamic_conv(x, w[None, :, None], causal, past)


def depthwise_conv(x, w, causal=True, past=0):
    """Depthwise convolution (equation 2): w (C, K), a kernel per channel; x (B, past + T, C) -> (B, T, C)."""
    K = w.size(-1)
    left = K - 1 if causal else K // 2
    x = F.pad(x.transpose(1, 2), (left - past, K - 1 - left))  # (B, C, T+K-1)
    return F.conv1d(x, w[:, None], groups=x.size(1)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with convolutions before, inside and after its softmax, or a convolution that replaces it."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head, not {config.n_embd} with {config.n_head} heads')
        if config.kernel_size < 1 or config.kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and positive, not {config.kernel_size}')
        if (config.queries_keys or config.values) and config.n_head < 2:
            raise ValueError('queries_keys and values convolve in half of the heads: n_head must be at least 2')
        if config.queries_keys and config.mixer == 'lightweight':
            raise ValueError('queries_keys needs queries or keys, and the mixer lightweight has neither')
        if config.mixer not in ('attention', 'lightweight', 'dynamic'):
            raise ValueError(f'mixer must be attention, lightweight or dynamic, not {config.mixer!r}')
        if config.attention not in ('auto', 'dense', 'fast'):
            raise ValueError(f'attention must be auto, dense or fast, not {config.attention!r}')
        self.n_head = config.n_head
        self.causal = config.causal
        self.kernel_size = config.kernel_size
        self.mixer = config.mixer
        self.attention = config.attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

        def kernel(wanted, *shape):  # Conv1d's initialisation
            a = config.kernel_size ** -0.5
            return nn.Parameter(torch.empty(*shape).uniform_(-a, a)) if wanted else None

        K, mixer = config.kernel_size, config.mixer
        hs = config.n_embd // config.n_head
        lightweight = config.lightweight if mixer == 'attention' else mixer == 'lightweight'
        dynamic = config.dynamic if mixer == 'attention' else mixer == 'dynamic'
        self.lightweight = nn.Parameter(torch.zeros(config.n_head, K)) if lightweight else None
        self.dynamic = kernel(dynamic, K, hs)  # shared by the heads
        self.conv_q = kernel(config.queries_keys, config.n_embd, K)
        self.conv_k = kernel(config.queries_keys and mixer == 'attention', config.n_embd, K)
        self.conv_v = kernel(config.values, config.n_embd, K)
        self.conv_out = kernel(config.output, config.n_embd, K)
        self.half = config.n_head // 2 * hs  # channels of the heads whose q, k or v are convolved

    def forward(self, x, valid=None, state=None):
        B, T, C = x.shape
        x_and_past, past = with_past(state, 'convolved_x', x, valid, self.kernel_size - 1)
        qkv = list(self.c_attn(x).split(C, 2))  # 3 x (B, T, C)
        for i, kernel in enumerate((self.conv_q, self.conv_k, self.conv_v)):
            if kernel is not None:
                rows = slice(i * C, i * C + self.half)
                bias = None if self.c_attn.bias is None else self.c_attn.bias[rows]
                convolved = depthwise_conv(x_and_past, kernel, self.causal, past)
                convolved = F.linear(convolved, self.c_attn.weight[rows], bias)
                qkv[i] = torch.cat((convolved, qkv[i][..., self.half:]), 2)
        v_and_past, past = with_past(state, 'convolved_v', qkv[2], valid, self.kernel_size - 1)
        q, k, v, v_in_heads = [t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in (*qkv, v_and_past)]
        if self.mixer == 'lightweight':
            y = lightweight_conv(v_in_heads, self.lightweight.softmax(-1), self.causal, past)
        elif self.mixer == 'dynamic':
            y = dynamic_conv(v_in_heads, (q @ self.dynamic.T).softmax(-1), self.causal, past)
        else:
            y = self.attend(q, k, v, valid, state)
        y = y.transpose(1, 2).reshape(B, T, C)
        if self.conv_out is not None:
            y = y + depthwise_conv(v_and_past, self.conv_out, self.causal, past)
        return self.c_proj(y)

    def attend(self, q, k, v, valid, state):
        """Softmax attention with kernels in its scores: q, k, v (B, nh, T, hs) -> (B, nh, T, hs)."""
        if state is not None:  # decoding: the keys and values of the past come first
            if 'k' in state:
                k = torch.cat((state['k'], k), 2)  # (B, nh, S, hs)
                v = torch.cat((state['v'], v), 2)
            state.update(k=k, v=v)
        T, S = q.size(2), k.size(2)
        if self.lightweight is None and self.dynamic is None:  # no kernel in the scores
            masked = valid is not None or 1 < T < S  # padding, or several tokens that follow a past
            mask = visible(T, S, self.causal, valid, q.device) if masked else None
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and T == S and not masked)
        kernel_scores = torch.zeros(1, self.n_head, T, self.kernel_size, device=q.device)
        if self.lightweight is not None:
            kernel_scores = kernel_scores + self.lightweight[:, None]  # (1, nh, T, 2k+1)
        if self.dynamic is not None:
            kernel_scores = kernel_scores + q @ self.dynamic.T / math.sqrt(q.size(-1))  # (B, nh, T, 2k+1)
        fast = self.attention == 'fast' or (self.attention == 'auto' and fast_is_quicker(q, self.kernel_size))
        if fast and valid is None and T == S:  # padding and a past are dense
            return attend_fast(q, k, v, kernel_scores, self.causal)
        return attend_dense(q, k, v, kernel_scores, self.causal, valid)


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
# The paper ends here. What follows makes it fast: attend_fast has the value of attend_dense without a (T, T) matrix,
# and with_past keeps for decoding what a convolution needs of the past.


def attend_fast(q, k, v, kernel_scores, causal=True):
    """The value of attend_dense without a (T, T) matrix, forward and backward. Arguments as there; no padding, T = S.

    On a CPU it goes block by block (InBlocks); on a GPU, when compiled, and for causal texts of 4,096 tokens and more
    far and near (FarNear).
    ValueError where FarNear needs a flash attention kernel for q that torch has not.
    """
    if blocks_are_quicker(q, causal):
        return attend_in_blocks(q, k, v, kernel_scores, causal)
    return attend_far_and_near(q, k, v, kernel_scores, causal)


def fast_is_quicker(q, kernel_size):
    """Whether attend_fast can be used for q (B, nh, T, hs) and is the quicker form there.

    On a CPU, T = 128 and 256, causal, forward and backward of 3,072 tokens, heads of 32, two threads with AVX512-BF16:
    float32: attend_dense 26.4 and 42.5 ms, blocks 18.3 and 25.3; bfloat16: attend_dense 12.9 and 20.5 ms, blocks 17.7
    and 17.6, but forward alone blocks are quicker at 128, too. On a GPU and when compiled: a guess, not measured.
    """
    least = max(256, 8 * kernel_size)
    if on_cpu(q):
        least = 256 if q.dtype == torch.bfloat16 and torch.is_grad_enabled() else 128
    return q.size(2) >= least and has_flash(q)


def blocks_are_quicker(q, causal):
    """Whether blocks are the quicker fast form for q (B, nh, T, hs).

    T = 1,024, 2,048, 4,096, causal: blocks 58, 92, 259 ms, far and near 91, 119, 206 ms; both sides 79, 145, 279 and
    160, 221, 375 ms (float32, 4,096 tokens in all). Measured as in fast_is_quicker.
    """
    long = causal and q.size(2) >= 4096
    return on_cpu(q) and not long


def on_cpu(q):
    """Whether q is on a CPU and nothing is compiled: the blocks have not been tried with a compiler."""
    return q.device.type == 'cpu' and not torch.compiler.is_compiling()


def attend_in_blocks(q, k, v, kernel_scores, causal=True):
    """attend_fast on a CPU: a block of the (T, T) matrix at a time, small enough to stay in the cache."""
    wide = torch.promote_types(q.dtype, torch.float32)  # of the scores
    kernel = kernel_scores.to(wide) - kernel_scores[..., :1]  # a softmax does not change when its whole row does
    return InBlocks.apply(q, k, v, kernel.expand(q.size(0), -1, -1, -1), causal)


class InBlocks(torch.autograd.Function):
    """attend_dense by hand, in blocks: some heads, 128 queries and all keys that they see.

    kernel (B, nh, T, 2k+1): its first entries are 0, so that only the near keys and those on the right get a number.
    Keys and values get k zeros at both ends (causal: in front), so that every query has all its near keys. In a block
    with n columns the near keys of the next query then start n+1 numbers later, and unfold() shows them as rows:

        . a b c . . .         a b c          k = 1, n = 7. Changing the right changes the left: it is the same memory.
        . . d e f . .         d e f
        . . . g h i .         g h i

    The backward pass computes the weights of each block again; only the inputs and y are kept.
    """

    @staticmethod
    def forward(ctx, q, k, v, kernel, causal):
        reach = kernel.size(-1) // 2
        ends = (0, 0, reach, 0 if causal else reach)
        heads = [q * q.size(-1) ** -0.5, F.pad(k, ends), F.pad(v, ends), kernel]
        heads = [x.flatten(0, 1).contiguous() for x in heads]  # (B nh, ...)
        y = torch.empty_like(heads[0])  # (B nh, T, hs)
        room = heads[0].new_empty(0)
        for queries, keys in blocks(y, reach, causal):
            p = block_weights(*heads, queries, keys, causal, room)
            y[queries] = p.to(v.dtype) @ heads[2][keys]
        ctx.save_for_backward(*heads, y)
        ctx.causal = causal
        return y.view(q.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        *heads, y = ctx.saved_tensors
        q, k, v, kernel = heads
        reach = kernel.size(-1) // 2
        shape = dy.shape[:2]
        dy = dy.flatten(0, 1)
        mean = (dy.to(kernel.dtype) * y).sum(-1, keepdim=True)  # of the weights' gradients under the weights
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k, dtype=kernel.dtype)  # sums over blocks
        dv = torch.zeros_like(v, dtype=kernel.dtype)
        d_kernel = torch.zeros_like(kernel)
        room = q.new_empty(0)
        more_room = q.new_empty(0)
        for queries, keys in blocks(q, reach, ctx.causal):
            p = block_weights(*heads, queries, keys, ctx.causal, room)
            dv[keys] += p.to(v.dtype).transpose(1, 2) @ dy[queries]
            ds = product(dy[queries], v[keys].transpose(1, 2), more_room).to(kernel.dtype)
            ds.sub_(mean[queries]).mul_(p)
            narrow = ds.to(q.dtype)
            dq[queries] = narrow @ k[keys]
            dk[keys] += narrow.transpose(1, 2) @ q[queries]
            near = near_keys(ds, queries, reach, ctx.causal)
            d_kernel[queries][..., :near.size(-1)] = near
            if not ctx.causal:
                middle = slice(queries[1].start, queries[1].stop + 2 * reach)
                beyond = ds[..., middle.stop:].sum(-1)
                d_kernel[queries][..., -1] = beyond + ds[..., middle].triu(2 * reach).sum(-1)
        d_kernel[..., 0] = 0  # this entry was subtracted from its row: autograd gives it minus the sum of the rest
        inside = slice(reach, reach + q.size(1))
        gradients = [dq * q.size(-1) ** -0.5, dk[:, inside].to(k.dtype), dv[:, inside].to(v.dtype), d_kernel]
        return *[x.unflatten(0, shape) for x in gradients], None


def blocks(q, reach, causal, rows=128, largest=2 ** 20):
    """Index of the queries and of the padded keys of each block, for q (B nh, T, hs). largest: numbers in a block.

    The sizes are those of two threads: with 64 and 2^18 a text of 4,096 tokens takes 1.5 times as long.
    """
    n, T, _ = q.shape
    heads = max(1, largest // (min(rows, T) * T))
    for head in range(0, n, heads):
        for first in range(0, T, rows):
            last = min(first + rows, T)
            end = last + reach if causal else T + 2 * reach
            yield (slice(head, head + heads), slice(first, last)), (slice(head, head + heads), slice(0, end))


def block_weights(q, k, v, kernel, queries, keys, causal, room):
    """The softmax of a block: (heads, rows, columns). q is scaled already; columns beyond the text get the weight 0."""
    reach = kernel.size(-1) // 2
    first, last = queries[1].start, queries[1].stop
    kernel = kernel[queries]
    scores = product(q[queries], k[keys].transpose(1, 2), room).to(kernel.dtype)
    near = near_keys(scores, queries, reach, causal)
    near += kernel[..., :near.size(-1)]
    ones = torch.ones(last - first, last - first + (reach if causal else 2 * reach), dtype=kernel.dtype)
    middle = scores[..., first:first + ones.size(1)]
    if causal:
        middle += (-math.inf * ones).triu(reach + 1)  # the future
    else:
        right = kernel[..., -1:]
        middle += right * ones.triu(2 * reach + 1)
        scores[..., last + 2 * reach:] += right
        scores[..., scores.size(-1) - reach:] = -math.inf  # beyond the end
    scores[..., :reach] = -math.inf  # before the start
    return torch.softmax(scores, -1, out=scores)


def product(a, b, room):
    """a @ b in the memory of `room`, which grows if it must: fresh memory costs more time than the product itself."""
    n = a.size(0) * a.size(1) * b.size(2)
    if room.numel() < n:
        room.resize_(n)
    return torch.bmm(a, b, out=room[:n].view(a.size(0), a.size(1), b.size(2)))


def near_keys(block, queries, reach, causal):
    """View of the entries of a block (heads, rows, columns) at offsets -reach ... reach, causal -reach ... 0."""
    width = reach + 1 if causal else 2 * reach + 1
    return block.flatten(1)[:, queries[1].start:].unfold(1, width, block.size(-1) + 1)


def attend_far_and_near(q, k, v, kernel_scores, causal=True):
    """attend_fast in memory O(T (hs + k)): on a GPU, when compiled, and for long causal texts on a CPU.

    The paper's idea as an algorithm: attention = global content + local convolution. All keys at k tokens or more share
    an end entry of the kernel, and a softmax does not change when one number is added to its whole row. So we subtract
    the left end entry from every row; then the scores of the far keys are plain q_i.k_j, and torch's flash attention
    computes them. The near keys are a dynamic convolution. Causal, k = 3, what queries 0 ... 6 do with keys 0 ... 6:

        n                       n: near, a convolution over k offsets
        n n                     f: far, flash attention of the queries from k on to all keys but the last k;
        n n n                      without the causal mask there are also far keys on the right side
        f n n n
        f f n n n               The two parts are joined exactly by their log-sum-exps.
        f f f n n n
        f f f f n n n
    """
    if not has_flash(q):
        raise ValueError('attend_fast needs a CPU, or a CUDA GPU with bfloat16 or float16 and heads of 8, 16, ... 256 '
                         f'channels, not {q.dtype} and heads of {q.size(-1)} on {q.device.type}')
    if kernel_scores.size(-1) == 1:  # all offsets share the one entry
        kernel_scores = kernel_scores.expand(*kernel_scores.shape[:-1], 3)
    far = kernel_scores.size(-1) // 2
    if q.size(2) <= far:  # all keys are near
        return attend_dense(q, k, v, kernel_scores, causal)
    kernel_scores = kernel_scores.to(torch.promote_types(q.dtype, torch.float32)).expand(q.size(0), -1, -1, -1)
    left_end = kernel_scores[..., :1]
    near = kernel_scores[..., 1:(far + 1 if causal else -1)] - left_end  # (B, nh, T, W)
    right = None if causal else (kernel_scores[..., -1:] - left_end).squeeze(-1)  # (B, nh, T)
    return FarNear.apply(q, k, v, near, right, far).transpose(1, 2)


def has_flash(q):
    """Whether torch has a flash attention kernel for q (B, nh, T, hs): always on a CPU, in half precision on CUDA."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == 'cpu' or (q.is_cuda and half and q.size(-1) in range(8, 257, 8))


class FarNear(torch.autograd.Function):
    """Flash attention to the far keys and a dynamic convolution over the near ones, in one softmax.

    near (B, nh, T, W) is added to the scores of offsets 1-far, 2-far, ...; right (B, nh, T), None if causal, to those
    of offsets +far and more. Returns (B, T, nh, hs), the layout in which the output projection and its gradient come.
    By hand, because given the log-sum-exp of all keys, the weights of any part are exp(score - lse): the backward pass
    computes each part again and keeps only the inputs, y and lse.
    """

    @staticmethod
    def forward(ctx, q, k, v, near, right, far):
        wide = near.dtype  # sums in at least float32
        y_right = lse_right = None
        near_scores = score_neighbours(q, k, near, 1 - far)  # (B, nh, T, W)
        y_left, lse_left, rng = flash(q[:, :, far:], k[:, :, :-far], v[:, :, :-far])
        lse_left = F.pad(lse_left.to(wide), (far, 0), value=-math.inf)  # the first queries have no key that far
        parts = [near_scores, lse_left[..., None]]
        if right is not None:
            y_right, lse_right, rng_right = flash(q[:, :, :-far], k[:, :, far:], v[:, :, far:], right=True)
            lse_right = F.pad(lse_right.to(wide), (0, far), value=-math.inf) + right
            parts.append(lse_right[..., None])
            rng = rng + rng_right
        lse = torch.cat(parts, -1).logsumexp(-1)  # (B, nh, T)
        p = (near_scores - lse[..., None]).exp()
        y = sum(p[..., r:r + 1] * moved(v, r + 1 - far) for r in range(p.size(-1)))
        y = y + (lse_left - lse).exp()[..., None] * F.pad(y_left, (0, 0, far, 0))
        if right is not None:
            y = y + (lse_right - lse).exp()[..., None] * F.pad(y_right, (0, 0, 0, far))
        y = y.to(v.dtype).transpose(1, 2).contiguous()  # (B, T, nh, hs)
        ctx.far = far
        ctx.save_for_backward(q, k, v, near, right, y, lse, y_right, lse_right, *rng)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, near, right, y, lse, y_right, lse_right, *rng = ctx.saved_tensors
        far = ctx.far
        wide = near.dtype
        y, dy = y.transpose(1, 2), dy.transpose(1, 2)  # (B, nh, T, hs)
        mean = (dy.to(wide) * y).sum(-1)  # (B, nh, T): mean of the weights' gradients under the weights

        queries, keys, values = [again(x) for x in (q, k, v)]
        p = (score_neighbours(queries, keys, near, 1 - far) - lse[..., None]).exp()
        offsets = list(enumerate(range(1 - far, 1 - far + p.size(-1))))
        dp = torch.stack([(dy.to(wide) * moved(values, o)).sum(-1) for _, o in offsets], -1)
        d_near = p * (dp - mean[..., None])  # (B, nh, T, W)
        ds = d_near / math.sqrt(q.size(-1))
        dq = sum(ds[..., r:r + 1] * moved(keys, o) for r, o in offsets).to(q.dtype)
        dk = sum(moved(ds[..., r:r + 1], -o, 0) * moved(queries, -o) for r, o in offsets).to(k.dtype)
        dv = sum(moved(p[..., r:r + 1], -o, 0) * moved(dy, -o) for r, o in offsets).to(v.dtype)

        late = (slice(None), slice(None), slice(far, None))  # all but the first `far` tokens
        early = (slice(None), slice(None), slice(None, -far))
        far_dq, far_dk, far_dv = flash_backward(dy[late], q[late], k[early], v[early], y[late], lse[late], rng[:2])
        dq = dq + F.pad(far_dq, (0, 0, far, 0))
        dk = dk + F.pad(far_dk, (0, 0, 0, far))
        dv = dv + F.pad(far_dv, (0, 0, 0, far))
        d_right = None
        if right is not None:  # exp(q.k + right - lse): the flash kernel's weights at the log-sum-exp lse - right
            d_right = (lse_right - lse).exp() * (F.pad((dy[early].to(wide) * y_right).sum(-1), (0, far)) - mean)
            lse = lse - right
            far_dq, far_dk, far_dv = flash_backward(dy[early], q[early], k[late], v[late], y[early], lse[early],
                                                    rng[2:], right=True)
            dq = dq + F.pad(far_dq, (0, 0, 0, far))
            dk = dk + F.pad(far_dk, (0, 0, far, 0))
            dv = dv + F.pad(far_dv, (0, 0, far, 0))
        return dq, dk, dv, d_near, d_right, None


def again(x):
    """x (B, nh, T, hs) itself. A compiler takes it for another tensor, and does not keep what it made of x before."""
    return x[:, :, torch.arange(x.size(2), device=x.device)] if torch.compiler.is_compiling() else x


def moved(x, offset, beyond=None):
    """Row i of the result is row i + offset of x (B, nh, T, ...); beyond the ends the nearest row, or `beyond`.

    By an index and not by a pad: a compiler reads through an index, but keeps a padded copy for the backward pass.
    """
    T = x.size(2)
    i = torch.arange(T, device=x.device) + offset
    y = x[:, :, i.clamp(0, T - 1)]
    return y if beyond is None else torch.where(((i >= 0) & (i < T))[:, None], y, beyond)


def score_neighbours(q, k, near, first):
    """q_i.k_{i+o} / sqrt(hs) + near_io for the offsets o = first, first+1, ...: (B, nh, T, W), -inf beyond the ends."""
    T = q.size(2)
    q = q.to(near.dtype)
    offsets = torch.arange(first, first + near.size(-1), device=q.device)
    j = torch.arange(T, device=q.device)[:, None] + offsets  # (T, W): the key of each score
    products = [(q * moved(k, first + r)).sum(-1) for r in range(near.size(-1))]
    scores = torch.stack(products, -1) / math.sqrt(q.size(-1)) + near
    return scores.masked_fill((j < 0) | (j >= T), float('-inf'))


def flash(q, k, v, right=False):
    """Softmax attention of query i to the keys j <= i, or j >= i on the right side, by torch's own flash kernels.

    q, k, v (B, nh, n, hs) -> (B, nh, n, hs), its log-sum-exp (B, nh, n) in nats, and what the backward kernel needs.
    """
    q, k, v = channels_last(q, k, v)
    if q.is_cuda:  # it wants (B, n, nh, hs)
        n = q.size(2)
        q, k, v = [x.transpose(1, 2) for x in (q, k, v)]
        y, lse, *rng = torch.ops.aten._flash_attention_forward(q, k, v, None, None, n, n, 0.0, not right, False,
                                                               **window(right))
        return y.transpose(1, 2), lse, rng[:2]
    q, k, v = [x.flip(2) if right else x for x in (q, k, v)]  # j >= i is j <= i in the mirror
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return y.flip(2) if right else y, lse.flip(2) if right else lse, []


def flash_backward(dy, q, k, v, y, lse, rng, right=False):
    """Gradients of q, k, v (B, nh, n, hs) through the weights exp(q_i.k_j / sqrt(hs) - lse_i) of flash().

    lse may count more keys than flash() saw: then y is the output over all of them.
    """
    dy, q, k, v, y = channels_last(dy, q, k, v, y)
    if q.is_cuda:
        inputs = [x.transpose(1, 2) for x in (dy, q, k, v, y)]
        return [x.transpose(1, 2) for x in flash_backward_on_cuda(*inputs, lse, *rng, right)]
    inputs = [x.flip(2) if right else x for x in (dy, q, k, v, y, lse.contiguous())]
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, True)
    return [x.flip(2) if right else x for x in gradients]


@torch.library.custom_op(f'{__name__}::flash_backward_on_cuda', mutates_args=())  # a copy of this file has its own
def flash_backward_on_cuda(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                           lse: torch.Tensor, seed: torch.Tensor, offset: torch.Tensor,
                           right: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """flash_backward() in the kernel's layout (B, n, nh, hs), an operator that no compiler looks into.

    The kernel reads lse as if it were contiguous. Compiled in the open, `lse.contiguous()` does not make sure of that:
    torch 2.11 keeps it for the backward pass with padded rows, and the gradients of all texts but the first are wrong.
    """
    n = q.size(1)
    return torch.ops.aten._flash_attention_backward(dy, q, k, v, y, lse.contiguous(), None, None, n, n, 0.0, not right,
                                                    seed, offset, **window(right))


@flash_backward_on_cuda.register_fake
def gradients_alike(dy, q, k, v, *_):
    """What a compiler has to know of that operator: the shapes and layouts of its results."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def window(right):
    """On the right no key before the query itself and any number after it; on the left the causal mask is enough."""
    return dict(window_size_left=0, window_size_right=-1) if right else {}


def channels_last(*tensors):
    """The flash kernels read the channels of a token side by side, and do not check that they are."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def with_past(state, name, x, valid, keep):
    """x (B, T, C), zero at padding, after the rows that the state holds of earlier tokens; and how many those are.

    For decoding: the state keeps the newest `keep` rows, as many as a convolution looks back.
    """
    if valid is not None:
        x = x * valid[:, -x.size(1):, None]
    if state is None:
        return x, 0
    past = state[name].size(1) if name in state else 0
    if past:
        x = torch.cat((state[name], x), 1)  # (B, past + T, C)
    kept = x[:, max(0, x.size(1) - keep):]
    state[name] = kept.clone() if x.size(1) > 2 * keep else kept  # no view of a long piece, which would all be kept
    return x, past
