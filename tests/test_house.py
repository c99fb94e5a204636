"""The rules of this repository: the model files share one text outside their scheme; the README's commands are real."""
import ast
import dataclasses
import difflib
import importlib
import re
import subprocess
import sys

import pytest
import torch

import train
from conftest import BASELINES, MODELS, REPO


def parts(name):
    """Source text of each top-level class and function of a model file, its syntax tree, and its whole text."""
    folder = REPO / 'baselines' if name in BASELINES else REPO
    source = (folder / f'model_{name}.py').read_text(encoding='utf-8')
    tree = ast.parse(source)
    named = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return {n.name: ast.get_source_segment(source, n) for n in named}, tree, source


@pytest.mark.parametrize('name', MODELS)
def test_skeleton_is_one_text(name):
    ours, _, source = parts(name)
    theirs, _, control = parts('nope')
    assert ours['Config'].startswith(theirs['Config']), 'the shared fields of Config come first, word for word'
    skeleton = control[control.index('class MLP'):]  # MLP, Block, Model
    assert skeleton in source, f'MLP, Block and Model of model_{name}.py are not the text of model_nope.py'
    for other in MODELS:
        for shared in set(ours) & set(parts(other)[0]) - {'Config', 'Attention'}:
            both = ours[shared], parts(other)[0][shared]
            assert both[0] == both[1] or shared in OWN, f'{shared} of {name} and {other}: the same name, another text'


OWN = ['attend_dense']  # composite and kernelized attention each have their plain form, under one name
RULE = '# ' + '-' * 117 + '\n# The paper ends here. What follows makes it fast: '
ABOVE = {'nope': 178, 'composite': 260, 'conv': 320, 'kernelized': 340}  # lines of the paper, before the ruled line


@pytest.mark.parametrize('name', MODELS)
def test_model_file_is_self_contained_and_in_order(name):
    """The paper first, then a ruled line, then what makes it fast. Nothing is imported from the project."""
    _, tree, source = parts(name)
    paper, _, fast = source.partition(RULE)
    assert ast.get_docstring(tree) and len(paper.splitlines()) <= ABOVE[name], len(paper.splitlines())
    imported = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= {'math', 'dataclasses', 'typing', 'torch'}, f'a model file imports only torch: {imported}'
    order = [n.name for n in ast.parse(paper).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    assert order[0] == 'Config' and 'visible' in order[1:4] and order[-4:] == ['Attention', 'MLP', 'Block', 'Model']
    assert (name == 'nope') == (fast == ''), 'a fast form stands below the ruled line'
    for n in tree.body:
        assert not isinstance(n, ast.FunctionDef) or ast.get_docstring(n), f'{n.name} has no docstring'


def code_lines(name):
    """The lines of a model file without docstrings and blank lines."""
    _, tree, source = parts(name)
    prose = set()
    for n in ast.walk(tree):
        if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(n):
            prose |= set(range(n.body[0].lineno, n.body[0].end_lineno + 1))
    return [line for i, line in enumerate(source.splitlines(), 1) if line.strip() and i not in prose]


@pytest.mark.parametrize('name', BASELINES)
def test_baseline_is_nope_and_a_few_lines(name):
    """At most 25 lines of code that model_nope.py has not, and at most 25 of its lines that are gone."""
    ours, tree, source = parts(name)
    control, _, theirs = parts('nope')
    changes = list(difflib.ndiff(code_lines('nope'), code_lines(name)))
    for sign in '+-':
        changed = [line for line in changes if line.startswith(sign)]
        assert len(changed) <= 25, '\n'.join(changed)
    for shared in ('visible', 'MLP', 'Block', 'Attention' if name == 'cape' else 'Model'):
        assert ours[shared] == control[shared], f'{shared} of model_{name}.py is not the text of model_nope.py'
    assert ours['Config'].startswith(control['Config']) and list(ours)[-4:] == ['Attention', 'MLP', 'Block', 'Model']
    assert source.split('"""')[2].startswith(theirs.split('"""')[2].split('@dataclass')[0]), 'the imports'
    for n in tree.body:
        assert not isinstance(n, ast.FunctionDef) or ast.get_docstring(n), f'{n.name} has no docstring'


@pytest.mark.parametrize('name, fields, message', [
    ('rope', dict(n_embd=12), 'even number of channels, not 3'),
    ('tisa', dict(n_bumps=0), 'n_bumps must be 1 or more, not 0'),
    ('cape', dict(n_embd=15, n_head=3), 'n_embd must be even, .* not 15'),
    ('cape', dict(max_scale=0.9), 'max_shift must be 0 or more, max_scale 1 or more'),
    ('cape', dict(max_shift=-1.0), 'max_shift must be 0 or more, max_scale 1 or more'),
], ids=str)
def test_baselines_refuse_in_words(name, fields, message):
    module = importlib.import_module(f'model_{name}')
    with pytest.raises(ValueError, match=message):
        module.Model(module.Config(**fields))


def our_files(*kinds):
    """The files of this repository that git tracks: a reader's own files need not follow these rules."""
    listed = subprocess.run(['git', 'ls-files'], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git repository: which files are ours is not known')
    return [REPO / name for name in listed.stdout.splitlines() if name.endswith(kinds) and (REPO / name).is_file()]


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


@pytest.mark.parametrize('name', MODELS + BASELINES)
def test_contract_of_a_model_file(name):
    """Design of the shared interface: fields, shapes, parameter names."""
    module = importlib.import_module(f'model_{name}')
    fields = [f.name for f in dataclasses.fields(module.Config)]
    shared = 'vocab_size block_size n_layer n_head n_embd dropout bias causal absolute init_std scale_residual_init'
    assert fields[:11] == shared.split()
    for causal in (True, False):
        model = module.Model(module.Config(causal=causal, bias=True, dropout=0.1))
        idx = torch.randint(256, (2, 40))
        logits, loss = model(idx, idx.roll(1, 1))
        assert logits.shape == (2, 40, 256) and loss.shape == () and 5 < loss.item() < 7
        assert model(idx)[1] is None and model.hidden(idx).shape == (2, 40, 128)
        assert model(idx, where=idx[:, :3] % 40)[0].shape == (2, 3, 256)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), 'without a gradient, several processes would hang'
        attention = model.h[0].attn
        assert attention.c_attn.weight.shape == (3 * 128, 128) and attention.c_proj.weight.shape == (128, 128)
    with pytest.raises(ValueError, match='multiple of n_head'):
        module.Model(module.Config(n_head=3))
    with pytest.raises(ValueError, match='needs causal'):
        model(idx, state=model.new_state())
    model = module.Model(module.Config(absolute=True, block_size=16))
    with pytest.raises(ValueError, match='block_size=16, not at 17'):
        model(idx[:, :17])


@pytest.mark.parametrize('name', MODELS + BASELINES)
def test_initialisation(name):
    module = importlib.import_module(f'model_{name}')
    for scaled in (True, False):
        model = module.Model(module.Config(n_layer=8, init_std=0.05, scale_residual_init=scaled))
        for weight in (model.wte.weight, model.h[3].attn.c_attn.weight):
            assert abs(weight.std().item() - 0.05) < 0.002
        expected = 0.05 / 4 if scaled else 0.05
        for block in model.h:
            assert abs(block.attn.c_proj.weight.std().item() / expected - 1) < 0.05
            assert abs(block.mlp.c_proj.weight.std().item() / expected - 1) < 0.05


def uniform(kernel):
    """Whether the entries may be uniform in +-1/sqrt(17)."""
    a = 17 ** -0.5
    return kernel.abs().max() <= a and abs(kernel.std().item() / (a / 3 ** 0.5) - 1) < 0.05


def test_initialisation_of_kernels():
    """Chang et al.'s code: fixed kernels start at zero, all others uniform in +-1/sqrt(width)."""
    module = importlib.import_module('model_conv')
    att = module.Model(module.Config(queries_keys=True, values=True, n_embd=512)).h[0].attn
    assert (att.lightweight == 0).all() and att.lightweight.shape == (4, 17)
    assert att.dynamic.shape == (17, 128) and uniform(att.dynamic)
    for kernel in (att.conv_q, att.conv_k, att.conv_v, att.conv_out):
        assert kernel.shape == (512, 17) and uniform(kernel)
    att = importlib.import_module('model_composite').Config(dynamic_key=True, n_embd=512)
    att = importlib.import_module('model_composite').Model(att).h[0].attn
    assert (att.fixed == 0).all() and att.fixed.shape == (4, 17)
    for kernel in (att.dynamic, att.dynamic_key):
        assert kernel.shape == (17, 128) and uniform(kernel)


@pytest.mark.parametrize('name', MODELS + BASELINES)
def test_dropout(name):
    """On the embedding and on both branches, in training alone."""
    module = importlib.import_module(f'model_{name}')
    model, idx = module.Model(module.Config(dropout=1.0)), torch.randint(256, (2, 9))
    x = torch.randn(2, 9, 128)
    assert torch.equal(model.h[0](x), x) and (model.hidden(idx) == 0).all(), 'all dropped: nothing is added to x'
    model.eval()
    assert not torch.equal(model.h[0](x), x) and torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    for drop in (model.drop, model.h[0].drop):
        drop.p = 0.5
    assert not torch.equal(model.h[0](x), model.h[0](x))


def readme_commands():
    """What both READMEs show, in code blocks and within lines, that runs one of our scripts."""
    text = ''.join((REPO / folder / 'README.md').read_text(encoding='utf-8') for folder in ('.', 'experiments'))
    blocks = re.findall(r'^```sh\n(.*?)^```', text, re.S | re.M) + re.findall(r'`(python [^`\n]+)`', text)
    for block in blocks:
        for line in block.replace('\\\n', ' ').splitlines():
            for command in line.split('#')[0].split('&&'):
                if match := re.search(r'(train|prepare_data|sample|test_equivalence|experiments/\w+)\.py(.*)', command):
                    yield match[1], match[2].split()


def test_readme_commands_parse(run, monkeypatch, tmp_path):
    commands = list(readme_commands())
    assert len(commands) > 8 and {'train', 'sample', 'prepare_data', 'test_equivalence'} <= {c for c, _ in commands}
    usage = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out/composite-causal-python').mkdir(parents=True)
    (tmp_path / 'out/composite-causal-python/config.json').write_text('{"model": "composite"}')
    (tmp_path / 'out/composite-causal-python/ckpt_last.pt').touch()
    for script, words in commands:
        words = [w.strip('"\'') for w in words]
        if '--train' in words:  # compare.py hands the rest to train.py
            train.resolve(['--model', 'nope', *words[words.index('--train') + 1:]])
            words = words[:words.index('--train')]
        if script == 'train':
            if '--model' in words and not (REPO / f'model_{words[words.index("--model") + 1]}.py').exists():
                assert words[words.index('--model') + 1] == 'mine', words
                continue
            train.resolve([w for w in words if w != '--help'])
        else:
            if script not in usage:
                usage[script] = run(f'{script}.py', '--help').out
            for word in words:
                assert not word.startswith('--') or word in usage[script], f'{script}.py has no {word}'


def test_train_needs_torch_and_numpy_only():
    """What train.py imports when it starts; the rest is imported where it is used."""
    names = set()
    for file in ('train.py', 'common.py', 'prepare_data.py'):
        tree = ast.parse((REPO / file).read_text(encoding='utf-8'))
        names |= {a.name.split('.')[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module.split('.')[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {'torch', 'numpy', 'common', 'prepare_data'}


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        train.resolve(['--model', 'composite', '--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    config = importlib.import_module('model_composite').Config
    fields = [*dataclasses.fields(train.Settings), *dataclasses.fields(config)]
    notes = re.split(r'\n  --', text[text.index('options:'):])
    for f in fields:
        note = next(n for n in notes if re.match(rf'{f.name}\b', n))
        assert '(default' in note and len(note.split()) >= 5, f'--{f.name} has no help: {note}'
