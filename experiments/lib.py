"""What several experiments share: prepared text, a short training loop, names of runs, and where results go."""
import contextlib
import csv
import io
import itertools
import math
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import prepare_data  # noqa: E402
from common import die, write  # noqa: E402


def text(dataset, data_dir='data'):
    """-> ids to train on, ids to validate on (numpy memory maps), meta. Prepares a known data set that is missing."""
    folder = Path(data_dir, dataset)
    if not (folder / 'meta.json').is_file():
        prepare_data.prepare(dataset, data_dir=data_dir)
    meta, train, val = prepare_data.load(folder)
    return train, val, meta


def rows(ids, starts, T, device='cpu'):
    """The T + 1 ids from each start: inputs (B, T) and the tokens that follow them (B, T)."""
    x = torch.from_numpy(np.stack([ids[s:s + T + 1] for s in starts]).astype(np.int64)).to(device)  # (B, T+1)
    return x[:, :-1], x[:, 1:]


def descend(model, batches, steps, learning_rate=3e-3, warmup=40, bf16=False):
    """Train on the batches (inputs, targets) as train.py does: AdamW, warm-up, cosine to 0, clipping at 1.

    bf16: products in bfloat16. Yields (step, loss, gradient norm before clipping).
    """
    def rate(step):
        """As a share of learning_rate."""
        done = max(0, step - warmup) / max(1, steps - warmup)
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done))

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step, (x, y) in enumerate(itertools.islice(batches, steps), 1):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):  # around many steps it keeps old weights
            loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield step, loss.item(), norm.item()
        optimizer.step()
        schedule.step()
    model.eval()


def optimise(model, ids, steps, batch_size=16, learning_rate=3e-3, seed=1, device='cpu'):
    """descend() on random pieces of the text ids."""
    generator = np.random.default_rng(seed)
    T = model.config.block_size

    def batches():
        while True:
            yield rows(ids, generator.integers(len(ids) - T, size=batch_size), T, device)
    return descend(model, batches(), steps, learning_rate)


@torch.no_grad()
def validation(model, ids, T, tokens=16384, batch_size=16, device='cpu'):
    """Mean loss in nats per token over the first `tokens` tokens, in texts of T."""
    starts = range(0, min(tokens, len(ids) - 1) // T * T, T)
    total = 0.0
    for i in range(0, len(starts), batch_size):
        batch = starts[i:i + batch_size]
        total += model(*rows(ids, batch, T, device))[1].item() * len(batch)
    return total / len(starts)


def layer_calls(model, idx):
    """What the attention of each layer gets and returns for the tokens idx (B, T): pairs of (B, T, C)."""
    calls = []
    hooks = [block.attn.register_forward_hook(lambda _, args, out: calls.append((args[0], out))) for block in model.h]
    model.hidden(idx)
    for hook in hooks:
        hook.remove()
    return calls


def short_names(outs):
    """The names of the runs' folders; of compare.py's <name>-<objective>-<scheme>-<seed>, the last two parts."""
    paths = [Path(out).resolve() for out in outs]
    names = []
    for path in paths:
        ours = path.parent.name == 'compare'
        names.append(re.sub(r'.*-(causal|masked)-', '', path.name) if ours else path.name)
    for name in names:
        if names.count(name) > 1:
            die(f'each run needs a name of its own (one data set and one objective at a time), but '
                f'{names.count(name)} are called {name}')
    return names


def runs_of(name, objective='causal'):
    """The folders of compare.py's runs of one --name that have ended."""
    found = [str(path.parent) for path in sorted(Path('out', 'compare').glob(f'{name}-{objective}-*/loss.png'))]
    return found or die(f'found no {objective} run of the name {name} in out/compare; compare.py trains them')


@contextlib.contextmanager
def alone(path):
    """One process at a time is in here with the same path. The lock of a killed one is broken after ten seconds."""
    lock = Path(f'{path}.lock')
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileNotFoundError):  # the other one has just left
            if lock.exists() and time.time() - lock.stat().st_mtime > 10:
                lock.rmdir()
        try:
            lock.mkdir()
            break
        except FileExistsError:
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.rmdir()


def merge_table(path, header, rows, same, comment=None, fits=None):
    """Put rows into the table at path, in the place of those with the same first `same` columns -> all its rows.

    Several processes can fill one table. A table whose comment does not fit (default: is another) is replaced.
    """
    fits = fits or (lambda old: old == comment)
    with alone(path):
        rows = [*other_rows(path, rows, same, fits), *rows]
        write_csv(path.parent, path.stem, header, rows, comment)
    return rows


def other_rows(path, rows, same, fits):
    """The old rows that merge_table() keeps; what looks like a number is one again, but in the first `same` columns."""
    def number(text):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text

    if not path.is_file() or not fits(comment_of(path)):
        return []
    new = {tuple(map(spell, row[:same])) for row in rows}
    old = [tuple(row.values()) for row in read_csv(path)]
    return [(*row[:same], *map(number, row[same:])) for row in old if row[:same] not in new]


def positive(word):
    """The argparse type of a number that must be 1 or more."""
    number = int(word)
    if number < 1:
        raise ValueError
    return number


def from_table_flag(parser):
    parser.add_argument('--from_table', action='store_true',
                        help='do not train runs whose results the table has, even if out/ has lost them')


def common_flags(parser, quick, dataset=True, name=False):
    """Add the flags that experiments have in common. `quick` is the help of --quick; None: there is no such flag."""
    if name:
        parser.add_argument('--name', help='all causal runs of this --name of compare.py in out/. The table gets it in '
                                           'its own name, and keeps its rows of runs that are no longer in out/')
    if dataset:
        parser.add_argument('--dataset', default='python', help='default python')
        parser.add_argument('--data_dir', default='data', help='default data')
    if quick:
        parser.add_argument('--quick', action='store_true', help=quick)
    place = 'experiments/results, or out/quick with --quick' if quick else 'experiments/results'
    parser.add_argument('--results', help=f'folder of the table and the picture (default {place})')


def parse(parser, sizes=None, words=None):
    """The arguments of the command line, or of `words`.

    --quick writes to out/quick: experiments/results holds the full settings. sizes {flag: (value, value with --quick)}
    are the defaults that differ.
    """
    args = parser.parse_args(words)
    quick = getattr(args, 'quick', False)
    for name, (full, small) in (sizes or {}).items():
        if getattr(args, name) is None:
            setattr(args, name, small if quick else full)
    if args.results is None:
        args.results = str(Path('out', 'quick') if quick else REPO / 'experiments' / 'results')
    return args


def spell(value):
    """A value as a table holds it: floats with five digits."""
    return f'{value:.5g}' if isinstance(value, float) else str(value) if value is not None else ''


def write_csv(folder, name, header, rows, comment=None):
    """-> path of folder/name.csv, complete or not there at all. The comment, if any, is the first line, after `# `."""
    path = Path(folder, f'{name}.csv')
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    if comment:
        text.write(f'# {comment}\r\n')
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(map(spell, row) for row in rows)
    write(path, lambda f: f.write(text.getvalue().encode()))
    return path


def comment_of(path):
    """The comment of a table, or None."""
    with open(path, encoding='utf-8') as f:
        first = f.readline().rstrip('\n')
    return first[2:] if first.startswith('# ') else None


def read_csv(path):
    """The rows of a table as dicts of strings, without the comment in its first line."""
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(line for line in f if not line.startswith('# ')))


def save(fig, path):
    """Write the picture beside the table at path."""
    fig.savefig(path.with_suffix('.png'), dpi=120)
    pyplot().close(fig)
    print(f'\nwrote {path} and its .png')


def pyplot():
    """matplotlib's pyplot, which needs no screen here. Without it the script ends: its tables come before pictures."""
    if not find_spec('matplotlib'):
        print('\nno picture: matplotlib is not installed')
        sys.exit()
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    return plt
