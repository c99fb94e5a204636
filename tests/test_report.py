"""test_equivalence.py as a script: it finds a reader's model files, shows what fails and where, and goes on."""
import re
import shutil

import pytest

from conftest import REPO, run_here

ALIBI = (REPO / 'baselines' / 'model_alibi.py').read_text(encoding='utf-8')  # the example of its docstring
ABSOLUTE = '''
import dataclasses
import model_nope
from model_nope import Config

class Model(model_nope.Model):
    def __init__(self, config):
        super().__init__(dataclasses.replace(config, absolute=True))
        self.config = config
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
FILES = {
    'model_example.py': ALIBI,
    'baselines/model_flipped.py': ALIBI.replace('bias = (-slopes', 'bias = (slopes'),
    'model_silent.py': 'from model_nope import Config, Model\n',
    'model_absolute.py': 'RELATIVE = False\n' + ABSOLUTE,
    'model_undeclared.py': ABSOLUTE,
    'model_crash.py': CRASH,
    'model_typo.py': 'class Model(\n',
}


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """report(*words) -> exit status, lines, stderr; in a folder with the model files above."""
    folder = tmp_path_factory.mktemp('report')
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
    """{check: PASS or FAIL}"""
    return {re.split(r'\s{2,}\d', line)[0]: line.split()[-1] for line in lines if line.endswith(('PASS', 'FAIL'))}


def test_a_new_file_is_found(report):
    """A flipped sign in ALiBi passes every guarantee; the equation in its file shows it."""
    code, lines, _ = report('example')
    assert code == 0 and verdicts(lines)['layer = its equation'] == 'PASS' and 'Relative positions are' not in lines
    code, lines, _ = report('flipped')
    assert code == 1 and [check for check, v in verdicts(lines).items() if v == 'FAIL'] == ['layer = its equation']


def test_absolute_positions_are_declared(report):
    code, lines, _ = report('silent', 'absolute')
    checks = verdicts(lines)
    assert code == 0 and checks['absolute: shifting a sequence changes its logits'] == 'PASS'
    assert 'model_silent.py has no equation(attention, x): the other checks cannot see a wrong formula' in lines
    code, lines, _ = report('undeclared')
    failed = [check for check, v in verdicts(lines).items() if v == 'FAIL']
    assert code == 1 and 'logits of a shifted sequence = those at the start' in failed


def test_a_crash_is_a_failed_check_and_the_report_goes_on(report):
    code, lines, stderr = report('crash')
    failed = [line for line in lines if line.endswith('FAIL')]
    assert code == 1 and not stderr and failed
    assert all(re.match(r'model_crash.py, line \d+: RuntimeError: no padding, please .* inf ', line) for line in failed)
    assert verdicts(lines)['beyond block_size: the beginning = the beginning alone'] == 'PASS'
    code, lines, stderr = report('typo', '--first')
    assert code == 1 and not stderr and sum(line.endswith('FAIL') for line in lines) == 1
    assert any('SyntaxError' in line and line.endswith('FAIL') for line in lines)


def test_checks_of_one_model(report):
    code, lines, _ = report('conv', '--all')
    text = '\n'.join(lines)
    assert code == 0 and 'banded Toeplitz' in text and 'What every model file guarantees' in text
    assert 'Kernelized' not in text and 'model_composite' not in text
    assert re.search(r'not causal, 11 tokens, kernel of 17 +\d', text), 'no cases with --all'
    code, lines, stderr = report('conv', 'rope')
    assert code == 2 and not lines
    assert stderr.count('\n') == 1 and "no model 'rope'; choose from absolute, composite, conv, crash" in stderr
