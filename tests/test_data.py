"""prepare_data.py: whole-text tokens, every kind of file, nothing half-made, nothing replaced silently."""
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
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from conftest import CORPORA, REPO
from prepare_data import prepare

needs_corpora = pytest.mark.skipif(not (CORPORA / 'wikitext-2-raw').is_dir(),
                                   reason=f'no real corpora in {CORPORA} (set CORPORA)')
TEXT = 'Grüße an alle, 日本語 too.\n\n  def f(x):\n\treturn  x   \n' * 400
RAW = TEXT.encode()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, with GPT-2's vocabulary where there is one."""
    monkeypatch.chdir(tmp_path)
    if (CORPORA / 'tiktoken_cache').is_dir():
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CORPORA / 'tiktoken_cache'))
    return tmp_path


@pytest.fixture
def refused(capsys):
    """refused(function, ...) -> the one line of the refusal."""
    def call(function, *words, **named):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*words, **named)
        lines = [line for line in capsys.readouterr().err.splitlines() if not re.match(r'train: .* ids in', line)]
        assert stop.value.code == 2 and len(lines) == 1, lines
        return lines[0]
    return call


@pytest.fixture
def main(monkeypatch):
    """main('--path', ...): prepare_data.py as from a command line, in this process."""
    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['prepare_data.py', *map(str, words)])
        prepare_data.main()
    return call


def prepared(name, folder='.'):
    """meta and ids of a data set; its sizes and checksums are right."""
    folder = Path(folder, 'data', name)
    meta = json.loads((folder / 'meta.json').read_text())
    ids = {part: np.fromfile(folder / f'{part}.bin', meta['dtype']) for part in ('train', 'val')}
    for part in ids:
        assert len(ids[part]) == meta[f'{part}_tokens']
        assert hashlib.sha256(ids[part].tobytes()).hexdigest() == meta['sha256'][part]
    return meta, ids


def joined(name):
    """The bytes of a data set of bytes."""
    _, ids = prepared(name)
    return np.concatenate([ids['train'], ids['val']]).astype(np.uint8).tobytes()


def test_two_at_once_make_the_standard_library(run):
    """The default. Two runs that start together on a fresh machine: both end well and the data set is whole."""
    both = [run.start('prepare_data.py') for _ in range(2)]
    assert [p.communicate(timeout=60) and p.returncode for p in both] == [0, 0]
    meta, ids = prepared('python', run.folder)
    assert meta['tokenizer'] == 'bytes' and meta['vocab_size'] == meta['mask_id'] == 256 and meta['dtype'] == 'uint16'
    assert meta['train_tokens'] == meta['train_bytes'] > 5_000_000
    assert abs(meta['val_tokens'] / meta['train_tokens'] - 1 / 9) < 0.001
    assert b'def __init__(self' in ids['val'].astype(np.uint8).tobytes()
    assert 'Python 3' in meta['source'] and [p.name for p in (run.folder / 'data').iterdir()] == ['python']


def test_a_slower_run_of_the_same_time(here, monkeypatch, capsys):
    """Another run has made the data set meanwhile: it stays, and one with another text is refused."""
    for name in ('novel', 'other'):
        Path(f'{name}.txt').write_text(f'{name} ' * 1000)
    prepare('novel', path='novel.txt', data_dir='fast')
    write_all = prepare_data.write_all

    def slow(*words):
        shutil.copytree('fast/novel', 'data/novel')  # the other run comes in between
        return write_all(*words)
    monkeypatch.setattr(prepare_data, 'write_all', slow)
    prepare('novel', path='novel.txt')
    assert 'is already prepared' in capsys.readouterr().err and joined('novel') == b'novel ' * 1000
    shutil.rmtree('data/novel')
    with pytest.raises(SystemExit) as stop:
        prepare('novel', path='other.txt')
    assert stop.value.code == 2 and 'was prepared from' in capsys.readouterr().err
    assert joined('novel') == b'novel ' * 1000 and os.listdir('data') == ['novel']


def make_local(kind):
    """The text in a container -> its path."""
    path = Path(f'text.{kind}')
    rows = [TEXT[i:i + 1000] for i in range(0, len(TEXT), 1000)]
    if kind in ('txt', 'md', 'png'):
        path.write_bytes(RAW)
    elif kind in ('gz', 'xz'):
        path.write_bytes({'gz': gzip, 'xz': lzma}[kind].compress(RAW))
    elif kind == 'jsonl':
        path.write_text(''.join(json.dumps({'text': row}) + '\n' for row in rows))
    elif kind == 'parquet':
        pyarrow = pytest.importorskip('pyarrow')
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({'text': rows}), path)
    return path


@pytest.mark.parametrize('kind', ['txt', 'gz', 'xz', 'jsonl', 'parquet', 'md', 'png'])
def test_local_files(here, main, kind):
    """The same bytes come out of every container; a file that is named is read whatever its type."""
    main('--path', make_local(kind))
    meta, ids = prepared('text')
    assert joined('text') == RAW and meta['tokenizer'] == 'bytes'
    assert meta['train_tokens'] == meta['train_bytes'] == len(RAW) - len(RAW) // 10


def test_folders(here, capsys):
    """Known types by the order of their names; nothing hidden; what is skipped is said."""
    Path('text/.git').mkdir(parents=True)
    Path('text/sub').mkdir()
    Path('text/.git/object.txt').write_text('hidden' * 1000)
    Path('text/train.txt').write_text('a' * 600)  # without a file for validation this name says nothing
    Path('text/test.TXT.gz').write_bytes(gzip.compress(b'b' * 400))
    Path('text/sub/code.py').write_text('c' * 300)
    Path('text/rows.jsonl').write_text(json.dumps({'text': 'd' * 200}) + '\n')
    prepare('known', path='text')
    assert joined('known') == b'd' * 200 + b'c' * 300 + b'b' * 400 + b'a' * 600
    assert 'skipped' not in capsys.readouterr().err
    for name in ('a.png', 'b.zip', 'c', 'd.tar.gz', 'sub/e.json', 'f.jsonl.gz'):
        Path('text', name).write_text('no text')
    prepare('skipped', path='text')
    assert joined('skipped') == joined('known')
    said = 'skipped 6 of 10 files, of unknown type: a.png, b.zip, c, d.tar.gz, f.jsonl.gz, ...\n'
    assert said in capsys.readouterr().err


def test_folders_are_split_by_their_names(here, capsys):
    half = len(TEXT) // 2
    Path('text').mkdir()
    Path('text/wiki.train.raw').write_bytes(TEXT[:half].encode())
    Path('text/wiki.valid.raw').write_bytes(TEXT[half:].encode())
    Path('text/wiki.test.raw').write_text('never read')
    prepare('text', path='text')
    assert joined('text') == RAW and prepared('text')[0]['train_bytes'] == len(TEXT[:half].encode())
    assert 'skipped 1 of 3 files, named neither train nor valid: wiki.test.raw\n' in capsys.readouterr().err


def pairs():
    """A tokenizer of bytes, 'th', 'an' and end-of-text, made on the spot: no vocabulary is needed."""
    tiktoken = pytest.importorskip('tiktoken')
    ranks = {**{bytes([i]): i for i in range(256)}, b'th': 256, b'an': 257}
    return tiktoken.Encoding('pairs', pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 258})


def test_bytes_are_those_of_the_text_and_not_of_its_tokens(here, monkeypatch):
    encoding = pairs()
    monkeypatch.setattr(prepare_data, 'load_tiktoken', {'gpt2': encoding}.get)
    text = 'the thin man and then an ant ' * 300
    Path('text.txt').write_text(text)
    prepare('text', 'gpt2', 'text.txt')
    meta, ids = prepared('text')
    assert meta['vocab_size'] == meta['mask_id'] == 259
    assert [*ids['train'], *ids['val']] == [*encoding.encode(text), 258]
    for part in ids:
        words = encoding.decode([i for i in ids[part] if i != 258])
        assert len(words) == meta[f'{part}_bytes'] > 1.2 * meta[f'{part}_tokens'], meta


def test_check_data_reads_all(here, main, refused, monkeypatch, capsys):
    """Large files are not looked through when they are loaded: the flag does it."""
    Path('novel.txt').write_bytes(RAW)
    main('--path', 'novel.txt')
    main('--path', 'novel.txt', '--check_data')
    assert f'data/novel: {len(RAW):,} ids, as {here / "novel.txt"} gave them' in capsys.readouterr().out
    for name in ('SMALL', 'MEDIUM'):
        monkeypatch.setattr(prepare_data, name, 100)
    for value, part in ((0, 'train.bin: ValueError its checksum'), (256, 'id 256, the vocabulary ends at 255')):
        ids = np.memmap('data/novel/train.bin', np.uint16, 'r+')
        ids[3] = value
        ids.flush()
        prepare_data.load(Path('data/novel'))
        line = refused(main, '--dataset', 'novel', '--check_data')
        assert 'data/novel is damaged' in line and part in line and 'prepare it again' in line
    assert 'No such file' in refused(main, '--dataset', 'other', '--check_data')


def test_bytes_that_are_no_utf8(here, refused):
    """As bytes they survive; for GPT-2 the refusal names the two ways out."""
    raw = bytes(range(256)) * 50
    Path('raw.txt').write_bytes(raw)
    prepare('raw', path='raw.txt')
    assert joined('raw') == raw
    if (CORPORA / 'tiktoken_cache').is_dir():
        line = refused(prepare, 'raw', 'gpt2', path='raw.txt', overwrite=True)
        assert 'raw.txt is not UTF-8' in line and '--tokenizer bytes' in line and 'iconv' in line
        assert joined('raw') == raw, 'what was there is still there'


def test_pieces_are_the_text(monkeypatch):
    """Whatever the size of the pieces they join to the text, and end only between something and white space."""
    for size in (1, 7, 64, 10000):
        monkeypatch.setattr(prepare_data, 'PIECE', size)
        source = [(TEXT[i:i + 50], False) for i in range(0, 5000, 50)] + [('', True), ('second', True)]
        fragments = [f for piece in prepare_data.pieces(iter(source)) for f in piece]
        assert ''.join(text for text, _ in fragments) == TEXT[:5000] + 'second'
        assert sum(end for _, end in fragments) == 2
        for (a, end), (b, _) in zip(fragments, fragments[1:]):
            assert end or not a or not b or not a[-1].isspace() and b[0] in ' \n'


@needs_corpora
def test_gpt2_ids_are_those_of_the_whole_text(here):
    """Cut into pieces, WikiText-2 has the ids of the text encoded in one go; its bytes are counted exactly."""
    import tiktoken
    prepare('wikitext2', path=CORPORA / 'wikitext-2-raw')
    meta, ids = prepared('wikitext2')
    encoding = tiktoken.get_encoding('gpt2')
    for part, name in (('train', 'train'), ('val', 'valid')):
        raw = lzma.open(CORPORA / 'wikitext-2-raw' / f'wiki.{name}.raw.xz').read()
        assert ids[part].tolist() == [*encoding.encode_ordinary(raw.decode()), encoding.eot_token]
        assert meta[f'{part}_bytes'] == len(raw)
    assert meta['vocab_size'] == meta['mask_id'] == 50257 and meta['dtype'] == 'uint16'
    assert meta['tokenizer'] == 'gpt2', 'the default of this name'


@needs_corpora
def test_bytes_of_a_validation_tail(here):
    """Where validation is cut off the end, its bytes are counted from its ids. One text ends with end-of-text."""
    import tiktoken
    prepare('shakespeare', 'gpt2', CORPORA / 'shakespeare.txt')
    meta, ids = prepared('shakespeare')
    encoding = tiktoken.get_encoding('gpt2')
    decoded = {part: encoding.decode_bytes(ids[part].tolist()).replace(b'<|endoftext|>', b'') for part in ids}
    assert {part: len(d) for part, d in decoded.items()} == {part: meta[f'{part}_bytes'] for part in ids}
    assert decoded['train'] + decoded['val'] == (CORPORA / 'shakespeare.txt').read_bytes()


def test_a_folder_of_packed_texts(here):
    """enwik8.xz is text, although no other suffix says so."""
    Path('packed').mkdir()
    Path('packed/enwik.xz').write_bytes(lzma.compress(RAW))
    prepare('packed', path='packed')
    assert joined('packed') == RAW


@needs_corpora
def test_documents_end_with_end_of_text(here):
    import tiktoken
    Path('d.jsonl').write_text(''.join(json.dumps({'text': f'document {i}'}) + '\n' for i in range(200)))
    prepare('d', 'gpt2', 'd.jsonl')
    _, ids = prepared('d')
    text = tiktoken.get_encoding('gpt2').decode(np.concatenate([ids['train'], ids['val']]).tolist())
    assert text == ''.join(f'document {i}<|endoftext|>' for i in range(200))


def test_shakespeare_is_one_text_of_the_web(here, monkeypatch, refused):
    """Fetched from its address; without a network, one line that says what to do."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(RAW)
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen', urlopen)
    prepare('shakespeare')
    assert joined('shakespeare') == RAW and asked == [prepare_data.SHAKESPEARE]

    def no_network(url, timeout):
        raise OSError('no network')
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen', no_network)
    shutil.rmtree('data')
    line = refused(prepare, 'shakespeare')
    assert 'no network' in line and '--path' in line


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_memory_stays_small(run):
    """A text of 112 MB takes at most 65 MB more than one of 23 kB (half of it for the validation set)."""
    (run.folder / 'small.txt').write_bytes(RAW)
    (run.folder / 'big.txt').write_bytes(RAW * 4800)
    assert (run.folder / 'big.txt').stat().st_size > 100e6
    peak = {}
    for name in ('small', 'big'):
        (run.folder / 'measure.py').write_text(
            f'import sys; sys.path.insert(0, {str(REPO)!r}); import prepare_data\n'
            f'prepare_data.prepare("{name}", path="{name}.txt"); print(open("/proc/self/status").read())')
        peak[name] = int(re.search(r'VmHWM:\s+(\d+)', run.process(run.folder / 'measure.py').out)[1]) / 1e3
    assert prepared('big', run.folder)[0]['val_tokens'] == 5_000_000  # a tenth would be more
    assert peak['big'] < peak['small'] + 65, peak


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no signals between processes, and no pipes with names')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGKILL', 9)])
def test_interrupted_leaves_nothing_half_made(run, here, number):
    """Stopped in an endless text: the old data set is whole; after SIGKILL the next run cleans up."""
    Path('novel.txt').write_bytes(RAW)
    prepare('novel', path='novel.txt')
    before = prepared('novel')[0]
    os.mkfifo('endless.txt')
    process = run.start('prepare_data.py', '--dataset', 'novel', '--path', 'endless.txt', '--overwrite')
    with open('endless.txt', 'w') as pipe:
        for _ in range(600):
            pipe.write(TEXT)
        for _ in range(200):
            written = [p for p in Path('data').glob('.novel.*.tmp/new/train.bin') if p.stat().st_size]
            if written:
                break
            time.sleep(0.05)
        assert written, 'it was at work'
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == 9 else 128 + number) and 'Traceback' not in err
    assert prepared('novel')[0] == before
    if number == 9:
        assert len(os.listdir('data')) == 2
        prepare('novel', path='novel.txt')
    assert os.listdir('data') == ['novel']


def test_interrupted_while_swapping(here, monkeypatch):
    """Stopped between moving the old data set away and the new one in: the old one comes back."""
    Path('novel.txt').write_bytes(RAW)
    prepare('novel', path='novel.txt')
    before = prepared('novel')[0]
    rename = Path.rename

    def stop(self, target):
        if self.name == 'new':
            assert not Path('data/novel').exists(), 'the old one is away'
            raise SystemExit(143)
        return rename(self, target)
    monkeypatch.setattr(Path, 'rename', stop)
    Path('novel.txt').write_bytes(RAW * 2)
    with pytest.raises(SystemExit):
        prepare('novel', path='novel.txt', overwrite=True)
    assert prepared('novel')[0] == before and os.listdir('data') == ['novel']


def test_a_full_disk_is_an_error(here, monkeypatch, main, refused):
    """It is not taken for another run that was faster, and what was there stays."""
    Path('novel.txt').write_bytes(RAW)
    prepare('novel', path='novel.txt')

    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(prepare_data, 'sha256', full)
    assert 'No space left' in refused(main, '--path', 'novel.txt', '--overwrite')
    assert joined('novel') == RAW and os.listdir('data') == ['novel']


def test_the_same_again_stays_as_it_is(here, main, capsys):
    """The same path and tokenizer: one line, nothing done; --overwrite reads the text again."""
    Path('novel.txt').write_bytes(RAW)
    main('--path', 'novel.txt')
    Path('novel.txt').write_bytes(RAW * 2)
    capsys.readouterr()
    main('--path', here / 'novel.txt')  # the same file by another name
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and 'already prepared' in err and '--overwrite' in err and joined('novel') == RAW
    main('--path', 'novel.txt', '--overwrite')
    assert joined('novel') == RAW * 2 and os.listdir('data') == ['novel']


def test_another_text_or_tokenizer_replaces_nothing(here, main, refused):
    Path('other').mkdir()
    for path in ('novel.txt', 'other/novel.txt'):
        Path(path).write_text(path * 1000)
    main('--path', 'novel.txt')
    before = joined('novel')
    for words in (['--path', 'other/novel.txt'], ['--path', 'novel.txt', '--tokenizer', 'gpt2']):
        line = refused(main, *words)
        assert f'{here}/novel.txt (tokenizer bytes)' in line and '--overwrite' in line and '--dataset' in line
        assert joined('novel') == before
    main('--path', 'other/novel.txt', '--overwrite')
    assert joined('novel') == b'other/novel.txt' * 1000
    Path('data/novel/meta.json').write_text('{"source"')
    assert 'data/novel is damaged' in refused(main, '--path', 'novel.txt')
    main('--path', 'novel.txt', '--overwrite')
    assert joined('novel') == before


def test_tiktoken_is_not_there(here, monkeypatch, refused):
    """Not installed, or without its vocabulary: two different lines."""
    Path('novel.txt').write_bytes(RAW)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'tiktoken', None)
        line = refused(prepare, 'novel', 'gpt2', 'novel.txt')
        assert 'tiktoken, which is not installed' in line and 'pip install tiktoken' in line
    tiktoken = pytest.importorskip('tiktoken')

    def no_network(name):
        raise ConnectionError('no route')
    monkeypatch.setattr(tiktoken, 'get_encoding', no_network)
    line = refused(prepare, 'novel', 'gpt2', 'novel.txt')
    assert 'TIKTOKEN_CACHE_DIR' in line and 'installed' not in line


@pytest.mark.parametrize('words, parts', [
    ('--dataset nonsense', ["'nonsense'", 'python, shakespeare', '--path']),
    ('--dataset ../x --path novel.txt', ["'../x'", 'letters']),
    ('--path nowhere.txt', ['nowhere.txt', 'no file']),
    ('--path pictures', ['pictures', 'known type', 'jsonl']),
    ('--path empty.txt', ['empty.txt', 'too little text']),
    ('--path short.txt', ['too little text']),
    ('--path broken.xz', ['broken.xz', 'cannot be read']),
    ('--path columns.jsonl', ["no text in a column 'text'", 'title']),
    ('--path null.jsonl', ['row 1 of', "column 'text'"]),
    ('--path torn.jsonl', ['torn.jsonl']),
    ('--path broken.gz', ['broken.gz', 'cannot be read']),
    ('--path  --dataset x', ['--path must not be empty']),
    ('--tokenizer words', ["'words'", 'bytes', 'gpt2']),
])
def test_refused(here, main, refused, words, parts):
    """One line on stderr that says what is allowed, exit 2, nothing made."""
    Path('empty.txt').write_text('')
    Path('short.txt').write_text('short')
    Path('novel.txt').write_bytes(RAW)
    Path('pictures').mkdir()
    Path('pictures/a.png').write_text('')
    Path('broken.xz').write_bytes(lzma.compress(RAW)[:-50])
    Path('broken.gz').write_bytes(gzip.compress(RAW)[:20] + b'nonsense' * 20)
    Path('null.jsonl').write_text('{"text": "a"}\n{"text": null}\n')
    Path('columns.jsonl').write_text('{"title": "a"}\n')
    if 'torn' in words:
        Path('torn.jsonl').write_text('{"text": "a"}\n' * 500000 + '{"text": "a')
    line = refused(main, *words.split(' '))
    assert all(part in line for part in parts), line
    assert not Path('data').exists() or not os.listdir('data')


@needs_corpora
def test_a_download_without_a_network_is_refused(run):
    """A process, because only its environment tells `datasets` that it is offline; it also holds the exit code."""
    run('prepare_data.py', '--dataset', 'wikitext2', code=2, TIKTOKEN_CACHE_DIR=str(CORPORA / 'tiktoken_cache'))
    assert 'Salesforce/wikitext' in run.err and '--path' in run.err and len(run.err.splitlines()) == 1
    assert not os.listdir(run.folder / 'data')


def test_the_source_is_never_the_target(here, main, refused):
    """A text folder inside data_dir has the name of the data set it would make: refused, and still there."""
    chapter = Path('data/novel/chapter.txt')
    chapter.parent.mkdir(parents=True)
    chapter.write_bytes(RAW)
    for words in ('--path data/novel', '--path data/novel/chapter.txt --dataset novel --overwrite',
                  '--path data/novel --data_dir data --overwrite'):
        assert '--data_dir' in refused(main, *words.split())
        assert chapter.read_text(encoding='utf-8') == TEXT
    main('--path', 'data/novel', '--dataset', 'other')
    Path('data/other/mine.txt').write_bytes(RAW)
    assert '--data_dir' in refused(main, '--path', 'data/other/mine.txt', '--dataset', 'other', '--overwrite')
    assert Path('data/other/mine.txt').exists()
