"""The tests of the scripts can fail: plant one error in a copy of the repository, and the named test must fail.

    python tests/test_planted_errors_in_scripts.py         # the table: each error, and how its test fails
    python tests/test_planted_errors_in_scripts.py resume  # only the errors with this word in a row

More rows are in planted_data.py, if there is that file.
"""
import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
HERE = 'tests/test_train.py::'
# (file, right text, which occurs exactly once, wrong text, the test that must fail)
PLANTED = [
    ('train.py', 'sequences[:, 1:], None', 'sequences[:, :-1], None',
     HERE + 'test_causal_targets_are_the_next_tokens'),
    ('train.py', 'np.where(u < 0.8', 'np.where(u < 0.9', HERE + 'test_masked_batch'),
    ('train.py', 'range(i, i + micro)', 'range(first, first + micro)',
     HERE + 'test_micro_batches_equal_one_batch[causal]'),
    ('train.py', 'max(1, run.settings.eval_tokens // T)', 'run.settings.eval_tokens // T',
     HERE + 'test_evaluate[causal]'),
    ('train.py', 'lr_at(step - 1, settings)', 'lr_at(step, settings)', HERE + 'test_what_the_log_says'),
    ('train.py', '    run.losses.clear()\n', '', HERE + 'test_what_the_log_says'),
    ('train.py', "run.meta['val_tokens'] / run.meta['val_bytes']", '1', HERE + 'test_what_the_log_says'),
    ('train.py', '        run.best = loss\n        save', '        save',
     HERE + 'test_the_best_checkpoint_holds_the_best_loss_and_its_step'),
    ('train.py', '(settings.seed, step, RANK)', '(settings.seed, os.getpid(), RANK)',
     HERE + 'test_killed_and_resumed_is_bit_identical'),
    ('train.py', "optimizer.load_state_dict(dict(checkpoint['optimizer'], param_groups=groups))", 'pass',
     HERE + 'test_resume_keeps_what_it_must'),
    ('train.py', "checkpoint['meta']['sha256'] == run.meta['sha256']", 'True',
     HERE + 'test_the_best_loss_starts_anew_when_the_data_change[data]'),
    ('train.py', 'zipfile.ZipFile(path).testzip()', 'None', HERE + 'test_damaged_checkpoints_are_refused'),
    ('train.py', "            save(run, model, optimizer, 'ckpt_last.pt')  # with", '            pass  #',
     HERE + 'test_a_finished_run_is_extended'),
    ('train.py', "'SIGHUP'", "'SIGABRT'", HERE + 'test_a_closed_terminal_saves_and_two_runs_never_share_a_folder'),
    ('train.py', 'fcntl.lockf(', 'id(', HERE + 'test_a_closed_terminal_saves_and_two_runs_never_share_a_folder'),
]
try:
    from planted_data import PLANTED as MORE
except ImportError:
    MORE = []


def run_test(folder, test, out):
    """Run a test of a copy of the repository in this new process, which exits with pytest's exit code."""
    ours = {path.stem for path in (*REPO.glob('*.py'), *REPO.glob('tests/*.py'))}
    for name in ours & set(sys.modules):
        del sys.modules[name]  # the parent has imported the code without the error
    sys.path[:] = [path for path in sys.path if Path(path or '.').resolve() not in (REPO, REPO / 'tests')]
    os.chdir(folder)
    options = ['-q', '-x', '--tb=short', '-p', 'no:cacheprovider', '-p', 'no:xdist', '--capture=sys',
               f'--rootdir={folder}', f'--basetemp={folder}/tmp']
    with open(out, 'w') as f, contextlib.redirect_stdout(f):
        code = pytest.main([*options, f'{folder}/{test}'])
    os._exit(int(code))


def plant(file, right, wrong, test):
    """Run the test on a copy of the repository that has one error -> pytest's exit code and the reason it gives."""
    text = (REPO / file).read_text(encoding='utf-8')
    if text.count(right) != 1:
        return 2, f'{right!r} occurs {text.count(right)} times in {file}: this table is out of date'
    with tempfile.TemporaryDirectory() as folder:
        for path in [*REPO.glob('*.*'), *REPO.glob('tests/*.py'), *REPO.glob('baselines/*.py')]:
            if path.is_file():
                (Path(folder) / path.relative_to(REPO)).parent.mkdir(exist_ok=True)
                shutil.copy(path, Path(folder) / path.relative_to(REPO))
        (Path(folder) / file).write_text(text.replace(right, wrong), encoding='utf-8')
        # fork after this: importing torch and what its optimizers import takes longer than a test
        torch.optim.AdamW([torch.zeros(1)])
        context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
        process = context.Process(target=run_test, args=(folder, test, f'{folder}/out'))
        process.start()
        process.join(120)
        process.kill()
        output = Path(folder, 'out').read_text(encoding='utf-8', errors='replace')
    reasons = re.findall(r'^E  +(.*)', output, re.M)
    return process.exitcode, (reasons or [output[-300:]])[0]


@pytest.mark.parametrize('file, right, wrong, test', PLANTED + MORE)
def test_planted_error_is_caught(file, right, wrong, test):
    code, reason = plant(file, right, wrong, test)
    assert code == 1, f'not caught by {test}\n{reason}'
    assert not re.match('NameError|SyntaxError|ImportError|ModuleNotFoundError', reason), f'it only crashes: {reason}'


if __name__ == '__main__':
    for row in PLANTED + MORE:
        if not sys.argv[1:] or sys.argv[1] in ' '.join(row):
            code, reason = plant(*row)
            print(f'{"caught" if code == 1 else "NOT CAUGHT"}  {row[0]}: {row[1]!r} -> {row[2]!r}: {reason[:80]}')
