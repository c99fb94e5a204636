"""
What train.py needs around the training: messages, the folder of a run, data, processes, devices, the command line.

sample.py and the experiments use some of it too. Nothing here knows how a model learns.
"""
import argparse
import csv
import dataclasses
import datetime
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import prepare_data

RANK = int(os.environ.get('RANK', 0))  # this process among all; torchrun sets these three
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))  # this process among those of its machine
WORLD = int(os.environ.get('WORLD_SIZE', 1))  # number of processes


def die(message, code=2):
    """One line on stderr and exit: wrong input (2), said once per machine, or a failure (1), said by whoever has it."""
    if LOCAL_RANK == 0 or code == 1:
        line = ' '.join(str(message).split())
        print(f'{Path(sys.argv[0]).name}: {line}', file=sys.stderr, flush=True)
    sys.exit(code)


def say(line):
    """One line on stdout, said by one process."""
    if RANK == 0:
        print(line, flush=True)


def place(error):
    """Where an error was raised: file and line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{Path(frame.filename).name}, line {frame.lineno}'


def one_line(error):
    """The beginning of an error's text, in one line."""
    return ' '.join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------------------------------------
# the folder of a run

FILES = ('config.json', 'log.csv', 'loss.png', 'ckpt_last.pt', 'ckpt_best.pt')
COLUMNS = ('step', 'train_loss', 'val_loss', 'bits_per_byte', 'lr', 'grad_norm', 'ms', 'tokens_per_s')


class Size(io.RawIOBase):
    """A file that only counts the bytes written to it."""
    size = 0

    def write(self, data):
        self.size += len(data)
        return len(data)


def write(path, put):
    """put(file), written beside, flushed, renamed: a kill or a full disk leaves the old file or the new one, whole."""
    beside = path.with_name(path.name + '.tmp')
    try:
        with open(beside, 'wb') as f:
            put(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:  # torch.save raises a RuntimeError when the disk is full
        beside.unlink(missing_ok=True)
        needed = Size()
        put(needed)  # an error that the disk has no part in is raised again
        free = shutil.disk_usage(path.parent).free
        raise OSError(f'{path} could not be written ({one_line(e)}): it needs {needed.size:,} bytes beside the old '
                      f'file, and {free:,} are free') from e
    finally:
        beside.unlink(missing_ok=True)


PARTS = dict(step=int, best=float, window=list, config=dict, settings=dict, meta=dict, model=dict, optimizer=dict)


def load_checkpoint(path):
    """-> what train.py's save() wrote. Anything else is refused."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        checkpoint.setdefault('window', checkpoint.get('losses'))  # TEMPORARY
        for name, kind in PARTS.items():
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), kind):
                raise ValueError(f'it needs {name}, of type {kind.__name__}')
        for name in ('model', 'objective'):
            if not isinstance(checkpoint['settings'].get(name), str):
                raise ValueError(f'its settings need {name}, of type str')
        for name, value in {**checkpoint['settings'], **checkpoint['config']}.items():
            if not isinstance(name, str) or not isinstance(value, (bool, int, float, str)):
                raise ValueError(f'its setting {name} is no plain value')
        if not all(isinstance(loss, float) for loss in checkpoint['window']):
            raise ValueError('its window must hold floats')
        prepare_data.check_vocabulary(checkpoint['meta'])
        return checkpoint
    except Exception as e:  # zip, pickle and torch have many errors for damaged files
        die(f'{path} is damaged, or no checkpoint of train.py: {type(e).__name__} {one_line(e)}')


def quoted(path):
    """A folder in a command to copy: one with a space in double quotes, which every shell reads."""
    return f'"{path}"' if ' ' in str(path) else str(path)


def newest_run(name):
    """The newest of out/<name>, out/<name>-2, ... that holds a checkpoint, or None."""
    runs = [path.parent for path in Path('out').glob(f'{name}*/ckpt_last.pt')]
    runs = [path for path in runs if re.fullmatch(rf'{re.escape(name)}(-\d+)?', path.name)]
    return str(max(runs, key=lambda path: os.path.getmtime(path / 'ckpt_last.pt'))) if runs else None


def open_run(settings, flags, peers):
    """-> the run's folder, the same on every process, and the checkpoint to go on from, or None."""
    name = f'{settings.model}-{settings.objective}-{settings.dataset}'
    out = Path(flags.out_dir or Path('out', name))
    if out.exists() and not out.is_dir():
        die(f'--out_dir {out} is a file; it must be a folder, or the name of one to make')
    if flags.eval_only:
        return out, load_checkpoint(out / ('ckpt_best.pt' if (out / 'ckpt_best.pt').exists() else 'ckpt_last.pt'))
    found = flags.resume and (out / 'ckpt_last.pt').exists()
    if any_process(found, peers) and not found:
        die(f'{out} holds a checkpoint on another machine and none here: share that folder', 1)
    if found:
        return out, load_checkpoint(out / 'ckpt_last.pt')
    new = flags.out_dir and not (flags.resume or flags.overwrite)
    if new and any((out / file).exists() for file in FILES):
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
    """Write the header, or cut log.csv back to the rows up to the checkpoint of `step`.

    True: the last row is a validation of this very step. It is made again, and then log(again=True) replaces the row.
    """
    path, rows, again = run.out / 'log.csv', [], False
    if RANK == 0:
        if step and path.exists():
            rows = re.findall(rb'^\d+,.*\n', path.read_bytes(), re.M)  # whole rows: a full disk may cut the last one
            rows = [row for row in rows if int(row.split(b',')[0]) <= step]
        again = bool(rows) and rows[-1].startswith(b'%d,,' % step)  # no train_loss: a validation
        header = ','.join(COLUMNS).encode() + b'\r\n'
        write(path, lambda f: f.writelines([header, *rows]))
    return any_process(again, run.peers)


def log(run, again=False, **row):
    """Add a row to log.csv, or put it in the place of the last one."""
    if RANK:
        return
    path = run.out / 'log.csv'
    row = {name: f'{value:.6g}' if isinstance(value, float) else value for name, value in row.items()}
    line = f'{",".join(str(row.get(name, "")) for name in COLUMNS)}\r\n'.encode()
    if again:
        rows = path.read_bytes().splitlines(keepends=True)
        return write(path, lambda f: f.writelines([*rows[:-1], line]))
    with open(path, 'ab') as f:
        f.write(line)


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
    write(out / 'loss.png', lambda f: fig.savefig(f, format='png', dpi=120, bbox_inches='tight'))
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# data, processes, signals, devices

def load_data(settings, peers):
    """-> meta.json as a dict, train and validation tokens as memory maps; prepares them first if they are missing."""
    folder, failed = Path(settings.data_dir, settings.dataset), None
    if RANK == 0 and not (folder / 'meta.json').exists():
        try:
            prepare_data.prepare(settings.dataset, data_dir=settings.data_dir)
        except SystemExit as e:  # it has said why; the other processes wait for the answer
            failed = e.code
    if any_process(failed is not None, peers):
        sys.exit(failed or 2)
    if not (folder / 'meta.json').exists():
        die(f'{folder} is missing on this machine: prepare it here too, or share the folder')
    return prepare_data.load(folder)


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


def exit_on_signals():
    """SIGINT and SIGTERM end the process at once, and on the way out what is half-made is removed.

    Process 0 makes things. The others may wait in a library that no handler can interrupt: there SIGTERM just kills.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, (lambda *_: sys.exit(128 + signal.SIGTERM)) if RANK == 0 else signal.SIG_DFL)


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
        print(f'{Path(sys.argv[0]).name}: --device {settings.device} is not supported here; auto would take {best}. '
              f'{str(e).splitlines()[0]}', file=sys.stderr)
        sys.exit(2)
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    has_bf16 = multiplies_bf16(device)
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
    if bf16 and settings.dtype == 'auto':
        precision += ' (--dtype float32 for float32)'
    reason = f' (no {lacks})' if settings.compile == 'auto' and not compiled else ''
    say(f'device {device} ({kind}){processes}, {precision}, compile {"on" if compiled else "off"}{reason}')
    return device, torch.bfloat16 if bf16 else torch.float32, compiled


def multiplies_bf16(device):
    """Whether the device multiplies bfloat16 natively: CUDA from Ampere on, x86 with AVX512-BF16 or AMX.

    Arm's instructions are left out: nobody has measured there whether torch gains by them.
    """
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return device.type == 'cpu' and any(able.get(name) for name in ('avx512_bf16', 'amx_bf16'))


def compile_lacks(settings, device):
    """What torch.compile needs and does not find here, or None."""
    if device.type == 'cuda' and not find_spec('triton'):
        return 'Triton'
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (7, 0):
        return 'compute capability 7.0'
    if device.type != 'cuda' and settings.compile == 'auto':
        return 'CUDA'
    if device.type == 'cuda' and not any(shutil.which(compiler) for compiler in ('cc', 'gcc', 'clang')):
        return 'C compiler'
    cxx = {'darwin': 'clang++', 'win32': 'cl'}.get(sys.platform, 'g++')  # as Inductor chooses
    if device.type != 'cuda' and not shutil.which(os.environ.get('CXX', cxx)):
        return 'C++ compiler'
    return None


# dense bf16 FLOP/s by name; an unknown GPU gets no MFU rather than a wrong one
PEAK = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12,
        'L4': 121e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def peak_flops(device):
    """Operations per second of a GPU's bfloat16 products, or None."""
    if device.type != 'cuda':
        return None
    gpu = torch.cuda.get_device_name(device)
    return next((flops for name, flops in PEAK.items() if re.search(rf'\b{name}\b', gpu)), None)


def count_flops(call):
    """Operations of the products that call() makes.

    torch counts matrix products, convolutions and CUDA's attention kernels, but no FFT and no sum over shifted
    neighbours. A causal (T, T) matrix counts whole, as in nanoGPT.
    """
    flash = {torch.ops.aten._flash_attention_forward: flash_flops}
    with FlopCounterMode(display=False, custom_mapping=flash) as counter:
        call()
    return counter.get_total_flops()


def flash_flops(q, k, v, *_, out_shape=None, **__):
    """Operations of the flash kernel for shapes (B, T, nh, hs): torch's own formula takes them for (B, nh, T, hs)."""
    q, k, v = [(B, nh, T, hs) for B, T, nh, hs in (q, k, v)]
    return sdpa_flop_count(q, k, v)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and a flag for each field of a dataclass; the comment at the field is its help."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, add_help=False)

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
            note = notes.get(field.name, '').replace('%', '%%') + ' (default %(default)r)'
            group.add_argument(flag, default=field.default, help=note, **how)


def load_model_file(name):
    """Import model_<name>.py, which stands beside train.py or in baselines/."""
    here = Path(__file__).resolve().parent
    for folder in (here, here / 'baselines'):
        if re.fullmatch(r'[\w-]+', str(name)) and (folder / f'model_{name}.py').is_file():
            sys.path.insert(0, str(folder))
            return importlib.import_module(f'model_{name}')
    found = sorted(here.glob('model_*.py')) + sorted(here.glob('baselines/model_*.py'))
    die(f'there is no model_{name}.py; --model may be {", ".join(path.stem[6:] for path in found)}')


def read_config(path):
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as e:
        die(f'--config {path} cannot be read: {e}')
    if not isinstance(values, dict):
        die(f'--config {path} must hold a JSON object of settings')
    others = 'preset', 'config', 'out_dir', 'resume', 'overwrite', 'eval_only', 'help'
    if found := [name for name in values if name in others or not name.isidentifier()]:
        die(f'--config {path} must hold fields of Settings and Config only, not {", ".join(map(repr, found))}')
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


def check_numbers(flags, settings):
    """Refuse numbers that make no sense. settings: the fields that are train.py's own; a scheme checks its fields."""
    from_1 = ('batch_size', 'eval_interval', 'eval_tokens', 'log_interval', 'block_size', 'n_layer', 'n_head', 'n_embd')
    limits = dict.fromkeys([*settings, 'vocab_size', 'init_std'], (0, 2 ** 31))
    limits.update(dict.fromkeys(from_1, (1, 2 ** 31)))
    limits.update(mask_prob=(0.001, 1), dropout=(0, 0.9999), beta1=(0, 0.9999), beta2=(0, 0.9999))
    for name, value in vars(flags).items():
        if '\0' in str(value):
            die(f'--{name} must not hold the character NUL')
        low, high = limits.get(name, (-2 ** 31, 2 ** 31))
        if isinstance(value, (int, float)) and not low <= value <= high:
            die(f'--{name} must be from {low} to {high}, not {value}')


def run_main(main):
    """Run main(). What is no mistake in the code, such as a full disk, becomes one line and exit code 1."""
    try:
        main()
    except torch.OutOfMemoryError as e:
        die(f'out of GPU memory: try --micro_batch_size 1, 2, 4, ... Without dropout the curve stays. {one_line(e)}', 1)
    except OSError as e:
        die(e, 1)  # a full disk, a folder that may not be written
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):
            raise
        die(f'out of memory: try a smaller model or --micro_batch_size. {one_line(e)}', 1)
    except KeyboardInterrupt:
        sys.exit(130)
