"""Positions without position embeddings: variance, counter and probes give the values that theory predicts."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention_variance
import counter
import lib
import probe_position
from attention_variance import random_model
from conftest import BASELINES, MODELS
from sample import load_run

SIZE = dict(n_embd=64, n_head=2, n_layer=2, block_size=64)


def test_variance(monkeypatch):
    """(d sigma^2)^2 / m in the first layer at the paper's sigma; flat at ten times it, and without the causal mask."""
    monkeypatch.setattr(attention_variance, 'DEVICE', 'cpu')
    args = SimpleNamespace(seed=1, vocab_size=9984, sequences=8)
    rows = attention_variance.csv_rows(attention_variance.random_curves(args, {**SIZE, 'n_embd': 128}))
    assert all(theory == pytest.approx((768 * sigma ** 2) ** 2 / m) for _, sigma, _, m, _, theory in rows)
    found = {row[:4]: row[4] for row in rows}
    for m in (1, 8, 64):
        assert found['causal', 0.02, 1, m] * m == pytest.approx(0.0944, rel=0.3)
        assert found['no causal mask', 0.02, 1, m] * 64 == pytest.approx(0.0944, rel=0.4)
    assert attention_variance.slope(1 / 2.0 ** np.arange(6)) == pytest.approx(-1)
    assert found['causal', 0.02, 2, 1] < 4 * found['causal', 0.02, 2, 64], 'only the first layer falls as 1/m'
    assert found['sigmas, first layer', 0.2, 1, 1] < 2 * found['sigmas, first layer', 0.2, 1, 64]


@pytest.mark.parametrize('name', MODELS + BASELINES)
def test_taps(name):
    """In every model file the stream after attention is the stream before it plus the output of attention."""
    model = random_model(name, 0.02, 1, 'cpu', **{**SIZE, 'n_layer': 3})
    idx = torch.randint(256, (2, 20))
    x = probe_position.states(model, idx)  # (1 + 3 layers, 2 * 20, C)
    assert torch.equal(x[0], model.wte(idx).flatten(0, 1)) or name == 'cape', 'only cape adds to the embedding'
    torch.testing.assert_close(x[0:9:3] + x[1::3], x[2::3])
    torch.testing.assert_close(model.ln_f(x[-1]), model.hidden(idx).flatten(0, 1))


def test_probes_read_the_position(monkeypatch):
    """From the first layer's attention output; not from the embedding, and not without a causal mask."""
    monkeypatch.setattr(probe_position, 'DEVICE', 'cpu')
    assert not probe_position.errors(lambda x: torch.arange(1., 65).repeat(3, 1, len(x)), torch.ones(5, 64), 2).any()
    args = SimpleNamespace(seed=1, vocab_size=9984, batch=8, hidden=128, steps=40, test=16)
    rows = probe_position.probe_random(args, SIZE)
    found = {(model, layer, tap, probe): error for model, _, layer, tap, probe, error, _ in rows}
    assert len(found) == len(rows) == 3 * 7 * 3 and {row[-1] for row in rows} == {16}  # models, taps, probes; T / 4
    mlp, linear, log_norm = (found['random nope', 1, 'attention output', probe] for probe in probe_position.PROBES)
    assert log_norm < 8 and mlp < 14.5 and linear > 14
    assert min(found['random nope', 0, 'after MLP', probe] for probe in probe_position.PROBES) > 15
    assert all(15 < error < 18 for (name, *_), error in found.items() if 'no causal mask' in name)


def test_before_training(trained):
    """The seed of a run gives its initial weights: those of a run of no steps."""
    model, checkpoint = load_run(trained('kernelized', 'causal').out_dir)
    first, _ = load_run(trained('kernelized', 'causal', '--max_iters', 0, '--out_dir', 'out/first').out_dir)
    before = lib.before_training(model, checkpoint)
    torch.testing.assert_close(before.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_a_coordinate_is_exchanged(trained):
    """In that layer, along that direction, for that call only. The coordinate's own value changes nothing."""
    model, _ = load_run(trained('kernelized', 'causal').out_dir)
    idx = torch.randint(256, (5, 33))
    own = counter.losses(model, idx)  # (T,)
    torch.testing.assert_close(own.mean(), model(idx[:, :-1], idx[:, 1:])[1])
    y = counter.attention_outputs(model, idx[:, :-1], 3)[1]  # (5, T, C), in batches of 3 and 2
    torch.testing.assert_close(y, lib.layer_calls(model, idx[:, :-1])[1][1])
    direction = counter.at_first(y)
    unchanged = counter.losses(model, idx[:1], 1, direction, y[0] @ direction)
    torch.testing.assert_close(unchanged, counter.losses(model, idx[:1]))
    curve = torch.linspace(-3, 3, 32)
    seen = []
    model.h[1].ln_2.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    for aside in (None, torch.eye(y.size(2))[3]):
        seen.clear()
        changed = counter.losses(model, idx, 1, direction, curve, aside)
        torch.testing.assert_close(counter.losses(model, idx), own)
        expected = (curve - y @ direction)[..., None] * (direction if aside is None else aside)  # (5, T, C)
        torch.testing.assert_close(seen[0] - seen[1], expected, atol=1e-4, rtol=1e-4)
        assert (changed - own).abs().max() > 1e-4


def test_what_is_exchanged(monkeypatch):
    """Each column of the table changes what its name says, by the direction and the curve of other sequences."""
    T, C = 32, 8
    y = torch.randn(4, T, C)
    y[..., 0] += torch.linspace(50, -9, T)
    idx, long, long_y = torch.zeros(6, T + 1), torch.zeros(2, 4 * T + 1), torch.randn(3, 4 * T, C)
    calls = []

    def losses(model, idx, layer=None, direction=None, curve=None, aside=None):
        calls.append((idx, layer, direction, curve, aside))
        return torch.arange(idx.size(1) - 1.0)
    monkeypatch.setattr(counter, 'losses', losses)
    found = counter.use(None, 1, y, idx, long_y, long)
    assert found[:7] == [(T - 1) / 2] * 4 + [3 * T - 0.5] * 3, 'means of all positions; of the second half'
    assert [(call[0] is long, call[1]) for call in calls] == [(n > 3, 1 if n % 4 else None) for n in range(7)]
    direction = F.normalize(y[:, 0].mean(0), dim=0)
    curve, far = (y @ direction).mean(0), (long_y @ direction).mean(0)
    squeezed = F.interpolate(curve.view(1, 1, T), 4 * T, mode='linear', align_corners=True).flatten()
    for n, expected in ((1, curve.mean()), (2, curve), (3, curve.mean()), (5, far), (6, squeezed)):
        torch.testing.assert_close(calls[n][2:4], (direction, expected))
        assert (calls[n][4] is None) == (n != 3)
    assert calls[3][4].norm() == pytest.approx(1) and abs(calls[3][4] @ direction) < 1e-6
    assert found[7] == pytest.approx((y @ direction).quantile(0.01).item())
    torch.testing.assert_close(torch.tensor(found[8:]), far[[2 * T - 1, 4 * T - 1]])
    assert counter.use(None, 1, y, idx, None, None)[4:] == [None] * 3 + [found[7]] + [None] * 2


def test_one_half_gives_the_direction(trained, data_dir, monkeypatch):
    """The coordinate and the losses are those of other sequences, and both halves are from all over the text."""
    y = torch.ones(8, 4, 16) * torch.tensor([1, -1]).repeat_interleave(4)[:, None, None]
    assert counter.along_first(y)[0] == pytest.approx(-4), 'the second half, along the direction of the first'
    idx = counter.shuffled(np.arange(1000), 50, 10)
    assert (idx.diff(dim=1) == 1).all() and idx.min() == 0 and idx.max() == 999 and len(idx[:, 0].unique()) == 50
    assert abs(idx[:25].float().mean() - 500) < 150
    given = []
    monkeypatch.setattr(counter, 'use', lambda model, layer, *rest: given.append(rest) or (0.0,) * 10)
    out = trained('kernelized', 'causal').out_dir
    counter.measure('a', out, SimpleNamespace(sequences=12, data_dir=data_dir))
    short, long = (counter.shuffled(lib.data_set('code', data_dir)[1], n, T) for n, T in ((12, 33), (6, 129)))
    near, far = (counter.attention_outputs(load_run(out)[0], x[:len(x) // 2, :-1]) for x in (short, long))
    torch.testing.assert_close(given, [(y, short[6:], long_y, long[3:]) for y, long_y in zip(near, far)])
