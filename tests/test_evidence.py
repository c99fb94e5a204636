"""The experiments that fill tables over several commands: what is in a table is kept, and not trained again."""
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import atlas
import compare
import depth
import equal_time
import lib
import tasks
from conftest import REPO, TINY


def table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lib.write_csv(path.parent, path.stem, header, rows)


def python(monkeypatch, folder, module, *words):
    """Run a script's main() in a folder, in this process, so that its functions can be replaced."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *map(str, words)])
    module.main()


# ---------------------------------------------------------------------------------------------------------------------
# compare.py: its table is a memory

@pytest.fixture
def fake_runs(monkeypatch):
    """compare.py trains nothing: runs are there at once, with last losses of 1.25, 2.25, ... -> their names."""
    trained = []

    def train_run(words, place):
        out = Path(words[words.index('--out_dir') + 1])
        out.mkdir(parents=True)
        trained.append(out.name)
        (out / 'log.csv').write_text(f'step,val_loss\n0,5.5\n2,{len(trained)}.25\n')
        (out / 'loss.png').write_bytes(b'')
    monkeypatch.setattr(compare, 'train_run', train_run)
    return trained


def rows_of(folder, name):
    return [(r['objective'], r['scheme'], r['seed'], r['step'], r['val_loss'])
            for r in lib.read_csv(folder / f'results/{name}.csv')]


COMMON = ['--objectives', 'causal', '--name', 'x', '--results', 'results', '--seeds', 1]
SETTINGS = ['--train', '--max_iters', 2]


def test_a_table_keeps_what_other_commands_put_there(fake_runs, monkeypatch, tmp_path):
    """Two commands with the same settings fill one table; --from_table trains only what is not there."""
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'rope', *SETTINGS)
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'nope', 'own: --model nope --bias', *SETTINGS)
    assert fake_runs == ['x-causal-rope-1', 'x-causal-nope-1', 'x-causal-own-1']
    both = rows_of(tmp_path, 'compare-x-causal')
    assert [(row[1], row[4]) for row in both if row[3] == '2'] == [('rope', '1.25'), ('nope', '2.25'), ('own', '3.25')]
    os.rename(tmp_path / 'out', tmp_path / 'lost')
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'nope', 'alibi', 'rope', '--from_table', *SETTINGS)
    assert fake_runs[3:] == ['x-causal-alibi-1']
    after = rows_of(tmp_path, 'compare-x-causal')
    assert [(row[1], row[4]) for row in after if row[3] == '2'] == [
        ('own', '3.25'), ('nope', '2.25'), ('alibi', '4.25'), ('rope', '1.25')]
    os.rename(tmp_path / 'out', tmp_path / 'lost too')
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'nope', *SETTINGS)
    assert fake_runs[4:] == ['x-causal-nope-1'], 'a table is trusted only if one asks for it'
    assert len(rows_of(tmp_path, 'compare-x-causal')) == len(after)


@pytest.mark.parametrize('changed', [
    ['--train', '--max_iters', 3], ['--dataset=shakespeare', *SETTINGS], ['--dataset', 'shakespeare', *SETTINGS], []])
def test_a_table_of_other_settings_is_not_taken(changed, fake_runs, monkeypatch, tmp_path):
    """It is replaced, but only when all is trained."""
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'nope', *SETTINGS)
    os.rename(tmp_path / 'out', tmp_path / 'lost')
    before = rows_of(tmp_path, 'compare-x-causal')
    put = compare.train_run

    def watch(words, place):
        assert rows_of(tmp_path, 'compare-x-causal') == before
        put(words, place)
    monkeypatch.setattr(compare, 'train_run', watch)
    python(monkeypatch, tmp_path, compare, *COMMON, '--from_table', '--schemes', 'nope', 'rope', *changed)
    assert fake_runs[1:] == ['x-causal-nope-1', 'x-causal-rope-1']
    after = rows_of(tmp_path, 'compare-x-causal')
    assert [row[4] for row in after] == ['5.5', '2.25', '5.5', '3.25']


def test_a_table_does_not_know_a_scheme_of_yours(fake_runs, monkeypatch, tmp_path):
    """Two schemes of one name may be different: the table does not say."""
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'mine: --model nope', *SETTINGS)
    os.rename(tmp_path / 'out', tmp_path / 'lost')
    python(monkeypatch, tmp_path, compare, *COMMON, '--from_table', '--schemes', 'mine: --model rope', *SETTINGS)
    assert fake_runs == ['x-causal-mine-1'] * 2


def test_further_seeds_of_a_table(fake_runs, monkeypatch, tmp_path, capsys):
    """--from_table shows all seeds of a table up to the first that is not there, each scheme with its own number."""
    python(monkeypatch, tmp_path, compare, *COMMON, '--seeds', 2, '--schemes', 'nope', 'own: --model nope', *SETTINGS)
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'rope', *SETTINGS)
    table = tmp_path / 'results/compare-x-causal.csv'
    table.write_text(table.read_text() + 'causal,nope,4,0,5.5\ncausal,nope,4,2,9\n')
    capsys.readouterr()
    python(monkeypatch, tmp_path, compare, *COMMON, '--from_table', '--schemes', 'nope', 'rope', 'own: --model nope',
           *SETTINGS)
    out = capsys.readouterr().out
    assert '| causal | nope | 1.7500 | 2 | 0.7071 |\n| causal | rope | 5.2500 | 1 | - |\n' in out
    assert '| causal | own | 3.2500 | 1 | - |' in out, 'which scheme of this name the second seed was, no table says'
    assert fake_runs[5:] == []
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'nope', *SETTINGS)
    assert '| causal | nope | 1.2500 | 1 | - |' in capsys.readouterr().out, 'only if one asks for it'


def test_a_table_without_its_command_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['compare.py', *map(str, COMMON)])
    fits = compare.same_settings(compare.arguments())
    assert fits('python experiments/compare.py --seeds 2')
    assert not any(map(fits, (None, '', "python experiments/compare.py --name 'x", '2 CPU threads, torch 2.13',
                              'python experiments/compare.py --a_flag_of_old')))


def test_merge_table(tmp_path):
    """The first columns decide which rows are the same, as they stand in the file; numbers come back as numbers."""
    path = tmp_path / 'a.csv'
    header = 'what', 'minutes', 'y'
    first = [('x', 15.0, 0.25), ('x', 2.0, math.nan), ('1_000', 1.0, 3.5)]
    assert lib.merge_table(path, header, first, 2, 'a') == first
    for _ in range(3):
        rows = lib.merge_table(path, header, [('x', 15.0, 0.5), ('z', 1.0, 1.0)], 2, 'a')
        assert sorted(map(str, rows)) == sorted(map(str, [('x', '2', math.nan), ('1_000', '1', 3.5), ('x', 15.0, 0.5),
                                                          ('z', 1.0, 1.0)]))
    assert len(lib.read_csv(path)) == 4 and lib.comment_of(path) == 'a'
    assert lib.merge_table(path, header, first[:1], 2, 'b') == first[:1], 'measured in another way'
    assert list(tmp_path.iterdir()) == [path], 'no lock and no half of a file is left'


def test_many_processes_fill_one_table(tmp_path):
    """No row is lost, none is half there; a lock that a killed process left is broken."""
    path = tmp_path / 'a.csv'
    fill = (f"import sys; sys.path.insert(0, {str(REPO / 'experiments')!r}); import lib, pathlib\n"
            f"for i in range(20): lib.merge_table(pathlib.Path({str(path)!r}), ('who', 'i'), [(sys.argv[1], i)], 2)")
    started = [subprocess.Popen([sys.executable, '-c', fill, str(who)]) for who in range(3)]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert len({(row['who'], row['i']) for row in lib.read_csv(path)}) == len(lib.read_csv(path)) == 60
    lock = tmp_path / 'a.csv.lock'
    lock.mkdir()
    os.utime(lock, (1, 1))
    lib.merge_table(path, ('who', 'i'), [('me', 0)], 2)
    assert len(lib.read_csv(path)) == 61 and not lock.exists()


# ---------------------------------------------------------------------------------------------------------------------
# tasks.py

def spelled(ids):
    return ''.join('abcdefghijklmnopqrstuvwxyz0123456789+=.'[i] for i in ids)


@pytest.mark.parametrize('task', tasks.TASKS)
@pytest.mark.parametrize('n', [2, 3, 7, 20, 40])
def test_problems_and_their_answers(task, n):
    """Each text holds its own right answer, by other means; the loss sees the answer and the end, nothing else."""
    x, targets = tasks.texts(task, np.random.default_rng(n), 50, n)
    texts = {spelled(ids) for ids in torch.cat((x, targets[:, -1:]), 1).tolist()}
    assert len(texts) > 25, 'problems differ'
    for text, wanted in zip(torch.cat((x, targets[:, -1:]), 1).tolist(), targets.tolist()):
        text = spelled(text)
        problem, answer = text[:-1].split('=')
        assert len(problem.replace('+', '')) == n and text[-1] == '.'
        if task == 'addition':
            a, b = problem.split('+')
            assert len(a) - len(b) in (0, 1)
            assert int(answer[::-1]) == int(a[::-1]) + int(b[::-1]) and len(answer) == len(a) + 1
        else:
            assert answer == (problem if task == 'copy' else problem[::-1])
        assert wanted[:len(problem)] == [-1] * len(problem)
        assert spelled(wanted[len(problem):]) == answer + '.'


def test_one_wrong_token_makes_an_answer_wrong():
    """Tokens of the problem do not count."""
    x = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    targets = torch.tensor([[-1, 5, 6], [-1, 5, 6], [-1, 5, 6], [-1, 5, 6]])
    answers = torch.tensor([[0, 5, 6], [0, 5, 7], [0, 4, 6], [9, 5, 6]])
    assert tasks.share_right(lambda _: (torch.nn.functional.one_hot(answers, 10), None), x, targets) == 0.5


def test_tasks(monkeypatch, tmp_path, capsys):
    """A table of all lengths; with --from_table what is there is not trained again."""
    words = ['--quick', '--results', 'results', '--tasks', 'copy', '--seeds', 1, '--schemes', 'rope']
    python(monkeypatch, tmp_path, tasks, *words)
    rows = lib.read_csv(tmp_path / 'results/tasks-quick.csv')
    assert [int(r['length']) for r in rows] == list(range(2, 41, 2)) and {r['scheme'] for r in rows} == {'rope'}
    assert (tmp_path / 'results/tasks-quick.png').read_bytes()[:4] == b'\x89PNG'
    trained = []
    monkeypatch.setattr(tasks, 'train_and_ask', lambda task, scheme, flags, seed, args: trained.append(scheme) or [
        (task, scheme, seed, args.steps, n, 50.0 * (n <= 20)) for n in range(2, 41, 2)])
    python(monkeypatch, tmp_path, tasks, *words, 'nope', '--from_table')
    assert trained == ['nope'] and len(lib.read_csv(tmp_path / 'results/tasks-quick.csv')) == 40
    assert '| copy | nope | 50 | 50 | 0 | 0 | 0 |' in capsys.readouterr().out
    two = tasks.by_length([('copy', 'nope', seed, 20, n, 10.0 * seed) for seed in (1, 2) for n in range(2, 41, 2)])
    tasks.print_table(two)
    assert '| copy | nope | 10 / 20 | 10 / 20 | 10 / 20 | 10 / 20 | 10 / 20 |' in capsys.readouterr().out
    axes = tasks.draw(two).axes[0]
    assert [list(line.get_ydata())[-2:] for line in axes.lines[:2]] == [[15, 15], [10, 20]], 'the mean, and each seed'
    python(monkeypatch, tmp_path, tasks, *words, '--steps', 30, '--from_table')
    assert trained[1:] == ['rope'] and len(lib.read_csv(tmp_path / 'results/tasks-quick.csv')) == 60
    python(monkeypatch, tmp_path, tasks, *words)
    assert trained[2:] == ['rope'] and len(lib.read_csv(tmp_path / 'results/tasks-quick.csv')) == 60


@pytest.mark.parametrize('scheme', ['mine: --model nope --n_head 3', 'mine: --model nothing_like_it'])
def test_tasks_refuses_before_it_trains(scheme, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tasks, 'train_and_ask', lambda *_: pytest.fail('trained'))
    with pytest.raises(SystemExit):
        python(monkeypatch, tmp_path, tasks, '--quick', '--schemes', 'nope', scheme)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_model_learns_to_copy(monkeypatch, tmp_path):
    """The shortest problems, in a few steps: training and asking fit together."""
    monkeypatch.setattr(sys, 'argv', ['tasks.py', '--quick', '--steps', '300'])
    monkeypatch.setattr(tasks, 'TRAINED', 2)
    monkeypatch.setattr(tasks, 'ASKED', 2)
    monkeypatch.chdir(tmp_path)
    rows = tasks.train_and_ask('copy', 'rope', compare.SCHEMES['rope'], 1, tasks.arguments())
    assert len(rows) == 1 and rows[0][:5] == ('copy', 'rope', 1, 300, 2) and rows[0][5] > 50


def test_what_tasks_train_and_ask(monkeypatch):
    """Up to the longest length of training, and no longer; fresh problems are asked; seeds are seeds."""
    drawn = []

    def watch(task, generator, B, n):
        found = texts(task, generator, B, n)
        drawn.append((B, n, found[0]))
        return found
    texts = tasks.texts
    monkeypatch.setattr(tasks, 'texts', watch)
    monkeypatch.setattr(sys, 'argv', ['tasks.py', '--quick', '--steps', '60'])
    for seed in (1, 2):
        tasks.train_and_ask('copy', 'nope', compare.SCHEMES['nope'], seed, tasks.arguments())
    runs = drawn[:len(drawn) // 2], drawn[len(drawn) // 2:]
    for run in runs:
        trained = [n for B, n, _ in run if B == tasks.BATCH]
        assert len(trained) == 60 and min(trained) == 1 and max(trained) == 20
        assert [n for B, n, _ in run if B != tasks.BATCH] == list(range(2, 41, 2))
        seen = {tuple(text) for B, n, x in run if B == tasks.BATCH and n > 9 for text in x.tolist()}
        assert not any(tuple(text) in seen for B, n, x in run if B != tasks.BATCH and n > 9 for text in x.tolist())
    assert [n for _, n, _ in runs[0][:60]] != [n for _, n, _ in runs[1][:60]]


def test_tasks_refuse_the_table_for_a_scheme_of_yours(monkeypatch, tmp_path):
    """Two schemes of one name may be different: the table does not say."""
    trained = []
    monkeypatch.setattr(tasks, 'train_and_ask', lambda task, scheme, flags, seed, args: trained.append(flags[-1]) or [
        (task, scheme, seed, args.steps, n, 50.0) for n in range(2, 41, 2)])
    for mine in ('nope', 'rope'):
        python(monkeypatch, tmp_path, tasks, '--quick', '--results', 'results', '--tasks', 'copy', '--seeds', 1,
               '--from_table', '--schemes', f'mine: --model {mine}')
    assert trained == ['nope', 'rope']


def test_few_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['tasks.py', '--quick', '--steps', '1'])
    assert len(tasks.train_and_ask('copy', 'rope', compare.SCHEMES['rope'], 1, tasks.arguments())) == 20


# ---------------------------------------------------------------------------------------------------------------------
# depth.py, equal_time.py

def test_depth(run, data_dir):
    words = ['experiments/depth.py', '--quick', '--layers', 1, 2, '--schemes', 'nope', 'rope', '--steps', 2,
             '--dataset', 'code', '--data_dir', data_dir, '--results', 'results']
    run(*words)
    rows = lib.read_csv(run.folder / 'results/depth-code-quick.csv')
    assert [(r['steps'], r['layers'], r['scheme']) for r in rows] == [
        ('2', layers, scheme) for layers in '12' for scheme in ('nope', 'rope')]
    assert all(4 < float(r['val_loss']) < 7 for r in rows) and len({r['val_loss'] for r in rows}) == 4
    config = json.loads((run.folder / 'out/depth/code-2-1-rope-quick/config.json').read_text())
    assert config['n_layer'] == 1 and config['max_iters'] == 2
    os.rename(run.folder / 'out', run.folder / 'lost')
    run(*words, '--from_table')
    assert not (run.folder / 'out').exists(), 'what is in the table is not trained again'
    assert lib.read_csv(run.folder / 'results/depth-code-quick.csv') == rows
    run(*words[:-1], 'elsewhere', '--schemes', 'nope', 'mine: --model nothing_like_it', code=2)
    assert not (run.folder / 'elsewhere').exists() and len(run.err.splitlines()) == 1


def test_depth_refuses_the_table_for_a_scheme_of_yours(fake_runs, monkeypatch, tmp_path):
    """Two schemes of one name may be different: the table does not say."""
    monkeypatch.setattr(depth, 'train_run', compare.train_run)
    words = ['--quick', '--layers', 1, '--steps', 2, '--results', 'results', '--from_table', '--schemes']
    for mine in ('nope', 'rope'):
        python(monkeypatch, tmp_path, depth, *words, 'alibi', f'mine: --model {mine}')
        os.rename(tmp_path / 'out', tmp_path / f'lost-{mine}')
    assert [name.split('-')[-2] for name in fake_runs] == ['alibi', 'mine', 'mine']


def test_the_gap_is_that_to_the_best_other_scheme():
    losses = {(9, layers, scheme): loss for layers in (1, 2)
              for scheme, loss in dict(nope=3.0, rope=2.0 + layers / 4, composite=2.0).items()}
    figure = depth.draw(losses, ['nope', 'rope', 'composite'])
    assert list(figure.axes[1].lines[0].get_ydata()) == [1.0, 1.0]
    assert list(figure.axes[0].lines[1].get_ydata()) == [2.25, 2.5]


def test_equal_time(run, data_dir):
    """Each scheme trains for its seconds, which are in the table; a second command trains nothing."""
    words = ['experiments/equal_time.py', '--quick', '--lengths', 64, '--schemes', 'nope', 'nprf+rpe', '--minutes',
             0.03, '--dataset', 'code', '--data_dir', data_dir, '--results', 'results']
    run(*words)
    rows = lib.read_csv(run.folder / 'results/equal_time-code-quick.csv')
    for scheme in ('nope', 'nprf+rpe'):
        mine = [r for r in rows if r['scheme'] == scheme]
        steps = [int(r['step']) for r in mine]
        assert steps[0] == 0 and steps[-1] >= 10 and steps == sorted(steps)
        seconds = [float(r['seconds']) for r in mine]
        assert seconds[0] == 0 and seconds == sorted(seconds)
        assert float(mine[-1]['val_loss']) < float(mine[0]['val_loss'])
    run(*words)
    assert lib.read_csv(run.folder / 'results/equal_time-code-quick.csv') == rows
    assert (run.folder / 'results/equal_time-code-quick.png').read_bytes()[:4] == b'\x89PNG'
    run(*words, '--minutes', 'inf', code=2)


def test_equal_time_trains_the_steps_that_fit(monkeypatch, tmp_path):
    """30 ms a step, 0.03 minutes: 60 steps."""
    asked = []

    def train_run(words, place):
        said = dict(zip(words, words[1:]))  # the last of two equal flags counts
        out = tmp_path / said['--out_dir']
        out.mkdir(parents=True)
        steps = int(said['--max_iters'])
        asked.append(steps)
        (out / 'log.csv').write_text('step,val_loss,ms\n' + ''.join(f'{n},{9 - n / 99},30\n' for n in range(steps + 1)))
    monkeypatch.setattr(equal_time, 'train_run', train_run)
    monkeypatch.setattr(equal_time, 'check_run', lambda *_: None)
    python(monkeypatch, tmp_path, equal_time, '--quick', '--minutes', 0.03, '--lengths', 64, '--schemes', 'nope',
           '--results', 'results')
    assert asked == [6, 60]


def test_the_steps_that_fit():
    """30 ms a step without the first two, 0.03 minutes: 60 steps; never fewer than ten."""
    log = [dict(step=0), dict(step=1, ms=900.0), *(dict(step=n, ms=ms) for n, ms in enumerate((29.0, 30.0, 99.0), 2)),
           dict(step=4)]
    assert equal_time.steps_in_time(log, 0.03) == 60 and equal_time.steps_in_time(log, 0.001) == 10


# ---------------------------------------------------------------------------------------------------------------------
# atlas.py

def test_atlas(monkeypatch, tmp_path, capsys):
    """Every number of the table is that of its own scheme, objective, length and seed; a dash where there is none."""
    results = tmp_path / 'results'
    curve = [('nope', 1, 0, 5.0), ('nope', 1, 2, 2.5), ('nope', 2, 0, 5.0), ('nope', 2, 2, 2.0), ('rope', 1, 2, 1.5)]
    table(results / 'compare-x-causal.csv', ('objective', 'scheme', 'seed', 'step', 'val_loss'),
          [('causal', *row) for row in curve])
    table(results / 'compare-x-masked.csv', ('objective', 'scheme', 'seed', 'step', 'val_loss'),
          [('masked', 'rope', 1, 2, 0.75)])
    table(results / 'extrapolate-x.csv', ('scheme', 'seed', 'times', 'block_size', 'loss'),
          [('rope', 1, times, 128, 1.0 + times) for times in (1, 8)] + [('absolute', 1, 8, 128, math.nan)])
    table(results / 'tasks.csv', tasks.HEADER, [
        ('copy', 'rope', seed, steps, n, right) for seed, steps, n, right in
        ((1, 9, 20, 99.0), (1, 9, 40, 10.0), (2, 9, 40, 20.0), (1, 3, 40, 50.0))])
    table(results / 'atlas-time.csv', ('scheme', 'tokens', 'ms'), [('nope', 128, 8.0), ('rope', 128, 10.4)])
    table(results / 'probe_position-x.csv', ('model', 'tokens', 'layer', 'tap', 'probe', 'error', 'always the middle'),
          [(what, 'text', layer, 'after MLP', probe, error, 32) for what, layer, probe, error in (
              ('trained: rope-1', 4, 'MLP', 7.0), ('trained: rope-1', 3, 'MLP', 8.0),
              ('trained: rope-1', 4, 'linear', 9.0), ('trained: rope-1, test shuffled', 4, 'MLP', 30.0),
              ('before training: rope-1', 4, 'MLP', 17.0))])
    python(monkeypatch, tmp_path, atlas, '--name', 'x', '--results', 'results')
    lines = {line.split(' | ')[0][2:]: line.split(' | ')[2:-1] for line in capsys.readouterr().out.splitlines()
             if line.startswith('| ')}
    assert lines['nope'] == ['0', '2.250 (0.354)', '-', '-', '-, -, -', '1.0', '-', '256', '-, -']
    assert lines['rope'] == ['0', '1.500', '0.750', '9.000', '15, -, -', '1.3', '-', '256', '17, 7']
    assert lines['absolute'][:5] == ['16,384', '-', '-', 'ends', '-, -, -']  # 128 positions of 128 channels
    assert lines['fixed'][0] == '272', '4 layers, 4 heads, 17 offsets'
    assert lines['nprf+rpe'][7] == '0', 'the state does not grow'
    assert set(lines) - {'scheme'} == set(atlas.ATLAS)
    python(monkeypatch, tmp_path, atlas, '--name', 'x', '--results', 'results', '--short')
    short = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert short[0] == list(atlas.SHORT) and [line[0] for line in short[1:]] == atlas.MAIN
    assert short[3] == ['rope', atlas.ATLAS['rope'][0], '1.500', '0.750', '9.000', '1.3', '256', 'Su et al. 2021']
    with open(results / 'atlas.csv', newline='') as f:
        rows = {row['scheme']: row for row in csv.DictReader(f)}
    assert rows['nope']['causal_seeds'] == '2' and rows['rope']['masked_seeds'] == '1'


def test_atlas_reads_a_table_of_both_objectives(monkeypatch, tmp_path):
    table(tmp_path / 'results/compare-x.csv', ('objective', 'scheme', 'seed', 'step', 'val_loss'),
          [('causal', 'rope', 1, 2, 1.5), ('masked', 'rope', 1, 2, 0.75), ('masked', 'rope', 2, 2, 0.25)])
    assert atlas.last_losses(tmp_path / 'results', 'x', 'causal', 'rope') == [1.5]
    assert atlas.last_losses(tmp_path / 'results', 'x', 'masked', 'rope') == [0.75, 0.25]


def test_atlas_measures_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(atlas, 'ATLAS', {scheme: atlas.ATLAS[scheme] for scheme in ('nope', 'fixed')})
    monkeypatch.setattr(atlas, 'LENGTHS', (32,))
    shapes = []
    step = atlas.training_step
    monkeypatch.setattr(atlas, 'training_step', lambda model, idx, *args, **how: (
        shapes.append((*idx.shape, model.config.block_size)), step(model, idx, *args, **how))[1])
    found = atlas.measure_steps(0)
    assert [row[:2] for row in found] == [('nope', 32), ('fixed', 32)] and all(row[2] > 0 for row in found)
    assert shapes == [(96, 32, 32)] * 2, '3,072 bytes in a step'


def test_atlas_says_what_is_missing(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        python(monkeypatch, tmp_path, atlas, '--name', 'y', '--results', 'results')
    assert 'found no compare-y.csv in results' in capsys.readouterr().err


def test_atlas_knows_schemes_of_compare():
    assert set(atlas.ATLAS) <= set(compare.SCHEMES)
    assert len({formula for formula, _ in atlas.ATLAS.values()}) == len(atlas.ATLAS)


# ---------------------------------------------------------------------------------------------------------------------
# --name: the runs of one comparison

def test_runs_of_a_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('x-causal-nope-1', 'x-masked-nope-1', 'xy-causal-nope-1', 'x-causal-rope-1'):
        (tmp_path / 'out/compare' / name).mkdir(parents=True)
        if 'rope' not in name:  # that run has not ended
            (tmp_path / 'out/compare' / name / 'loss.png').touch()
    assert lib.runs_of('x') == ['out/compare/x-causal-nope-1']
    with pytest.raises(SystemExit):
        lib.runs_of('z')
    assert 'found no causal run of the name z in out/compare' in capsys.readouterr().err


def test_tables_of_a_name_keep_other_runs(run, data_dir):
    """extrapolate.py, probe_position.py, attention_variance.py: a second command adds its runs."""
    def trained(scheme):
        run('train.py', '--data_dir', data_dir, '--dataset', 'code', *TINY, '--max_iters', 2, '--model', scheme,
            '--out_dir', f'out/compare/x-causal-{scheme}-1')

    def all_three():
        last = '--data_dir', data_dir, '--results', 'results', '--name', 'x'
        run('experiments/extrapolate.py', '--texts', 2, *last)
        run('experiments/probe_position.py', '--quick', '--steps', 2, '--test', 2, *last)
        run('experiments/attention_variance.py', '--sequences', 1, *last)
        names = ('extrapolate-x', 'scheme'), ('probe_position-x', 'model'), ('attention_variance-x', 'what')
        for name, column in names:
            assert (run.folder / f'results/{name}.png').read_bytes()[:4] == b'\x89PNG'
            yield {row[column] for row in lib.read_csv(run.folder / f'results/{name}.csv')}
    trained('nope')
    assert list(all_three()) == [{'nope'}, *2 * [{'before training: nope-1', 'trained: nope-1'}]]
    os.rename(run.folder / 'out', run.folder / 'lost')
    trained('rope')
    both = {f'{what}: {scheme}-1' for what in ('before training', 'trained') for scheme in ('nope', 'rope')}
    assert list(all_three()) == [{'nope', 'rope'}, both, both]
    for script in ('extrapolate', 'probe_position', 'attention_variance'):
        flag = [] if script == 'extrapolate' else ['--out_dir']
        run(f'experiments/{script}.py', *flag, 'out/a', '--name', 'x', code=2)
        assert '--name' in run.err
