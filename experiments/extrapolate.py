"""
Loss at 1, 2, 4 and 8 times the training length, for any causal runs.

    python experiments/extrapolate.py --name enwik8-8000    # the causal runs of compare.py: one line per scheme
    python experiments/extrapolate.py out/composite-causal-shakespeare out/nope-causal-shakespeare --quick

The same tokens are predicted at every length: the last block_size tokens of sequences of 8 block_size tokens, with 0,
1, 3 or 7 block_size tokens of context before them. Learned absolute positions end at block_size.
Writes experiments/results/extrapolate[-<name>].csv and .png (with --quick in out/quick).
"""
import math
import statistics
from pathlib import Path

import torch
from lib import (
    Parser, data_set, die, in_order, line_panels, merge_csv, print_table, runs_of, save, short_names, table_path)

from sample import load_run

TIMES = (1, 2, 4, 8)
HEADER = 'scheme', 'seed', 'times', 'block_size', 'loss'


@torch.no_grad()
def losses(model, ids, n, device):
    """{times: mean loss in nats per token} over n sequences; NaN where the scheme has no such positions."""
    T = model.config.block_size
    starts = range(0, (len(ids) - 1) // (8 * T) * 8 * T, 8 * T)[:n]
    found = {}
    for times in TIMES:
        if model.config.absolute and times > 1:
            found[times] = math.nan
            continue
        total = 0.0
        for s in starts:
            x = torch.tensor(ids[s + (8 - times) * T:s + 8 * T + 1].astype('int64'), device=device)[None]
            targets = x[:, 1:].clone()  # (1, times T)
            targets[:, :-T] = -1
            total += model(x[:, :-1], targets)[1].item()
        found[times] = total / len(starts)
    return found


def measure(name, out, args, device):
    """Rows of one run."""
    model, checkpoint = load_run(out, None, device)
    T = model.config.block_size
    if not model.config.causal:
        die(f'{out} is a masked model; only causal models have a loss at longer lengths')
    val = data_set(checkpoint['settings']['dataset'], args.data_dir)[1]
    if len(val) <= 8 * T:
        die(f'the validation tokens of {out} are fewer than 8 times block_size')
    seed = checkpoint['settings']['seed']
    if Path(out).resolve().parent.name == 'compare':  # all seeds of a scheme are one line
        name = name.removesuffix(f'-{seed}')
    found = losses(model, val, args.sequences, device)
    print(f'{name} seed {seed}: ' + ', '.join(f'{times}x {loss:.4f}' for times, loss in found.items()), flush=True)
    return [(name, seed, times, T, loss) for times, loss in found.items()]


def means(rows):
    """Rows -> {scheme: [mean loss over the seeds at each of TIMES]}."""
    found = {}
    for scheme in in_order([row[0] for row in rows]):
        found[scheme] = [statistics.mean(float(row[4]) for row in rows if (row[0], int(row[2])) == (scheme, times))
                         for times in TIMES]
    return found


def length_table(means):
    rows = []
    for scheme, mean in means.items():
        cells = ['-' if math.isnan(loss) else f'{loss:.4f}' for loss in mean]
        rows.append((scheme, *cells, 'ends at 1x' if math.isnan(mean[-1]) else f'{mean[-1] - mean[0]:+.4f}'))
    return ('scheme', *(f'{times}x' for times in TIMES), '8x - 1x'), rows


def draw(means):
    """A scheme that ends at 1x has a point there."""
    lines = {}
    for scheme, mean in means.items():
        n = TIMES.index(1) + 1 if math.isnan(mean[-1]) else len(TIMES)
        lines[scheme] = TIMES[:n], mean[:n]
    return line_panels({'': lines}, 'length of the sequence over the training length',
                       'loss on the same last block_size tokens (nats per token)', 'o-', xscale='log')


def main():
    parser = Parser(__doc__, '8 sequences')
    parser.add_argument('out_dirs', nargs='*', help='folders of causal runs; seeds of compare.py are one scheme')
    parser.add_argument('--name', help='all causal runs of this --name of compare.py; other rows stay in the table')
    parser.add('--sequences', 100, 8, 'of 8 block_size tokens')
    parser.add_data()
    args = parser.parse_args()
    if bool(args.name) == bool(args.out_dirs):
        parser.error('give folders of runs, or --name')
    out_dirs = args.out_dirs or runs_of(args.name)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = []
    for name, out in zip(short_names(out_dirs), out_dirs):
        rows += measure(name, out, args, device)
    path = table_path(args, 'extrapolate', args.name)
    if not args.name:
        path.unlink(missing_ok=True)
    rows = merge_csv(path, HEADER, rows, 2, f'sequences: {args.sequences}')
    print_table(length_table(means(rows)))
    save(draw(means(rows)), path)


if __name__ == '__main__':
    main()
