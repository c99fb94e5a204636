"""The experiments run, at a setting far too small to mean anything."""
import csv

import pytest

from conftest import CORPORA, TINY


def test_compare(run, data_dir):
    """A table row and a curve for each scheme and seed; what is trained is not trained again."""
    words = ['experiments/compare.py', '--schemes', 'none', 'conv-all', '--objectives', 'causal', '--seeds', 2, '--dataset', 'code', '--results', 'results',
             '--train', '--data_dir', data_dir, *TINY, '--max_iters', 3, '--eval_interval', 2]
    first = run(*words).out
    assert first.count('causal none seed') == first.count('causal conv-all seed') == 2 and first.count('| causal |') == 2
    table = list((run.folder / 'results').glob('*.csv'))[0]
    rows = list(csv.DictReader(open(table)))
    assert [int(r['step']) for r in rows] == [0, 2, 3] * 4 and all(4 < float(r['val_loss']) < 6 for r in rows)
    assert list((run.folder / 'results').glob('*.png'))[0].read_bytes()[:4] == b'\x89PNG'
    made = {p: p.stat().st_mtime for p in (run.folder / 'out/compare').glob('*/ckpt_last.pt')}
    assert len(made) == 4 and run(*words).out == first and made == {p: p.stat().st_mtime for p in made}


@pytest.mark.skipif(not (CORPORA / 'tiktoken_cache').is_dir(), reason=f'no tiktoken cache in {CORPORA} (set CORPORA)')
def test_prepare_speed(run):
    run('experiments/prepare_speed.py', '--path', CORPORA / 'shakespeare.txt', '--megabytes', 3, TIKTOKEN_CACHE_DIR=str(CORPORA / 'tiktoken_cache'))
    assert 'prepare_data.py 3 MB' in run.out and 'ratio' in run.out and 'peak memory' in run.out
