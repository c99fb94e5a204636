"""The experiments run, at a setting far too small to mean anything, and refuse bad input before any work."""
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model_composite
import model_kernelized
import train as train_py
from conftest import CORPORA, REPO, TINY, Run

sys.path.insert(0, str(REPO / 'experiments'))
import common  # noqa: E402
import compare  # noqa: E402
import convert  # noqa: E402
import extrapolate  # noqa: E402
import laptop  # noqa: E402
import lib  # noqa: E402
import near_copies  # noqa: E402
import speed  # noqa: E402
import stability  # noqa: E402

OWN = 'mine: --model composite --kernel_size 9'  # as a reader's own scheme is given: a name and flags


def written(folder, name):
    """Rows of folder/<name>.csv; there is a picture beside it."""
    assert (folder / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
    return lib.read_csv(folder / f'{name}.csv')


@pytest.fixture(scope='module')
def compared(tmp_path_factory, data_dir):
    """compare.py has trained nope and a scheme it does not know, two seeds each; .out and .err are what it said."""
    run = Run(tmp_path_factory.mktemp('compared'))
    run.data = ['--data_dir', data_dir, '--dataset', 'code', *TINY]
    run.words = ['experiments/compare.py', '--schemes', 'nope', OWN, '--against', 'nope', '--objectives', 'causal',
                 '--seeds', 2, '--dataset', 'code', '--name', 'tiny', '--results', 'results',
                 '--train', '--data_dir', data_dir, *TINY, '--max_iters', 3, '--eval_interval', 2]
    run(*run.words)
    return run


# ---------------------------------------------------------------------------------------------------------------------
# compare.py

def test_compare(compared):
    """A table row and a curve for each scheme and seed, a CSV that says how it was made; nothing is trained twice."""
    out = compared.out
    differences = out.split('more than nope')[1]
    assert '| causal | mine | ' in differences and differences.count('| causal |') == 1
    assert out.count('causal nope seed') == out.count('causal mine seed') == 2 and out.count('| causal |') == 3
    rows = written(compared.folder / 'results', 'compare-tiny-causal')
    assert [int(r['step']) for r in rows] == [0, 2, 3] * 4 and all(4 < float(r['val_loss']) < 6 for r in rows)
    first = (compared.folder / 'results/compare-tiny-causal.csv').read_text().splitlines()[0]
    assert first.startswith("# python experiments/compare.py --schemes nope 'mine: --model composite --kernel_size 9' ")
    assert '--max_iters 3' in first
    made = {p: p.stat().st_mtime for p in (compared.folder / 'out/compare').glob('tiny-causal-*/ckpt_last.pt')}
    again = Run(compared.folder)(*compared.words)
    assert len(made) == 4 and again.out == out and made == {p: p.stat().st_mtime for p in made} and not again.err


def test_compare_says_where_a_run_is(compared):
    places = ('run 1 of 4: nope causal seed 1', 'run 2 of 4: nope causal seed 2', 'run 3 of 4: mine causal seed 1',
              'run 4 of 4: mine causal seed 2')
    for place in places:
        lines = [line for line in compared.err.splitlines() if line.startswith(f'{place}, step 1/3, loss 5.')]
        assert len(lines) == 1 and lines[0].endswith(' left'), compared.err


def test_progress_on_a_terminal(monkeypatch, capsys):
    """One line, written over; at most one a second; without the hours where there are none."""
    clock = iter((0, 0, 0.5, 5, 5, 9, 9))
    monkeypatch.setattr(compare.time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    tail = 'lr 1.00e-03  norm 0.51  17.3 ms  1,234 tokens/s'
    compare.show_progress([f'step    10/1000  loss 2.5000  {tail}  0:02:40 left\n',
                           f'step    20/1000  loss 2.4000  {tail}  0:02:30 left\n',
                           'step    20/1000  val loss 2.3000 nats per token\n',
                           f'step   400/1000  loss 1.8400  {tail}  MFU 40%  1 day, 0:02:10 left\n'], 'run 3 of 12: x')
    assert capsys.readouterr().err.split('\r') == [
        '', 'run 3 of 12: x, step 10/1000, loss 2.50, 02:40 left\033[K',
        'run 3 of 12: x, step 400/1000, loss 1.84, 1 day, 0:02:10 left\033[K', '\033[K']


@pytest.mark.parametrize('words, message', [
    (['--schemes', 'nope', 'nope: --model composite'], "'nope' is the name of a known scheme"),
    (['--schemes', 'nope', 'mine'], "write your own as 'name: --model file'"),
    (['--schemes', OWN, OWN], "'mine' is there twice"),
    (['--schemes', 'a/b: --model nope'], "not 'a/b'"),
    (['--schemes', "mine: --model 'nope"], "the flags of 'mine' cannot be read"),
    (['--schemes', 'mine: --model no_such_file'], 'there is no model_no_such_file.py'),
    (['--schemes', 'mine: --model nope --kernel_size 9'], 'unrecognized arguments: --kernel_size'),
    (['--schemes', 'mine: --model composite --kernel_size many'], 'invalid int value'),
    (['--schemes', 'mine: --model nope --seed 3'], 'must not set --seed'),
    (['--train', '--dataset=other'], '--train must not set --dataset'),
    (['--train', '--max_iters', '-1'], '--max_iters must be from 0'),
    (['--name', 'a b'], '--name has letters'),
    (['--schemes', 'nope', '--against', 'composite'], '--against needs a scheme that is among --schemes'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_compare_refuses(words, message, monkeypatch, capsys, tmp_path):
    """Before any training, in the last line on stderr and with exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['compare.py', *words])
    monkeypatch.setattr(compare, 'train_run', lambda *_: pytest.fail('trained'))
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_compare_refuses_a_run_of_other_settings(compared, monkeypatch, capsys):
    """A name stands for one setting; where the data is and how often a line is printed are not part of it."""
    monkeypatch.chdir(compared.folder)
    monkeypatch.setattr(compare, 'train_run', lambda *_: pytest.fail('trained'))
    words = [str(w) for w in compared.words[1:]]
    monkeypatch.setattr(sys, 'argv', ['compare.py', *words, '--max_iters', '4'])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2
    assert 'tiny-causal-nope-1 was trained with max_iters 3, not 4: give' in capsys.readouterr().err
    words[words.index(OWN)] = 'mine: --model composite --kernel_size 11'
    monkeypatch.setattr(sys, 'argv', ['compare.py', *words])
    with pytest.raises(SystemExit):
        compare.main()
    assert 'tiny-causal-mine-1 was trained with kernel_size 9, not 11' in capsys.readouterr().err
    monkeypatch.setattr(sys, 'argv', ['compare.py', *map(str, compared.words[1:]), '--log_interval', '7'])
    compare.main()


def test_interrupted_comparison_goes_on(compared):
    """Ctrl-C: the run saves and compare.py says where it stopped; the same command trains the rest only."""
    words = ['experiments/compare.py', '--schemes', 'nope', '--objectives', 'causal', '--seeds', 1, '--dataset', 'code',
             '--name', 'stopped', '--results', 'results', '--train', *compared.data[:2], *TINY, '--max_iters', 200]
    process = Run(compared.folder).start(*words)
    assert process.stderr.readline().startswith('run 1 of 1: nope causal seed 1, step 1/200')
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err.endswith('compare.py: stopped in run 1 of 1: nope causal seed 1; the same command goes on there\n')
    folder = compared.folder / 'out/compare/stopped-causal-nope-1'
    step = torch.load(folder / 'ckpt_last.pt')['step']
    before = (folder / 'log.csv').read_text()
    assert 0 < step < 200
    Run(compared.folder)(*words)
    after = (folder / 'log.csv').read_text()
    assert after.startswith(before) and torch.load(folder / 'ckpt_last.pt')['step'] == 200


def test_a_failed_run_ends_the_comparison(monkeypatch, tmp_path, capsys):
    """With its exit code, and the code of a shell where a signal ended it."""
    monkeypatch.setattr(compare, 'REPO', tmp_path)
    for end, code in (('sys.exit(3)', 3), ('os.kill(os.getpid(), 9)', 137)):
        (tmp_path / 'train.py').write_text(f'import os, sys\n{end}\n')
        with pytest.raises(SystemExit) as stop:
            compare.train_run([], 'run 2 of 9: x')
        assert stop.value.code == code and 'stopped in run 2 of 9: x' in capsys.readouterr().err


def test_a_changed_model_file_is_not_compared_by_its_old_runs(tmp_path, monkeypatch, capsys):
    """A reader's own file that is newer than a run was not what trained it."""
    monkeypatch.setattr(common, '__file__', str(tmp_path / 'common.py'))
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.delitem(sys.modules, 'model_mine', raising=False)
    file = tmp_path / 'model_mine.py'
    file.write_text((REPO / 'model_nope.py').read_text(encoding='utf-8'), encoding='utf-8')
    (tmp_path / 'config.json').write_text('{}')
    os.utime(file, (1, 1))
    compare.check_run(tmp_path, ['--model', 'mine'])
    os.utime(tmp_path / 'config.json', (0, 0))
    with pytest.raises(SystemExit):
        compare.check_run(tmp_path, ['--model', 'mine'])
    assert 'model_mine.py has changed' in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, 'model_mine')


def test_schemes(monkeypatch, tmp_path):
    """Every scheme is a model of its own and has a colour of its own, and so have some that are not known."""
    monkeypatch.chdir(tmp_path)
    known = [str(train_py.resolve(words)[1:3]) for words in compare.SCHEMES.values()]
    assert len(set(known)) == len(known)
    names = ['mine', *compare.SCHEMES, 'yours', 'theirs']
    color = compare.colors(names)
    assert list(color) == names and len(set(color.values())) == len(names)
    assert color['nope'] == compare.colors(['nope'])['nope'], 'a scheme has the same colour in every picture'
    assert compare.in_order(names) == [*compare.SCHEMES, 'mine', 'yours', 'theirs']
    curves = {('causal', name): [[(0, 5.0), (1, 4.0), (2, 3.0)]] for name in names}
    labels = compare.draw(curves, 'many').axes[1].get_yticklabels()
    assert [label.get_text() for label in labels] == names


def test_p_value():
    """Against closed forms: two seeds (Cauchy), three seeds; and a value of the tables (n = 9: t = 2.306, p = .05)."""
    assert compare.p_value([1., 3.]) == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-6)
    d = [0.2, 0.5, 0.9]
    t = sum(d) / 3 / np.std(d, ddof=1) * 3 ** 0.5
    assert compare.p_value(d) == pytest.approx(1 - t / (t * t + 2) ** 0.5, abs=1e-6)
    assert compare.p_value(d) == compare.p_value([-x for x in d])
    x = np.arange(9.) - 4
    assert compare.p_value(list(x + 2.306 * x.std(ddof=1) / 3)) == pytest.approx(0.05, abs=1e-4)


CURVES = {  # of two seeds each; every loss that is not the last one would change the numbers below
    ('causal', 'nope'): [[(0, 5.0), (2, 4.0), (4, 3.0)], [(0, 5.5), (2, 4.4), (4, 3.2)]],
    ('causal', 'mine'): [[(0, 5.1), (2, 3.5), (4, 2.9)], [(0, 5.3), (2, 3.1), (4, 2.6)]],
    ('masked', 'nope'): [[(0, 6.0), (2, 5.0), (4, 4.0)], [(0, 6.5), (2, 5.5), (4, 4.1)]],
    ('masked', 'mine'): [[(0, 6.1), (2, 5.1), (4, 4.3)], [(0, 6.3), (2, 5.2), (4, 4.2)]],
}


def test_printed_losses(capsys):
    """The mean of the last losses and their standard deviation, dividing by n - 1."""
    compare.print_losses(CURVES)
    assert capsys.readouterr().out.splitlines()[3:] == [
        '| causal | nope | 3.1000 | 2 | 0.1414 |', '| causal | mine | 2.7500 | 2 | 0.2121 |',
        '| masked | nope | 4.0500 | 2 | 0.0707 |', '| masked | mine | 4.2500 | 2 | 0.0707 |']
    compare.print_losses({('causal', 'nope'): CURVES['causal', 'nope'][:1]})
    assert capsys.readouterr().out.splitlines()[3:] == ['| causal | nope | 3.0000 | 1 | - |']


def test_printed_differences(capsys):
    """Positive: worse than the other. Each seed with the same seed, each objective with the same objective."""
    compare.print_differences(CURVES, 'nope')
    lines = capsys.readouterr().out.splitlines()
    p = [1 - 2 / math.pi * math.atan(t) for t in (0.35 / 0.25, 0.2 / 0.1)]  # t = mean / standard error, two seeds
    assert lines[1] == '| objective | scheme | more than nope | by seed | p |'
    assert lines[3:] == [f'| causal | mine | -0.3500 | -0.1000, -0.6000 | {p[0]:.3f} |',
                         f'| masked | mine | +0.2000 | +0.3000, +0.1000 | {p[1]:.3f} |']
    compare.print_differences({**CURVES, ('causal', 'mine'): CURVES['causal', 'mine'][:1]}, 'nope')
    assert '| causal | mine | -0.1000 | -0.1000 | - |' in capsys.readouterr().out, 'of one pair there is no p'


def test_printed_levels(capsys):
    """The first validation below a level, seed by seed; equal is not below. The last losses."""
    compare.print_levels(CURVES, [4.0, 3.1])
    assert capsys.readouterr().out.splitlines()[1:] == [
        '| objective | scheme | below 4 | below 3.1 | at the end |', '|---|---|---|---|---|',
        '| causal | nope | 4 / 4 | 4 / - | 3.0000 / 3.2000 |', '| causal | mine | 2 / 2 | 4 / 4 | 2.9000 / 2.6000 |',
        '| masked | nope | - / - | - / - | 4.0000 / 4.1000 |', '| masked | mine | - / - | - / - | 4.3000 / 4.2000 |']


def test_drawn_curves():
    """Above the mean over the seeds from the first validation after step 0; below a dot for each seed's last loss."""
    figure = compare.draw(CURVES, 'title')
    colors = compare.colors(['nope', 'mine'])
    for column, objective in enumerate(('causal', 'masked')):
        above, below = figure.axes[column], figure.axes[2 + column]
        assert above.get_title() == f'{objective} language model'
        lines = zip(above.lines, below.lines, strict=True)
        for row, (scheme, (curve, dots)) in enumerate(zip(colors, lines, strict=True)):
            first, second = CURVES[objective, scheme]
            assert curve.get_label() == scheme and curve.get_color() == dots.get_color() == colors[scheme]
            assert list(curve.get_xdata()) == [2, 4]
            assert list(curve.get_ydata()) == pytest.approx([(first[i][1] + second[i][1]) / 2 for i in (1, 2)])
            assert list(dots.get_xdata()) == [first[-1][1], second[-1][1]] and list(dots.get_ydata()) == [row, row]


def test_each_seed_is_a_run_of_its_own(compared):
    """The runs differ in --seed, so their losses do, and what is printed are the losses of the runs' logs."""
    for scheme in ('nope', 'mine'):
        folders = [compared.folder / f'out/compare/tiny-causal-{scheme}-{seed}' for seed in (1, 2)]
        settings = [json.loads((folder / 'config.json').read_text()) for folder in folders]
        assert [s.pop('seed') for s in settings] == [1, 2] and settings[0] == settings[1]
        curves = [compare.losses(folder) for folder in folders]
        assert all(a[1] != b[1] for a, b in zip(*curves, strict=True))
        rows = written(compared.folder / 'results', 'compare-tiny-causal')
        for seed, curve in enumerate(curves, 1):
            found = [(int(r['step']), float(r['val_loss'])) for r in rows
                     if (r['scheme'], r['seed']) == (scheme, str(seed))]
            assert found == curve
            assert f'causal {scheme} seed {seed}: {curve[-1][1]:.4f}' in compared.out


# ---------------------------------------------------------------------------------------------------------------------
# what scripts share

def test_short_names(capsys):
    runs = ['out/compare/x-1-causal-nope-1', 'out/compare/x-1-causal-nope-2', 'out/nope-causal-python']
    assert lib.short_names(runs) == ['nope-1', 'nope-2', 'nope-causal-python']
    with pytest.raises(SystemExit):
        lib.short_names(['out/compare/x-causal-nope-1', 'out/compare/y-causal-nope-1'])
    assert capsys.readouterr().err.endswith('2 are called nope-1\n')


@pytest.mark.parametrize('script, words', {
    'attention_variance': [], 'compare': [], 'convert': [], 'counter': ['out/a'], 'depth': [], 'equal_time': [],
    'extrapolate': ['out/a'], 'feature_error': [], 'finetune_glue': ['--out_dirs', 'out/a'], 'probe_position': [],
    'speed': [], 'stability': [], 'tasks': []}.items())
def test_quick_touches_no_tracked_file(script, words, monkeypatch):
    """--quick writes to a folder that git ignores, the full setting to experiments/results, --results to any."""
    module = importlib.import_module(script)
    found = {}
    for flags in ((), ('--quick',), ('--quick', '--results', 'mine')):
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', *words, *flags])
        found[flags] = Path(module.arguments().results)
    assert list(found.values()) == [REPO / 'experiments/results', Path('out/quick'), Path('mine')]
    assert 'out/' in (REPO / '.gitignore').read_text().split()


def test_every_script_with_quick_is_tested():
    tested = test_quick_touches_no_tracked_file.pytestmark[0].args[1]
    with_quick = {p.stem for p in (REPO / 'experiments').glob('*.py') if '--quick' in p.read_text(encoding='utf-8')}
    others = {'lib', 'prepare_speed', 'curves', 'look_inside', 'laptop', 'soak', 'take_positions_away'}
    assert with_quick - others == {script for script, _ in tested}


def test_soak_sees_differences(tmp_path):
    """Equal runs, another weight, another loss, a missing row."""
    soak = importlib.import_module('soak')
    log = 'step,train_loss,val_loss\n5,2.5,\n10,2.25,2.5\n'
    logs = dict(a=log, same=log, weight=log, loss=log.replace('2.25', '2.75'), row=log[:-len('10,2.25,2.5\n')])
    for name, text in logs.items():
        (tmp_path / name).mkdir()
        weight = torch.ones(3) + (name == 'weight') * 0.125
        torch.save(dict(step=10, model=dict(w=weight)), tmp_path / name / 'ckpt_last.pt')
        (tmp_path / name / 'log.csv').write_text(text)
    found = [soak.difference(tmp_path / 'a', tmp_path / name) for name in ('same', 'weight', 'loss', 'row')]
    assert found == [0, 0.125, 0.5, math.inf]
    assert soak.step_of(tmp_path / 'a') == 10 and soak.step_of(tmp_path) == -1


def test_quick_sizes(monkeypatch):
    """Defaults that --quick makes smaller; a flag wins over both."""
    probes = importlib.import_module('probe_position')
    sizes = {(): (12, 2000), ('--quick',): (4, 200), ('--quick', '--steps', '7'): (4, 7)}
    for flags, (n_layer, steps) in sizes.items():
        monkeypatch.setattr(sys, 'argv', ['probe_position.py', *flags])
        args = probes.arguments()
        assert (args.n_layer, args.steps) == (n_layer, steps)


def test_recorded_results():
    """Every recorded comparison says how it was made, and has the schemes that its command names."""
    tables = list((REPO / 'experiments/results').glob('compare-*.csv'))
    assert len(tables) >= 6
    for path in tables:
        first = path.read_text(encoding='utf-8').splitlines()[0]
        schemes = first.split('--schemes ')[1].split(' --')[0].split()
        assert first.startswith('# python experiments/compare.py ')
        assert list(dict.fromkeys(row['scheme'] for row in lib.read_csv(path))) == schemes


@pytest.mark.skipif(not (CORPORA / 'tiktoken_cache').is_dir(), reason=f'no tiktoken cache in {CORPORA} (set CORPORA)')
def test_prepare_speed(run):
    run('experiments/prepare_speed.py', '--path', CORPORA / 'shakespeare.txt', '--megabytes', 3,
        TIKTOKEN_CACHE_DIR=str(CORPORA / 'tiktoken_cache'))
    assert 'prepare_data.py 3 MB' in run.out and 'ratio' in run.out and 'peak memory' in run.out


# ---------------------------------------------------------------------------------------------------------------------
# kernels.py, extrapolate.py: on the runs that compare.py has trained, and two more

@pytest.fixture(scope='module')
def more_runs(compared):
    """Beside those of compare.py: a causal run with absolute positions, a masked run of conv."""
    run = Run(compared.folder)
    short = [*compared.data, '--max_iters', 2]
    run('train.py', *short, '--model', 'nope', '--absolute', '--out_dir', 'out/compare/tiny-causal-absolute-1')
    conv = ['--model', 'conv', '--lightweight', '--output']
    run('train.py', *short, *conv, '--objective', 'masked', '--out_dir', 'out/m')
    return run


def test_kernels(more_runs, data_dir, tmp_path):
    mine = tmp_path / 'a'
    shutil.copytree(more_runs.folder / 'out/compare/tiny-causal-mine-1', mine)
    checkpoint = torch.load(mine / 'ckpt_best.pt')
    checkpoint['model']['h.1.attn.fixed'][0, 4 - 3] = 9.0  # layer 2, head 1 looks three tokens back
    torch.save(checkpoint, mine / 'ckpt_best.pt')
    run = Run(tmp_path)
    words = ['--tokens', 256, '--data_dir', data_dir, '--results', 'results']
    run('experiments/kernels.py', '--out_dir', 'a', *words)
    rows = written(tmp_path / 'results', 'kernels-a-causal-code')
    assert {r['kind'] for r in rows} == {'fixed', 'dynamic: mean', 'dynamic: spread'} and len(rows) == 3 * 2 * 2 * 5
    assert {int(r['offset']) for r in rows} == set(range(-4, 1)), 'a causal model sees no offset above 0'
    top = max((r for r in rows if r['kind'] == 'fixed'), key=lambda r: float(r['value']))
    assert (top['row'], top['offset']) == ('layer 2, head 1', '-3')
    run('experiments/kernels.py', '--out_dir', more_runs.folder / 'out/m', *words)
    rows = written(tmp_path / 'results', 'kernels-m-masked-code')
    assert len([r for r in rows if r['kind'] == 'depthwise, last layer']) == 32 * 17
    assert len([r for r in rows if r['kind'] == 'lightweight']) == 4 * 17
    run('experiments/kernels.py', '--out_dir', more_runs.folder / 'out/compare/tiny-causal-nope-1', *words, code=2)
    assert run.err.splitlines()[-1].startswith('kernels.py: ') and 'no kernels' in run.err


def test_extrapolate(more_runs, data_dir):
    """A line per scheme with all its seeds; an unknown scheme comes last; absolute positions end at 1x."""
    outs = [f'out/compare/tiny-causal-{name}' for name in ('mine-1', 'nope-1', 'nope-2', 'absolute-1')]
    more_runs('experiments/extrapolate.py', *outs, '--texts', 8, '--data_dir', data_dir, '--results', 'results')
    rows = written(more_runs.folder / 'results', 'extrapolate')
    loss = {(r['scheme'], int(r['times'])): float(r['loss']) for r in rows}
    assert len(rows) == 16 and [r['seed'] for r in rows if r['scheme'] == 'nope' and r['times'] == '8'] == ['1', '2']
    assert all(math.isnan(loss['absolute', times]) for times in (2, 4, 8)) and 'ends at 1x' in more_runs.out
    assert all(4 < loss[scheme, times] < 7 for scheme in ('nope', 'mine') for times in (1, 2, 4, 8))
    table = more_runs.out.split('8x less 1x')[1]
    assert [line.split()[1] for line in table.splitlines() if line.startswith('| ')] == ['nope', 'absolute', 'mine']
    more_runs('experiments/extrapolate.py', 'out/m', '--data_dir', data_dir, code=2)
    assert 'extrapolate.py: out/m is a masked model' in more_runs.err
    more_runs('experiments/counter.py', 'out/m', '--data_dir', data_dir, code=2)
    assert 'counter.py: out/m is a masked model' in more_runs.err


def test_near_copies(monkeypatch, tmp_path, capsys, data_dir):
    """A row is a copy if half of it is in the other text, word for word; the loss of all rows is that of train.py."""
    ids = np.random.default_rng(1).integers(256, size=1000).astype(np.uint16)
    val = np.concatenate((ids[100:229], ids[500:597], ids[:32], ids[400:490], ids[:39]))
    assert near_copies.copied(ids, val, [0, 129, 258], 128).tolist() == [True, True, False]
    run = Run(tmp_path)
    for objective in ('causal', 'masked'):
        run('experiments/compare.py', '--schemes', 'fixed', '--objectives', objective, '--seeds', 1, '--name', 'tiny',
            '--dataset', 'code', '--results', 'results', '--train', '--data_dir', data_dir, '--n_layer', 1,
            '--n_embd', 32, '--n_head', 2, '--max_iters', 3, '--dtype', 'float32', '--eval_tokens', 2048)
        run('experiments/near_copies.py', '--name', 'tiny', '--objective', objective, '--results', 'results',
            '--data_dir', data_dir)
        [row] = lib.read_csv(tmp_path / f'results/near_copies-tiny-{objective}.csv')
        last = lib.read_csv(tmp_path / f'results/compare-tiny-{objective}.csv')[-1]
        assert row['run'] == 'fixed-1' and row['rows'] == '16'
        assert float(row['loss']) == pytest.approx(float(last['val_loss']), abs=1e-4)
    model, checkpoint = near_copies.load_run(tmp_path / 'out/compare/tiny-causal-fixed-1', 'last')
    _, val, _ = lib.text('code', data_dir)
    losses, starts = near_copies.row_losses(model, checkpoint, val)
    for k in (1, 7, 15):  # each loss is that of the row that starts there
        x, y = lib.rows(val, [starts[k]], 128)
        assert losses[k] == pytest.approx(model(x, y)[1].item(), abs=1e-5)


def test_extrapolate_names_a_curve_where_it_ends():
    """No line leads from a scheme that ends at 1x to the right: it would look like a measurement."""
    [ax] = extrapolate.draw({'absolute': [2.0, *[math.nan] * 3], 'nope': [1.0, 2.0, 3.0, 4.0]}).axes
    names = {text.get_text(): text for text in ax.texts}
    assert names['absolute'].xy == (1, 2.0) and names['absolute'].arrow_patch is None
    assert names['nope'].xy == (8, 4.0) and names['nope'].arrow_patch is not None


def test_what_extrapolate_scores():
    """The last T tokens of each text of 8 T, with 0, T, 3 T, 7 T tokens before them."""
    torch.manual_seed(0)
    model = model_kernelized.Model(model_kernelized.Config(block_size=16, n_layer=1, init_std=0.2)).eval()
    ids = torch.randint(256, (300,))
    found = extrapolate.losses(model, ids.numpy(), 2, 'cpu')
    for times, loss in found.items():
        texts = [ids[s + 128 - 16 * times:s + 129] for s in (0, 128)]
        explicit = [F.cross_entropy(model(text[None, :-1])[0][0, -16:], text[-16:]).item() for text in texts]
        assert loss == pytest.approx(sum(explicit) / 2, rel=1e-5)
    assert len(set(found.values())) == 4


# ---------------------------------------------------------------------------------------------------------------------
# speed.py, laptop.py, on_gpu.sh

# stands for a checkout of nanoGPT: what speed.py and laptop.py ask of its model.py
NANOGPT = """
from dataclasses import dataclass
import torch
import model_nope
@dataclass
class GPTConfig(model_nope.Config):
    pass
class GPT(model_nope.Model):
    pass
"""
# stands for a checkout of Chang et al.'s BERT_Convolutions: the attributes of their module, the equation as a gather
CHANG = """
from .file_utils import nothing
class BertSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.nh, C, self.k = config.num_attention_heads, config.hidden_size, int(config.attention_kernel.split()[1])
        self.query, self.key, self.value = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.convfixed_param = nn.Parameter(torch.zeros(1, self.nh, 1, 2 * self.k + 1))
        self.convq_param = nn.Parameter(torch.zeros(C // self.nh, 2 * self.k + 1))

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (self.nh, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        i = torch.arange(x.size(1))
        r = (i[None] - i[:, None]).clamp(-self.k, self.k) + self.k
        scale = q.size(-1) ** -0.5
        kernel = self.convfixed_param + q @ self.convq_param * scale
        att = (q @ k.transpose(2, 3) * scale + kernel.gather(3, r.expand(*q.shape[:3], -1))).softmax(-1)
        return ((att @ v).transpose(1, 2).flatten(2),)
"""


@pytest.fixture
def checkouts(tmp_path):
    """Folders that stand for nanoGPT and BERT_Convolutions."""
    nano = tmp_path / 'nano'
    chang = tmp_path / 'chang'
    (chang / 'src/transformers').mkdir(parents=True)
    nano.mkdir()
    (nano / 'model.py').write_text(NANOGPT)
    (chang / 'src/transformers/modeling_bert.py').write_text(CHANG)
    yield nano, chang
    sys.modules.pop('model', None)


def test_speed(run):
    run('experiments/speed.py', '--quick', '--tokens', 256, '--lengths', 64, 128, '--results', 'results')
    rows = written(run.folder / 'results', 'speed-cpu')
    assert len(rows) == 16 and all(float(r['forward_backward_ms']) > 0 for r in rows)
    assert 'no slower than flash' in run.out


def test_speed_writes_each_length_and_survives_want_of_memory(monkeypatch, capsys):
    """A form out of memory, at first or only while it is timed, is named and left out; the rest is written."""
    calls = {'late': 0}

    def never(q, *_):
        raise torch.OutOfMemoryError('no')

    def late(q, *_):
        calls['late'] += 1
        if calls['late'] % 4 == 0:
            raise torch.OutOfMemoryError('no')
        return q * 1

    def good(q, *_):
        return q * 1
    known = {'softmax, flash': (good, 999), 'never': (never, 999), 'late': (late, 999), 'short': (good, 64)}
    monkeypatch.setattr(speed, 'forms', lambda gpu: known)
    written_rows = []
    args = types.SimpleNamespace(quick=True, tokens=256, lengths=[64, 128])
    rows = speed.attention(args, 'cpu', lambda header, rows: written_rows.append([row[:3] for row in rows]))
    assert [row[:2] for row in rows] == [(64, 'softmax, flash'), (64, 'short'), (128, 'softmax, flash')]
    assert all(row[2] > 0 and row[3] > 0 and row[6] == '' for row in rows)
    first = [row[:2] for row in written_rows[0]]
    assert first == [(64, 'softmax, flash')] and math.isnan(written_rows[0][0][2]), 'written when it has run once'
    assert [row[:2] for row in written_rows[2]] == [(64, 'softmax, flash'), (64, 'late'), (64, 'short')]
    out = capsys.readouterr().out
    assert out.count('never: out of memory\n') == 2 and out.count('late: out of memory while it was timed') == 2


def test_speed_names_the_kernel_that_ran():
    """By the profiler, in plain calls and in a model file's own."""
    q = torch.randn(1, 1, 20, 8)
    for which, name in ((SDPBackend.FLASH_ATTENTION, 'flash'), (SDPBackend.MATH, 'math')):
        with sdpa_kernel(which):
            assert speed.backend(lambda: F.scaled_dot_product_attention(q, q, q)) == name
    assert speed.backend(lambda: model_composite.attend_far_and_near(q, q, q, torch.zeros(1, 1, 20, 5))) == 'flash'
    assert speed.backend(lambda: q @ q.transpose(2, 3)) == ''


def test_forms_of_a_part_are_equal():
    """What speed.py --parts compares is one function of the inputs in every form, values and gradients."""
    for part, (inputs, forms) in speed.parts(gpu=False, small=True).items():
        found = []
        for f in forms.values():
            y = f(*inputs)
            found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3)
        assert len(forms) > 1 or part == 'softmax attention'


def test_speed_steps_and_parts(monkeypatch, capsys, tmp_path, checkouts):
    """Training steps of every model, nanoGPT's among them, and parts of a layer; each timed once here."""
    alternate = speed.alternate
    monkeypatch.setattr(speed, 'alternate', lambda jobs, device, repeats: alternate(jobs, device, 1))
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    steps = ['--steps', '--block_size', '32', '--nanogpt', str(checkouts[0]), '--kernels']
    for flags in (steps, ['--parts']):
        monkeypatch.setattr(sys, 'argv', ['speed.py', '--quick', *flags, '--results', str(tmp_path)])
        speed.main()
    rows = lib.read_csv(tmp_path / f'speed-steps-{device}-32.csv')
    assert [r['model'] for r in rows] == ['nope', 'composite', 'conv', 'conv, output alone', 'kernelized', 'nanoGPT']
    assert float(rows[0]['times_nope']) == 1 and rows[0]['backend'] == rows[-1]['backend'] == 'flash'
    for r in rows:
        assert float(r['tokens_per_s']) == pytest.approx(24 * 128 / float(r['ms']) * 1e3, rel=1e-3)
    kernels = lib.read_csv(tmp_path / f'speed-steps-{device}-32-kernels.csv')
    for r in rows:
        ms = [float(kernel['ms']) for kernel in kernels if kernel['model'] == r['model']]
        assert len(ms) > 5 and ms == sorted(ms, reverse=True) and ms[-1] > 0
    assert '| depthwise convolution | depthwise_conv (conv1d) |' in capsys.readouterr().out
    assert len(lib.read_csv(tmp_path / f'speed-parts-{device}.csv')) >= 8
    monkeypatch.setattr(sys, 'argv', ['speed.py', '--quick', '--steps', '--models', 'nope', 'nanoGPT'])
    with pytest.raises(SystemExit, match='2'):  # without --nanogpt there is no such model
        speed.main()
    assert "output alone, kernelized, not 'nanoGPT'" in capsys.readouterr().err


def test_speed_goes_on_after_an_error(monkeypatch, capsys, tmp_path):
    """A model or a form that ends in an error is named, the others are timed, and the exit code is 1."""
    def broken(*_):
        raise RuntimeError('no such kernel')
    whole = speed.alternate
    model = model_composite.Model(model_composite.Config(n_layer=1, n_embd=32, n_head=2))
    monkeypatch.setattr(speed, 'alternate', lambda jobs, device, repeats: whole(jobs, device, 1))
    monkeypatch.setattr(speed, 'FAILED', [])
    monkeypatch.setattr(speed, 'variants', lambda *_: {'nope': lambda: model, 'bad': broken})
    monkeypatch.setattr(speed, 'parts', lambda *_: {'part': ((torch.ones(2, requires_grad=True),),
                                                            {'bad': broken, 'good': torch.square})})
    for flag, name, failed in (('--steps', 'steps-cpu', 'bad'), ('--parts', 'parts-cpu', 'bad, part: bad')):
        monkeypatch.setattr(sys, 'argv', ['speed.py', '--quick', flag, '--results', str(tmp_path)])
        with pytest.raises(SystemExit, match='1'):
            speed.main()
        out, err = capsys.readouterr()
        assert out.endswith(f'FAILED: {failed}\n') and 'no such kernel' in err
        assert len(lib.read_csv(tmp_path / f'speed-{name}.csv')) == 1


def test_speed_leaves_out_what_fails_while_it_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(speed, 'FAILED', [])
    found = speed.alternate({'bad': iter([1]).__next__, 'good': list}, 'cpu', 2)  # `bad` works once
    assert list(found) == ['good'] and speed.FAILED == ['bad'] and 'StopIteration' in capsys.readouterr().err


def test_triton_forms(run):
    """Where triton is, its interpreter or a GPU runs the kernels against the plain forms; elsewhere a line says so."""
    known = find_spec('triton') is not None
    interpret = {} if torch.cuda.is_available() else {'TRITON_INTERPRET': '1'}
    run.process('experiments/triton_forms.py', code=0 if known else 2, **interpret)
    if known:
        assert run.out.count('near part') >= 8 and 'WRONG' not in run.out
    else:
        assert run.err.endswith('pip install triton\n')


def test_laptop(run, checkouts):
    """Every part, small: each row has its verdict by its own aim; a checkout that is not equal is not timed."""
    nano, chang = checkouts
    words = ['experiments/laptop.py', '--quick', '--results', 'results']
    run(*words, '--nanogpt', nano, '--chang', chang)
    rows = written(run.folder / 'results', 'laptop')
    parts = [r['part'] for r in rows]
    assert list(dict.fromkeys(parts)) == list(laptop.PARTS)
    assert [parts.count(part) for part in laptop.PARTS] == [10, 4, 2, 2 * (16 + 1), 2, 4]
    for r in rows:
        value, ours, theirs = float(r['value']), float(r['ours_ms']), float(r['theirs_ms'])
        expected = {'speed': theirs / ours, 'time': ours / theirs, 'ms': ours}[r['measure']]
        assert value == pytest.approx(expected, rel=1e-3)
        if r['aim']:
            reached = value >= float(r['aim']) if r['measure'] == 'speed' else value <= float(r['aim'])
            assert r['verdict'] == ('reached' if reached else 'missed')
    worst = max((r for r in rows if r['part'] == 'auto' and not r['aim']), key=lambda r: float(r['value']))
    assert worst['value'] in [r['value'] for r in rows if r['what'].startswith('worst')]
    run(*words, '--parts', 'steps', 'chang', '--results', 'alone')
    rows = written(run.folder / 'alone', 'laptop')
    assert len(rows) == 8 and not any(r['verdict'] for r in rows) and 'chang: left out' in run.out
    file = chang / 'src/transformers/modeling_bert.py'
    file.write_text(CHANG.replace('i[None] - i[:, None]', 'i[:, None] - i[None]'))
    with pytest.raises(AssertionError, match='not close'):
        run(*words, '--parts', 'chang', '--chang', chang)
    for flag in ('--nanogpt', '--chang'):
        run(*words, '--parts', 'steps', 'chang', flag, run.folder, code=2)
        assert f'laptop.py: {flag} ' in run.err and 'is no checkout' in run.err


def test_on_gpu(tmp_path):
    """What fails does not stop a part; it is named at the end, and the logs have all that was printed."""
    (tmp_path / 'experiments').mkdir()
    shutil.copy(REPO / 'experiments/on_gpu.sh', tmp_path / 'experiments')
    fake = tmp_path / 'python3'
    fake.write_text('#!/bin/sh\necho "ran $*, unbuffered $PYTHONUNBUFFERED"\n'
                    'case "$*" in *"model conv"*|*"chapter 8 kernel"*) exit 1;; esac\n')
    fake.chmod(0o755)
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SCHEMES': '', 'RESULTS': ''}

    def parts(*names, **more):
        done = subprocess.run(['bash', tmp_path / 'experiments/on_gpu.sh', *names], env={**env, **more}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done.returncode, done.stdout
    results = tmp_path / 'experiments/results'
    code, out = parts('check')
    assert code == 1 and ', unbuffered 1' in out
    assert out.count('ran test_equivalence.py --chapter 8') == 5 and out.count('ran test_equivalence.py') == 12
    assert out.count('ran -c import torch, train') == 8 + 3 + 2 and out.count('ran sample.py') == 11
    failed = [line for line in out.splitlines() if line.startswith('FAILED: ')]
    assert failed[:2] == ['FAILED: python3 test_equivalence.py --chapter 8 kernelized', 'FAILED: proofs kernelized']
    assert failed[2].startswith('FAILED: python3 -c import torch, train')
    assert failed[-1] == 'FAILED: trainings masked-conv'
    assert 'chapter 8 kernelized' in (results / 'proofs-kernelized.log').read_text()
    assert (results / 'proofs.log').read_text() + (results / 'trainings.log').read_text() in re.sub(
        r'\w+: \d+ seconds\n', '', out)
    code, out = parts('variance', 'probes', QUICK='--quick')
    assert code == 0 and out.count('--quick --results out/quick') == 4
    assert (tmp_path / 'out/quick/probes.log').exists()
    code, out = parts('glue', SCHEMES='nope fixed', RESULTS='here')
    assert out.count('--preset bert_small') == 4 and 'train.main' in out and out.count('ran experiments/finetune') == 12
    assert '--results here/glue-fixed' in out
    code, out = parts('mend', 'candidates', 'steps', NANOGPT='there')
    assert out.count('ran test_equivalence.py --chapter 8') == 2 and out.count('ran -c import torch, train') == 2
    assert out.count('ran experiments/triton_forms.py --only') == 4
    assert out.count('ran experiments/speed.py --parts') == 1
    assert out.count('conv-triton conv-triton-cudnn kernelized-triton --kernels --results') == 2  # +, ran
    assert 'ran experiments/speed.py --steps --models nope composite conv kernelized nanoGPT --nanogpt there' in out
    assert out.index('--steps --models conv --results /') < out.index('nanoGPT --nanogpt there --kernels --results')
    assert parts('speed')[1].count('ran experiments/speed.py --results experiments/results') == 1
    assert parts('curves', 'nothing')[0] == parts()[0] == 2


# ---------------------------------------------------------------------------------------------------------------------
# random features

def test_feature_error(run):
    run('experiments/feature_error.py', '--draws', 2, '--results', 'results')
    rows = written(run.folder / 'results', 'feature_error')
    error = {(r['features'], r['norm'], r['m']): float(r['l1_mean']) for r in rows}
    assert len(error) == 80 and all(0 < e <= 2.01 for (kind, *_), e in error.items() if kind != 'trf')
    assert abs(error['prf', '1', '1024'] - 0.05) < 0.02
    assert 0.2 < error['prf', '1', '16'] < error['prf', '2', '16'] < error['prf', '8', '16']


def test_convert_and_stability(run, data_dir):
    words = ['--dataset', 'code', '--data_dir', data_dir, '--results', 'results', '--quick']
    run('experiments/convert.py', *words, '--steps', 2, '--tokens', 512)
    rows = written(run.folder / 'results', 'convert-quick')
    assert len(rows) == 4 * (1 + 6 * 2) and all(4 < float(r['val_loss']) < 7 for r in rows)
    run('experiments/stability.py', *words, '--steps', 3)
    rows = written(run.folder / 'results', 'stability-quick')
    assert len(rows) == 2 * 4 * 3
    assert {float(r['largest_qk']) for r in rows if r['model'].startswith('NPRF')} == {1.0}


@pytest.mark.parametrize('fields', convert.MODELS.values(), ids=convert.MODELS)
def test_what_convert_swaps(fields):
    """The softmax that convert.py trains with is what the features estimate: thousands are near it, a few are not."""
    torch.manual_seed(0)
    attention = model_kernelized.Attention(model_kernelized.Config(n_embd=64, **fields)).double()
    if attention.b is not None:
        torch.nn.init.normal_(attention.b)
    x = torch.randn(2, 40, 64, dtype=torch.float64)
    error = {}
    for m in (16, 2 ** 14):
        attention.w = model_kernelized.random_matrix(m, 16)
        error[m] = (attention(x) - convert.exact(attention, x)).norm() / attention(x).norm()
    assert error[2 ** 14] < 0.05 and 5 * error[2 ** 14] < error[16], error


def test_what_stability_watches():
    torch.manual_seed(0)
    model = model_kernelized.Model(model_kernelized.Config(normalize=False, n_layer=1, init_std=0.2))
    idx = torch.randint(256, (3, 20))
    seen = stability.watch(model)
    model(idx)
    q, k, _ = model.h[0].attn.c_attn(model.h[0].ln_1(model.wte(idx))).view(3, 20, 3, 4, 32).unbind(2)
    q = q * 32 ** -0.25  # what the features are made of
    k = k * 32 ** -0.25
    largest = max((q[..., head, :].norm(dim=-1).max() * k[..., head, :].norm(dim=-1).max()).item() for head in range(4))
    assert seen[0] == pytest.approx(largest, rel=1e-5)
