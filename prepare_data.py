"""
Text -> data/<name>/train.bin, val.bin and meta.json. train.py calls this by itself when a data set is missing.

    python prepare_data.py --dataset python                      # the standard library of this Python, as bytes: no download
    python prepare_data.py --dataset wikitext2                   # fetched through `datasets`, GPT-2's tokens
    python prepare_data.py --path novel.txt --tokenizer bytes    # a file or a folder of your own -> data/novel

The .bin files are plain token ids one after the other (np.memmap reads them), without [MASK], which is the first id
after the tokenizer's last. Text streams through in small pieces, so memory stays small whatever the corpus.
"""
import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import signal
import socket
import sys
import time
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PIECE = 2 ** 18  # characters; larger ones leave the cache
# name: (where `datasets` finds it, its arguments, validation split or None, whether each row is a document, tokenizer)
CORPORA = {
    'shakespeare': ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt', {}, None, True, 'bytes'),
    'wikitext2': ('Salesforce/wikitext', dict(name='wikitext-2-raw-v1'), 'validation', False, 'gpt2'),
    'wikitext103': ('Salesforce/wikitext', dict(name='wikitext-103-raw-v1'), 'validation', False, 'gpt2'),
    'tinystories': ('roneneldan/TinyStories', {}, 'validation', True, 'gpt2'),
    'fineweb-edu': ('HuggingFaceFW/fineweb-edu', dict(name='sample-10BT'), None, True, 'gpt2'),
    'wikipedia': ('wikimedia/wikipedia', dict(name='20231101.en'), None, True, 'gpt2'),
}


def die(message):
    print(f'prepare_data.py: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# sources: generators of (text, whether a document ends here)

def standard_library():
    """The .py files of the running Python without its tests: 12 MB. Their order is shuffled, but always the same."""
    root = Path(os.__file__).parent
    files = [p for p in root.rglob('*.py') if not {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'} & set(p.relative_to(root).parts)]
    for p in sorted(files, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest()):
        yield p.read_text(encoding='utf-8', errors='replace'), True


def from_address(url):
    """One text of the web."""
    try:
        with urllib.request.urlopen(url, timeout=60) as f:
            yield f.read().decode('utf-8'), True
    except (OSError, ValueError) as e:
        die(f'{url} cannot be read: {e}. Without a network, --path takes a local copy')


def from_datasets(where, split, rows_are_documents, **kwargs):
    """Rows of a data set of the hub, or of .jsonl and .parquet files, streamed; the text is in the column 'text'."""
    try:
        import datasets
        import huggingface_hub
        huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, once
        for n, row in enumerate(datasets.load_dataset(where, split=split, streaming=True, **kwargs)):
            if not isinstance(row.get('text'), str):
                die(f"row {n} of {where} {kwargs or ''} has no text in a column 'text'; its columns are {', '.join(row)}")
            yield row['text'], rows_are_documents
    except Exception as e:  # no network, no such file, a broken one: many libraries, one line
        die(f'`datasets` cannot read {where} {kwargs or ""}: {type(e).__name__}: {" ".join(str(e).split())[:300]}. '
            f'Without a network, --path takes a local copy')


def from_file(path, errors):
    """A .jsonl or .parquet file by rows, anything else (.gz and .xz unpacked) as one text."""
    if path.suffix in ('.jsonl', '.parquet'):
        yield from from_datasets({'.jsonl': 'json', '.parquet': 'parquet'}[path.suffix], 'train', True, data_files=str(path))
        return
    try:
        with {'.gz': gzip.open, '.xz': lzma.open}.get(path.suffix, open)(path, 'rt', encoding='utf-8', errors=errors, newline='') as f:
            while text := f.read(PIECE):
                yield text, False
    except (UnicodeDecodeError, lzma.LZMAError, zlib.error, EOFError, OSError) as e:
        die(f'{path} cannot be read as UTF-8 text (.gz and .xz are unpacked): {e}')
    yield '', True


def split_folder(path):
    """A file, or the files of a folder -> {'train': files}, or 'train' and 'val' where names such as wiki.valid.txt say so."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob('*') if p.is_file() and not re.search(r'(^|/)\.', p.relative_to(path).as_posix()))
    if not files or not path.exists():
        die(f'--path {path} is no file and no folder with files')
    said = {p: (re.findall(r'(?:^|[._-])(train|val|dev)(?:id|idation)?(?=[._-])', p.name) or [''])[-1] for p in files}
    train, val = ([p for p in files if said[p] in words] for words in (('train',), ('val', 'dev')))
    if train and val:
        return {'train': train, 'val': val}
    return {'train': files}


# ---------------------------------------------------------------------------------------------------------------------
# text -> ids

def pieces(source):
    """(text, end) -> lists of (text, end) of about PIECE characters.

    A long text is cut where white space follows something else: GPT-2's pattern never joins those two, so the tokens
    are those of the whole text.
    """
    piece, parts, size, total = [], [], 0, 0
    for text, end in source:
        parts.append(text)
        size += len(text)
        if not end and size < PIECE:
            continue
        text, parts, size = ''.join(parts), [], 0
        if not end and (place := re.match(r'(?s).*\S(?=[ \n])', text)):
            parts, size = [text[place.end():]], len(text) - place.end()
            text = text[:place.end()]
        piece.append((text, end))
        total += len(text)
        if total >= PIECE // 2:  # a cut has taken a little off
            yield piece
            piece, total = [], 0
    yield piece + [(''.join(parts), False)]


def tokenizer(name):
    """-> function from a list of (text, end) to (ids, bytes of text), length in bytes of each id, number of ids."""
    if name == 'bytes':
        def encode(piece):
            raw = b''.join(text.encode('utf-8', 'surrogateescape') for text, _ in piece)
            return np.frombuffer(raw, np.uint8), len(raw)
        return encode, np.ones(256, np.int64), 256
    try:
        import tiktoken
        enc = tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken fetches its vocabulary on first use
        die(f'tiktoken cannot load {name}: {type(e).__name__}. Without a network set TIKTOKEN_CACHE_DIR, or use --tokenizer bytes')

    def encode(piece):
        ids = []
        for text, end in piece:
            ids.append(enc.encode_to_numpy(text, disallowed_special=()))
            if end:
                ids.append(np.array([enc.eot_token], np.uint32))
        return np.concatenate(ids), sum(len(text.encode()) for text, _ in piece)
    lengths = [0 if i == enc.eot_token else len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
    return encode, np.array(lengths), enc.n_vocab


def write(path, source, encode, dtype):
    """Encode a stream of text into a file, on every core (tiktoken leaves Python's lock) -> (ids, bytes of text)."""
    ids = size = shown = 0
    began, cores = time.time(), len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with open(path, 'wb') as f, ThreadPoolExecutor(cores) as pool:
        waiting = deque()

        def store():
            nonlocal ids, size, shown
            new, n = waiting.popleft().result()
            f.write(new.astype(dtype).tobytes())
            ids, size = ids + len(new), size + n
            if time.time() - shown > 0.2 and sys.stderr.isatty():
                shown = time.time()
                print(f'\r{path.stem}: {size / 1e6:,.1f} MB, {ids:,} ids, {size / 1e6 / (shown - began):.1f} MB/s ', end='', file=sys.stderr)
        for piece in pieces(source):
            waiting.append(pool.submit(encode, piece))
            if len(waiting) > 2 * cores:  # read no further ahead
                store()
        while waiting:
            store()
    print('\r' * sys.stderr.isatty() + f'{path.stem}: {size / 1e6:,.1f} MB, {ids:,} ids in {time.time() - began:.1f} s', file=sys.stderr)
    return ids, size


def prepare(dataset, tokenizer_name=None, path=None, data_dir='data'):
    """Make data_dir/dataset, or leave what is there as it was: all is written beside and renamed when it is whole."""
    if path is None and dataset != 'python' and dataset not in CORPORA:
        die(f'there is no data set {dataset!r}; known are python, {", ".join(CORPORA)}; your own: '
            f'python prepare_data.py --dataset {dataset} --path FILE_OR_FOLDER')
    if not re.fullmatch(r'[\w.-]*\w[\w.-]*', dataset):
        die(f'--dataset {dataset!r} names a folder: letters, digits, dots, dashes and underscores only')
    where, kwargs, val_split, rows_are_documents, default = CORPORA.get(dataset, (None, {}, None, True, 'bytes'))
    name = tokenizer_name or default
    encode, lengths, vocab = tokenizer(name)
    if path is not None:
        files = split_folder(Path(path))
        errors = 'surrogateescape' if name == 'bytes' else 'strict'
        sources = {part: (row for p in files[part] for row in from_file(p, errors)) for part in files}
    elif where and where.startswith('https:'):
        sources = {'train': from_address(where)}
    elif dataset == 'python':
        sources = {'train': standard_library()}
    else:
        splits = {'train': 'train', **({'val': val_split} if val_split else {})}
        sources = {part: from_datasets(where, split, rows_are_documents, **kwargs) for part, split in splits.items()}

    folder, dtype = Path(data_dir, dataset), np.dtype('uint16' if vocab < 65535 else 'uint32')
    if folder.exists() and not (folder / 'meta.json').exists():
        die(f'{folder} exists and is no prepared data set: choose another --dataset name or --data_dir')
    if path is not None and folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
        die(f'--path {path} is what would be replaced: choose another --dataset name or --data_dir')
    temporary = folder.with_name(f'.{dataset}.{socket.gethostname()}.{os.getpid()}.tmp')
    for old in folder.parent.glob(f'.{dataset}.{socket.gethostname()}.*.tmp'):  # left by a run of this machine that was killed outright
        if not running(old.name.split('.')[-2]):
            shutil.rmtree(old)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        counts = {part: write(temporary / f'{part}.bin', source, encode, dtype) for part, source in sources.items()}
        if 'val' not in counts:  # the last tenth, at most five million ids, moves from train.bin to val.bin
            (ids, size), n = counts['train'], min(counts['train'][0] // 10, 5_000_000)
            tail = np.fromfile(temporary / 'train.bin', dtype, offset=(ids - n) * dtype.itemsize)
            tail.tofile(temporary / 'val.bin')
            os.truncate(temporary / 'train.bin', (ids - n) * dtype.itemsize)
            counts = {'train': (ids - n, size - int(lengths[tail].sum())), 'val': (n, int(lengths[tail].sum()))}
        if not all(ids for ids, _ in counts.values()):
            die(f'too little text in {path or dataset}: {counts["train"][0]} ids to train on, {counts["val"][0]} to validate')
        meta = dict(tokenizer=name, vocab_size=vocab, mask_id=vocab, dtype=dtype.name,
                    **{f'{part}_{unit}': n for part, both in counts.items() for unit, n in zip(('tokens', 'bytes'), both)},
                    source=str(path or (f'standard library of Python {sys.version.split()[0]}' if dataset == 'python' else where)),
                    sha256={part: sha256(temporary / f'{part}.bin') for part in counts})
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
        aside = folder.with_name(f'.{dataset}.{socket.gethostname()}.old.{os.getpid()}.tmp')
        try:
            if folder.exists():
                folder.rename(aside)
            temporary.rename(folder)
        except OSError:
            if not (folder / 'meta.json').exists():
                raise  # else another run, started at the same time, was faster
        finally:
            if aside.exists() and not folder.exists():
                aside.rename(folder)  # interrupted between the two: what was there comes back
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f'{folder}: {meta["train_tokens"]:,} ids to train on, {meta["val_tokens"]:,} to validate, {name}', file=sys.stderr)


def running(pid):
    """Whether a process of this machine may still be alive; where that cannot be asked (Windows) it may."""
    if os.name == 'nt' or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2 ** 24):
            digest.update(block)
    return digest.hexdigest()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: die(f'{message} (see python prepare_data.py --help)')
    parser.add_argument('--dataset', help=f'python, {", ".join(CORPORA)}, or a name for the text of --path (default: its name)')
    parser.add_argument('--tokenizer', choices=('bytes', 'gpt2'), help='default: gpt2 for the large corpora, bytes otherwise')
    parser.add_argument('--path', help='a file (.txt .gz .xz .jsonl .parquet) or a folder of them, instead of a download')
    parser.add_argument('--data_dir', default='data', help='where the data sets are (default data)')
    args = parser.parse_args()
    if args.path == '':
        die('--path must not be empty')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-made is removed
    try:
        prepare(args.dataset or (Path(args.path).name.split('.')[0] if args.path else 'python'), args.tokenizer, args.path, args.data_dir)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        die(e)
