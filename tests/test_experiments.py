"""compare.py, learning_rate.py, speed.py, on_gpu.sh and what scripts share."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import compare
import learning_rate
import lib
import model_composite
import speed
from conftest import REPO, TINY, Run

OWN = 'mine: --model composite --kernel_size 9'


def png(path):
    return path.with_suffix('.png').read_bytes()[:4] == b'\x89PNG'


def python(monkeypatch, folder, module, *words):
    """Run a script's main() in a folder, in this process, so that its functions can be replaced."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *map(str, words)])
    module.main()


def ended(returncode=0):
    """Stands for a process of train.py that has ended, or is running if returncode is None."""
    return Mock(returncode=returncode, poll=lambda: returncode)


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs are finished at once, with last losses of 1.25, 2.25, ... -> [(folder, flags)]."""
    trained = []

    def start(out, words, jobs):
        out.mkdir(parents=True)
        trained.append((out.name, words))
        steps = words[len(words) - words[::-1].index('--max_iters')]
        (out / 'config.json').write_text(json.dumps(dict(max_iters=int(steps))))
        (out / 'log.csv').write_text(f'step,val_loss,ms\n0,5.5,\n1,,30\n2,,30\n3,,30\n{steps},{len(trained)}.25,\n')
        return ended()
    monkeypatch.setattr(lib, 'start', start)
    return trained


@pytest.fixture(scope='module')
def compared(tmp_path_factory, data_dir):
    """compare.py has trained nope and a scheme of one's own, in two processes at a time."""
    run = Run(tmp_path_factory.mktemp('compared'))
    run.words = ['experiments/compare.py', '--schemes', 'nope', OWN, '--objectives', 'causal', '--seeds', 1,
                 '--jobs', 2, '--dataset', 'code', '--name', 'tiny', '--results', 'results',
                 '--train', '--data_dir', data_dir, *TINY, '--max_iters', 3, '--eval_interval', 2]
    run(*run.words)
    return run


def test_compare(compared):
    """A row of the table and lines of the CSV for each run, equal to its log; nothing is trained twice."""
    path = compared.folder / 'results/compare-tiny-causal.csv'
    rows = lib.read_csv(path)
    assert sorted((r['scheme'], int(r['step'])) for r in rows) == [(s, n) for s in ('mine', 'nope') for n in (0, 2, 3)]
    for scheme in ('nope', 'mine'):
        curve = lib.losses(compared.folder / f'out/compare/tiny-causal-{scheme}-1')
        assert [float(r['val_loss']) for r in rows if r['scheme'] == scheme] == [loss for _, loss in curve]
        assert f'| causal | {scheme} | {curve[-1][1]:.4f} | 1 | - |' in compared.out and 4 < curve[-1][1] < 6
        printed = (compared.folder / f'out/compare/tiny-causal-{scheme}-1.txt').read_text()
        assert re.findall(speed.VAL_LOSS, printed) == [f'{loss:.4f}' for _, loss in curve]
    assert png(path) and path.read_text().startswith('# --dataset code --data_dir ')
    made = {p: p.stat().st_mtime for p in (compared.folder / 'out/compare').glob('tiny-causal-*/ckpt_last.pt')}
    again = Run(compared.folder)(*compared.words)
    assert len(made) == 2 and made == {p: p.stat().st_mtime for p in made} and not again.err


def test_interrupted_comparison_continues(compared):
    """SIGINT: the run saves; the same command trains the rest only."""
    words = ['experiments/compare.py', '--schemes', 'nope', '--objectives', 'causal', '--seeds', 1, '--dataset', 'code',
             '--name', 'stopped', '--results', 'results', *compared.words[compared.words.index('--train'):-4],
             '--max_iters', 80, '--checkpoint_interval', 1]
    process = Run(compared.folder).start(*words)
    folder = compared.folder / 'out/compare/stopped-causal-nope-1'
    end = time.monotonic() + 60
    while not (folder / 'ckpt_last.pt').exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith('compare.py: stopped; the same command continues\n')
    assert process.returncode == 130
    step, before = torch.load(folder / 'ckpt_last.pt')['step'], lib.losses(folder)
    assert step < 80
    Run(compared.folder)(*words)
    assert lib.losses(folder)[-1][0] == 80 and lib.losses(folder)[:len(before)] == before


@pytest.mark.parametrize('words, message', [
    (['--schemes', 'nope: --model composite'], "'nope' is the name of a known scheme"),
    (['--schemes', 'mine'], "write your own as 'name: --model file'"),
    (['--schemes', "mine: --model 'nope"], "the flags of 'mine' cannot be read"),
    (['--schemes', 'mine: --model no_such_file'], 'there is no model_no_such_file.py'),
    (['--schemes', 'mine: --model nope --kernel_size 9'], '--kernel_size'),
    (['--schemes', 'mine: --model nope --seed 3'], 'must not set --seed'),
    (['--train', '--dataset=other'], '--train must not set --dataset'),
    (['--name', 'a b'], '--name: a name may hold letters'),
], ids=str)
def test_compare_refuses(words, message, monkeypatch, capsys, tmp_path):
    """Before any training, in one line on stderr and with exit code 2."""
    monkeypatch.setattr(lib, 'start', lambda *_: pytest.fail('trained'))
    with pytest.raises(SystemExit) as stop:
        python(monkeypatch, tmp_path, compare, *words)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


COMMON = ['--objectives', 'causal', '--name', 'x', '--results', 'results', '--seeds', 1]
SETTINGS = ['--train', '--max_iters', 9]


def test_a_table_is_a_memory(fake_runs, monkeypatch, tmp_path, capsys):
    """Known schemes in the table are not trained again, own schemes are; rows of other schemes stay."""
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'rope', OWN, *SETTINGS)
    os.rename(tmp_path / 'out', tmp_path / 'lost')
    python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'rope', 'alibi', OWN, '--seeds', 2, *SETTINGS)
    assert [name for name, _ in fake_runs] == ['x-causal-rope-1', 'x-causal-mine-1', 'x-causal-rope-2',
                                               'x-causal-alibi-1', 'x-causal-alibi-2', 'x-causal-mine-1',
                                               'x-causal-mine-2']
    out = capsys.readouterr().out
    assert '| causal | rope | 2.2500 | 2 | 1.4142 |' in out, 'seed 1 from the table (1.25), seed 2 new (3.25)'
    last = {(r['scheme'], r['seed']): float(r['val_loss'])
            for r in lib.read_csv(tmp_path / 'results/compare-x-causal.csv')}
    assert last == {('rope', '1'): 1.25, ('rope', '2'): 3.25, ('alibi', '1'): 4.25, ('alibi', '2'): 5.25,
                    ('mine', '1'): 6.25, ('mine', '2'): 7.25}
    before = (tmp_path / 'results/compare-x-causal.csv').read_bytes()
    for other in (['--train', '--max_iters', 8], ['--dataset', 'enwik8', *SETTINGS]):
        with pytest.raises(SystemExit):
            python(monkeypatch, tmp_path, compare, *COMMON, '--schemes', 'rope', *other)
        assert 'was made with other settings' in capsys.readouterr().err
    assert (tmp_path / 'results/compare-x-causal.csv').read_bytes() == before


def test_a_run_of_other_settings_is_refused(tmp_path, capsys):
    """A folder stands for one setting; where the data is and how often a line is printed are not part of it."""
    (tmp_path / 'config.json').write_text(json.dumps(dict(model='composite', max_iters=9, kernel_size=9)))
    words = ['--model', 'composite', '--max_iters', '9', '--kernel_size', '9']
    lib.check_run(tmp_path, [*words, '--log_interval', '7', '--data_dir', 'elsewhere'])
    for flag in ('--max_iters', '--kernel_size'):
        with pytest.raises(SystemExit):
            lib.check_run(tmp_path, [*words, flag, '11'])
        assert f'{tmp_path} was trained with {flag[2:]} 9, not 11: give another --name' in capsys.readouterr().err


def test_a_failed_run_ends_the_script(monkeypatch, tmp_path, capsys):
    """With its exit code, or the code of a shell if a signal ended it; the others are told to stop."""
    monkeypatch.chdir(tmp_path)
    runs = [(f'run {n}', tmp_path / str(n), ['--model', 'nope']) for n in range(3)]
    for end, code in ((3, 3), (-9, 137)):
        started = []
        monkeypatch.setattr(lib, 'start', lambda *_: started.append(ended(None if started else end)) or started[-1])
        with pytest.raises(SystemExit) as stop:
            list(lib.train_all(runs, jobs=2))
        assert stop.value.code == code and len(started) == 2 and started[1].terminate.called
        assert 'stopped; the same command continues' in capsys.readouterr().err


def test_two_jobs_have_one_thread_each(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(lib.subprocess, 'Popen', lambda command, stdout, env: seen.append((command, env)))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/ckpt_last.pt').touch()
    lib.start(tmp_path / 'a', [], 2)
    lib.start(tmp_path / 'b', [], 1)
    assert [env.get('OMP_NUM_THREADS') for _, env in seen] == ['1', None]
    assert [command[-1] for command, _ in seen] == ['--resume', '--overwrite']


CURVES = {('causal', 'nope'): {1: [(0, 5.0), (2, 4.0), (4, 3.0)], 2: [(0, 5.5), (2, 4.4), (4, 3.2)]},
          ('causal', 'mine'): {1: [(0, 5.1), (2, 3.5), (4, 2.9)]}}


def test_tables_of_compare():
    """Mean and standard deviation (n - 1) of the last losses; the first validation below a level, equal is not."""
    assert compare.losses_table(CURVES)[1] == [('causal', 'nope', '3.1000', '2', '0.1414'),
                                               ('causal', 'mine', '2.9000', '1', '-')]
    assert compare.levels_table(CURVES, [4.0, 3.1])[1] == [
        ('causal', 'nope', '4 / 4', '4 / -', '3.0000 / 3.2000'), ('causal', 'mine', '2', '4', '2.9000')]
    line = compare.draw(CURVES, '').axes[0].lines[0]
    assert list(line.get_ydata()) == pytest.approx([4.2, 3.1])


def test_learning_rate(fake_runs, monkeypatch, tmp_path, capsys):
    """Loss by rate, mean, largest distance from a scheme's own best; finished runs are skipped."""
    words = ['--schemes', 'nope', 'rope', '--objectives', 'causal', '--rates', 0.003, 0.006, '--steps', 9,
             '--results', 'results', '--jobs', 1]
    python(monkeypatch, tmp_path, learning_rate, *words)
    flags = {name: dict(zip(words, words[1:])) for name, words in fake_runs}['shakespeare-causal-rope-0.006-9']
    assert flags['--learning_rate'] == '0.006' and flags['--max_iters'] == '9' and len(fake_runs) == 4
    out = capsys.readouterr().out
    assert '| shakespeare | 9 | rope | 3.2500 | 4.2500 |' in out
    os.rename(tmp_path / 'out', tmp_path / 'lost')
    python(monkeypatch, tmp_path, learning_rate, *words, '--rates', 0.003, 0.006, 0.012)
    assert [name for name, _ in fake_runs[4:]] == [f'shakespeare-causal-{s}-0.012-9' for s in ('nope', 'rope')]
    assert 'largest distance | 0.0000 | 1.0000 | 4.0000 |' in capsys.readouterr().out
    assert png(tmp_path / 'results/learning_rate')
    python(monkeypatch, tmp_path, learning_rate, *words, '--datasets', 'enwik8', '--rates', 0.003)
    assert '| enwik8 | 9 | mean | 7.7500 | - | - |' in capsys.readouterr().out


def test_names_of_runs(monkeypatch, tmp_path, capsys):
    runs = ['out/compare/x-1-causal-nope-1', 'out/compare/x-1-causal-nope-2', 'out/nope-causal-code']
    assert lib.short_names(runs) == ['nope-1', 'nope-2', 'nope-causal-code']
    with pytest.raises(SystemExit):
        lib.short_names(['out/compare/x-causal-nope-1', 'out/compare/y-causal-nope-1'])
    assert capsys.readouterr().err.endswith('2 are called nope-1\n')
    monkeypatch.chdir(tmp_path)
    for name, step in (('x-causal-nope-1', 9), ('x-masked-nope-1', 9), ('xy-causal-nope-1', 9), ('x-causal-rope-1', 5)):
        folder = tmp_path / 'out/compare' / name
        folder.mkdir(parents=True)
        (folder / 'config.json').write_text('{"max_iters": 9}')
        (folder / 'log.csv').write_text(f'step,val_loss\n{step},2\n')
    assert lib.runs_of('x') == ['out/compare/x-causal-nope-1'], 'the other objective, another name, not finished'


def test_merge_csv(tmp_path, capsys):
    """The first columns decide which rows are the same; another comment is refused."""
    path = tmp_path / 'a.csv'
    lib.merge_csv(path, ('what', 'n', 'y'), [('x', 15.0, 0.25), ('1_0', 1, math.nan)], 2, 'a')
    rows = lib.merge_csv(path, ('what', 'n', 'y'), [('x', 15.0, 0.5), ('z', 1, 1.0)], 2, 'a')
    assert str(rows) == str([('1_0', '1', math.nan), ('x', 15.0, 0.5), ('z', 1, 1.0)])
    with pytest.raises(SystemExit):
        lib.merge_csv(path, ('what', 'n', 'y'), [], 2, 'b')
    assert 'other settings (a), not b' in capsys.readouterr().err and len(lib.read_csv(path)) == 3


def test_quick_touches_no_tracked_file():
    """--quick writes to a folder that git ignores and has its own defaults; flags win."""
    parser = lib.Parser('', 'small')
    parser.add('--steps', 400, 60)
    found = [parser.parse_args(words) for words in ([], ['--quick'], ['--quick', '--steps', '7', '--results', 'mine'])]
    assert [args.steps for args in found] == [400, 60, 7]
    assert [args.results for args in found] == [REPO / 'experiments/results', Path('out/quick'), Path('mine')]
    assert 'out/' in (REPO / '.gitignore').read_text().split()


NANOGPT = 'from model_nope import Config as GPTConfig, Model as GPT'
# Chang et al.'s module: the equation as a gather
CHANG = '''
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
'''


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    """Folders that stand for nanoGPT and BERT_Convolutions."""
    monkeypatch.setattr(speed, 'FAILED', [])
    nano, chang = tmp_path / 'nano', tmp_path / 'chang'
    (chang / 'src/transformers').mkdir(parents=True)
    (nano / 'data/shakespeare_char').mkdir(parents=True)
    (nano / 'model.py').write_text(NANOGPT)
    (nano / 'data/shakespeare_char/prepare.py').write_text('open("train.bin", "w").write(open("input.txt").read())')
    (chang / 'src/transformers/modeling_bert.py').write_text(CHANG)
    yield nano, chang
    sys.modules.pop('model', None)


def test_speed(monkeypatch, tmp_path, checkouts, capsys):
    """Each ratio is that of the two times; a module that is not equal is not timed; failures are named."""
    nano, chang = checkouts
    words = ['--quick', '--results', 'r', '--schemes', 'nope', 'composite']
    python(monkeypatch, tmp_path, speed, *words, '--nanogpt', nano, '--chang', chang)
    rows = lib.read_csv(tmp_path / 'r/speed-cpu.csv')
    ms = {(r['part'], r['name'], r['setting']): float(r['ms']) for r in rows}
    assert [sum(r['part'] == part for r in rows) for part in ('steps', 'attention', 'decode', 'chang')] == [6, 24, 2, 4]
    base = dict(steps='nope', attention='sdpa', decode='nope')
    for (part, name, setting), x in ms.items():
        row = next(r for r in rows if (r['part'], r['name'], r['setting']) == (part, name, setting))
        if part in base:
            assert float(row['ratio']) == pytest.approx(x / ms[part, base[part], setting], rel=1e-3)
        if part in ('steps', 'chang'):
            first = ('steps', 'nanoGPT', 'float32') if part == 'steps' else ('chang', 'module', setting)
            assert float(row['speed']) == pytest.approx(ms[first] / x, rel=1e-3)
    (chang / 'src/transformers/modeling_bert.py').write_text(CHANG.replace('i[None] - i[:, None]', 'i[:, None] - i'))
    with pytest.raises(AssertionError, match='not close'):
        python(monkeypatch, tmp_path, speed, *words, '--parts', 'decode', '--chang', chang)
    monkeypatch.setattr(model_composite, 'attend_fast', lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match='1'):
        python(monkeypatch, tmp_path, speed, *words, '--parts', 'attention')
    out, err = capsys.readouterr()
    assert 'FAILED: composite, fast, 64 tokens, causal, float32' in out and 'ZeroDivisionError' in err
    assert sum(r['name'] != 'composite, fast' for r in lib.read_csv(tmp_path / 'r/speed-cpu.csv')) == 20
    with pytest.raises(SystemExit, match='2'):
        python(monkeypatch, tmp_path, speed, *words, '--parts', 'decode', '--chang', tmp_path)


def test_recipe(monkeypatch, tmp_path, checkouts, capsys):
    """Seconds to the first validation at or below the target, and the last loss; nanoGPT learns our text."""
    seen = []

    def watch(command, folder):
        seen.append(command[1:])
        if 'nanoGPT' in str(folder):
            assert (folder / 'data/shakespeare_char/train.bin').read_text() == 'text'
            return [(1.0, 4.2), (90.0, 1.9)], 95.0
        return [(1.0, 4.2), (29.0, 1.886), (60.0, 1.7)], 61.0
    (tmp_path / 'shakespeare.txt').write_text('text')
    monkeypatch.setattr(speed, 'REPO', tmp_path)
    monkeypatch.setattr(speed, 'watch', watch)
    python(monkeypatch, tmp_path, speed, '--recipe', '--nanogpt', checkouts[0], '--results', 'r')
    assert '| nanoGPT | - | 95 | 1.900 |\n| train.py --model composite | 29 | 61 | 1.700 |' in capsys.readouterr().out
    assert seen[0][:2] == ['train.py', 'config/train_shakespeare_char.py'] and seen[1][1:] == ['--model', 'composite']
    assert len(lib.read_csv(tmp_path / 'r/speed-recipe.csv')) == 2


def test_on_gpu(tmp_path):
    """What fails is named at the end of its part, a loss of nan too; other words are refused."""
    (tmp_path / 'experiments').mkdir()
    shutil.copy(REPO / 'experiments/on_gpu.sh', tmp_path / 'experiments')
    fake = tmp_path / 'python3'
    fake.write_text(f'''#!/bin/sh
echo "ran $*"
for folder; do :; done
loss=1
case "$*" in *val_loss*) exec {sys.executable} "$@";; *"model conv"*) exit 1;; *kernelized*) loss=nan;; esac
case "$*" in train*) mkdir -p $folder; printf "val_loss,grad_norm\n2,\n,${{NORM:-9}}\n$loss,\n" >$folder/log.csv;; esac
''')
    fake.chmod(0o755)
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'RESULTS': 'here', 'NANOGPT': 'there'}

    def part(*names, **more):
        done = subprocess.run(['bash', tmp_path / 'experiments/on_gpu.sh', *names], env={**env, **more}, text=True,
                              capture_output=True, timeout=60)
        return done.returncode, done.stdout
    code, out = part('right')
    assert code == 1 and 'ran -m pytest -q -x tests/test_gpu.py' in out and 'ran sample.py' in out
    failed = (tmp_path / 'here/right.log').read_text().partition('FAILED: ')[2]
    assert re.findall(r'model (\w+) --preset|right-(\w+).csv', failed) == [
        ('conv', ''), ('', 'conv'), ('', 'kernelized')]
    assert 'right-composite' in part('right', NORM='10')[1].partition('FAILED')[2]
    code, out = part('fast')
    assert code == 0 and out.count('ran experiments/speed.py') == 3 and '--nanogpt there' in out and '32768' in out
    assert part('fast', TINY='1')[1].count('ran experiments/speed.py --quick') == 3
    assert [part('evidence', TINY=tiny)[1].count('ran train.py') for tiny in ('', '1')] == [0, 5]
    assert part('nothing')[0] == part()[0] == 2
