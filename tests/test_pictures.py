"""The pictures of curves.py and look_inside.py show what the logs and the layers hold."""
import csv
import importlib
import math
import re

import pytest
import torch

import conftest  # noqa: F401, finds experiments/
import curves
import lib
import look_inside
from test_experiments import png

CASES = [('composite', {}), ('composite', dict(causal=False, kernel_size=5, content=False)), ('conv', {}),
         ('conv', dict(causal=False, lightweight=True, dynamic=True, output=True)), ('kernelized', {}),
         ('kernelized', dict(causal=False, max_distance=3)), ('kernelized', dict(normalize=False, rpe=False)),
         ('nope', dict(absolute=True))]


def inside(name, scheme=None, **fields):
    """look() of a small model whose parameters, kernels too, are all far from zero."""
    torch.manual_seed(1)
    module = importlib.import_module(f'model_{name}')
    model = module.Model(module.Config(n_layer=2, n_head=2, n_embd=32, block_size=32, **fields)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return look_inside.look(model, torch.tensor([list(b'def f(x, y):\n')]), scheme or look_inside.SCHEMES[name])


@pytest.mark.parametrize('name, fields', CASES, ids=str)
def test_parts_give_the_attention(name, fields):
    """The parts give the weights, which look() compares with the layer's own output; the picture is drawn."""
    layers, see = inside(name, **fields)
    for layer in layers:
        parts = list(layer['parts'].values())
        if name == 'kernelized':
            weights = math.prod(parts) * see
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = sum(parts).masked_fill(~see, -math.inf).softmax(-1)
        assert torch.allclose(weights, layer['weights'], atol=1e-6)
    lib.pyplot().close(look_inside.draw(layers, see, list('def f(x, y):\u21b5'), name == 'kernelized'))

    def wrong(model, attn, x, q, k, see):
        return look_inside.SCHEMES[name](model, attn, x, k, q, see)
    with pytest.raises(ValueError, match='miss the output of layer 1 by'):
        inside(name, wrong, **{**fields, 'content': True} if name == 'composite' else fields)


def test_scripts_on_a_trained_run(trained, run):
    """Both scripts as a user starts them, and what they refuse."""
    out_dir = trained('composite', 'causal').out_dir
    run('experiments/look_inside.py', '--out_dir', out_dir, '--text', 'import os', '--out', 'new/inside.png')
    assert run.out == 'wrote new/inside.png\n' and png(run.folder / 'new/inside')
    for flag, value in (('--text', 'x'), ('--layer', 3), ('--out', 'a.jpg')):
        run('experiments/look_inside.py', '--out_dir', out_dir, flag, value, code=2)
        assert re.search(f'{flag} must', run.err)
    run('experiments/curves.py', out_dir)
    rows = list(csv.DictReader(open(out_dir / 'log.csv')))
    seconds = sum(10 * float(row['ms']) for row in rows if row['ms']) / 1000
    best = min((float(row['val_loss']), row['bits_per_byte']) for row in rows if row['val_loss'])
    cells = run.out.splitlines()[3].strip('| ').split(' | ')
    assert cells == [out_dir.name, '60', f'{seconds:.0f}', f'{best[0]:.4f}', f'{float(best[1]):.4f}', '-']
    assert png(run.folder / 'out/curves')


def test_logs(tmp_path, capsys):
    """Seconds: 10 steps of 100 ms, 10 of 200 ms, 5 more like the last. Damaged logs are refused."""
    (tmp_path / 'log.csv').write_text('step,train_loss,val_loss,ms\n0,,5.5,\n10,5,,100\n15,,4,\n20,3,,200\n25,,3.5,\n')
    assert [row['seconds'] for row in lib.read_log(tmp_path)] == pytest.approx([0, 1, 2, 3, 4])
    assert lib.losses(tmp_path) == [(0, 5.5), (15, 4.0), (25, 3.5)]
    assert curves.curve_table({'a': lib.read_log(tmp_path)}, 4)[1] == [('a', '25', '4', '3.5000', 'nan', '2')]
    for text, message in (('', 'is empty'), ('step,ms\nx,1\n', 'is damaged: ValueError'), ('a\n1\n', 'KeyError')):
        (tmp_path / 'log.csv').write_text(text)
        with pytest.raises(SystemExit, match='2'):
            lib.read_log(tmp_path)
        assert message in capsys.readouterr().err
