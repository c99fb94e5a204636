"""Whatever a command line, a config file, a meta.json or a checkpoint holds: it works, or is refused in one line."""
import contextlib
import dataclasses
import io
import json

import pytest

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, example, given, settings, strategies as st  # noqa: E402

import model_composite  # noqa: E402
import model_nope  # noqa: E402
import prepare_data  # noqa: E402
import train as script  # noqa: E402

bounded = settings(max_examples=60, derandomize=True, deadline=None, database=None,
                   suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FIELDS = [field.name for field in dataclasses.fields(script.Settings) + dataclasses.fields(model_composite.Config)]
OTHERS = ['preset', 'config', 'out_dir', 'resume', 'overwrite', 'eval_only', 'no-causal', 'help', '']
FLAGS = [f'--{name}' for name in FIELDS + OTHERS] + ['-h', '-x', '=', '-']
WORDS = st.text(st.characters(exclude_characters='\0'), max_size=6) | st.sampled_from(
    ['', '0', '-1', '1', 'nan', 'inf', '1e400', '9' * 400, '٣', '\udcff', '../x', '.', 'a' * 300, 'masked', 'nope'])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5)


def refused(function, *words):
    """Call it -> the one line of its refusal, or None. Any other exception fails the test."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            function(*words)
        return None
    except SystemExit as stop:
        lines = err.getvalue().split('\n')[:-1]
        assert stop.code in (None, 0, 2) and len(lines) == (stop.code == 2), lines
        assert not lines or len(lines[0].split()) > 2
        return lines[0] if lines else None
    except OSError as e:  # the last lines of train.py print it in one line, too
        return str(e)


@bounded
@given(st.lists(st.sampled_from(FLAGS) | WORDS | st.builds('{}={}'.format, st.sampled_from(FLAGS), WORDS), max_size=6))
@example(['--out_dir', '\udcff', '--resume'])
@example(['--model', '../model_nope'])
def test_command_lines(monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    refused(script.resolve, words)


@bounded
@given(st.dictionaries(st.sampled_from([*FIELDS, *OTHERS]) | st.text(max_size=6), JSON, max_size=4),
       st.sampled_from(['', '--model=nope', '--objective=masked']))
@example({'model': ['a']}, '--model=nope')
@example({'': True}, '')
def test_config_files(tmp_path, values, word):
    (tmp_path / 'c.json').write_text(json.dumps(values), encoding='utf-8')
    refused(script.resolve, ['--config', str(tmp_path / 'c.json'), *word.split()])


@bounded
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'[' * 100000)
@example(b'\xff\xfe')
def test_files_of_any_bytes(tmp_path, content):
    """As config.json, as meta.json and as a checkpoint."""
    for name in ('meta.json', 'ckpt_last.pt'):
        (tmp_path / name).write_bytes(content)
    assert 'damaged' in refused(prepare_data.load, tmp_path)
    assert 'damaged' in refused(script.load_checkpoint, tmp_path / 'ckpt_last.pt')
    refused(script.read_config, tmp_path / 'meta.json')


def build(folder, block_size):
    config = model_nope.Config(vocab_size=0, block_size=block_size, n_layer=1, n_head=1, n_embd=4)
    run = script.Run(script.Settings(model='nope', dataset='text', data_dir=str(folder)), config, out=folder)
    script.load_data(run)


def test_a_sequence_and_its_targets_fit_into_the_validation_data(tmp_path):
    (tmp_path / 'text.txt').write_bytes(bytes(range(32, 132)) * 2)
    prepare_data.prepare('text', tokenizer='bytes', path=tmp_path / 'text.txt', data_dir=tmp_path)
    assert '--block_size must be less than 20' in refused(build, tmp_path, 20) and refused(build, tmp_path, 19) is None
