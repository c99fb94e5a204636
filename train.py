"""
Train any model_<name>.py as a causal or a masked language model, on a CPU, a GPU or many.

    python train.py --model composite                                       # two CPU cores, about three minutes
    python train.py --model composite --objective masked --dataset wikitext2
    python train.py --resume --out_dir out/composite-causal-python          # goes on where that run stopped
    torchrun --standalone --nproc_per_node=8 train.py --model nope --preset gpt2 --dataset fineweb-edu

Every setting is a flag, and so is every field of the model's Config: python train.py --model composite --help.
Flags win over --config FILE.json, which wins over --preset.
"""
import argparse
import contextlib
import csv
import dataclasses
import datetime
import importlib
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))


@dataclasses.dataclass
class Settings:
    model: str = 'composite'  # trains model_<name>.py
    objective: Literal['causal', 'masked'] = 'causal'  # predict the next token, or the masked ones
    dataset: str = 'python'  # a folder of data_dir; prepare_data.py makes it when it is missing
    data_dir: str = 'data'  # where prepared data sets are
    seed: int = 1  # of the initial weights, and with the step's number of the batch
    device: str = 'auto'  # auto (cuda > mps > cpu), cpu, cuda, cuda:N or mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 where the GPU has it
    compile: Literal['auto', 'on', 'off'] = 'auto'  # torch.compile; auto: on CUDA with Triton
    max_iters: int = 1000  # optimizer steps
    batch_size: int = 24  # sequences per optimizer step, over all processes and micro batches
    micro_batch_size: int = 0  # sequences per forward pass of one process; 0: all its share of the batch at once
    learning_rate: float = 3e-3  # peak of the schedule
    min_lr: float = 0.0  # where the cosine ends
    warmup_iters: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices and embeddings, not on vectors
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # AdamW's memory of its square
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    mask_prob: float = 0.15  # share of each row that the masked objective predicts
    eval_interval: int = 100  # steps between validations, each with a checkpoint before it
    eval_tokens: int = 65536  # tokens of the validation set, always the same ones
    log_interval: int = 10  # steps between log lines
    checkpoint_interval: int = 0  # steps between further checkpoints; 0: none


PRESETS = {
    'tiny': {},  # the defaults: 4 layers x 128
    'small': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.1, batch_size=64, max_iters=5000,
                  learning_rate=1e-3, eval_interval=250, eval_tokens=2 ** 18),
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=512, micro_batch_size=32, max_iters=20000,
                 learning_rate=6e-4, warmup_iters=700, eval_interval=250, eval_tokens=2 ** 20),
    # Chang et al.: BERT-small; a tenth of their 125k steps
    'bert_small': dict(objective='masked', dataset='wikitext103', n_layer=12, n_head=4, n_embd=256, block_size=128, dropout=0.1,
                       bias=True, batch_size=128, max_iters=12500, learning_rate=3e-4, warmup_iters=1000, weight_decay=0.01,
                       beta2=0.999, eval_interval=500, eval_tokens=2 ** 18),
    # Luo et al.: WikiText-103; a tenth of their 150k steps
    'wikitext': dict(dataset='wikitext103', n_layer=6, n_head=8, n_embd=512, block_size=512, dropout=0.1, bias=True,
                     batch_size=64, max_iters=15000, learning_rate=2e-3, warmup_iters=600, weight_decay=0.01, beta2=0.98,
                     eval_interval=500, eval_tokens=2 ** 18),
}
# dense bf16 FLOP/s by name; an unknown GPU gets no MFU rather than a wrong one
PEAK = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
        'RTX 4090': 165e12, 'RTX 3090': 71e12}


def die(message, code=2):
    """One line on stderr and out: wrong input (2) by one process of a machine, for all find it; a failure (1) by whoever has it."""
    if LOCAL_RANK == 0 or code == 1:
        print(f'train.py: {message}', file=sys.stderr, flush=True)
    sys.exit(code)


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# settings: dataclass defaults < --preset < --config < flags

class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and a flag for each field of a dataclass; the comment beside the field is its help."""

    def error(self, message):
        die(f'{message} (see python train.py --help)')

    def add_fields(self, cls, title):
        notes = dict(re.findall(r'^    (\w+):.*?  # (.*)$', inspect.getsource(cls), re.M))
        group = self.add_argument_group(title)
        for f in dataclasses.fields(cls):
            kind = get_type_hints(cls)[f.name]
            if not (kind in (bool, int, float, str) or get_origin(kind) is Literal) or '--' + f.name in self._option_string_actions:
                die(f'{title}: the field {f.name} of {cls.__name__} must be a bool, int, float, str or Literal[...], and no other flag\'s name')
            how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
                   dict(choices=get_args(kind), type=type(get_args(kind)[0])) if get_args(kind) else dict(type=kind, metavar=kind.__name__))
            note = f'{notes.get(f.name, "")} (default {f.default!r})'.replace('%', '%%')
            group.add_argument('--' + f.name, default=f.default, help=note, **how)


def load_model_file(name):
    here = Path(__file__).resolve().parent
    if not (here / f'model_{name}.py').is_file():
        die(f'there is no model_{name}.py; --model may be {", ".join(sorted(p.stem[6:] for p in here.glob("model_*.py")))}')
    return importlib.import_module(f'model_{name}')


def read_config(path):
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        die(f'--config {path} cannot be read: {e}')
    return values if isinstance(values, dict) else die(f'--config {path} must hold a JSON object of settings')


def check(values):
    """Refuse numbers that make no sense, before anything is made."""
    share = values['batch_size'] // WORLD
    positive = ('batch_size', 'eval_interval', 'eval_tokens', 'log_interval', 'block_size', 'n_layer', 'n_head', 'n_embd')
    limits = {**dict.fromkeys(positive, (1, 2 ** 31)), **dict.fromkeys(('dropout', 'beta1', 'beta2'), (0, 0.9999)), 'mask_prob': (0.001, 1)}
    for name, v in values.items():
        low, high = limits.get(name, (0, 2 ** 31))
        if isinstance(v, (int, float)) and not low <= v <= high:
            die(f'--{name} must be from {low} to {high}, not {v}')
    if not re.fullmatch(r'[\w.-]*\w[\w.-]*', values['dataset']):
        die(f'--dataset names a folder: letters, digits, dots, dashes and underscores only, not {values["dataset"]!r}')
    if values['objective'] == 'causal' and not values['causal']:
        die('--objective causal needs --causal: without the mask the model reads the answer')
    if values['batch_size'] % WORLD:
        die(f'--batch_size must be a multiple of the {WORLD} processes, not {values["batch_size"]}')
    if values['micro_batch_size'] and share % min(share, values['micro_batch_size']):
        die(f'--micro_batch_size must divide the {share} sequences of each process, not {values["micro_batch_size"]}')


def newest_run(name):
    """The newest of out/<name>, out/<name>-2, ... that holds a checkpoint, or None."""
    runs = [p for p in Path('out').glob(f'{name}*/ckpt_last.pt') if re.fullmatch(rf'{re.escape(name)}(-\d+)?', p.parent.name)]
    return str(max(runs, key=os.path.getmtime).parent) if runs else None


def as_flags(values):
    """A preset or a config.json as the flags that say the same: one parser checks them all."""
    return [f'--no-{k}' if v is False else f'--{k}' if v is True else f'--{k}={v}' for k, v in values.items()]


def resolve(argv):
    """Command line -> Settings, the model file, its Config, and the arguments that are no settings."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False)
    parser.add_argument('--preset', choices=list(PRESETS), default='tiny', help='values that go together (default tiny)')
    parser.add_argument('--config', metavar='FILE', help='settings that an earlier run wrote (its config.json)')
    parser.add_argument('--out_dir', help='default out/<model>-<objective>-<dataset>, numbered -2, -3, ... when taken')
    parser.add_argument('--resume', action='store_true', help='go on from the last checkpoint of --out_dir, or of the newest such run')
    parser.add_argument('--overwrite', action='store_true', help='delete the run that --out_dir holds')
    parser.add_fields(Settings, 'training')
    asked, out_dir = parser.parse_known_args(argv)[0], None
    preset, file = as_flags(PRESETS[asked.preset]), read_config(asked.config) if asked.config else {}
    first = parser.parse_known_args([*preset, *as_flags(file), *argv])[0]
    if first.overwrite and (first.resume or not first.out_dir):
        die('--overwrite needs --out_dir, and excludes --resume')
    if first.resume:
        out_dir = first.out_dir or newest_run(f'{first.model}-{first.objective}-{first.dataset}')
        if out_dir and Path(out_dir, 'config.json').exists():
            file = read_config(Path(out_dir, 'config.json'))
            first = parser.parse_known_args([*preset, *as_flags(file), *argv])[0]
            if first.model != file.get('model'):
                die(f'--resume cannot change model: it is {file.get("model")} in {out_dir}, not {first.model}')
    else:
        file.pop('vocab_size', None)  # the data decides it
    if first.objective != file.get('objective'):
        file.pop('causal', None)  # the objective decides it
    module = load_model_file(first.model)

    parser.add_argument('-h', '--help', action='help', help='show this and exit')
    parser.add_fields(module.Config, f'model_{first.model}.py')
    parser.set_defaults(vocab_size=0, causal=first.objective == 'causal')  # 0: as many as the data needs
    flags = parser.parse_args([*preset, *as_flags(file), *argv])
    flags.out_dir = flags.out_dir or out_dir
    check(vars(flags))
    pick = lambda cls: cls(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(cls)})
    return pick(Settings), module, pick(module.Config), flags


# ---------------------------------------------------------------------------------------------------------------------
# data: row r of step i is a function of (seed, i, r) alone, whoever asks for it

def make_rows(data, starts, rngs, s, T, meta):
    """Rows of T tokens at `starts` -> idx (B, T), targets and where: (B, T) and None causal, (B, M) and (B, M) masked."""
    rows = np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64)  # (B, T+1)
    idx = rows[:, :T]
    if s.objective == 'causal':
        return idx, rows[:, 1:].copy(), None
    M = max(1, round(s.mask_prob * T))  # always the same number, so that shapes never change
    where = np.stack([np.sort(rng.permutation(T)[:M]) for rng in rngs])
    targets = np.take_along_axis(idx, where, 1)
    dice = np.stack([rng.random(M) for rng in rngs])
    noise = np.stack([rng.integers(meta['vocab_size'], size=M) for rng in rngs])
    shown = np.where(dice < 0.8, meta['mask_id'], np.where(dice < 0.9, noise, targets))  # BERT's 80/10/10
    np.put_along_axis(idx, where, shown, 1)
    return idx, targets, where


def train_rows(data, step, rows, s, T, meta):
    """Some rows of the batch of a step: micro batches and processes take theirs."""
    rngs = [np.random.default_rng((s.seed, step, r)) for r in rows]
    return make_rows(data, [rng.integers(len(data) - T) for rng in rngs], rngs, s, T, meta)


def val_rows(data, rows, n, s, T, meta):
    """Some of the n fixed rows, spread evenly over the validation set; their masks do not depend on the seed."""
    starts = np.linspace(0, len(data) - T - 1, n).astype(int)
    return make_rows(data, starts[rows], [np.random.default_rng((2 ** 32, r)) for r in rows], s, T, meta)


def load_data(s, peers):
    """-> meta.json as a dict, train and validation tokens as memory maps; prepares them first if they are missing."""
    folder, failed = Path(s.data_dir, s.dataset), None
    if RANK == 0 and not (folder / 'meta.json').exists():
        import prepare_data
        try:
            prepare_data.prepare(s.dataset, data_dir=s.data_dir)
        except SystemExit as e:  # it has said why; the other processes wait to hear
            failed = e.code
    if any_process(failed is not None, peers):
        sys.exit(failed or 2)
    if not (folder / 'meta.json').exists():
        die(f'{folder} is missing on this machine: prepare it here too, or share the folder')
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        data = {part: np.memmap(folder / f'{part}.bin', dtype=meta['dtype'], mode='r') for part in ('train', 'val')}
        assert meta['mask_id'] >= meta['vocab_size'] and all(len(data[part]) == meta[f'{part}_tokens'] and meta[f'{part}_bytes'] for part in data)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as e:
        die(f'{folder} is damaged ({type(e).__name__} {e}): delete it and prepare it again')
    return meta, data['train'], data['val']


# ---------------------------------------------------------------------------------------------------------------------

def choose_device(s):
    """-> torch.device, autocast dtype, whether to compile. Every choice is printed."""
    best = f'cuda:{LOCAL_RANK}' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    name = best if s.device == 'auto' or (s.device == 'cuda' and best.startswith('cuda')) else s.device
    try:
        device = torch.device(name)
        assert device.type in ('cuda', 'mps', 'cpu'), 'only cuda, mps and cpu are'
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        print(f'train.py: --device {s.device} is not supported here; auto would take {best}. {str(e).splitlines()[0]}', file=sys.stderr)
        sys.exit(2)
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if s.dtype == 'bfloat16' and cuda and not has_bf16:
        die('--dtype bfloat16 is not supported by this GPU; allowed: auto, float32')
    dtype = torch.bfloat16 if s.dtype == 'bfloat16' or (s.dtype == 'auto' and has_bf16) else torch.float32
    lacks = ('CUDA' if not cuda and s.compile == 'auto' else 'Triton' if cuda and not find_spec('triton') else
             'compute capability 7.0' if cuda and torch.cuda.get_device_capability(device) < (7, 0) else
             'C compiler' if not any(map(shutil.which, ('cc', 'gcc', 'clang'))) else None)
    if s.compile == 'on' and lacks:
        die(f'--compile on needs {lacks}, which is not here; allowed: auto, off')
    compiled = s.compile != 'off' and not lacks
    kind = torch.cuda.get_device_name(device) if cuda else f'{torch.get_num_threads()} threads'
    say(f'device {device} ({kind}){f" x {WORLD} processes" * (WORLD > 1)}, {str(dtype)[6:]}{" (TF32 products)" * (cuda and dtype == torch.float32)}, compile {"on" if compiled else "off"}{f" (no {lacks})" * (s.compile == "auto" and not compiled)}')
    return device, dtype, compiled


def lr_at(step, s):
    """Linear warm-up, then a cosine from learning_rate to min_lr."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    t = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    return s.min_lr + (s.learning_rate - s.min_lr) * (1 + math.cos(math.pi * min(t, 1))) / 2


def any_process(flag, peers):
    """True on every process if `flag` is true on one; also keeps them in step. By gloo: no GPU is waited for."""
    if WORLD == 1:
        return flag
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=peers)
    return flag.item() > 0


def write(path, put, mode='wb', **how):
    """put(file), written beside, flushed and renamed: a kill or a full disk leaves the old file or the new one, whole."""
    beside = path.with_name(path.name + '.tmp')
    try:
        with open(beside, mode, **how) as f:
            put(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except RuntimeError as e:  # what torch.save makes of a full disk
        raise OSError(f'{path} could not be written: {str(e).splitlines()[0]}') from e
    finally:
        beside.unlink(missing_ok=True)


FILES = ('config.json', 'log.csv', 'loss.png', 'ckpt_last.pt', 'ckpt_best.pt')  # of a run


def open_run(s, other, peers):
    """-> the run's folder, the same on every process, and its last checkpoint or None."""
    name = f'{s.model}-{s.objective}-{s.dataset}'
    out = Path(other.out_dir or Path('out', name))
    if out.exists() and not out.is_dir():
        die(f'--out_dir {out} is a file; it must be a folder, or the name of one to make')
    found = other.resume and (out / 'ckpt_last.pt').exists()
    if any_process(found, peers) and not found:
        die(f'{out} holds a checkpoint on another machine and none here: share that folder', 1)
    if found:
        return out, load_checkpoint(out / 'ckpt_last.pt')
    if other.resume:
        say(f'no checkpoint in {out}: starting from step 0')
    elif other.out_dir and not other.overwrite and any((out / file).exists() for file in FILES):
        die(f'{out} holds a run: add --resume to go on with it, --overwrite to delete it, or name another --out_dir')
    any_process(False, peers)  # all have looked before one writes
    if RANK == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        for n in itertools.count(2):
            try:
                out.mkdir(exist_ok=bool(other.out_dir))  # whoever makes the folder has it
                break
            except FileExistsError:
                out = Path('out', f'{name}-{n}')
        for file in FILES if other.overwrite else ():
            (out / file).unlink(missing_ok=True)
    if WORLD > 1:
        box = [out]
        dist.broadcast_object_list(box, group=peers)
        out = box[0]
    return out, None


def load_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        assert {'model', 'optimizer', 'config', 'settings', 'step'} <= set(checkpoint)
        return checkpoint
    except (RuntimeError, EOFError, OSError, TypeError, AssertionError, pickle.UnpicklingError) as e:
        die(f'{path} is damaged, or no checkpoint of train.py: {type(e).__name__} {" ".join(str(e).split())[:100]}')


COLUMNS = ('step', 'train_loss', 'val_loss', 'bits_per_byte', 'lr', 'grad_norm', 'ms', 'tokens_per_s')


def start_log(path, step):
    """Write the header, or cut log.csv back to what came before the checkpoint of `step`. True: a validation is to be made again."""
    rows = []
    if step and path.exists():
        with open(path, newline='', encoding='utf-8') as f:
            rows = [r for r in csv.DictReader(f) if int(r['step']) <= step]
    again = bool(rows) and int(rows[-1]['step']) == step and bool(rows[-1]['val_loss'])

    def put(f):
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows[:-1] if again else rows)
    write(path, put, 'w', newline='', encoding='utf-8')
    return again


def log(out, **row):
    if RANK:
        return
    with open(out / 'log.csv', 'a', newline='', encoding='utf-8') as f:
        csv.DictWriter(f, COLUMNS).writerow({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()})


def plot(out):
    """log.csv -> loss.png."""
    if not find_spec('matplotlib'):
        return say('no loss.png: matplotlib is not installed')
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    rows = list(csv.DictReader(open(out / 'log.csv', encoding='utf-8')))
    fig, ax = plt.subplots(figsize=(7, 4))
    for key, style in (('train_loss', dict(lw=1, alpha=0.6)), ('val_loss', dict(marker='o', ms=3))):
        ax.plot(*zip(*[(int(r['step']), float(r[key])) for r in rows if r[key]]), label=key.replace('_', ' '), **style)
    ax.set(xlabel='step', ylabel='loss (nats per token)', title=out.name)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(out / 'loss.png', dpi=120, bbox_inches='tight')


@torch.no_grad()
def evaluate(model, forward, val, s, micro, T, meta):
    """Mean loss of the fixed validation rows, shared out among the processes; what fills the last batch does not count."""
    n = min(max(1, s.eval_tokens // T), (len(val) - 1) // T)
    total = torch.zeros(2, dtype=torch.float64)  # sum of the losses, number of predictions
    model.eval()
    for first in range(RANK * micro, n, WORLD * micro):
        rows = np.arange(first, first + micro)
        idx, targets, where = val_rows(val, np.minimum(rows, n - 1), n, s, T, meta)
        targets[rows >= n] = -1
        count = (targets >= 0).sum()
        total += torch.tensor((forward(model, idx, targets, where).item() * count, count))
    model.train()
    if WORLD > 1:
        total = total.to(next(model.parameters()).device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def restore(checkpoint, out, config, s, meta, raw, optimizer):
    """Put a checkpoint into model and optimizer; say which settings have changed, refuse another architecture."""
    for name, old in checkpoint['config'].items():
        if getattr(config, name, None) != old:
            die(f'--resume cannot change {name}: it is {old} in {out}, not {getattr(config, name, None)}')
    for name, old in checkpoint['settings'].items():
        if getattr(s, name, None) != old:
            say(f'changed on resume: {name} {old} -> {getattr(s, name, None)}')
    if checkpoint['meta']['sha256'] != meta['sha256']:
        say(f'changed on resume: the tokens of {s.dataset}')
    try:
        raw.load_state_dict(checkpoint['model'])
    except RuntimeError as e:
        die(f'the checkpoint in {out} does not fit model_{s.model}.py as it is now: {" ".join(str(e).split())[:200]}')
    for group in checkpoint['optimizer']['param_groups']:
        group['fused'] = next(raw.parameters()).device.type == 'cuda'  # before loading: it decides where AdamW keeps its steps
    optimizer.load_state_dict(checkpoint['optimizer'])


def reseed(s, step):
    """What is drawn in a step, dropout say, is a function of (seed, step, process). 32 bits: a CPU generator reads no more."""
    torch.manual_seed(int(np.random.SeedSequence((s.seed, step, RANK)).generate_state(1)[0]))


def main():
    s, module, config, other = resolve(sys.argv[1:])
    device, dtype, compiled = choose_device(s)
    peers = None
    if WORLD > 1:
        cuda = device.type == 'cuda'
        dist.init_process_group('nccl' if cuda else 'gloo', device_id=device if cuda else None)
        peers = dist.new_group(backend='gloo', timeout=datetime.timedelta(days=1))  # others wait while one prepares the data
    meta, train, val = load_data(s, peers)
    need, T = max(meta['vocab_size'], meta['mask_id'] + 1), config.block_size
    config.vocab_size = config.vocab_size or -(-need // 64) * 64
    if config.vocab_size < need:
        die(f'--vocab_size must be at least {need} for {s.dataset}, not {config.vocab_size}')
    if min(len(train), len(val)) <= T:
        die(f'--block_size must be under {min(len(train), len(val))}, the tokens in the smaller part of {s.dataset}, not {T}; or take a longer text')

    torch.manual_seed(s.seed)
    try:
        raw = module.Model(config).to(device)  # this one is saved; `model` is the same, compiled, and `ddp` the same on many
    except ValueError as e:
        die(e)
    model = torch.compile(raw, dynamic=False) if compiled else raw
    ddp = model
    if WORLD > 1:
        ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None)
    optimizer = torch.optim.AdamW([dict(params=[p for p in raw.parameters() if p.dim() >= 2]),
                                   dict(params=[p for p in raw.parameters() if p.dim() < 2])], fused=device.type == 'cuda')
    out, checkpoint = open_run(s, other, peers)
    step, best, window = 0, math.inf, []  # steps done, best validation loss, training losses since the last log line
    if checkpoint:
        restore(checkpoint, out, config, s, meta, raw, optimizer)
        step, best, window = checkpoint['step'], checkpoint['best'], checkpoint['window']
    for group, decay in zip(optimizer.param_groups, (s.weight_decay, 0.0)):
        group.update(betas=(s.beta1, s.beta2), weight_decay=decay)

    settings, again = {**dataclasses.asdict(s), **dataclasses.asdict(config)}, False
    if RANK == 0:
        write(out / 'config.json', lambda f: f.write(json.dumps(settings, indent=1) + '\n'), 'w', encoding='utf-8')
        again = start_log(out / 'log.csv', step)
    again = any_process(again, peers)
    params = sum(p.numel() for p in raw.parameters())
    say(f'{s.model}, {s.objective}, {s.dataset} ({len(train):,} tokens): {params / 1e6:.2f}M parameters, run {out}')
    usual = {**dataclasses.asdict(Settings()), **dataclasses.asdict(module.Config())}
    say(f'{out / "config.json"} has all settings; not the default: ' + ', '.join(f'{k} {v}' for k, v in settings.items() if v != usual[k]))
    if s.warmup_iters >= s.max_iters:
        say(f'note: the learning rate rises to the end, for --warmup_iters {s.warmup_iters} is not below --max_iters {s.max_iters}')

    share = s.batch_size // WORLD  # sequences of this process in a batch
    micro = min(s.micro_batch_size or share, share)
    unit = 'token' if s.objective == 'causal' else 'masked token'
    bits = meta['val_tokens'] / meta['val_bytes'] / math.log(2)  # bits per byte = nats per token * bits
    predicted = s.mask_prob if s.objective == 'masked' else 1  # share of the tokens that meet the head
    flops = 6 * (params - (1 - predicted) * raw.wte.weight.numel()) + 12 * config.n_layer * config.n_embd * T  # per token, both ways
    peak = next((v for k, v in PEAK.items() if device.type == 'cuda' and re.search(rf'\b{k}\b', torch.cuda.get_device_name(device))), None)
    pending, signals = [], []

    def on_signal(number, _):
        if WORLD == 1 and number in signals:
            os._exit(128 + number)  # asked twice: at once, with the checkpoint there is
        signals.append(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def forward(model, idx, targets, where):
        to = lambda a: None if a is None else torch.from_numpy(a).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(to(idx), to(targets), where=to(where))[1]

    def settle():
        """Fetch losses and gradient norms from the device; one that is no number ends the run before it is saved."""
        if not pending:
            return None
        values = torch.stack(pending)  # (steps, 2)
        if WORLD > 1:
            dist.all_reduce(values)
        values = (values / WORLD).tolist()
        for i, (loss, norm) in enumerate(values):
            if not math.isfinite(loss + norm):
                sys.exit(1) if RANK else die(f'loss {loss}, gradient norm {norm} at step {step - len(values) + i + 1}; {out / "ckpt_last.pt"} is the last good '
                    'checkpoint. Try a lower --learning_rate, a longer --warmup_iters, --grad_clip, or --dtype float32', 1)
        window.extend(loss for loss, _ in values)
        pending.clear()
        return norm

    def save_as(name):
        if RANK == 0:
            write(out / name, lambda f: torch.save(dict(
                step=step, best=best, window=window, model=raw.state_dict(), optimizer=optimizer.state_dict(),
                config=dataclasses.asdict(config), settings=dataclasses.asdict(s), meta=meta), f))

    first, began, mark = step, (step, time.time()), (step, time.time())
    while True:
        stop, done = any_process(bool(signals), peers), step >= s.max_iters
        due = done or step % s.eval_interval == 0 or (again and step == first)
        if due or stop or (s.checkpoint_interval and step % s.checkpoint_interval == 0):
            settle()
            save_as('ckpt_last.pt')  # before the evaluation: whatever happens there, the training is kept
        if stop:
            any_process(False, peers)  # nobody leaves before the checkpoint is written: torchrun would kill the writer
            say(f'stopped after step {step}, saved. To go on: {"python" if WORLD == 1 else "torchrun ..."} train.py --resume --out_dir {out}')
            sys.exit(128 + (signals or [signal.SIGTERM])[0])
        if due:
            loss = evaluate(model, forward, val, s, micro, T, meta)
            say(f'step {step:5d}/{s.max_iters}  val loss {loss:.4f} nats per {unit}, {loss * bits:.4f} bits per byte, '
                f'perplexity {math.exp(min(loss, 99)):.2f}{"  (best)" * (loss < best and (step > 0 or done))}')
            log(out, step=step, val_loss=loss, bits_per_byte=loss * bits)
            if loss < best and (step or done):
                best = loss
                save_as('ckpt_best.pt')
            mark = (step, time.time())
            began = mark if step == first else began
        if done:
            break

        reseed(s, step)
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, s)
        total = 0.0
        for i in range(0, share, micro):
            rows = range(RANK * share + i, RANK * share + i + micro)
            with ddp.no_sync() if WORLD > 1 and i + micro < share else contextlib.nullcontext():  # exchange gradients once
                loss = forward(ddp, *train_rows(train, step, rows, s, T, meta)) * (micro / share)
                loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), s.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending.append(torch.stack((total, norm)))
        step += 1

        if step % s.log_interval == 0 or step == first + 1:
            norm, now = settle(), time.time()
            ms, loss = (now - mark[1]) / (step - mark[0]) * 1e3, sum(window) / len(window)
            speed = s.batch_size * T / ms * 1e3
            mfu = f'  MFU {speed * flops / peak / WORLD:.0%}' if peak and dtype == torch.bfloat16 else ''
            left = datetime.timedelta(seconds=round((now - began[1]) / (step - began[0]) * (s.max_iters - step)))
            say(f'step {step:5d}/{s.max_iters}  loss {loss:.4f}  lr {lr_at(step - 1, s):.2e}  norm {norm:.2f}  '
                f'{ms:.1f} ms  {speed:,.0f} tokens/s{mfu}  {left} left')
            if step % s.log_interval == 0:
                log(out, step=step, train_loss=loss, lr=lr_at(step - 1, s), grad_norm=norm, ms=ms, tokens_per_s=speed)
                window.clear()
            mark = (step, now)
            began = mark if step == first + 1 else began  # the first step compiles: it is no measure of the rest

    if RANK == 0:
        plot(out)
    say(f'done: best val loss {best:.4f} nats per {unit}, {best * bits:.4f} bits per byte. Now try: python sample.py --out_dir {out}')
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    try:
        main()
    except torch.OutOfMemoryError as e:
        die(f'out of GPU memory: try --micro_batch_size 1, 2, 4, ... (without dropout the curve stays the same). {str(e).splitlines()[0]}', 1)
    except OSError as e:
        die(e, 1)  # a full disk, a folder that may not be written
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):
            raise
        die(f'out of memory: try a smaller model or --micro_batch_size. {str(e).splitlines()[0]}', 1)
    except KeyboardInterrupt:
        sys.exit(130)
