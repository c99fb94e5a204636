"""The experiments run, at a setting far too small to mean anything."""
import csv
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model_kernelized
import train as train_py
from conftest import CORPORA, REPO, TINY

sys.path.insert(0, str(REPO / 'experiments'))
import compare  # noqa: E402
import convert  # noqa: E402
import extrapolate  # noqa: E402
import lib  # noqa: E402
import stability  # noqa: E402


def test_compare(run, data_dir):
    """A table row and a curve for each scheme and seed; what is trained is not trained again."""
    words = ['experiments/compare.py', '--schemes', 'nope', 'conv-all', '--objectives', 'causal', '--seeds', 2, '--dataset', 'code', '--results', 'results',
             '--train', '--data_dir', data_dir, *TINY, '--max_iters', 3, '--eval_interval', 2]
    words[1:1] = ['--against', 'nope']
    first = run(*words).out
    assert '| causal | conv-all | ' in first.split('more than nope')[1] and first.split('more than nope')[1].count('| causal |') == 1
    assert first.count('causal nope seed') == first.count('causal conv-all seed') == 2 and first.count('| causal |') == 3
    table = list((run.folder / 'results').glob('*.csv'))[0]
    rows = list(lib.read_csv(table))
    assert [int(r['step']) for r in rows] == [0, 2, 3] * 4 and all(4 < float(r['val_loss']) < 6 for r in rows)
    assert list((run.folder / 'results').glob('*.png'))[0].read_bytes()[:4] == b'\x89PNG'
    made = {p: p.stat().st_mtime for p in (run.folder / 'out/compare').glob('*/ckpt_last.pt')}
    assert len(made) == 4 and run(*words).out == first and made == {p: p.stat().st_mtime for p in made}


def test_schemes(monkeypatch, tmp_path):
    """Every scheme is a model of its own, and has a colour of its own."""
    monkeypatch.chdir(tmp_path)
    known = [str(train_py.resolve(words)[1:3]) for words in compare.SCHEMES.values()]
    assert len(set(known)) == len(known) == len(set(compare.COLORS.values())) and list(compare.COLORS) == list(compare.SCHEMES)


def test_p_value():
    """Against closed forms: two seeds (Cauchy), three seeds, and a value of the tables (n = 9: t = 2.306 is p = .05)."""
    assert compare.p_value([1., 3.]) == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-6)
    d = [0.2, 0.5, 0.9]
    t = sum(d) / 3 / np.std(d, ddof=1) * 3 ** 0.5
    assert compare.p_value(d) == compare.p_value([-x for x in d]) == pytest.approx(1 - t / (t * t + 2) ** 0.5, abs=1e-6)
    x = np.arange(9.) - 4
    assert compare.p_value(list(x + 2.306 * x.std(ddof=1) / 3)) == pytest.approx(0.05, abs=1e-4)


def test_short_names(capsys):
    assert lib.short_names(['out/compare/x-1-causal-nope-1', 'out/compare/x-1-causal-nope-2', 'out/nope-causal-python']) == ['nope-1', 'nope-2', 'nope-causal-python']
    with pytest.raises(SystemExit):
        lib.short_names(['out/compare/x-causal-nope-1', 'out/compare/y-causal-nope-1'])
    assert capsys.readouterr().err.endswith('2 are called nope-1\n')


@pytest.mark.skipif(not (CORPORA / 'tiktoken_cache').is_dir(), reason=f'no tiktoken cache in {CORPORA} (set CORPORA)')
def test_prepare_speed(run):
    run('experiments/prepare_speed.py', '--path', CORPORA / 'shakespeare.txt', '--megabytes', 3, TIKTOKEN_CACHE_DIR=str(CORPORA / 'tiktoken_cache'))
    assert 'prepare_data.py 3 MB' in run.out and 'ratio' in run.out and 'peak memory' in run.out


def written(run, name):
    """Rows of results/<name>.csv; there is a picture beside it."""
    assert (run.folder / f'results/{name}.png').read_bytes()[:4] == b'\x89PNG'
    return list(csv.DictReader(open(run.folder / f'results/{name}.csv')))


def test_kernels(train):
    train.train('--model', 'composite', '--max_iters', 2, '--out_dir', 'a')
    checkpoint = torch.load(train.folder / 'a/ckpt_best.pt')
    checkpoint['model']['h.1.attn.fixed'][0, 8 - 3] = 9.0  # layer 2, head 1 looks three tokens back
    torch.save(checkpoint, train.folder / 'a/ckpt_best.pt')
    train('experiments/kernels.py', '--out_dir', 'a', '--tokens', 256, '--data_dir', train.words[1], '--results', 'results')
    rows = written(train, 'kernels-a-causal-code')
    assert {r['kind'] for r in rows} == {'fixed', 'dynamic: mean', 'dynamic: spread'} and len(rows) == 3 * 2 * 2 * 9
    assert {int(r['offset']) for r in rows} == set(range(-8, 1)), 'a causal model sees no offset above 0'
    top = max((r for r in rows if r['kind'] == 'fixed'), key=lambda r: float(r['value']))
    assert (top['row'], top['offset']) == ('layer 2, head 1', '-3')
    train.train('--model', 'conv', '--objective', 'masked', '--max_iters', 2, '--lightweight', '--output', '--out_dir', 'b')
    train('experiments/kernels.py', '--out_dir', 'b', '--tokens', 256, '--data_dir', train.words[1], '--results', 'results')
    rows = written(train, 'kernels-b-masked-code')
    assert len([r for r in rows if r['kind'] == 'depthwise, last layer']) == 32 * 17 and len([r for r in rows if r['kind'] == 'lightweight']) == 4 * 17
    train.train('--model', 'nope', '--max_iters', 2, '--out_dir', 'c')
    train('experiments/kernels.py', '--out_dir', 'c', '--data_dir', train.words[1], code=2)
    assert train.err.splitlines()[-1].startswith('kernels.py: ') and 'no kernels' in train.err


def test_speed(run):
    run('experiments/speed.py', '--quick', '--tokens', 256, '--lengths', 64, 128, '--results', 'results')
    rows = written(run, 'speed-cpu')
    assert len(rows) == 16 and all(float(r['forward_backward_ms']) > 0 for r in rows) and 'no slower than flash' in run.out


def test_on_gpu(tmp_path):
    """Its part `steps` on a CPU, small: training steps of every model, convolutions; a log of what was printed."""
    env = {**os.environ, 'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}', 'QUICK': '--quick', 'RESULTS': str(tmp_path)}
    out = subprocess.run(['bash', REPO / 'experiments/on_gpu.sh', 'steps'], env=env, text=True, stdout=subprocess.PIPE, check=True).stdout
    rows = list(csv.DictReader(open(tmp_path / 'speed-steps-cpu.csv')))
    assert [r['model'] for r in rows] == ['nope', 'composite', 'conv', 'conv, output alone', 'kernelized'] and float(rows[0]['times_nope']) == 1
    assert out.count('| shifts |') == 1 and (tmp_path / 'steps.log').read_text() == out
    assert subprocess.run(['bash', REPO / 'experiments/on_gpu.sh', 'nothing'], env=env, stderr=subprocess.DEVNULL).returncode == 2


def test_feature_error(run):
    run('experiments/feature_error.py', '--draws', 2, '--results', 'results')
    error = {(r['features'], r['norm'], r['m']): float(r['l1_mean']) for r in written(run, 'feature_error')}
    assert len(error) == 80 and all(0 < e <= 2.01 for (kind, *_), e in error.items() if kind != 'trf')
    assert abs(error['prf', '1', '1024'] - 0.05) < 0.02 and 0.2 < error['prf', '1', '16'] < error['prf', '2', '16'] < error['prf', '8', '16']


def test_convert_and_stability(run, data_dir):
    words = ['--dataset', 'code', '--data_dir', data_dir, '--results', 'results', '--quick']
    run('experiments/convert.py', *words, '--steps', 2, '--tokens', 512)
    rows = written(run, 'convert-quick')
    assert len(rows) == 4 * (1 + 6 * 2) and all(4 < float(r['val_loss']) < 7 for r in rows)
    run('experiments/stability.py', *words, '--steps', 3)
    rows = written(run, 'stability-quick')
    assert len(rows) == 2 * 4 * 3 and {float(r['largest_qk']) for r in rows if r['model'].startswith('NPRF')} == {1.0}


@pytest.mark.parametrize('fields', convert.MODELS.values(), ids=convert.MODELS)
def test_what_convert_swaps(fields):
    """The softmax that convert.py trains with is what the features estimate: thousands of them are near it, a few are not."""
    torch.manual_seed(0)
    attention = model_kernelized.Attention(model_kernelized.Config(n_embd=64, **fields)).double()
    if attention.b is not None:
        torch.nn.init.normal_(attention.b)
    x, error = torch.randn(2, 40, 64, dtype=torch.float64), {}
    for m in (16, 2 ** 14):
        attention.w = model_kernelized.random_matrix(m, 16)
        error[m] = (attention(x) - convert.exact(attention, x)).norm() / attention(x).norm()
    assert error[2 ** 14] < 0.05 and 5 * error[2 ** 14] < error[16], error


def test_what_stability_watches():
    torch.manual_seed(0)
    model = model_kernelized.Model(model_kernelized.Config(normalize=False, n_layer=1, init_std=0.2))
    idx, seen = torch.randint(256, (3, 20)), stability.watch(model)
    model(idx)
    q, k, _ = model.h[0].attn.c_attn(model.h[0].ln_1(model.wte(idx))).view(3, 20, 3, 4, 32).unbind(2)
    q, k = q * 32 ** -0.25, k * 32 ** -0.25  # what the features are made of
    largest = max((q[..., head, :].norm(dim=-1).max() * k[..., head, :].norm(dim=-1).max()).item() for head in range(4))
    assert seen[0] == pytest.approx(largest, rel=1e-5)


def test_what_extrapolate_scores():
    """The last T tokens of each text of 8 T, with 0, T, 3 T, 7 T tokens before them."""
    torch.manual_seed(0)
    model = model_kernelized.Model(model_kernelized.Config(block_size=16, n_layer=1, init_std=0.2)).eval()
    ids = torch.randint(256, (300,))
    found = extrapolate.losses(model, ids.numpy(), 2, 'cpu')
    for times, loss in found.items():
        texts = [ids[s + 128 - 16 * times:s + 129] for s in (0, 128)]
        explicit = [F.cross_entropy(model(text[None, :-1])[0][0, -16:], text[-16:]).item() for text in texts]
        assert loss == pytest.approx(sum(explicit) / 2, rel=1e-5)
    assert len(set(found.values())) == 4


def test_extrapolate(train):
    for scheme, words in {'nope': ['nope'], 'absolute': ['nope', '--absolute'], 'nprf+rpe': ['kernelized']}.items():
        train.train('--model', *words, '--max_iters', 2, '--out_dir', f'compare/x-causal-{scheme}-1')
    train.train('--model', 'nope', '--max_iters', 2, '--seed', 2, '--out_dir', 'compare/x-causal-nope-2')
    train('experiments/extrapolate.py', *(f'compare/x-causal-{run}' for run in ('nope-1', 'nope-2', 'absolute-1', 'nprf+rpe-1')), '--quick', '--data_dir', train.words[1], '--results', 'results')
    rows = written(train, 'extrapolate-quick')
    loss = {(r['scheme'], int(r['times'])): float(r['loss']) for r in rows}
    assert len(rows) == 16 and [r['seed'] for r in rows if r['scheme'] == 'nope' and r['times'] == '8'] == ['1', '2']
    assert all(math.isnan(loss['absolute', times]) for times in (2, 4, 8))
    assert all(4 < loss[scheme, times] < 7 for scheme in ('nope', 'nprf+rpe') for times in (1, 2, 4, 8)) and 'ends at 1x' in train.out
    train.train('--model', 'nope', '--objective', 'masked', '--max_iters', 2, '--out_dir', 'm')
    train('experiments/extrapolate.py', 'm', '--data_dir', train.words[1], code=2)
    assert 'extrapolate.py: m is a masked model' in train.err
