"""
Text -> data/<name>/train.bin, val.bin and meta.json. train.py calls this by itself when a data set is missing.

    python prepare_data.py --dataset python                      # Python's own standard library as bytes: no download
    python prepare_data.py --dataset wikitext2                   # fetched through `datasets`, GPT-2's tokens
    python prepare_data.py --path novel.txt --tokenizer bytes    # your own file or folder -> data/novel

The .bin files are plain token ids, one after the other (np.memmap reads them). They hold no [MASK]: its id is the first
one after the tokenizer's last. Text is read in small pieces, so memory stays small whatever the size of the corpus.
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
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PIECE = 2 ** 18  # characters; larger pieces do not fit into the processor's cache
SMALL = 2 ** 26  # bytes of a file whose checksum load() compares: 2 ms a MB
MEDIUM = 2 ** 30  # bytes of a file whose ids load() looks through: 0.1 ms a MB
SHAKESPEARE = Path(__file__).resolve().parent / 'shakespeare.txt'  # in the repository
# fetched through `datasets`: where, arguments, validation split or None, whether each row is a document, tokenizer
CORPORA = {
    'shakespeare': (SHAKESPEARE, {}, None, True, 'bytes'),
    'wikitext2': ('Salesforce/wikitext', dict(name='wikitext-2-raw-v1'), 'validation', False, 'gpt2'),
    'wikitext103': ('Salesforce/wikitext', dict(name='wikitext-103-raw-v1'), 'validation', False, 'gpt2'),
    'tinystories': ('roneneldan/TinyStories', {}, 'validation', True, 'gpt2'),
    'fineweb-edu': ('HuggingFaceFW/fineweb-edu', dict(name='sample-10BT'), None, True, 'gpt2'),
    'wikipedia': ('wikimedia/wikipedia', dict(name='20231101.en'), None, True, 'gpt2'),
}
NAMES = 'python, ' + ', '.join(CORPORA)
# what is read from a folder; text files also with .gz or .xz after their suffix
TEXT = 'txt text md rst tex raw tokens py c h cpp hpp cu rs go java js ts sh jl r lua'
SUFFIXES = rf'\.({TEXT.replace(" ", "|")})(\.gz|\.xz)?|\.jsonl|\.parquet|^[^.]+\.(gz|xz)'  # enwik8.xz is text, too
KNOWN_TYPE = re.compile(f'({SUFFIXES})$', re.IGNORECASE)


def die(message, code=2):
    """Print one line on stderr and exit. Code 2: wrong input, printed by local rank 0. Code 1: a failure of this process."""
    if code == 1 or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'{Path(sys.argv[0]).name}: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    sys.exit(code)


def atomic_write(path, put):
    """Call put(file) on a temporary file, fsync it and move it to `path`: a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            put(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# sources: generators of (text, whether a document ends here)

def standard_library():
    """The .py files of the running Python without its tests: 12 MB. Their order is shuffled, but always the same."""
    root = Path(os.__file__).parent
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}
    names = [p.relative_to(root) for p in root.rglob('*.py')]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        if not left_out & set(name.parts):
            yield (root / name).read_text(encoding='utf-8', errors='replace'), True


def from_datasets(where, split, rows_are_documents, **arguments):
    """The column 'text' of a data set of the hub, or of a .jsonl or .parquet file, row by row."""
    origin = arguments.get('data_files', where)
    try:
        import datasets
        import huggingface_hub
        huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below, once
        for n, row in enumerate(datasets.load_dataset(where, split=split, streaming=True, **arguments)):
            if not isinstance(row.get('text'), str):
                die(f"row {n} of {origin} has no text in a column 'text'; its columns are {', '.join(row)}")
            yield row['text'], rows_are_documents
    except Exception as e:  # no network, no such file, a damaged one: errors of many libraries become one line
        reason = ' '.join(str(e).split())[:300]
        die(f'`datasets` cannot read {origin}: {type(e).__name__}: {reason}. '
            'Without a network, give prepare_data.py a local copy with --path')


def from_file(path, errors):
    """A .jsonl or .parquet file row by row, any other file (.gz and .xz unpacked) as one text."""
    suffix = path.suffix.lower()
    if suffix in ('.jsonl', '.parquet'):
        reader = 'json' if suffix == '.jsonl' else 'parquet'
        yield from from_datasets(reader, 'train', True, data_files=str(path))
        return
    open_text = {'.gz': gzip.open, '.xz': lzma.open}.get(suffix, open)
    try:
        with open_text(path, 'rt', encoding='utf-8', errors=errors, newline='') as f:
            while text := f.read(PIECE):
                yield text, False
    except UnicodeDecodeError as e:
        die(f'{path} is not UTF-8 text ({e.reason}): use --tokenizer bytes, which takes any file, '
            'or convert it to UTF-8, for example with iconv')
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as e:
        die(f'{path} cannot be read (.gz and .xz are unpacked): {e}')
    yield '', True


def find_files(path):
    """A file by itself, whatever its type; of a folder all files of a known type that are not hidden."""
    if path.exists() and not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob('*') if p.is_file())
    files = [p for p in files if not re.search(r'(^|/)\.', p.relative_to(path).as_posix())]
    known = [p for p in files if KNOWN_TYPE.search(p.name)]
    skipped = [p.name for p in files if not KNOWN_TYPE.search(p.name)]
    if not known:
        die(f'--path {path} is no file and no folder with files of a known type: {TEXT} (also .gz .xz) jsonl parquet')
    say_skipped(skipped, files, 'of unknown type')
    return known


def say_skipped(names, files, why):
    if names:
        shown = ', '.join(names if len(names) <= 5 else [*names[:5], '...'])
        print(f'skipped {len(names)} of {len(files)} files, {why}: {shown}', file=sys.stderr)


def split_by_name(files):
    """-> {'train': files, 'val': files} if names such as a.train.raw and a.valid.raw say so, else {'train': files}."""
    parts = {'train': [], 'val': []}
    others = []
    for file in files:
        words = re.findall(r'(?:^|[._-])(train|val|dev)(?:id|idation)?(?=[._-])', file.name)
        (parts['train' if words[-1] == 'train' else 'val'] if words else others).append(file)
    if not (parts['train'] and parts['val']):
        return {'train': files}
    say_skipped([file.name for file in others], files, 'named neither train nor valid')
    return parts


def open_sources(dataset, path, tokenizer):
    """-> origin of the text, and {'train': source} with 'val' where there is one. Nothing is read yet."""
    if path is not None:
        errors = 'surrogateescape' if tokenizer == 'bytes' else 'strict'  # as bytes, anything comes through unchanged
        parts = split_by_name(find_files(Path(path)))
        sources = {part: (row for file in files for row in from_file(file, errors)) for part, files in parts.items()}
        return str(Path(path).resolve()), sources
    if dataset == 'python':
        return f'standard library of Python {sys.version.split()[0]}', {'train': standard_library()}
    where, arguments, validation, rows_are_documents, _ = CORPORA[dataset]
    if dataset == 'shakespeare':
        return where.name, {'train': from_file(where, 'strict')}
    sources = {'train': from_datasets(where, 'train', rows_are_documents, **arguments)}
    if validation:
        sources['val'] = from_datasets(where, validation, rows_are_documents, **arguments)
    return where, sources


# ---------------------------------------------------------------------------------------------------------------------
# text -> ids

def pieces(source):
    """(text, end) -> lists of (text, end) of about PIECE characters.

    A long text is cut where white space follows something else. GPT-2's pattern never joins those two, so the tokens
    are those of the whole text.
    """
    piece = []
    size = 0
    held = ''  # the part of a text that is in no piece yet
    for text, end in source:
        held += text
        if not end and len(held) < PIECE:
            continue
        last_space = None if end else re.match(r'(?s).*\S(?=[ \n])', held)
        cut = last_space.end() if last_space else len(held)
        piece.append((held[:cut], end))
        held = held[cut:]
        size += cut
        if size >= PIECE // 2:  # the cut made the text a little shorter than PIECE
            yield piece
            piece = []
            size = 0
    yield piece + [(held, False)]


def load_tiktoken(name):
    try:
        import tiktoken
        return tiktoken.get_encoding(name)
    except ModuleNotFoundError as e:
        die(f'the tokenizer {name} needs {e.name}, which is not installed: pip install tiktoken')
    except Exception as e:  # tiktoken fetches its vocabulary on first use
        die(f'tiktoken cannot load {name}: {type(e).__name__}. Without a network, set TIKTOKEN_CACHE_DIR to a folder '
            'with its vocabulary (see Data in README.md)')


def load_tokenizer(name):
    """-> function from a list of (text, end) to ids, and the bytes of text in each id of the vocabulary."""
    if name == 'bytes':
        def encode_bytes(piece):
            text = ''.join(text for text, _ in piece)
            return np.frombuffer(text.encode('utf-8', 'surrogateescape'), np.uint8)
        return encode_bytes, np.ones(256, np.int64)
    tokens = load_tiktoken(name)

    def encode(piece):
        ids = []
        for text, end in piece:
            ids.append(tokens.encode_to_numpy(text, disallowed_special=()))
            if end:
                ids.append(np.array([tokens.eot_token], np.uint32))
        return np.concatenate(ids)
    lengths = np.array([len(tokens.decode_single_token_bytes(i)) for i in range(tokens.n_vocab)])
    lengths[tokens.eot_token] = 0  # the mark of a document's end is no text
    return encode, lengths


def encode_all(encode, source):
    """encode(piece) for each piece of the source, in order, on every core: tiktoken releases Python's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    waiting = deque()
    with ThreadPoolExecutor(cores) as pool:
        for piece in pieces(source):
            waiting.append(pool.submit(encode, piece))
            if len(waiting) > 2 * cores:  # read no further ahead
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_ids(path, source, encode, lengths, dtype):
    """Encode a stream of text into a file -> (ids, bytes of text)."""
    ids = 0
    size = 0
    began = time.time()
    shown = began
    with open(path, 'wb') as f:
        for new_ids in encode_all(encode, source):
            f.write(new_ids.astype(dtype).tobytes())
            ids += len(new_ids)
            size += int(lengths[new_ids].sum())
            if sys.stderr.isatty() and time.time() - shown > 0.2:
                shown = time.time()
                print(f'{path.stem}: {size / 1e6:,.1f} MB, {ids:,} ids', end='\r', file=sys.stderr)
    seconds = time.time() - began
    print(f'{path.stem}: {size / 1e6:,.1f} MB, {ids:,} ids in {seconds:.1f} s', file=sys.stderr)
    return ids, size


def cut_validation(folder, ids, size, lengths, dtype):
    """Move the last tenth of train.bin, at most five million ids, to val.bin -> {part: (ids, bytes of text)}."""
    n = min(ids // 10, 5_000_000)
    tail = np.fromfile(folder / 'train.bin', dtype, offset=(ids - n) * dtype.itemsize)
    tail.tofile(folder / 'val.bin')
    os.truncate(folder / 'train.bin', (ids - n) * dtype.itemsize)
    tail_size = int(lengths[tail].sum())
    return {'train': (ids - n, size - tail_size), 'val': (n, tail_size)}


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2 ** 24):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# the folder: made beside its place under a hidden name, and moved there when it is whole

def prepare(dataset, tokenizer=None, path=None, data_dir='data', overwrite=False):
    """Make data_dir/dataset. If it is there, it is kept or refused; with `overwrite` it is replaced."""
    folder = Path(data_dir, dataset)
    if path is None and dataset != 'python' and dataset not in CORPORA:
        die(f'there is no data set {dataset!r}; known are {NAMES}; your own: '
            f'python prepare_data.py --dataset {dataset} --path FILE_OR_FOLDER')
    if not re.fullmatch(r'[\w.-]*\w[\w.-]*', dataset):
        die(f'--dataset {dataset!r} names a folder: letters, digits, dots, dashes and underscores only')
    if folder.exists() and not (folder / 'meta.json').exists():
        die(f'{folder} exists and is no prepared data set: choose another --dataset name or --data_dir')
    if path is not None and folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
        die(f'--path {path} is what would be replaced: choose another --dataset name or --data_dir')
    tokenizer = tokenizer or (CORPORA[dataset][-1] if dataset in CORPORA else 'bytes')
    origin, sources = open_sources(dataset, path, tokenizer)

    remove_leftovers(folder)
    if folder.exists() and not overwrite:
        return keep_or_refuse(folder, origin, tokenizer)
    temporary = folder.with_name(f'.{dataset}.{socket.gethostname()}.{os.getpid()}.tmp')
    new = temporary / 'new'
    old = temporary / 'old'  # what is replaced waits here until the new one is in place
    new.mkdir(parents=True, exist_ok=True)
    try:
        meta = write_all(new, sources, origin, tokenizer)
        try:
            if overwrite and folder.exists():
                folder.rename(old)
            new.rename(folder)
        except OSError:
            if not (folder / 'meta.json').exists():
                raise
            return keep_or_refuse(folder, origin, tokenizer)  # another run, started at the same time, was faster
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)  # interrupted between the two: what was there comes back
        shutil.rmtree(temporary, ignore_errors=True)
    ids = f'{meta["train_tokens"]:,} ids to train on, {meta["val_tokens"]:,} to validate'
    print(f'{folder}: {ids}, {tokenizer}', file=sys.stderr)


def write_all(folder, sources, origin, tokenizer):
    """Write train.bin, val.bin and meta.json into the folder -> what meta.json holds."""
    encode, lengths = load_tokenizer(tokenizer)
    vocab_size = len(lengths)
    dtype = np.dtype('uint16')  # holds the ids of both tokenizers
    counts = {part: write_ids(folder / f'{part}.bin', text, encode, lengths, dtype) for part, text in sources.items()}
    if 'val' not in counts:
        counts = cut_validation(folder, *counts['train'], lengths, dtype)
    (train_ids, train_bytes), (val_ids, val_bytes) = counts['train'], counts['val']
    if not (train_ids and val_ids):
        die(f'too little text in {origin}: {train_ids} ids to train on, {val_ids} to validate')
    meta = dict(tokenizer=tokenizer, vocab_size=vocab_size, mask_id=vocab_size, dtype=dtype.name,
                train_tokens=train_ids, train_bytes=train_bytes, val_tokens=val_ids, val_bytes=val_bytes,
                source=origin, sha256={part: sha256(folder / f'{part}.bin') for part in counts})
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
    return meta


def keep_or_refuse(folder, origin, tokenizer):
    """A data set of this origin and tokenizer stays as it is; another one is refused."""
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        found = f'{meta["source"]} (tokenizer {meta["tokenizer"]})'
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        die(f'{folder} is damaged ({type(e).__name__} {e}): add --overwrite to prepare it again')
    wanted = f'{origin} (tokenizer {tokenizer})'
    if found != wanted:
        die(f'{folder} was prepared from {found}, not from {wanted}: '
            'choose another --dataset name, or add --overwrite to replace it')
    print(f'{folder} is already prepared from {found}; add --overwrite if that text has changed', file=sys.stderr)


def remove_leftovers(folder):
    """Delete what runs of this machine left when they were killed outright. Windows cannot tell: there it stays."""
    if os.name == 'nt':
        return
    for left in folder.parent.glob(f'.{folder.name}.{socket.gethostname()}.*.tmp'):
        try:
            os.kill(int(left.name.split('.')[-2]), 0)  # signal 0 only asks whether the process is there
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)  # another run may be deleting it too
        except PermissionError:
            pass  # it is there, and another user's


def check_fields(meta, **kinds):
    for name, kind in kinds.items():
        if not isinstance(meta, dict) or type(meta.get(name)) is not kind:
            raise ValueError(f'it needs {name}, of type {kind.__name__}')


def check_vocabulary(meta):
    """Raise ValueError unless `meta` says what a checkpoint must say of its tokens."""
    check_fields(meta, tokenizer=str, vocab_size=int, mask_id=int, sha256=dict)
    if not 0 < meta['vocab_size'] <= meta['mask_id'] < 2 ** 24:
        raise ValueError('vocab_size must be positive, and mask_id from there to 2^24')
    if not all(isinstance(digest, str) for digest in meta['sha256'].values()):
        raise ValueError('sha256 must hold strings')


def check_meta(meta):
    """Raise ValueError unless `meta` can be what write_all() put into meta.json."""
    check_vocabulary(meta)
    counts = ('train_tokens', 'train_bytes', 'val_tokens', 'val_bytes')
    check_fields(meta, dtype=str, source=str, **dict.fromkeys(counts, int))
    if meta['dtype'] not in ('uint16', 'uint32'):
        raise ValueError(f'dtype must be uint16 or uint32, not {meta["dtype"]}')
    if min(meta[name] for name in counts) <= 0:
        raise ValueError(f'{", ".join(counts)} must be positive')


def load(folder, check_data=False):
    """What prepare() made -> meta.json as a dict, train and validation ids as memory maps. Refuses what is damaged.

    The ids are compared with the vocabulary in files up to MEDIUM, the checksum in files up to SMALL; or in all files.
    """
    ids = {}
    name = 'meta.json'
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        check_meta(meta)
        for part in ('train', 'val'):
            name = f'{part}.bin'
            ids[part] = np.memmap(folder / name, dtype=meta['dtype'], mode='r')
            size = ids[part].nbytes
            if len(ids[part]) != meta[f'{part}_tokens']:
                raise ValueError(f'it has {len(ids[part])} ids, not {meta[f"{part}_tokens"]}')
            if (check_data or size <= MEDIUM) and ids[part].max() >= meta['vocab_size']:
                raise ValueError(f'it holds the id {ids[part].max()}, the vocabulary ends at {meta["vocab_size"] - 1}')
            if (check_data or size <= SMALL) and sha256(folder / name) != meta['sha256'].get(part):
                raise ValueError('its checksum is not the one in meta.json')
    except (OSError, ValueError, RecursionError) as e:
        die(f'{folder} is damaged ({name}: {type(e).__name__} {e}): delete it and prepare it again')
    return meta, ids['train'], ids['val']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: die(f'{message} (see python prepare_data.py --help)')
    parser.add_argument('--dataset', help=f'{NAMES}, or a name for the text of --path (default: its name)')
    parser.add_argument('--tokenizer', choices=('bytes', 'gpt2'), help='default: gpt2 for large corpora, else bytes')
    parser.add_argument('--path', help='a file (.txt .gz .xz .jsonl .parquet) or a folder, instead of a download')
    parser.add_argument('--data_dir', default='data', help='where the data sets are (default data)')
    parser.add_argument('--overwrite', action='store_true', help='replace a data set of that name')
    parser.add_argument('--check_data', action='store_true', help='only compare its ids with the vocabulary and its '
                        'checksums with meta.json; train.py does so by itself in files up to 1 GiB and 64 MiB')
    args = parser.parse_args()
    if args.path == '':
        die('--path must not be empty')
    name = args.dataset or (Path(args.path).resolve().name.split('.')[0] if args.path else 'shakespeare')
    try:
        if args.check_data:
            meta, train, val = load(Path(args.data_dir, name), check_data=True)
            return print(f'{Path(args.data_dir, name)}: {len(train) + len(val):,} ids, as {meta["source"]} gave them')
        prepare(name, args.tokenizer, args.path, args.data_dir, args.overwrite)
    except OSError as e:
        die(e)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-made is removed
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
