"""
Train any model_<name>.py as a causal or a masked language model, on a CPU, a GPU or many GPUs.

    python train.py --model composite                                       # about three minutes on two CPU cores
    python train.py --model composite --objective masked --dataset wikitext2
    python train.py --resume --out_dir out/composite-causal-python          # continues that run where it stopped
    python train.py --eval_only --out_dir out/composite-causal-python       # prints its validation loss, trains nothing
    torchrun --standalone --nproc_per_node=8 train.py --model nope --preset gpt2 --dataset fineweb-edu

Every setting is a flag, and so is every field of the model's Config: python train.py --model composite --help.
Flags win over --config FILE.json, which wins over --preset. With --resume a run's own config.json replaces both.
"""
import dataclasses
import datetime
import json
import math
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

import common
from common import RANK, WORLD, any_process, die, load_checkpoint, load_model_file, log, one_line, say, write  # noqa: F401
from common import write as atomic_write  # noqa: F401, E402


@dataclasses.dataclass
class Settings:
    model: str = 'composite'  # trains model_<name>.py
    objective: Literal['causal', 'masked'] = 'causal'  # predict the next token, or the masked tokens
    dataset: str = 'python'  # a folder of data_dir; prepare_data.py makes it when it is missing
    data_dir: str = 'data'  # folder of the prepared data sets
    seed: int = 1  # decides the initial weights and, with the step number, each batch
    device: str = 'auto'  # auto (cuda > mps > cpu), cpu, cuda, cuda:N or mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the products; auto: bfloat16 if GPU or CPU has it
    compile: Literal['auto', 'on', 'off'] = 'auto'  # auto: on CUDA with Triton; on a CPU short runs do not repay it
    max_iters: int = 1000  # optimizer steps
    batch_size: int = 24  # sequences per optimizer step, over all processes and micro batches
    micro_batch_size: int = 0  # sequences per forward pass of one process; 0: its whole share of the batch at once
    learning_rate: float = 3e-3  # peak of the schedule
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup_iters: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # on parameters of two or more dimensions, kernels of positions too
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


@dataclasses.dataclass
class Progress:
    """What changes from step to step: all that a checkpoint holds beside weights, optimizer and settings."""
    step: int = 0  # optimizer steps done
    best: float = math.inf  # lowest validation loss
    window: list = dataclasses.field(default_factory=list)  # training losses since the last line of log.csv


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


def on_device(run, rows):
    """(idx, targets, where) as tensors; to a GPU from pinned memory, by copies that nobody waits for."""
    def put(a):
        x = torch.from_numpy(a)
        return x.pin_memory().to(run.device, non_blocking=True) if run.device.type == 'cuda' else x.to(run.device)
    return [None if a is None else put(a) for a in rows]


def micro_batches(run, step):
    """All that this process needs of the batch of a step: a list of (idx, targets, where) on the device."""
    share, micro = batch_share(run.settings)
    first = RANK * share
    return [on_device(run, train_rows(run, step, range(i, i + micro))) for i in range(first, first + share, micro)]


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
    """Mean loss in nats of rows = (idx, targets, where) on the device."""
    idx, targets, where = rows
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
        return model(idx, targets, where=where)[1]


def train_step(run, ddp, optimizer, step, batches):
    """Forward, backward, update -> (2,) loss and gradient norm, still on the device: reading them would wait for it."""
    settings = run.settings
    reseed(settings, step)
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step, settings)
    total = 0.0
    for i, rows in enumerate(batches, 1):
        if WORLD > 1:
            ddp.require_backward_grad_sync = i == len(batches)  # exchange gradients once, after the last micro batch
        loss = forward(run, ddp, rows) * (1 / len(batches))
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
        total += torch.tensor((forward(run, model, on_device(run, rows)).item() * count, count))
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
    signals = common.catch_signals()
    last_line = first, time.time()  # step and time of the last line
    timed_from = None  # the same after the first step, which compiles: it is no measure of the rest
    batches = micro_batches(run, first)
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
            say(f'stopped after step {step}, saved. To go on: {launcher} train.py --resume '
                f'--out_dir {common.quoted(run.out)}')
            sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
        if validation_due:
            validate(run, progress, model, optimizer, again=validate_first and step == first)
            last_line = step, time.time()  # validation is not part of the time per step
        if done:
            return
        pending.append(train_step(run, ddp, optimizer, step, batches))
        progress.step += 1
        batches = micro_batches(run, progress.step)  # made while a GPU works on this step; below we may wait for it

        if step == first or progress.step % settings.log_interval == 0:
            norm = fetch_losses(run, progress, pending)
            last_line = log_step(run, progress, norm, last_line, timed_from or last_line, top_speed)
            timed_from = timed_from or last_line


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


def validate(run, progress, model, optimizer, again=False):
    """Print and log the validation loss; save the checkpoint if it is the best so far. again: it has a row already."""
    step, end = progress.step, run.settings.max_iters
    loss = evaluate(run, model)
    best = loss < progress.best and (step > 0 or end == 0)  # an untrained model is not the best
    say(f'step {step:5d}/{end}  val loss {describe(run, loss)}{"  (best)" if best else ""}')
    log(run, again, step=step, val_loss=loss, bits_per_byte=bits_per_byte(run, loss))
    if best:
        progress.best = loss
        save(run, progress, model, optimizer, 'ckpt_best.pt')


def log_step(run, progress, norm, last_line, timed_from, top_speed):
    """Print the line of a step; every log_interval steps it goes to log.csv too -> its step and time."""
    settings, step, now = run.settings, progress.step, time.time()
    loss = sum(progress.window) / len(progress.window)
    lr = lr_at(step - 1, settings)
    ms = (now - last_line[1]) / (step - last_line[0]) * 1e3
    speed = settings.batch_size * run.config.block_size / ms * 1e3
    mfu = f'  MFU {speed / top_speed:.0%}' if top_speed else ''
    left = (now - timed_from[1]) / (step - timed_from[0]) * (settings.max_iters - step)
    say(f'step {step:5d}/{settings.max_iters}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {ms:.1f} ms  '
        f'{speed:,.0f} tokens/s{mfu}  {datetime.timedelta(seconds=round(left))} left')
    if step % settings.log_interval == 0:
        log(run, step=step, train_loss=loss, lr=lr, grad_norm=norm, ms=ms, tokens_per_s=speed)
        progress.window.clear()
    return step, now


def save(run, progress, model, optimizer, name):
    """Tensors and plain values only, so that weights_only=True can load them."""
    if RANK == 0:
        values = dict(**dataclasses.asdict(progress), config=dataclasses.asdict(run.config),
                      settings=dataclasses.asdict(run.settings), meta=run.meta,
                      model=model.state_dict(), optimizer=optimizer.state_dict())
        write(run.out / name, lambda f: torch.save(values, f))


# ---------------------------------------------------------------------------------------------------------------------
# a run from start to end

def main():
    common.exit_on_signals()
    sys.stdout.reconfigure(errors='backslashreplace')  # a name of a file need not be text
    settings, module, config, flags = resolve(sys.argv[1:])
    device, dtype, compiled = common.choose_device(settings)
    peers = common.join_processes(device)
    run = Run(settings, config, *common.load_data(settings, peers), device, dtype, peers)
    fit_to_data(run)
    model, ddp, optimizer = build(run, module, compiled)
    run.out, checkpoint = common.open_run(settings, flags, peers)
    progress = restore(run, checkpoint, model, optimizer) if checkpoint else Progress()
    if flags.eval_only:
        loss = evaluate(run, model)
        say(f'{run.out}, step {progress.step}, {settings.dataset}: val loss {describe(run, loss)}')
    else:
        validate_first = common.start_log(run, progress.step)
        introduce(run, model, module)
        training_loop(run, model, ddp, optimizer, progress, validate_first)
        common.exit_on_signals()
        common.plot(run.out)
        conclude(run, progress, new_instead_of_resumed=flags.resume and not checkpoint)
    if WORLD > 1:
        dist.destroy_process_group()


def resolve(argv):
    """Command line -> Settings, the model file, its Config, and all flags as argparse has them."""
    parser = common.Parser(__doc__)
    parser.add_argument('--preset', choices=list(PRESETS), help='a set of values (default tiny)')
    parser.add_argument('--config', metavar='FILE', help='settings that an earlier run wrote (its config.json)')
    parser.add_argument('--out_dir', help='default out/<model>-<objective>-<dataset>, numbered -2, -3, ... when taken')
    parser.add_argument('--resume', action='store_true', help='go on with --out_dir, or the newest run of its kind')
    parser.add_argument('--overwrite', action='store_true', help='delete the run that --out_dir holds')
    parser.add_argument('--eval_only', action='store_true', help='print the best loss of --out_dir, or of the newest')
    parser.add_fields(Settings, 'training')
    asked = parser.parse_known_args(argv)[0]  # which preset and file
    if asked.overwrite and (asked.resume or asked.eval_only or not asked.out_dir):
        die('--overwrite needs --out_dir, and excludes --resume and --eval_only')
    preset = common.as_flags(PRESETS[asked.preset or 'tiny'])
    file = common.read_config(asked.config) if asked.config else {}
    first = parser.parse_known_args([*preset, *common.as_flags(file), *argv])[0]  # which model and run
    out_dir = first.out_dir
    if first.resume or first.eval_only:
        name = f'{first.model}-{first.objective}-{first.dataset}'
        out_dir = out_dir or common.newest_run(name)
        if not (out_dir and Path(out_dir, 'ckpt_last.pt').exists()):
            missing = f'found no checkpoint in {out_dir or Path("out", name)}'
            if first.eval_only:
                die(f'--eval_only {missing}: name a run with --out_dir')
            say(f'note: --resume {missing}: this is a new run from step 0')
        if out_dir and Path(out_dir, 'config.json').exists():
            if asked.config or asked.preset:
                say(f'note: {Path(out_dir, "config.json")} replaces --config and --preset')
            preset, file = [], common.read_config(Path(out_dir, 'config.json'))
            first = parser.parse_known_args([*common.as_flags(file), *argv])[0]
            if first.model != file.get('model'):
                die(f'cannot change model: it is {file.get("model")} in {out_dir}, not {first.model}')
    else:
        file.pop('vocab_size', None)  # the data decides it
    if first.objective != file.get('objective', first.objective):
        file.pop('causal', None)  # the objective decides it
    module = common.load_model_file(first.model)
    common.drop_other_scheme(file, first.model)
    parser.add_argument('-h', '--help', action='help', help='show this and exit')
    parser.add_fields(module.Config, f'model_{first.model}.py')
    parser.set_defaults(vocab_size=0, causal=first.objective == 'causal')  # 0: as many as the data needs
    flags = parser.parse_args([*preset, *common.as_flags(file), *argv])
    flags.out_dir = out_dir
    check(flags)

    def pick(cls):
        return cls(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(cls)})
    return pick(Settings), module, pick(module.Config), flags


def check(flags):
    """Refuse numbers that make no sense, before anything is made. A scheme checks its own fields itself."""
    common.check_numbers(flags, vars(Settings()))
    if not re.fullmatch(r'[\w.-]*\w[\w.-]*', flags.dataset):
        die(f'--dataset names a folder: letters, digits, dots, dashes and underscores only, not {flags.dataset!r}')
    if flags.objective == 'causal' and not flags.causal:
        die('--objective causal needs --causal: without the mask the model reads the answer')
    if flags.batch_size % WORLD:
        die(f'--batch_size must be a multiple of the {WORLD} processes, not {flags.batch_size}')
    share, micro = batch_share(flags)
    if share % micro:
        die(f'--micro_batch_size must divide the {share} sequences of each process, not {micro}')


def fit_to_data(run):
    """Set the size of the vocabulary; refuse a model that the data set does not fit."""
    config, dataset = run.config, run.settings.dataset
    need = run.meta['mask_id'] + 1
    shorter = min(len(run.train), len(run.val))
    config.vocab_size = config.vocab_size or math.ceil(need / 64) * 64
    if config.vocab_size < need:
        die(f'--vocab_size must be at least {need} for {dataset}, not {config.vocab_size}; or choose another --dataset')
    if shorter <= config.block_size:
        die(f'--block_size must be under {shorter}, the tokens in train or val, not {config.block_size}')


def build(run, module, compiled):
    """-> the model, the same for training by several processes, and the optimizer."""
    settings, cuda = run.settings, run.device.type == 'cuda'
    torch.manual_seed(settings.seed)
    try:
        model = ddp = module.Model(run.config).to(run.device)
    except ValueError as e:
        die(f'{e} ({common.place(e)})')
    if compiled:
        model.compile(dynamic=False)  # called by DDP, it is cut where a bucket of gradients can be sent off early
    if WORLD > 1:
        ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[run.device.index] if cuda else None)
    matrices = dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=settings.weight_decay)
    vectors = dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(settings.beta1, settings.beta2), fused=cuda)
    return model, ddp, optimizer


def restore(run, checkpoint, model, optimizer):
    """Put a checkpoint into model and optimizer; say which settings have changed, refuse another architecture."""
    if checkpoint['meta']['tokenizer'] != run.meta['tokenizer']:
        die(f'{run.settings.dataset} has the tokenizer {run.meta["tokenizer"]}, the run in {run.out} has another one')
    for name, old in {'objective': checkpoint['settings']['objective'], **checkpoint['config']}.items():
        new = getattr(run.settings, name, getattr(run.config, name, None))
        if new != old:
            die(f'cannot change {name}: it is {old} in {run.out}, not {new}')
    for name, old in checkpoint['settings'].items():
        if getattr(run.settings, name, None) != old:
            say(f'changed on resume: {name} {old} -> {getattr(run.settings, name, None)}')
    if checkpoint['meta']['sha256'] != run.meta['sha256']:
        say(f'changed on resume: the tokens of {run.settings.dataset}')
    try:
        for old, new in zip(checkpoint['optimizer']['param_groups'], optimizer.state_dict()['param_groups']):
            old.update(new, params=old['params'])  # this run's betas, weight decay and device, not the checkpoint's
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        for p, state in optimizer.state.items():
            if state['step'].numel() != 1 or not state['exp_avg'].shape == state['exp_avg_sq'].shape == p.shape:
                raise ValueError('its optimizer has other shapes')
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
        die(f'the checkpoint in {run.out} does not fit model_{run.settings.model}.py as it is now: {one_line(e)}')
    return Progress(checkpoint['step'], checkpoint['best'], checkpoint['window'])


def introduce(run, model, module):
    """Write config.json; say what is trained, and which settings are not the default."""
    settings, config = run.settings, run.config
    values = {**dataclasses.asdict(settings), **dataclasses.asdict(config)}
    usual = {**dataclasses.asdict(Settings()), **dataclasses.asdict(module.Config())}
    if RANK == 0:
        write(run.out / 'config.json', lambda f: f.write(f'{json.dumps(values, indent=1)}\n'.encode()))
    params = sum(p.numel() for p in model.parameters()) / 1e6
    say(f'{settings.model}, {settings.objective}, {settings.dataset} ({len(run.train):,} tokens): '
        f'{params:.2f}M parameters, run {run.out}')
    unusual = ', '.join(f'{name} {value}' for name, value in values.items() if value != usual[name])
    say(f'{run.out / "config.json"} has all settings; not the default: {unusual}')
    if settings.objective == 'masked' and config.causal:
        say('note: --objective masked with --causal: the model sees only what is to the left of each mask')
    if settings.warmup_iters >= settings.max_iters:
        say('note: the learning rate rises to the end, because --warmup_iters is not below --max_iters')


def conclude(run, progress, new_instead_of_resumed):
    """The last line: the best loss, and what to try next."""
    guess = math.log(run.meta['vocab_size'])
    prompt = ' --prompt "a text with [MASK] in it"' if run.settings.objective == 'masked' else ''
    advice = f'Now try: python sample.py --out_dir {common.quoted(run.out)}{prompt}'
    if progress.best >= guess:
        advice = (f'The run did not learn: a uniform guess has a loss of {guess:.4f}. '
                  'Try a lower --learning_rate, a longer --warmup_iters, or more --max_iters')
    if new_instead_of_resumed:
        advice += '. Note: --resume found no checkpoint, so this run started from step 0'
    say(f'done: best val loss {describe(run, progress.best)}. {advice}')


def bits_per_byte(run, loss):
    return loss * (run.meta['val_tokens'] / run.meta['val_bytes'] / math.log(2))


def describe(run, loss):
    unit = 'token' if run.settings.objective == 'causal' else 'masked token'
    return (f'{loss:.4f} nats per {unit}, {bits_per_byte(run, loss):.4f} bits per byte, '
            f'perplexity {math.exp(min(loss, 99)):.2f}')


def speed_at_peak(run, model):
    """Tokens/s at which the GPUs would do the model's products at their peak rate, MFU 100 %; None where unknown."""
    peak = common.peak_flops(run.device) if run.dtype == torch.bfloat16 else None
    return peak * WORLD / flops_per_token(run, model) if peak else None


def flops_per_token(run, model):
    """Operations per token of the products that this model makes on this device; backward twice as many as forward."""
    rows = on_device(run, train_rows(run, 0, range(1)))
    once = common.count_flops(lambda: forward(run, model.forward, rows))  # not model(...): compiled code hides products
    return 3 * once / run.config.block_size


if __name__ == '__main__':
    common.run_main(main)
