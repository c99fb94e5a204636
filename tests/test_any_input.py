"""Whatever stands in a command line, a config file, a meta.json or a checkpoint: it works, or one line refuses it."""
import copy
import dataclasses
import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, example, given, settings, strategies as st  # noqa: E402

import common  # noqa: E402
import model_composite  # noqa: E402
import model_nope  # noqa: E402
import prepare_data  # noqa: E402
import sample  # noqa: E402
import train as script  # noqa: E402

# the same examples every time, and as many on a slow machine as on a fast one
bounded = settings(max_examples=80, derandomize=True, deadline=None, database=None,
                   suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FIELDS = [field.name for field in dataclasses.fields(script.Settings) + dataclasses.fields(model_composite.Config)]
OTHERS = ['preset', 'config', 'out_dir', 'resume', 'overwrite', 'eval_only', 'no-causal', 'no-fixed', 'help', '']
FLAGS = [f'--{name}' for name in FIELDS + OTHERS] + ['-h', '-x', '=', '-']
WORDS = st.one_of(
    st.sampled_from(['', '0', '-1', '1', 'nan', 'inf', '1e400', '9' * 400, '٣', '\udcff', '../x', '.', '/', 'a' * 300,
                     'on', 'auto', 'causal', 'masked', 'nope', 'small', 'cpu']),
    st.integers().map(str), st.floats().map(str), st.text(st.characters(exclude_characters='\0'), max_size=6))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from([2 ** 40, -2 ** 40, '\0', '\ud800', 'uint16', 'uint32', 'float32', 'object', '']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5)


def refused(function, *words):
    """Call it -> the one line of its refusal, or None. Any other exception fails the test."""
    old = sys.stdout, sys.stderr
    sys.stdout = io.TextIOWrapper(io.BytesIO(), 'utf-8', errors='backslashreplace')  # as train.py sets it
    sys.stderr = io.StringIO()
    try:
        function(*words)
        return None
    except SystemExit as stop:
        lines = sys.stderr.getvalue().split('\n')[:-1]
        assert stop.code in (None, 0, 1, 2) and len(lines) == (stop.code in (1, 2)), lines
        return lines[0] if lines else None
    except OSError as e:  # train.py's last lines make it one line, too
        return str(e)
    finally:
        sys.stdout, sys.stderr = old


@bounded
@given(st.lists(st.one_of(st.sampled_from(FLAGS), WORDS, st.builds('{}={}'.format, st.sampled_from(FLAGS), WORDS)),
                max_size=6))
@example(['--model', 'a' * 300])
@example(['--out_dir', '\udcff', '--resume'])
@example(['--model', '../model_nope'])
def test_command_lines(tmp_path_factory, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        said = refused(script.resolve, words)
    assert said is None or len(said.split()) > 2  # a sentence, or nothing


@bounded
@given(st.dictionaries(st.sampled_from([*FIELDS, *OTHERS]) | st.text(max_size=6), JSON, max_size=4),
       st.sampled_from(['', '--model=nope', '--objective=masked']))
@example({'data_dir': '\0'}, '')
@example({'model': ['a']}, '--model=nope')
@example({'': True}, '')
def test_config_files(tmp_path_factory, values, word):
    folder = tmp_path_factory.getbasetemp()
    (folder / 'c.json').write_text(json.dumps(values), encoding='utf-8')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if refused(script.resolve, ['--config', 'c.json', *word.split()]) is None:
            assert '\0' not in f'{values.get("data_dir")} {values.get("device")}', 'no folder has such a name'


@bounded
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'[' * 100000)
@example(b'\xff\xfe')
def test_files_of_any_bytes(tmp_path_factory, content):
    """As config.json, as meta.json and as a checkpoint."""
    folder = tmp_path_factory.mktemp('any')
    for name in ('meta.json', 'ckpt_last.pt'):
        (folder / name).write_bytes(content)
    assert 'is damaged' in refused(prepare_data.load, folder)
    assert 'is damaged' in refused(common.load_checkpoint, folder / 'ckpt_last.pt')
    refused(common.read_config, folder / 'meta.json')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A data set of 200 ids, and what train.py's save() writes after a step, as a dict."""
    folder = tmp_path_factory.mktemp('small')
    (folder / 'text.txt').write_bytes(bytes(range(100)) * 2)
    prepare_data.prepare('text', 'bytes', folder / 'text.txt', folder)
    run = run_on(folder / 'text')
    model, _, optimizer = script.build(run, model_nope, False)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    run.out = folder
    script.save(run, script.Progress(1, 5.0, [5.0]), model, optimizer, 'ckpt_last.pt')
    return SimpleNamespace(folder=folder, meta=run.meta, checkpoint=common.load_checkpoint(folder / 'ckpt_last.pt'))


def run_on(folder):
    """A run of the smallest model on a data set."""
    config = model_nope.Config(vocab_size=0, block_size=4, n_layer=1, n_head=1, n_embd=4)
    run = script.Run(script.Settings(model='nope'), config, *prepare_data.load(folder))
    script.fit_to_data(run)
    return run


def put(tree, path, value):
    """A copy of nested dicts and lists with `value` at the place that the numbers of `path` lead to."""
    tree = copy.deepcopy(tree)
    branch = tree
    while True:
        keys = list(branch) if isinstance(branch, dict) else range(len(branch))
        key = keys[path[0] % len(keys)]
        path = path[1:]
        if not path or not isinstance(branch[key], (dict, list)) or not branch[key]:
            branch[key] = value
            return tree
        branch = branch[key]


PATHS = st.lists(st.integers(0, 20), min_size=1, max_size=4)


@bounded
@given(PATHS, JSON)
def test_meta(small, path, value):
    """Any value in place of any of its values."""
    (small.folder / 'text/meta.json').write_text(json.dumps(put(small.meta, path, value)), encoding='utf-8')
    said = refused(run_on, small.folder / 'text')
    assert said is None or len(said.split()) > 2


def go_on(folder, meta):
    """What train.py --resume and sample.py do with a checkpoint."""
    run = run_on(folder / 'text')
    checkpoint = common.load_checkpoint(folder / 'bad' / 'ckpt_last.pt')
    model, _, optimizer = script.build(run, model_nope, False)
    run.out = folder / 'bad'
    script.restore(run, checkpoint, model, optimizer)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()


JUNK = (JSON.filter(lambda value: not isinstance(value, int) or abs(value) < 300)
        | st.sampled_from([torch.zeros(3), torch.zeros(()), torch.zeros(2, 2), {}, [], math.nan, 0, {5: 1}]))


@bounded
@given(PATHS, JUNK)
@example([3, 4], 0)
@example([8, 0, 0], {})
def test_checkpoints(small, path, value):
    (small.folder / 'text/meta.json').write_text(json.dumps(small.meta), encoding='utf-8')
    (small.folder / 'bad').mkdir(exist_ok=True)
    torch.save(put(small.checkpoint, path, value), small.folder / 'bad/ckpt_last.pt')
    refused(go_on, small.folder, small.meta)
    refused(sample.load_run, small.folder / 'bad')


@bounded
@given(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=3))
def test_checkpoints_with_wrong_bytes(small, place, content):
    (small.folder / 'text/meta.json').write_text(json.dumps(small.meta), encoding='utf-8')
    (small.folder / 'bad').mkdir(exist_ok=True)
    data = bytearray((small.folder / 'ckpt_last.pt').read_bytes())
    start = int(place * len(data))
    data[start:start + len(content)] = content
    (small.folder / 'bad/ckpt_last.pt').write_bytes(data)
    refused(go_on, small.folder, small.meta)
    refused(sample.load_run, small.folder / 'bad')


@bounded
@given(st.binary(max_size=40))
def test_ids_of_any_bytes(small, content):
    (small.folder / 'text/meta.json').write_text(json.dumps(small.meta), encoding='utf-8')
    good = (small.folder / 'text/val.bin').read_bytes()
    (small.folder / 'text/val.bin').write_bytes(content)
    try:
        assert content == good or 'val.bin' in refused(run_on, small.folder / 'text')
    finally:
        (small.folder / 'text/val.bin').write_bytes(good)
