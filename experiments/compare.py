"""
Train several position schemes at equal budget, with several seeds, and compare their validation losses.

    python experiments/compare.py --quick                             # a few minutes on two CPU cores: does it run?
    python experiments/compare.py --schemes none composite            # the README's table: tiny preset, three seeds
    python experiments/compare.py --train --preset small --device cuda   # everything after --train goes to train.py

The question of Chang et al. 2021, Tables 1 to 3 (masked: none, absolute, fixed, dynamic, composite, convolutions), asked of the
loss itself, and with the last six that of the WikiText-103 table of Luo et al. 2021: softmax with a fixed kernel of 257 offsets (what their table
lacks); with absolute positions elu + 1, plain positive features (prf), normalised ones (nprf) and normalised trigonometric
ones (trf: RFA); and the paper's, nprf with relative positions of the same 257 offsets.
Runs stay in out/compare/ and are not trained twice: an interrupted comparison goes on where it stopped.
Writes experiments/results/compare-<dataset>[-<flags of train.py>][-<objective, if only one>].csv and .png.
"""
import argparse
import csv
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from lib import REPO, positive, pyplot

SCHEMES = {  # name: flags of train.py
    'none': ['--model', 'nope'],
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
}
COLORS = {scheme: f'C{i}' if i < 10 else f'#{hex}' for i, (scheme, hex) in enumerate(zip(SCHEMES, [''] * 10 + 'aec7e8 ffbb78 98df8a ff9896 c5b0d5 c49c94 e7cb94 8c6d31 000000'.split()))}
QUICK = '--max_iters 60 --n_layer 2 --n_embd 64 --batch_size 16 --warmup_iters 10 --eval_interval 20 --eval_tokens 16384'.split()


def losses(out):
    """[(step, validation loss)] of a run."""
    with open(out / 'log.csv', newline='', encoding='utf-8') as f:
        return [(int(r['step']), float(r['val_loss'])) for r in csv.DictReader(f) if r['val_loss']]


def p_value(differences):
    """Two-sided p of Student's t-test that paired differences (one per seed, two or more) have mean 0."""
    n, spread = len(differences) - 1, statistics.stdev(differences) or math.inf
    t = statistics.mean(differences) / spread * math.sqrt(n + 1)
    angles = np.linspace(0, math.atan(abs(t) / math.sqrt(n)), 10001)  # t = sqrt(n) tan(angle) makes the density cos^(n-1)
    inside = np.trapezoid(np.cos(angles) ** (n - 1), angles)
    return 1 - 2 * math.gamma((n + 1) / 2) / math.sqrt(math.pi) / math.gamma(n / 2) * inside


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--schemes', nargs='+', choices=list(SCHEMES), default=list(SCHEMES), help='default: all')
    parser.add_argument('--objectives', nargs='+', choices=('causal', 'masked'), default=['causal', 'masked'], help='default: both')
    parser.add_argument('--seeds', type=positive, default=3, help='seeds 1, 2, ... (default 3)')
    parser.add_argument('--against', choices=list(SCHEMES), help='also print what each scheme loses more than this one of --schemes, paired by seed, with p')
    parser.add_argument('--dataset', default='python', help='default python')
    parser.add_argument('--quick', action='store_true', help='a much smaller setting: one seed, 60 steps')
    parser.add_argument('--results', default=str(REPO / 'experiments' / 'results'), help='folder of the table and the picture')
    parser.add_argument('--train', nargs=argparse.REMAINDER, default=[], help='everything behind it goes to train.py')
    args = parser.parse_args()
    if args.against and (args.against not in args.schemes or args.quick or args.seeds < 2):
        parser.error('--against wants a scheme that is among --schemes, and two seeds or more')
    words = [*(QUICK if args.quick else []), *args.train]
    label = '-'.join([args.dataset, *(['quick'] if args.quick else []), *(w.strip('-').replace('/', '_') for w in args.train)])
    curves = {}
    for objective in args.objectives:
        for scheme in args.schemes:
            for seed in range(1, 1 + (1 if args.quick else args.seeds)):
                out = Path('out/compare', f'{label}-{objective}-{scheme}-{seed}')
                command = [sys.executable, REPO / 'train.py', *SCHEMES[scheme], '--objective', objective, '--dataset', args.dataset,
                           '--seed', seed, *words, '--out_dir', out, '--resume']
                if not (out / 'loss.png').exists():
                    done = subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL)
                    if done.returncode:
                        sys.exit(done.returncode)
                curves.setdefault((objective, scheme), []).append(losses(out))
                print(f'{objective} {scheme} seed {seed}: {curves[objective, scheme][-1][-1][1]:.4f}', flush=True)

    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    print(f'\n| objective | scheme | validation loss, nats per token | standard deviation over {len(curves[objective, scheme])} seeds |\n|---|---|---|---|')
    path = results / '-'.join(['compare', label, *(args.objectives if len(args.objectives) == 1 else [])])
    with open(f'{path}.csv', 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerow(('objective', 'scheme', 'seed', 'step', 'val_loss'))
        for (objective, scheme), runs in curves.items():
            final = [run[-1][1] for run in runs]
            spread = f'{statistics.stdev(final):.4f}' if len(final) > 1 else '-'
            print(f'| {objective} | {scheme} | {statistics.mean(final):.4f} | {spread} |')
            writer.writerows((objective, scheme, seed, step, loss) for seed, run in enumerate(runs, 1) for step, loss in run)
    if args.against:
        print(f'\n| objective | scheme | more than {args.against} | by seed | p |\n|---|---|---|---|---|')
        for (objective, scheme), runs in curves.items():
            if scheme != args.against:
                d = [run[-1][1] - base[-1][1] for run, base in zip(runs, curves[objective, args.against])]
                print(f'| {objective} | {scheme} | {statistics.mean(d):+.4f} | {", ".join(f"{x:+.4f}" for x in d)} | {p_value(d):.3f} |')
    plot(curves, args, f'{path}.png')


def plot(curves, args, path):
    """Above the mean loss over the seeds at each validation, below the last loss of each seed."""
    plt, n = pyplot(), len(args.schemes)
    fig, axes = plt.subplots(2, len(args.objectives), figsize=(5.5 * len(args.objectives), 4.5 + 0.25 * n), squeeze=False, height_ratios=(4, 0.5 + 0.25 * n), layout='constrained')
    for (above, below), objective in zip(axes.T, args.objectives):
        for row, scheme in enumerate(args.schemes):
            runs = curves[objective, scheme]
            steps, *seeds = [step for step, _ in runs[0]], *([loss for _, loss in run] for run in runs)
            above.plot(steps[1:], [statistics.mean(losses) for losses in zip(*seeds)][1:], color=COLORS[scheme], lw=1.5, label=scheme)
            below.plot([losses[-1] for losses in seeds], [row] * len(seeds), 'o', color=COLORS[scheme], ms=5, alpha=0.8)
        above.set(title=f'{objective} language model', xlabel='step', ylabel='validation loss, mean over seeds\n(nats per token)')
        if n <= 6:  # else the colours are named below alone
            above.legend(fontsize=7)
        below.set(xlabel='last validation loss, one dot per seed (nats per token)', yticks=range(n), yticklabels=args.schemes)
        below.invert_yaxis()
        for ax in (above, below):
            ax.grid(alpha=0.3)
    fig.suptitle(args.dataset)
    fig.savefig(path, dpi=120)
    print(f'\nwrote {path} and its .csv')


if __name__ == '__main__':
    main()
