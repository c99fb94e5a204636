"""
Train several position schemes at equal budget, with several seeds, and compare their validation losses.

    python experiments/compare.py --quick                    # a few minutes on two CPU cores: does it run?
    python experiments/compare.py --schemes nope composite   # the tiny preset, three seeds
    python experiments/compare.py --schemes nope 'mine: --model mine'    # a scheme of your own: its name and flags
    python experiments/compare.py --name python-small --train --preset small   # all after --train goes to train.py

The question of Chang et al. 2021, Tables 1 to 3 (masked: no positions, absolute, fixed, dynamic, composite,
convolutions), answered by the loss itself. The last six before rope answer the WikiText-103 table of Luo et al. 2021:
softmax with a fixed kernel of 257 offsets (which their table lacks); with absolute positions elu + 1, plain positive
features (prf), normalised ones (nprf) and normalised trigonometric ones (trf: RFA); and the paper's own scheme, nprf
with relative positions of the same 257 offsets. The schemes rope, alibi, tisa and cape are the files of baselines/.
Runs stay in out/compare/ and are not trained twice: an interrupted comparison goes on where it stopped. Runs of one
--name have the same settings; other settings need another name.
Writes experiments/results/compare-<name>[-<objective, if only one>].csv, again after each run, and .png. The first line
of the CSV is the last command. Rows of other runs with the same settings stay in it, so that two commands can fill one
table side by side; --from_table takes losses from there, further seeds too. A table of other settings is replaced at
the end.
"""
import argparse
import csv
import dataclasses
import itertools
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from curves import label_ends
from lib import (
    REPO, comment_of, common_flags, from_table_flag, merge_table, parse, positive, pyplot, read_csv, save)

import train
from common import die

SCHEMES = {  # name: flags of train.py
    'nope': ['--model', 'nope'],
    'absolute': ['--model', 'nope', '--absolute'],
    'fixed': ['--model', 'composite', '--no-dynamic'],
    'dynamic': ['--model', 'composite', '--no-fixed'],
    'composite': ['--model', 'composite'],
    'composite+key': ['--model', 'composite', '--dynamic_key'],
    'conv-output': ['--model', 'conv', '--no-lightweight', '--no-dynamic', '--output'],
    'conv-values': ['--model', 'conv', '--no-lightweight', '--no-dynamic', '--no-output', '--values'],
    'conv-qk': ['--model', 'conv', '--no-lightweight', '--no-dynamic', '--no-output', '--queries_keys'],
    'composite+output': ['--model', 'conv', '--lightweight', '--dynamic', '--output'],
    'composite+values': ['--model', 'conv', '--lightweight', '--dynamic', '--no-output', '--values'],
    'composite+qk': ['--model', 'conv', '--lightweight', '--dynamic', '--no-output', '--queries_keys'],
    'conv-all': ['--model', 'conv', '--lightweight', '--dynamic', '--output', '--values', '--queries_keys'],
    'fixed-257': ['--model', 'composite', '--no-dynamic', '--kernel_size', '257'],
    'elu+absolute': ['--model', 'kernelized', '--absolute', '--feature_map', 'elu', '--no-normalize', '--no-rpe'],
    'trf+absolute': ['--model', 'kernelized', '--absolute', '--feature_map', 'trf', '--no-rpe'],
    'prf+absolute': ['--model', 'kernelized', '--absolute', '--no-normalize', '--no-rpe'],
    'nprf+absolute': ['--model', 'kernelized', '--absolute', '--no-rpe'],
    'nprf+rpe': ['--model', 'kernelized'],
    'rope': ['--model', 'rope'],
    'alibi': ['--model', 'alibi'],
    'tisa': ['--model', 'tisa'],
    'cape': ['--model', 'cape'],
    'conv-qkv': ['--model', 'conv', '--no-lightweight', '--no-dynamic', '--no-output', '--queries_keys', '--values'],
    'nprf+rpe-64': ['--model', 'kernelized', '--max_distance', '64'],
}
PALETTE = ('C0 C1 C2 C3 C4 C5 C6 C7 C8 C9 '
           '#aec7e8 #ffbb78 #98df8a #ff9896 #c5b0d5 #c49c94 #e7cb94 #8c6d31 #000000 '
           '#006d5b #b30059 #5f9ea0 #7f7f00 #4b0082 #cd5c5c').split()
OWN_PALETTE = '#ff00ff #00c000 #0000ff #ffd700 #800000 #00ced1'.split()  # for schemes that SCHEMES does not know
QUICK = ('--max_iters 60 --n_layer 2 --n_embd 64 --batch_size 16 --warmup_iters 10 --eval_interval 20 '
         '--eval_tokens 16384').split()
OURS = '--objective --dataset --seed --out_dir --resume --overwrite'.split()  # flags of train.py that are set here
SAME_CURVE = 'device compile data_dir micro_batch_size log_interval checkpoint_interval vocab_size'.split()
LOG_LINE = re.compile(r'step +(\d+/\d+)  loss ([\d.]+)  .*  (.+) left$')  # as train.py prints it


def colors(names):
    """{name: colour}. A scheme has the same colour in every picture; unknown names take further colours in turn."""
    found = dict(zip(SCHEMES, PALETTE))
    unknown = [name for name in names if name not in SCHEMES]
    for i, name in enumerate(unknown):
        found[name] = OWN_PALETTE[i % len(OWN_PALETTE)]
    return {name: found[name] for name in names}


def in_order(names):
    """The schemes in the order of SCHEMES, then the others as they come."""
    known = [name for name in SCHEMES if name in names]
    return known + [name for name in names if name not in SCHEMES]


def refuse_ours(words, where):
    for word in words:
        if word.split('=')[0] in OURS:
            die(f'{where} must not set {word.split("=")[0]}: compare.py sets it for each run')


def read_schemes(words):
    """What --schemes was given, known names or 'name: flags of train.py' -> {name: flags}."""
    found = {}
    for word in words:
        name, colon, flags = word.partition(':')
        name = name.strip()
        if not colon and name not in SCHEMES:
            die(f"--schemes: {name!r} is not one of {', '.join(SCHEMES)}; write your own as 'name: --model file'")
        if colon and name in SCHEMES:
            die(f'--schemes: {name!r} is the name of a known scheme; give yours another name')
        if not re.fullmatch(r'[\w.+-]+', name):
            die(f'--schemes: a name has letters, digits, dots, dashes, plus signs and underscores only, not {name!r}')
        if name in found:
            die(f'--schemes: {name!r} is there twice')
        try:
            found[name] = shlex.split(flags) if colon else SCHEMES[name]
        except ValueError as e:  # a quotation mark without its other half
            die(f'--schemes: the flags of {name!r} cannot be read: {e}')
        refuse_ours(found[name], f'--schemes: {name!r}')
    return found


def check_run(out, words):
    """Refuse flags that train.py refuses, and a run in `out` that has other settings: before anything is trained."""
    settings, module, config, _ = train.resolve(words)
    if not (out / 'config.json').is_file():
        return
    own = settings.model not in ('nope', 'composite', 'conv', 'kernelized')
    if own and Path(module.__file__).stat().st_mtime > (out / 'config.json').stat().st_mtime:
        die(f'{Path(module.__file__).name} has changed since {out} was trained with it: give this comparison another '
            '--name, or delete that run')
    old = json.loads((out / 'config.json').read_text(encoding='utf-8'))
    for name, value in {**dataclasses.asdict(settings), **dataclasses.asdict(config)}.items():
        if name not in SAME_CURVE and old.get(name, value) != value:
            die(f'{out} was trained with {name} {old[name]}, not {value}: give this comparison a --name of its own')


def show_progress(lines, place):
    """Say on stderr where a run is, from what train.py prints: in place on a terminal, else a line a minute."""
    terminal = sys.stderr.isatty()
    pause = 1 if terminal else 60
    last = -math.inf
    for line in lines:
        found = LOG_LINE.match(line)
        if found and time.monotonic() >= last + pause:
            last = time.monotonic()
            steps, loss, left = found.groups()
            left = left.removeprefix('0:')  # no hours
            message = f'{place}, step {steps}, loss {float(loss):.2f}, {left} left'
            if terminal:
                message = f'\r{message}\033[K'  # over the line before
            else:
                message += '\n'
            print(message, end='', file=sys.stderr, flush=True)
    if terminal:
        print('\r\033[K', end='', file=sys.stderr, flush=True)


def train_run(words, place):
    """One run of train.py. Ctrl-C and SIGTERM are passed on: it finishes its step and saves."""
    command = [sys.executable, str(REPO / 'train.py'), *words, '--resume']
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def pass_on(number, _):
        child.send_signal(number)
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    show_progress(child.stdout, place)
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code:
        print(f'{Path(sys.argv[0]).name}: stopped in {place}; the same command goes on there', file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # minus the signal that ended it


def losses(out):
    """[(step, validation loss)] of a run."""
    with open(out / 'log.csv', newline='', encoding='utf-8') as f:
        return [(int(r['step']), float(r['val_loss'])) for r in csv.DictReader(f) if r['val_loss']]


def same_settings(args):
    """-> a function of a table's first line, a command: whether all of its runs have the settings of args."""
    def fits(command):
        _, script, words = (command or '').partition('experiments/compare.py')
        try:
            old = arguments(shlex.split(words))
        except (ValueError, SystemExit):  # not a command that this version knows
            return False
        return bool(script) and (old.dataset, old.train) == (args.dataset, args.train)
    return fits


def recorded(path, fits):
    """{(objective, scheme): {seed: [(step, loss)]}} of a table whose first line fits.

    Without schemes of one's own: no table says what they were.
    """
    if not path.is_file() or not fits(comment_of(path)):
        return {}
    found = {}
    for row in read_csv(path):
        if row['scheme'] in SCHEMES:
            seeds = found.setdefault((row['objective'], row['scheme']), {})
            seeds.setdefault(int(row['seed']), []).append((int(row['step']), float(row['val_loss'])))
    return found


def p_value(differences):
    """Two-sided p of Student's t-test that paired differences (one per seed, two or more) have mean 0."""
    n = len(differences) - 1  # degrees of freedom
    spread = statistics.stdev(differences) or math.inf
    t = statistics.mean(differences) / spread * math.sqrt(n + 1)
    # t = sqrt(n) tan(angle) makes the density cos^(n-1)
    angles = np.linspace(0, math.atan(abs(t) / math.sqrt(n)), 10001)
    inside = np.trapezoid(np.cos(angles) ** (n - 1), angles)
    return 1 - 2 * math.gamma((n + 1) / 2) / math.sqrt(math.pi) / math.gamma(n / 2) * inside


def print_losses(curves):
    print('\n| objective | scheme | validation loss, nats per token | seeds | standard deviation |')
    print('|---|---|---|---|---|')
    for (objective, scheme), runs in curves.items():
        final = [run[-1][1] for run in runs]
        spread = f'{statistics.stdev(final):.4f}' if len(final) > 1 else '-'
        print(f'| {objective} | {scheme} | {statistics.mean(final):.4f} | {len(final)} | {spread} |')


def print_differences(curves, against):
    """What each scheme loses more than the scheme `against`, paired by seed, with p; of the seeds that both have."""
    print(f'\n| objective | scheme | more than {against} | by seed | p |\n|---|---|---|---|---|')
    for (objective, scheme), runs in curves.items():
        if scheme == against:
            continue
        differences = [run[-1][1] - base[-1][1] for run, base in zip(runs, curves[objective, against])]
        mean = statistics.mean(differences)
        by_seed = ', '.join(f'{x:+.4f}' for x in differences)
        p = f'{p_value(differences):.3f}' if len(differences) > 1 else '-'
        print(f'| {objective} | {scheme} | {mean:+.4f} | {by_seed} | {p} |')


def print_levels(curves, levels):
    """The first validation of each run with a loss below each level; a dash: there is none. And the last loss."""
    print('\n| objective | scheme |' + ''.join(f' below {level:g} |' for level in levels) + ' at the end |')
    print('|---|---|' + '---|' * (len(levels) + 1))
    for (objective, scheme), runs in curves.items():
        cells = []
        for level in levels:
            steps = [next((f'{step:,}' for step, loss in run if loss < level), '-') for run in runs]
            cells.append(' / '.join(steps))
        cells.append(' / '.join(f'{run[-1][1]:.4f}' for run in runs))
        print(f'| {objective} | {scheme} | {" | ".join(cells)} |')


def draw(curves, title):
    """curves {(objective, scheme): [[(step, loss)] of each seed]} -> a figure.

    Above, the mean loss over the seeds at each validation; below, the last loss of each seed.
    """
    objectives = list(dict.fromkeys(objective for objective, _ in curves))
    schemes = list(dict.fromkeys(scheme for _, scheme in curves))
    color = colors(schemes)
    n = len(schemes)
    size = (5.5 * len(objectives), 4.5 + 0.25 * n)
    fig, axes = pyplot().subplots(2, len(objectives), figsize=size, height_ratios=(4, 0.5 + 0.25 * n), squeeze=False,
                                  layout='constrained')
    for (above, below), objective in zip(axes.T, objectives):
        ends = []
        for row, scheme in enumerate(schemes):
            runs = curves[objective, scheme]
            steps = [step for step, _ in runs[0]]
            means = [statistics.mean(run[i][1] for run in runs) for i in range(len(steps))]
            above.plot(steps[1:], means[1:], color=color[scheme], lw=1.5, label=scheme)
            ends.append((means[-1], steps[-1], scheme, color[scheme]))
            final = [run[-1][1] for run in runs]
            below.plot(final, [row] * len(final), 'o', color=color[scheme], ms=5, alpha=0.8)
        above.set(title=f'{objective} language model', xlabel='step',
                  ylabel='validation loss, mean over seeds\n(nats per token)')
        if steps[-1] >= 20 * steps[1]:  # most of the learning is in the first steps
            above.set_xscale('log')
            ticks = [steps[1] * 2 ** i for i in range(30) if steps[1] * 2 ** i <= steps[-1]]
            above.set_xticks(ticks, ticks)
            above.minorticks_off()
        label_ends(above, ends)
        below.set(xlabel='last validation loss, one dot per seed (nats per token)')
        below.set_yticks(range(n), schemes)
        below.invert_yaxis()
        for ax in (above, below):
            ax.grid(alpha=0.3)
    fig.suptitle(title)
    return fig


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--schemes', nargs='+', default=list(SCHEMES), metavar='SCHEME',
                        help=f"any of {', '.join(SCHEMES)} (default: all), or your own, 'name: flags of train.py'")
    parser.add_argument('--objectives', nargs='+', choices=('causal', 'masked'), default=['causal', 'masked'],
                        help='default: both')
    parser.add_argument('--seeds', type=positive, default=3,
                        help='seeds 1, 2, ... (default 3); with --from_table also the next ones that the table has')
    parser.add_argument('--against', metavar='SCHEME',
                        help='also print how much more each scheme loses than this one, paired by seed, with p')
    from_table_flag(parser)
    parser.add_argument('--levels', type=float, nargs='+', metavar='LOSS',
                        help='also print the step at which each run is first below these losses, and its last')
    parser.add_argument('--dataset', default='python', help='default python')
    parser.add_argument('--name', help='of this setting, for folders and files (default: the name of the data set)')
    common_flags(parser, 'a much smaller setting: one seed, 60 steps', dataset=False)
    parser.add_argument('--train', nargs=argparse.REMAINDER, default=[], help='everything after it goes to train.py')
    args = parse(parser, words=words)
    args.schemes = read_schemes(args.schemes)
    refuse_ours(args.train, '--train')
    if args.against and (args.against not in args.schemes or args.quick or args.seeds < 2):
        parser.error('--against needs a scheme that is among --schemes, and two seeds or more')
    args.name = (args.name or args.dataset) + ('-quick' if args.quick else '')
    if not re.fullmatch(r'[\w.+-]+', args.name):
        parser.error('--name has letters, digits, dots, dashes, plus signs and underscores only')
    if args.quick:
        args.seeds = 1
        args.train = [*QUICK, *args.train]
    return args


def main():
    command = shlex.join(['python', 'experiments/compare.py', *sys.argv[1:]])
    args = arguments()
    name = '-'.join(['compare', args.name, *(args.objectives if len(args.objectives) == 1 else [])])
    path = Path(args.results, f'{name}.csv')
    fits = same_settings(args)
    keep = not path.is_file() or fits(comment_of(path))
    old = recorded(path, fits) if args.from_table else {}
    runs = []  # (objective, scheme, seed, folder, flags of train.py)
    for objective, (scheme, flags) in itertools.product(args.objectives, args.schemes.items()):
        seeds = args.seeds
        while seeds + 1 in old.get((objective, scheme), ()):
            seeds += 1
        for seed in range(1, 1 + seeds):
            out = Path('out', 'compare', f'{args.name}-{objective}-{scheme}-{seed}')
            words = ['--objective', objective, '--dataset', args.dataset, '--seed', str(seed),
                     '--out_dir', str(out), *args.train, *flags]
            check_run(out, words)
            runs.append((objective, scheme, seed, out, words))
    curves, rows = {}, []
    for k, (objective, scheme, seed, out, words) in enumerate(runs, 1):
        curve = old.get((objective, scheme), {}).get(seed)
        where = ' (from the table)' if curve else ''
        if not curve:
            if not (out / 'loss.png').exists():  # the last file that a run writes
                train_run(words, f'run {k} of {len(runs)}: {scheme} {objective} seed {seed}')
            curve = losses(out)
        curves.setdefault((objective, scheme), []).append(curve)
        print(f'{objective} {scheme} seed {seed}: {curve[-1][1]:.4f}{where}', flush=True)
        rows += [(objective, scheme, seed, step, f'{loss:g}') for step, loss in curve]
        if keep or k == len(runs):
            merge_table(path, ('objective', 'scheme', 'seed', 'step', 'val_loss'), rows, 3, command, fits)

    print_losses(curves)
    if args.against:
        print_differences(curves, args.against)
    if args.levels:
        print_levels(curves, args.levels)
    save(draw(curves, args.name), path)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
