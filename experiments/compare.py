"""
Train several position schemes at equal budget, with several seeds, and compare their validation losses.

    python experiments/compare.py --quick                    # a few minutes on two CPU cores: does it run?
    python experiments/compare.py --schemes nope composite   # the tiny preset, two seeds
    python experiments/compare.py --schemes nope 'mine: --model mine'    # a scheme of your own: its name and flags
    python experiments/compare.py --name enwik8-8000 --dataset enwik8 --jobs 2 --train --max_iters 8000

The question of Tables 1 to 3 of Chang et al. 2021 (no positions, absolute, fixed, dynamic, composite, convolutions) and
of the WikiText-103 table of Luo et al. 2021 (nprf+rpe and the schemes below it), answered by the validation loss.
Everything after --train goes to train.py. All runs of one --name have the same settings.
Runs stay in out/compare/. What is finished there, or is in the table, is not trained again, so that an interrupted
command continues; schemes of your own are looked up in out/compare/ only. --jobs 2 trains two runs at a time.
Writes experiments/results/compare-<name>-<objective>.csv after each run, and .png. The first line of the CSV is the
data set and the flags of train.py. Rows of other schemes stay in it.
"""
import shlex
import statistics
from pathlib import Path

from lib import (
    QUICK, SCHEMES, Parser, check_comment, check_name, in_order, line_panels, losses, merge_csv, positive, print_table,
    read_csv, read_schemes, refuse_flags, save, train_all)

HEADER = 'objective', 'scheme', 'seed', 'step', 'val_loss'
MAIN = 'nope absolute rope alibi fixed dynamic composite conv-output nprf+rpe'.split()
OURS = 'objective dataset seed out_dir resume overwrite'.split()  # flags of train.py that are set here


def read_curves(path):
    """{(objective, scheme): {seed: [(step, loss)]}} of a table of this script."""
    found = {}
    for row in read_csv(path):
        seeds = found.setdefault((row['objective'], row['scheme']), {})
        seeds.setdefault(int(row['seed']), []).append((int(row['step']), float(row['val_loss'])))
    return found


def losses_table(curves):
    """curves {(objective, scheme): {seed: [(step, loss)]}} -> mean and standard deviation of the last losses."""
    rows = []
    for (objective, scheme), seeds in curves.items():
        final = [curve[-1][1] for curve in seeds.values()]
        spread = f'{statistics.stdev(final):.4f}' if len(final) > 1 else '-'
        rows.append((objective, scheme, f'{statistics.mean(final):.4f}', str(len(final)), spread))
    return ('objective', 'scheme', 'validation loss, nats per token', 'seeds', 'standard deviation'), rows


def levels_table(curves, levels):
    """The first validation of each seed with a loss below each level (a dash: none), and its last loss."""
    rows = []
    for (objective, scheme), seeds in curves.items():
        cells = []
        for level in levels:
            steps = [next((f'{step:,}' for step, loss in curve if loss < level), '-') for curve in seeds.values()]
            cells.append(' / '.join(steps))
        cells.append(' / '.join(f'{curve[-1][1]:.4f}' for curve in seeds.values()))
        rows.append((objective, scheme, *cells))
    return ('objective', 'scheme', *(f'below {level:g}' for level in levels), 'at the end'), rows


def draw(curves, title):
    """The mean over the seeds at each validation after step 0."""
    lines = {}
    for (_, scheme), seeds in curves.items():
        steps = [step for step, _ in next(iter(seeds.values()))][1:]
        means = [statistics.mean(losses) for losses in zip(*([loss for _, loss in c[1:]] for c in seeds.values()))]
        lines[scheme] = steps, means
    return line_panels({title: lines}, 'step', 'validation loss, mean over seeds (nats per token)', '-', xscale='log')


def compare(objective, args):
    """Train what the table does not have, print the tables, draw."""
    path = args.results / f'compare-{args.name}-{objective}.csv'
    settings = shlex.join(['--dataset', args.dataset, *args.train])
    check_comment(path, settings)
    curves = {key: seeds for key, seeds in read_curves(path).items() if key[1] in SCHEMES}
    runs, keys = [], []
    for scheme, flags in args.schemes.items():
        for seed in range(1, 1 + args.seeds):
            if seed in curves.get((objective, scheme), ()):
                continue
            out = Path('out', 'compare', f'{args.name}-{objective}-{scheme}-{seed}')
            words = ['--objective', objective, '--dataset', args.dataset, '--seed', str(seed), *args.train, *flags]
            runs.append((f'{objective} {scheme} seed {seed}', out, words))
            keys.append((scheme, seed))
    for n in train_all(runs, args.jobs):
        scheme, seed = keys[n]
        curve = losses(runs[n][1])
        print(f'{runs[n][0]}: {curve[-1][1]:.4f}', flush=True)
        curves.setdefault((objective, scheme), {})[seed] = curve
        merge_csv(path, HEADER, [(objective, scheme, seed, step, f'{loss:g}') for step, loss in curve], 3, settings)
    asked = {}
    for scheme in in_order(args.schemes):
        asked[objective, scheme] = dict(sorted(curves[objective, scheme].items()))
    print_table(losses_table(asked))
    if args.levels:
        print_table(levels_table(asked, args.levels))
    save(draw(asked, f'{args.name}: {objective} language models'), path)


def main():
    parser = Parser(__doc__, 'a much smaller setting: one seed, 60 steps')
    parser.add_argument('--schemes', nargs='+', default=MAIN, metavar='SCHEME',
                        help=f"of {', '.join(SCHEMES)} (default {' '.join(MAIN)}), or 'name: flags of train.py'")
    parser.add_argument('--objectives', nargs='+', choices=('causal', 'masked'), default=['causal', 'masked'],
                        help='default: both')
    parser.add('--seeds', 2, 1, 'seeds 1, 2, ...')
    parser.add_argument('--levels', type=float, nargs='+', metavar='LOSS',
                        help='also print the step at which each run is first below these losses')
    parser.add('--dataset', 'shakespeare', note='a data set of prepare_data.py')
    parser.add_argument('--name', help='of this setting, for folders and files (default: the data set)')
    parser.add_argument('--jobs', type=positive, default=1, help='runs at a time (default 1)')
    parser.add_argument('--train', nargs='...', default=[], help='everything after it goes to train.py')
    args = parser.parse_args()
    args.schemes = read_schemes(args.schemes)
    for name, flags in args.schemes.items():
        refuse_flags(flags, OURS, f'--schemes: {name!r}')
    refuse_flags(args.train, OURS, '--train')
    args.name = (args.name or args.dataset) + ('-quick' if args.quick else '')
    check_name('--name', args.name)
    if args.quick:
        args.train = [*QUICK, *args.train]
    for objective in args.objectives:
        compare(objective, args)


if __name__ == '__main__':
    main()
