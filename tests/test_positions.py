"""Positions without position embeddings: the variance experiment and the probe run, and say what theory says."""
import importlib
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import BASELINES, MODELS, REPO, TINY, Run

sys.path.insert(0, str(REPO / 'experiments'))
import counter  # noqa: E402
import lib  # noqa: E402
import probe_position  # noqa: E402
from attention_variance import before_training, random_model  # noqa: E402
from lib import layer_calls, read_csv  # noqa: E402
from probe_position import states  # noqa: E402

from sample import load_run  # noqa: E402


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data_dir):
    """A Run in a folder with out/a, a kernelized run of two steps, and out/first, its checkpoint of step 0."""
    run = Run(tmp_path_factory.mktemp('trained'))
    words = ['--data_dir', data_dir, '--dataset', 'code', *TINY, '--model', 'kernelized', '--seed', 5]
    run('train.py', *words, '--max_iters', 0, '--out_dir', 'out/a')
    shutil.copytree(run.folder / 'out/a', run.folder / 'out/first')
    return run('train.py', *words, '--max_iters', 2, '--out_dir', 'out/a', '--resume')


def test_variance(trained, data_dir):
    """1/m in the first layer at the paper's sigma, flat at ten times it and without a mask; runs have a panel."""
    trained('experiments/attention_variance.py', '--quick', '--n_embd', 128, '--block_size', 64, '--n_layer', 2,
            '--sequences', 8, '--vocab_size', 9984, '--device', 'cpu', '--out_dir', 'out/a', '--data_dir', data_dir,
            '--results', 'results')
    found = {}
    for r in read_csv(trained.folder / 'results/attention_variance-quick.csv'):
        found[r['what'], float(r['sigma'] or 0), int(r['layer']), int(r['m'])] = float(r['variance'])
    assert (trained.folder / 'results/attention_variance-quick.png').read_bytes()[:4] == b'\x89PNG'
    for m in (1, 8, 64):
        assert found['causal', 0.02, 1, m] * m == pytest.approx(0.0944, rel=0.3)  # (d sigma^2)^2
        assert found['no causal mask', 0.02, 1, m] * 64 == pytest.approx(0.0944, rel=0.4)
    assert found['causal', 0.02, 2, 1] < 4 * found['causal', 0.02, 2, 64], 'only the first layer falls as 1/m'
    assert found['sigmas, first layer', 0.2, 1, 1] < 2 * found['sigmas, first layer', 0.2, 1, 64]
    assert found['trained: a', 0, 2, 32] != found['before training: a', 0, 2, 32] and '| trained: a |' in trained.out


def test_a_counter_is_found():
    """Outputs of 5 - log2 m along a direction, noise across it; the first half of the texts tells the direction."""
    torch.manual_seed(0)
    y = torch.randn(200, 64, 8)
    y[..., 3] = -(5 - torch.arange(1, 65).log2())
    mean, deviation, share = counter.along_first(y)
    slope, log_fit, sqrt_fit = counter.fits(mean)
    assert mean[0] == pytest.approx(5, rel=0.05) and slope == pytest.approx(-1, rel=0.05)
    assert log_fit > 0.99 > sqrt_fit
    assert share[0] == pytest.approx(25 / 32, rel=0.05) and share[31] < 0.1, 'at m = 32 only the noise is left'
    assert deviation[31] < 0.3
    y[100:, :, 3] *= -1
    assert counter.along_first(y)[0][0] == pytest.approx(-5, rel=0.05)
    slope, log_fit, sqrt_fit = counter.fits(np.arange(1, 65) ** 0.5)
    assert slope == pytest.approx(7 / 6, rel=0.2) and log_fit < 0.95 and sqrt_fit == pytest.approx(1)


def test_counter(trained, data_dir, monkeypatch):
    """One run, all layers and positions; what it projects is the output of each layer's attention."""
    trained('experiments/counter.py', 'out/a', '--texts', 12, '--data_dir', data_dir, '--results', 'results')
    rows = read_csv(trained.folder / 'results/counter.csv')
    model, _ = load_run(trained.folder / 'out/a')
    layers, T = len(model.h), model.config.block_size
    assert [(int(r['layer']), int(r['m'])) for r in rows] == [
        (layer, m) for layer in range(1, 1 + layers) for m in range(1, 1 + T)]
    assert '| a | 2 |' in trained.out
    assert (trained.folder / 'results/counter.png').read_bytes()[:4] == b'\x89PNG'
    uses = read_csv(trained.folder / 'results/counter-use.csv')
    assert [int(r['layer']) for r in uses] == list(range(1, 1 + layers))
    val = lib.text('code', data_dir)[1]
    short = counter.windows(val, T, 12)
    long = counter.windows(val, 4 * T, 6)
    outputs = counter.attention_outputs(model, short[:6, :-1])
    long_outputs = counter.attention_outputs(model, long[:3, :-1])
    expected = counter.use(model, 1, outputs[1], short[6:], long_outputs[1], long[3:])
    assert [float(value) for value in list(uses[1].values())[2:]] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert '| a | 2 | ' + ' | '.join(f'{value:.2f}' for value in expected[:7]) + ' | ' in trained.out
    assert ' | '.join(f'{value:.1f}' for value in expected[7:]) + ' |\n' in trained.out
    told = []
    monkeypatch.setattr(counter, 'use', lambda model, layer, *given: told.append(given) or (0.0,) * 10)
    counter.measure('a', trained.folder / 'out/a', SimpleNamespace(texts=12, data_dir=data_dir))
    for y, long_y, given in zip(outputs, long_outputs, told, strict=True):
        torch.testing.assert_close(given, (y, short[6:], long_y, long[3:]))
    idx = torch.randint(256, (7, T))
    for batch in (3, 7):
        found = counter.attention_outputs(model, idx, batch)
        assert len(found) == layers
        for y, (_, own) in zip(found, layer_calls(model, idx)):
            torch.testing.assert_close(y, own)
    trained('experiments/counter.py', 'out/a', '--texts', 3, code=2)


def test_a_coordinate_is_exchanged(trained):
    """In that layer, along that direction, for that call only; its own coordinate changes nothing."""
    model, _ = load_run(trained.folder / 'out/a')
    T = model.config.block_size
    idx = torch.randint(256, (5, T + 1))
    own = counter.losses(model, idx)
    expected = torch.nn.functional.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())
    torch.testing.assert_close(own.mean(), expected)
    y = counter.attention_outputs(model, idx[:, :-1])[1]  # (5, T, C)
    direction = counter.at_first(y)
    torch.testing.assert_close(direction, y[:, 0].mean(0) / y[:, 0].mean(0).norm())
    own_again = counter.losses(model, idx[:1], 1, direction, y[0] @ direction)
    torch.testing.assert_close(own_again, counter.losses(model, idx[:1]))

    seen = []
    hook = model.h[1].ln_2.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    curve = torch.linspace(-3, 3, T)
    changed = counter.losses(model, idx, 1, direction, curve, batch=3)
    torch.testing.assert_close(counter.losses(model, idx), own)  # the next call is without it
    hook.remove()
    after = torch.cat(seen[:2]) - torch.cat(seen[2:]) + y  # what the layer added to the residual stream
    torch.testing.assert_close(after @ direction, curve.expand(5, T), atol=1e-4, rtol=1e-4)
    rest = after - (after @ direction)[..., None] * direction
    torch.testing.assert_close(rest, y - (y @ direction)[..., None] * direction, atol=1e-4, rtol=1e-4)
    assert (changed - own).abs().max() > 1e-4

    seen.clear()
    hook = model.h[1].ln_2.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    aside = torch.eye(y.size(2))[3]
    counter.losses(model, idx, 1, direction, curve, aside)
    counter.losses(model, idx)
    hook.remove()
    expected = (curve - y @ direction)[..., None] * aside
    torch.testing.assert_close(seen[0] - seen[1], expected, atol=1e-4, rtol=1e-4)


def test_what_is_exchanged(trained, monkeypatch):
    """The first half of the texts tells direction and curve; the losses are those of other texts."""
    model, _ = load_run(trained.folder / 'out/a')
    T = model.config.block_size
    idx = torch.randint(256, (6, T + 1))
    long = torch.randint(256, (2, 4 * T + 1))
    y = counter.attention_outputs(model, torch.randint(256, (4, T)))[1]
    y[..., 0] += torch.linspace(50, -9, T)  # a counter
    long_y = torch.randn(3, 4 * T, y.size(2))
    calls = []

    def record(model, idx, layer=None, direction=None, curve=None, aside=None):
        calls.append((idx, layer, direction, curve, aside))
        return torch.arange(idx.size(1) - 1.0)
    monkeypatch.setattr(counter, 'losses', record)
    found = counter.use(model, 1, y, idx, long_y, long)
    assert found[:7] == [(T - 1) / 2] * 4 + [3 * T - 0.5] * 3, 'means of all positions; of the second half'
    assert all(call[0] is idx for call in calls[:4]) and all(call[0] is long for call in calls[4:])
    assert calls[0][1:] == calls[4][1:] == (None,) * 4 and {c[1] for c in calls[1:4] + calls[5:]} == {1}
    direction = counter.at_first(y)
    curve = (y @ direction).mean(0)
    far = (long_y @ direction).mean(0)
    for n, expected in ((1, curve.mean()), (2, curve), (3, curve.mean()), (5, far)):
        torch.testing.assert_close(calls[n][2:4], (direction, expected))
        assert (calls[n][4] is None) == (n != 3)
    aside = calls[3][4]
    assert aside.norm() == pytest.approx(1) and abs(aside @ direction) < 1e-6
    within = (y @ direction).flatten()
    assert (within < found[7]).float().mean() == pytest.approx(0.01, abs=1 / len(within))
    torch.testing.assert_close(torch.tensor(found[8:]), far[[2 * T - 1, 4 * T - 1]])
    squeezed = calls[6][3]
    assert len(squeezed) == 4 * T and squeezed[0] == pytest.approx(curve[0].item())
    at = 50 * (T - 1) / (4 * T - 1)  # between two places of the short curve
    before, after = curve[int(at)].item(), curve[int(at) + 1].item()
    assert squeezed[50] == pytest.approx(before + at % 1 * (after - before))
    assert squeezed[-1] == pytest.approx(curve[-1].item())
    assert counter.use(model, 1, y, idx, None, None)[4:] == [None] * 3 + [found[7]] + [None] * 2


def test_windows():
    texts = counter.windows(np.arange(1000), 9, 50)
    assert texts.shape == (50, 10) and (texts.diff(dim=1) == 1).all()
    assert texts.min() == 0 and texts.max() == 999 and len(texts[:, 0].unique()) == 50
    assert abs(texts[:25].float().mean() - 500) < 150, 'both halves are from all over the text'


def test_probe(trained, data_dir):
    """Read from the first layer's attention output; not from the embedding, and not without a mask."""
    words = ['experiments/probe_position.py', '--quick', '--model', 'nope', '--n_embd', 64, '--block_size', 64,
             '--n_layer', 2, '--steps', 40, '--test', 16, '--vocab_size', 9984, '--device', 'cpu', '--out_dir', 'out/a',
             '--data_dir', data_dir, '--shuffled', '--results', 'results']
    first = trained(*words).out
    rows = read_csv(trained.folder / 'results/probe_position-quick-nope-trained.csv')
    found = {(r['model'], int(r['layer']), r['tap'], r['probe']): float(r['error']) for r in rows}
    assert len(found) == len(rows) == 10 * 7 * 3  # five models, as they are and shuffled; seven taps; three probes
    for name in ('random nope', 'random nope, test shuffled'):
        assert found[name, 1, 'attention output', 'log-norm'] < 8
        assert found[name, 1, 'attention output', 'MLP'] < 14.5  # always the middle: 16
        assert found[name, 1, 'attention output', 'linear'] > 14 and found[name, 0, 'after MLP', 'log-norm'] > 15
    assert all(15 < error < 18 for (name, *_), error in found.items() if 'no causal mask' in name)
    for name in ('before training: a', 'trained: a'):
        assert (f'{name}, test shuffled', 2, 'after MLP', 'MLP') in found
        assert f'| {name} | 256 kinds, text | 2 |' in first
    assert (trained.folder / 'results/probe_position-quick-nope-trained.png').read_bytes()[:4] == b'\x89PNG'
    assert trained(*words).out == first, 'the same seed, the same numbers'


def test_before_training(trained):
    """The model that a run began with, from its seed: the weights of its checkpoint of step 0."""
    model, checkpoint = load_run(trained.folder / 'out/a', 'last', 'cpu')
    first = load_run(trained.folder / 'out/first', 'last', 'cpu')[0].state_dict()
    begun = before_training(model, checkpoint)
    assert begun is not model and not begun.training
    for name, weight in begun.state_dict().items():
        assert torch.equal(weight, first[name])
    assert not torch.equal(model.wte.weight, begun.wte.weight), 'the run has learned'


@pytest.mark.parametrize('name', MODELS)
def test_taps(name):
    """The taps of every model file: the stream after attention is the stream before it plus the attention's output."""
    module = importlib.import_module(f'model_{name}')
    model = module.Model(module.Config(n_layer=3)).eval()
    idx = torch.randint(256, (2, 20))
    x = states(model, idx)
    assert x.shape == (1 + 3 * 3, 2 * 20, 128) and torch.equal(x[0], model.wte(idx).flatten(0, 1))
    for layer in range(3):
        assert torch.allclose(x[3 * layer] + x[3 * layer + 1], x[3 * layer + 2], atol=1e-6)
    assert torch.allclose(model.ln_f(x[-1]), model.hidden(idx).flatten(0, 1), atol=1e-6)


def test_baselines_can_be_probed(monkeypatch):
    """probe_position.py --model rope: random models of the files in baselines/ too."""
    for name in BASELINES:
        monkeypatch.setattr(sys, 'argv', ['probe_position.py', '--model', name])
        args = probe_position.arguments()
        model = random_model(args.model, args.sigma, 1, 'cpu', n_embd=32, n_head=2, n_layer=1)
        assert states(model, torch.randint(256, (2, 20))).shape == (1 + 3, 2 * 20, 32)
