"""
Train any model_<name>.py as a causal or a masked language model, on a CPU, a GPU or many GPUs.

    python train.py --model composite                                       # about three minutes on two CPU cores
    python train.py --model composite --objective masked --dataset wikitext2
    python train.py --resume --out_dir out/composite-causal-python          # continues that run where it stopped
    python train.py --eval_only --out_dir out/composite-causal-python       # prints its validation loss, trains nothing
    torchrun --standalone --nproc_per_node=8 train.py --model nope --preset gpt2 --dataset fineweb-edu

Every setting is a flag, and so is every field of the model's Config: python train.py --model composite --help.
Flags win over --config FILE.json, which wins over --preset.

Above the double line is the training itself; below it is what a run needs around it.
"""
import argparse
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
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist

RANK = int(os.environ.get('RANK', 0))  # this process among all; torchrun sets these three
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))  # this process among those of its machine
WORLD = int(os.environ.get('WORLD_SIZE', 1))  # number of processes


# ---------------------------------------------------------------------------------------------------------------------
# settings

@dataclasses.dataclass
class Settings:
    model: str = 'composite'  # trains model_<name>.py
    objective: Literal['causal', 'masked'] = 'causal'  # predict the next token, or the masked tokens
    dataset: str = 'python'  # a folder of data_dir; prepare_data.py makes it when it is missing
    data_dir: str = 'data'  # folder of the prepared data sets
    seed: int = 1  # decides the initial weights and, with the step number, each batch
    device: str = 'auto'  # auto (cuda > mps > cpu), cpu, cuda, cuda:N or mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 where the GPU has it
    compile: Literal['auto', 'on', 'off'] = 'auto'  # torch.compile; auto: on CUDA with Triton
    max_iters: int = 1000  # optimizer steps
    batch_size: int = 24  # sequences per optimizer step, over all processes and micro batches
    micro_batch_size: int = 0  # sequences per forward pass of one process; 0: its whole share of the batch at once
    learning_rate: float = 3e-3  # peak of the schedule
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup_iters: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices and embeddings, not on vectors
    beta1: float = 0.9  # AdamW: decay of the running mean of the gradient
    beta2: float = 0.95  # AdamW: decay of the running mean of its square
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    mask_prob: float = 0.15  # share of each row that the masked objective predicts
    eval_interval: int = 100  # steps between validations, each with a checkpoint before it
    eval_tokens: int = 65536  # number of validation tokens, the same ones every time
    log_interval: int = 10  # steps between log lines
    checkpoint_interval: int = 0  # steps between further checkpoints; 0: none


PRESETS = {
    'tiny': dict(),  # the defaults: 4 layers x 128
    'small': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.1, batch_size=64, max_iters=5000,
                  learning_rate=1e-3, eval_interval=250, eval_tokens=2 ** 18),
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=512, micro_batch_size=32,
                 max_iters=20000, learning_rate=6e-4, warmup_iters=700, eval_interval=250, eval_tokens=2 ** 20),
    # Chang et al.: BERT-small; a tenth of their 125k steps
    'bert_small': dict(objective='masked', dataset='wikitext103', n_layer=12, n_head=4, n_embd=256, block_size=128,
                       dropout=0.1, bias=True, batch_size=128, max_iters=12500, learning_rate=3e-4, warmup_iters=1000,
                       weight_decay=0.01, beta2=0.999, eval_interval=500, eval_tokens=2 ** 18),
    # Luo et al.: WikiText-103; a tenth of their 150k steps
    'wikitext': dict(dataset='wikitext103', n_layer=6, n_head=8, n_embd=512, block_size=512, dropout=0.1, bias=True,
                     batch_size=64, max_iters=15000, learning_rate=2e-3, warmup_iters=600, weight_decay=0.01,
                     beta2=0.98, eval_interval=500, eval_tokens=2 ** 18),
}


@dataclasses.dataclass
class Progress:
    """What changes from step to step: all that a checkpoint holds beside weights, optimizer and settings."""
    step: int = 0  # optimizer steps done
    best: float = math.inf  # lowest validation loss
    window: list = dataclasses.field(default_factory=list)  # training losses since the last line of log.csv


@dataclasses.dataclass
class Run:
    """What stays the same from the first step to the last."""
    settings: Settings
    config: Any  # the model's Config
    meta: dict  # meta.json of the data set
    train: np.ndarray  # token ids
    val: np.ndarray
    device: torch.device = torch.device('cpu')
    dtype: torch.dtype = torch.float32
    peers: Any = None  # gloo group of all processes
    out: Any = None  # folder of the run


# ---------------------------------------------------------------------------------------------------------------------
# batches: row r of step i is a function of (seed, i, r) alone, whichever process or micro batch asks for it

def make_rows(run, data, starts, rngs):
    """Rows of T tokens at `starts` -> idx (B, T), targets (B, T), None; masked: targets and where are (B, M)."""
    T = run.config.block_size
    rows = np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64)  # (B, T+1)
    idx = rows[:, :T]
    if run.settings.objective == 'causal':
        return idx, rows[:, 1:].copy(), None
    M = max(1, round(run.settings.mask_prob * T))  # always the same number, so that shapes never change
    where = np.stack([np.sort(rng.permutation(T)[:M]) for rng in rngs])
    targets = np.take_along_axis(idx, where, 1)
    dice = np.stack([rng.random(M) for rng in rngs])
    noise = np.stack([rng.integers(run.meta['vocab_size'], size=M) for rng in rngs])
    shown = np.where(dice < 0.8, run.meta['mask_id'], np.where(dice < 0.9, noise, targets))  # BERT's 80/10/10
    np.put_along_axis(idx, where, shown, 1)
    return idx, targets, where


def train_rows(run, step, rows):
    """Some rows of the batch of a step: each process and each micro batch takes its own."""
    rngs = [np.random.default_rng((run.settings.seed, step, row)) for row in rows]
    starts = [rng.integers(len(run.train) - run.config.block_size) for rng in rngs]
    return make_rows(run, run.train, starts, rngs)


def val_rows(run, rows, n):
    """Some of the n fixed rows, spread evenly over the validation set; their masks do not depend on the seed."""
    starts = np.linspace(0, len(run.val) - run.config.block_size - 1, n).astype(int)
    rngs = [np.random.default_rng((2 ** 32, row)) for row in rows]
    return make_rows(run, run.val, starts[rows], rngs)


def batch_share(settings):
    """-> sequences of one process in a batch, and in one forward pass."""
    share = settings.batch_size // WORLD
    return share, min(settings.micro_batch_size or share, share)


# ---------------------------------------------------------------------------------------------------------------------
# one step, and validation

def lr_at(step, settings):
    """Linear warm-up, then a cosine from learning_rate to min_lr."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    t = (step - settings.warmup_iters) / max(1, settings.max_iters - settings.warmup_iters)
    return settings.min_lr + (settings.learning_rate - settings.min_lr) * (1 + math.cos(math.pi * min(t, 1))) / 2


def reseed(settings, step):
    """What a step draws (dropout) depends on (seed, step, process) alone. 32 bits: a CPU generator reads no more."""
    torch.manual_seed(int(np.random.SeedSequence((settings.seed, step, RANK)).generate_state(1)[0]))


def forward(run, model, rows):
    """Mean loss in nats of rows = (idx, targets, where)."""
    idx, targets, where = [None if a is None else torch.from_numpy(a).to(run.device) for a in rows]
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
        return model(idx, targets, where=where)[1]


def train_step(run, ddp, optimizer, step):
    """Forward, backward, update -> (2,) loss and gradient norm, still on the device: reading them would wait for it."""
    settings = run.settings
    share, micro = batch_share(settings)
    reseed(settings, step)
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step, settings)
    total = 0.0
    for i in range(0, share, micro):
        first = RANK * share + i
        rows = train_rows(run, step, range(first, first + micro))
        if WORLD > 1:
            ddp.require_backward_grad_sync = i + micro == share  # exchange gradients once, after the last micro batch
        loss = forward(run, ddp, rows) * (micro / share)
        loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), settings.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack((total, norm))


@torch.no_grad()
def evaluate(run, model):
    """Mean loss in nats of the fixed validation rows, divided among the processes."""
    T = run.config.block_size
    n = min(max(1, run.settings.eval_tokens // T), (len(run.val) - 1) // T)
    micro = batch_share(run.settings)[1]
    total = torch.zeros(2, dtype=torch.float64)  # sum of the losses, number of predictions
    model.eval()
    for first in range(RANK * micro, n, WORLD * micro):
        numbers = np.arange(first, first + micro)
        rows = val_rows(run, np.minimum(numbers, n - 1), n)
        rows[1][numbers >= n] = -1  # no targets in the rows that only fill the last batch
        count = (rows[1] >= 0).sum()
        total += torch.tensor((forward(run, model, rows).item() * count, count))
    model.train()
    if WORLD > 1:
        total = total.to(run.device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def training_loop(run, model, ddp, optimizer, progress, validate_first):
    """Up to max_iters steps: checkpoint and validation where they are due, then batch, update, log line."""
    settings = run.settings
    first = progress.step
    pending = []  # losses and gradient norms that are still on the device
    top_speed = speed_at_peak(run, model)
    signals = catch_signals()
    mark = first, time.time()  # step and time of the last line
    began = None  # the same after the first step, which compiles: it is no measure of the rest
    while True:
        step = progress.step
        stop = any_process(bool(signals), run.peers)
        done = step >= settings.max_iters
        validation_due = done or step % settings.eval_interval == 0 or (validate_first and step == first)
        checkpoint_due = settings.checkpoint_interval and step % settings.checkpoint_interval == 0
        if validation_due or checkpoint_due or stop:
            fetch_losses(run, progress, pending)
            save(run, progress, model, optimizer, 'ckpt_last.pt')  # before validation: if that fails, no step is lost
        if stop:
            any_process(False, run.peers)  # nobody exits before the checkpoint is there: torchrun would kill its writer
            launcher = 'python' if WORLD == 1 else 'torchrun ...'
            say(f'stopped after step {step}, saved. To go on: {launcher} train.py --resume --out_dir {run.out}')
            sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
        if validation_due:
            validate(run, progress, model, optimizer)
            mark = step, time.time()  # validation is not part of the time per step
        if done:
            return

        pending.append(train_step(run, ddp, optimizer, step))
        progress.step += 1

        if step == first or progress.step % settings.log_interval == 0:
            norm = fetch_losses(run, progress, pending)
            mark = log_step(run, progress, norm, mark, began or mark, top_speed)
            began = began or mark


def fetch_losses(run, progress, pending):
    """Move pending losses from the device to progress.window -> the last gradient norm. One not finite ends the run."""
    if not pending:
        return None
    values = torch.stack(pending)  # (steps, 2)
    if WORLD > 1:
        dist.all_reduce(values)
    values = (values / WORLD).tolist()
    for step, (loss, norm) in enumerate(values, progress.step - len(values) + 1):
        if not math.isfinite(loss + norm):
            if RANK:
                sys.exit(1)  # process 0 says it
            die(f'loss {loss}, gradient norm {norm} at step {step}; {run.out / "ckpt_last.pt"} is the last good '
                'checkpoint. Try a lower --learning_rate, a longer --warmup_iters, --grad_clip, or --dtype float32', 1)
        progress.window.append(loss)
    pending.clear()
    return norm


def validate(run, progress, model, optimizer):
    """Print and log the validation loss; save the checkpoint if it is the best so far."""
    step, end = progress.step, run.settings.max_iters
    loss = evaluate(run, model)
    best = loss < progress.best and (step > 0 or end == 0)  # an untrained model is not the best
    mark = '  (best)' if best else ''
    say(f'step {step:5d}/{end}  val loss {describe(run, loss)}, perplexity {math.exp(min(loss, 99)):.2f}{mark}')
    log(run, step=step, val_loss=loss, bits_per_byte=bits_per_byte(run, loss))
    if best:
        progress.best = loss
        save(run, progress, model, optimizer, 'ckpt_best.pt')


def log_step(run, progress, norm, mark, began, top_speed):
    """Print the line of a step; every log_interval steps it goes to log.csv too -> its step and time."""
    settings, step, now = run.settings, progress.step, time.time()
    loss = sum(progress.window) / len(progress.window)
    lr = lr_at(step - 1, settings)
    ms = (now - mark[1]) / (step - mark[0]) * 1e3
    speed = settings.batch_size * run.config.block_size / ms * 1e3
    mfu = f'  MFU {speed / top_speed:.0%}' if top_speed else ''
    left = (now - began[1]) / (step - began[0]) * (settings.max_iters - step)
    say(f'step {step:5d}/{settings.max_iters}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {ms:.1f} ms  '
        f'{speed:,.0f} tokens/s{mfu}  {datetime.timedelta(seconds=round(left))} left')
    if step % settings.log_interval == 0:
        log(run, step=step, train_loss=loss, lr=lr, grad_norm=norm, ms=ms, tokens_per_s=speed)
        progress.window.clear()
    return step, now


# ---------------------------------------------------------------------------------------------------------------------
# a run from start to end

def main():
    settings, module, config, flags = resolve(sys.argv[1:])
    device, dtype, compiled = choose_device(settings)
    peers = join_processes(device)
    meta, train, val = load_data(settings, peers)
    run = Run(settings, config, meta, train, val, device, dtype, peers)
    if flags.eval_only:
        evaluate_only(run, module, compiled, Path(flags.out_dir))
    else:
        fit_to_data(run)
        model, ddp, optimizer = build(run, module, compiled)
        run.out, checkpoint = open_run(settings, flags, peers)
        progress = restore(run, checkpoint, model, optimizer) if checkpoint else Progress()
        validate_first = start_log(run, progress.step)
        introduce(run, model, module)
        training_loop(run, model, ddp, optimizer, progress, validate_first)
        plot(run.out)
        conclude(run, progress, flags)
    if WORLD > 1:
        dist.destroy_process_group()


def build(run, module, compiled):
    """-> the model, the same for training by several processes, and the optimizer."""
    settings, cuda = run.settings, run.device.type == 'cuda'
    torch.manual_seed(settings.seed)
    try:
        model = ddp = module.Model(run.config).to(run.device)
    except ValueError as e:
        die(e)
    if compiled:
        model.compile(dynamic=False)
    if WORLD > 1:
        ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[run.device.index] if cuda else None)
    matrices = dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=settings.weight_decay)
    vectors = dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(settings.beta1, settings.beta2), fused=cuda)
    return model, ddp, optimizer


def fit_to_data(run):
    """Set the size of the vocabulary; refuse a model that the data set does not fit."""
    config, dataset = run.config, run.settings.dataset
    need = max(run.meta['vocab_size'], run.meta['mask_id'] + 1)
    shorter = min(len(run.train), len(run.val))
    config.vocab_size = config.vocab_size or math.ceil(need / 64) * 64
    if config.vocab_size < need:
        die(f'--vocab_size must be at least {need} for {dataset}, not {config.vocab_size}')
    if shorter <= config.block_size:
        die(f'--block_size must be under {shorter}, the tokens in the smaller part of {dataset}, '
            f'not {config.block_size}; or take a longer text')


def introduce(run, model, module):
    """Write config.json; say what is trained, and which settings are unusual."""
    settings, config, path = run.settings, run.config, run.out / 'config.json'
    values = {**dataclasses.asdict(settings), **dataclasses.asdict(config)}
    usual = {**dataclasses.asdict(Settings()), **dataclasses.asdict(module.Config())}
    unusual = ', '.join(f'{name} {value}' for name, value in values.items() if value != usual[name])
    if RANK == 0:
        write(path, lambda f: f.write(f'{json.dumps(values, indent=1)}\n'.encode()))
    params = sum(p.numel() for p in model.parameters()) / 1e6
    say(f'{settings.model}, {settings.objective}, {settings.dataset} ({len(run.train):,} tokens): '
        f'{params:.2f}M parameters, run {run.out}')
    say(f'{path} has all settings; not the default: {unusual}')
    if settings.objective == 'masked' and config.causal:
        say('note: --objective masked with --causal: the model sees only what is to the left of each mask')
    if settings.warmup_iters >= settings.max_iters:
        say(f'note: the learning rate rises to the end, because --warmup_iters {settings.warmup_iters} '
            f'is not below --max_iters {settings.max_iters}')


def conclude(run, progress, flags):
    """The last line: the best loss, and what to try next."""
    guess = math.log(run.meta['vocab_size'])
    advice = f'Now try: python sample.py --out_dir {run.out}'
    if progress.best >= guess:
        advice = (f'The run did not learn: a uniform guess has a loss of {guess:.4f}. '
                  'Try a lower --learning_rate, a longer --warmup_iters, or more --max_iters')
    if flags.nothing_to_resume:
        advice += '. Note: --resume found no checkpoint, so this run started from step 0'
    say(f'done: best val loss {describe(run, progress.best)}. {advice}')


def evaluate_only(run, module, compiled, out):
    """Print the validation loss of the best checkpoint in `out`, or of the last if there is no best yet."""
    run.out, settings, path = out, run.settings, out / 'ckpt_best.pt'
    if not path.exists():
        path = out / 'ckpt_last.pt'
    checkpoint = load_checkpoint(path)
    objective, trained = checkpoint['settings']['objective'], checkpoint['meta']
    if settings.objective != objective:
        die(f'--eval_only cannot change objective: it is {objective} in {out}, not {settings.objective}')
    if (trained['tokenizer'], trained['vocab_size']) != (run.meta['tokenizer'], run.meta['vocab_size']):
        die(f'{settings.dataset} has the vocabulary {run.meta["tokenizer"]} ({run.meta["vocab_size"]} ids), '
            f'the model in {out} has {trained["tokenizer"]} ({trained["vocab_size"]} ids): choose another --dataset')
    fit_to_data(run)
    model = build(run, module, compiled)[0]
    load_weights(run, model, checkpoint, '--eval_only')
    loss = evaluate(run, model)
    say(f'{path}, step {checkpoint["step"]}, on {settings.dataset}: val loss {describe(run, loss)}, '
        f'perplexity {math.exp(min(loss, 99)):.2f}')


# =====================================================================================================================
# what a run needs around it

def die(message, code=2):
    """One line on stderr and exit: wrong input (2), said once per machine, or a failure (1), said by whoever has it."""
    if LOCAL_RANK == 0 or code == 1:
        print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr, flush=True)
    sys.exit(code)


def say(line):
    """One line on stdout, said by one process."""
    if RANK == 0:
        print(line, flush=True)


def bits_per_byte(run, loss):
    return loss * (run.meta['val_tokens'] / run.meta['val_bytes'] / math.log(2))


def describe(run, loss):
    unit = 'token' if run.settings.objective == 'causal' else 'masked token'
    return f'{loss:.4f} nats per {unit}, {bits_per_byte(run, loss):.4f} bits per byte'


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints, log.csv and loss.png in the folder of a run

FILES = ('config.json', 'log.csv', 'loss.png', 'ckpt_last.pt', 'ckpt_best.pt')
COLUMNS = ('step', 'train_loss', 'val_loss', 'bits_per_byte', 'lr', 'grad_norm', 'ms', 'tokens_per_s')


def write(path, put):
    """put(file), written beside, flushed, renamed: a kill or a full disk leaves the old file or the new one, whole."""
    beside = path.with_name(path.name + '.tmp')
    try:
        with open(beside, 'wb') as f:
            put(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except RuntimeError as e:  # torch.save raises it when the disk is full
        raise OSError(f'{path} could not be written: {str(e).splitlines()[0]}') from e
    finally:
        beside.unlink(missing_ok=True)


def save(run, progress, model, optimizer, name):
    """Tensors and plain values only, so that weights_only=True can load them."""
    if RANK == 0:
        values = dict(**dataclasses.asdict(progress), config=dataclasses.asdict(run.config),
                      settings=dataclasses.asdict(run.settings), meta=run.meta,
                      model=model.state_dict(), optimizer=optimizer.state_dict())
        write(run.out / name, lambda f: torch.save(values, f))


def load_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        assert {'model', 'optimizer', 'config', 'settings', 'step'} <= set(checkpoint)
        return checkpoint
    except (RuntimeError, EOFError, OSError, TypeError, AssertionError, pickle.UnpicklingError) as e:
        die(f'{path} is damaged, or no checkpoint of train.py: {type(e).__name__} {" ".join(str(e).split())[:100]}')


def load_weights(run, model, checkpoint, flag):
    """Put a checkpoint into the model; refuse another architecture."""
    for name, old in checkpoint['config'].items():
        if getattr(run.config, name, None) != old:
            die(f'{flag} cannot change {name}: it is {old} in {run.out}, not {getattr(run.config, name, None)}')
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as e:
        reason = ' '.join(str(e).split())[:200]
        die(f'the checkpoint in {run.out} does not fit model_{run.settings.model}.py as it is now: {reason}')


def restore(run, checkpoint, model, optimizer):
    """Put a checkpoint into model and optimizer, and say which settings have changed -> its Progress."""
    load_weights(run, model, checkpoint, '--resume')
    for name, old in checkpoint['settings'].items():
        if getattr(run.settings, name, None) != old:
            say(f'changed on resume: {name} {old} -> {getattr(run.settings, name, None)}')
    if checkpoint['meta']['sha256'] != run.meta['sha256']:
        say(f'changed on resume: the tokens of {run.settings.dataset}')
    groups = optimizer.state_dict()['param_groups']  # this run's betas, weight decay and device, not the checkpoint's
    optimizer.load_state_dict({**checkpoint['optimizer'], 'param_groups': groups})
    return Progress(checkpoint['step'], checkpoint['best'], checkpoint['window'])


def newest_run(name):
    """The newest of out/<name>, out/<name>-2, ... that holds a checkpoint, or None."""
    runs = [path.parent for path in Path('out').glob(f'{name}*/ckpt_last.pt')]
    runs = [path for path in runs if re.fullmatch(rf'{re.escape(name)}(-\d+)?', path.name)]
    return str(max(runs, key=lambda path: os.path.getmtime(path / 'ckpt_last.pt'))) if runs else None


def open_run(settings, flags, peers):
    """-> the run's folder, the same on every process, and its last checkpoint or None."""
    name = f'{settings.model}-{settings.objective}-{settings.dataset}'
    out = Path(flags.out_dir or Path('out', name))
    if out.exists() and not out.is_dir():
        die(f'--out_dir {out} is a file; it must be a folder, or the name of one to make')
    found = flags.resume and (out / 'ckpt_last.pt').exists()
    if any_process(found, peers) and not found:
        die(f'{out} holds a checkpoint on another machine and none here: share that folder', 1)
    if found:
        return out, load_checkpoint(out / 'ckpt_last.pt')
    occupied = any((out / file).exists() for file in FILES)
    if occupied and flags.out_dir and not (flags.resume or flags.overwrite):
        die(f'{out} holds a run: add --resume to go on with it, --overwrite to delete it, or name another --out_dir')
    any_process(False, peers)  # all have looked before one writes
    if RANK == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        for n in itertools.count(2):
            try:
                out.mkdir(exist_ok=bool(flags.out_dir))  # several runs at once: each folder goes to the first
                break
            except FileExistsError:
                out = Path('out', f'{name}-{n}')
        for file in FILES if flags.overwrite else ():
            (out / file).unlink(missing_ok=True)
    if WORLD > 1:
        box = [out]
        dist.broadcast_object_list(box, group=peers)
        out = box[0]
    return out, None


def start_log(run, step):
    """Write the header, or cut log.csv back to the rows before the checkpoint of `step`.

    True: a validation of this very step was logged. Its row is removed, because it is made again.
    """
    path, rows, again = run.out / 'log.csv', [], False
    if RANK == 0:
        if step and path.exists():
            rows = path.read_bytes().splitlines(keepends=True)[1:]
            rows = [row for row in rows if int(row.split(b',')[0]) <= step]
        if rows and rows[-1].startswith(b'%d,,' % step):  # no train_loss: a validation
            rows.pop()
            again = True
        header = ','.join(COLUMNS).encode() + b'\r\n'
        write(path, lambda f: f.writelines([header, *rows]))
    return any_process(again, run.peers)


def log(run, **row):
    if RANK == 0:
        row = {name: f'{value:.6g}' if isinstance(value, float) else value for name, value in row.items()}
        with open(run.out / 'log.csv', 'a', newline='', encoding='utf-8') as f:
            csv.DictWriter(f, COLUMNS).writerow(row)


def plot(out):
    """log.csv -> loss.png."""
    if RANK:
        return
    if not find_spec('matplotlib'):
        return say('no loss.png: matplotlib is not installed')
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    with open(out / 'log.csv', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    fig, ax = plt.subplots(figsize=(7, 4))
    for name, marker in (('train_loss', None), ('val_loss', '.')):
        logged = [row for row in rows if row[name]]
        ax.plot([int(row['step']) for row in logged], [float(row[name]) for row in logged], marker=marker, label=name)
    ax.set(xlabel='step', ylabel='loss (nats per token)', title=out.name)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(out / 'loss.png', dpi=120, bbox_inches='tight')


# ---------------------------------------------------------------------------------------------------------------------
# data, processes, signals, devices

def load_data(settings, peers):
    """-> meta.json as a dict, train and validation tokens as memory maps; prepares them first if they are missing."""
    folder, failed = Path(settings.data_dir, settings.dataset), None
    if RANK == 0 and not (folder / 'meta.json').exists():
        import prepare_data
        try:
            prepare_data.prepare(settings.dataset, data_dir=settings.data_dir)
        except SystemExit as e:  # it has said why; the other processes wait for the answer
            failed = e.code
    if any_process(failed is not None, peers):
        sys.exit(failed or 2)
    if not (folder / 'meta.json').exists():
        die(f'{folder} is missing on this machine: prepare it here too, or share the folder')
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        train = np.memmap(folder / 'train.bin', dtype=meta['dtype'], mode='r')
        val = np.memmap(folder / 'val.bin', dtype=meta['dtype'], mode='r')
        assert meta['mask_id'] >= meta['vocab_size'] and meta['train_bytes'] and meta['val_bytes']
        assert len(train) == meta['train_tokens'] and len(val) == meta['val_tokens']
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as e:
        die(f'{folder} is damaged ({type(e).__name__} {e}): delete it and prepare it again')
    return meta, train, val


def join_processes(device):
    """-> a gloo group of the processes that torchrun has started, or None for one process."""
    if WORLD == 1:
        return None
    cuda = device.type == 'cuda'
    dist.init_process_group('nccl' if cuda else 'gloo', device_id=device if cuda else None)
    return dist.new_group(backend='gloo', timeout=datetime.timedelta(days=1))  # others wait while one prepares the data


def any_process(flag, peers):
    """True on every process if `flag` is true on one; also keeps them in step. By gloo: no GPU is waited for."""
    if WORLD == 1:
        return flag
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=peers)
    return flag.item() > 0


def catch_signals():
    """-> a list to which SIGINT and SIGTERM add themselves; the loop looks at it between steps."""
    signals = []

    def on_signal(number, _):
        if WORLD == 1 and number in signals:
            os._exit(128 + number)  # sent twice: exit at once, with the checkpoint that there is
        signals.append(number)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return signals


def choose_device(settings):
    """-> torch.device, autocast dtype, whether to compile. Every choice is printed."""
    best = 'mps' if torch.backends.mps.is_available() else 'cpu'
    if torch.cuda.is_available():
        best = f'cuda:{LOCAL_RANK}'
    use_best = settings.device == 'auto' or (settings.device == 'cuda' and best.startswith('cuda'))
    try:
        device = torch.device(best if use_best else settings.device)
        assert device.type in ('cuda', 'mps', 'cpu'), 'only cuda, mps and cpu are'
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:  # perhaps on this process alone, so it prints whichever it is
        print(f'train.py: --device {settings.device} is not supported here; auto would take {best}. '
              f'{str(e).splitlines()[0]}', file=sys.stderr)
        sys.exit(2)
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.dtype == 'bfloat16' and cuda and not has_bf16:
        die('--dtype bfloat16 is not supported by this GPU; allowed: auto, float32')
    bf16 = settings.dtype == 'bfloat16' or (settings.dtype == 'auto' and has_bf16)
    lacks = compile_lacks(settings, device)
    if settings.compile == 'on' and lacks:
        die(f'--compile on needs {lacks}, which is not here; allowed: auto, off')
    compiled = settings.compile != 'off' and not lacks

    kind = torch.cuda.get_device_name(device) if cuda else f'{torch.get_num_threads()} threads'
    processes = f' x {WORLD} processes' if WORLD > 1 else ''
    precision = 'bfloat16' if bf16 else 'float32 (TF32 products)' if cuda else 'float32'
    reason = f' (no {lacks})' if settings.compile == 'auto' and not compiled else ''
    say(f'device {device} ({kind}){processes}, {precision}, compile {"on" if compiled else "off"}{reason}')
    return device, torch.bfloat16 if bf16 else torch.float32, compiled


def compile_lacks(settings, device):
    """What torch.compile needs and does not find here, or None."""
    if device.type == 'cuda' and not find_spec('triton'):
        return 'Triton'
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (7, 0):
        return 'compute capability 7.0'
    if device.type != 'cuda' and settings.compile == 'auto':
        return 'CUDA'
    if not any(shutil.which(compiler) for compiler in ('cc', 'gcc', 'clang')):
        return 'C compiler'
    return None


# dense bf16 FLOP/s by name; an unknown GPU gets no MFU rather than a wrong one
PEAK = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12,
        'L4': 121e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def speed_at_peak(run, model):
    """Tokens/s at which the GPUs would do the model's products at their peak rate, MFU 100 %; None where unknown."""
    if run.device.type != 'cuda' or run.dtype != torch.bfloat16:
        return None
    config, gpu = run.config, torch.cuda.get_device_name(run.device)
    peak = next((flops for name, flops in PEAK.items() if re.search(rf'\b{name}\b', gpu)), None)
    predicted = run.settings.mask_prob if run.settings.objective == 'masked' else 1  # share of the tokens the head sees
    weights = sum(p.numel() for p in model.parameters()) - (1 - predicted) * model.wte.weight.numel()
    flops = 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size  # per token, forward and backward
    return peak * WORLD / flops if peak else None


# ---------------------------------------------------------------------------------------------------------------------
# the command line: defaults < --preset < --config < flags

class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and a flag for each field of a dataclass; the comment at the field is its help."""

    def error(self, message):
        die(f'{message} (see python train.py --help)')

    def add_fields(self, cls, title):
        notes = dict(re.findall(r'^    (\w+):.*?  # (.*)$', inspect.getsource(cls), re.M))
        types = get_type_hints(cls)
        for name, value in vars(cls).items():
            if not name.startswith('_') and name not in types and not hasattr(value, '__get__'):
                die(f'{title}: the field {name} of {cls.__name__} needs a type and a comment, which becomes its help: '
                    f'{name}: {type(value).__name__} = {value!r}  # what it does')
        group = self.add_argument_group(title)
        for field in dataclasses.fields(cls):
            kind, flag = types[field.name], f'--{field.name}'
            how = dict(type=kind, metavar=getattr(kind, '__name__', ''))
            if kind is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            elif get_origin(kind) is Literal:
                how = dict(choices=get_args(kind), type=type(get_args(kind)[0]))
            elif kind not in (int, float, str):
                flag = None
            if flag is None or flag in self._option_string_actions:
                die(f'{title}: the field {field.name} of {cls.__name__} must be bool, int, float, str or Literal[...], '
                    'and no other flag may have its name')
            note = f'{notes.get(field.name, "")} (default {field.default!r})'.replace('%', '%%')
            group.add_argument(flag, default=field.default, help=note, **how)


def load_model_file(name):
    """Import model_<name>.py, which stands beside train.py or in baselines/."""
    here = Path(__file__).resolve().parent
    for folder in (here, here / 'baselines'):
        if (folder / f'model_{name}.py').is_file():
            sys.path.insert(0, str(folder))
            return importlib.import_module(f'model_{name}')
    found = sorted(here.glob('model_*.py')) + sorted(here.glob('baselines/model_*.py'))
    die(f'there is no model_{name}.py; --model may be {", ".join(path.stem[6:] for path in found)}')


def read_config(path):
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        die(f'--config {path} cannot be read: {e}')
    if not isinstance(values, dict):
        die(f'--config {path} must hold a JSON object of settings')
    return values


def drop_other_scheme(file, model):
    """Take the fields out of a config.json that its own model has and `model` has not, and say which."""
    if str(file.get('model', model)) == model:
        return
    ours = get_type_hints(load_model_file(model).Config)
    theirs = get_type_hints(load_model_file(file['model']).Config)
    dropped = [name for name in file if name in theirs and theirs[name] != ours.get(name)]
    for name in dropped:
        del file[name]
    if dropped:
        say(f'note: --config is of model {file["model"]}; model {model} has no {", ".join(dropped)}: dropped')


def as_flags(values):
    """A preset or a config.json as the flags that say the same: one parser checks them all."""
    return [f'--no-{k}' if v is False else f'--{k}' if v is True else f'--{k}={v}' for k, v in values.items()]


def check(flags):
    """Refuse numbers that make no sense, before anything is made."""
    from_1 = ('batch_size', 'eval_interval', 'eval_tokens', 'log_interval', 'block_size', 'n_layer', 'n_head', 'n_embd')
    limits = dict(dict.fromkeys(from_1, (1, 2 ** 31)), mask_prob=(0.001, 1),
                  dropout=(0, 0.9999), beta1=(0, 0.9999), beta2=(0, 0.9999))
    for name, value in vars(flags).items():
        low, high = limits.get(name, (0, 2 ** 31))
        if isinstance(value, (int, float)) and not low <= value <= high:
            die(f'--{name} must be from {low} to {high}, not {value}')
    if not re.fullmatch(r'[\w.-]*\w[\w.-]*', flags.dataset):
        die('--dataset names a folder: letters, digits, dots, dashes and underscores only, '
            f'not {flags.dataset!r}')
    if flags.objective == 'causal' and not flags.causal:
        die('--objective causal needs --causal: without the mask the model reads the answer')
    if flags.batch_size % WORLD:
        die(f'--batch_size must be a multiple of the {WORLD} processes, not {flags.batch_size}')
    share, micro = batch_share(flags)
    if share % micro:
        die(f'--micro_batch_size must divide the {share} sequences of each process, not {micro}')


def has_checkpoint(out_dir):
    return out_dir is not None and Path(out_dir, 'ckpt_last.pt').exists()


def existing_run(flags):
    """The folder that --resume or --eval_only reads, or None; refuses combinations that make no sense."""
    if flags.overwrite and (flags.resume or flags.eval_only or not flags.out_dir):
        die('--overwrite needs --out_dir, and excludes --resume and --eval_only')
    if flags.eval_only and not flags.out_dir and not flags.resume:
        die('--eval_only needs --out_dir, or --resume for the newest run')
    if not flags.resume and not flags.eval_only:
        return None
    name = f'{flags.model}-{flags.objective}-{flags.dataset}'
    out_dir = flags.out_dir or newest_run(name)
    if flags.eval_only and not has_checkpoint(out_dir):
        die(f'--eval_only found no checkpoint in {out_dir or Path("out", name)}: name a run with --out_dir')
    if not has_checkpoint(out_dir):
        say(f'note: --resume found no checkpoint in {out_dir or Path("out", name)}: this is a new run from step 0')
    return out_dir


def resolve(argv):
    """Command line -> Settings, the model file, its Config, and all flags as argparse has them."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    add_help=False)
    parser.add_argument('--preset', choices=list(PRESETS), default='tiny', help='a set of values (default tiny)')
    parser.add_argument('--config', metavar='FILE', help='settings that an earlier run wrote (its config.json)')
    parser.add_argument('--out_dir', help='default out/<model>-<objective>-<dataset>, numbered -2, -3, ... when taken')
    parser.add_argument('--resume', action='store_true',
                        help='go on from the last checkpoint of --out_dir, or of the newest such run')
    parser.add_argument('--overwrite', action='store_true', help='delete the run that --out_dir holds')
    parser.add_argument('--eval_only', action='store_true',
                        help='print the validation loss of the run in --out_dir (--resume: of the newest), and stop')
    parser.add_fields(Settings, 'training')
    asked = parser.parse_known_args(argv)[0]
    preset = as_flags(PRESETS[asked.preset])
    file = read_config(asked.config) if asked.config else {}
    first = parser.parse_known_args([*preset, *as_flags(file), *argv])[0]
    out_dir = existing_run(first)
    if out_dir and Path(out_dir, 'config.json').exists():
        file = read_config(Path(out_dir, 'config.json'))
        first = parser.parse_known_args([*preset, *as_flags(file), *argv])[0]
        if first.model != file.get('model'):
            flag = '--eval_only' if first.eval_only else '--resume'
            die(f'{flag} cannot change model: it is {file.get("model")} in {out_dir}, not {first.model}')
    elif not first.resume:
        file.pop('vocab_size', None)  # the data decides it
    if first.objective != file.get('objective'):
        file.pop('causal', None)  # the objective decides it
    module = load_model_file(first.model)
    drop_other_scheme(file, first.model)

    parser.add_argument('-h', '--help', action='help', help='show this and exit')
    parser.add_fields(module.Config, f'model_{first.model}.py')
    parser.set_defaults(vocab_size=0, causal=first.objective == 'causal')  # 0: as many as the data needs
    flags = parser.parse_args([*preset, *as_flags(file), *argv])
    flags.out_dir = flags.out_dir or out_dir
    flags.nothing_to_resume = flags.resume and not has_checkpoint(out_dir)
    check(flags)

    def pick(cls):
        return cls(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(cls)})
    return pick(Settings), module, pick(module.Config), flags


if __name__ == '__main__':
    try:
        main()
    except torch.OutOfMemoryError as e:
        die('out of GPU memory: try --micro_batch_size 1, 2, 4, ... (without dropout the curve stays the same). '
            f'{str(e).splitlines()[0]}', 1)
    except OSError as e:
        die(e, 1)  # a full disk, a folder that may not be written
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):
            raise
        die(f'out of memory: try a smaller model or --micro_batch_size. {str(e).splitlines()[0]}', 1)
    except KeyboardInterrupt:
        sys.exit(130)
