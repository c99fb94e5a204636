"""prepare_data.py: the right ids from every kind of file, held-out text held out, nothing half-made or replaced."""
import gzip
import hashlib
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
import zipfile
from pathlib import Path
from unittest.mock import Mock, call
from urllib.error import URLError

import numpy as np
import pytest

import prepare_data
from conftest import REPO
from prepare_data import prepare

datasets, pa, tiktoken, requests = map(pytest.importorskip, ('datasets', 'pyarrow', 'tiktoken', 'requests'))
parquet = pytest.importorskip('pyarrow.parquet')
TEXT = 'Grüße an alle, 日本語 too.\n\n  def f(x):\n\treturn  x   \n' * 400
RAW = TEXT.encode()
# bytes, 'th', 'an', '\n '; like GPT-2's, the pattern never joins white space with what is before it
RANKS = {**{bytes([i]): i for i in range(256)}, b'th': 256, b'an': 257, b'\n ': 258}
PAIRS = tiktoken.Encoding('pairs', pat_str=r' ?\S+|\s+(?!\S)|\s+', mergeable_ranks=RANKS,
                          special_tokens={'<|endoftext|>': 259})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test has an empty folder with novel.txt in it; PAIRS stands for GPT-2's tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['prepare_data.py'])
    monkeypatch.setattr(tiktoken, 'get_encoding', {'gpt2': PAIRS}.get)
    put('novel.txt', RAW)
    return tmp_path


@pytest.fixture
def refused(capsys):
    """refused(function, ...) -> the one line of the refusal; no data set is made."""
    def call(function, *words, **named):
        capsys.readouterr()
        before = set(Path('.').glob('data/*'))
        with pytest.raises(SystemExit, match='2'):
            function(*words, **named)
        (line,) = [x for x in capsys.readouterr().err.splitlines() if 'The rest is unused' not in x]
        assert all(path.suffix == '.lock' for path in set(Path('.').glob('data/*')) - before)
        return line
    return call


def main(*words):
    """prepare_data.py as from a command line, in this process."""
    sys.argv = ['prepare_data.py', *map(str, words)]
    prepare_data.main()


def put(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)


def prepared(name):
    meta, train, val = prepare_data.load(Path('data', name))
    return meta, train.tolist(), val.tolist()


def joined(name):
    _, train, val = prepared(name)
    return bytes(train + val)


def test_shakespeare_is_the_default():
    """The same bytes on every machine, split as nanoGPT does."""
    main()
    meta, train, val = prepared('shakespeare')
    raw = (REPO / 'shakespeare.txt').read_bytes()
    assert hashlib.sha256(raw).hexdigest() == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
    assert bytes(train) == raw[:1003854] and bytes(val) == raw[1003854:]
    assert set(meta.pop('sha256')) == {'train', 'val'}
    assert meta == dict(tokenizer='bytes', vocab_size=256, mask_id=256, eot_id=None, dtype='uint16',
                        source='shakespeare.txt of the repository', train_tokens=1003854, train_bytes=1003854,
                        val_tokens=111540, val_bytes=111540)


def test_enwik8_leaves_its_test_text_out(monkeypatch, refused):
    """90, 5 and 5 million bytes of the download, of a file and of a packed file; a cut may divide a character."""
    assert prepare_data.ENWIK8_BYTES == (90_000_000, 5_000_000, 5_000_000)
    monkeypatch.setattr(prepare_data, 'ENWIK8_BYTES', (901, 50, 49))
    raw = 'é'.encode() * 450 + b'x' + 'ü'.encode() * 24 + b'\xc3y' + b'T' * 49
    put('plain', raw)
    put('enwik8.xz', lzma.compress(raw))
    with zipfile.ZipFile('zip', 'w') as archive:
        archive.writestr('enwik8', raw)
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen', lambda url, timeout: open('zip', 'rb'))
    for path in (None, 'plain', 'enwik8.xz'):
        prepare('enwik8', path=path, overwrite=True)
        meta, train, val = prepared('enwik8')
        assert bytes(train) == raw[:901] and bytes(val) == raw[901:951] and meta['val_bytes'] == 50
    for wrong in (raw[:-1], raw + b'T'):
        put('plain', wrong)
        assert '1,000 bytes' in refused(prepare, 'enwik8', path='plain', overwrite=True)


def test_the_library_is_without_tables():
    """Modules of encodings/ repeat each other; with them, validation text would stand in the training text."""
    prepare('python')
    meta, train, val = prepare_data.load('data/python')
    text = train.astype(np.uint8).tobytes() + val.astype(np.uint8).tobytes()
    package = sorted(Path(os.__file__).with_name('asyncio').glob('*.py'))
    assert b''.join(path.read_bytes() + b'\xff' for path in package) in text, 'a package is not divided'
    assert len(text) > 5_000_000 and b'class JSONEncoder' in text and b'decoding_table = (' not in text


@pytest.mark.parametrize('kind', ['txt', 'TXT.GZ', 'xz', 'md', 'json.gz', 'jsonl', 'JSONL.xz', 'parquet'])
def test_local_files(here, kind):
    """The same text comes out of every container, packed or not; the name of a file is no pattern."""
    path, documents = Path(f'part[1].{kind}'), 'json' in kind.lower() or kind == 'parquet'
    Path(f'part1.{kind}').write_bytes(b'wrong')
    pack = {'gz': gzip.compress, 'xz': lzma.compress}.get(kind.lower().split('.')[-1], bytes)
    path.write_bytes(pack(json.dumps({'text': TEXT}).encode() if documents else RAW))
    if kind == 'parquet':
        parquet.write_table(pa.table({'n': [1], 'text': [TEXT]}), path)
    main('--path', path)
    meta, train, val = prepared('part_1_')
    assert bytes(train + val) == RAW + b'\xff' * documents and meta['eot_id'] == (255 if documents else None)
    assert len(train) == len(train + val) * 9 // 10 and meta['source'] == str(here / path)


def test_documents_and_rows(monkeypatch, capsys):
    """Byte 255 or end-of-text ends a document, and is no byte of text. Only the column 'text' is read, as text."""
    texts = ['2024-01-01', 'half ?', *(f'the {i} man' for i in range(98))]
    rows = [dict(text=text.replace('?', '\ud83d'), n=[i, 'two'][i % 2]) for i, text in enumerate(texts)]
    for i, text in enumerate(texts):
        put(f'files/{i:02}.txt', text.encode())
    put('d.jsonl', '\n\n'.join(map(json.dumps, [*rows, dict(text=None), dict(n=[3]), dict(text='')])).encode())
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_, split, **__: rows)
    for path, tokenizer in (('files', 'bytes'), ('d.jsonl', 'gpt2'), (None, None), ('d.jsonl', 'bytes')):
        prepare('fineweb-edu', tokenizer, path, overwrite=True)
        meta, train, val = prepared('fineweb-edu')
        eot = 255 if tokenizer == 'bytes' else 259
        encode, decode = (str.encode, bytes) if eot == 255 else (PAIRS.encode, PAIRS.decode_bytes)
        assert meta['eot_id'] == eot and len(train) == len(train + val) * 9 // 10
        assert train + val == [i for text in texts for i in [*encode(text), eot]]
        for part, ids in (('train', train), ('val', val)):
            assert meta[f'{part}_bytes'] == len(decode([i for i in ids if i != eot]))
    assert 'd.jsonl: skipped 3 of 103 rows' in capsys.readouterr().err


@pytest.mark.parametrize('files, train, val', [
    ('train/a.txt, test/b.txt', 'train/a.txt', ''),
    ('Training/a.txt, VALIDATION/b.txt, TEST/train.txt', 'Training/a.txt', 'VALIDATION/b.txt'),
    ('wiki.train.raw, wiki.valid.raw, wiki.test.raw, README.md', 'wiki.train.raw', 'wiki.valid.raw'),
    ('c-train.00.txt, c-val.00.txt, c-train.01.txt', 'c-train.00.txt, c-train.01.txt', 'c-val.00.txt'),
    ('a.txt, dev/b.txt, sub/c.py', 'a.txt, sub/c.py', 'dev/b.txt'),
    ('latest.txt, contest.txt, train.txt', 'contest.txt, latest.txt, train.txt', ''),
    ('b.txt, test/c.txt, all.txt -> test/a.txt', 'b.txt', ''),
    ('train/b.txt, test/c.txt, train/x.txt -> ../test/a.txt', 'train/b.txt', ''),
    ('b.txt, .git/a.txt, .c.txt, sub/.d.txt, a.png', 'b.txt', ''),
    ('b.txt, sub/a.png -> ..', 'b.txt', ''),
    ('a.gz, b.json', 'a.gz', ''),
])
def test_held_out_text_is_never_trained_on(capsys, files, train, val):
    """Words in the names of files and folders, before and behind links, decide; one line says what is used for what."""
    for item in files.split(', '):
        name, _, target = item.partition(' -> ')
        Path('text', name).parent.mkdir(parents=True, exist_ok=True)
        if target:
            Path('text', name).symlink_to(target)
        if target != '..':
            put(f'text/{name}', (gzip.compress if name.endswith('.gz') else bytes)(name.encode() * 100))
    main('--path', 'text/')
    wanted = [b''.join(name.encode() * 100 + b'\xff' for name in names.split(', ') if name) for names in (train, val)]
    assert joined('text') == b''.join(wanted) and (not val or bytes(prepared('text')[2]) == wanted[1])
    said = capsys.readouterr().err.splitlines()[0]
    assert f'train: {len(train.split(", "))} files ({train})' in said
    assert (f'val: 1 files ({val})' if val else 'val: the last tenth') in said
    assert ('a.png)' in said) == ('a.png' in files) and '.git' not in said


def test_what_is_no_text(refused):
    """Archives, UTF-16 and pictures are refused, unless bytes are asked for: then all come through."""
    put('utf16', TEXT.encode('utf-16'))
    put('plain16.txt', 'no mark, ascii only'.encode('utf-16-le') * 9)
    put('two/any.txt', bytes(range(256)) * 40)
    with tarfile.open('two/a.tar.gz', 'w:gz') as tar:
        tar.add('two/any.txt')
    for name in ('utf16', 'plain16.txt', 'two/any.txt', 'two/a.tar.gz'):
        for tokenizer in (None, 'gpt2'):
            line = refused(prepare, 'd', tokenizer, name)
            assert all(part in line for part in (name, 'not UTF-8', 'archive', 'iconv', '--tokenizer bytes'))
        prepare('d', 'bytes', name, 'bytes')
        assert joined('../bytes/d') == (gzip.open if name.endswith('gz') else open)(name, 'rb').read()
        shutil.rmtree('bytes')
    assert 'byte 255' in refused(prepare, 'd', 'bytes', 'two')


@pytest.mark.parametrize('size', [64, 10 ** 6])
def test_wikitext_is_one_text_by_every_route(monkeypatch, size):
    """The hub's rows (a blank line is ''), .parquet and .jsonl files, raw files: always the ids of the whole text."""
    monkeypatch.setattr(prepare_data, 'PIECE', size)
    raw = {'train': ' \n = Thane = \n \n An ant , then \n the man \n \n \n' * 30, 'validation': ' \n = B = \n than \n'}
    hub = {split: [{'text': line if line.strip() else ''} for line in text.splitlines(keepends=True)]
           for split, text in raw.items()}
    download = Mock(side_effect=lambda *_, split, **__: hub[split])
    monkeypatch.setattr(datasets, 'load_dataset', download)
    Path('parquet').mkdir()
    for split in raw:
        put(f'raw/wiki.{split}.raw', raw[split].encode())
        put(f'jsonl/{split}.jsonl', '\n'.join(json.dumps({'text': s}) for s in raw[split].splitlines(True)).encode())
        parquet.write_table(pa.Table.from_pylist(hub[split]), f'parquet/{split}-00000-of-00001.parquet')
    for path in (None, 'raw', 'parquet', 'jsonl'):
        prepare('wikitext2', path=path, overwrite=True)
        meta, *ids = prepared('wikitext2')
        assert meta['tokenizer'] == 'gpt2' and meta['vocab_size'] == meta['mask_id'] == 260 and meta['eot_id'] == 259
        assert ids == [[*PAIRS.encode(text), 259] for text in raw.values()]
        assert [meta['train_bytes'], meta['val_bytes']] == [len(text) for text in raw.values()]
    where = 'Salesforce/wikitext', 'wikitext-2-raw-v1'
    assert download.call_args_list == [call(*where, split=split, streaming=True) for split in raw]


def test_memory_stays_small():
    """A text of 60 MB is never in memory, and five million ids are enough to validate on."""
    Path('big.txt').write_bytes(b'Much ado about nothing, as you like it. ' * 1_500_000)
    tracemalloc.start()
    prepare('big', path='big.txt')
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert prepared('big')[0]['val_tokens'] == 5_000_000 and peak < 55, peak


def test_advice_about_the_network_is_for_errors_of_the_network(monkeypatch, refused):
    for error, network in ((ConnectionError(), True), (requests.ConnectionError(), True), (ValueError(), False),
                           (URLError(''), True), (PermissionError(13, 'read-only', '/home'), False)):
        for module, name in ((datasets, 'load_dataset'), (tiktoken, 'get_encoding'),
                             (prepare_data.urllib.request, 'urlopen')):
            monkeypatch.setattr(module, name, Mock(side_effect=error))
        for words in (['wikitext2'], ['enwik8'], ['a', 'gpt2', 'novel.txt']):
            line = refused(prepare, *words)
            assert [x in line for x in ('network', '--path', 'TIKTOKEN_CACHE_DIR')] == [network] * 3, line
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    assert 'tiktoken' in refused(prepare, 'a', 'gpt2', 'novel.txt')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs a named pipe')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGKILL', 9)])
def test_one_process_at_a_time_and_nothing_half_made(run, number):
    """A second run waits and touches nothing. When the first is stopped in an endless text, it does its work."""
    prepare('novel', path='novel.txt')
    os.mkfifo('endless.txt')
    first = run.start('prepare_data.py', '--dataset', 'novel', '--path', 'endless.txt', '--overwrite')
    with open('endless.txt', 'w') as pipe:
        pipe.write(TEXT * 100)
        second = run.start('prepare_data.py', '--path', 'novel.txt', '--overwrite')
        while not Path('data/.novel.tmp/new/train.bin').exists():
            time.sleep(0.05)
        time.sleep(0.5)
        assert second.poll() is None and joined('novel') == RAW, 'the old data set is in its place'
        put('novel.txt', RAW * 2)
        first.send_signal(number)
        _, err = first.communicate(timeout=30)
    assert first.returncode == (-9 if number == 9 else 128 + number) and 'Traceback' not in err
    second.communicate(timeout=30)
    assert second.returncode == 0 and joined('novel') == RAW * 2 and not list(Path('data').glob('.*.tmp'))


def test_killed_while_swapping():
    """Killed between moving the old data set away and the new one in: the old one comes back."""
    prepare('novel', path='novel.txt')
    put('data/.novel.tmp/new/train.bin', b'')
    Path('data/novel').rename('data/.novel.tmp/old')
    put('novel.txt', RAW * 2)
    prepare('novel', path='novel.txt')
    assert joined('novel') == RAW and not Path('data/.novel.tmp').exists()


def test_what_is_there_is_kept_or_refused(here, refused, capsys):
    """The same path and tokenizer: nothing is done. Another one, or damage: one line, nothing lost."""
    put('other/novel.txt', RAW * 3)
    prepare('pairs', 'gpt2', 'novel.txt')
    main('--path', 'novel.txt')
    put('novel.txt', RAW * 2)
    capsys.readouterr()
    main('--path', here / 'novel.txt')  # the same file by another name
    assert re.fullmatch('.*already prepared.*--overwrite.*\n', capsys.readouterr().err)
    for words in (['--path', 'other/novel.txt'], ['--path', 'novel.txt', '--tokenizer', 'gpt2'],
                  ['--path', 'novel.txt', '--dataset', 'pairs']):
        line = refused(main, *words)
        assert all(part in line for part in (f'{here}/novel.txt (tokenizer bytes)', '--overwrite', '--dataset'))
    assert joined('novel') == RAW
    for name, change in (('train.bin', lambda raw: raw[:50] + b'x' + raw[51:]), ('val.bin', lambda raw: raw[:-2]),
                         ('meta.json', lambda raw: raw.replace(b'"mask_id": 256', b'"mask_id": 255')),
                         ('meta.json', lambda raw: re.sub(b'"val_bytes": .*', b'"val_bytes": 0', raw))):
        main('--path', 'novel.txt', '--overwrite')
        assert joined('novel') == RAW * 2
        put(f'data/novel/{name}', change(Path('data/novel', name).read_bytes()))
        line = refused(prepare_data.load, 'data/novel')
        assert f'data/novel is damaged ({name}' in line and 'prepare it again' in line


def test_refused(refused):
    """One line on stderr that says what is allowed, exit 2, nothing made; the source is never the target."""
    for name, content in {
            'empty.txt': b'', 'held/a.png': b'', 'held/test.txt': RAW, 'held/dev.txt': RAW, 'data/mine/a.txt': RAW,
            'broken.xz': lzma.compress(RAW)[:-50], 'columns.jsonl': b'{"title": "a"}', 'data/made/a.txt': RAW,
            'torn.jsonl': b'{"text": "a"}\n{"text": "a', 'data/made/meta.json': b'{}',
            'a.jsonl': b'{"text": "12345678"}'}.items():
        put(name, content)
    parquet.write_table(pa.table({'title': ['a']}), 'columns.parquet')
    for words, said in (
            ('--dataset nonsense', "'nonsense' shakespeare, enwik8, python --path"),
            ('--dataset ../x --path novel.txt', "'../x' letters"),
            ('--path held', 'held no text to train on test.txt dev.txt a.png known types .jsonl'),
            ('--path empty.txt', 'empty.txt too little text'), ('--path a.jsonl', 'too little text left for val'),
            ('--path broken.xz', 'broken.xz EOFError'),
            ('--path columns.jsonl', "'text' title"),
            ('--path columns.parquet', "columns.parquet 'text'"),
            ('--path torn.jsonl', 'torn.jsonl JSON'),
            ('--path  --dataset x', '--path must not be empty'),
            ('--path data/mine', 'data/mine no prepared data set'),
            ('--path data/made/a.txt --dataset made --overwrite', 'would be replaced'),
            ('--path novel.txt --data_dir novel.txt', 'novel.txt')):
        line = refused(main, *words.split(' '))
        assert line.startswith('prepare_data.py: ') and all(part in line for part in said.split()), line
    assert Path('data/mine/a.txt').read_bytes() == Path('data/made/a.txt').read_bytes() == RAW


def test_die_and_atomic_write(monkeypatch, capsys):
    """Exit 2 is said once per machine, exit 1 by every process. A write replaces the old file at once or not at all."""
    monkeypatch.setenv('LOCAL_RANK', '1')
    for code, said in ((2, ''), (1, 'prepare_data.py: two words\n')):
        with pytest.raises(SystemExit, match=str(code)):
            prepare_data.die('two\n words', code)
        assert capsys.readouterr().err == said
    path = Path('novel.txt')
    for error in (RuntimeError('unexpected pos'), OSError(28, 'No space left')):
        with pytest.raises(OSError, match='novel.txt could not be written'):
            prepare_data.atomic_write(path, lambda f: f.write(b'new') and Mock(side_effect=error)())
        assert path.read_bytes() == RAW and os.listdir() == ['novel.txt']
    old = path.stat().st_ino
    prepare_data.atomic_write(path, lambda f: f.write(b'new'))
    assert path.stat().st_ino != old and path.read_bytes() == b'new' and os.listdir() == ['novel.txt']
