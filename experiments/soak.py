"""
Kill it, again and again: what is lost? And what if the run goes on with other processes, micro batches or torch?

    python experiments/soak.py                                     # 50 kills and the table of changes
    python experiments/soak.py --quick                             # 8 kills
    python experiments/soak.py --other_python OTHER/bin/python     # goes on under that Python's torch too, and back

Each kill is a SIGKILL: of prepare_data.py, or of train.py at a random moment of its training, in a validation or in the
write of a checkpoint; of one process, or under torchrun of one of two or of all at once. After each, the data set and
the checkpoint must be whole. At the end, weights and log must be those of runs that nobody killed. Not for Windows.
"""
import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import lib

MODEL = ('--model composite --n_layer 2 --n_embd 32 --n_head 2 --block_size 32 --batch_size 8 --device cpu '
         '--dtype float32').split()  # float32: other processes or another torch then differ by rounding alone
SCHEDULE = '--eval_interval 20 --eval_tokens 65536 --checkpoint_interval 5 --log_interval 5 --warmup_iters 10'.split()
SCHEDULE += ['--learning_rate', '1e-3']  # with 3e-3 a spike of the gradient makes 1e-5 of rounding 1e-2 at the end
LIMIT = 300  # seconds for any one process


def launch(words, processes=1, python=sys.executable, **pipes):
    """Start a script of the repository; it leads a process group of its own."""
    launcher = [python]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    words = [str(lib.REPO / words[0]), *map(str, words[1:])]
    pipes = {**dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), **pipes}
    return subprocess.Popen([*launcher, *words], start_new_session=True, env=env, **pipes)


def finish(words, processes=1, python=sys.executable):
    """Run a script to its end; what it says is shown if it fails."""
    process = launch(words, processes, python, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate(timeout=LIMIT)[0]
    if process.returncode:
        sys.exit(f'{words} ended with {process.returncode}:\n{said.decode()}')


def wait_until(happened, process):
    """Look every millisecond. False: the process ended first, or the time is up."""
    began = time.time()
    while process.poll() is None and time.time() - began < LIMIT:
        if happened():
            return True
        time.sleep(0.001)
    return False


def kill(process, dice):
    """SIGKILL to all, or (under torchrun) to one worker alone, and a second later to what is left.

    torchrun's workers lead process groups of their own, so they are killed by number.
    """
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    if workers and dice.random() < 0.5:
        kill_if_alive(os.kill, dice.choice(workers))
        time.sleep(1)
    kill_if_alive(os.killpg, process.pid)
    for worker in workers:
        kill_if_alive(os.kill, worker)
    process.wait()


def kill_if_alive(how, number):
    try:
        how(int(number), signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has just ended


def step_of(out):
    """The step of the last checkpoint, which must be readable; -1 without one."""
    path = out / 'ckpt_last.pt'
    return torch.load(path, weights_only=True)['step'] if path.exists() else -1


def changed_at(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_preparation(folder, kills, dice):
    """Kill prepare_data.py -> (kills, broken data sets, whether the data set is at last that of an unbroken run)."""
    words = ['prepare_data.py', '--path', folder / 'text.txt', '--data_dir']
    began = time.time()
    finish([*words, folder / 'unbroken'])
    length = time.time() - began
    done = 0
    broken = 0
    for _ in range(kills):
        shutil.rmtree(folder / 'data' / 'text', ignore_errors=True)
        process = launch([*words, folder / 'data'])
        time.sleep(dice.uniform(0.3, 1) * length)
        done += process.poll() is None
        kill(process, dice)
        if (folder / 'data' / 'text').exists():
            meta = lib.prepare_data.load(folder / 'data' / 'text', check_data=True)[0]
            broken += not meta['train_tokens']
    finish([*words, folder / 'data', '--overwrite'])
    sums = [json.loads((folder / name / 'text' / 'meta.json').read_text())['sha256'] for name in ('unbroken', 'data')]
    return done, broken, sums[0] == sums[1] and os.listdir(folder / 'data') == ['text']


def one_life(folder, out, words, processes, moment, dice):
    """Start or resume the run and kill it at the given kind of moment -> whether it was killed."""
    last = out / 'ckpt_last.pt'
    process = launch(words, processes)
    seen = changed_at(last)
    for _ in range(dice.randint(1, 3)):  # so many checkpoints go well
        alive = wait_until(lambda: changed_at(last) != seen, process)
        seen = changed_at(last)
    if moment == 'checkpoint write':
        alive = wait_until((out / 'ckpt_last.pt.tmp').exists, process)
    elif moment == 'validation':  # every fourth checkpoint is followed by one; the log has no row of it yet
        alive = wait_until(lambda: changed_at(last) != seen and step_of(out) % 20 == 0, process)
    else:
        time.sleep(dice.uniform(0, 0.2))
    killed = alive and process.poll() is None
    kill(process, dice)
    return killed


def kill_training(folder, kills, processes, dice):
    """-> rows of (what, processes, kills, checkpoints that went back, largest difference from an unbroken run)."""
    steps = 40 + 40 * kills  # more than the run can reach before the last kill
    words = ['train.py', *MODEL, *SCHEDULE, '--data_dir', folder / 'data', '--dataset', 'text', '--max_iters', steps]
    unbroken = folder / f'unbroken-{processes}'
    out = folder / f'killed-{processes}'
    finish([*words, '--out_dir', unbroken], processes)
    count = dict.fromkeys(('any moment', 'validation', 'checkpoint write'), 0)
    backwards = 0
    for n in range(kills):
        moment = list(count)[n % 3]
        before = step_of(out)
        count[moment] += one_life(folder, out, [*words, '--resume', '--out_dir', out], processes, moment, dice)
        backwards += step_of(out) < before
        print(f'{processes} processes, kill {n + 1} of {kills}, {moment}: step {step_of(out)} of {steps}', flush=True)
    finish([*words, '--resume', '--out_dir', out], processes)
    worst = difference(unbroken, out)
    return [(f'train.py: {moment}', processes, done, backwards, worst) for moment, done in count.items()]


def difference(a, b):
    """-> the largest difference between two runs' weights and logged losses; steps logged must be the same."""
    models = [torch.load(out / 'ckpt_last.pt', weights_only=True)['model'] for out in (a, b)]
    worst = max((x - models[1][name]).abs().max().item() for name, x in models[0].items())
    rows = [list(csv.DictReader((out / 'log.csv').open(encoding='utf-8'))) for out in (a, b)]
    if [row['step'] for row in rows[0]] != [row['step'] for row in rows[1]]:
        return float('inf')
    for name in ('train_loss', 'val_loss'):
        worst = max([worst, *(abs(float(x[name] or 0) - float(y[name] or 0)) for x, y in zip(*rows))])
    return worst


def changes(folder, other):
    """Stop halfway, go on in another way -> rows of (change, largest difference from the run that never stopped)."""
    words = ['train.py', *MODEL, *SCHEDULE, '--data_dir', folder / 'data', '--dataset', 'text', '--max_iters', 200]
    ours = sys.executable
    ways = {  # processes and Python of the first half, of the second half
        'nothing': (1, ours, 1, ours),
        '1 process, then 2': (1, ours, 2, ours),
        '2 processes, then 1': (2, ours, 1, ours),
        'micro_batch_size 8, then 2': (1, ours, 1, ours),
    }
    if other:
        ways['this torch, then the other'] = (1, ours, 1, other)
        ways['the other torch, then this'] = (1, other, 1, ours)
    whole = folder / 'whole'
    finish([*words, '--out_dir', whole])
    rows = []
    for what, (first, python, second, other_python) in ways.items():
        out = folder / what.replace(' ', '-')
        process = launch([*words, '--out_dir', out], first, python)
        wait_until(lambda: changed_at(out / 'ckpt_last.pt') and step_of(out) >= 50, process)
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT)
        stopped = step_of(out)
        micro = ['--micro_batch_size', 2] if 'micro' in what else []
        finish([*words, '--resume', '--out_dir', out, *micro], second, other_python)
        rows.append((f'{what} (stopped at step {stopped})', second, '', '', difference(whole, out)))
        print(f'{what}: stopped at step {stopped}, largest difference {rows[-1][-1]:.2g}', flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=lib.positive, help='number of kills (default 50; 8 with --quick)')
    parser.add_argument('--seed', type=int, default=1, help='of the moments (default 1)')
    parser.add_argument('--other_python', help='a Python with another torch, for the table of changes')
    lib.common_flags(parser, '8 kills', dataset=False)
    args = lib.parse(parser, dict(kills=(50, 8)))
    if os.name == 'nt':
        lib.die('Windows has no SIGKILL')
    dice = random.Random(args.seed)
    few = args.kills // 5
    two = (args.kills - few) // 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = ''.join(path.read_text(encoding='utf-8') for path in sorted(lib.REPO.glob('*.py')))
        (folder / 'text.txt').write_text(text * 40, encoding='utf-8')
        done, broken, same = kill_preparation(folder, few, dice)
        rows = [('prepare_data.py', 1, done, broken, 0.0 if same else float('inf'))]
        rows += kill_training(folder, args.kills - few - two, 1, dice)
        rows += kill_training(folder, two, 2, dice)
        rows += changes(folder, args.other_python)
    header = ('what', 'processes', 'kills', 'went back or broken', 'largest difference at the end')
    for row in (header, *rows):
        print('{:50s} {:>9} {:>5} {:>19} {}'.format(*row))
    path = lib.write_csv(args.results, 'soak', header, rows, f'torch {torch.__version__}, seed {args.seed}')
    print(f'\nwrote {path}')
    failed = [row for row in rows if row[3] or row[4] > (0 if row[2] != '' else 1e-3)]
    sys.exit(f'FAIL: {failed}' if failed else 0)


if __name__ == '__main__':
    main()
