"""The equalities can fail: plant one error at a time in a copy of the model files, and test_equivalence.py turns red.

    python tests/test_planted_errors.py         # the table: each error, and the first row that catches it
    python tests/test_planted_errors.py padding # only the errors with this word in their name, in any case of letters
"""
import contextlib
import io
import multiprocessing
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
COMPOSITE, CONV, KERNELIZED, NOPE = [f'model_{name}.py' for name in ('composite', 'conv', 'kernelized', 'nope')]
NOPE_COMPOSITE = f'{NOPE} {COMPOSITE}'
ALL = f'{NOPE} {COMPOSITE} {CONV}'
ROPE, ALIBI, TISA, CAPE = [f'baselines/model_{name}.py' for name in ('rope', 'alibi', 'tisa', 'cape')]
# what: (files, right, wrong); the right text stands exactly once in each of the files
ERRORS = {
    'offset mirrored': (
        COMPOSITE,
        'T = kernel.size(-2)',
        'kernel = kernel.flip(-1)\n    T = kernel.size(-2)'),
    'offset off by one': (
        COMPOSITE,
        'torch.cat((first, middle, last), -1)',
        'torch.cat((first, middle, last), -1).roll(1, -1)'),
    'clip dropped: nothing beyond the kernel': (
        COMPOSITE,
        'torch.cat((first, middle, last), -1)',
        'torch.cat((first * 0, middle, last), -1)'),
    'clip dropped on the right': (
        COMPOSITE,
        'torch.cat((first, middle, last), -1)',
        'torch.cat((first, middle, last * 0), -1)'),
    'scale of the content dropped': (
        COMPOSITE,
        'att = (q / math.sqrt(q.size(-1))) @',
        'att = q @'),
    'scale of the query-made kernel dropped': (
        COMPOSITE,
        'q @ self.dynamic.T * scale',
        'q @ self.dynamic.T'),
    'scale of the key-made kernel dropped': (
        COMPOSITE,
        'k @ self.dynamic_key.T * scale',
        'k @ self.dynamic_key.T'),
    'fixed kernel scaled': (
        COMPOSITE,
        'kernel_scores + self.fixed[:, None]',
        'kernel_scores + self.fixed[:, None] * scale'),
    'heads of the fixed kernel mixed up': (
        COMPOSITE,
        'kernel_scores + self.fixed[:, None]',
        'kernel_scores + self.fixed.roll(1, 0)[:, None]'),
    'kernel made by the keys instead of the queries': (
        COMPOSITE,
        'q @ self.dynamic.T',
        'k[:, :, -T:] @ self.dynamic.T'),
    'key-made kernel not mirrored': (
        COMPOSITE,
        'along_diagonals(key_kernel_scores, T - S, T)',
        'along_diagonals(key_kernel_scores.flip(-1), T - S, T)'),
    'key-made kernel on the wrong axis': (
        COMPOSITE,
        'along_diagonals(key_kernel_scores, T - S, T).transpose(-2, -1)',
        'along_diagonals(key_kernel_scores[:, :, -T:], S - T, S)'),
    'key-made kernel made by the queries': (
        COMPOSITE,
        'k @ self.dynamic_key.T',
        'F.pad(q, (0, 0, k.size(2) - T, 0)) @ self.dynamic_key.T'),
    'content kept when switched off': (
        COMPOSITE,
        'q = torch.zeros_like(q)',
        'pass'),
    'softmax over the queries': (
        COMPOSITE,
        '.softmax(-1)\n',
        '.softmax(-2)\n'),
    'near window short by one': (
        COMPOSITE,
        'kernel_scores[..., 1:(far + 1 if causal else -1)]',
        'kernel_scores[..., 1:far if causal else -2]'),
    'far keys one too near': (
        COMPOSITE,
        'flash(q[:, :, far:], k[:, :, :-far]',
        'flash(q[:, :, far - 1:-1], k[:, :, :-far]'),
    'far part joined without its log-sum-exp': (
        COMPOSITE,
        '(lse_left - lse).exp()[..., None] * F.pad(y_left',
        'F.pad(y_left'),
    'near part softmaxed by itself': (
        COMPOSITE,
        'lse = torch.cat(parts, -1).logsumexp(-1)',
        'lse = near_scores.logsumexp(-1)'),
    'end entry of the left not taken off': (
        COMPOSITE,
        '1:(far + 1 if causal else -1)] - left_end',
        '1:(far + 1 if causal else -1)]'),
    'end entries of left and right exchanged': (
        COMPOSITE,
        '(kernel_scores[..., -1:] - left_end)',
        '(left_end - kernel_scores[..., -1:])'),
    'right side not mirrored': (
        COMPOSITE,
        'return y.flip(2) if right else y',
        'return y'),
    'near keys beyond the ends not masked': (
        COMPOSITE,
        '(j < 0) | (j >= T)',
        '(j < 0) & (j >= T)'),
    'near convolution of the values mirrored': (
        COMPOSITE,
        'moved(v, r + 1 - far)',
        'moved(v, far - r - 1)'),
    'backward: far part with its own mean': (
        COMPOSITE,
        'v[early], y[late], lse[late]',
        'v[early], y[late] * 0, lse[late]'),
    'backward: right side without its end entry': (
        COMPOSITE,
        'lse = lse - right\n',
        'lse = lse + 0\n'),
    'backward: gradients of near keys not moved back': (
        COMPOSITE,
        'moved(ds[..., r:r + 1], -o, 0) * moved(queries, -o)',
        'moved(ds[..., r:r + 1], o, 0) * moved(queries, o)'),
    'backward: gradients of near keys beyond the ends': (
        COMPOSITE,
        'moved(p[..., r:r + 1], -o, 0)',
        'moved(p[..., r:r + 1], -o)'),
    'blocks: future seen': (
        COMPOSITE,
        'triu(reach + 1)',
        'triu(reach + 2)'),
    'blocks: keys before the start seen': (
        COMPOSITE,
        'scores[..., :reach] = -math.inf',
        'scores[..., :reach - 1] = -math.inf'),
    'blocks: keys beyond the end seen': (
        COMPOSITE,
        'scores[..., scores.size(-1) - reach:] = -math.inf',
        'scores[..., scores.size(-1) - reach + 1:] = -math.inf'),
    'blocks: right end not given to the corner': (
        COMPOSITE,
        'middle += right * ones.triu(2 * reach + 1)',
        'middle += right * ones.triu(2 * reach + 2)'),
    'blocks: right end not given to the last keys': (
        COMPOSITE,
        'scores[..., last + 2 * reach:] += right',
        'scores[..., last + 2 * reach:] += 0'),
    'blocks: near keys one off': (
        COMPOSITE,
        'block.flatten(1)[:, queries[1].start:]',
        'block.flatten(1)[:, max(0, queries[1].start - 1):]'),
    'blocks: mean of the gradients not taken off': (
        COMPOSITE,
        'ds.sub_(mean[queries]).mul_(p)',
        'ds.mul_(p)'),
    'blocks: gradient of the right end without the corner': (
        COMPOSITE,
        'ds[..., middle].triu(2 * reach)',
        'ds[..., middle].triu(2 * reach + 1)'),
    'blocks: gradients of keys not summed over blocks': (
        COMPOSITE,
        'dk[keys] += narrow',
        'dk[keys] = narrow'),
    'channels read in any layout': (
        COMPOSITE,
        'x if x.stride(-1) == 1 else x.contiguous()',
        'x'),
    'backward: scale dropped': (
        COMPOSITE,
        'ds = d_near / math.sqrt(q.size(-1))\n',
        'ds = d_near\n'),
    'kernelized: circulant flipped': (
        KERNELIZED,
        'c[..., :T].flip(-1), torch.zeros_like(c[..., :1]), c[..., T:].flip(-1)',
        'c[..., T - 1:], torch.zeros_like(c[..., :1]), c[..., :T - 1]'),
    'kernelized: circulant without padding': (
        KERNELIZED,
        'torch.fft.rfft(circulant_column(c)) * torch.fft.rfft(x, 2 * T), 2 * T)',
        'torch.fft.rfft(circulant_column(c).unflatten(-1, (2, T)).sum(-2)) * torch.fft.rfft(x, T), T)'),
    'kernelized: gradient of the circulant a convolution': (
        KERNELIZED,
        '(X.conj() * dY)',
        '(X * dY)'),
    'kernelized: gradient through the circulant not transposed': (
        KERNELIZED,
        'dY * c.conj()',
        'dY * c'),
    'kernelized: largest log-weight not taken off, dense': (
        KERNELIZED,
        'largest = bias.detach().amax(-1, keepdim=True)  # it',
        'largest = torch.zeros(())  # it'),
    'kernelized: largest log-weight not taken off, chunked': (
        KERNELIZED,
        'largest = bias.detach().amax(-1, keepdim=True)  # (',
        'largest = torch.full((), -1e9)  # ('),
    'kernelized: normaliser without the bias': (
        KERNELIZED,
        'divide(y[..., :-1], y[..., -1:]).to(v.dtype)',
        'divide(y[..., :-1], (q @ k.transpose(-2, -1)).sum(-1, keepdim=True)).to(v.dtype)'),
    'kernelized: far constant of the wrong side': (
        KERNELIZED,
        '((b[:, 0], sum_before)',
        '((b[:, -1], sum_before)'),
    'kernelized: running sums off by one chunk': (
        KERNELIZED,
        'reach + 1, 0))[:, :, :x.size(2)]',
        'reach, 0))[:, :, :x.size(2)]'),
    'kernelized: weights of the first chunks repeated': (
        KERNELIZED,
        'middle = x[:, :, reach + 1:reach + 2]',
        'middle = x[:, :, reach:reach + 1]'),
    'kernelized: too few chunks have weights of their own': (
        KERNELIZED,
        'reach + 3 if causal',
        'reach + 2 if causal'),
    'kernelized: padding kept by the plain sums': (
        KERNELIZED,
        'k_sum = shown.sum(2, dtype=wide)',
        'k_sum = k.sum(2, dtype=wide)'),
    'kernelized: plain sums, padding does not see itself': (
        KERNELIZED,
        'total = total + own',
        'total = total'),
    'kernelized: one near chunk too few': (
        KERNELIZED,
        'max(0, -(-(R - 1) // chunk))',
        'max(0, (R - 1) // chunk)'),
    'kernelized: right side not mirrored back': (
        KERNELIZED,
        'sum_before(x.flip(2)).flip(2)',
        'sum_before(x.flip(2))'),
    'kernelized: future seen inside a chunk': (
        KERNELIZED,
        'see = see & (j <= i)',
        'see = see & (j < chunk)'),
    'kernelized: queries and keys not normalised': (
        KERNELIZED,
        'self.kind, normalize=True',
        'self.kind'),
    'kernelized: normalised over the whole sequence': (
        KERNELIZED,
        'x.square().sum(-1, keepdim=True).clamp_min',
        'x.square().sum(-2, keepdim=True).clamp_min'),
    'kernelized: scale of plain random features': (
        KERNELIZED,
        'qk * qk.size(-1) ** -0.25',
        'qk * qk.size(-1) ** -0.5'),
    'kernelized: features without their scale, unit length': (
        KERNELIZED,
        '-0.5 - math.log',
        '-0.4 - math.log'),
    'kernelized: norm of the keys left out': (
        KERNELIZED,
        'if stable else half_square\n',
        'if stable else 0 * half_square\n'),
    'kernelized: padding kept in the normaliser': (
        KERNELIZED,
        'k_sum = shown.sum(3, keepdim=True',
        'k_sum = k.sum(3, keepdim=True'),
    'kernelized: padding kept by the FFT': (
        KERNELIZED,
        'shown = k if valid is None else k * valid[:, None, :, None]\n\n',
        'shown = k\n\n'),
    'kernelized: padding kept in the state': (
        KERNELIZED,
        'shown = shown * valid[:, -S:]',
        'shown = shown * valid.new_ones(valid.size(0), S)'),
    'kernelized: a key joins the sums too early': (
        KERNELIZED,
        'old = max(0, S - b.size(-1) // 2)',
        'old = max(0, S + 1 - b.size(-1) // 2)'),
    'kernelized: state forgets the normaliser': (
        KERNELIZED,
        "state.get('k_sum', 0) + shown",
        "0 * state.get('k_sum', 0) + shown"),
    'kernelized: far keys never counted in the state': (
        KERNELIZED,
        "state.get('far', 0) + old",
        "0"),
    'kernelized: padding counted as a far key of the state': (
        KERNELIZED,
        'seen = valid[:, :-S].any(1)',
        'seen = valid[:, :-S].all(1)'),
    'kernelized: orthogonal features with the signs of the algorithm': (
        KERNELIZED,
        'Q * R.diagonal().sign()',
        'Q'),
    'kernelized: vanished features divided by': (
        KERNELIZED,
        'least=1e-30',
        'least=0.0'),
    'kernelized: running sums in bfloat16': (
        KERNELIZED,
        "state.get('kv', 0) + shown.transpose(2, 3) @ v[:, :, :old].to(wide)",
        "(state.get('kv', 0) + shown.transpose(2, 3) @ v[:, :, :old].to(wide)).bfloat16().to(wide)"),
    'kernelized: largest log-weight of the future': (
        KERNELIZED,
        '(bias - largest).exp().to',
        '(bias - largest.roll(-1, 2)).exp().to'),
    'kernelized: elu without one': (
        KERNELIZED,
        'return F.elu(x) + 1',
        'return F.elu(x)'),
    'kernelized: sine without cosine': (
        KERNELIZED,
        'torch.cat((wx.sin(), wx.cos()), -1)',
        'torch.cat((wx.sin(), wx.sin()), -1)'),
    'query and key exchanged': (
        NOPE,
        'q, k, v = self.c_attn(x).split',
        'k, q, v = self.c_attn(x).split'),
    'composite: query and key exchanged': (
        COMPOSITE,
        'q, k, v = self.c_attn(x)',
        'k, q, v = self.c_attn(x)'),
    'heads split along time': (
        NOPE_COMPOSITE,
        'z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for',
        'z.reshape(B, self.n_head, T, C // self.n_head) for'),
    'one token of the future seen': (
        ALL,
        'see = j <= i if causal',
        'see = j <= i + 1 if causal'),
    'causal mask dropped': (
        NOPE,
        'is_causal=triangle)',
        'is_causal=False)'),
    'causal mask kept for both sides': (
        NOPE,
        'is_causal=triangle)',
        'is_causal=not masked)'),
    'several tokens after a past see each other': (
        NOPE,
        'or 1 < T < S',
        'or False'),
    'padding of the past forgotten': (
        NOPE,
        "state[0].get('valid_so_far', now.new_ones(B, past))",
        'now.new_ones(B, past)'),
    'padding seen': (
        ALL,
        'see & (valid[:, None, None, :] | (i == j))',
        'see & (valid[:, None, None, :] | (i >= j))'),
    'padding hides the queries instead of the keys': (
        ALL,
        'valid[:, None, None, :]',
        'valid[:, None, -T:, None]'),
    'decoding: mask starts at zero': (
        ALL,
        'i = torch.arange(S - T, S, device=device)',
        'i = torch.arange(T, device=device)'),
    'decoding: kernel starts at zero': (
        COMPOSITE,
        'along_diagonals(kernel_scores, S - T, S)',
        'along_diagonals(kernel_scores, 0, S)'),
    'decoding: the past comes last': (
        ALL,
        "torch.cat((state['k'], k), 2)",
        "torch.cat((k, state['k']), 2)"),
    'decoding: absolute positions start again': (
        ALL,
        'self.wpe.weight[past:past + T]',
        'self.wpe.weight[:T]'),
    'depthwise kernel mirrored': (
        CONV,
        'F.conv1d(x, w[:, None]',
        'F.conv1d(x, w.flip(1)[:, None]'),
    'depthwise convolution off by one': (
        CONV,
        'x.transpose(1, 2), (left - past, K - 1 - left))',
        'x.transpose(1, 2), (left - past - 1, K - left))'),
    'dynamic convolution off by one': (
        CONV,
        '(0, 0, left - past, K - 1 - left)',
        '(0, 0, left - past - 1, K - left)'),
    'kernel of one head used by all': (
        CONV,
        'dynamic_conv(x, w[None, :, None], causal',
        'dynamic_conv(x, w[None, :1, None].expand(1, w.size(0), 1, -1), causal'),
    'convolution in all the heads': (
        CONV,
        'self.half = config.n_head // 2 * hs',
        'self.half = config.n_head * hs'),
    'kernels of queries and keys exchanged': (
        CONV,
        '(self.conv_q, self.conv_k, self.conv_v)',
        '(self.conv_k, self.conv_q, self.conv_v)'),
    'kernel not normalised over its width': (
        CONV,
        'self.lightweight.softmax(-1)',
        'self.lightweight.exp()'),
    'padding enters the convolution': (
        CONV,
        'x = x * valid[:, -x.size(1):, None]',
        'pass'),
    'padding enters the convolution of the values': (
        CONV,
        "with_past(state, 'convolved_v', qkv[2], valid,",
        "with_past(state, 'convolved_v', qkv[2], None,"),
    'decoding: one input too few is kept': (
        CONV,
        'max(0, x.size(1) - keep)',
        'max(0, x.size(1) - keep + 1)'),
    'output convolution before the softmax is over': (
        CONV,
        'y = y + depthwise_conv(v_and_past',
        'y = y * depthwise_conv(v_and_past'),
    'predicted places off by one': (
        ALL,
        'where[..., None].expand',
        '(where[..., None] - 1).clamp(min=0).expand'),
    'kernelized: plain FFT, normaliser left out': (
        KERNELIZED,
        'return divide(y[..., :-1], y[..., -1:])\n',
        'return y[..., :-1]\n'),
    'kernelized: plain FFT, keys and queries exchanged': (
        KERNELIZED,
        "torch.einsum('bhjm,bhjd->bhmdj', k, values)",
        "torch.einsum('bhjm,bhjd->bhmdj', q, values)"),
    'kernelized: FFT, future seen': (
        KERNELIZED,
        'F.pad(c, (0, T - 1 if causal else 0))',
        'F.pad(c, (0, T - 1 if causal else 0), value=1e-3)'),
    'RoPE: sign of the angle': (
        ROPE,
        '(a * cos - b * sin, a * sin + b * cos)',
        '(a * cos + b * sin, b * cos - a * sin)'),
    'RoPE: base': (
        ROPE,
        'theta = 10000 ** ',
        'theta = 1000 ** '),
    'RoPE: pairs of neighbouring channels': (
        ROPE,
        'a, b = x.to(wide).chunk(2, -1)',
        'a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)'),
    'RoPE: positions start again after a state': (
        ROPE,
        "past = 0 if state is None else state['seen']",
        'past = 0'),
    'RoPE: queries turned, keys not': (
        ROPE,
        'k = rotate(k, past)',
        'k = k'),
    'RoPE: angles in half precision': (
        ROPE,
        'wide = torch.promote_types(x.dtype, torch.float32)',
        'wide = x.dtype'),
    'ALiBi: sign': (
        ALIBI,
        '(-slopes[:, None, None] * distance)',
        '(slopes[:, None, None] * distance)'),
    'ALiBi: slopes start at one': (
        ALIBI,
        'torch.arange(1, self.n_head + 1, ',
        'torch.arange(self.n_head, '),
    'ALiBi: exponent of the slopes': (
        ALIBI,
        '2 ** (-8 * torch.arange(1, self',
        '2 ** (-4 * torch.arange(1, self'),
    'ALiBi: distance one off': (
        ALIBI,
        '(j[S - T:, None] - j).abs()',
        '(j[S - T:, None] - 1 - j).abs()'),
    'ALiBi: distance after a state': (
        ALIBI,
        '(j[S - T:, None] - j).abs()',
        '(j[:T, None] - j).abs()'),
    'TISA: distance not squared': (
        TISA,
        '(offsets - self.c[..., None]) ** 2',
        '(offsets - self.c[..., None]).abs()'),
    'TISA: sign of the centre': (
        TISA,
        '(offsets - self.c[..., None])',
        '(offsets + self.c[..., None])'),
    'TISA: sharpness without its absolute value': (
        TISA,
        '-self.b.abs()[..., None]',
        '-self.b[..., None]'),
    'TISA: offsets i - j': (
        TISA,
        'f.unfold(1, S, 1).flip(1)',
        'f.flip(1).unfold(1, S, 1).flip(1)'),
    'CAPE: augmentation left on in evaluation': (
        CAPE,
        'if self.training and self.config.augment:',
        'if self.config.augment:'),
    'CAPE: augmentation cannot be switched off': (
        CAPE,
        'if self.training and self.config.augment:',
        'if self.training:'),
    'CAPE: a shift for each token instead of each text': (
        CAPE,
        'shift = torch.empty_like(p[:, :1])',
        'shift = torch.empty_like(p)'),
    'CAPE: factors instead of their logarithms': (
        CAPE,
        'log_scale.exp() * (',
        '(1 + log_scale) * ('),
    'CAPE: base of the frequencies': (
        CAPE,
        'w = 10000 ** ',
        'w = 1000 ** '),
    'CAPE: sines and cosines exchanged': (
        CAPE,
        '(angle.sin(), angle.cos())',
        '(angle.cos(), angle.sin())'),
    'CAPE: positions start again after a state': (
        CAPE,
        'p = torch.arange(past, past + T,',
        'p = torch.arange(T,'),
}


def plant(what):
    """Run the proofs on a copy that has one error -> exit status, first row that fails. Call it in a new process."""
    import importlib
    import torch
    torch.set_num_threads(1)
    files, right, wrong = ERRORS[what]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        (Path(folder) / 'baselines').mkdir()
        for path in [*REPO.glob('model_*.py'), *REPO.glob('baselines/model_*.py'), REPO / 'test_equivalence.py']:
            shutil.copy(path, Path(folder) / path.relative_to(REPO))
            sys.modules.pop(path.stem, None)  # what the parent had imported is the code without the error
        for name in files.split():
            text = (Path(folder) / name).read_text(encoding='utf-8')
            if text.count(right) != 1:
                return 2, f'{right!r} stands {text.count(right)} times in {name}: the table of errors is out of date'
            (Path(folder) / name).write_text(text.replace(right, wrong), encoding='utf-8')
        sys.path[:0] = [folder, str(Path(folder) / 'baselines')]  # before those of the parent
        names = [Path(name).stem.removeprefix('model_') for name in files.split()]
        sys.argv = ['test_equivalence.py', '--first', *names]
        try:
            equivalence = importlib.import_module('test_equivalence')
            assert Path(equivalence.__file__).parent == Path(folder)
            code = int(equivalence.main())
        except Exception as e:
            return 3, f'{type(e).__name__}: {e}'
    return code, next((line for line in out.getvalue().splitlines() if line.endswith('FAIL')), out.getvalue()[-300:])


def plant_all(errors=ERRORS):
    """{what: (exit status, first red row)}, two at a time, each in a new process (forked on Linux: torch is slow)."""
    import torch  # noqa: F401, here, so that the forked processes have it
    method = 'fork' if sys.platform == 'linux' else 'spawn'
    with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
        return dict(zip(errors, pool.map(plant, errors, chunksize=1)))


@pytest.fixture(scope='module')
def caught():
    return plant_all()


@pytest.mark.parametrize('what', ERRORS)
def test_planted_error_is_caught(what, caught):
    code, row = caught[what]
    assert code == 1 and row.endswith('FAIL'), f'{what}: not caught\n{row}'
    assert ' inf ' not in row, f'{what}: it crashes, which does not show that its numbers are checked\n{row}'


if __name__ == '__main__':
    word = sys.argv[1].lower() if sys.argv[1:] else ''
    for what, (code, row) in plant_all([what for what in ERRORS if word in what.lower()]).items():
        print(f'{what:50s} {"caught by: " + row[:80].strip() if row.endswith("FAIL") else "NOT CAUGHT " + row}')
