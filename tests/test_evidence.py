"""The numbers of experiments/README.md are those of its tables; what the other scripts measure."""
import math
import re
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention_variance
import compare
import convert
import counter
import equal_time
import extrapolate
import feature_error
import finetune_glue
import kernels
import learning_rate
import lib
import model_kernelized
import probe_position
import results_table
import speed
import stability
import take_positions_away
import tasks
from conftest import REPO, Run
from test_experiments import ended, png, python

RESULTS = REPO / 'experiments/results'
PAGE = (REPO / 'experiments/README.md').read_text(encoding='utf-8')


def rows_of(name):
    """The rows of a result, with numbers where the file has them."""
    rows = lib.read_csv(RESULTS / f'{name}.csv')
    assert rows, name
    return [tuple(map(lib.number, row.values())) for row in rows]


def curves_of(name):
    return compare.read_curves(RESULTS / f'compare-{name}.csv')


def scores():
    values = {}
    for name in ('order-cola', 'sst2-mrpc', 'rte'):
        for run, task, metric, _, value in rows_of(f'finetune_glue-{name}'):
            values.setdefault((run, task, metric), []).append(value)
    return finetune_glue.score_table(values)


def tables():
    """{name: (header, rows)}: what the scripts print for the recorded results."""
    found = {
        'causal': compare.levels_table(curves_of('python-8000-causal'), [2, 1.5, 1.2, 1]),
        'masked': compare.levels_table(curves_of('python-8000-masked'), [2.5, 2, 1.5, 1]),
        'kernelized': compare.losses_table(curves_of('wikitext2-600-causal')),
        'extrapolate': extrapolate.length_table(extrapolate.means(rows_of('extrapolate-python-8000'))),
        'tasks': tasks.length_table(tasks.by_length(rows_of('tasks'))),
        'equal_time': equal_time.time_table(rows_of('equal_time-enwik8')),
        'random': attention_variance.random_table(rows_of('attention_variance')),
        'trained': attention_variance.trained_table(rows_of('attention_variance-python-8000')),
        'counter': counter.coordinate_table(rows_of('counter')), 'use': counter.use_table(rows_of('counter-use')),
        'probes': probe_position.error_table(rows_of('probe_position-random')),
        'features': feature_error.error_table(feature_error.means(rows_of('feature_error'))),
        'convert': convert.loss_table(convert.by_size(rows_of('convert'))),
        'stability': stability.stability_table(rows_of('stability')), 'glue': scores(),
        'positions': take_positions_away.loss_table(
            take_positions_away.by_scheme(RESULTS / 'take_positions_away-python.csv')),
        'rates': learning_rate.loss_table(rows_of('learning_rate')),
        'speed': speed.speed_table(rows_of('speed-cpu')),
        'one': results_table.the_table(results_table.collect(RESULTS, 'python-8000'))}
    peaks = [kernels.peak_table(rows_of(path.stem)) for path in sorted(RESULTS.glob('kernels-*.csv'))]
    return found | {'kernels': (peaks[0][0], [row for _, rows in peaks for row in rows])}


def test_tables_of_the_page():
    """Each table of the page is made of rows that its script prints for its CSV."""
    known = {tuple(header): {tuple(row) for row in rows} for header, rows in tables().values()}
    shown = re.findall(r'^(\|.*\|)\n\|[-|]+\|\n((?:\|.*\|\n)+)', PAGE, re.M)
    claims = 0
    for header, rows in shown:
        header, *rows = [tuple(re.split(r' ?(?<!\\)\| ?', line)[1:-1]) for line in (header, *rows.splitlines())]
        if header[0] == 'claim':
            claims += 1
        else:
            assert set(rows) <= known[header], set(rows) - known[header]
    assert claims == 1 and len(shown) == len(known) + 1


def test_claims_are_short_and_links_lead_somewhere():
    for row in re.search(r'\| claim \|.*?\n\n', PAGE, re.S)[0].splitlines()[2:-1]:
        assert all(len(cell.split()) <= 25 for cell in row.split(' | ')), row
    anchors = {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in re.findall('^##* (.*)', PAGE, re.M)}
    assert set(re.findall(r'\(#([^)]*)\)', PAGE)) <= anchors


def test_results_hold_what_the_page_shows():
    files = list(RESULTS.iterdir())
    pictures = {path.name for path in files if path.suffix == '.png'}
    assert pictures == set(re.findall(r'results/([\w.+-]+\.png)', PAGE))
    assert sum(path.stat().st_size for path in files) <= 3e6
    bpe = compare.losses_table(curves_of('wikitext2-tokens-1500-masked'))[1]
    assert all(f'{float(row[2]):.3f}' in PAGE for row in bpe)


@pytest.fixture(scope='module')
def runs(trained, data_dir, tmp_path_factory):
    """run(script, ...) in a folder with two causal runs in out/compare, and out/m, a masked run of conv."""
    run = Run(tmp_path_factory.mktemp('runs'))
    run.data = ['--data_dir', data_dir, '--results', 'results']
    (run.folder / 'out/compare').mkdir(parents=True)
    for name in ('composite', 'nope'):
        source = trained(name, 'causal').out_dir
        shutil.copytree(source, run.folder / f'out/compare/x-causal-{name}-1')
    shutil.copytree(trained('conv', 'masked').out_dir, run.folder / 'out/m')
    return run


def test_extrapolate(runs):
    """A line per scheme; masked runs are refused."""
    runs('experiments/extrapolate.py', '--name', 'x', '--sequences', 4, *runs.data)
    rows = lib.read_csv(runs.folder / 'results/extrapolate-x.csv')
    assert [(r['scheme'], r['times']) for r in rows] == [(s, n) for s in ('composite', 'nope') for n in '1248']
    assert png(runs.folder / 'results/extrapolate-x') and all(1 < float(r['loss']) < 7 for r in rows)
    runs('experiments/extrapolate.py', 'out/m', *runs.data, code=2)
    assert 'extrapolate.py: out/m is a masked model' in runs.err


def test_what_extrapolate_scores():
    """The last T tokens of each sequence of 8 T, with 0, T, 3 T, 7 T tokens before them."""
    torch.manual_seed(0)
    model = model_kernelized.Model(model_kernelized.Config(block_size=16, n_layer=1, init_std=0.2)).eval()
    ids = torch.randint(256, (300,))
    found = extrapolate.losses(model, ids.numpy(), 2, 'cpu')
    for times, loss in found.items():
        texts = [ids[s + 128 - 16 * times:s + 129] for s in (0, 128)]
        explicit = [F.cross_entropy(model(text[None, :-1])[0][0, -16:], text[-16:]).item() for text in texts]
        assert loss == pytest.approx(sum(explicit) / 2, rel=1e-5)
    assert len(set(found.values())) == 4


def test_probes_variance_counter_and_kernels(runs):
    """Rows for each run before and after training; a second run is added to the table of a name."""
    runs('experiments/attention_variance.py', '--name', 'x', '--sequences', 1, *runs.data)
    runs('experiments/probe_position.py', '--quick', '--steps', 2, '--test', 2, '--name', 'x', *runs.data)
    both = {f'{what}: {scheme}-1' for what in ('before training', 'trained') for scheme in ('composite', 'nope')}
    for name, column in (('attention_variance-x', 'what'), ('probe_position-x', 'model')):
        rows = lib.read_csv(runs.folder / f'results/{name}.csv')
        assert {r[column] for r in rows if 'shuffled' not in r[column]} == both
        assert png(runs.folder / f'results/{name}')
    runs('experiments/counter.py', 'out/compare/x-causal-nope-1', '--quick', *runs.data)
    assert len(lib.read_csv(runs.folder / 'results/counter-use-quick.csv')) == 2 and '| nope-1 | 2 |' in runs.out
    runs('experiments/kernels.py', '--out_dir', 'out/compare/x-causal-composite-1', '--tokens', 256, *runs.data)
    rows = lib.read_csv(runs.folder / 'results/kernels-composite-1-causal-code.csv')
    assert {r['kind'] for r in rows} == {'fixed', 'dynamic: mean', 'dynamic: spread'} and len(rows) == 3 * 2 * 2 * 9
    runs('experiments/kernels.py', '--out_dir', 'out/compare/x-causal-nope-1', *runs.data, code=2)
    assert 'no kernels' in runs.err


def spelled(ids):
    return ''.join('abcdefghijklmnopqrstuvwxyz0123456789+=.'[i] for i in ids)


@pytest.mark.parametrize('task', tasks.TASKS)
@pytest.mark.parametrize('n', [2, 7, 40])
def test_problems_and_their_answers(task, n):
    """Each sequence holds its own correct answer; the loss sees the answer and the end, nothing else."""
    x, targets = tasks.problems(task, np.random.default_rng(n), 50, n)
    for ids, wanted in zip(torch.cat((x, targets[:, -1:]), 1).tolist(), targets.tolist()):
        problem, answer = spelled(ids)[:-1].split('=')
        assert len(problem.replace('+', '')) == n and spelled(ids)[-1] == '.'
        if task == 'addition':
            a, b = problem.split('+')
            assert len(a) - len(b) in (0, 1)
            assert int(answer[::-1]) == int(a[::-1]) + int(b[::-1]) and len(answer) == len(a) + 1
        else:
            assert answer == (problem if task == 'copy' else problem[::-1])
        assert wanted[:len(problem)] == [-1] * len(problem) and spelled(wanted[len(problem):]) == answer + '.'


def test_tasks(monkeypatch, tmp_path, capsys):
    """One wrong token makes an answer wrong; a model learns to copy; what is in the table is not trained again."""
    targets = torch.tensor([[-1, 5, 6]] * 4)
    answers = torch.tensor([[0, 5, 6], [0, 5, 7], [0, 4, 6], [9, 5, 6]])
    assert tasks.share_right(lambda _: (F.one_hot(answers, 10), None), targets, targets) == 0.5
    monkeypatch.setattr(tasks, 'TRAINED', 2)
    args = types.SimpleNamespace(quick=True, steps=250)
    assert tasks.train_and_ask('copy', 'rope', lib.SCHEMES['rope'], 1, args)[0][5] > 50
    trained = []
    monkeypatch.setattr(tasks, 'train_and_ask', lambda task, scheme, flags, seed, args: trained.append(scheme) or [
        (task, scheme, seed, args.steps, n, 50.0 * (n <= 20)) for n in range(2, 41, 2)])
    words = ['--quick', '--results', 'results', '--tasks', 'copy', '--schemes', 'mine: --model nope', 'rope']
    for more in ([], ['nope']):
        python(monkeypatch, tmp_path, tasks, *words, *more)
    assert trained == ['mine', 'rope', 'mine', 'nope'] and png(tmp_path / 'results/tasks-quick')
    assert '| copy | nope | 50 | 50 | 0 | 0 | 0 |' in capsys.readouterr().out


def test_equal_time(monkeypatch, tmp_path, capsys):
    """30 ms a step, 0.03 minutes: 60 steps. A second command trains nothing."""
    asked = []

    def start(out, words, jobs):
        out.mkdir(parents=True)
        asked.append(int(dict(zip(words, words[1:]))['--max_iters']))
        (out / 'config.json').write_text(f'{{"max_iters": {asked[-1]}}}')
        rows = (f'{n},{9 - n / 99},30\n' for n in range(asked[-1] + 1))
        (out / 'log.csv').write_text('step,val_loss,ms\n' + ''.join(rows))
        return ended()
    monkeypatch.setattr(lib, 'start', start)
    for _ in range(2):
        python(monkeypatch, tmp_path, equal_time, '--quick', '--minutes', 0.03, '--lengths', 64, '--schemes', 'nope',
               '--results', 'results')
    assert asked == [6, 60] and '| 64 | nope | 60 | 2 | 8.3939 |' in capsys.readouterr().out
    log = [dict(step=0), dict(ms=900.0), dict(ms=29.0), dict(ms=30.0), dict(ms=99.0)]
    assert equal_time.steps_in_time(log, 0.03) == 60


def test_results_table(monkeypatch, tmp_path, capsys):
    """Every number is that of its own scheme, objective, length and seed; a dash where there is none."""
    def table(name, header, rows):
        lib.write_csv(tmp_path / f'results/{name}.csv', header, rows)
    table('compare-x-causal', compare.HEADER, [('causal', *row) for row in (
        ('nope', 1, 0, 5.0), ('nope', 1, 2, 2.5), ('nope', 2, 0, 5.0), ('nope', 2, 2, 2.0), ('rope', 1, 2, 1.5))])
    table('compare-x-masked', compare.HEADER, [('masked', 'rope', 1, 2, 0.75)])
    table('extrapolate-x', extrapolate.HEADER, [('rope', 1, times, 128, 1.0 + times) for times in (1, 8)]
          + [('absolute', 1, 8, 128, math.nan)])
    table('tasks', tasks.HEADER, [('copy', 'rope', seed, 9, n, right) for seed, n, right in
                                  ((1, 20, 99.0), (1, 40, 10.0), (2, 40, 20.0))])
    table('results_table-time', ('scheme', 'tokens', 'ms'), [('nope', 128, 8.0), ('rope', 128, 10.4)])
    table('probe_position-x', probe_position.HEADER, [
        (what, 'text', layer, 'after MLP', probe, error, 32) for what, layer, probe, error in (
            ('trained: rope-1', 4, 'MLP', 7.0), ('trained: rope-1', 3, 'MLP', 8.0),
            ('trained: rope-1', 4, 'linear', 9.0), ('trained: rope-1, test shuffled', 4, 'MLP', 30.0),
            ('before training: rope-1', 4, 'MLP', 17.0))])
    python(monkeypatch, tmp_path, results_table, '--name', 'x', '--results', 'results')
    lines = {line.split(' | ')[0][2:]: line.split(' | ')[2:-1] for line in capsys.readouterr().out.splitlines()
             if line.startswith('| ')}
    assert lines['nope'] == ['0', '2.250 (0.354)', '3.246', '-', '-', '-, -, -', '1.0', '-', '256', '-, -']
    assert lines['rope'] == ['0', '1.500', '2.164', '0.750', '9.000', '15, -, -', '1.3', '-', '256', '17, 7']
    assert lines['absolute'][0] == '16,384' and lines['absolute'][4] == 'ends'  # 128 positions of 128 channels
    assert lines['fixed'][0] == '272' and lines['nprf+rpe'][8] == '0'  # 4 layers, 4 heads, 17 offsets; no cache
    assert set(lines) - {'scheme'} == set(results_table.TABLE) <= set(lib.SCHEMES)


def test_scripts_on_random_features(run, data_dir):
    run('experiments/feature_error.py', '--draws', 1, '--results', 'results')
    error = feature_error.means([tuple(r.values()) for r in lib.read_csv(run.folder / 'results/feature_error.csv')])
    assert len(error) == 80 and abs(error['prf', 1, 1024] - 0.05) < 0.02
    assert 0.2 < error['prf', 1, 16] < error['prf', 2, 16] < error['prf', 8, 16] <= 2.01
    words = ['--dataset', 'code', '--data_dir', data_dir, '--results', 'results', '--quick', '--steps', 2]
    run('experiments/convert.py', *words, '--tokens', 512)
    assert len(lib.read_csv(run.folder / 'results/convert-quick.csv')) == 4 * (1 + 6 * 2)
    run('experiments/stability.py', *words)
    rows = lib.read_csv(run.folder / 'results/stability-quick.csv')
    assert len(rows) == 2 * 4 * 2 and {r['largest_qk'] for r in rows if r['model'].startswith('NPRF')} == {'1'}
    assert all(png(run.folder / f'results/{name}') for name in ('feature_error', 'convert-quick', 'stability-quick'))


@pytest.mark.parametrize('fields', convert.MODELS.values(), ids=convert.MODELS)
def test_what_convert_swaps(fields):
    """The softmax of convert.py is what the features estimate: thousands are near it, a few are not."""
    torch.manual_seed(0)
    error = {}
    for m in (16, 2 ** 14):
        attention = model_kernelized.Attention(model_kernelized.Config(n_embd=64, n_features=m, **fields)).double()
        if attention.b is not None:
            attention.b.data = torch.randn(attention.b.shape, generator=torch.Generator().manual_seed(1)).double()
        x = torch.randn(2, 40, 64, dtype=torch.float64)
        error[m] = (attention(x) - convert.exact(attention, x)).norm() / attention(x).norm()
    assert error[2 ** 14] < 0.05 and 5 * error[2 ** 14] < error[16], error


def test_what_stability_watches():
    torch.manual_seed(0)
    model = model_kernelized.Model(model_kernelized.Config(normalize=False, n_layer=1, init_std=0.2))
    idx = torch.randint(256, (3, 20))
    seen = stability.watch(model)
    model(idx)
    q, k, _ = model.h[0].attn.c_attn(model.h[0].ln_1(model.wte(idx))).view(3, 20, 3, 4, 32).unbind(2)
    norms = [(x * 32 ** -0.25).norm(dim=-1).amax((0, 1)) for x in (q, k)]  # of what the features are computed from
    assert seen[0] == pytest.approx((norms[0] * norms[1]).max().item(), rel=1e-5)
