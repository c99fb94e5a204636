"""Whatever a command line, a config file, a meta.json or a checkpoint holds: it works, or is refused in one line."""
import contextlib
import dataclasses
import io
import json
import sys

import pytest
import torch

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, example, given, settings, strategies as st  # noqa: E402

import model_composite  # noqa: E402
import model_nope  # noqa: E402
import prepare_data  # noqa: E402
import sample  # noqa: E402
import train as script  # noqa: E402

# the same examples every time, and as many on a slow machine as on a fast one
bounded = settings(max_examples=60, derandomize=True, deadline=None, database=None,
                   suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FIELDS = [field.name for field in dataclasses.fields(script.Settings) + dataclasses.fields(model_composite.Config)]
OTHERS = ['preset', 'config', 'out_dir', 'resume', 'overwrite', 'eval_only', 'no-causal', 'help', '']
FLAGS = [f'--{name}' for name in FIELDS + OTHERS] + ['-h', '-x', '=', '-']
WORDS = st.one_of(
    st.sampled_from(['', '0', '-1', '1', 'nan', 'inf', '1e400', '9' * 400, '٣', '\udcff', '../x', '.', '/', 'a' * 300,
                     'on', 'auto', 'causal', 'masked', 'nope', 'small', 'cpu']),
    st.integers().map(str), st.floats().map(str), st.text(st.characters(exclude_characters='\0'), max_size=6))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5)


def refused(function, *words):
    """Call it -> the one line of its refusal, or None. Any other exception fails the test."""
    err = io.StringIO()
    out = io.TextIOWrapper(io.BytesIO(), 'utf-8', errors='backslashreplace')  # as train.py sets it
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            function(*words)
        return None
    except SystemExit as stop:
        lines = err.getvalue().split('\n')[:-1]
        assert stop.code in (None, 0, 1, 2) and len(lines) == (stop.code in (1, 2)), lines
        assert not lines or len(lines[0].split()) > 2, 'a sentence'
        return lines[0] if lines else None
    except OSError as e:  # the last lines of train.py print it in one line, too
        return str(e)


@bounded
@given(st.lists(st.one_of(st.sampled_from(FLAGS), WORDS, st.builds('{}={}'.format, st.sampled_from(FLAGS), WORDS)),
                max_size=6))
@example(['--model', 'a' * 300])
@example(['--out_dir', '\udcff', '--resume'])
@example(['--model', '../model_nope'])
def test_command_lines(tmp_path_factory, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        refused(script.resolve, words)


@bounded
@given(st.dictionaries(st.sampled_from([*FIELDS, *OTHERS]) | st.text(max_size=6), JSON, max_size=4),
       st.sampled_from(['', '--model=nope', '--objective=masked']))
@example({'model': ['a']}, '--model=nope')
@example({'': True}, '')
def test_config_files(tmp_path_factory, values, word):
    folder = tmp_path_factory.getbasetemp()
    (folder / 'c.json').write_text(json.dumps(values), encoding='utf-8')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        refused(script.resolve, ['--config', 'c.json', *word.split()])


@bounded
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'[' * 100000)
@example(b'\xff\xfe')
def test_files_of_any_bytes(tmp_path_factory, content):
    """As config.json, as meta.json and as a checkpoint."""
    folder = tmp_path_factory.mktemp('any')
    for name in ('meta.json', 'ckpt_last.pt'):
        (folder / name).write_bytes(content)
    assert 'damaged' in refused(prepare_data.load, folder)
    assert 'damaged' in refused(script.load_checkpoint, folder / 'ckpt_last.pt')
    refused(script.read_config, folder / 'meta.json')


def build(folder, block_size=4):
    config = model_nope.Config(vocab_size=0, block_size=block_size, n_layer=1, n_head=1, n_embd=4)
    run = script.Run(script.Settings(model='nope', dataset='text', data_dir=str(folder)), config, out=folder)
    script.load_data(run)
    model, _, optimizer = script.build(run, model_nope, False)
    return run, model, optimizer


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A folder with a data set of 200 ids and a checkpoint of the smallest model."""
    folder = tmp_path_factory.mktemp('small')
    (folder / 'text.txt').write_bytes(bytes(range(32, 132)) * 2)
    prepare_data.prepare('text', tokenizer='bytes', path=folder / 'text.txt', data_dir=folder)
    run, model, optimizer = build(folder)
    script.save(run, model, optimizer, 'good.pt')
    return folder


def resume(folder):
    run, model, optimizer = build(folder)
    script.restore(run, script.load_checkpoint(folder / 'ckpt_last.pt'), model, optimizer)


def test_a_sequence_and_its_targets_fit_into_the_validation_data(small):
    """20 tokens of validation data: block_size 19 is the longest."""
    assert '--block_size must be less than 20' in refused(build, small, 20) and refused(build, small, 19) is None


@bounded
@given(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=3))
def test_checkpoints_with_wrong_bytes(small, place, content):
    """Refused, or loaded with the very values that were saved."""
    good = (small / 'good.pt').read_bytes()
    start = int(place * len(good))
    bad = good[:start] + content + good[start + len(content):]
    (small / 'ckpt_last.pt').write_bytes(bad)
    if refused(resume, small) is None:
        wrong, right = (torch.load(io.BytesIO(x), weights_only=True)['model'] for x in (bad, good))
        assert all(torch.equal(wrong[name], right[name]) for name in right)
    refused(sample.load_run, small)
