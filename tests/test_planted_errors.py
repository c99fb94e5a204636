"""The equalities can fail: plant one error at a time in a copy of the model files, and test_equivalence.py turns red.

    python tests/test_planted_errors.py    # the table: error, and the first row that catches it; with a word, the errors that have it in their name
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
ALL, COMPOSITE, CONV = 'model_nope.py model_composite.py model_conv.py', 'model_composite.py', 'model_conv.py'
KERNELIZED = 'model_kernelized.py'
ERRORS = {  # what: (files, right, wrong); the right text stands exactly once in each of the files
    'offset mirrored': (COMPOSITE, 'rows = torch.cat((first', 'kernel, first, last = kernel.flip(-1), last, first\n    rows = torch.cat((first'),
    'offset off by one': (COMPOSITE, 'left, right = T - 1 + past - k, n - past - k', 'left, right = T + past - k, n - past - k - 1'),
    'clip dropped: nothing beyond the kernel': (COMPOSITE, 'first.expand(*first.shape[:-1], max(left, 0))', 'first.expand(*first.shape[:-1], max(left, 0)) * 0'),
    'clip dropped on the right': (COMPOSITE, 'last.expand(*last.shape[:-1], max(right, 0))', 'last.expand(*last.shape[:-1], max(right, 0)) * 0'),
    'scale of the content dropped': (COMPOSITE, ' / math.sqrt(q.size(-1))  # (B', '  # (B'),
    'scale of the query-made kernel dropped': (COMPOSITE, 'q @ self.dynamic.T * scale', 'q @ self.dynamic.T'),
    'scale of the key-made kernel dropped': (COMPOSITE, 'k @ self.dynamic_key.T * scale', 'k @ self.dynamic_key.T'),
    'fixed kernel scaled': (COMPOSITE, 'table + self.fixed[:, None]', 'table + self.fixed[:, None] * scale'),
    'heads of the fixed kernel mixed up': (COMPOSITE, 'table + self.fixed[:, None]', 'table + self.fixed.roll(1, 0)[:, None]'),
    'kernel made by the keys instead of the queries': (COMPOSITE, 'q @ self.dynamic.T', 'k[:, :, -T:] @ self.dynamic.T'),
    'key-made kernel not mirrored': (COMPOSITE, 'spread(key_table, T - S, T)', 'spread(key_table.flip(-1), T - S, T)'),
    'key-made kernel on the wrong axis': (COMPOSITE, 'spread(key_table, T - S, T).transpose(-2, -1)', 'spread(key_table[:, :, -T:], S - T, S)'),
    'key-made kernel made by the queries': (COMPOSITE, 'k @ self.dynamic_key.T', 'F.pad(q, (0, 0, k.size(2) - T, 0)) @ self.dynamic_key.T'),
    'content kept when switched off': (COMPOSITE, 'q = torch.zeros_like(q)', 'pass'),
    'softmax over the queries': (COMPOSITE, '.softmax(-1)\n', '.softmax(-2)\n'),
    'near window short by one': (COMPOSITE, 'table[..., 1:far + 1 if causal else -1]', 'table[..., 1:far if causal else -2]'),
    'far keys one too near': (COMPOSITE, 'rows_in_order(q[:, :, far:], k', 'rows_in_order(q[:, :, far - 1:-1], k'),
    'far part joined without its log-sum-exp': (COMPOSITE, 'sum((l - lse).exp()[..., None] * o for', 'sum(o for'),
    'near part softmaxed by itself': (COMPOSITE, 'lse = torch.cat([s, *(l[..., None] for _, l in parts)], -1).logsumexp(-1)', 'lse = s.logsumexp(-1)'),
    'end entry of the left not taken off': (COMPOSITE, ' - table[..., :1]', ''),
    'end entries of left and right exchanged': (COMPOSITE, 'None if causal else table[..., -1] - table[..., 0]', 'None if causal else table[..., 0] - table[..., -1]'),
    'right side not mirrored': (COMPOSITE, 'parts.append((y.flip(2), lse.flip(2)', 'parts.append((y, lse'),
    'near keys beyond the ends not masked': (COMPOSITE, '(j < 0) | (j >= T)', '(j < 0) & (j >= T)'),
    'near convolution of the values mirrored': (COMPOSITE, 'shifted(v, r + 1 - far)', 'shifted(v, far - r - 1)'),
    'backward: far part with its own mean': (COMPOSITE, 'd_far = flash_backward(dy, q, k, v, y, lse,', 'd_far = flash_backward(dy, q, k, v, y * 0, lse,'),
    'backward: right side without its end entry': (COMPOSITE, 'dy, q, k, v, y, lse - right', 'dy, q, k, v, y, lse'),
    'backward: gradients of near keys not moved back': (COMPOSITE, 'shifted(scaled[..., r:r + 1] * Q, -o)', 'shifted(scaled[..., r:r + 1] * Q, o)'),
    'channels read in any layout': (COMPOSITE, 'x if x.stride(-1) == 1 else x.contiguous()', 'x'),
    'backward: scale dropped': (COMPOSITE, 'scaled = ds / math.sqrt(q.size(-1))', 'scaled = ds'),
    'kernelized: circulant flipped': (KERNELIZED, 'c[..., :T].flip(-1), c[..., T:].flip(-1)', 'c[..., T - 1:], c[..., :T - 1]'),
    'kernelized: circulant without padding': (KERNELIZED, 'column = torch.cat((past, torch.zeros_like(c[..., :1]), future), -1)', 'column = past + F.pad(future, (1, 0))'),
    'kernelized: gradient of the circulant a convolution': (KERNELIZED, '(X.conj() * dY)', '(X * dY)'),
    'kernelized: gradient through the circulant not transposed': (KERNELIZED, 'dY * c.conj()', 'dY * c'),
    'kernelized: largest log-weight not taken off, dense': (KERNELIZED, 'top = bias.detach().amax(-1, keepdim=True)  #', 'top = torch.zeros(())  #'),
    'kernelized: largest log-weight not taken off, chunked': (KERNELIZED, 'top = bias.detach().amax(-1, keepdim=True)\n', 'top = torch.full((), -1e9)\n'),
    'kernelized: normaliser without the bias': (KERNELIZED, 'att.to(v.dtype) @ v, att.sum(-1, keepdim=True)', 'att.to(v.dtype) @ v, (q @ k.transpose(-2, -1)).sum(-1, keepdim=True)'),
    'kernelized: far constant of the wrong side': (KERNELIZED, 'sides = [(b[:, 0], [before', 'sides = [(b[:, -1], [before'),
    'kernelized: running sums off by one chunk': (KERNELIZED, 'P + 1, 0))[:, :, :N]', 'P, 0))[:, :, :N]'),
    'kernelized: one near chunk too few': (KERNELIZED, 'max(0, -(-(R - 1) // c))', 'max(0, (R - 1) // c)'),
    'kernelized: right side not mirrored back': (KERNELIZED, 'before(x.flip(2)).flip(2)', 'before(x.flip(2))'),
    'kernelized: future seen inside a chunk': (KERNELIZED, 'see = see & (j <= i)', 'see = see & (j < c)'),
    'kernelized: queries and keys not normalised': (KERNELIZED, 'q, k = F.normalize(q, dim=-1, eps=1e-4), F.normalize(k, dim=-1, eps=1e-4)', 'q, k = q, k'),
    'kernelized: normalised over the whole sequence': (KERNELIZED, 'F.normalize(k, dim=-1, eps=1e-4)', 'F.normalize(k, dim=-2, eps=1e-4)'),
    'kernelized: scale of plain random features': (KERNELIZED, 'k * k.size(-1) ** -0.25', 'k * k.size(-1) ** -0.5'),
    'kernelized: norm of the keys left out': (KERNELIZED, 'keepdim=True) if stable else square)', 'keepdim=True) if stable else 0 * square)'),
    'kernelized: padding kept in the normaliser': (KERNELIZED, 'kept.sum(3, keepdim=True', 'k.sum(3, keepdim=True'),
    'kernelized: padding kept by the FFT': (KERNELIZED, 'kept = k if valid is None else', 'kept = k if True else'),
    'kernelized: padding kept in the state': (KERNELIZED, '(k[:, :, :old] * valid[:, None, :old, None])', '(k[:, :, :old])'),
    'kernelized: a key joins the sums too early': (KERNELIZED, 'old = max(0, k.size(2) - b.size(-1) // 2)', 'old = max(0, k.size(2) + 1 - b.size(-1) // 2)'),
    'kernelized: state forgets the normaliser': (KERNELIZED, "k_sum=past['k_sum'] + kept", "k_sum=0 * past['k_sum'] + kept"),
    'kernelized: far keys never counted in the state': (KERNELIZED, "any=past['any'] | valid[:, :old].any(1)", "any=past['any']"),
    'kernelized: orthogonal features with the signs of the algorithm': (KERNELIZED, 'Q * R.diagonal().sign()', 'Q'),
    'kernelized: vanished features divided by': (KERNELIZED, 'least=1e-30', 'least=0.0'),
    'kernelized: running sums in bfloat16': (KERNELIZED, "kv=past['kv'] + kept.transpose(2, 3) @ v[:, :, :old].to(kept.dtype)", "kv=(past['kv'] + kept.transpose(2, 3) @ v[:, :, :old].to(kept.dtype)).bfloat16().to(kept.dtype)"),
    'kernelized: largest log-weight of the future': (KERNELIZED, '(bias - top).exp()  # (B, nh, T, m)', '(bias - top.roll(-1, 2)).exp()  # (B, nh, T, m)'),
    'kernelized: elu without one': (KERNELIZED, 'return F.elu(x) + 1', 'return F.elu(x)'),
    'kernelized: sine without cosine': (KERNELIZED, 'torch.cat((wx.sin(), wx.cos()), -1)', 'torch.cat((wx.sin(), wx.sin()), -1)'),
    'query and key exchanged': (ALL, 'q, k, v = (t.view', 'k, q, v = (t.view'),
    'heads split along time': (ALL, 't.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)', 't.reshape(B, self.n_head, T, C // self.n_head)'),
    'one token of the future seen': (ALL, 'see = j <= i if causal', 'see = j <= i + 1 if causal'),
    'causal mask dropped': ('model_nope.py', 'is_causal=self.causal)', 'is_causal=False)'),
    'causal mask kept for both sides': ('model_nope.py', 'is_causal=self.causal)', 'is_causal=True)'),
    'padding seen': (ALL, 'see & (valid[:, None, None, :] | (i == j))', 'see & (valid[:, None, None, :] | (i >= j))'),
    'padding hides the queries instead of the keys': (ALL, 'valid[:, None, None, :]', 'valid[:, None, -T:, None]'),
    'decoding: mask starts at zero': (ALL, 'i = torch.arange(S - T, S, device=device)', 'i = torch.arange(T, device=device)'),
    'decoding: kernel starts at zero': (COMPOSITE, 'spread(table, S - T, S)', 'spread(table, 0, S)'),
    'decoding: the past comes last': (ALL, 'torch.cat((state[name], t), dim)', 'torch.cat((t, state[name]), dim)'),
    'decoding: absolute positions start again': (ALL, 'self.wpe.weight[past:past + T]', 'self.wpe.weight[:T]'),
    'depthwise kernel mirrored': (CONV, 'F.conv1d(x, w[:, None]', 'F.conv1d(x, w.flip(1)[:, None]'),
    'depthwise convolution off by one': (CONV, 'x.transpose(1, 2), (left - past, K - 1 - left))', 'x.transpose(1, 2), (left - past - 1, K - left))'),
    'dynamic convolution off by one': (CONV, '(0, 0, left - past, K - 1 - left)', '(0, 0, left - past - 1, K - left)'),
    'kernel of one head used by all': (CONV, 'dynamic_conv(x, w[None, :, None], causal', 'dynamic_conv(x, w[None, :1, None].expand(1, w.size(0), 1, -1), causal'),
    'convolution in all the heads': (CONV, 'self.half = config.n_head // 2 * hs', 'self.half = config.n_head * hs'),
    'kernels of queries and keys exchanged': (CONV, '(self.conv_q, self.conv_k, self.conv_v)', '(self.conv_k, self.conv_q, self.conv_v)'),
    'kernel not normalised over its width': (CONV, 'self.lightweight.softmax(-1)', 'self.lightweight.exp()'),
    'padding enters the convolution': (CONV, "'x', x if valid is None else x * valid[..., None]", "'x', x"),
    'padding enters the convolution of the values': (CONV, 'v if valid is None else v * valid[:, None, :, None]', 'v'),
    'decoding: one input too few is kept': (CONV, 'max(0, x.size(-2) - keep)', 'max(0, x.size(-2) - keep + 1)'),
    'output convolution before the softmax is over': (CONV, 'y = y + depthwise_conv(flow', 'y = y * depthwise_conv(flow'),
    'predicted places off by one': (ALL, 'where[..., None].expand', '(where[..., None] - 1).clamp(min=0).expand'),
}


def plant(what):
    """Run the equalities on a copy that has one error -> exit status and the first row that fails. In a process of its own."""
    import importlib
    import torch
    torch.set_num_threads(1)
    files, right, wrong = ERRORS[what]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        for path in [*REPO.glob('model_*.py'), REPO / 'test_equivalence.py']:
            shutil.copy(path, folder)
            sys.modules.pop(path.stem, None)  # what the parent had imported is the code without the error
        for name in files.split():
            text = (Path(folder) / name).read_text(encoding='utf-8')
            if text.count(right) != 1:
                return 2, f'{right!r} stands {text.count(right)} times in {name}: the table of errors is out of date'
            (Path(folder) / name).write_text(text.replace(right, wrong), encoding='utf-8')
        sys.path.insert(0, folder)
        sys.argv = ['test_equivalence.py', '--first', *(name[6:-3] for name in files.split())]
        try:
            equivalence = importlib.import_module('test_equivalence')
            assert Path(equivalence.__file__).parent == Path(folder)
            code = int(equivalence.main())
        except Exception as e:
            return 3, f'{type(e).__name__}: {e}'
    return code, next((line for line in out.getvalue().splitlines() if line.endswith('FAIL')), out.getvalue()[-300:])


def plant_all(errors=ERRORS):
    """{what: (exit status, first red row)}, two at a time, each in a fresh process; forked, where that can be, for torch is slow to import."""
    import torch  # noqa: F401
    method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn'
    with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
        return dict(zip(errors, pool.map(plant, errors, chunksize=1)))


@pytest.fixture(scope='module')
def caught():
    return plant_all()


@pytest.mark.parametrize('what', ERRORS)
def test_planted_error_is_caught(what, caught):
    code, row = caught[what]
    assert code == 1 and row.endswith('FAIL'), f'{what}: not caught\n{row}'
    assert ' inf ' not in row or 'Assertion' in row, f'{what}: it crashes, which is no proof that its numbers are checked\n{row}'


if __name__ == '__main__':
    for what, (code, row) in plant_all([what for what in ERRORS if not sys.argv[1:] or sys.argv[1] in what]).items():
        print(f'{what:50s} {"caught by: " + row[:80].strip() if row.endswith("FAIL") else "NOT CAUGHT " + row}')
