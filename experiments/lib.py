"""What the experiments share: schemes, data, short trainings, runs of train.py, tables, pictures, command lines."""
import argparse
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import prepare_data  # noqa: E402
import train  # noqa: E402
from train import atomic_write, die  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# schemes

CONV = ['--model', 'conv', '--no-lightweight', '--no-dynamic', '--no-output']
SCHEMES = {  # name: flags of train.py
    'nope': ['--model', 'nope'],
    'absolute': ['--model', 'nope', '--absolute'],
    'rope': ['--model', 'rope'],
    'rope+nope': ['--model', 'rope', '--nope_every', '2'],
    'alibi': ['--model', 'alibi'],
    'tisa': ['--model', 'tisa'],
    'cape': ['--model', 'cape'],
    'fixed': ['--model', 'composite', '--no-dynamic'],
    'fixed-257': ['--model', 'composite', '--no-dynamic', '--kernel_size', '257'],
    'dynamic': ['--model', 'composite', '--no-fixed'],
    'composite': ['--model', 'composite'],
    'composite+key': ['--model', 'composite', '--dynamic_key'],
    'composite+output': ['--model', 'conv', '--lightweight', '--dynamic', '--output'],
    'conv-output': [*CONV, '--output'],
    'conv-qkv': [*CONV, '--queries_keys', '--values'],
    'nprf+rpe': ['--model', 'kernelized'],
    'nprf+rpe-64': ['--model', 'kernelized', '--max_distance', '64'],
    'nprf+absolute': ['--model', 'kernelized', '--absolute', '--no-rpe'],
    'prf+absolute': ['--model', 'kernelized', '--absolute', '--no-normalize', '--no-rpe'],
    'trf+absolute': ['--model', 'kernelized', '--absolute', '--feature_map', 'trf', '--no-rpe'],
    'elu+absolute': ['--model', 'kernelized', '--absolute', '--feature_map', 'elu', '--no-normalize', '--no-rpe'],
}
PALETTE = ('C0 C1 C2 C3 C4 C5 C6 C7 C8 C9 #aec7e8 #ffbb78 #98df8a #ff9896 #c5b0d5 #c49c94 #8c6d31 #000000 #006d5b '
           '#b30059 #5f9ea0').split()  # one color for each scheme above
OWN_PALETTE = '#ff00ff #00c000 #0000ff #ffd700 #800000 #00ced1'.split()  # for a reader's own schemes


def colors(names):
    """{name: color}. A known scheme, or a seed of it, has the same color in every picture; others take free colors."""
    known = {name: name if name in SCHEMES else re.sub(r'-\d+$', '', name) for name in names}
    own = [name for name in names if known[name] not in SCHEMES]
    free = itertools.cycle(OWN_PALETTE if len(own) < len(names) else PALETTE)
    color = dict(zip(SCHEMES, PALETTE)) | dict(zip(own, free))
    return {name: color[name] if name in color else color[known[name]] for name in names}


def in_order(names):
    """The names without repetitions: known schemes in the order of SCHEMES, then the others as they come."""
    known = [name for name in SCHEMES if name in names]
    return known + [name for name in dict.fromkeys(names) if name not in SCHEMES]


def read_schemes(words):
    """Known names, or 'name: flags of train.py' -> {name: flags}. Other words end the script with one line."""
    found = {}
    for word in words:
        name, colon, flags = word.partition(':')
        name = name.strip()
        if not colon and name not in SCHEMES:
            die(f"--schemes: {name!r} is not one of {', '.join(SCHEMES)}; write your own as 'name: --model file'")
        if colon and name in SCHEMES:
            die(f'--schemes: {name!r} is the name of a known scheme; give yours another name')
        check_name('--schemes', name)
        if name in found:
            die(f'--schemes: {name!r} is there twice')
        try:
            found[name] = shlex.split(flags) if colon else SCHEMES[name]
        except ValueError as e:  # an unclosed quotation mark
            die(f'--schemes: the flags of {name!r} cannot be read: {e}')
    return found


def check_name(flag, name):
    """Refuse names that are no good names of files."""
    if not re.fullmatch(r'[\w.+-]+', name):
        die(f'{flag}: a name may hold letters, digits, dots, dashes, plus signs and underscores only, not {name!r}')


def resolve(words):
    """Flags of train.py -> its Settings, the model file, its Config. Wrong flags end the script, exit code 2."""
    return train.resolve(words)[:3]


def new_model(words, **fields):
    """A new model for flags of train.py; fields replace those of its Config, vocab_size among them."""
    _, module, config = resolve(words)
    try:
        return module.Model(dataclasses.replace(config, **{'vocab_size': 256, **fields}))
    except ValueError as e:
        die(e)


# ---------------------------------------------------------------------------------------------------------------------
# data and short trainings

def data_set(dataset, data_dir='data'):
    """-> ids to train on, ids to validate on (memory maps), meta. A known data set that is missing is prepared."""
    folder = Path(data_dir, dataset)
    if not (folder / 'meta.json').is_file():
        prepare_data.prepare(dataset, data_dir=data_dir)
    meta, train_ids, val_ids = prepare_data.load(folder)
    return train_ids, val_ids, meta


def vocab_size(meta):
    """Rows of the embedding for a data set: its tokens and [MASK], padded up to a multiple of 64."""
    return -(-(meta['vocab_size'] + 1) // 64) * 64


def sequences(ids, n, T):
    """n sequences of T tokens, spread evenly over ids -> (n, T)."""
    starts = np.linspace(0, len(ids) - T, n).astype(int)
    return torch.from_numpy(np.stack([ids[s:s + T] for s in starts]).astype(np.int64))


def adamw(model, learning_rate, decay=0.1):
    """The optimizer of train.py: weight decay on parameters of two or more dimensions only."""
    matrices = dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=decay)
    vectors = dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)
    return torch.optim.AdamW([matrices, vectors], lr=learning_rate, betas=(0.9, 0.95))


def descend(model, batches, steps, learning_rate=3e-3, warmup=40, bf16=False):
    """Train on batches (inputs, targets) as train.py does: AdamW, warm-up, cosine to 0, gradient norm at most 1.

    Yields (step, loss, gradient norm before clipping) after each backward pass.
    """
    def rate(step):
        """As a share of learning_rate."""
        done = max(0, step - warmup) / max(1, steps - warmup)
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done))

    optimizer = adamw(model, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step, (x, y) in enumerate(itertools.islice(batches, steps), 1):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):  # one per step: it caches the cast weights
            loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield step, loss.item(), norm.item()
        optimizer.step()
        schedule.step()
    model.eval()


def optimize(model, ids, steps, learning_rate=3e-3, seed=1, batch_size=16):
    """descend() on random sequences of ids."""
    generator = np.random.default_rng(seed)
    T = model.config.block_size

    def batches():
        while True:
            starts = generator.integers(len(ids) - T, size=batch_size)
            x = torch.from_numpy(np.stack([ids[s:s + T + 1] for s in starts]).astype(np.int64))  # (B, T+1)
            x = x.to(model.wte.weight.device)
            yield x[:, :-1], x[:, 1:]
    return descend(model, batches(), steps, learning_rate)


@torch.no_grad()
def validation(model, ids, tokens):
    """Mean loss in nats per token over `tokens` tokens from all over ids, in sequences of block_size."""
    T = model.config.block_size
    parts = sequences(ids, tokens // T, T + 1).to(model.wte.weight.device).split(16)
    return sum(model(part[:, :-1], part[:, 1:])[1].item() * len(part) for part in parts) / (tokens // T)


def layer_calls(model, idx):
    """Inputs and outputs of the attention of each layer for the tokens idx (B, T): pairs of (B, T, C)."""
    calls = []
    hooks = [block.attn.register_forward_hook(lambda _, args, out: calls.append((args[0], out))) for block in model.h]
    model.hidden(idx)
    for hook in hooks:
        hook.remove()
    return calls


def before_training(model, checkpoint):
    """The model of a run at step 0: the same config, and the initial weights that its seed gives train.py."""
    torch.manual_seed(checkpoint['settings']['seed'])
    return type(model)(model.config).to(model.wte.weight.device).eval()


def cpu_has_bf16():
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ('avx512_bf16', 'amx_bf16'))


# ---------------------------------------------------------------------------------------------------------------------
# runs of train.py

QUICK = ('--max_iters 60 --n_layer 2 --n_embd 64 --batch_size 16 --warmup_iters 10 --eval_interval 20 '
         '--eval_tokens 16384').split()
IGNORED = 'device compile data_dir micro_batch_size log_interval checkpoint_interval vocab_size'.split()  # same losses


def refuse_flags(words, ours, where):
    """Flags of train.py that a script sets itself end it with one line."""
    for word in words:
        name = word.split('=')[0].removeprefix('--').removeprefix('no-')
        if word.startswith('--') and name in ours:
            die(f'{where} must not set --{name}: {Path(sys.argv[0]).name} sets it for each run')


def check_run(out, words):
    """Refuse flags that train.py refuses, and a run in `out` with other settings."""
    settings, module, config = resolve(words)
    if not (out / 'config.json').is_file():
        return
    own = settings.model not in ('nope', 'composite', 'conv', 'kernelized', 'rope', 'alibi', 'tisa', 'cape')
    if own and Path(module.__file__).stat().st_mtime > (out / 'config.json').stat().st_mtime:
        die(f'{Path(module.__file__).name} has changed since {out} was trained with it: give another --name, or delete '
            'that run')
    old = json.loads((out / 'config.json').read_text(encoding='utf-8'))
    for name, value in {**dataclasses.asdict(settings), **dataclasses.asdict(config)}.items():
        if name not in IGNORED and old.get(name, value) != value:
            die(f'{out} was trained with {name} {old[name]}, not {value}: give another --name, or delete that run')


def read_log(out):
    """log.csv of a run -> rows as dicts of numbers, with `seconds`: the training time so far, without validation."""
    path = Path(out, 'log.csv')
    if not path.is_file():
        die(f'{out} has no log.csv; name folders that train.py wrote')
    try:
        with open(path, newline='', encoding='utf-8') as f:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(f)]
        step, seconds, ms = 0, 0.0, math.nan
        for n, row in enumerate(rows):  # a row without ms (validation) takes the ms of the next row that has them
            ms = next((later['ms'] for later in rows[n:] if 'ms' in later), ms)
            if row['step'] > step:
                seconds += (row['step'] - step) * ms / 1000
                step = row['step']
            row['seconds'] = seconds
    except (OSError, ValueError, KeyError, TypeError) as e:
        die(f'{path} is damaged: {type(e).__name__} {e}')
    return rows or die(f'{path} is empty')


def losses(out):
    """[(step, validation loss)] of a run."""
    return [(int(row['step']), row['val_loss']) for row in read_log(out) if 'val_loss' in row]


def finished(out):
    """Whether a run has its last validation."""
    if not (Path(out, 'config.json').is_file() and Path(out, 'log.csv').is_file()):
        return False
    steps = json.loads(Path(out, 'config.json').read_text(encoding='utf-8'))['max_iters']
    with open(Path(out, 'log.csv'), newline='', encoding='utf-8') as f:
        return any(row['step'] == str(steps) and row.get('val_loss') for row in csv.DictReader(f))


def start(out, words, jobs):
    """Start train.py, which continues what is in the folder and prints to <folder>.txt -> the process."""
    how = '--resume' if (out / 'ckpt_last.pt').is_file() else '--overwrite'
    command = [sys.executable, str(REPO / 'train.py'), *words, '--out_dir', str(out), how]
    env = {**os.environ, **({'OMP_NUM_THREADS': '1'} if jobs > 1 else {})}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{out}.txt', 'ab') as f:
        return subprocess.Popen(command, stdout=f, env=env)


def train_all(runs, jobs=1):
    """Train what is not finished, `jobs` runs at a time (2 or more: one thread each); yield the numbers of ended runs.

    runs: [(label, folder, flags of train.py)]. All flags are checked first. If a run fails, or at SIGINT or SIGTERM,
    the running ones finish their step and save, and the script ends. The same command continues with what is left.
    """
    for _, out, words in runs:
        check_run(out, words)
    waiting = list(range(len(runs)))
    children = {}  # process: number of its run
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or children:
            while waiting and len(children) < jobs:
                n = waiting.pop(0)
                label, out, words = runs[n]
                if finished(out):
                    yield n
                    continue
                print(f'run {n + 1} of {len(runs)}: {label}, printing to {out}.txt', file=sys.stderr, flush=True)
                children[start(out, words, jobs)] = n
            for child in [child for child in children if child.poll() is not None]:
                if child.returncode:
                    sys.exit(child.returncode if child.returncode > 0 else 128 - child.returncode)
                yield children.pop(child)
            time.sleep(0.05)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, handler)
        if children:
            print(f'{Path(sys.argv[0]).name}: stopped; the same command continues', file=sys.stderr)
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def short_names(outs):
    """Names of the runs' folders; of compare.py's <name>-<objective>-<scheme>-<seed> the last two parts."""
    names = []
    for path in (Path(out).resolve() for out in outs):
        names.append(re.sub(r'.*-(causal|masked)-', '', path.name) if path.parent.name == 'compare' else path.name)
    for name in names:
        if names.count(name) > 1:
            die(f'each run needs a name of its own (one data set and one objective at a time), but '
                f'{names.count(name)} are called {name}')
    return names


def runs_of(name, objective='causal'):
    """The folders of compare.py's finished runs of one --name."""
    found = [str(path.parent) for path in sorted(Path('out', 'compare').glob(f'{name}-{objective}-*/log.csv'))]
    found = [out for out in found if finished(out)]
    return found or die(f'found no finished {objective} run of the name {name} in out/compare; compare.py trains them')


# ---------------------------------------------------------------------------------------------------------------------
# tables

def spell(value):
    """A value as a table holds it: floats with five digits."""
    return f'{value:.5g}' if isinstance(value, float) else str(value) if value is not None else ''


def number(text):
    """The int or float that a text spells, or the text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def write_csv(path, header, rows, comment=None):
    """Write a table by an atomic write. The comment, if any, is the first line, after `# `."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    if comment:
        text.write(f'# {comment}\r\n')
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(map(spell, row) for row in rows)
    atomic_write(path, lambda f: f.write(text.getvalue().encode()))


def read_csv(path):
    """The rows of a table as dicts of strings, without the comment in its first line; [] if there is no table."""
    if not path.is_file():
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(line for line in f if not line.startswith('# ')))


def merge_csv(path, header, rows, same, comment=None):
    """Add rows to the table at path, or replace those with the same first `same` columns -> all its rows.

    A table with another comment was measured in another way: the script ends, and the table stays as it is.
    """
    check_comment(path, comment)
    new = {tuple(map(spell, row[:same])) for row in rows}
    old = [tuple(row.values()) for row in read_csv(path)]
    old = [row for row in old if row[:same] not in new]
    write_csv(path, header, [*old, *rows], comment)  # old rows as they are: converted floats would lose digits
    return [*((*row[:same], *map(number, row[same:])) for row in old), *rows]


def check_comment(path, comment):
    """End the script if the table at path has another comment."""
    if not path.is_file():
        return
    first = path.read_text(encoding='utf-8').split('\n')[0]
    old = first[2:] if first.startswith('# ') else None
    if old != comment:
        die(f'{path} was made with other settings ({old}), not {comment}: give another --name or --results')


def markdown(header, rows):
    """A table of strings as Markdown."""
    lines = [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
    return '\n'.join([*lines, *(f'| {" | ".join(row)} |' for row in rows)])


def print_table(table):
    """Print (header, rows), both of strings."""
    print(f'\n{markdown(*table)}', flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def pyplot():
    """matplotlib's pyplot, without a screen. Without matplotlib the script ends: its tables are written before."""
    if not find_spec('matplotlib'):
        print('\nno picture: matplotlib is not installed')
        sys.exit()
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    return plt


def save(fig, path):
    """Write the picture beside the table at path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path.with_suffix('.png'), dpi=90)
    pyplot().close(fig)
    print(f'\nwrote {path} and its .png')


def line_panels(panels, xlabel, ylabel, marker='.-', **axes):
    """panels {title: {name: (x, y)}} -> a figure with at most four panels in a row, names at the ends of the lines.

    axes: what matplotlib's Axes.set takes, for example xscale='log'.
    """
    wide = min(4, len(panels))
    down = -(-len(panels) // wide)
    fig, all_axes = pyplot().subplots(down, wide, figsize=(7 * wide ** 0.6, 4 * down), squeeze=False,
                                      layout='constrained')
    color = colors(list(dict.fromkeys(name for lines in panels.values() for name in lines)))
    for ax in all_axes.flat[len(panels):]:
        ax.set_axis_off()
    for ax, (title, lines) in zip(all_axes.flat, panels.items()):
        for name, (x, y) in lines.items():
            ax.plot(x, y, marker, color=color[name], lw=1.2)
        ax.set(xlabel=xlabel, ylabel=ylabel, **axes)
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
        values = [float(value) for x, _ in lines.values() for value in x]
        if axes.get('xscale') == 'log' and values:
            ticks = [min(values) * 2 ** i for i in range(99) if min(values) * 2 ** i <= max(values)]
            ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks], fontsize=8)
            ax.minorticks_off()
        label_ends(ax, [(y[-1], x[-1], name, color[name]) for name, (x, y) in lines.items() if len(x)])
    return fig


def label_ends(ax, ends):
    """Write names at the ends (y, x) of their curves, right of the axes, without overlaps."""
    scale = math.log if ax.get_yscale() == 'log' else float
    back = math.exp if ax.get_yscale() == 'log' else float
    low, high = map(scale, ax.get_ylim())
    free = low
    for y, x, name, color in sorted(ends):
        free = max(free, scale(y))
        line = dict(arrowstyle='-', color='0.5', lw=0.5, ls=':', relpos=(0, 0.5))
        ax.annotate(name, (x, y), (1.06, back(free)), textcoords=('axes fraction', 'data'), color=color, fontsize=8,
                    va='center', annotation_clip=False, arrowprops=line)
        free += (high - low) / 22


# ---------------------------------------------------------------------------------------------------------------------
# command lines

def positive(word):
    """The argparse type of an integer of 1 or more."""
    number = int(word)
    if number < 1:
        raise ValueError
    return number


def rate(word):
    """The argparse type of a finite float above 0."""
    number = float(word)
    if not 0 < number < math.inf:
        raise ValueError
    return number


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, --quick and --results, and defaults that --quick makes smaller."""

    def __init__(self, doc, quick=None):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.small = {}
        place = 'experiments/results'
        if quick:
            place += ', or out/quick with --quick'
            self.add_argument('--quick', action='store_true', help=quick)
        self.add_argument('--results', type=Path, help=f'folder of the table and the picture (default {place})')

    def error(self, message):
        die(f'{message} (see python experiments/{self.prog} --help)')

    def add(self, flag, full, small=None, note='', **how):
        """A flag with a default, and another default with --quick."""
        shown = ' '.join(map(str, full)) if isinstance(full, list) else full
        text = f'{note} (default {shown}' + ('' if small is None else f', with --quick {small}') + ')'
        if full is not None and 'type' not in how:
            how['type'] = positive if isinstance(full, int) else rate if isinstance(full, float) else str
        self.add_argument(flag, help=text.strip(), **how)
        self.small[flag.removeprefix('--')] = full, full if small is None else small

    def add_data(self, dataset=None):
        """--data_dir, and --dataset if it has a default."""
        if dataset:
            self.add('--dataset', dataset, note='a data set of prepare_data.py')
        self.add('--data_dir', 'data', note='folder of the prepared data sets')

    def parse_args(self, *words):
        args = super().parse_args(*words)
        quick = getattr(args, 'quick', False)
        for name, values in self.small.items():
            if getattr(args, name) is None:
                setattr(args, name, values[quick])
        if args.results is None:
            args.results = Path('out', 'quick') if quick else REPO / 'experiments' / 'results'
        return args


def table_path(args, *parts):
    """<results>/<parts joined by dashes>[-quick].csv; empty parts are left out."""
    words = [*parts, 'quick' if getattr(args, 'quick', False) else '']
    return args.results / ('-'.join(word for word in words if word) + '.csv')
