"""
Convert text to token ids: data/<name>/train.bin and val.bin (uint16) and meta.json. train.py calls it when needed.

    python prepare_data.py --path novel.txt --tokenizer gpt2     # your own file or folder -> data/novel

Each document ends with eot_id: GPT-2's <|endoftext|>, or byte 255, which UTF-8 text never contains. A single text file
as bytes has no eot_id. train_bytes and val_bytes count text only. In a folder, words such as train, valid, dev and test
in names decide how a file is used. Test text is left out; without validation text, it is the last tenth of train.
"""
import argparse
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import signal
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np

PIECE = 2 ** 18  # characters to encode at once
ENWIK8_BYTES = 90_000_000, 5_000_000, 5_000_000  # train, validation, test
ORIGINS = {'shakespeare': 'shakespeare.txt of the repository', 'enwik8': 'http://mattmahoney.net/dc/enwik8.zip',
           'python': f'standard library of Python {sys.version.split()[0]}'}
# downloaded with `datasets`: repository, config, validation split, whether a row is a document (else a line)
HUB = {'wikitext2': ('Salesforce/wikitext', 'wikitext-2-raw-v1', 'validation', False),
       'wikitext103': ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'validation', False),
       'tinystories': ('roneneldan/TinyStories', None, 'validation', True),
       'fineweb-edu': ('HuggingFaceFW/fineweb-edu', 'sample-10BT', None, True),
       'wikipedia': ('wikimedia/wikipedia', '20231101.en', None, True)}
TEXT = '.txt .text .md .rst .tex .raw .tokens .py .c .h .cpp .hpp .cu .rs .go .java .js .ts .sh .jl .r .lua'.split()
ROWS = '.jsonl', '.json', '.parquet'
SPLIT_WORDS = {'test': {'test'}, 'val': {'val', 'valid', 'validation', 'dev'}, 'train': {'train', 'training'}}


def die(message, code=2):
    """Print one line on stderr and exit. Code 2: user error, printed by local rank 0. Code 1: printed by every rank."""
    if code == 1 or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'{Path(sys.argv[0]).name}: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    sys.exit(code)


def atomic_write(path, put):
    """put(file) writes a temporary file, which then replaces `path`. Raises OSError, with `path` unchanged."""
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        with open(temporary, 'wb') as f:
            put(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError when the disk is full
        raise OSError(f'{path} could not be written: {e}') from e
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def preparing(name):
    """Turn any error into one line and exit code 2. Only network errors get advice about the network."""
    try:
        yield
    except UnicodeError as e:
        die(f'{name} is not UTF-8 text ({getattr(e, "reason", e)}): unpack an archive, convert UTF-16 with iconv, '
            'or add --tokenizer bytes, which takes the bytes of any file')
    except Exception as e:
        advice = ". Without a network: a local copy with --path; GPT-2's vocabulary in TIKTOKEN_CACHE_DIR (README.md)"
        network = isinstance(e, (ConnectionError, TimeoutError)) or re.match('requests|http|urllib', type(e).__module__)
        die(f'{name} cannot be prepared: {type(e).__name__}: {str(e)[:300]}{advice if network else ""}')


def enwik8(path):
    """A file (plain, .gz, .xz), or None: the download -> sources of its first 90 and its next 5 million bytes."""
    if path is None:
        archive = urllib.request.urlopen(ORIGINS['enwik8'], timeout=60).read()
        opened = zipfile.ZipFile(io.BytesIO(archive)).open('enwik8')
    else:
        opened = file_type(path)[0](path, 'rb')
    n_train, n_val, n_test = ENWIK8_BYTES
    with opened as f:
        parts = {'train': f.read(n_train), 'val': f.read(n_val)}
        if len(f.read(n_test + 1)) != n_test:
            die(f'{path or "the download"} does not have the {sum(ENWIK8_BYTES):,} bytes of enwik8; see --dataset')
    return {part: from_text(io.BytesIO(text), False, True) for part, text in parts.items()}


def from_rows(rows, name, documents):
    """Yield the texts of rows, dicts with a key 'text': documents, or lines of one text. Skips rows without text."""
    row, total, skipped = {}, 0, 0
    for total, row in enumerate(rows, 1):
        text = row.get('text')
        if not isinstance(text, str) or (documents and not text):
            skipped += 1
            continue
        if not documents:
            text = (text.removesuffix('\n') or ' ') + '\n'  # on the hub, WikiText's line ' \n' is the row ''
        yield text.encode('utf-8', 'replace').decode(), documents  # JSON may contain half of a surrogate pair
    if skipped == total:
        die(f"{name} has no text in a column 'text'; its columns are {', '.join(row)}")
    if skipped:
        print(f'{name}: skipped {skipped:,} of {total:,} rows, which have no text', file=sys.stderr)


def file_type(path):
    """-> the function that opens the file (it unpacks .gz and .xz), the suffix before .gz or .xz in lower case."""
    name = Path(path.name.lower())
    unpack = {'.gz': gzip.open, '.xz': lzma.open}.get(name.suffix)
    return (unpack, name.with_suffix('').suffix) if unpack else (open, name.suffix)


def from_text(file, documents, any_bytes):
    """Yield one text in pieces. any_bytes: accept invalid UTF-8, except byte 255 if it ends documents."""
    reader = io.TextIOWrapper(file, 'utf-8', 'surrogateescape' if any_bytes else 'strict', newline='')
    while text := reader.read(PIECE):
        if '\0' in text and not any_bytes:
            raise UnicodeError('it contains byte 0')
        if '\udcff' in text and documents:
            raise ValueError('it contains byte 255, which ends a document: prepare this file by itself')
        yield text, False
    yield '', documents


def from_file(path, documents, any_bytes):
    """Yield the rows of a .jsonl, .json (one object per line) or .parquet file; any other file is one text."""
    unpack, suffix = file_type(path)
    with preparing(path), unpack(path, 'rb') as f:
        if suffix == '.parquet':
            import pyarrow.parquet
            batches = pyarrow.parquet.ParquetFile(f).iter_batches(1000, columns=['text'])
            yield from from_rows(itertools.chain.from_iterable(b.to_pylist() for b in batches), path, documents)
        elif suffix in ROWS:
            yield from from_rows((json.loads(line) for line in f if line.strip()), path, documents)
        else:
            yield from from_text(f, documents, any_bytes)


def split_folder(root):
    """-> {'train': files}, with 'val' if there is validation text. Prints which file is used for what."""
    parts = dict(train=[], val=[], test=[], other=[], unknown=[])
    for file in sorted(root.rglob('*')):
        name = file.relative_to(root).as_posix()
        if '/.' in f'/{name}' or (file.is_dir() and not file.is_symlink()):  # a link to a folder is 'unknown'
            continue
        target = os.path.relpath(file.resolve(), root.resolve())  # differs from the name if there are links
        words = set(re.findall('[a-z]+', f'{name} {target}'.lower()))
        open_file, suffix = file_type(file)
        known = suffix in (*TEXT, '.jsonl', '.parquet') or (open_file is not open and suffix in ('', '.json'))
        part = next((part for part in SPLIT_WORDS if words & SPLIT_WORDS[part]), 'other')  # test, then val, then train
        parts[part if known and file.is_file() else 'unknown'].append(name)
    if not parts['train'] or not (parts['val'] or parts['test']):  # else the other files may repeat held-out text
        parts['train'] = sorted(parts['train'] + parts.pop('other'))
    said = '; '.join(f'{part}: {len(names)} files ({", ".join(names[:5])}{", ..." * (len(names) > 5)})'
                     for part, names in parts.items() if names)
    if not parts['train']:
        die(f'--path {root} has no text to train on ({said}); known types: {" ".join(TEXT)} .jsonl .parquet .gz .xz')
    print(f'{root}: {said}{"" if parts["val"] else "; val: the last tenth"}. The rest is unused', file=sys.stderr)
    return {part: [root / name for name in parts[part]] for part in ('train', 'val') if parts[part]}


def open_sources(dataset, path, any_bytes):
    """-> {'train': source}, perhaps with 'val'; whether there are documents. A source yields (text, document ends)."""
    if dataset == 'enwik8':
        return enwik8(path), False
    repo, config, val, documents = HUB.get(dataset, (None, None, None, True))
    if path is None and repo:
        os.environ.setdefault('HF_HUB_VERBOSITY', 'error')  # otherwise every retry is printed
        import datasets
        return {part: from_rows(datasets.load_dataset(repo, config, split=split, streaming=True), repo, documents)
                for part, split in (('train', 'train'), ('val', val)) if split}, documents
    if path is None and dataset == 'python':
        root = Path(os.__file__).parent
        left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', 'distutils'}
        names = [file.relative_to(root).as_posix() for file in root.rglob('*.py')]
        names.sort(key=lambda name: (hashlib.sha256(name.split('/')[0].encode()).digest(), name))  # by package
        parts = {'train': [root / name for name in names if not left_out & set(name.split('/'))]}
    else:
        path = path or Path(__file__).with_name('shakespeare.txt')
        parts = split_folder(path) if path.is_dir() else {'train': [path]}
        documents = documents and (path.is_dir() or file_type(path)[1] in ROWS)
    return {part: itertools.chain.from_iterable(from_file(file, documents, any_bytes) for file in files)
            for part, files in parts.items()}, documents


def load_tiktoken(name):
    """-> an encoding of tiktoken, which downloads its vocabulary at its first use."""
    with preparing(f'tokenizer {name}'):
        import tiktoken
        return tiktoken.get_encoding(name)


def write_ids(path, source, documents, tokens, eot):
    """Encode a source into a file -> ids, bytes of text. It is cut before white space, where GPT-2's tokens begin."""
    size = 0
    held = ''  # not encoded yet
    with open(path, 'wb') as f:
        for text, end in itertools.chain(source, [('', not documents)]):
            held += text
            if len(held) < PIECE and not end:
                continue
            cut = len(held) if end else re.match(r'(?s).*\S(?=[ \n])|.*', held).end()  # '.*': no white space
            raw = held[:cut].encode('utf-8', 'surrogateescape')
            new = tokens.encode_ordinary(held[:cut]) if tokens else np.frombuffer(raw, np.uint8)
            if end and eot is not None:
                new = np.append(new, eot)
            np.asarray(new, np.uint16).tofile(f)
            held = held[cut:]
            size += len(raw)
    return path.stat().st_size // 2, size


def write_all(folder, sources, documents, origin, tokenizer):
    """Write train.bin, val.bin and meta.json into the folder."""
    tokens = None if tokenizer == 'bytes' else load_tiktoken(tokenizer)
    vocab_size = tokens.n_vocab if tokens else 256
    eot = tokens.eot_token if tokens else (255 if documents else None)
    counts = {part: write_ids(folder / f'{part}.bin', source, documents, tokens, eot)
              for part, source in sources.items()}
    if 'val' not in counts:  # move the end of train.bin
        n, size = counts['train']
        n_train = max(n * 9 // 10, n - 5_000_000)
        val = np.fromfile(folder / 'train.bin', np.uint16, offset=2 * n_train)
        val.tofile(folder / 'val.bin')
        os.truncate(folder / 'train.bin', 2 * n_train)
        text = val if eot is None else val[val != eot]
        val_size = len(tokens.decode_bytes(text.tolist())) if tokens else len(text)
        counts = {'train': (n_train, size - val_size), 'val': (n - n_train, val_size)}
    meta = dict(tokenizer=tokenizer, vocab_size=vocab_size, mask_id=vocab_size, eot_id=eot, dtype='uint16')
    meta |= dict(source=origin, sha256={})
    for part, (n, size) in counts.items():
        if not size:
            die(f'too little text in {origin}: nothing is left for {part}')
        meta |= {f'{part}_tokens': n, f'{part}_bytes': size}
        meta['sha256'][part] = hashlib.sha256(np.memmap(folder / f'{part}.bin', np.uint8)).hexdigest()
    atomic_write(folder / 'meta.json', lambda f: f.write(json.dumps(meta, indent=1).encode()))
    print(f'{meta["train_tokens"]:,} ids to train on, {meta["val_tokens"]:,} to validate, {tokenizer}', file=sys.stderr)


def clean_up(folder, temporary):
    """Remove the temporary folder. If the old data set was moved there and not replaced, move it back first."""
    if (temporary / 'old').exists() and not folder.exists():
        (temporary / 'old').rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)


def prepare(dataset, tokenizer=None, path=None, data_dir='data', overwrite=False):
    """Write data_dir/dataset from a known data set or from `path`, a file or folder. Exits with code 2 if it cannot.

    tokenizer: 'bytes' (of any file), 'gpt2', or None: gpt2 for the data sets in HUB, else the bytes of UTF-8 text.
    """
    folder = Path(data_dir, dataset)
    path = None if path is None else Path(path)
    if path is None and dataset not in {**ORIGINS, **HUB}:
        die(f'--dataset must be {", ".join([*ORIGINS, *HUB])}, or any name with --path, not {dataset!r}')
    if not re.fullmatch(r'[\w.-]*\w[\w.-]*', dataset):
        die(f'--dataset {dataset!r} names a folder: letters, digits, dots, dashes and underscores only')
    if folder.exists() and not (folder / 'meta.json').exists():
        die(f'{folder} exists and is no prepared data set: choose another --dataset name or --data_dir')
    if path and folder.resolve() in (path.resolve(), *path.resolve().parents):
        die(f'--path {path} is inside the folder that would be replaced: choose another --dataset name or --data_dir')
    origin = str(path.resolve()) if path else ORIGINS.get(dataset) or HUB[dataset][0]
    kind = tokenizer or ('gpt2' if dataset in HUB else 'bytes')
    temporary = folder.with_name(f'.{dataset}.tmp')
    with preparing(dataset):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f'.{dataset}.lock'), 'w') as lock:
            if os.name == 'posix':
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX)  # wait for another process; the system unlocks the file when it ends
            clean_up(folder, temporary)  # of a process that was killed
            if folder.exists() and not overwrite:
                meta = load(folder)[0]
                if (meta['source'], meta['tokenizer']) != (origin, kind):
                    die(f'{folder} was prepared from {meta["source"]} (tokenizer {meta["tokenizer"]}), not from '
                        f'{origin} (tokenizer {kind}): choose another --dataset name, or add --overwrite')
                print(f'{folder} is already prepared from {origin}; --overwrite prepares it again', file=sys.stderr)
                return
            try:
                (temporary / 'new').mkdir(parents=True)
                write_all(temporary / 'new', *open_sources(dataset, path, tokenizer == 'bytes'), origin, kind)
                if folder.exists():
                    folder.rename(temporary / 'old')
                (temporary / 'new').rename(folder)
            finally:
                clean_up(folder, temporary)


def load(folder):
    """data_dir/dataset -> meta (dict), train and validation ids (memory maps). Exits with code 2 if it is damaged."""
    ids, name = {}, 'meta.json'
    try:
        meta = json.loads(Path(folder, name).read_text(encoding='utf-8'))
        if min(meta['train_bytes'], meta['val_bytes']) < 1 or not 0 < meta['vocab_size'] <= meta['mask_id'] < 2 ** 24:
            raise ValueError('its sizes are not possible')
        for part in ('train', 'val'):
            name = f'{part}.bin'
            ids[part] = np.memmap(Path(folder, name), np.uint16, 'r')
            if hashlib.sha256(ids[part]).hexdigest() != meta['sha256'][part]:  # takes about 1 s per GB
                raise ValueError('its ids are not those that meta.json describes')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        die(f'{folder} is damaged ({name}: {type(e).__name__} {e}): delete it and prepare it again')
    return meta, ids['train'], ids['val']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: die(f'{message} (see python prepare_data.py --help)')
    parser.add_argument('--dataset', help=f'{", ".join([*ORIGINS, *HUB])}, or a name for the text of --path')
    parser.add_argument('--tokenizer', choices=('bytes', 'gpt2'), help='default: gpt2 for downloads, else bytes')
    parser.add_argument('--path', help='a file (.txt .gz .xz .jsonl .parquet) or a folder, instead of a download')
    parser.add_argument('--data_dir', default='data', help='where the data sets are (default data)')
    parser.add_argument('--overwrite', action='store_true', help='replace a data set of that name')
    args = parser.parse_args()
    if args.path == '':
        die('--path must not be empty')
    name = os.path.basename(os.path.abspath(args.path)).split('.')[0] if args.path else 'shakespeare'
    prepare(args.dataset or re.sub(r'[^\w-]+', '_', name), args.tokenizer, args.path, args.data_dir, args.overwrite)


if __name__ == '__main__':
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # clean_up runs on the way out
    main()
