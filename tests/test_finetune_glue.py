"""Fine-tuning on GLUE runs, at a setting far too small to mean anything; its parts are right at any size."""
import math

import numpy as np
import pytest
import torch

import finetune_glue as ft
import lib
import model_nope
from conftest import CORPORA, Run

needs_glue = pytest.mark.skipif(not (CORPORA / 'glue').is_dir(), reason=f'no glue in {CORPORA} (set CORPORA)')


@needs_glue
def test_finetune_glue(trained, tmp_path):
    """A CSV row for each run, metric and seed, a picture; one line without data."""
    out = trained('composite', 'masked').out_dir
    words = ['experiments/finetune_glue.py', '--out_dirs', out, '--tasks', 'mrpc', '--quick', '--results', 'results']
    run = Run(tmp_path)(*words, '--glue', CORPORA / 'glue')
    rows = lib.read_csv(tmp_path / 'results/finetune_glue-mrpc-quick.csv')
    assert [(r['run'], r['metric'], r['seed']) for r in rows] == [
        (name, metric, seed) for name, seed in (('baseline', ''), (out.name, '1')) for metric in ('F1', 'accuracy')]
    base = {r['metric']: float(r['value']) for r in rows[:2]}
    assert abs(base['F1'] - 200 * base['accuracy'] / (100 + base['accuracy'])) < 1e-3, 'always a paraphrase'
    assert (tmp_path / 'results/finetune_glue-mrpc-quick.png').is_file()
    run(*words, code=2, HF_HOME=str(tmp_path))  # no network in the tests, and nothing kept from one
    assert len(run.err.splitlines()) == 1 and '--glue takes a folder' in run.err


@needs_glue
def test_data():
    """Sizes and labels as GLUE gives them; nothing of the held-out texts is trained on; order swaps inner words."""
    shares = {'cola': (8551, 1043, 0.704), 'sst2': (67349, 872, 0.558), 'mrpc': (3668, 408, 0.674),
              'rte': (2490, 277, 0.498)}
    for task, (n, n_dev, mean) in shares.items():
        train, dev = ft.read(task, CORPORA / 'glue')
        assert (len(train), len(dev)) == (n, n_dev) and abs(np.mean([row[0] for row in train]) - mean) < 0.01, task
        assert {len(row) for row in train + dev} == {2 if task in ('cola', 'sst2') else 3}
        if task != 'cola':  # it repeats a few itself
            assert not {row[1:] for row in train} & {row[1:] for row in dev}
    rows, source = ft.read('order', CORPORA / 'glue')[1], ft.read('cola', CORPORA / 'glue')[1]
    good = [text.split() for label, text in source if label]
    good = [words for words in good if len(words) > 3 and any(a != b for a, b in zip(words[1:-2], words[2:-1]))]
    assert len(rows) == len(good) and abs(np.mean([label for label, _ in rows]) - 0.5) < 0.05
    for (label, text), words in zip(rows, good):
        moved = [i for i, (a, b) in enumerate(zip(text.split(), words, strict=True)) if a != b]
        assert len(moved) == (2 if label else 0) and (not label or moved[1] == moved[0] + 1)
        assert 0 not in moved and len(words) - 1 not in moved and sorted(text) == sorted(' '.join(words))


def test_batches_metrics_and_tokens():
    """Every text once, little padding; metrics by hand; a pair keeps a part of both texts."""
    lengths = torch.randint(5, 100, (1100,), generator=torch.Generator().manual_seed(0))
    found = ft.batches(lengths)
    assert sorted(torch.cat(found).tolist()) == list(range(1100))
    assert sum(int(lengths[rows].max()) * len(rows) for rows in found) < 1.15 * int(lengths.sum())
    y, t = np.array([1, 1, 0, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1, 0, 1])  # tp 3, fp 1, fn 1, tn 2
    assert ft.metrics('cola', y, t)['Matthews'] == pytest.approx(100 * (3 * 2 - 1 * 1) / math.sqrt(4 * 4 * 3 * 3))
    assert ft.metrics('mrpc', y, t) == pytest.approx({'F1': 75, 'accuracy': 500 / 7})
    assert ft.metrics('cola', np.ones(4), np.array([0, 1, 1, 0])) == {'Matthews': 0}

    def cut(T, *texts):
        return bytes(ft.tokens((0, *texts), lambda text: list(text.encode()), T).tolist())
    assert cut(5, ' abcdefg ') == b'abcde' and cut(9, 'abcdefgh', 'xy') == b'abcdef\nxy'
    assert cut(8, ' ') == b'\n', 'an empty sentence can be classified'
    assert cut(9, 'xy', 'abcdefgh') == b'xy\nabcdef' and cut(8, 'a' * 9, 'b' * 9) == b'aaaa\nbbb'


def test_it_learns():
    """Whether a text holds more a's than b's is learned, and the answers are in the order of the dev texts."""
    torch.manual_seed(0)
    texts = [torch.randint(97, 99, (n,)) for n in torch.randint(3, 20, (640,)).tolist()]
    labels = torch.tensor([int((text == 97).float().mean() > 0.5) for text in texts])
    model = model_nope.Model(model_nope.Config(n_layer=1, n_embd=64, causal=False))
    y, losses = ft.finetune(model, texts[:512], labels[:512], texts[512:], 3)
    assert len(losses) == 48 and min(losses[:3]) > 0.6 and (y == labels[512:].numpy()).mean() > 0.9
