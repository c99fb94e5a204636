"""
Which learning rate suits each position scheme, and is one rate fair to all?

    python experiments/learning_rate.py --quick     # a few minutes: does it run?
    python experiments/learning_rate.py --jobs 2    # two runs at a time, one thread each
    python experiments/learning_rate.py --jobs 2 --datasets enwik8 --steps 2000

Each run is train.py with the tiny preset in its own folder in out/learning_rate/. What is finished there, or is in the
table, is not trained again, so that an interrupted sweep continues.
Below the schemes of a data set stand their mean and the largest distance of any of them from its own best loss.
Writes experiments/results/learning_rate.csv after each run, and .png.
"""
import itertools
import statistics
from pathlib import Path

from lib import (
    QUICK, SCHEMES, Parser, line_panels, losses, merge_csv, number, positive, print_table, rate, read_csv, read_schemes,
    save, table_path, train_all)

HEADER = 'dataset', 'objective', 'steps', 'scheme', 'learning_rate', 'loss'


def loss_table(rows):
    """Rows of the CSV -> losses by objective and rate. Mean and distance: of schemes that have all rates measured."""
    columns = sorted({(row[1], row[4]) for row in rows})
    table = []
    for setting in dict.fromkeys((row[0], row[2]) for row in rows):
        found = {}
        for dataset, objective, steps, scheme, value, loss in rows:
            if (dataset, steps) == setting:
                found.setdefault(scheme, {})[objective, value] = loss
        mean, distance = {}, {}
        for column in columns:
            rates = {key for losses in found.values() for key in losses if key[0] == column[0]}
            complete = [losses for losses in found.values() if rates <= losses.keys()]
            if column in rates and complete:
                best = [min(losses[key] for key in rates) for losses in complete]
                mean[column] = statistics.mean(losses[column] for losses in complete)
                distance[column] = max(losses[column] - lowest for losses, lowest in zip(complete, best))
        for scheme, losses in [*found.items(), ('mean', mean), ('largest distance', distance)]:
            cells = [f'{losses[column]:.4f}' if column in losses else '-' for column in columns]
            table.append((setting[0], f'{setting[1]:,}', scheme, *cells))
    return ('data set', 'steps', 'scheme', *(f'{objective}, {value:g}' for objective, value in columns)), table


def draw(rows):
    panels = {}
    for dataset, objective, steps, scheme, value, loss in sorted(rows):
        x, y = panels.setdefault(f'{dataset}, {objective}, {steps:,} steps', {}).setdefault(scheme, ([], []))
        x.append(value)
        y.append(loss)
    return line_panels(panels, 'learning rate', 'last validation loss (nats per token)', 'o-', xscale='log')


def main():
    parser = Parser(__doc__, 'half the width, half the layers, 60 steps, two rates')
    parser.add('--rates', [3e-3, 6e-3, 1.2e-2], [3e-3, 6e-3], type=rate, nargs='+')
    parser.add('--schemes', 'nope rope alibi composite conv-output nprf+rpe'.split(), nargs='+', metavar='SCHEME',
               note="of compare.py, or 'name: flags of train.py'")
    parser.add('--objectives', ['causal', 'masked'], choices=('causal', 'masked'), nargs='+')
    parser.add('--datasets', ['shakespeare'], nargs='+')
    parser.add('--steps', 1000, 60)
    parser.add_argument('--jobs', type=positive, default=2, help='runs at a time (default 2)')
    parser.add_data()
    args = parser.parse_args()
    args.schemes = read_schemes(args.schemes)
    path = table_path(args, 'learning_rate')
    rows = [tuple(map(number, row.values())) for row in read_csv(path)]
    runs, keys = [], []
    settings = itertools.product(args.datasets, args.objectives, args.schemes, args.rates)
    for dataset, objective, scheme, value in settings:
        key = dataset, objective, args.steps, scheme, value
        if scheme in SCHEMES and any(row[:5] == key for row in rows):
            continue
        name = f'{dataset}-{objective}-{scheme}-{value:g}-{args.steps}' + ('-quick' if args.quick else '')
        words = [*(QUICK if args.quick else []), '--dataset', dataset, '--objective', objective, '--data_dir',
                 args.data_dir, '--max_iters', str(args.steps), '--learning_rate', str(value), *args.schemes[scheme]]
        runs.append((f'{dataset} {objective} {scheme} {value:g}', Path('out', 'learning_rate', name), words))
        keys.append(key)
    for n in train_all(runs, args.jobs):
        loss = losses(runs[n][1])[-1][1]
        print(f'{runs[n][0]}: {loss:.4f}', flush=True)
        merge_csv(path, HEADER, [(*keys[n], f'{loss:g}')], 5)
    rows = [tuple(map(number, row.values())) for row in read_csv(path)]
    print_table(loss_table(rows))
    save(draw(rows), path)


if __name__ == '__main__':
    main()
