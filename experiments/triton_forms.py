"""
Three parts of a layer as Triton kernels by hand, in place of what torch.compile and cuDNN make of them: the near part
of composite attention, the depthwise convolution, and kernelized attention by chunks. Candidates: no model uses them,
because no GPU has timed them yet.

    python experiments/triton_forms.py                       # on a GPU: are they equal to the plain forms?
    TRITON_INTERPRET=1 python experiments/triton_forms.py    # the same on a CPU: pip install triton "numpy<2.4"
    python experiments/speed.py --steps --models nope composite composite-triton conv conv-triton

FarNear in model_composite.py joins flash attention to the far keys with a convolution over the near ones. Compiled, the
near part is some twenty kernels, which write the numbers of each offset to memory and read them again: a layer of
GPT-2's size moves 2.5 GB more than one without positions (counted in the code that torch 2.11 generates for an H200).
Here a program takes a block of queries, reads its q, k, v and far part once, multiplies the block with itself and with
the end of the block before it (with two sides also with the start of the block after it), and keeps the band of near
keys. That should move 0.9 GB more. With near keys at distance 0 ... 3:

    before   itself
     n n n | n                n: near keys
     . n n | n n              .: products that do not count
     . . n | n n n
     . . . | n n n n          The gradients of a block's keys and values come from its own queries
     . . . | . n n n n        and from those at the start of the block after it.
"""
import argparse
import math
import sys
import traceback
from functools import cache
from importlib import util

import torch
import torch.nn.functional as F
from lib import die

import model_composite
import model_conv
import model_kernelized

try:
    import triton
    import triton.language as tl
except ImportError:
    die('triton_forms.py needs triton, which comes with torch for CUDA: pip install triton')

# Tokens of a program. One of 64 has fewer neighbours to read, one of 16 fewer products that do not count; a GPU tries
# all three, the interpreter takes the last.
SIZES = [triton.Config({'BLOCK': size}, num_warps=size // 16) for size in (16, 32, 64)]
WARPS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (1, 2)]
if not torch.cuda.is_available():
    SIZES, WARPS = SIZES[2:], WARPS[:1]
BLOCK = 64  # tokens of a program of the other kernels
CHUNK = 128  # far sums are made for every 128 tokens, as model_kernelized.py does on a GPU


@triton.jit
def load_rows(x, n, T, stride, channels):
    """Rows n of a matrix whose rows are `stride` apart; zeros beyond 0 ... T-1."""
    inside = (n >= 0) & (n < T)
    return tl.load(x + n[:, None] * stride + channels[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def near_scores(q, k, near, i, j, T, scale, FIRST: tl.constexpr, W: tl.constexpr):
    """q_i.k_j scale + near_i,j-i for offsets FIRST ... FIRST+W-1, else -inf; its place in near; whether it has one."""
    offset = j[None, :] - i[:, None]
    inside = (offset >= FIRST) & (offset < FIRST + W)
    inside = inside & (i >= 0)[:, None] & (i < T)[:, None] & (j >= 0)[None, :] & (j < T)[None, :]
    place = i[:, None] * W + offset - FIRST
    added = tl.load(near + place, mask=inside, other=-float('inf'))
    return tl.dot(q, tl.trans(k), input_precision='ieee') * scale + added, place, inside


@triton.autotune(SIZES, key=['T', 'SIDE', 'BOTH'])
@triton.jit
def near_forward_kernel(q, k, v, near, y_left, lse_left, y_right, lse_right, y, lse, T, nh, far, scale, sb, sh, st,
                        HS: tl.constexpr, FIRST: tl.constexpr, W: tl.constexpr, SIDE: tl.constexpr,
                        BOTH: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    channels = tl.arange(0, HS)
    row = nh * HS  # of y, (B, T, nh, hs), and of the far parts, (B, T-far, nh, hs)
    q += head // nh * sb + head % nh * sh
    k += head // nh * sb + head % nh * sh
    v += head // nh * sb + head % nh * sh
    near += head * T * W
    far_head = (head // nh * (T - far) * nh + head % nh) * HS
    queries = load_rows(q, i, T, st, channels)
    before = start - SIDE + tl.arange(0, SIDE)
    after = start + BLOCK + tl.arange(0, SIDE)

    scores, _, _ = near_scores(queries, load_rows(k, i, T, st, channels), near, i, i, T, scale, FIRST, W)
    scores_before, _, _ = near_scores(queries, load_rows(k, before, T, st, channels), near, i, before, T, scale,
                                      FIRST, W)
    left = tl.load(lse_left + head * T + i, mask=i < T, other=-float('inf'))
    top = tl.maximum(tl.maximum(tl.max(scores, 1), tl.max(scores_before, 1)), left)
    if BOTH:
        scores_after, _, _ = near_scores(queries, load_rows(k, after, T, st, channels), near, i, after, T, scale,
                                         FIRST, W)
        right = tl.load(lse_right + head * T + i, mask=i < T, other=-float('inf'))
        top = tl.maximum(tl.maximum(tl.max(scores_after, 1), right), top)
    top = tl.where(i < T, top, 0.0)

    p = tl.exp(scores - top[:, None])
    p_before = tl.exp(scores_before - top[:, None])
    p_left = tl.exp(left - top)
    total = tl.sum(p, 1) + tl.sum(p_before, 1) + p_left
    sums = tl.dot(p.to(queries.dtype), load_rows(v, i, T, st, channels), input_precision='ieee')
    sums += tl.dot(p_before.to(queries.dtype), load_rows(v, before, T, st, channels), input_precision='ieee')
    sums += p_left[:, None] * load_rows(y_left + far_head, i - far, T - far, row, channels)
    if BOTH:
        p_after = tl.exp(scores_after - top[:, None])
        p_right = tl.exp(right - top)
        total += tl.sum(p_after, 1) + p_right
        sums += tl.dot(p_after.to(queries.dtype), load_rows(v, after, T, st, channels), input_precision='ieee')
        sums += p_right[:, None] * load_rows(y_right + far_head, i, T - far, row, channels)
    total = tl.where(i < T, total, 1.0)
    y += (head // nh * T * nh + head % nh) * HS
    tl.store(y + i[:, None] * row + channels[None, :], sums / total[:, None], mask=(i < T)[:, None])
    tl.store(lse + head * T + i, top + tl.log(total), mask=i < T)


@triton.jit
def near_gradients(q, k, v, dy, near, lse, mean, i, j, T, scale, FIRST: tl.constexpr, W: tl.constexpr):
    """The weights of queries i and keys j, the gradients of their scores, where near has these; if it does."""
    scores, place, inside = near_scores(q, k, near, i, j, T, scale, FIRST, W)
    there = (i >= 0) & (i < T)
    p = tl.exp(scores - tl.load(lse + i, mask=there, other=0.0)[:, None])
    dp = tl.dot(dy, tl.trans(v), input_precision='ieee')
    return p, p * (dp - tl.load(mean + i, mask=there, other=0.0)[:, None]), place, inside


@triton.autotune(SIZES, key=['T', 'SIDE', 'BOTH'])
@triton.jit
def near_backward_kernel(q, k, v, dy, near, lse, mean, left_dq, left_dk, left_dv, right_dq, right_dk, right_dv,
                         dq, dk, dv, d_near, T, nh, far, scale, sb, sh, st, HS: tl.constexpr, FIRST: tl.constexpr,
                         W: tl.constexpr, SIDE: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    channels = tl.arange(0, HS)
    row = nh * HS
    q += head // nh * sb + head % nh * sh
    k += head // nh * sb + head % nh * sh
    v += head // nh * sb + head % nh * sh
    own_head = (head // nh * T * nh + head % nh) * HS
    far_head = (head // nh * (T - far) * nh + head % nh) * HS
    dy += own_head
    near += head * T * W
    d_near += head * T * W
    lse += head * T
    mean += head * T
    queries = load_rows(q, i, T, st, channels)
    keys = load_rows(k, i, T, st, channels)
    values = load_rows(v, i, T, st, channels)
    dys = load_rows(dy, i, T, row, channels)

    p, ds, place, inside = near_gradients(queries, keys, values, dys, near, lse, mean, i, i, T, scale, FIRST, W)
    tl.store(d_near + place, ds, mask=inside)
    ds = ds.to(queries.dtype)
    sum_q = tl.dot(ds, keys, input_precision='ieee')
    sum_k = tl.dot(tl.trans(ds), queries, input_precision='ieee')
    sum_v = tl.dot(tl.trans(p.to(queries.dtype)), dys, input_precision='ieee')

    for side in tl.static_range(2):  # the block before gives keys to our queries, the block after queries to our keys
        if side == 0 or BOTH:
            j = start - SIDE + tl.arange(0, SIDE) if side == 0 else start + BLOCK + tl.arange(0, SIDE)
            other_keys = load_rows(k, j, T, st, channels)
            p, ds, place, inside = near_gradients(queries, other_keys, load_rows(v, j, T, st, channels), dys, near, lse,
                                                  mean, i, j, T, scale, FIRST, W)
            tl.store(d_near + place, ds, mask=inside)
            sum_q += tl.dot(ds.to(queries.dtype), other_keys, input_precision='ieee')
        if side == 1 or BOTH:
            j = start - SIDE + tl.arange(0, SIDE) if side == 0 else start + BLOCK + tl.arange(0, SIDE)
            other_queries = load_rows(q, j, T, st, channels)
            other_dys = load_rows(dy, j, T, row, channels)
            p, ds, place, inside = near_gradients(other_queries, keys, values, other_dys, near, lse, mean, j, i, T,
                                                  scale, FIRST, W)
            sum_k += tl.dot(tl.trans(ds.to(queries.dtype)), other_queries, input_precision='ieee')
            sum_v += tl.dot(tl.trans(p.to(queries.dtype)), other_dys, input_precision='ieee')

    # far queries on the left are those from `far` on, far keys all but the last `far`; on the right the other way round
    sum_q = sum_q * scale + load_rows(left_dq + far_head, i - far, T - far, row, channels)
    sum_k = sum_k * scale + load_rows(left_dk + far_head, i, T - far, row, channels)
    sum_v += load_rows(left_dv + far_head, i, T - far, row, channels)
    if BOTH:
        sum_q += load_rows(right_dq + far_head, i, T - far, row, channels)
        sum_k += load_rows(right_dk + far_head, i - far, T - far, row, channels)
        sum_v += load_rows(right_dv + far_head, i - far, T - far, row, channels)
    place = own_head + i[:, None] * row + channels[None, :]
    tl.store(dq + place, sum_q, mask=(i < T)[:, None])
    tl.store(dk + place, sum_k, mask=(i < T)[:, None])
    tl.store(dv + place, sum_v, mask=(i < T)[:, None])


def launch(kernel, q, k, v, near, far, tensors):
    """Run a near kernel for q, k, v (B, nh, T, hs), which get the same strides, and near (B, nh, T, W)."""
    B, nh, T, hs = q.shape
    side = max(16, triton.next_power_of_2(far))  # a product of Triton's has 16 rows or more
    if hs < 16 or hs & (hs - 1):
        raise ValueError(f'the near kernels take heads of 16, 32, 64, ... channels, not {hs}')
    if any(x.stride() != q.stride() or x.stride(-1) != 1 for x in (q, k, v)):
        q, k, v = [x.contiguous() for x in (q, k, v)]
    kernel[lambda chosen: (triton.cdiv(T, chosen['BLOCK']), B * nh)](
        q, k, v, *tensors, T, nh, far, hs ** -0.5, *q.stride()[:3], HS=hs, FIRST=1 - far, W=near.size(-1), SIDE=side,
        BOTH=near.size(-1) > far)


@torch.library.custom_op('triton_forms::near_forward', mutates_args=())
def near_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, near: torch.Tensor, y_left: torch.Tensor,
                 lse_left: torch.Tensor, y_right: torch.Tensor, lse_right: torch.Tensor,
                 far: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, nh, hs) of all keys and the log-sum-exp (B, nh, T) of their scores.

    y_left, y_right (B, T-far, nh, hs), lse_left, lse_right (B, nh, T): the far parts; the right one is not read when
    near has no offsets above 0.
    """
    y = q.new_empty(q.size(0), q.size(2), q.size(1), q.size(3))
    lse = near.new_empty(near.shape[:3])
    sides = [x.contiguous() for x in (near, y_left, lse_left, y_right, lse_right)]
    launch(near_forward_kernel, q, k, v, near, far, [*sides, y, lse])
    return y, lse


@near_forward.register_fake
def _(q, k, v, near, *_):
    return q.new_empty(q.size(0), q.size(2), q.size(1), q.size(3)), near.new_empty(near.shape[:3])


@torch.library.custom_op('triton_forms::near_backward', mutates_args=())
def near_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, near: torch.Tensor,
                  lse: torch.Tensor, mean: torch.Tensor, left: list[torch.Tensor], right: list[torch.Tensor],
                  far: int) -> list[torch.Tensor]:
    """The gradients of q, k, v (B, T, nh, hs), with those of the far parts (left, right) in them, and of near."""
    gradients = [q.new_empty(dy.shape) for _ in range(3)] + [near.new_zeros(near.shape)]
    inputs = [x.contiguous() for x in (dy, near, lse, mean, *left, *right)]
    launch(near_backward_kernel, q, k, v, near, far, [*inputs, *gradients])
    return gradients


@near_backward.register_fake
def _(q, k, v, dy, near, *_):
    return [q.new_empty(dy.shape) for _ in range(3)] + [near.new_empty(near.shape)]


@torch.library.custom_op('triton_forms::cudnn', mutates_args=())
def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention by cuDNN: q, k, v (B, nh, n, hs) -> (B, n, nh, hs) and the log-sum-exp (B, nh, n)."""
    y, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
    return y.transpose(1, 2).contiguous(), lse.reshape(q.shape[:3])


@cudnn.register_fake
def _(q, k, v):
    return q.new_empty(q.size(0), q.size(2), q.size(1), q.size(3)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op('triton_forms::cudnn_backward', mutates_args=())
def cudnn_backward(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                   lse: torch.Tensor) -> list[torch.Tensor]:
    """flash_backward() of model_composite.py by cuDNN -> (B, n, nh, hs). All inputs (B, nh, n, hs), lse (B, nh, n)."""
    n = q.size(2)
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dy, q, k, v, y, lse.contiguous()[..., None], no_dropout, no_dropout, None, None, None, n, n, 0.0, True)
    return [x.transpose(1, 2).contiguous() for x in gradients]


@cudnn_backward.register_fake
def _(dy, q, *_):
    return [q.new_empty(q.size(0), q.size(2), q.size(1), q.size(3)) for _ in range(3)]


def far_part(q, k, v, side, by_cudnn=False):
    """Attention to the far keys of a side: (B, n, nh, hs), the log-sum-exp (B, nh, n), what its gradients need."""
    if by_cudnn:
        return *cudnn(q, k, v), []
    y, lse, rng = model_composite.flash(q, k, v, right=side == 'right')
    return y.transpose(1, 2), lse, rng


def far_gradients(dy, q, k, v, y, lse, rng, side, by_cudnn=False):
    """Those of far_part, each (B, n, nh, hs); lse counts all keys."""
    if by_cudnn:
        return cudnn_backward(dy, q, k, v, y, lse)
    gradients = model_composite.flash_backward(dy, q, k, v, y, lse, rng, right=side == 'right')
    return [x.transpose(1, 2) for x in gradients]


def far_and_near(by_cudnn):
    """FarNear of model_composite.py with the near part and all sums in the kernels above.

    by_cudnn: the far part on the left by cuDNN, which torch prefers on an H100 where it can choose.
    """
    class FarNear(torch.autograd.Function):

        @staticmethod
        def forward(ctx, q, k, v, near, right, far):
            wide = near.dtype
            y_left, lse_left, rng = far_part(q[:, :, far:], k[:, :, :-far], v[:, :, :-far], 'left', by_cudnn)
            lse_left = F.pad(lse_left.to(wide), (far, 0), value=-math.inf)
            sides = [y_left, lse_left, y_left, lse_left]  # without a right side the last two are not read
            if right is not None:
                y_right, lse_right, more = far_part(q[:, :, :-far], k[:, :, far:], v[:, :, far:], 'right')
                lse_right = F.pad(lse_right.to(wide), (0, far), value=-math.inf) + right
                sides[2:] = y_right, lse_right
                rng = rng + more
            y, lse = near_forward(q, k, v, near, *sides, far)
            ctx.far = far
            kept = sides[2:] if right is not None else (None, None)
            ctx.save_for_backward(q, k, v, near, right, y, lse, *kept, *rng)
            return y

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dy):
            q, k, v, near, right, y, lse, y_right, lse_right, *rng = ctx.saved_tensors
            far = ctx.far
            dy = dy.contiguous()  # cuDNN remembers a plan for q, k and v, whatever the strides of dy
            mean = (dy.to(near.dtype) * y).sum(-1).transpose(1, 2)  # (B, nh, T)
            late = (slice(None), slice(None), slice(far, None))  # all but the first `far` tokens
            early = (slice(None), slice(None), slice(None, -far))
            y, dy_heads = y.transpose(1, 2), dy.transpose(1, 2)
            left = others = far_gradients(dy_heads[late], q[late], k[early], v[early], y[late], lse[late],
                                          rng if right is None else rng[:-2], 'left', by_cudnn)
            d_right = None
            if right is not None:
                far_mean = (dy[:, :-far].to(near.dtype) * y_right).sum(-1).transpose(1, 2)
                d_right = (lse_right - lse).exp() * (F.pad(far_mean, (0, far)) - mean)
                others = far_gradients(dy_heads[early], q[early], k[late], v[late], y[early], (lse - right)[early],
                                       rng[-2:], 'right')
            dq, dk, dv, d_near = near_backward(q, k, v, dy, near, lse, mean, left, others, far)
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), d_near, d_right, None

    return FarNear


@triton.jit
def depthwise_kernel(x, w, y, S, T, C, first, sb, st, K: tl.constexpr, BLOCK: tl.constexpr):
    """y_tc = sum over r of w_rc x_(t + first + r)c: x (B, S, C), w (K, C), y (B, T, C)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    text = tl.program_id(2).to(tl.int64)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for r in tl.static_range(K):
        j = t + first + r
        inside = ((j >= 0) & (j < S))[:, None] & (c < C)[None, :]
        rows = tl.load(x + text * sb + j[:, None] * st + c[None, :], mask=inside, other=0.0)
        sums += rows * tl.load(w + r * C + c, mask=c < C, other=0.0)[None, :]
    place = (text * T + t[:, None]) * C + c[None, :]
    tl.store(y + place, sums, mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def depthwise_weights_kernel(x, dy, dw, S, T, C, first, sb, st, K: tl.constexpr, BLOCK: tl.constexpr):
    """dw_rc = sum over the rows t of this block of dy_tc x_(t + first + r)c: dw (B, blocks, K, C)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    text = tl.program_id(2).to(tl.int64)
    here = (t < T)[:, None] & (c < C)[None, :]
    dys = tl.load(dy + (text * T + t[:, None]) * C + c[None, :], mask=here, other=0.0).to(tl.float32)
    dw += (text * tl.num_programs(0) + tl.program_id(0)) * K * C
    for r in tl.static_range(K):
        j = t + first + r
        inside = ((j >= 0) & (j < S))[:, None] & (c < C)[None, :]
        rows = tl.load(x + text * sb + j[:, None] * st + c[None, :], mask=inside, other=0.0)
        tl.store(dw + r * C + c, tl.sum(rows * dys, 0), mask=c < C)


@torch.library.custom_op('triton_forms::shifted_sums', mutates_args=())
def shifted_sums(x: torch.Tensor, w: torch.Tensor, first: int, T: int) -> torch.Tensor:
    """(B, T, C): row t is the sum over r of w[r] times row t + first + r of x (B, S, C), zeros beyond its ends."""
    B, S, C = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(B, T, C)
    grid = (triton.cdiv(T, BLOCK), triton.cdiv(C, BLOCK), B)
    depthwise_kernel[grid](x, w.contiguous(), y, S, T, C, first, *x.stride()[:2], K=w.size(0), BLOCK=BLOCK)
    return y


@shifted_sums.register_fake
def _(x, w, first, T):
    return x.new_empty(x.size(0), T, x.size(2))


@torch.library.custom_op('triton_forms::sums_over_rows', mutates_args=())
def sums_over_rows(x: torch.Tensor, dy: torch.Tensor, first: int, K: int) -> torch.Tensor:
    """(K, C): the gradient of w in shifted_sums."""
    B, T, C = dy.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = triton.cdiv(T, BLOCK)
    dw = x.new_empty(B, blocks, K, C, dtype=torch.float32)
    grid = (blocks, triton.cdiv(C, BLOCK), B)
    depthwise_weights_kernel[grid](x, dy.contiguous(), dw, x.size(1), T, C, first, *x.stride()[:2], K=K,
                                   BLOCK=BLOCK)
    return dw.sum((0, 1))


@sums_over_rows.register_fake
def _(x, dy, first, K):
    return x.new_empty(K, x.size(2), dtype=torch.float32)


class Depthwise(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, w, first, T):
        ctx.save_for_backward(x, w)
        ctx.first = first
        return shifted_sums(x, w.float().T, first, T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        K = w.size(1)
        dx = shifted_sums(dy, w.float().T.flip(0), 1 - K - ctx.first, x.size(1))
        return dx, sums_over_rows(x, dy, ctx.first, K).T.to(w.dtype), None, None


def depthwise_conv(x, w, causal=True, past=0):
    """depthwise_conv of model_conv.py by the two kernels above."""
    left = w.size(-1) - 1 if causal else w.size(-1) // 2
    return Depthwise.apply(x, w, past - left, x.size(1) - past)


@triton.jit
def of_head(q, k, v, b, head, T, nh, R, sb, sh, M: tl.constexpr):
    """Where the rows of a text's head begin in q and k (B, nh, T, M), v and b (nh, 2R+1)."""
    return q + head * T * M, k + head * T * M, v + head // nh * sb + head % nh * sh, b + head % nh * (2 * R + 1)


@triton.jit
def chunk_scores(queries, keys, b, largest, i, j, T, R):
    """phi(q_i).phi(k_j) and exp(b_j-i - largest_i), 0 for the future; b: the row of a head, offsets -R ... R."""
    see = (j[None, :] <= i[:, None]) & (i < T)[:, None]
    offset = tl.maximum(j[None, :] - i[:, None], -R)
    log_weight = tl.load(b + offset + R, mask=see, other=-float('inf'))
    return tl.dot(queries, tl.trans(keys), input_precision='ieee'), tl.exp(log_weight - largest[:, None])


@triton.jit
def far_weight(b, largest, chunk, reach):
    """exp(b_-R - largest_i), 0 where no chunk is far: there it could overflow."""
    return tl.where(chunk > reach, tl.exp(tl.minimum(tl.load(b) - largest, 0.0)), 0.0)


@triton.autotune(WARPS, key=['T', 'R'])
@triton.jit
def chunk_forward_kernel(q, k, v, b, largest, kv, k_sum, y, total, T, nh, n_chunks, R, reach, sb, sh, st,
                         M: tl.constexpr, HS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    features = tl.arange(0, M)
    channels = tl.arange(0, HS)
    chunk = start // CHUNK
    q, k, v, b = of_head(q, k, v, b, head, T, nh, R, sb, sh, M)
    queries = load_rows(q, i, T, M, features)
    top = tl.load(largest + head % nh * T + i, mask=i < T, other=0.0)
    sums = tl.zeros((BLOCK, HS), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.maximum(chunk - reach, 0) * CHUNK, start + BLOCK, BLOCK):
        j = first + tl.arange(0, BLOCK)
        scores, weight = chunk_scores(queries, load_rows(k, j, T, M, features), b, top, i, j, T, R)
        att = scores * weight
        totals += tl.sum(att, 1)
        sums += tl.dot(att.to(queries.dtype), load_rows(v, j, T, st, channels), input_precision='ieee')
    weight = far_weight(b, top, chunk, reach)
    place = head * n_chunks + chunk
    far = tl.load(kv + place * M * HS + features[:, None] * HS + channels[None, :]).to(queries.dtype)
    sums += weight[:, None] * tl.dot(queries, far, input_precision='ieee')
    totals += weight * tl.sum(queries * tl.load(k_sum + place * M + features)[None, :], 1)
    totals = tl.where(totals > 1e-30, totals, float('inf'))  # all features have vanished
    y += (head // nh * T * nh + head % nh) * HS
    tl.store(y + i[:, None] * (nh * HS) + channels[None, :], sums / totals[:, None], mask=(i < T)[:, None])
    tl.store(total + head * T + i, totals, mask=i < T)


@triton.jit
def load_fraction(dy, mean, total, i, T, row, channels):
    """The gradients of the numerator (BLOCK, HS) and of the denominator (BLOCK) of rows i; mean: sum of dy y."""
    below = tl.load(total + i, mask=i < T, other=float('inf'))
    return load_rows(dy, i, T, row, channels) / below[:, None], -tl.load(mean + i, mask=i < T, other=0.0) / below


@triton.autotune(WARPS, key=['T', 'R'])
@triton.jit
def chunk_queries_kernel(q, k, v, b, largest, kv, k_sum, dy, mean, total, dq, d_kv, d_k_sum, d_far, T, nh, n_chunks, R,
                         reach, sb, sh, st, M: tl.constexpr, HS: tl.constexpr, CHUNK: tl.constexpr,
                         BLOCK: tl.constexpr):
    """Gradients of the queries of a block, and of the far sums and the far weight from these queries."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    features = tl.arange(0, M)
    channels = tl.arange(0, HS)
    chunk = start // CHUNK
    q, k, v, b = of_head(q, k, v, b, head, T, nh, R, sb, sh, M)
    dy += (head // nh * T * nh + head % nh) * HS
    queries = load_rows(q, i, T, M, features)
    top = tl.load(largest + head % nh * T + i, mask=i < T, other=0.0)
    above, below = load_fraction(dy, mean + head * T, total + head * T, i, T, nh * HS, channels)
    narrow = above.to(queries.dtype)
    sum_q = tl.zeros((BLOCK, M), tl.float32)
    for first in range(tl.maximum(chunk - reach, 0) * CHUNK, start + BLOCK, BLOCK):
        j = first + tl.arange(0, BLOCK)
        keys = load_rows(k, j, T, M, features)
        _, weight = chunk_scores(queries, keys, b, top, i, j, T, R)
        values = load_rows(v, j, T, st, channels)
        ds = (tl.dot(narrow, tl.trans(values), input_precision='ieee') + below[:, None]) * weight
        sum_q += tl.dot(ds.to(queries.dtype), keys, input_precision='ieee')
    weight = far_weight(b, top, chunk, reach)
    place = head * n_chunks + chunk
    far = tl.load(kv + place * M * HS + features[:, None] * HS + channels[None, :]).to(queries.dtype)
    far_sum = tl.load(k_sum + place * M + features)
    d_features = tl.dot(narrow, tl.trans(far), input_precision='ieee') + below[:, None] * far_sum[None, :]
    sum_q += weight[:, None] * d_features
    tl.store(dq + head * T * M + i[:, None] * M + features[None, :], sum_q, mask=(i < T)[:, None])
    tl.store(d_far + head * T + i, weight * tl.sum(queries * d_features, 1), mask=i < T)
    weighted = queries * weight[:, None]
    place = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(d_kv + place * M * HS + features[:, None] * HS + channels[None, :],
             tl.dot(tl.trans(weighted.to(queries.dtype)), narrow, input_precision='ieee'))
    tl.store(d_k_sum + place * M + features, tl.sum(weighted * below[:, None], 0))


@triton.autotune(WARPS, key=['T', 'R'])
@triton.jit
def chunk_keys_kernel(q, k, v, b, largest, dy, mean, total, dk, dv, T, nh, R, reach, sb, sh, st, M: tl.constexpr,
                      HS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the keys and values of a block from the queries that are near to them."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    j = start + tl.arange(0, BLOCK)
    features = tl.arange(0, M)
    channels = tl.arange(0, HS)
    q, k, v, b = of_head(q, k, v, b, head, T, nh, R, sb, sh, M)
    out = (head // nh * T * nh + head % nh) * HS
    keys = load_rows(k, j, T, M, features)
    values = load_rows(v, j, T, st, channels)
    sum_k = tl.zeros((BLOCK, M), tl.float32)
    sum_v = tl.zeros((BLOCK, HS), tl.float32)
    for first in range(start, tl.minimum((start // CHUNK + reach + 1) * CHUNK, T), BLOCK):
        i = first + tl.arange(0, BLOCK)
        queries = load_rows(q, i, T, M, features)
        top = tl.load(largest + head % nh * T + i, mask=i < T, other=0.0)
        above, below = load_fraction(dy + out, mean + head * T, total + head * T, i, T, nh * HS, channels)
        narrow = above.to(queries.dtype)
        scores, weight = chunk_scores(queries, keys, b, top, i, j, T, R)
        sum_v += tl.dot(tl.trans((scores * weight).to(queries.dtype)), narrow, input_precision='ieee')
        ds = (tl.dot(narrow, tl.trans(values), input_precision='ieee') + below[:, None]) * weight
        sum_k += tl.dot(tl.trans(ds.to(queries.dtype)), queries, input_precision='ieee')
    tl.store(dk + head * T * M + j[:, None] * M + features[None, :], sum_k, mask=(j < T)[:, None])
    tl.store(dv + out + j[:, None] * (nh * HS) + channels[None, :], sum_v, mask=(j < T)[:, None])


@triton.autotune(WARPS, key=['T', 'R'])
@triton.jit
def chunk_weights_kernel(q, k, v, b, largest, dy, mean, total, db, T, nh, R, reach, sb, sh, st, M: tl.constexpr,
                         HS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the log-weights of queries and keys that are a fixed number of blocks apart, summed over a text."""
    head = tl.program_id(1).to(tl.int64)
    apart = tl.program_id(0) * BLOCK
    features = tl.arange(0, M)
    channels = tl.arange(0, HS)
    q, k, v, b = of_head(q, k, v, b, head, T, nh, R, sb, sh, M)
    dy += (head // nh * T * nh + head % nh) * HS
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(apart, T, BLOCK):
        if start - apart >= (start // CHUNK - reach) * CHUNK:  # else these keys are far
            i = start + tl.arange(0, BLOCK)
            j = i - apart
            queries = load_rows(q, i, T, M, features)
            top = tl.load(largest + head % nh * T + i, mask=i < T, other=0.0)
            above, below = load_fraction(dy, mean + head * T, total + head * T, i, T, nh * HS, channels)
            scores, weight = chunk_scores(queries, load_rows(k, j, T, M, features), b, top, i, j, T, R)
            values = load_rows(v, j, T, st, channels)
            d_att = tl.dot(above.to(queries.dtype), tl.trans(values), input_precision='ieee') + below[:, None]
            sums += scores * weight * d_att
    place = (head * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK
    rows = tl.arange(0, BLOCK)
    tl.store(db + place + rows[:, None] * BLOCK + rows[None, :], sums)


def chunk_sizes(q, v, b):
    """Number of chunks, near chunks before a query's own, and the numbers and constants that all chunk kernels take."""
    T, m = q.shape[2:]
    R = b.size(1) // 2
    n_chunks = triton.cdiv(T, CHUNK)
    reach = max(0, triton.cdiv(R - 1, CHUNK))
    constants = dict(M=m, HS=v.size(-1), CHUNK=CHUNK, BLOCK=BLOCK)
    return n_chunks, reach, [R, reach, *v.stride()[:3]], constants


@torch.library.custom_op('triton_forms::chunk_forward', mutates_args=())
def chunk_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, largest: torch.Tensor,
                  kv: torch.Tensor, k_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, nh, hs) and the normaliser (B, nh, T); arguments as in Chunks below."""
    q, k, b, largest, kv, k_sum = [x.contiguous() for x in (q, k, b, largest, kv, k_sum)]
    v = v if v.stride(-1) == 1 else v.contiguous()
    B, nh, T, hs = v.shape
    y = v.new_empty(B, T, nh, hs)
    total = largest.new_empty(B, nh, T)
    n_chunks, _, numbers, constants = chunk_sizes(q, v, b)
    chunk_forward_kernel[triton.cdiv(T, BLOCK), B * nh](q, k, v, b, largest, kv, k_sum, y, total, T, nh, n_chunks,
                                                       *numbers, **constants)
    return y, total


@chunk_forward.register_fake
def _(q, k, v, b, largest, *_):
    B, nh, T, hs = v.shape
    return v.new_empty(B, T, nh, hs), largest.new_empty(B, nh, T)


@torch.library.custom_op('triton_forms::chunk_backward', mutates_args=())
def chunk_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, largest: torch.Tensor,
                   kv: torch.Tensor, k_sum: torch.Tensor, dy: torch.Tensor, mean: torch.Tensor,
                   total: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of q, k (B, nh, T, m), of v (B, T, nh, hs); of b, kv and k_sum in parts that are still to be added up:

    (B, nh, blocks apart, BLOCK, BLOCK), (B, nh, blocks, m, hs), (B, nh, blocks, m), and of b's far end (B, nh, T).
    """
    q, k, b, largest, kv, k_sum = [x.contiguous() for x in (q, k, b, largest, kv, k_sum)]
    dy, mean, total = [x.contiguous() for x in (dy, mean, total)]
    v = v if v.stride(-1) == 1 else v.contiguous()
    B, nh, T, hs = v.shape
    n_chunks, reach, numbers, constants = chunk_sizes(q, v, b)
    results = empty_gradients(q, v, largest, reach)
    dq, dk, dv, db, d_kv, d_k_sum, d_far = results
    shared = [q, k, v, b, largest]
    grid = (triton.cdiv(T, BLOCK), B * nh)
    chunk_queries_kernel[grid](*shared, kv, k_sum, dy, mean, total, dq, d_kv, d_k_sum, d_far, T, nh, n_chunks, *numbers,
                               **constants)
    chunk_keys_kernel[grid](*shared, dy, mean, total, dk, dv, T, nh, *numbers, **constants)
    chunk_weights_kernel[db.size(2), B * nh](*shared, dy, mean, total, db, T, nh, *numbers, **constants)
    return results


def empty_gradients(q, v, largest, reach):
    """What chunk_backward fills."""
    B, nh, T, m = q.shape
    blocks = triton.cdiv(T, BLOCK)
    apart = min(blocks, (reach + 1) * (CHUNK // BLOCK))
    return [torch.empty_like(q, memory_format=torch.contiguous_format),
            torch.empty_like(q, memory_format=torch.contiguous_format), v.new_empty(B, T, nh, v.size(-1)),
            largest.new_empty(B, nh, apart, BLOCK, BLOCK), v.new_empty(B, nh, blocks, m, v.size(-1)),
            largest.new_empty(B, nh, blocks, m), largest.new_empty(B, nh, T)]


@chunk_backward.register_fake
def _(q, k, v, b, largest, *_):
    return empty_gradients(q, v, largest, chunk_sizes(q, v, b)[1])


class Chunks(torch.autograd.Function):
    """Near keys by small matrices and far ones by their sums, causal, in one kernel forward and three backward.

    q, k (B, nh, T, m): features; v (B, nh, T, hs); b (nh, 2R+1). largest (nh, T): the largest log-weight of a row,
    which cancels. kv (B, nh, n_chunks, m, hs), k_sum (B, nh, n_chunks, m): sums of phi(k)^T v and phi(k) over the
    chunks that are far from each chunk. Returns (B, T, nh, hs).
    """

    @staticmethod
    def forward(ctx, q, k, v, b, largest, kv, k_sum):
        y, total = chunk_forward(q, k, v, b, largest, kv, k_sum)
        ctx.save_for_backward(q, k, v, b, largest, kv, k_sum, y, total)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, b, largest, kv, k_sum, y, total = ctx.saved_tensors
        mean = (dy.float() * y).sum(-1).transpose(1, 2)  # (B, nh, T)
        dq, dk, dv, db, d_kv, d_k_sum, d_far = chunk_backward(q, k, v, b, largest, kv, k_sum, dy, mean, total)
        R = b.size(1) // 2
        i = torch.arange(BLOCK, device=q.device)
        apart = torch.arange(db.size(2), device=q.device)[:, None, None] * BLOCK
        entry = (i - i[:, None] - apart + R).clamp(0, R)  # (blocks apart, BLOCK, BLOCK); of the future db is 0
        d_b = torch.zeros_like(b, dtype=db.dtype).index_add(1, entry.flatten(), db.sum(0).flatten(1))
        d_b[:, 0] += d_far.sum((0, 2))
        each = CHUNK // BLOCK
        odd = -d_kv.size(2) % each
        d_kv = F.pad(d_kv, (0, 0, 0, 0, 0, odd)).unflatten(2, (-1, each)).sum(3, dtype=kv.dtype)
        d_k_sum = F.pad(d_k_sum, (0, 0, 0, odd)).unflatten(2, (-1, each)).sum(3)
        return dq, dk, dv.transpose(1, 2), d_b.to(b.dtype), None, d_kv, d_k_sum


def attend_chunked(q, k, v, b, causal=True, valid=None, chunk=CHUNK):
    """attend_chunked of model_kernelized.py by the kernels above; causal, without padding."""
    if not causal or valid is not None:
        raise ValueError('the chunk kernels are causal and know no padding')
    T, R = q.size(2), b.size(1) // 2
    q, k = q.to(v.dtype), k.to(v.dtype)
    n_chunks, reach, _, _ = chunk_sizes(q, v, b)
    past = b.detach().float()[:, :R + 1].flip(1).cummax(1)[0]  # (nh, R+1): the largest of the offsets 0 ... -r
    largest = past[:, torch.arange(T, device=q.device).clamp(max=R)]
    k_chunks, v_chunks = [F.pad(x, (0, 0, 0, -T % CHUNK)).unflatten(2, (n_chunks, CHUNK)) for x in (k, v)]

    def sum_before(x):
        return F.pad(x.float().cumsum(2), (0, 0) * (x.dim() - 3) + (reach + 1, 0))[:, :, :n_chunks]
    kv = sum_before(k_chunks.transpose(3, 4) @ v_chunks)
    k_sum = sum_before(k_chunks.sum(3, dtype=torch.float32))
    return Chunks.apply(q, k, v, b, largest, kv, k_sum).transpose(1, 2)


@cache
def with_kernels(module, by_cudnn=False):
    """A copy of model_composite, model_conv or model_kernelized with the kernels of this file; see far_and_near."""
    name = f'{module.__name__}_with_kernels{"_and_cudnn" if by_cudnn else ""}'
    spec = util.spec_from_file_location(name, module.__file__)
    copy = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.FarNear = far_and_near(by_cudnn)
    copy.depthwise_conv = depthwise_conv
    copy.attend_chunked = attend_chunked
    return copy


def difference(form, plain, inputs):
    """Largest difference of values and gradients from the plain form in float32, over its largest number."""
    found = []
    for f, dtype in ((form, inputs[0].dtype), (plain, torch.float32)):
        own = [x.detach().to(dtype).requires_grad_() for x in inputs]
        y = f(*own)
        weights = torch.linspace(-1, 1, y.numel(), device=y.device).sin().view_as(y).to(dtype)
        found.append((y, *torch.autograd.grad(y, own, weights)))
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(*found)]).max().item()  # NaN if one is


def attention_of_rows(attend, nh, causal):
    """attend as a function of x (B, T, 3C), what c_attn returns, and kernel_scores."""
    def run(x, kernel_scores):
        q, k, v = [z.unflatten(2, (nh, -1)).transpose(1, 2) for z in x.chunk(3, 2)]
        return attend(q, k, v, kernel_scores, causal)
    return run


def chunks_of_rows(attend, nh):
    """attend as a function of x (B, T, 3C), whose exponentials are the features, and b."""
    def run(x, b):
        q, k, v = [z.unflatten(2, (nh, -1)).transpose(1, 2) for z in x.chunk(3, 2)]
        return attend((q / 4).exp(), (k / 4).exp(), v, b)
    return run


def convolution_of_rows(conv, causal):
    """conv of the last third of x (B, T, 3C), with a past of 5 tokens."""
    return lambda x, w: conv(x.chunk(3, 2)[2], w, causal, 5)


def cases(gpu, part):
    """(name, form, plain form, inputs) of a part: small texts in float32, and on a GPU GPT-2's heads in bfloat16."""
    shapes = [(2, 2, 9, 16, 17), (2, 2, 130, 32, 17), (1, 1, 64, 16, 35), (1, 1, 300, 16, 5)]
    if gpu:
        shapes = [(2, 3, 144, 64, 17), (2, 2, 1024, 64, 17)]
    options = dict(device='cuda' if gpu else 'cpu', dtype=torch.bfloat16 if gpu else torch.float32)
    for B, nh, T, hs, K in shapes:
        x = torch.randn(B, T, 3 * nh * hs, **options)
        if part == 'chunks':
            b = torch.randn(nh, 2 * max(1, T // 10) + 1, **options)
            forms = [chunks_of_rows(attend, nh) for attend in (attend_chunked, model_kernelized.attend_dense)]
            yield f'chunks, T = {T}, b of {b.size(1)}, causal', *forms, (x, b)
            continue
        for causal in (True, False):
            text = f'T = {T}, kernel of {K}, {"causal" if causal else "both sides"}'
            if part == 'convolution':
                forms = [convolution_of_rows(conv, causal) for conv in (depthwise_conv, model_conv.depthwise_conv)]
                yield f'depthwise convolution, {text}', *forms, (x, torch.randn(nh * hs, K, **options))
                continue
            copy = with_kernels(model_composite, by_cudnn=part == 'cudnn')
            forms = [attention_of_rows(attend, nh, causal)
                     for attend in (copy.attend_far_and_near, model_composite.attend_dense)]
            far = 'cuDNN' if part == 'cudnn' else 'flash'
            yield f'near part, far part by {far}, {text}', *forms, (x, torch.randn(B, nh, T, K, **options))


def main():
    gpu = torch.cuda.is_available()
    known = ['near', 'convolution', 'chunks'] + ['cudnn'] * gpu
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=known, help='(default all; on a GPU a wild access spoils what follows)')
    only = parser.parse_args().only
    allowed = 2e-2 if gpu else 5e-5
    torch.manual_seed(0)
    wrong = 0
    for name, form, plain, inputs in (case for part in ([only] if only else known) for case in cases(gpu, part)):
        for compiled in (False, True) if gpu else (False,):
            torch._dynamo.reset()
            try:
                error = difference(torch.compile(form, dynamic=False) if compiled else form, plain, inputs)
            except Exception:  # the other cases are checked all the same
                traceback.print_exc()
                error = math.nan
            wrong += not error < allowed
            how = ', compiled' if compiled else ''
            print(f'{name}{how}: {error:.1e}{"" if error < allowed else "  WRONG"}', flush=True)
    for kernel in (near_forward_kernel, near_backward_kernel, chunk_forward_kernel, chunk_keys_kernel):
        if gpu and hasattr(kernel, 'best_config'):
            print(f'chosen for {kernel.fn.__name__}: {kernel.best_config}')
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
