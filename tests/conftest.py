"""Shared by the tests: the repository, a small prepared data set, and commands run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # many small tests: a second thread gains nothing, and spins for minutes where other work holds its core
REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
CORPORA = Path(os.environ.get('CORPORA', REPO.parent / 'shared' / 'data'))  # real texts; tests that want them skip without
MODELS = sorted(p.stem[6:] for p in REPO.glob('model_*.py'))
# a model that trains in a second
TINY = '--n_layer 2 --n_embd 32 --n_head 2 --block_size 32 --batch_size 8 --eval_tokens 2048 --device cpu'.split()


class Run:
    """Start a script of the repository in a folder; what it printed is in .out and .err."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, *words, **env):
        words = [str(w) for w in words]
        launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', *words[1:]] if words[0] == 'torchrun' else [sys.executable, *words]
        script = next(i for i, w in enumerate(launcher) if w.endswith('.py'))
        launcher[script] = str(REPO / launcher[script])
        return subprocess.Popen(launcher, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                stdin=subprocess.DEVNULL, env={**os.environ, 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', **env})

    def __call__(self, *words, code=0, **env):
        process = self.start(*words, **env)
        self.out, self.err = process.communicate(timeout=300)
        assert process.returncode == code, f'exit {process.returncode}, not {code}: {words}\n{self.out[-3000:]}\n{self.err[-3000:]}'
        return self


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """data/code: 1 MB of the standard library's modules as bytes."""
    import prepare_data
    folder = tmp_path_factory.mktemp('corpus')
    names = 'argparse ast bdb calendar cgitb configparser csv dataclasses datetime difflib doctest enum fractions ftplib functools inspect ' \
            'ipaddress locale mailbox optparse os pathlib pdb pickle platform pydoc random shutil smtplib ssl statistics subprocess tarfile ' \
            'tempfile textwrap threading tokenize traceback turtle typing uuid zipfile'.split()
    files = [Path(os.__file__).with_name(f'{name}.py') for name in names]
    (folder / 'code.txt').write_text(''.join(p.read_text(encoding='utf-8') for p in files if p.exists()), encoding='utf-8')
    prepare_data.prepare('code', path=folder / 'code.txt', data_dir=folder / 'data')
    return folder / 'data'


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.fixture
def train(tmp_path, data_dir):
    """train(...) -> Run: train.py on the small data set with a small model."""
    run = Run(tmp_path)
    run.words = ['--data_dir', data_dir, '--dataset', 'code', *TINY]
    run.train = lambda *words, **kw: run('train.py', *run.words, *words, **kw)
    run.start_train = lambda *words, **kw: run.start('train.py', *run.words, *words, **kw)
    return run
