"""Shared by the tests: a small data set, scripts run as a user runs them, and small runs trained once for all."""
import contextlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it, and so would scripts
os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', MPLBACKEND='Agg')
import torch  # noqa: E402

torch.set_num_threads(1)  # a second thread gains nothing in small tests, and waits long where other work holds its core
SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
signal.signal(SIGNALS[-1], signal.SIG_DFL)  # nohup ignores SIGHUP
REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / 'experiments'), str(REPO / 'baselines')]
CORPORA = Path(os.environ.get('CORPORA', REPO.parent / 'shared' / 'data'))  # real texts; without them tests skip
MODELS = ['nope', 'composite', 'conv', 'kernelized']
BASELINES = ['rope', 'alibi', 'tisa', 'cape']  # in baselines/
# a model that trains in a second, in float32 on every CPU
TINY = ('--n_layer 2 --n_embd 32 --n_head 2 --block_size 32 --batch_size 8 --eval_tokens 2048 '
        '--device cpu --dtype float32').split()


class Run:
    """Runs scripts of the repository in a folder; what the last one printed is in .out and .err.

    run('train.py', ...) runs it in this process, which saves the import of torch. run.process(...) starts a process and
    waits for it; run.start(...) does not wait. It is killed when the test ends.
    """

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def __call__(self, *words, code=0, **env):
        script, *arguments = [str(w) for w in words]
        self.out, self.err, found = run_here(REPO / script, arguments, self.folder, env)
        assert found == code, f'exit {found}, not {code}: {words}\n{self.out[-3000:]}\n{self.err[-3000:]}'
        return self

    def process(self, *words, code=0, **env):
        process = self.start(*words, **env)
        self.out, self.err = process.communicate(timeout=300)
        assert process.returncode == code, f'exit {process.returncode}: {words}\n{self.err[-3000:]}'
        return self

    def start(self, *words, **env):
        words = [str(w) for w in words]
        launcher = [sys.executable]
        if words[0] == 'torchrun':
            launcher += ['-m', 'torch.distributed.run', '--standalone']
            words = words[1:]
        script = next(i for i, w in enumerate(words) if w.endswith('.py'))
        words[script] = str(REPO / words[script])
        env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONIOENCODING': 'utf-8', **env}
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.started.append(subprocess.Popen([*launcher, *words], cwd=self.folder, env=env, encoding='utf-8', **pipes))
        return self.started[-1]


def run_here(script, arguments, folder, env):
    """Run a script in this process -> its stdout, its stderr, its exit code. Everything else stays as it was."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8') for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, 'argv', [str(script), *arguments])
        for name, value in env.items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(script.parent))
        try:
            runpy.run_path(str(script), run_name='__main__')
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.modules.pop('model_mine', None)  # a test's own scheme
            for number, handler in handlers.items():
                signal.signal(number, handler)
    for stream in (out, err):
        stream.seek(0)
    return out.read(), err.read(), code


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """data/code: 1 MB of the standard library's modules as bytes."""
    import prepare_data
    folder = tmp_path_factory.mktemp('corpus')
    files = [p for p in sorted(Path(os.__file__).parent.glob('*.py')) if p.stat().st_size > 20000][:40]
    (folder / 'code.txt').write_text(''.join(p.read_text(encoding='utf-8') for p in files), encoding='utf-8')
    prepare_data.prepare('code', path=folder / 'code.txt', data_dir=folder / 'data')
    return folder / 'data'


@pytest.fixture(scope='session')
def trained(tmp_path_factory, data_dir):
    """trained('nope', 'causal', ...) -> Run of 60 steps, trained once for all tests; .out_dir is its folder."""
    folder = tmp_path_factory.mktemp('trained')
    schedule = '--max_iters 60 --warmup_iters 10 --learning_rate 5e-3 --eval_interval 30 --eval_tokens 20480'.split()
    runs = {}

    def train(model, objective, *words):
        key = (model, objective, *words)
        if key not in runs:
            run = Run(folder)
            run('train.py', '--model', model, '--objective', objective, '--data_dir', data_dir, '--dataset', 'code',
                *TINY, *schedule, *words)
            run.out_dir = folder / re.search(r'run (out\S+)', run.out)[1]
            runs[key] = run
        return runs[key]
    return train


@pytest.fixture(autouse=True)
def time_limit():
    """No test waits for ever, whatever it waits for."""
    def fail(*_):
        raise TimeoutError('this test took five minutes')
    with contextlib.suppress(AttributeError):  # Windows does not have this signal
        signal.signal(signal.SIGALRM, fail)
        signal.alarm(300)
    yield
    with contextlib.suppress(AttributeError):
        signal.alarm(0)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    for process in run.started:
        process.kill()


@pytest.fixture
def train(run, data_dir):
    """train.train(...) runs train.py on the small data set with a small model."""
    run.words = ['--data_dir', data_dir, '--dataset', 'code', *TINY]
    run.train = lambda *words, **options: run('train.py', *run.words, *words, **options)
    return run
