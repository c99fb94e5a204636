"""The tests of the scripts can fail: with one error in a copy of the repository, the named test fails."""
import contextlib
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from conftest import REPO
from planted_data import PLANTED as MORE

HERE = 'tests/test_train.py::'
# Forked from a server that has imported torch, which takes longer than a test. It has no threads, unlike this process.
CONTEXT = multiprocessing.get_context('forkserver' if sys.platform == 'linux' else 'spawn')
CONTEXT.set_forkserver_preload(['torch', 'torch._dynamo', 'pytest'])
# (file, right text, which occurs exactly once, wrong text, the test that must fail)
PLANTED = [
    ('train.py', 'sequences[:, 1:], None', 'sequences[:, :-1], None',
     HERE + 'test_causal_targets_are_the_next_tokens'),
    ('train.py', 'max(1, run.settings.eval_tokens // T)', 'run.settings.eval_tokens // T',
     HERE + 'test_evaluate[causal]'),
    ('train.py', '    run.losses.clear()\n', '', HERE + 'test_what_the_log_says'),
    ('train.py', "run.meta['val_tokens'] / run.meta['val_bytes']", '1', HERE + 'test_what_the_log_says'),
    ('train.py', '        run.best = loss\n        save', '        save',
     HERE + 'test_the_best_checkpoint_holds_the_best_loss_and_its_step'),
    ('train.py', '(settings.seed, step, RANK)', '(settings.seed, time.time_ns())', HERE + 'test_what_the_log_says'),
    ('train.py', "optimizer.load_state_dict(dict(checkpoint['optimizer'], param_groups=groups))", 'pass',
     HERE + 'test_resume_keeps_what_it_must'),
    ('train.py', "checkpoint['meta']['sha256'] == run.meta['sha256']", 'True',
     HERE + 'test_the_best_loss_starts_anew_when_the_data_change[data]'),
    ('train.py', 'zipfile.ZipFile(path).testzip()', 'None', HERE + 'test_damaged_checkpoints_are_refused'),
    ('train.py', "            save(run, model, optimizer, 'ckpt_last.pt')  # with", '            pass  #',
     HERE + 'test_a_finished_run_is_extended'),
]


def run_test(folder, test):
    """Run a test of a copy of the repository; exits with pytest's exit code."""
    for path in (*REPO.glob('*.py'), *REPO.glob('*/*.py')):
        sys.modules.pop(path.stem, None)  # the parent has imported the code without the error
    sys.path[:] = [path for path in sys.path if not Path(path or '.').resolve().is_relative_to(REPO)]
    os.chdir(folder)
    options = (f'-q -x --tb=short --assert=plain --capture=sys --rootdir={folder} --basetemp={folder}/tmp '
               '-p no:cacheprovider -p no:xdist -p no:hypothesispytest').split()
    with open('out', 'w') as f, contextlib.redirect_stdout(f):
        code = pytest.main([*options, f'{folder}/{test}'])
    os._exit(int(code))


@pytest.mark.parametrize('file, right, wrong, test', PLANTED + MORE)
def test_planted_error_is_caught(tmp_path, file, right, wrong, test):
    text = (REPO / file).read_text(encoding='utf-8')
    assert text.count(right) == 1, f'{right!r} occurs {text.count(right)} times in {file}: this table is out of date'
    for path in [*REPO.glob('*.*'), *REPO.glob('*/*.py')]:
        if path.is_file():
            (tmp_path / path.relative_to(REPO)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(REPO))
    (tmp_path / file).write_text(text.replace(right, wrong), encoding='utf-8')
    process = CONTEXT.Process(target=run_test, args=(tmp_path, test))
    process.start()
    process.join(120)
    process.kill()
    output = (tmp_path / 'out').read_text(encoding='utf-8', errors='replace')
    reason = (re.findall(r'^E  +(.*)', output, re.M) or [output[-300:]])[0]
    assert process.exitcode == 1, f'not caught by {test}\n{reason}'
    assert not re.match('NameError|SyntaxError|ImportError|ModuleNotFoundError', reason), f'it only crashes: {reason}'
