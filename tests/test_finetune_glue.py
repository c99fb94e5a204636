"""Fine-tuning on GLUE runs, at a setting far too small to mean anything; its parts are right at any size."""
import csv
import importlib
import math
import sys

import numpy as np
import pytest
import torch

from conftest import CORPORA, MODELS, REPO

sys.path.insert(0, str(REPO / 'experiments'))
import finetune_glue as ft  # noqa: E402

needs_glue = pytest.mark.skipif(not (CORPORA / 'glue').is_dir(), reason=f'no glue in {CORPORA} (set CORPORA)')


@needs_glue
def test_finetune_glue(train):
    """A table row for each run, task and metric, CSV rows, a picture; the same again with the same seed.

    One line where there is no data.
    """
    train.train('--model', 'composite', '--objective', 'masked', '--max_iters', 2, '--out_dir', 'out/tiny')
    words = ['experiments/finetune_glue.py', '--out_dirs', 'out/tiny', '--tasks', 'mrpc', '--quick',
             '--results', 'results']
    out = train(*words, '--glue', CORPORA / 'glue', '--scratch').out
    rows = list(csv.DictReader(open(train.folder / 'results/finetune_glue-quick-mrpc.csv')))
    expected = []
    for name, seed in (('baseline', ''), ('tiny', '1'), ('tiny, random weights', '1')):
        expected += [(name, 'F1', seed), (name, 'accuracy', seed)]
    assert [(r['run'], r['metric'], r['seed']) for r in rows] == expected
    base = {r['metric']: float(r['value']) for r in rows[:2]}
    all_paraphrases = 200 * base['accuracy'] / (100 + base['accuracy'])
    assert 60 < base['accuracy'] < 75 and abs(base['F1'] - all_paraphrases) < 1e-3
    for r in rows[2:]:
        value = float(r['value'])
        assert f'| {r["run"]} | mrpc | {r["metric"]} | {value:.2f} | - | 1 | {base[r["metric"]]:.2f} |' in out
    assert out.startswith('device: ') and out.count('seed 1: 10 steps, loss') == 2
    assert (train.folder / 'results/finetune_glue-quick-mrpc.png').read_bytes()[:4] == b'\x89PNG'
    assert train(*words, '--glue', CORPORA / 'glue', '--scratch').out == out
    train(*words, code=2, HF_HOME=str(train.folder))  # no network in the tests, and nothing kept from one
    assert len(train.err.splitlines()) == 1 and '--glue takes a folder' in train.err
    train(*words, '--glue', 'nowhere', code=2)
    assert len(train.err.splitlines()) == 1 and 'train.tsv' in train.err


@needs_glue
def test_data():
    """Sizes and labels of the five tasks as GLUE gives them; nothing of the held-out pairs is trained on."""
    shares = {'cola': (8551, 1043, 0.704), 'sst2': (67349, 872, 0.558), 'mrpc': (3668, 408, 0.674),
              'rte': (2490, 277, 0.498), 'stsb': (5749, 1500, 2.701)}
    for task, (n, n_dev, mean) in shares.items():
        train, dev = ft.read(task, CORPORA / 'glue')
        assert (len(train), len(dev)) == (n, n_dev) and abs(np.mean([row[0] for row in train]) - mean) < 0.01, task
        assert {len(row) for row in train + dev} == {2 if task in ('cola', 'sst2') else 3}
        assert all(all(row[1:]) for row in train + dev)
        if task not in ('cola', 'stsb'):  # those two repeat a few themselves
            assert not {row[1:] for row in train} & {row[1:] for row in dev}
    first = (1, 'Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, according to '
                'the Christopher Reeve Foundation.', 'Christopher Reeve had an accident.')
    assert ft.read('rte', CORPORA / 'glue')[1][0] == first


@needs_glue
def test_order():
    """CoLA's good sentences, half with two inner neighbours swapped; the first and the last word stay."""
    for rows, source in zip(ft.read('order', CORPORA / 'glue'), ft.read('cola', CORPORA / 'glue')):
        good = [text.split() for label, text in source if label]
        good = [words for words in good if len(words) > 3 and any(a != b for a, b in zip(words[1:-2], words[2:-1]))]
        assert len(rows) == len(good) and abs(np.mean([label for label, _ in rows]) - 0.5) < 0.05
        for (label, text), words in zip(rows, good):
            moved = [i for i, (a, b) in enumerate(zip(text.split(), words, strict=True)) if a != b]
            assert sorted(text) == sorted(' '.join(words))
            assert len(moved) == (2 if label else 0) and (not label or moved[1] == moved[0] + 1)
            assert 0 not in moved and len(words) - 1 not in moved


def test_batches():
    """Every text once, few of them beside much longer ones, another order each time."""
    torch.manual_seed(0)
    lengths = torch.randint(5, 100, (1100,))
    found = ft.batches(lengths)
    assert sorted(torch.cat(found).tolist()) == list(range(1100))
    assert len(found) == 35 and {len(rows) for rows in found} == {32, 12}
    assert sum(int(lengths[rows].max()) * len(rows) for rows in found) < 1.15 * int(lengths.sum())
    assert torch.cat(found).tolist() != torch.cat(ft.batches(lengths)).tolist()


def test_metrics_by_hand():
    y, t = np.array([1, 1, 0, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1, 0, 1])  # tp 3, fp 1, fn 1, tn 2
    assert ft.metrics('cola', y, t)['Matthews'] == pytest.approx(100 * (3 * 2 - 1 * 1) / math.sqrt(4 * 4 * 3 * 3))
    assert ft.metrics('mrpc', y, t) == pytest.approx({'F1': 75, 'accuracy': 500 / 7})
    assert ft.metrics('sst2', y, t) == ft.metrics('rte', y, t) == pytest.approx({'accuracy': 500 / 7})
    assert ft.ranks(np.array([2., 1., 2., 9.])).tolist() == [2.5, 1, 2.5, 4]
    found = ft.metrics('stsb', np.array([1., 2., 3., 10.]), np.array([1., 3., 2., 4.]))
    assert found == pytest.approx({'Spearman': 100 * (1 - 6 * 2 / (4 * 15)), 'Pearson': 100 * 13 / math.sqrt(50 * 5)})
    assert ft.metrics('cola', np.ones(4), np.array([0, 1, 1, 0])) == {'Matthews': 0}
    assert ft.metrics('mrpc', np.zeros(2), np.zeros(2))['F1'] == 0


def test_tokens():
    """A pair keeps a part of both texts, the shorter one whole where it can."""
    def cut(T, *texts):
        return bytes(ft.tokens((0, *texts), lambda text: list(text.encode()), T).tolist())
    assert cut(5, ' abcdefg ') == b'abcde' and cut(9, 'abc', 'def') == b'abc\ndef'
    assert cut(9, 'abcdefgh', 'xy') == b'abcdef\nxy' and cut(9, 'xy', 'abcdefgh') == b'xy\nabcdef'
    assert cut(9, 'a' * 9, 'b' * 9) == b'aaaa\nbbbb' and cut(8, 'a' * 9, 'b' * 9) == b'aaaa\nbbb'
    assert cut(3, 'a' * 9, 'b' * 9) == b'a\nb'


@pytest.mark.parametrize('name', MODELS)
def test_padding_has_no_weight(name):
    """A text gives the same answer alone and beside longer ones."""
    module = importlib.import_module(f'model_{name}')
    torch.manual_seed(0)
    model = module.Model(module.Config(n_layer=2, causal=False, init_std=0.2)).eval()
    head = torch.nn.Linear(128, 2)
    texts = [torch.randint(256, (n,)) for n in (1, 7, 30, 55)]
    with torch.no_grad():
        together = ft.predict(model, head, texts)
        alone = torch.cat([ft.predict(model, head, [text]) for text in texts])
        mean = head(torch.stack([model.hidden(text[None])[0].mean(0) for text in texts]))
    assert torch.allclose(together, alone, atol=1e-4) and torch.allclose(alone, mean, atol=1e-4)
    assert alone.std() > 0.01


def test_it_learns():
    """Whether a text holds more a's than b's is learned, and the answers are in the order of the dev texts."""
    module = importlib.import_module('model_nope')
    torch.manual_seed(0)
    texts = [torch.randint(97, 99, (n,)) for n in torch.randint(3, 20, (640,)).tolist()]
    labels = torch.tensor([int((text == 97).float().mean() > 0.5) for text in texts])
    model = module.Model(module.Config(n_layer=1, n_embd=64, causal=False))
    y, losses = ft.finetune(model, texts[:512], labels[:512], texts[512:], 3)
    assert len(losses) == 48 and min(losses[:3]) > 0.6 and np.mean(losses[-16:]) < 0.4
    assert (y == labels[512:].numpy()).mean() > 0.9


def test_picture_of_unknown_schemes():
    """A group of bars per task; a run that a task was not made for has none; every run has a colour of its own."""
    values = {('baseline', 'cola', 'Matthews'): [0.0], ('baseline', 'rte', 'accuracy'): [50.0]}
    for run in ('nope-1', 'mine-1', 'yours-1'):
        values[run, 'cola', 'Matthews'] = [1.0, 2.0]
    values['nope-1', 'rte', 'accuracy'] = [60.0]
    bars = [patch for patch in ft.draw(values).axes[0].patches]
    assert len(bars) == 4 and len({bar.get_facecolor() for bar in bars}) == 3
