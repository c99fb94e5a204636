"""prepare_data.py: whole-text tokens, every kind of file, nothing half-made."""
import gzip
import hashlib
import json
import lzma
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from conftest import CORPORA

needs_corpora = pytest.mark.skipif(not (CORPORA / 'wikitext-2-raw').is_dir(), reason=f'no real corpora in {CORPORA} (set CORPORA)')
TEXT = 'Grüße an alle, 日本語 too.\n\n  def f(x):\n\treturn  x   \n' * 400


def prepared(folder, name):
    meta = json.loads((folder / 'data' / name / 'meta.json').read_text())
    ids = {part: np.fromfile(folder / 'data' / name / f'{part}.bin', meta['dtype']) for part in ('train', 'val')}
    for part in ids:
        assert len(ids[part]) == meta[f'{part}_tokens']
        assert hashlib.sha256(ids[part].tobytes()).hexdigest() == meta['sha256'][part]
    return meta, ids


def test_default_is_the_standard_library(run):
    run('prepare_data.py')
    meta, ids = prepared(run.folder, 'python')
    assert meta['tokenizer'] == 'bytes' and meta['vocab_size'] == meta['mask_id'] == 256 and meta['dtype'] == 'uint16'
    assert meta['train_tokens'] == meta['train_bytes'] > 5_000_000 and abs(meta['val_tokens'] / meta['train_tokens'] - 1 / 9) < 0.001
    assert b'def __init__(self' in ids['val'].astype(np.uint8).tobytes()
    assert 'Python 3' in meta['source'] and sorted(p.name for p in (run.folder / 'data').iterdir()) == ['python']


@pytest.mark.parametrize('kind', ['txt', 'gz', 'xz', 'jsonl', 'parquet', 'md', 'folder', 'split folder'])
def test_local_files(run, kind):
    """The same bytes come out of every container."""
    path = run.folder / f'text.{kind}'
    if kind in ('txt', 'md'):
        path.write_bytes(TEXT.encode())
    elif kind in ('gz', 'xz'):
        path.write_bytes({'gz': gzip, 'xz': lzma}[kind].compress(TEXT.encode()))
    elif kind in ('jsonl', 'parquet'):
        rows = [TEXT[i:i + 1000] for i in range(0, len(TEXT), 1000)]
        if kind == 'jsonl':
            path.write_text(''.join(json.dumps({'text': r}) + '\n' for r in rows))
        else:
            pyarrow = pytest.importorskip('pyarrow')
            import pyarrow.parquet
            pyarrow.parquet.write_table(pyarrow.table({'text': rows}), path)
    else:
        path = run.folder / 'text'
        path.mkdir()
        half = len(TEXT) // 2
        names = ('a.txt', 'b.txt.gz') if kind == 'folder' else ('wiki.train.raw', 'wiki.valid.raw')
        (path / names[0]).write_bytes(TEXT[:half].encode())
        (path / names[1]).write_bytes(gzip.compress(TEXT[half:].encode()) if kind == 'folder' else TEXT[half:].encode())
        if kind == 'split folder':
            (path / 'wiki.test.raw').write_text('never read')
    run('prepare_data.py', '--path', path, '--tokenizer', 'bytes')
    meta, ids = prepared(run.folder, 'text')
    assert np.concatenate([ids['train'], ids['val']]).astype(np.uint8).tobytes() == TEXT.encode()
    expected = len(TEXT[:half].encode()) if kind == 'split folder' else len(TEXT.encode()) - len(TEXT.encode()) // 10
    assert meta['train_tokens'] == meta['train_bytes'] == expected


def test_bytes_that_are_no_utf8_survive(run):
    raw = bytes(range(256)) * 50
    (run.folder / 'raw.txt').write_bytes(raw)
    run('prepare_data.py', '--path', 'raw.txt', '--tokenizer', 'bytes')
    _, ids = prepared(run.folder, 'raw')
    assert np.concatenate([ids['train'], ids['val']]).astype(np.uint8).tobytes() == raw
    if (CORPORA / 'tiktoken_cache').is_dir():
        run('prepare_data.py', '--path', 'raw.txt', '--tokenizer', 'gpt2', code=2, TIKTOKEN_CACHE_DIR=str(CORPORA / 'tiktoken_cache'))
        assert 'raw.txt cannot be read as UTF-8' in run.err.splitlines()[-1]
        assert prepared(run.folder, 'raw')[0]['tokenizer'] == 'bytes', 'what was there is still there'


def test_pieces_are_the_text(monkeypatch):
    """Whatever the size of the pieces they join to the text, and end only between something and white space."""
    for size in (1, 7, 64, 10000):
        monkeypatch.setattr(prepare_data, 'PIECE', size)
        source = [(TEXT[i:i + 50], False) for i in range(0, 5000, 50)] + [('', True), ('second', True)]
        fragments = [f for piece in prepare_data.pieces(iter(source)) for f in piece]
        assert ''.join(text for text, _ in fragments) == TEXT[:5000] + 'second' and sum(end for _, end in fragments) == 2
        for (a, end), (b, _) in zip(fragments, fragments[1:]):
            assert end or not a or not b or not a[-1].isspace() and b[0] in ' \n'


@needs_corpora
def test_gpt2_ids_are_those_of_the_whole_text(run, monkeypatch):
    """Cut into pieces for speed, WikiText-2 has the ids of the text encoded in one go; its bytes are counted exactly."""
    import tiktoken
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CORPORA / 'tiktoken_cache'))
    run('prepare_data.py', '--dataset', 'wikitext2', '--path', CORPORA / 'wikitext-2-raw')
    meta, ids = prepared(run.folder, 'wikitext2')
    enc = tiktoken.get_encoding('gpt2')
    for part, name in (('train', 'train'), ('val', 'valid')):
        text = lzma.open(CORPORA / 'wikitext-2-raw' / f'wiki.{name}.raw.xz', 'rt', encoding='utf-8', newline='').read()
        assert ids[part].tolist() == [*enc.encode_ordinary(text), enc.eot_token]
        assert meta[f'{part}_bytes'] == len(text.encode())
    assert meta['vocab_size'] == meta['mask_id'] == 50257 and meta['dtype'] == 'uint16'


@needs_corpora
def test_bytes_of_a_validation_tail(run, monkeypatch):
    """Where validation is cut off the end, its bytes are counted from its ids."""
    import tiktoken
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CORPORA / 'tiktoken_cache'))
    run('prepare_data.py', '--path', CORPORA / 'shakespeare.txt', '--tokenizer', 'gpt2')
    meta, ids = prepared(run.folder, 'shakespeare')
    enc = tiktoken.get_encoding('gpt2')
    decoded = {part: enc.decode_bytes(ids[part].tolist()).replace(b'<|endoftext|>', b'') for part in ids}
    assert {part: len(d) for part, d in decoded.items()} == {part: meta[f'{part}_bytes'] for part in ids}
    assert decoded['train'] + decoded['val'] == (CORPORA / 'shakespeare.txt').read_bytes()


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_memory_stays_small(run):
    """A text of 112 MB takes at most 65 MB more memory than one of 23 kB (half of it to count the bytes of the validation set)."""
    (run.folder / 'small.txt').write_text(TEXT, encoding='utf-8')
    (run.folder / 'big.txt').write_text(TEXT * 4800, encoding='utf-8')
    assert (run.folder / 'big.txt').stat().st_size > 100e6
    peak = {}
    for name in ('small', 'big'):
        (run.folder / 'measure.py').write_text(
            f'import sys; sys.path.insert(0, {str(Path(prepare_data.__file__).parent)!r}); import prepare_data\n'
            f'prepare_data.prepare("{name}", path="{name}.txt"); print(open("/proc/self/status").read())')
        peak[name] = int(re.search(r'VmHWM:\s+(\d+)', run(run.folder / 'measure.py').out)[1]) / 1e3
    assert prepared(run.folder, 'big')[0]['val_tokens'] == 5_000_000  # a tenth would be more
    assert peak['big'] < peak["small"] + 65, peak


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_leaves_nothing_half_made(run, number):
    """Stopped in the middle of a text that never ends: the old data set is whole; after SIGKILL the next run cleans up."""
    (run.folder / 'novel.txt').write_text(TEXT)
    run('prepare_data.py', '--path', 'novel.txt')
    before = prepared(run.folder, 'novel')[0]
    os.mkfifo(run.folder / 'endless.txt')
    process = run.start('prepare_data.py', '--dataset', 'novel', '--path', 'endless.txt')
    with open(run.folder / 'endless.txt', 'w') as pipe:
        for _ in range(600):
            pipe.write(TEXT)
        written = lambda: [p for p in (run.folder / 'data').glob('.novel.*.tmp/train.bin') if p.stat().st_size]
        for _ in range(200):
            if written():
                break
            time.sleep(0.05)
        assert written(), 'it was at work'
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number) and 'Traceback' not in err
    assert prepared(run.folder, 'novel')[0] == before
    if number == signal.SIGKILL:
        run('prepare_data.py', '--path', 'novel.txt')
    assert [p.name for p in (run.folder / 'data').iterdir()] == ['novel']


@pytest.mark.parametrize('words, parts', [
    ('--dataset nonsense', ["'nonsense'", 'python, shakespeare', '--path']),
    ('--dataset ../x --path novel.txt', ["'../x'", 'letters']),
    ('--path nowhere.txt', ['nowhere.txt', 'no file']),
    ('--path empty.txt', ['empty.txt', 'too little text']),
    ('--path short.txt', ['too little text']),
    ('--path broken.xz', ['broken.xz', 'cannot be read']),
    ('--path columns.jsonl', ["no text in a column 'text'", 'title']),
    ('--path null.jsonl', ['row 1 of', "column 'text'"]),
    ('--path torn.jsonl', ['torn.jsonl']),
    ('--path broken.gz', ['broken.gz', 'cannot be read']),
    ('--path  --dataset x', ['--path must not be empty']),
    ('--tokenizer words', ["'words'", 'bytes', 'gpt2']),
    ('--dataset wikitext2', ['Salesforce/wikitext', '--path']),
])
def test_refused(run, words, parts):
    """One line on stderr that says what is allowed, exit 2, nothing made. Without a network a download is refused so too."""
    (run.folder / 'empty.txt').write_text('')
    (run.folder / 'short.txt').write_text('short')
    (run.folder / 'novel.txt').write_text(TEXT)
    (run.folder / 'broken.xz').write_bytes(lzma.compress(TEXT.encode())[:-50])
    (run.folder / 'broken.gz').write_bytes(gzip.compress(TEXT.encode())[:20] + b'nonsense' * 20)
    (run.folder / 'null.jsonl').write_text('{"text": "a"}\n{"text": null}\n')
    (run.folder / 'torn.jsonl').write_text('{"text": "a"}\n' * 500000 + '{"text": "a')
    (run.folder / 'columns.jsonl').write_text('{"title": "a"}\n')
    run('prepare_data.py', *words.split(' '), code=2, TIKTOKEN_CACHE_DIR=str(CORPORA / 'tiktoken_cache') if (CORPORA / 'tiktoken_cache').is_dir() else '')
    err = [line for line in run.err.splitlines() if not re.match(r'train: .* ids in', line)]
    assert all(part in err[-1] for part in parts) and 'Traceback' not in run.err, run.err
    assert not (run.folder / 'data').exists() or not list((run.folder / 'data').iterdir())


def test_the_source_is_never_the_target(run):
    """A text folder inside data_dir has the name of the data set it would make: refused, and still there."""
    (run.folder / 'data/novel').mkdir(parents=True)
    (run.folder / 'data/novel/chapter.txt').write_text(TEXT, encoding='utf-8')
    for words in (['--path', 'data/novel'], ['--path', 'data/novel/chapter.txt', '--dataset', 'novel'], ['--path', 'data/novel', '--data_dir', 'data']):
        run('prepare_data.py', *words, code=2)
        assert len(run.err.splitlines()) == 1 and '--data_dir' in run.err
        assert (run.folder / 'data/novel/chapter.txt').read_text(encoding='utf-8') == TEXT
    run('prepare_data.py', '--path', 'data/novel', '--dataset', 'other')
    (run.folder / 'data/other/mine.txt').write_text(TEXT, encoding='utf-8')
    run('prepare_data.py', '--path', 'data/other/mine.txt', '--dataset', 'other', code=2)
    assert (run.folder / 'data/other/mine.txt').exists()


def test_interrupted_while_swapping(run, monkeypatch):
    """Stopped between moving the old data set away and the new one in: the old one comes back."""
    monkeypatch.chdir(run.folder)
    Path('novel.txt').write_text(TEXT, encoding='utf-8')
    prepare_data.prepare('novel', path='novel.txt')
    before = prepared(run.folder, 'novel')[0]
    rename = Path.rename

    def stop(self, target):
        if self.name.endswith('.tmp') and 'old' not in self.name:
            raise SystemExit(143)
        return rename(self, target)
    monkeypatch.setattr(Path, 'rename', stop)
    Path('novel.txt').write_text(TEXT * 2, encoding='utf-8')
    with pytest.raises(SystemExit):
        prepare_data.prepare('novel', path='novel.txt')
    assert prepared(run.folder, 'novel')[0] == before and os.listdir('data') == ['novel']


def test_folders_are_read_without_hidden_files_and_split_by_both_names_only(run):
    (run.folder / 'text/.git').mkdir(parents=True)
    (run.folder / 'text/.git/object').write_text('hidden' * 1000)
    (run.folder / 'text/train.txt').write_text('a' * 600)
    (run.folder / 'text/test.txt').write_text('b' * 400)
    run('prepare_data.py', '--path', 'text')
    _, ids = prepared(run.folder, 'text')
    assert np.concatenate([ids['train'], ids['val']]).astype(np.uint8).tobytes() == b'b' * 400 + b'a' * 600


@needs_corpora
def test_documents_end_with_end_of_text(run, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CORPORA / 'tiktoken_cache'))
    (run.folder / 'd.jsonl').write_text(''.join(json.dumps({'text': f'document {i}'}) + '\n' for i in range(200)))
    run('prepare_data.py', '--path', 'd.jsonl', '--tokenizer', 'gpt2')
    _, ids = prepared(run.folder, 'd')
    import tiktoken
    text = tiktoken.get_encoding('gpt2').decode(np.concatenate([ids['train'], ids['val']]).tolist())
    assert text == ''.join(f'document {i}<|endoftext|>' for i in range(200))


def test_two_at_once(run):
    """Two runs that start together on a fresh machine: both end well and the data set is whole."""
    both = [run.start('prepare_data.py') for _ in range(2)]
    assert [p.communicate(timeout=60) and p.returncode for p in both] == [0, 0]
    prepared(run.folder, 'python')
    assert [p.name for p in (run.folder / 'data').iterdir()] == ['python']
