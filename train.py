"""
Train any model_<name>.py as a causal or a masked language model, on a CPU, one GPU or many GPUs.

    python train.py --model composite                                       # a few minutes on two CPU cores
    python train.py --resume --out_dir out/composite-causal-shakespeare     # continue that run
    python train.py --eval_only --out_dir out/composite-causal-shakespeare  # print its validation loss, train nothing
    torchrun --standalone --nproc_per_node=8 train.py --model nope --preset gpt2 --dataset fineweb-edu

Every field of Settings and of the model's Config is a flag: python train.py --model composite --help.
Flags win over --config FILE.json, which wins over --preset. With --resume, the run's own config.json replaces both.
"""
import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist

import prepare_data
from prepare_data import atomic_write, die

RANK = int(os.environ.get('RANK', 0))  # index of this process; torchrun sets these three variables
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))  # index of this process on its machine
WORLD = int(os.environ.get('WORLD_SIZE', 1))  # number of processes


@dataclasses.dataclass
class Settings:
    model: str = 'composite'  # trains model_<name>.py
    objective: Literal['causal', 'masked'] = 'causal'  # predict the next token, or the masked tokens
    dataset: str = 'shakespeare'  # a folder in data_dir; prepare_data.py creates it if it is missing
    data_dir: str = 'data'  # folder of the prepared data sets
    seed: int = 1  # determines the initial weights and, together with the step, each batch
    device: str = 'auto'  # auto (cuda > mps > cpu), cpu, cuda, cuda:N or mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of matmuls; auto: bfloat16 if the hardware supports it
    compile: Literal['auto', 'on', 'off'] = 'auto'  # torch.compile; auto: on CUDA with Triton
    max_iters: int = 1000  # optimizer steps
    batch_size: int = 24  # sequences per optimizer step, over all processes and micro batches
    micro_batch_size: int = 0  # sequences per forward pass of one process; 0: its whole share of the batch at once
    learning_rate: float = 6e-3  # peak of the schedule
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup_iters: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # on parameters of two or more dimensions, position kernels included
    beta1: float = 0.9  # AdamW: decay of the running mean of the gradient
    beta2: float = 0.95  # AdamW: decay of the running mean of its square
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    mask_prob: float = 0.15  # fraction of each sequence that the masked objective predicts
    eval_interval: int = 100  # steps between validations; a checkpoint is saved before each
    eval_tokens: int = 65536  # number of validation tokens, the same ones every time
    log_interval: int = 10  # steps between log lines
    checkpoint_interval: int = 0  # steps between additional checkpoints; 0: none


PRESETS = {
    'tiny': dict(),  # the defaults: 4 layers x 128
    'small': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.1, batch_size=64, max_iters=5000,
                  learning_rate=1e-3, eval_interval=250, eval_tokens=2 ** 18),
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=512, micro_batch_size=32,
                 max_iters=20000, learning_rate=6e-4, warmup_iters=700, eval_interval=250, eval_tokens=2 ** 20),
    'bert_small': dict(  # Chang et al.; a tenth of their 125k steps
        objective='masked', dataset='wikitext103', n_layer=12, n_head=4, n_embd=256, block_size=128, dropout=0.1,
        bias=True, batch_size=128, max_iters=12500, learning_rate=3e-4, warmup_iters=1000, weight_decay=0.01,
        beta2=0.999, eval_interval=500, eval_tokens=2 ** 18),
    'wikitext': dict(  # Luo et al.; a tenth of their 150k steps
        dataset='wikitext103', n_layer=6, n_head=8, n_embd=512, block_size=512, dropout=0.1, bias=True, batch_size=64,
        max_iters=15000, learning_rate=2e-3, warmup_iters=600, weight_decay=0.01, beta2=0.98, eval_interval=500,
        eval_tokens=2 ** 18),
}


@dataclasses.dataclass
class Run:
    """What the functions below share. The last four fields change from step to step."""
    settings: Settings
    config: Any  # the model's Config
    device: torch.device = torch.device('cpu')
    dtype: torch.dtype = torch.float32
    meta: Any = None  # meta.json of the data set
    train: Any = None  # token ids, a numpy array
    val: Any = None
    out: Any = None  # folder of the run
    step: int = 0  # optimizer steps done
    best: float = math.inf  # lowest validation loss, in nats
    losses: list = dataclasses.field(default_factory=list)  # training losses since the last log line
    log: list = dataclasses.field(default_factory=list)  # rows of log.csv


# Batches. Row r of the batch of step i depends on (seed, i, r) only, not on the number of processes or micro batches.
def make_batch(run, ids, starts, rngs):
    """Sequences of T tokens beginning at `starts` -> idx (B, T), targets (B, T), None: tensors on the device.

    Masked objective -> idx (B, T), targets (B, M), masked_positions (B, M). 80 % of the masked positions show [MASK],
    10 % a random token and 10 % their own token, as in BERT.
    """
    T = run.config.block_size
    sequences = np.stack([ids[i:i + T + 1] for i in starts]).astype(np.int64)  # (B, T+1)
    idx, targets, masked_positions = sequences[:, :T], sequences[:, 1:], None
    if run.settings.objective == 'masked':
        M = max(1, round(run.settings.mask_prob * T))  # the same in every sequence, so that shapes are constant
        masked_positions = np.stack([np.sort(rng.permutation(T)[:M]) for rng in rngs])  # (B, M)
        targets = np.take_along_axis(idx, masked_positions, 1)  # (B, M)
        u = np.stack([rng.random(M) for rng in rngs])
        random_ids = np.stack([rng.integers(run.meta['vocab_size'], size=M) for rng in rngs])
        shown = np.where(u < 0.8, run.meta['mask_id'], np.where(u < 0.9, random_ids, targets))
        np.put_along_axis(idx, masked_positions, shown, 1)
    return [None if x is None else torch.from_numpy(x).to(run.device) for x in (idx, targets, masked_positions)]


def train_batch(run, step, row_ids):
    """The given rows of the batch of a step: see make_batch()."""
    rngs = [np.random.default_rng((run.settings.seed, step, row)) for row in row_ids]
    starts = [rng.integers(len(run.train) - run.config.block_size) for rng in rngs]
    return make_batch(run, run.train, starts, rngs)


def val_batch(run, row_ids, n):
    """The given rows of n fixed sequences, which are spread evenly over the validation set: see make_batch()."""
    starts = np.linspace(0, len(run.val) - run.config.block_size - 1, n).astype(int)
    rngs = [np.random.default_rng((2 ** 32, row)) for row in row_ids]  # the masks do not depend on the seed
    return make_batch(run, run.val, starts[list(row_ids)], rngs)


def batch_share(settings):
    """-> sequences of one process per optimizer step, and per forward pass."""
    share = settings.batch_size // WORLD
    return share, min(settings.micro_batch_size or share, share)


def micro_batches(run, step):
    """This process's share of the batch of a step: a list of micro batches, see make_batch()."""
    share, micro = batch_share(run.settings)
    return [train_batch(run, step, range(i, i + micro)) for i in range(RANK * share, (RANK + 1) * share, micro)]


def lr_at(step, settings):
    """Learning rate of a step (0 is the first): linear warm-up, then a cosine from learning_rate to min_lr."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    t = (step - settings.warmup_iters) / max(1, settings.max_iters - settings.warmup_iters)
    return settings.min_lr + (settings.learning_rate - settings.min_lr) * (1 + math.cos(math.pi * min(t, 1))) / 2


def batch_loss(run, model, batch):
    """Mean loss in nats per predicted token. batch: see make_batch()."""
    idx, targets, masked_positions = batch
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
        return model(idx, targets, where=masked_positions)[1]


def train_step(run, ddp, optimizer, step, batches):
    """Forward, backward and update -> loss of this process and gradient norm, as tensors on the device."""
    settings = run.settings
    # dropout depends on (seed, step, process) only, so that a resumed run draws the same masks
    torch.manual_seed(int(np.random.SeedSequence((settings.seed, step, RANK)).generate_state(1)[0]))
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step, settings)
    total = 0.0
    for i, batch in enumerate(batches, 1):
        if WORLD > 1:
            ddp.require_backward_grad_sync = i == len(batches)  # all-reduce once, after the last micro batch
        loss = batch_loss(run, ddp, batch) / len(batches)
        loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), settings.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def average(run, values):
    """Mean over all processes -> list of floats. One process computes it on the CPU: mps does not have float64."""
    values = torch.tensor([float(x) for x in values], dtype=torch.float64, device=run.device if WORLD > 1 else 'cpu')
    if WORLD > 1:
        dist.all_reduce(values)
    return (values / WORLD).tolist()


@torch.no_grad()
def evaluate(run, model):
    """Mean loss in nats per predicted token over the fixed validation sequences, which the processes share."""
    T = run.config.block_size
    n = min(max(1, run.settings.eval_tokens // T), (len(run.val) - 1) // T)
    micro = batch_share(run.settings)[1]
    total = count = 0.0  # sum of losses, number of predictions
    model.eval()
    for first in range(RANK * micro, n, WORLD * micro):
        batch = val_batch(run, range(first, min(first + micro, n)), n)
        total += batch_loss(run, model, batch).item() * batch[1].numel()
        count += batch[1].numel()
    model.train()
    total, count = average(run, (total, count))
    return total / count


def validation_due(settings, step):
    return step % settings.eval_interval == 0 or step >= settings.max_iters


def training_loop(run, model, ddp, optimizer):
    """Train until max_iters steps are done or a signal comes -> exit code of the program, 0 or 128 + the signal."""
    settings = run.settings
    first = run.step
    signals = []
    handle_signals(signals)  # the loop looks at them after each step
    timed_from = first, time.time()
    batches = micro_batches(run, first)
    while True:
        step = run.step
        # The first checkpoint and validation come before the first step: a full disk or too little memory for a
        # validation then ends the run at once and not after an hour. It also logs the loss of the untrained model.
        save_due = settings.checkpoint_interval and step % settings.checkpoint_interval == 0
        if save_due or validation_due(settings, step):
            save(run, model, optimizer, 'ckpt_last.pt')  # before validation: if that fails, no step is lost
        if validation_due(settings, step):
            validate(run, model, optimizer)
            timed_from = step, time.time()  # validation does not count as training time
        if step >= settings.max_iters:
            save(run, model, optimizer, 'ckpt_last.pt')  # with the best loss: the run may be continued
            return 0

        loss, norm = train_step(run, ddp, optimizer, step, batches)
        run.step += 1
        batches = micro_batches(run, run.step)  # prepared while a GPU is still busy with this step
        loss, norm, stop = average(run, (loss, norm, bool(signals)))  # all processes stop when one gets a signal
        if not math.isfinite(loss + norm):
            if RANK > 0:
                sys.exit(1)  # process 0 prints the line below
            die(f'loss {loss}, gradient norm {norm} at step {run.step}; {run.out / "ckpt_last.pt"} is the last '
                'good checkpoint. Try a lower --learning_rate, a longer --warmup_iters or --grad_clip', 1)
        run.losses.append(loss)
        log_due = run.step % settings.log_interval == 0
        if log_due:
            log_step(run, norm, timed_from)
        if log_due or step == first:  # the first step is not timed: it includes compilation
            timed_from = run.step, time.time()
        if stop:
            save(run, model, optimizer, 'ckpt_last.pt')
            return 128 + (signals[0] if signals else signal.SIGTERM)


def log_step(run, norm, timed_from):
    """Print and log the steps since the last log line. A new metric is one more argument of log()."""
    settings, step = run.settings, run.step
    loss = sum(run.losses) / len(run.losses)
    run.losses.clear()
    lr = lr_at(step - 1, settings)  # of the step just done
    ms = (time.time() - timed_from[1]) / (step - timed_from[0]) * 1e3
    speed = settings.batch_size * run.config.block_size / ms * 1e3
    left = datetime.timedelta(seconds=round(ms / 1e3 * (settings.max_iters - step)))
    print0(f'step {step:5d}/{settings.max_iters}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {ms:.1f} ms  '
           f'{speed:,.0f} tokens/s  {left} left')
    log(run, step=step, train_loss=loss, lr=lr, grad_norm=norm, ms=ms, tokens_per_s=speed)


def validate(run, model, optimizer):
    """Print and log the validation loss; save ckpt_best.pt if it is the lowest so far. A new metric: see log_step()."""
    loss = evaluate(run, model)
    best = loss < run.best and (run.step > 0 or run.settings.max_iters == 0)  # an untrained model is not the best
    print0(f'step {run.step:5d}/{run.settings.max_iters}  val loss {describe(run, loss)}{"  (best)" if best else ""}')
    log(run, step=run.step, val_loss=loss, bits_per_byte=bits_per_byte(run, loss))
    if best:
        run.best = loss
        save(run, model, optimizer, 'ckpt_best.pt')


def bits_per_byte(run, loss):
    """Nats per token -> bits per byte of text."""
    return loss / math.log(2) * run.meta['val_tokens'] / run.meta['val_bytes']


def describe(run, loss):
    return (f'{loss:.4f} nats per {"masked " * (run.settings.objective == "masked")}token, '
            f'{bits_per_byte(run, loss):.4f} bits per byte, perplexity {math.exp(min(loss, 99)):.2f}')


# -- files, devices, processes and the command line -------------------------------------------------------------------
FILES = ('config.json', 'log.csv', 'loss.png', 'ckpt_last.pt', 'ckpt_best.pt')


def print0(line):
    """Print a line on process 0, unless the terminal or pipe has been closed. File names can hold any bytes."""
    if RANK == 0:
        with contextlib.suppress(OSError):
            print(line.encode(errors='backslashreplace').decode(), flush=True)


def one_line(error):
    """The beginning of an error message, in one line."""
    return ' '.join(str(error).split())[:200]


def open_folder(out, flags):
    """Create and lock the folder of a run -> the lock. Refuses a folder that holds another run."""
    if out.is_file():
        die(f'--out_dir {out} is a file; it must be a folder')
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / '.lock', 'w')
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system removes it when the process ends or is killed
    except BlockingIOError:
        die(f'another run is writing to {out}: wait for it, or choose another --out_dir')
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    if flags.overwrite:
        for file in FILES:
            (out / file).unlink(missing_ok=True)
    elif not flags.resume and any((out / file).exists() for file in FILES):
        die(f'{out} holds a run: add --resume to continue it, --overwrite to delete it, or choose another --out_dir')
    return lock


def save(run, model, optimizer, name):
    """Write a checkpoint: tensors and plain values only, for weights_only=True. Process 0 only."""
    if RANK == 0:
        values = dict(step=run.step, best=run.best, losses=run.losses, meta=run.meta, settings=vars(run.settings),
                      config=vars(run.config), model=model.state_dict(), optimizer=optimizer.state_dict())
        atomic_write(run.out / name, lambda f: torch.save(values, f))


def load_checkpoint(path):
    """-> the dict that save() wrote. Exits with code 2 if the file is missing, damaged or something else."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise ValueError('wrong checksum')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if not {'step', 'best', 'losses', 'settings', 'config', 'meta', 'model'} <= set(checkpoint):
            raise ValueError('fields are missing')
        return checkpoint
    except Exception as e:  # zip, pickle and torch raise many kinds of errors for a damaged file
        die(f'{path} is damaged, or not a checkpoint of train.py: {type(e).__name__} {one_line(e)}')


def restore(run, checkpoint, model, optimizer):
    """Load a checkpoint into run, model and optimizer. Prints changed settings, refuses another architecture."""
    try:
        old = dict(checkpoint['settings'], **checkpoint['config'], tokenizer=checkpoint['meta']['tokenizer'])
        new = dict(vars(run.settings), **vars(run.config), tokenizer=run.meta['tokenizer'])
        for name in [name for name in new if old[name] != new[name]]:
            if name in ('objective', 'tokenizer', *vars(run.config)):
                die(f'cannot change {name}: it is {old[name]} in {run.out}, not {new[name]}')
            print0(f'changed since the checkpoint: {name} {old[name]} -> {new[name]}')
        model.load_state_dict(checkpoint['model'])
        groups = optimizer.state_dict()['param_groups']  # the betas and weight decay of this run
        optimizer.load_state_dict(dict(checkpoint['optimizer'], param_groups=groups))
        run.step, run.losses, run.best = checkpoint['step'], checkpoint['losses'], checkpoint['best']
        same = checkpoint['meta']['sha256'] == run.meta['sha256'] and all(
            old[name] == new[name] for name in ('eval_tokens', 'mask_prob'))
        if not same and run.best < math.inf:
            print0(f'other data, eval_tokens or mask_prob: the best loss before, {run.best:.4f}, does not count')
            run.best = math.inf
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
        die(f'the checkpoint in {run.out} does not fit model_{run.settings.model}.py as it is now: {one_line(e)}')


def start_log(run):
    """Read log.csv up to run.step. A validation at that step is left out if the loop will repeat it."""
    if (run.out / 'log.csv').exists():
        with open(run.out / 'log.csv', newline='', encoding='utf-8') as f:
            rows = [row for row in csv.DictReader(f) if int(row['step']) <= run.step]
        repeated = validation_due(run.settings, run.step)
        run.log = [row for row in rows if not (repeated and row.get('val_loss') and int(row['step']) == run.step)]


def log(run, **row):
    """Add a row to log.csv. Its columns are the names that occur in any row."""
    run.log.append({name: f'{value:.6g}' if isinstance(value, float) else value for name, value in row.items()})
    if RANK == 0:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in run.log for name in row)))
        writer.writeheader()
        writer.writerows(run.log)
        atomic_write(run.out / 'log.csv', lambda f: f.write(text.getvalue().encode()))


def plot(run):
    """Draw the losses of log.csv into loss.png."""
    from matplotlib.figure import Figure  # without pyplot: a notebook keeps its own backend
    ax = Figure(figsize=(7, 4)).subplots()
    for name in ('train_loss', 'val_loss'):
        rows = [row for row in run.log if row.get(name)]
        ax.plot([int(row['step']) for row in rows], [float(row[name]) for row in rows], label=name)
    ax.set(xlabel='step', ylabel='loss (nats per token)', title=run.out.name)
    ax.legend()
    atomic_write(run.out / 'loss.png', lambda f: ax.figure.savefig(f, format='png', dpi=120))


def handle_signals(signals=None):
    """Append each signal to the list. Without a list, exit at once; temporary files are removed."""
    def on_signal(number, _):
        if signals is None:
            sys.exit(128 + number)
        signals.append(number)
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)  # Windows does not have SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, on_signal)


def choose_device(settings):
    """-> torch.device, dtype of matmuls, whether to compile. Prints each choice."""
    best = 'mps' if torch.backends.mps.is_available() else 'cpu'
    if torch.cuda.is_available():
        best = f'cuda:{LOCAL_RANK}'
    try:
        device = torch.device(best if settings.device in ('auto', best.split(':')[0]) else settings.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        die(f'--device {settings.device} is not available here; auto would be {best}. {one_line(e)}')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # from Ampere on
    else:  # x86 only: bfloat16 on Arm and mps has not been measured
        bf16 = any(torch.cpu.get_capabilities().get(name) for name in ('avx512_bf16', 'amx_bf16'))
    bf16 = settings.dtype == 'bfloat16' or (settings.dtype == 'auto' and bf16)
    triton = device.type == 'cuda' and importlib.util.find_spec('triton') is not None
    compiled = settings.compile == 'on' or (settings.compile == 'auto' and triton)
    print0(f'device {device} x {WORLD} ({torch.get_num_threads()} CPU threads), {"bfloat16" if bf16 else "float32"}, '
           f'compile {"on" if compiled else "off"}')
    return device, torch.bfloat16 if bf16 else torch.float32, compiled


def keep_freed_memory():
    """glibc returns the memory of large freed tensors to Linux; the page faults cost 4 to 10 % of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None  # musl has none
    if mallopt and mallopt(-1, 2 ** 30):  # M_TRIM_THRESHOLD
        mallopt(-3, 2 ** 30) or mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD; old versions: at most 32 MiB


def make_parser(**kw):
    """argparse with errors of one line, and the flags that are not settings."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kw)
    parser.error = lambda message: die(f'{message} (see python train.py --help)')
    parser.add_argument('--preset', choices=list(PRESETS), default='tiny', help='a set of values (default tiny)')
    parser.add_argument('--config', metavar='FILE', help='settings that an earlier run wrote (its config.json)')
    parser.add_argument('--out_dir', help='folder of the run (default out/<model>-<objective>-<dataset>)')
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--resume', action='store_true', help='continue the run in --out_dir')
    group.add_argument('--overwrite', action='store_true', help='delete the run in --out_dir and start anew')
    group.add_argument('--eval_only', action='store_true', help='print the best validation loss of the run')
    return parser


def add_fields(parser, cls):
    """Add a flag for each field. The comment after a field is its help, as in `seed: int = 1  # this text`."""
    notes = dict(re.findall(r'^    (\w+):.*?  # (.*)$', inspect.getsource(cls), re.M))
    for field in dataclasses.fields(cls):
        options = dict(type=field.type)
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        if get_origin(field.type) is Literal:
            options = dict(choices=get_args(field.type))
        note = notes.get(field.name, '').replace('%', '%%')
        parser.add_argument(f'--{field.name}', default=field.default, help=f'{note} (default %(default)r)', **options)


def load_model_file(name):
    """Import model_<name>.py from the folder of train.py or from baselines/. Exits with code 2 if there is none."""
    here = Path(__file__).resolve().parent
    found = {path.stem[6:]: path for folder in (here / 'baselines', here) for path in sorted(folder.glob('model_*.py'))}
    if str(name) not in found:
        die(f'there is no model_{name}.py; --model may be {", ".join(found)}')
    sys.path.insert(0, str(found[name].parent))
    return importlib.import_module(f'model_{name}')


def read_config(path):
    """-> the dict of settings in a JSON file."""
    try:
        return dict(json.loads(Path(path).read_text(encoding='utf-8')).items())
    except (OSError, ValueError, RecursionError, AttributeError) as e:
        die(f'{path} cannot be read; it must hold a JSON object of settings: {one_line(e)}')


def resolve(argv):
    """Command line -> Settings, the model file, its Config, and all flags as argparse returns them."""
    # 1. Which preset, file or run do the flags change? Its values are `base`. Which model is it?
    parser = make_parser(add_help=False)
    for name in ('model', 'objective', 'dataset'):
        parser.add_argument(f'--{name}', default=argparse.SUPPRESS)
    asked = parser.parse_known_args(argv)[0]
    base = dict(PRESETS[asked.preset], **(read_config(asked.config) if asked.config else {}))
    base.pop('vocab_size', None)  # the data determines it
    chosen = {**vars(Settings()), **base, **vars(asked)}
    asked.out_dir = asked.out_dir or 'out/{model}-{objective}-{dataset}'.format(**chosen)
    if asked.resume or asked.eval_only:
        if not Path(asked.out_dir, 'ckpt_last.pt').exists():
            die(f'{asked.out_dir} has no checkpoint: --resume and --eval_only need the --out_dir of a run')
        base = read_config(Path(asked.out_dir, 'config.json'))
        chosen = {**vars(Settings()), **base, **vars(asked)}
        if chosen['model'] != base.get('model'):
            die(f'cannot change model: it is {base.get("model")} in {asked.out_dir}, not {chosen["model"]}')

    # 2. The defaults of that model.
    module = load_model_file(chosen['model'])
    parser = make_parser(description=__doc__)
    add_fields(parser, Settings)
    add_fields(parser, module.Config)
    parser.set_defaults(vocab_size=0, causal=chosen['objective'] == 'causal')  # vocab_size 0: as the data needs
    if chosen['objective'] != base.get('objective', chosen['objective']):
        base.pop('causal', None)  # the objective determines it

    # 3. One strict parse: what a preset or file holds is checked like a flag.
    words = [f'--no-{k}' if v is False else f'--{k}' if v is True else f'--{k}={v}' for k, v in base.items()]
    flags = parser.parse_args([*words, *argv])
    vars(flags).update(vars(asked))  # out_dir, resume, ... are not settings: a file does not decide them
    check_values(flags)
    settings, config = [cls(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(cls)})
                        for cls in (Settings, module.Config)]
    return settings, module, config, flags


def check_values(flags):
    """Refuse values that make no sense, before anything is created. A model file checks the fields of its scheme."""
    positive = 'batch_size eval_interval eval_tokens log_interval mask_prob block_size n_layer n_head n_embd'.split()
    limits = dict(mask_prob=1, dropout=0.9999, beta1=0.9999, beta2=0.9999)
    for name in (*vars(Settings()), *positive, 'vocab_size', 'init_std', 'dropout'):
        value, highest = getattr(flags, name), limits.get(name, 2 ** 31)
        if isinstance(value, str) or 0 < value <= highest or (value == 0 and name not in positive):
            continue
        die(f'--{name} must be {"above" if name in positive else "at least"} 0 and at most {highest}, not {value}')
    if flags.objective == 'causal' and not flags.causal:
        die('--objective causal needs --causal: without the mask the model sees the token it predicts')
    share, micro = batch_share(flags)
    if flags.batch_size % WORLD or share % micro:
        die(f'--batch_size must be a multiple of --micro_batch_size times the {WORLD} processes')


def load_data(run):
    """Read the data set, which is prepared first if it is missing. Refuse a model that does not fit it."""
    settings, config = run.settings, run.config
    folder = Path(settings.data_dir, settings.dataset)
    if LOCAL_RANK == 0 and not (folder / 'meta.json').exists():
        prepare_data.prepare(settings.dataset, data_dir=settings.data_dir)
    while not (folder / 'meta.json').exists():
        time.sleep(1)  # another process is preparing it
    run.meta, run.train, run.val = prepare_data.load(folder)
    needed = run.meta['mask_id'] + 1
    config.vocab_size = config.vocab_size or math.ceil(needed / 64) * 64
    if config.vocab_size < needed:
        die(f'--vocab_size must be at least {needed} for {settings.dataset}, not {config.vocab_size}')
    shorter = min(len(run.train), len(run.val))
    if config.block_size >= shorter:
        die(f'--block_size must be less than {shorter}, the tokens in the training or validation data')


def build(run, module, compiled):
    """-> the model, the same model wrapped for several processes, and the optimizer."""
    settings, cuda = run.settings, run.device.type == 'cuda'
    torch.manual_seed(settings.seed)
    try:
        model = ddp = module.Model(run.config).to(run.device)
    except ValueError as e:
        die(f'model_{settings.model}.py: {one_line(e)}')
    choice = module.choose_attention(model, run.dtype) if hasattr(module, 'choose_attention') else None
    if choice:
        print0(choice)
    if compiled:  # changes only model(...): what is saved has the names of the uncompiled module
        model.compile(dynamic=False)  # under DDP split at gradient buckets: communication overlaps with backward
    if WORLD > 1:
        ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[run.device.index] if cuda else None)
    matrices = dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=settings.weight_decay)
    vectors = dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(settings.beta1, settings.beta2), fused=True)
    return model, ddp, optimizer


def main():
    handle_signals()
    keep_freed_memory()
    settings, module, config, flags = resolve(sys.argv[1:])
    device, dtype, compiled = choose_device(settings)
    run = Run(settings, config, device, dtype, out=Path(flags.out_dir))
    load_data(run)
    if WORLD > 1:
        cuda = device.type == 'cuda'
        dist.init_process_group('nccl' if cuda else 'gloo', device_id=device if cuda else None)
    model, ddp, optimizer = build(run, module, compiled)
    if flags.eval_only:
        name = 'ckpt_best.pt' if (run.out / 'ckpt_best.pt').exists() else 'ckpt_last.pt'
        restore(run, load_checkpoint(run.out / name), model, optimizer)
        print0(f'{run.out}, step {run.step}, {settings.dataset}: val loss {describe(run, evaluate(run, model))}')
    else:
        train(run, flags, model, ddp, optimizer)
    if WORLD > 1:
        del ddp  # DDP must not outlive its process group
        dist.destroy_process_group()


def train(run, flags, model, ddp, optimizer):
    """The whole run, from the checkpoint of --resume to loss.png."""
    lock = open_folder(run.out, flags) if RANK == 0 else None  # the folder is locked as long as `lock` exists
    if flags.resume:
        restore(run, load_checkpoint(run.out / 'ckpt_last.pt'), model, optimizer)
    if RANK == 0:
        start_log(run)
        values = json.dumps({**vars(run.settings), **vars(run.config)}, indent=1)
        atomic_write(run.out / 'config.json', lambda f: f.write(f'{values}\n'.encode()))
    n_params = sum(p.numel() for p in model.parameters())
    print0(f'{len(run.train):,} training tokens, {n_params:,} parameters, run {run.out}')
    exit_code = training_loop(run, model, ddp, optimizer)
    out = shlex.quote(str(run.out))
    if exit_code:
        if WORLD > 1:
            dist.barrier()  # torchrun kills all processes when one exits, perhaps before it has saved
        launcher = 'python' if WORLD == 1 else 'torchrun ...'
        print0(f'stopped after step {run.step}, saved. To resume: {launcher} train.py --resume --out_dir {out}')
        sys.exit(exit_code)
    if RANK == 0 and importlib.util.find_spec('matplotlib'):
        plot(run)
    print0(f'done: best val loss {describe(run, run.best)}. Now try: python sample.py --out_dir {out}')


if __name__ == '__main__':
    try:
        main()
    except OSError as e:  # a full disk, a folder that is not writable
        die(e, 1)
    except (MemoryError, torch.OutOfMemoryError) as e:
        die(f'out of memory: try a smaller --micro_batch_size, which gives the same curve. {one_line(e)}', 1)
