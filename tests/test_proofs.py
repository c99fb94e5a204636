"""test_equivalence.py as a script: it finds a reader's model files, shows what fails and where, and goes on."""
import re
import shutil
import sys

import pytest
import torch

from conftest import BASELINES, REPO, run_here

EQUATION = '''
from model_nope import Attention, Config, Model, math, torch

def equation(attention, x):
    B, T, C = x.shape
    n = attention.n_head
    q, k, v = [part.view(B, T, n, C // n).transpose(1, 2) for part in attention.c_attn(x).split(C, 2)]
    y = torch.zeros_like(q)
    for i in range(T):
        seen = slice(0, i + 1 if attention.causal else T)
        scores = (q[:, :, i, None] * k[:, :, seen]).sum(-1) / math.sqrt(C // n)  # (B, nh, seen)
        y[:, :, i] = (scores.softmax(-1)[..., None] * v[:, :, seen]).sum(2)
    return attention.c_proj(y.transpose(1, 2).reshape(B, T, C))
'''
ABSOLUTE = '''
import dataclasses
import model_nope
from model_nope import Config

class Model(model_nope.Model):
    def __init__(self, config):
        super().__init__(dataclasses.replace(config, absolute=True))
'''
CRASH = '''
import model_nope
from model_nope import Config

class Model(model_nope.Model):
    def hidden(self, idx, valid=None, state=None):
        if valid is not None:
            raise RuntimeError('no padding, please')
        return super().hidden(idx, valid, state)
'''
ALIBI = (REPO / 'baselines' / 'model_alibi.py').read_text(encoding='utf-8')  # the worked example of the README
FILES = {
    'model_example.py': ALIBI,
    'model_flipped.py': ALIBI.replace('bias = (-slopes', 'bias = (slopes'),
    'model_right.py': EQUATION,
    'baselines/model_wrong.py': EQUATION.replace('/ math.sqrt', '* math.sqrt'),
    'model_silent.py': 'from model_nope import Config, Model\n',
    'model_absolute.py': 'RELATIVE = False\n' + ABSOLUTE,
    'model_undeclared.py': ABSOLUTE,
    'model_crash.py': CRASH,
    'model_typo.py': 'class Model(\n',
}


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    """book(*words) -> exit status, rows that start with a text, stderr; in a folder with the model files above."""
    folder = tmp_path_factory.mktemp('book')
    (folder / 'baselines').mkdir()
    for path in [*REPO.glob('model_*.py'), REPO / 'test_equivalence.py']:
        shutil.copy(path, folder)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding='utf-8')

    def run(*words):
        out, err, code = run_here(folder / 'test_equivalence.py', words, folder, {})
        return code, [line.strip() for line in out.splitlines()], err
    return run


def verdicts(lines):
    """{row: PASS or FAIL}"""
    return {re.split(r'\s{2,}\d', line)[0]: line.split()[-1] for line in lines if line.endswith(('PASS', 'FAIL'))}


def test_a_new_file_is_found_and_compared_with_its_equation(book):
    code, lines, _ = book('right', 'wrong', 'silent', 'absolute', 'undeclared')
    rows = verdicts(lines)
    failed = {row for row, verdict in rows.items() if verdict == 'FAIL'}
    wrong = 'Attention of model_wrong.py = its equation(attention, x)'
    moved = {'logits of a moved text = those at the start', 'padding on the left = no padding'}
    assert code == 1 and failed == {wrong, *moved}
    assert rows['Attention of model_right.py = its equation(attention, x)'] == 'PASS'
    assert 'model_silent.py has no equation(attention, x): the rows above cannot see a wrong formula' in lines
    cases = [line.split('  ')[0] for line in lines if line.startswith('failed: ')]
    assert 'failed: undeclared, moved by 4' in cases, 'absolute positions that the file does not declare'
    assert rows['not relative: moving a text changes its logits'] == 'PASS', 'those that it declares'
    assert not any(case.startswith(('failed: absolute', 'failed: right', 'failed: silent')) for case in cases)


def test_the_worked_example(book):
    """A flipped sign in ALiBi passes every general row; the equation in its file sees it."""
    code, lines, _ = book('example')
    assert code == 0 and verdicts(lines)['Attention of model_example.py = its equation(attention, x)'] == 'PASS', lines
    code, lines, _ = book('flipped')
    failed = [row for row, verdict in verdicts(lines).items() if verdict == 'FAIL']
    assert code == 1 and failed == ['Attention of model_flipped.py = its equation(attention, x)']


def test_a_crash_is_a_red_row_and_the_book_goes_on(book):
    code, lines, stderr = book('crash')
    assert code == 1 and not stderr
    red = [line for line in lines if line.endswith('FAIL')]
    text = r'model_crash.py, line \d+: RuntimeError: no padding, please .* inf '
    assert red and all(re.match(text, row) for row in red)
    assert verdicts(lines)['beyond block_size: the beginning = the beginning alone'] == 'PASS'
    code, lines, stderr = book('typo', '--first')
    assert code == 1 and not stderr and sum(line.endswith('FAIL') for line in lines) == 1
    assert any('SyntaxError' in line and line.endswith('FAIL') for line in lines)


def test_rows_of_one_model(book):
    code, lines, _ = book('conv', '--all')
    text = '\n'.join(lines)
    assert code == 0 and 'Convolutions before' in text and 'What every model promises' in text
    assert 'Kernelized' not in text and 'model_composite' not in text and 'nope' not in text
    assert re.search(r'model_conv, both sides, 301 tokens, kernel of 17, batch of 2 +\d', text), 'no cases under --all'


def test_an_unknown_model_is_refused(book):
    code, lines, stderr = book('conv', 'rope')
    assert code == 2 and not lines
    assert stderr.count('\n') == 1 and "no model 'rope'; choose from absolute, composite, conv, crash" in stderr


def test_missing_baselines_are_named(monkeypatch, capsys):
    """Chapter 6 of the whole book without the folder baselines/: it says what it does not check, and exits with 0."""
    import test_equivalence as proofs
    tests = {name: value for name, value in vars(proofs).items() if name.startswith('test_')}
    for name in [name for name, test in tests.items() if test.chapter != 6]:
        monkeypatch.delattr(proofs, name)
    monkeypatch.setattr(proofs, 'FILES', ['nope'])
    monkeypatch.setattr(proofs, 'CHOSEN', ['nope'])
    monkeypatch.setattr(sys, 'argv', ['test_equivalence.py'])
    assert proofs.main() == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name in BASELINES:
        assert f'not checked: model_{name}.py is not here' in lines
    assert '0 rows, 5 cases, 0 rows failed' in lines


@pytest.mark.parametrize('claim', ['models_in_bfloat16', 'compiled_training_steps', 'one_of_many_processes'])
def test_the_chapter_for_gpus_runs_on_a_cpu(monkeypatch, claim):
    """What a GPU will run, with a compiler that makes no code: it does not fail for a reason of its own."""
    import test_equivalence as proofs
    monkeypatch.setattr(proofs, 'DEVICE', 'cpu')
    monkeypatch.setattr(proofs, 'COMPILER', 'aot_eager')
    monkeypatch.setattr(proofs, 'CHOSEN', ['nope'])
    monkeypatch.setattr(proofs, 'SIDES', proofs.SIDES[:1])
    vars(proofs)[f'test_{claim}']()  # raises if a case fails
    cases = dict(models_in_bfloat16=4, compiled_training_steps=3, one_of_many_processes=1)
    assert len(proofs.CASES) == cases[claim] and all(case.badness < 0.5 for case in proofs.CASES)


@pytest.mark.parametrize('causal', [True, False])
def test_chunks_compiled(causal):
    """Compiled, attend_chunked makes its weights again in the backward pass: the same value and gradients."""
    from model_kernelized import attend_chunked
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = [torch.rand(2, 2, 200, 8, dtype=torch.float64).requires_grad_() for _ in range(3)]
    inputs.append(torch.randn(2, 41, dtype=torch.float64, requires_grad=True))
    found = []
    for form in (attend_chunked, torch.compile(attend_chunked, dynamic=False, backend='aot_eager', fullgraph=True)):
        y = form(*inputs, causal)
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(found[1], found[0])


def test_the_chapter_for_gpus_sees_a_wrong_compiler(monkeypatch):
    """A compiler that makes the loss a tenth smaller."""
    import test_equivalence as proofs
    monkeypatch.setattr(proofs, 'DEVICE', 'cpu')
    monkeypatch.setattr(proofs, 'CHOSEN', ['nope'])
    monkeypatch.setattr(proofs, 'SIDES', proofs.SIDES[:1])

    def wrong(graph, _):
        return lambda *inputs: [y * 0.9 if y.dim() == 0 else y for y in graph(*inputs)]
    monkeypatch.setattr(proofs, 'COMPILER', wrong)
    with pytest.raises(AssertionError, match='float32, compiled = float32, not compiled'):
        proofs.test_compiled_training_steps()
