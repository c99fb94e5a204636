"""The checks can fail: test_equivalence.py reports each error in a copy of the model files."""
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
ROPE, ALIBI, TISA, CAPE = [f'baselines/model_{name}.py' for name in ('rope', 'alibi', 'tisa', 'cape')]
# what: (file, right text, wrong text); the right text occurs exactly once in the file
ERRORS = {
    'offset mirrored': (COMPOSITE, 'T, k = kernel.size(-2)', 'kernel = kernel.flip(-1)\n    T, k = kernel.size(-2)'),
    'nothing beyond the kernel': (COMPOSITE, 'torch.cat((first, middle,', 'torch.cat((first * 0, middle,'),
    'scale of the content dropped': (COMPOSITE, 'att = (q / math.sqrt(q.size(-1))) @', 'att = q @'),
    'kernel of the keys instead of the queries': (COMPOSITE, 'q @ self.dynamic.T', 'k[:, :, -T:] @ self.dynamic.T'),
    'key-dependent kernel not mirrored': (COMPOSITE, '(key_kernel_scores, -past, T)',
        '(key_kernel_scores.flip(-1), -past, T)'),
    'content kept when switched off': (COMPOSITE, 'q = q if self.content', 'q = q if True'),
    'future visible': (COMPOSITE, '-math.inf if causal else None', 'None'),
    'padding visible': (COMPOSITE, 'att = att.masked_fill(~visible, -math.inf)', 'pass'),
    'blocks: keys one block short': (COMPOSITE, 'slice(start + 128 if causal', 'slice(max(start, 128) if causal'),
    'blocks: position of the queries forgotten': (COMPOSITE, 'causal, past=start', 'causal, past=0'),
    'near window short by one': (COMPOSITE, '1 - reach, 0 if causal', '2 - reach, 0 if causal'),
    'far keys one too near': (COMPOSITE, '((-T, -reach, 0)', '((-T, 1 - reach, 0)'),
    'end entries of the kernel forgotten': (COMPOSITE, 'lse + bias[..., end]', 'lse'),
    'parts joined with equal weights': (COMPOSITE, '[lse for _, lse in parts]', '[lse * 0 for _, lse in parts]'),
    'depthwise kernel mirrored': (CONV, 'F.conv1d(x, w[:, None]', 'F.conv1d(x, w.flip(-1)[:, None]'),
    'dynamic convolution off by one': (CONV, 'x[:, :, r:r + T] for r', 'x.roll(1, 2)[:, :, r:r + T] for r'),
    'convolution in all heads': (CONV, 'config.n_head // 2 * hs', 'config.n_embd'),
    'mixer not normalized': (CONV, 'self.lightweight.softmax(-1)', 'self.lightweight'),
    'padding enters the convolution': (CONV, 'x if valid is None else x * valid[..., None]', 'x'),
    'cache of a convolution one token short': (CONV, 'x.size(1) - keep)', 'x.size(1) - keep + 1)'),
    'kernelized: circulant flipped': (KERNELIZED, 'c[..., :T].flip(-1), torch', 'c[..., T - 1:], torch'),
    'kernelized: normalizer without the bias': (KERNELIZED, 'return divide(att.to(v.dtype) @ values)',
        'return (att.to(v.dtype) @ v) / (q @ k.mT).sum(-1, keepdim=True)'),
    'kernelized: far weight of the wrong side': (KERNELIZED, 'y + c[:, -1:, None, None]', 'y + c[:, :1, None, None]'),
    'kernelized: running sums off by one chunk': (KERNELIZED, 'n_left + 1, 0))[:, :, :n]', 'n_left + 2, 0))[:, :, :n]'),
    'kernelized: one near chunk too few': (KERNELIZED, '-(-(R - 1) // chunk))', '-(-(R - 2) // chunk))'),
    'kernelized: padding kept in the normalizer': (KERNELIZED, '(n, chunk)) for x in (q, visible_k,',
        '(n, chunk)) for x in (q, k,'),
    'kernelized: queries and keys not normalized': (KERNELIZED, 'if normalize:\n        x = x *',
        'if normalize:\n        x = 1.0 * x + 0 *'),
    'kernelized: far keys counted without a weight': (KERNELIZED, "state['c'][:, :1, None] * (q.to", '(q.to'),
    'plain attention: one future token visible': (NOPE, 'offset > (0 if causal', 'offset > (1 if causal'),
    'plain attention: causal mask dropped': (NOPE, 'is_causal=mask is None and causal and T > 1', 'is_causal=False'),
    'cache: the past comes last': (NOPE, "torch.cat((state['k'], k), 2)", "torch.cat((k, state['k']), 2)"),
    'absolute: positions start again': (NOPE, 'torch.arange(past, past + T, device=idx.device) - first',
        'torch.arange(T, device=idx.device) - first'),
    'absolute: padding on the left counts': (NOPE, 'first = 0 if valid is None', 'first = 0 if True'),
    'predicted positions off by one': (NOPE, 'x.gather(1, where[', 'x.roll(1, 1).gather(1, where['),
    'RoPE: sign of the angle': (ROPE, 'a * cos - b * sin, a * sin + b * cos', 'a * cos + b * sin, b * cos - a * sin'),
    'RoPE: positions start again': (ROPE, "state['seen']  # tokens", '0  # tokens'),
    'RoPE: the layer after is without rotation': (ROPE, 'self.h[config.nope_every - 1::', 'self.h[config.nope_every::'),
    'ALiBi: sign': (ALIBI, '(-slopes[', '(slopes['),
    'TISA: offsets i - j': (TISA, '(offsets - c)', '(-offsets - c)'),
    'CAPE: sines and cosines exchanged': (CAPE, '(angle.sin(), angle.cos())', '(angle.cos(), angle.sin())'),
}




def plant(what):
    """Run the checks on a copy with one error -> exit status, first check that fails."""
    import importlib
    import torch
    torch.set_num_threads(1)
    name, right, wrong = ERRORS[what]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        (Path(folder) / 'baselines').mkdir()
        for path in [*REPO.glob('model_*.py'), *REPO.glob('baselines/model_*.py'), REPO / 'test_equivalence.py']:
            shutil.copy(path, Path(folder) / path.relative_to(REPO))
            sys.modules.pop(path.stem, None)  # what the parent had imported is the code without the error
        text = (Path(folder) / name).read_text(encoding='utf-8')
        if text.count(right) != 1:
            return 2, f'{right!r} occurs {text.count(right)} times in {name}: the table of errors is out of date'
        (Path(folder) / name).write_text(text.replace(right, wrong), encoding='utf-8')
        sys.path[:0] = [folder, str(Path(folder) / 'baselines')]  # before those of the parent
        sys.argv = ['test_equivalence.py', '--first', Path(name).stem.removeprefix('model_')]
        try:
            equivalence = importlib.import_module('test_equivalence')
            assert Path(equivalence.__file__).parent == Path(folder)
            code = int(equivalence.main())
        except Exception as e:
            return 3, f'{type(e).__name__}: {e}'
    return code, next((line for line in out.getvalue().splitlines() if line.endswith('FAIL')), out.getvalue()[-300:])


def plant_all(errors=ERRORS):
    """{what: (exit status, first failed check)}, two at a time, each in a new process."""
    context = multiprocessing.get_context('forkserver' if sys.platform == 'linux' else 'spawn')
    context.set_forkserver_preload(['torch', 'pytest'])  # importing torch takes longer than most of the checks
    with context.Pool(2, maxtasksperchild=1) as pool:
        return dict(zip(errors, pool.map_async(plant, errors, chunksize=1).get(timeout=600)))


@pytest.fixture(scope='module')
def caught():
    return plant_all()


@pytest.mark.parametrize('what', ERRORS)
def test_planted_error_is_caught(what, caught):
    code, line = caught[what]
    assert code == 1 and line.endswith('FAIL'), f'{what}: not caught\n{line}'
    assert ' inf ' not in line, f'{what}: it crashes, which does not show that its numbers are checked\n{line}'
