"""The pictures of experiments/curves.py and experiments/look_inside.py show what the logs and the layers hold."""
import csv
import dataclasses
import importlib
import math
import sys
import types

import pytest
import torch

import conftest  # noqa: F401, finds experiments/
import curves
import lib
import look_inside

TEXT = 'def f(x, y):\n'
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)
CASES = {
    'composite': ('composite', {}),
    'composite-masked': ('composite', dict(causal=False)),
    'composite-kernels': ('composite', dict(content=False, attention='fast', kernel_size=5, bias=True)),
    'composite-absolute': ('composite', dict(absolute=True, dynamic=False)),
    'conv': ('conv', {}),
    'conv-masked': ('conv', dict(causal=False)),
    'conv-scores': ('conv', dict(output=False, dynamic=False)),
    'conv-output': ('conv', dict(lightweight=False, dynamic=False)),
    'kernelized': ('kernelized', {}),
    'kernelized-masked': ('kernelized', dict(causal=False, max_distance=3)),
    'kernelized-plain': ('kernelized', dict(normalize=False, rpe=False)),
    'nope': ('nope', {}),
    'nope-masked': ('nope', dict(causal=False)),
}


def make(name, **fields):
    """A small model whose parameters, kernels too, are all far from zero."""
    torch.manual_seed(1)
    module = importlib.import_module(f'model_{name}')
    model = module.Model(module.Config(**SMALL, **fields)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def write_run(folder, name, model):
    """What look_inside.py reads of a run of train.py."""
    folder.mkdir()
    meta = dict(tokenizer='bytes', vocab_size=256, mask_id=256, dtype='uint16', train_tokens=1, train_bytes=1,
                val_tokens=1, val_bytes=1, source='', sha256={})
    checkpoint = dict(step=2, best=5.0, window=[], model=model.state_dict(), config=dataclasses.asdict(model.config),
                      settings=dict(model=name, objective='causal'), meta=meta, optimizer={})
    torch.save(checkpoint, folder / 'ckpt_best.pt')
    return folder


@pytest.fixture
def look(monkeypatch, capsys):
    """look(words) -> exit code, stdout, last line of stderr of look_inside.py."""
    def look(*words):
        monkeypatch.setattr(sys, 'argv', ['look_inside.py', *map(str, words)])
        code = 0
        try:
            look_inside.main()
        except SystemExit as stop:
            code = stop.code
        lib.pyplot().close('all')
        printed = capsys.readouterr()
        return code, printed.out, (printed.err.splitlines() or [''])[-1]
    return look


def inside(model, name, scheme=None, head=None):
    idx = torch.tensor([list(TEXT.encode())])
    with torch.no_grad():
        return look_inside.look(model, idx, scheme or look_inside.SCHEMES[name], head)


def rows_centred(score, see):
    score = score.masked_fill(~see, math.nan)
    return (score - score.nanmean(-1, keepdim=True))[see]


@pytest.mark.parametrize('case', CASES)
def test_parts_make_the_attention(case, tmp_path, look):
    """The parts give the weights; the weights are those that the layer itself returns; the picture is drawn."""
    name, fields = CASES[case]
    model = make(name, **fields)
    for head in range(2):
        layers, see = inside(model, name, head=head)
        asked, _ = inside(model, name, look_inside.measured, head)
        assert len(layers) == 2 and (see.all() if not model.config.causal else not see[0, 1:].any())
        for layer, other in zip(layers, asked):
            parts = list(layer['parts'].values())
            if name == 'kernelized':
                product = math.prod(parts) * see
                weights = product / product.sum(-1, keepdim=True)
            else:
                weights = sum(parts).masked_fill(~see, -math.inf).softmax(-1)
                kernels = [part for title, part in layer['parts'].items() if 'content' not in title]
                added = other['parts']['what the file adds\n$\\log a_{ij} - q_i\\cdot k_j\\,/\\sqrt{hs}$']
                if kernels and look_inside.CONTENT in layer['parts']:
                    assert torch.allclose(rows_centred(added, see), rows_centred(sum(kernels), see), atol=1e-3)
            assert torch.allclose(weights, layer['weights'], atol=1e-6)
            assert torch.allclose(other['weights'], layer['weights'], atol=1e-5)
    folder = write_run(tmp_path / 'a', name, model)
    code, out, _ = look('--out_dir', folder, '--text', TEXT)
    picture = (folder / 'look_inside.png').read_bytes()
    assert code == 0 and out == f'wrote {folder / "look_inside.png"}\n'
    assert picture[:4] == b'\x89PNG' and 10_000 < len(picture) < 400_000


def test_rows_are_queries():
    """A kernel for the token before puts the weights one left of the diagonal; the head that has it is shown."""
    model = make('composite')
    for block in model.h:
        block.attn.fixed.data[1, 8 - 1] = 60
    for layer in inside(model, 'composite')[0]:
        assert layer['head'] == 1 and (layer['weights'].diagonal(-1) > 0.9).all()


@pytest.mark.parametrize('name', ['composite', 'conv', 'kernelized', 'nope'])
def test_wrong_parts_are_not_drawn(name, tmp_path, look, monkeypatch):
    """Planted: one part mirrored, as if query and key were exchanged."""
    right = look_inside.SCHEMES[name]

    def wrong(module, attn, x, q, k, see):
        return right(module, attn, x, k, q, see)

    folder = write_run(tmp_path / 'a', name, make(name))
    monkeypatch.setitem(look_inside.SCHEMES, name, wrong)
    code, _, err = look('--out_dir', folder, '--text', TEXT)
    assert code == 2 and 'miss the output of layer 1 by' in err
    assert not (folder / 'look_inside.png').exists()


def test_a_file_of_ones_own():
    """What ALiBi adds to the content is found without being told; a scheme that gates its output is refused."""
    model = make('nope')
    slopes = torch.tensor([0.5, 0.125])[:, None, None]

    def alibi(self, x, valid=None, state=None):
        q, k, v = [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1)]
        i = torch.arange(x.size(1))
        score = q @ k.transpose(-2, -1) / 4 - slopes * (i[:, None] - i).abs()
        y = score.masked_fill(i > i[:, None], -math.inf).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).flatten(2)) * self.gate(x)

    for block in model.h:
        block.attn.forward = types.MethodType(alibi, block.attn)
        block.attn.gate = torch.ones_like
    for head in range(2):
        layers, see = inside(model, 'alibi', look_inside.measured, head)
        i = torch.arange(see.size(0))
        for layer in layers:
            content, added = layer['parts'].values()
            expected = -slopes[head] * (i[:, None] - i)
            assert torch.allclose(rows_centred(added, see), rows_centred(expected, see), atol=1e-3)
    model.h[1].attn.gate = torch.sigmoid
    with pytest.raises(ValueError, match='miss the output of layer 2 by'):
        inside(model, 'alibi', look_inside.measured)


def test_another_kind_of_layer(tmp_path, look, monkeypatch):
    """One line, too, for an attention without c_proj."""
    folder = write_run(tmp_path / 'a', 'nope', make('nope'))
    monkeypatch.delitem(look_inside.SCHEMES, 'nope')
    load_run = look_inside.load_run

    def without_c_proj(*words):
        model, checkpoint = load_run(*words)
        for block in model.h:
            block.attn = torch.nn.Identity()
            block.attn.forward = types.MethodType(identity, block.attn)
        return model, checkpoint

    def identity(self, x, valid=None, state=None):
        return x

    monkeypatch.setattr(look_inside, 'load_run', without_c_proj)
    code, _, err = look('--out_dir', folder)
    assert code == 2 and ': model_nope.py with these settings cannot be drawn: ' in err


def test_more_than_the_known_parts(tmp_path, look):
    """A mixer and a key-made kernel can be measured; convolved values are no weights times values."""
    mixer = write_run(tmp_path / 'a', 'conv', make('conv', mixer='dynamic'))
    key = write_run(tmp_path / 'b', 'composite', make('composite', dynamic_key=True))
    values = write_run(tmp_path / 'c', 'conv', make('conv', values=True))
    for folder in (mixer, key):
        code, _, err = look('--out_dir', folder)
        assert code == 2 and err.endswith('(try --measure)')
        assert look('--out_dir', folder, '--measure', '--layer', 2, '--head', 1)[0] == 0
    kernelized = write_run(tmp_path / 'd', 'kernelized', make('kernelized'))
    assert look('--out_dir', kernelized, '--measure')[0] == 0
    code, _, err = look('--out_dir', values, '--measure')
    assert code == 2 and 'cannot be drawn: weights times values miss' in err and '--measure' not in err


def test_look_inside_refuses(tmp_path, look):
    folder = write_run(tmp_path / 'a', 'nope', make('nope', absolute=True))
    for words, message in (
            (['--text', 'x' * 41], '--text must have from 2 to 40 tokens, and this one has 41'),
            (['--text', 'x'], 'and this one has 1'),
            (['--text', 'x' * 33], 'absolute positions end at block_size=32: --text has 33 tokens'),
            (['--layer', 3], '--layer must be from 1 to 2, not 3'),
            (['--head', 3], '--head must be from 1 to 2, not 3'),
            (['--out', 'a.jpg'], '--out must end in .png, not a.jpg')):
        code, out, err = look('--out_dir', folder, *words)
        assert code == 2 and not out and message in err, err
    assert look('--out_dir', tmp_path / 'b')[0] == 2


def test_labels():
    assert [look_inside.shown(piece) for piece in (b'a', b' ', b'\n', b' the', b'\xe2', b'$')] == \
        ['a', '\u2423', '\u21b5', '\u2423the', '\\xe2', '$']


def test_a_trained_run(trained, run):
    """Both scripts as a user starts them."""
    out_dir = trained('composite', 'causal').out_dir
    run('experiments/look_inside.py', '--out_dir', out_dir, '--text', 'import os', '--out', 'new/inside.png')
    assert run.out == 'wrote new/inside.png\n'
    assert (run.folder / 'new/inside.png').read_bytes()[:4] == b'\x89PNG'
    run('experiments/curves.py', out_dir)
    rows = list(csv.DictReader(open(out_dir / 'log.csv')))
    seconds = sum(10 * float(row['ms']) for row in rows if row['ms']) / 1000
    best = min((float(row['val_loss']), row['bits_per_byte']) for row in rows if row['val_loss'])
    cells = run.out.splitlines()[2].strip('| ').split(' | ')
    assert cells == [out_dir.name, '60', f'{seconds:.0f}', f'{best[0]:.4f}', f'{float(best[1]):.4f}']
    assert (run.folder / 'out/curves.png').read_bytes()[:4] == b'\x89PNG'


LOG = '''step,train_loss,val_loss,bits_per_byte,lr,grad_norm,ms,tokens_per_s
0,,5.5,8,,,,
10,5,,,0.1,1,100,9
15,,4,6,,,,
20,3,,,0.1,1,200,9
25,,3.5,5,,,,
'''


def test_seconds():
    """By hand: 10 steps of 100 ms, 10 of 200 ms, and 5 more like the last ones."""
    rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(LOG.splitlines())]
    curves.add_seconds(rows)
    assert [row['seconds'] for row in rows] == pytest.approx([0, 1, 2, 3, 4])


def test_many_curves(tmp_path, monkeypatch, capsys):
    """Up to six runs have a legend outside of the axes, more have names at their ends that do not overlap."""
    monkeypatch.chdir(tmp_path)
    for n in range(12):
        (tmp_path / f'run{n}').mkdir()
        (tmp_path / f'run{n}/log.csv').write_text(LOG)
    for count in (1, 6, 7, 12):
        lib.pyplot().close('all')
        runs = {f'run{n}': curves.read_log(f'run{n}') for n in range(count)}
        fig = curves.draw(runs)
        fig.draw_without_rendering()
        names = [text for text in fig.axes[0].texts if text.get_text().startswith('run')]
        if count <= 6:
            box = fig.legends[0].get_window_extent()
            assert not names and not any(box.overlaps(ax.get_tightbbox()) for ax in fig.axes)
        else:
            heights = sorted(name.get_position()[1] for name in names)
            low, high = fig.axes[0].get_ylim()
            assert len(names) == count and not fig.legends
            assert min(b - a for a, b in zip(heights, heights[1:])) > (high - low) / 30
    monkeypatch.setattr(sys, 'argv', ['curves.py', 'run0', 'run1', '--out', 'b/c.png'])
    curves.main()
    assert '| run1 | 25 | 4 | 3.5000 | 5.0000 |' in capsys.readouterr().out and (tmp_path / 'b/c.png').exists()


@pytest.mark.parametrize('text, message', [
    (None, 'a has no log.csv; name folders that train.py wrote'),
    ('', 'log.csv is empty'),
    ('step,ms\n', 'log.csv is empty'),
    ('step,ms\nx,1\n', 'log.csv is damaged: ValueError'),
    ('loss\n1\n', 'log.csv is damaged: KeyError'),
])
def test_curves_refuses(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a').mkdir()
    if text is not None:
        (tmp_path / 'a/log.csv').write_text(text)
    monkeypatch.setattr(sys, 'argv', ['curves.py', 'a'])
    with pytest.raises(SystemExit) as stop:
        curves.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count('\n') == 1 and message in err and not (tmp_path / 'out').exists()


def test_names_beside_dots_cover_nothing():
    """Four dots too near for names on the same side; where no side is free, the name is still there."""
    fig, ax = lib.pyplot().subplots(figsize=(5, 4))
    points = [(0, 0, 'one', 'C0'), (0.05, 0.01, 'two', 'C1'), (0.1, 0, 'three', 'C2'), (0.02, 0.04, 'four', 'C3')]
    for x, y, _, color in points:
        ax.plot(x, y, 'o', color=color)
    ax.set(xlim=(-0.5, 0.5), ylim=(-0.5, 0.5))
    curves.label_points(ax, points)
    assert [label.get_text() for label in ax.texts] == [point[2] for point in points]
    boxes = [label.get_window_extent() for label in ax.texts]
    for n, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:n])
        assert not any(box.contains(*ax.transData.transform(point[:2])) for point in points)
    curves.label_points(ax, [(0, 0, f'name {n}', 'C0') for n in range(9)])
    assert len(ax.texts) == 13
    lib.pyplot().close(fig)
