"""prepare_data.py: the right ids from every kind of file, held-out text held out, nothing half-made or replaced."""
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import sys
import tarfile
import time
import tracemalloc
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from conftest import CORPORA, REPO
from prepare_data import prepare

needs_corpora = pytest.mark.skipif(not (CORPORA / 'wikitext-2-raw').is_dir(), reason=f'no corpora in {CORPORA}')
TEXT = 'Grüße an alle, 日本語 too.\n\n  def f(x):\n\treturn  x   \n' * 400
RAW = TEXT.encode()
datasets = pytest.importorskip('datasets')
pa = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')
tiktoken = pytest.importorskip('tiktoken')
# bytes, 'th', 'an', end-of-text; like GPT-2's, the pattern never joins white space with what is before it
PAIRS = tiktoken.Encoding('pairs', pat_str=r' ?\S+|\s+(?!\S)|\s+', special_tokens={'<|endoftext|>': 259}, mergeable_ranks={
    **{bytes([i]): i for i in range(256)}, b'th': 256, b'an': 257, b'\n ': 258})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CORPORA / 'tiktoken_cache'))
    return tmp_path


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.setattr(prepare_data, 'load_tiktoken', {'gpt2': PAIRS}.get)


@pytest.fixture
def main(monkeypatch):
    """main('--path', ...): prepare_data.py as from a command line, in this process."""
    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['prepare_data.py', *map(str, words)])
        prepare_data.main()
    return call


@pytest.fixture
def refused(capsys):
    """refused(function, ...) -> the one line of the refusal; no data set is made."""
    def call(function, *words, **named):
        capsys.readouterr()
        before = sorted(Path('.').glob('data/[!.]*'))
        with pytest.raises(SystemExit) as stop:
            function(*words, **named)
        lines = [line for line in capsys.readouterr().err.splitlines() if 'Only train and val are used' not in line]
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert sorted(Path('.').glob('data/[!.]*')) == before and not list(Path('.').glob('data/.*.tmp'))
        return lines[0]
    return call


def prepared(name, folder='.'):
    """meta and ids of a data set, as load() gives them."""
    meta, train, val = prepare_data.load(Path(folder, 'data', name))
    return meta, {'train': train.tolist(), 'val': val.tolist()}


def parts(name):
    """The bytes to train on and to validate on."""
    return [bytes(ids) for ids in prepared(name)[1].values()]


def joined(name):
    return b''.join(parts(name))


def rows(path, *texts):
    Path(path).write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return path


def test_shakespeare_is_the_default(here, main):
    """The same bytes on every machine, split as nanoGPT does."""
    main()
    meta, ids = prepared('shakespeare')
    raw = (REPO / 'shakespeare.txt').read_bytes()
    assert hashlib.sha256(raw).hexdigest() == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
    assert parts('shakespeare') == [raw[:1003854], raw[1003854:]]
    sums = {part: hashlib.sha256(np.array(ids[part], np.uint16).tobytes()).hexdigest() for part in ids}
    assert meta == dict(tokenizer='bytes', vocab_size=256, mask_id=256, eot_id=None, dtype='uint16', sha256=sums,
                        train_tokens=1003854, train_bytes=1003854, val_tokens=111540, val_bytes=111540,
                        source='shakespeare.txt of the repository')


def test_enwik8_leaves_its_test_text_out(here, monkeypatch, refused):
    """90, 5 and 5 million bytes: of the download, of a file, and of a packed file; a cut may divide a character."""
    assert prepare_data.ENWIK8_BYTES == (90_000_000, 5_000_000, 5_000_000)
    monkeypatch.setattr(prepare_data, 'ENWIK8_BYTES', (901, 50, 49))
    raw = ('é' * 450 + 'x' + 'ü' * 25).encode()[:-1] + b'y' + b'T' * 49
    assert len(raw) == 1000
    Path('plain').write_bytes(raw)
    Path('enwik8.xz').write_bytes(lzma.compress(raw))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as z:
        z.writestr('enwik8', raw)
    asked = []
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen',
                        lambda url, timeout: asked.append(url) or io.BytesIO(archive.getvalue()))
    for path in (None, 'plain', 'enwik8.xz'):
        prepare('enwik8', path=path, overwrite=True)
        assert parts('enwik8') == [raw[:901], raw[901:951]] and prepared('enwik8')[0]['val_bytes'] == 50
    assert asked == ['http://mattmahoney.net/dc/enwik8.zip']
    for wrong in (raw[:-1], raw + b'T'):
        Path('plain').write_bytes(wrong)
        assert '1,000 bytes' in refused(prepare, 'enwik8', path='plain', overwrite=True)


def test_the_library_hardly_repeats_itself(here, main):
    """Under 1 % of the validation text stands in the training text: of its windows of 64 bytes."""
    main('--dataset', 'python')
    meta, *ids = prepare_data.load('data/python')
    assert meta['source'] == f'standard library of Python {sys.version.split()[0]}' and meta['eot_id'] == 255
    assert meta['train_tokens'] > 5_000_000 and b"codecs.CodecInfo(\n        name='" not in ids[0].astype(np.uint8).tobytes()
    sums = []
    for x in ids:
        x = x.astype(np.uint64)
        for k in (1, 2, 4, 8, 16, 32):  # x becomes a checksum of windows of 2k bytes, modulo 2^64
            x = x[:-k] * np.uint64(0x9E3779B97F4A7C15 ^ k) + x[k:]
        sums.append(x)
    known = np.append(np.sort(sums[0]), 0)
    assert (known[np.searchsorted(known[:-1], sums[1][::16])] == sums[1][::16]).mean() < 0.01


@pytest.mark.parametrize('kind', ['txt', 'TXT.GZ', 'xz', 'md', 'json.gz', 'jsonl', 'JSONL.xz', 'parquet'])
def test_local_files(here, main, kind):
    """The same text comes out of every container, packed or not."""
    path = Path(f'text.{kind}')
    pack = {'gz': gzip.compress, 'xz': lzma.compress}.get(kind.lower().split('.')[-1], bytes)
    documents = 'json' in kind.lower() or kind == 'parquet'
    if kind == 'parquet':
        parquet.write_table(pa.table({'n': [1], 'text': [TEXT]}), path)
    else:
        path.write_bytes(pack(json.dumps({'text': TEXT}).encode() if documents else RAW))
    main('--path', path)
    meta, ids = prepared('text')
    assert joined('text') == RAW + b'\xff' * documents and meta['eot_id'] == (255 if documents else None)
    n = len(joined('text'))
    assert len(ids['train']) == n * 9 // 10 and meta['train_bytes'] + meta['val_bytes'] == len(RAW)


def test_documents_are_separated(here, pairs):
    """By byte 255 or end-of-text, which are no text: neither is counted as bytes."""
    texts = [f'the {i} man' for i in range(100)]
    rows('d.jsonl', *texts)
    Path('files').mkdir()
    for i, text in enumerate(texts):
        Path(f'files/{i:02}.txt').write_text(text)
    for path, tokenizer in (('d.jsonl', None), ('d.jsonl', 'bytes'), ('files', 'bytes'), ('d.jsonl', 'gpt2')):
        prepare('d', tokenizer, path, overwrite=True)
        meta, ids = prepared('d')
        if tokenizer != 'gpt2':
            assert joined('d') == b''.join(text.encode() + b'\xff' for text in texts)
        else:
            assert ids['train'] + ids['val'] == [i for text in texts for i in [*PAIRS.encode(text), 259]]
        for part in ids:
            texts_of_part = [i for i in ids[part] if i != meta['eot_id']]
            size = len(texts_of_part) if tokenizer != 'gpt2' else len(PAIRS.decode_bytes(texts_of_part))
            assert meta[f'{part}_bytes'] == size < len(ids[part]) + size * (tokenizer == 'gpt2')
        assert sum(meta[f'{part}_bytes'] for part in ids) == len(''.join(texts))


@pytest.mark.parametrize('files, train, val', [
    ('train/a.txt test/b.txt', 'train/a.txt', ''),
    ('Training/a.txt VALIDATION/b.txt TEST/train.txt', 'Training/a.txt', 'VALIDATION/b.txt'),
    ('wiki.train.raw wiki.valid.raw wiki.test.raw README.md', 'wiki.train.raw', 'wiki.valid.raw'),
    ('c-train.00.txt c-val.00.txt c-train.01.txt', 'c-train.00.txt c-train.01.txt', 'c-val.00.txt'),
    ('a.txt dev/b.txt sub/c.py', 'a.txt sub/c.py', 'dev/b.txt'),
    ('latest.txt contest/valid.txt train.txt', 'train.txt', 'contest/valid.txt'),
    ('latest.txt contest.txt train.txt', 'contest.txt latest.txt train.txt', ''),
    ('all.txt -> test/a.txt, b.txt', 'b.txt', ''),
    ('train/x.txt -> ../test/a.txt, train/b.txt', 'train/b.txt', ''),
    ('b.txt .git/a.txt .c.txt pic.png', 'b.txt', ''),
])
def test_held_out_text_is_never_trained_on(here, capsys, files, train, val):
    """Words in names of files and folders, before and behind links; one line says what was taken for what."""
    for item in files.split(', ' if '->' in files else ' '):
        name, _, target = item.partition(' -> ')
        file = Path('text', name)
        file.parent.mkdir(parents=True, exist_ok=True)
        if target:
            (file.parent / target).parent.mkdir(parents=True, exist_ok=True)
            (file.parent / target).write_text(name * 100)
            file.symlink_to(target)
        else:
            file.write_text(name * 100)
    prepare('d', path='text')
    got_train, got_val = parts('d')
    texts = [b'\xff'.join(name.encode() * 100 for name in names.split()) for names in (train, val)]
    assert (got_train.rstrip(b'\xff'), got_val.rstrip(b'\xff')) == tuple(texts) if val else \
        (got_train + got_val).rstrip(b'\xff') == texts[0]
    said = capsys.readouterr().err.splitlines()[0]
    assert f'train: {len(train.split())} files ({", ".join(train.split())})' in said, said
    assert not val or f'val: 1 files ({val})' in said
    assert ('pic.png' in said) == ('pic.png' in files) and '.git' not in said


def test_a_link_to_a_folder_is_left_out_and_said(here, capsys):
    """No endless loop either."""
    Path('text/sub').mkdir(parents=True)
    Path('text/a.txt').write_bytes(RAW)
    Path('text/sub/loop').symlink_to('..')
    prepare('d', path='text')
    assert joined('d') == RAW and 'unknown: 1 files (sub/loop)' in capsys.readouterr().err


def test_any_character_in_a_name(here, main):
    """A name is never a pattern: not of a library, and not of the data set's name."""
    rows('part1.jsonl', 'wrong' * 10)
    main('--path', rows('part[1]*.jsonl', 'right' * 10))
    assert joined('part_1_') == b'right' * 10 + b'\xff' and prepared('part_1_')[0]['source'].endswith('/part[1]*.jsonl')


def test_rows(here, capsys):
    """Only the column 'text' is read, as text; rows without text are skipped and counted."""
    lines = [dict(text='2024-01-01', n=1), dict(text='2024-01-02', n='two'), dict(text=None), dict(n=[3]), dict(text=''),
             dict(text='half \ud83d')]
    Path('d.jsonl').write_text('\n\n'.join(map(json.dumps, lines)))
    prepare('d', path='d.jsonl')
    assert joined('d') == b'2024-01-01\xff2024-01-02\xffhalf ?\xff'
    assert 'd.jsonl: skipped 3 of 6 rows' in capsys.readouterr().err


def test_what_is_no_text(here, refused, pairs):
    """Archives, UTF-16 and pictures are refused, unless bytes are asked for: then all come through."""
    Path('utf16').write_bytes(TEXT.encode('utf-16'))
    Path('plain16.txt').write_bytes('no mark, ascii only'.encode('utf-16-le') * 9)
    Path('any.txt').write_bytes(bytes(range(256)) * 40)
    with tarfile.open('a.tar.gz', 'w:gz') as tar:
        tar.add('any.txt')
    for name in ('utf16', 'plain16.txt', 'any.txt', 'a.tar.gz'):
        for tokenizer in (None, 'gpt2'):
            line = refused(prepare, 'd', tokenizer, name)
            assert name in line and all(part in line for part in ('not UTF-8', 'archive', 'iconv', '--tokenizer bytes'))
        prepare('d', 'bytes', name, overwrite=True)
        assert joined('d') == (gzip.open if name.endswith('gz') else open)(name, 'rb').read()
        assert prepared('d')[0]['train_bytes'] == prepared('d')[0]['train_tokens']
        shutil.rmtree('data')
    Path('two').mkdir()
    for n in '12':
        shutil.copy('any.txt', f'two/{n}.txt')
    assert 'byte 255' in refused(prepare, 'd', 'bytes', 'two')


@pytest.mark.parametrize('size', [64, 10 ** 6])
def test_wikitext_is_one_text_by_every_route(here, monkeypatch, pairs, size):
    """The hub's rows (a blank line is ''), .parquet and .jsonl files of them, and the raw files: the ids of the whole text."""
    monkeypatch.setattr(prepare_data, 'PIECE', size)
    raw = {'train': ' \n = Thane = \n \n An ant , then \n the man \n \n \n' * 30, 'validation': ' \n = Other = \n \n than \n'}
    hub = {split: [{'text': line if line.strip() else ''} for line in text.splitlines(keepends=True)]
           for split, text in raw.items()}
    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda where, name=None, split=None, streaming=False: asked.append(
        (where, name, split, streaming)) or hub[split])
    for folder in ('raw', 'parquet', 'jsonl'):
        Path(folder).mkdir()
    for split, name in (('train', 'train'), ('validation', 'valid')):
        Path(f'raw/wiki.{name}.raw').write_text(raw[split])
        parquet.write_table(pa.Table.from_pylist(hub[split]), f'parquet/{split}-00000-of-00001.parquet')
        rows(f'jsonl/{split}.jsonl', *raw[split].splitlines(keepends=True))
    for path in (None, 'raw', 'parquet', 'jsonl'):
        prepare('wikitext2', path=path, overwrite=True)
        meta, ids = prepared('wikitext2')
        assert meta['tokenizer'] == 'gpt2' and meta['vocab_size'] == meta['mask_id'] == 260 and meta['eot_id'] == 259
        for part, split in (('train', 'train'), ('val', 'validation')):
            assert ids[part] == [*PAIRS.encode(raw[split]), 259] and meta[f'{part}_bytes'] == len(raw[split])
    assert asked == [('Salesforce/wikitext', 'wikitext-2-raw-v1', split, True) for split in raw]


@needs_corpora
def test_gpt2_ids_are_those_of_the_whole_text(here):
    """WikiText-2 cut into pieces has the ids of the text encoded at once."""
    prepare('wikitext2', path=CORPORA / 'wikitext-2-raw')
    meta, ids = prepared('wikitext2')
    encoding = tiktoken.get_encoding('gpt2')
    for part, name in (('train', 'train'), ('val', 'valid')):
        raw = lzma.open(CORPORA / 'wikitext-2-raw' / f'wiki.{name}.raw.xz').read()
        assert ids[part] == [*encoding.encode_ordinary(raw.decode()), 50256] and meta[f'{part}_bytes'] == len(raw)
    assert meta['vocab_size'] == meta['mask_id'] == 50257


def test_hub_rows_are_documents_and_the_tail_is_a_tenth_of_the_ids(here, monkeypatch, pairs):
    """Without a validation split, only train is read; its bytes are divided as its ids are."""
    texts = ['the man and an ant', '', 'than then'] * 50
    monkeypatch.setattr(datasets, 'load_dataset', lambda where, name=None, split=None, streaming=False: [
        {'text': text} for text in texts if split == 'train'])
    prepare('fineweb-edu')
    meta, ids = prepared('fineweb-edu')
    expected = [i for text in texts if text for i in [*PAIRS.encode(text), 259]]
    n = len(expected) * 9 // 10
    assert [ids['train'], ids['val']] == [expected[:n], expected[n:]]
    for part in ids:
        assert meta[f'{part}_bytes'] == len(PAIRS.decode_bytes([i for i in ids[part] if i != 259]))


def test_memory_stays_small(here):
    """A text of 60 MB is never in memory, and five million ids are enough to validate on."""
    Path('big.txt').write_bytes(b'Much ado about nothing, as you like it. ' * 1_500_000)
    tracemalloc.start()
    prepare('big', path='big.txt')
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert prepared('big')[0]['val_tokens'] == 5_000_000 and peak < 55, peak


def fail(error):
    def call(*_, **__):
        raise error
    return call


def test_advice_about_the_network_is_for_errors_of_the_network(here, monkeypatch, refused):
    for error, network in ((ConnectionError('no route'), True), (PermissionError(13, 'read-only', '/home'), False),
                           (ValueError('row 3'), False)):
        monkeypatch.setattr(datasets, 'load_dataset', fail(error))
        monkeypatch.setattr(tiktoken, 'get_encoding', fail(error))
        Path('a.txt').write_bytes(RAW)
        for line in (refused(prepare, 'wikitext2'), refused(prepare, 'a', 'gpt2', 'a.txt')):
            assert ('network' in line) == ('--path' in line) == ('TIKTOKEN_CACHE_DIR' in line) == network, line
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen', fail(urllib.error.URLError('no route')))
    assert 'network' in refused(prepare, 'enwik8')
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    assert 'tiktoken' in refused(prepare, 'a', 'gpt2', 'a.txt')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_one_process_at_a_time_and_nothing_half_made(run, here, number):
    """A second run waits and touches nothing. The first is stopped in an endless text: then the second does its work."""
    Path('novel.txt').write_bytes(RAW)
    prepare('novel', path='novel.txt')
    os.mkfifo('endless.txt')
    words = ['prepare_data.py', '--dataset', 'novel', '--overwrite', '--path']
    first = run.start(*words, 'endless.txt')
    with open('endless.txt', 'w') as pipe:
        pipe.write(TEXT * 100)
        second = run.start(*words, 'novel.txt')
        for _ in range(200):
            if Path('data/.novel.tmp/new/train.bin').exists():
                break
            time.sleep(0.05)
        time.sleep(0.5)
        assert second.poll() is None and Path('data/.novel.tmp/new/train.bin').exists()
        assert joined('novel') == RAW, 'the old data set is in its place'
        Path('novel.txt').write_bytes(RAW * 2)
        first.send_signal(number)
        _, err = first.communicate(timeout=30)
    assert first.returncode == (-9 if number == 9 else 128 + number) and 'Traceback' not in err
    second.communicate(timeout=30)
    assert second.returncode == 0 and joined('novel') == RAW * 2 and not list(Path('data').glob('.*.tmp'))


def test_interrupted_while_swapping(here, monkeypatch):
    """Stopped between moving the old data set away and the new one in: the old one comes back, even after a kill."""
    Path('novel.txt').write_bytes(RAW)
    prepare('novel', path='novel.txt')
    rename = Path.rename

    def stop(self, target):
        if self.name == 'new':
            assert not Path('data/novel').exists(), 'the old one is away'
            shutil.copytree('data/.novel.tmp', 'killed')
            raise SystemExit(143)
        return rename(self, target)
    Path('novel.txt').write_bytes(RAW * 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'rename', stop)
        with pytest.raises(SystemExit):
            prepare('novel', path='novel.txt', overwrite=True)
    assert joined('novel') == RAW and not Path('data/.novel.tmp').exists()
    shutil.rmtree('data/novel')
    Path('killed').rename('data/.novel.tmp')
    prepare('novel', path='novel.txt')
    assert joined('novel') == RAW and not Path('data/.novel.tmp').exists()


def test_what_is_there_is_kept_or_refused(here, main, refused, capsys, monkeypatch):
    """The same path and tokenizer: nothing is done. Another one, or a full disk: nothing is lost."""
    Path('other').mkdir()
    Path('other/novel.txt').write_bytes(RAW * 3)
    Path('novel.txt').write_bytes(RAW)
    main('--path', 'novel.txt')
    Path('novel.txt').write_bytes(RAW * 2)
    capsys.readouterr()
    main('--path', here / 'novel.txt')  # the same file by another name
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and 'already prepared' in err and '--overwrite' in err
    for words in (['--path', 'other/novel.txt'], ['--path', 'novel.txt', '--tokenizer', 'gpt2']):
        line = refused(main, *words)
        assert f'{here}/novel.txt (tokenizer bytes)' in line and '--overwrite' in line and '--dataset' in line
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, 'atomic_write', fail(OSError(28, 'No space left on device')))
        line = refused(main, '--path', 'novel.txt', '--overwrite')
        assert 'No space left' in line and 'network' not in line
    assert joined('novel') == RAW
    main('--path', 'novel.txt', '--overwrite')
    assert joined('novel') == RAW * 2


def test_damage_is_refused(here, refused):
    """One changed id, one missing, sizes that cannot be."""
    Path('novel.txt').write_bytes(RAW)
    for name, change in (('train.bin', lambda raw: raw[:50] + b'x' + raw[51:]), ('val.bin', lambda raw: raw[:-2]),
                         ('meta.json', lambda raw: raw.replace(b'"mask_id": 256', b'"mask_id": 255')),
                         ('meta.json', lambda raw: re.sub(b'"val_bytes": .*', b'"val_bytes": 0', raw)),
                         ('meta.json', lambda raw: raw[:40]), ('val.bin', lambda raw: b'')):
        prepare('novel', path='novel.txt', overwrite=True)
        file = Path('data/novel', name)
        file.write_bytes(change(file.read_bytes()))
        line = refused(prepare_data.load, 'data/novel')
        assert f'data/novel is damaged ({name}' in line and 'prepare it again' in line


@pytest.mark.parametrize('words, said', [
    ('--dataset nonsense', ["'nonsense'", 'shakespeare, enwik8, python', '--path']),
    ('--dataset ../x --path novel.txt', ["'../x'", 'letters']),
    ('--path nowhere.txt', ['nowhere.txt', 'No such file']),
    ('--path pictures', ['pictures', 'known types', '.jsonl', 'a.png']),
    ('--path held', ['held', 'no text to train on', 'test.txt', 'dev.txt']),
    ('--path empty.txt', ['empty.txt', 'too little text']),
    ('--path broken.xz', ['broken.xz', 'EOFError']),
    ('--path broken.gz', ['broken.gz']),
    ('--path columns.jsonl', ["no text in a column 'text'", 'title']),
    ('--path columns.parquet', ['columns.parquet', "no text in a column 'text'"]),
    ('--path torn.jsonl', ['torn.jsonl', 'JSON']),
    ('--path list.jsonl', ['list.jsonl']),
    ('--path  --dataset x', ['--path must not be empty']),
    ('--tokenizer words', ["'words'", 'bytes', 'gpt2']),
    ('--path data/mine', ['data/mine', 'no prepared data set']),
    ('--path data/mine/a.txt --dataset mine --overwrite', ['no prepared data set']),
    ('--path data/made/a.txt --dataset made --overwrite', ['would be replaced']),
])
def test_refused(here, main, refused, words, said):
    """One line on stderr that says what is allowed, exit 2, nothing made; the source is never the target."""
    for folder in ('pictures', 'held', 'data/mine', 'data/made'):
        Path(folder).mkdir(parents=True)
    contents = {'empty.txt': b'', 'novel.txt': RAW, 'pictures/a.png': b'', 'held/test.txt': RAW, 'held/dev.txt': RAW,
                'broken.xz': lzma.compress(RAW)[:-50], 'broken.gz': gzip.compress(RAW)[:20] + b'nonsense' * 20,
                'columns.jsonl': b'{"title": "a"}\n', 'torn.jsonl': b'{"text": "a"}\n{"text": "a', 'list.jsonl': b'[1]\n',
                'data/mine/a.txt': RAW, 'data/made/a.txt': RAW, 'data/made/meta.json': b'{}'}
    for name, content in contents.items():
        Path(name).write_bytes(content)
    parquet.write_table(pa.table({'title': ['a']}), 'columns.parquet')
    line = refused(main, *words.split(' '))
    assert line.startswith('prepare_data.py: ') and all(part in line for part in said), line
    assert all(Path(name).read_bytes() == content for name, content in contents.items())


def test_die_and_atomic_write(here, monkeypatch, capsys):
    """Exit 2 is said once per machine, exit 1 by every process. A failed write leaves the old file alone."""
    for rank, code, lines in (('0', 2, 1), ('1', 2, 0), ('0', 1, 1), ('1', 1, 1)):
        monkeypatch.setenv('LOCAL_RANK', rank)
        with pytest.raises(SystemExit) as stop:
            prepare_data.die('two\n words', code)
        assert stop.value.code == code
        assert capsys.readouterr().err == f'{Path(sys.argv[0]).name}: two words\n' * lines
    path = Path('file')
    prepare_data.atomic_write(path, lambda f: f.write(b'old'))
    for error in (RuntimeError('unexpected pos'), OSError(28, 'No space left')):
        with pytest.raises(OSError, match='file could not be written'):
            prepare_data.atomic_write(path, lambda f: f.write(b'new') and fail(error)())
        assert path.read_bytes() == b'old' and os.listdir() == ['file']
    seen = []
    prepare_data.atomic_write(path, lambda f: f.write(b'new') and seen.append(path.read_bytes()))
    assert seen == [b'old'] and path.read_bytes() == b'new'
