"""The tests of the scripts can fail: plant one error in a copy of the repository, and the test that is named turns red.

    python tests/test_planted_errors_in_scripts.py         # the table: each error, and how its test fails
    python tests/test_planted_errors_in_scripts.py draw    # only the errors with this word in their name
"""
import contextlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# what: (file, right, wrong, the one test that must fail); the right text stands exactly once in the file
ERRORS = {
    'targets are the inputs': (
        'train.py', 'rows[:, 1:].copy()', 'rows[:, :-1].copy()',
        'test_train.py::test_causal_targets_are_the_next_tokens'),
    'masks: 90 % instead of 80 %': (
        'train.py', 'dice < 0.8', 'dice < 0.9',
        'test_train.py::test_masked_rows_hide_what_they_ask_for_and_nothing_else'),
    'masks: the targets are what is shown': (
        'train.py', 'return idx, targets, where', 'return idx, shown, where',
        'test_train.py::test_masked_rows_hide_what_they_ask_for_and_nothing_else'),
    'batches: the seed is forgotten': (
        'train.py', 'default_rng((run.settings.seed, step, row))', 'default_rng((step, row))',
        'test_train.py::test_batches_depend_on_seed_and_step_alone'),
    'batches: all micro batches have the same rows': (
        'train.py', 'range(i, i + micro)', 'range(first, first + micro)',
        'test_train.py::test_accumulation_changes_nothing_but_rounding'),
    'accumulation: the sum instead of the mean': (
        'train.py', ' * (1 / len(batches))', '',
        'test_train.py::test_accumulation_changes_nothing_but_rounding'),
    'schedule: warm-up starts at zero': (
        'train.py', '(step + 1) / settings.warmup_iters', 'step / settings.warmup_iters',
        'test_train.py::test_schedule'),
    'schedule: the cosine ends at zero': (
        'train.py', 'return settings.min_lr + (', 'return 0 + (',
        'test_train.py::test_schedule'),
    'dropout: the same draws in each step': (
        'train.py', '(settings.seed, step, RANK)', '(settings.seed, 0, RANK)',
        'test_train.py::test_random_draws_depend_on_seed_and_step'),
    'validation: rows that fill the batch count': (
        'train.py', 'rows[1][numbers >= n] = -1', 'pass',
        'test_train.py::test_validation_does_not_depend_on_the_micro_batch_or_on_dropout[causal]'),
    'validation: with dropout': (
        'train.py', '    model.eval()\n', '',
        'test_train.py::test_validation_does_not_depend_on_the_micro_batch_or_on_dropout[causal]'),
    'validation: not up to the end of the text': (
        'train.py', 'np.linspace(0, len(run.val)', 'np.linspace(0, len(run.val) // 2',
        'test_train.py::test_validation_rows_are_fixed_spread_and_disjoint'),
    'bits per byte upside down': (
        'train.py', "run.meta['val_tokens'] / run.meta['val_bytes']", "run.meta['val_bytes'] / run.meta['val_tokens']",
        'test_train.py::test_bits_per_byte_are_those_of_the_text'),
    'resume: the optimizer starts anew': (
        'train.py', "optimizer.load_state_dict(checkpoint['optimizer'])", 'pass',
        'test_train.py::test_resumed_run_has_the_present_weight_decay_and_betas'),
    'optimizer: vectors decay': (
        'train.py', 'weight_decay=0.0)', 'weight_decay=settings.weight_decay)',
        'test_train.py::test_resumed_run_has_the_present_weight_decay_and_betas'),
    'resume: the validation stands twice in the log': (
        'train.py', 'again=validate_first and step == first)', 'again=False)',
        'test_train.py::test_a_resume_that_dies_keeps_the_row_of_the_last_validation'),
    'signals: the picture is not interrupted': (
        'train.py', 'progress, validate_first)\n        common.exit_on_signals()', 'progress, validate_first)',
        'test_train.py::test_sigterm_while_the_picture_is_drawn'),
    'write: a copy instead of a rename': (
        'common.py', 'os.replace(beside, path)', 'shutil.copy(beside, path)',
        'test_train.py::test_a_written_file_takes_its_place_at_once'),
    'write: what is half written stays': (
        'common.py', '    finally:\n        beside.unlink(missing_ok=True)', '    finally:\n        pass',
        'test_train.py::test_a_failed_write_leaves_the_old_file'),
    'signals: the second one is ignored': (
        'common.py', 'os._exit(128 + number)', 'pass',
        'test_train.py::test_second_signal_exits_at_once'),
    'data: end-of-text counts as text': (
        'prepare_data.py', 'lengths[tokens.eot_token] = 0', 'pass',
        'test_data.py::test_bytes_are_those_of_the_text_and_not_of_its_tokens'),
    'data: documents do not end': (
        'prepare_data.py', '            if end:\n', '            if False:\n',
        'test_data.py::test_bytes_are_those_of_the_text_and_not_of_its_tokens'),
    'data: validation is the beginning of the text': (
        'prepare_data.py', 'offset=(ids - n) * dtype.itemsize', 'count=n',
        'test_data.py::test_bytes_are_those_of_the_text_and_not_of_its_tokens'),
    'data: the first id beyond the vocabulary passes': (
        'prepare_data.py', "ids[part].max() >= meta['vocab_size']", "ids[part].max() > meta['vocab_size']",
        'test_data.py::test_check_data_reads_all'),
    'data: pieces end anywhere': (
        'prepare_data.py', r'(?s).*\S(?=[ \n])', r'(?s).*\S(?=.)',
        'test_data.py::test_pieces_are_the_text'),
    'data: hidden files are read': (
        'prepare_data.py', r"re.search(r'(^|/)\.'", r"re.search(r'^$'",
        'test_data.py::test_folders'),
    'data: the old set is lost in the swap': (
        'prepare_data.py', 'old.rename(folder)  # int', 'pass  # int',
        'test_data.py::test_interrupted_while_swapping'),
    'draw: top k is top 1': (
        'sample.py', '.values[-1]', '.values[0]',
        'test_sample.py::test_top_k_draws_from_k_ids'),
    'draw: temperature upside down': (
        'sample.py', ') / temperature)', ') * temperature)',
        'test_sample.py::test_temperature_and_seed_decide_the_draws'),
    'draw: the seed is forgotten': (
        'sample.py', ', generator=generator)', ')',
        'test_sample.py::test_temperature_and_seed_decide_the_draws'),
    'draw: [MASK] is an answer': (
        'sample.py', 'logits[0, -1, :vocab_size]', 'logits[0, -1]',
        'test_sample.py::test_only_ordinary_ids_are_drawn_and_filled_in'),
    'fill: [MASK] has a share': (
        'sample.py', 'logits[0, :, :vocab_size].float().softmax(-1)', 'logits[0].float().softmax(-1)[:, :vocab_size]',
        'test_sample.py::test_only_ordinary_ids_are_drawn_and_filled_in'),
}


def plant(what):
    """Run the named test on a copy that has one error -> pytest's exit status, its reason. Call it in a new process."""
    name, right, wrong, test = ERRORS[what]
    text = (REPO / name).read_text(encoding='utf-8')
    if text.count(right) != 1:
        return 2, f'{right!r} stands {text.count(right)} times in {name}: the table of errors is out of date'
    ours = {path.stem for folder in (REPO, REPO / 'tests') for path in folder.glob('*.py')}
    for module in ours & set(sys.modules):
        del sys.modules[module]  # what the parent had imported is the code without the error
    for variable in [key for key in os.environ if key.startswith('PYTEST_') or key in ('CI', 'BUILD_NUMBER')]:
        del os.environ[variable]  # with CI pytest shows all differences of long values, which can take hours
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        for path in [*REPO.glob('*.py'), *REPO.glob('tests/*.py'), *REPO.glob('baselines/*.py')]:
            (Path(folder) / path.relative_to(REPO)).parent.mkdir(exist_ok=True)
            shutil.copy(path, Path(folder) / path.relative_to(REPO))
        (Path(folder) / name).write_text(text.replace(right, wrong), encoding='utf-8')
        sys.path[:] = [path for path in sys.path if Path(path or '.').resolve() not in (REPO, REPO / 'tests')]
        old = os.getcwd()
        options = ['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '--capture=sys', f'--basetemp={folder}/tmp']
        code = int(pytest.main([*options, f'--rootdir={folder}', f'{folder}/tests/{test}']))
        os.chdir(old)
    reasons = re.findall(r'^E  +(.*)', out.getvalue(), re.M)
    return code, (reasons or [out.getvalue()[-300:]])[0]


def plant_all(errors=ERRORS):
    """{what: (exit status, reason)}, two at a time, each in a new process (forked on Linux: torch loads slowly)."""
    import torch  # noqa: F401
    method = 'fork' if sys.platform == 'linux' else 'spawn'
    with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
        return dict(zip(errors, pool.map(plant, errors, chunksize=1)))


@pytest.fixture(scope='module')
def caught():
    return plant_all()


@pytest.mark.parametrize('what', ERRORS)
def test_planted_error_is_caught(what, caught):
    code, reason = caught[what]
    assert code == 1, f'{what}: not caught by {ERRORS[what][-1]}\n{reason}'
    assert not re.match('NameError|SyntaxError|ImportError|ModuleNotFoundError', reason), f'{what}: it only crashes'


if __name__ == '__main__':
    word = sys.argv[1].lower() if sys.argv[1:] else ''
    for what, (code, reason) in plant_all([what for what in ERRORS if word in what.lower()]).items():
        print(f'{what:50s} {"caught: " if code == 1 else "NOT CAUGHT "}{reason[:80]}')
