"""The repository as a whole: sizes, imports, and commands of the README files that exist."""
import ast
import dataclasses
import importlib
import re
import subprocess
import sys

import pytest

import train
from conftest import REPO

SCRIPTS = 'model_nope model_composite model_conv model_kernelized train prepare_data sample test_equivalence'.split()
LIMITS = {'train.py': 640, 'prepare_data.py': 330, 'sample.py': 180, 'test_equivalence.py': 680, 'README.md': 140,
          'experiments/README.md': 450}  # lines; the model files: test_models.py


def lines(*paths):
    return sum(len(path.read_text(encoding='utf-8').splitlines()) for path in paths)


def our_files(*kinds):
    """The files of this repository that git tracks: a reader's own files need not follow these rules."""
    listed = subprocess.run(['git', 'ls-files'], cwd=REPO, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip('not a git repository')
    return [REPO / name for name in listed.stdout.splitlines() if name.endswith(kinds) and (REPO / name).is_file()]


def test_sizes():
    """Small is part of the purpose: a reader opens one model file and one training script."""
    top = [REPO / f'{name}.py' for name in SCRIPTS]
    assert {path.name for path in our_files('.py') if path.parent == REPO} == {path.name for path in top}
    assert lines(*top) <= 3100 and sum(len(path.read_text(encoding='utf-8')) for path in top) <= 170_000
    for name, limit in LIMITS.items():
        assert lines(REPO / name) <= limit, name
    for folder in ('experiments', 'tests'):
        assert lines(*[path for path in our_files('.py') if path.parent.name == folder]) <= 3600, folder


def test_lines_and_functions_are_short():
    """At most 120 columns in every file of code, at most 60 lines in every function outside the tests."""
    wide = []
    tall = []
    for path in our_files('.py', '.sh'):
        text = path.read_text(encoding='utf-8')
        wide += [f'{path.name}:{n}' for n, line in enumerate(text.splitlines(), 1) if len(line) > 120]
        if path.suffix == '.py' and path.parent.name != 'tests':
            functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
            tall += [f'{path.name}: {n.name}' for n in functions if n.end_lineno - n.lineno >= 60]
    assert not wide and not tall, (wide, tall)


def readme_commands():
    """(script, its words) of each command in both README files that runs one of our scripts."""
    text = ''.join((REPO / folder / 'README.md').read_text(encoding='utf-8') for folder in ('.', 'experiments'))
    blocks = re.findall(r'^```sh\n(.*?)^```', text, re.S | re.M) + re.findall(r'`(python [^`\n]+)`', text)
    for block in blocks:
        for line in block.replace('\\\n', ' ').splitlines():
            for command in line.split('#')[0].split('&&'):
                if match := re.search(r'(train|prepare_data|sample|test_equivalence|experiments/\w+)\.py(.*)', command):
                    yield match[1], match[2].split()


def test_readme_commands_parse(run, monkeypatch, tmp_path):
    """Every script exists, every flag exists; the flags of train.py have values that it accepts."""
    commands = list(readme_commands())
    assert len(commands) > 8 and {'train', 'sample', 'prepare_data', 'test_equivalence'} <= {c for c, _ in commands}
    usage = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out/composite-causal-shakespeare').mkdir(parents=True)
    (tmp_path / 'out/composite-causal-shakespeare/config.json').write_text('{"model": "composite"}')
    (tmp_path / 'out/composite-causal-shakespeare/ckpt_last.pt').touch()
    for script, words in commands:
        words = [w.strip('"\'') for w in words]
        if '--train' in words:  # compare.py hands the rest to train.py
            train.resolve(['--model', 'nope', *words[words.index('--train') + 1:]])
            words = words[:words.index('--train')]
        if script == 'train':
            if 'mine' not in words:
                train.resolve([w for w in words if w != '--help'])
            continue
        if script not in usage:
            usage[script] = run(f'{script}.py', '--help').out
        for word in words:
            assert not word.startswith('--') or word in usage[script], f'{script}.py has no {word}'


def test_train_needs_torch_and_numpy_only():
    """What train.py imports when it starts; the rest is imported where it is used."""
    names = set()
    for file in ('train.py', 'prepare_data.py'):
        tree = ast.parse((REPO / file).read_text(encoding='utf-8'))
        names |= {a.name.split('.')[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module.split('.')[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {'torch', 'numpy', 'prepare_data'}


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        train.resolve(['--model', 'composite', '--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    config = importlib.import_module('model_composite').Config
    notes = re.split(r'\n  --', text[text.index('options:'):])
    for f in [*dataclasses.fields(train.Settings), *dataclasses.fields(config)]:
        note = next(n for n in notes if re.match(rf'{f.name}\b|\[no-\]{f.name}\b|{f.name},', n))
        assert '(default' in note and len(note.split()) >= 5, f'--{f.name} has no help: {note}'
