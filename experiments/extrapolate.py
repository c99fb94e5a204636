"""
Loss at 1, 2, 4 and 8 times the length of training, for any checkpoints.

    python experiments/extrapolate.py --name python    # the causal runs of compare.py: one line per scheme
    python experiments/extrapolate.py out/composite-causal-python out/nope-causal-python --quick

None of the three papers shows it for all schemes. The same tokens are predicted at every length: the last block_size
tokens of texts of 8 times block_size, with 0, 1, 3 or 7 times block_size tokens before them (so at 1x the first of them
have little context). A scheme that extrapolates gains from the longer context or stays level; learned absolute
positions end at block_size and have no value for longer texts.
Writes experiments/results/extrapolate[-<name>].csv and .png (with --quick out/quick/extrapolate[-<name>]-quick).
"""
import argparse
import math
import statistics
from pathlib import Path

import torch
from compare import colors, in_order
from curves import label_ends
from lib import common_flags, merge_table, parse, positive, pyplot, runs_of, save, short_names, text, write_csv

from common import die
from sample import load_run

TIMES = (1, 2, 4, 8)


@torch.no_grad()
def losses(model, ids, texts, device):
    """{times: mean loss in nats per token}; NaN where the scheme has no such positions."""
    T = model.config.block_size
    starts = range(0, (len(ids) - 1) // (8 * T) * 8 * T, 8 * T)[:texts]
    found = {}
    for times in TIMES:
        if model.config.absolute and times > 1:  # they end at block_size
            found[times] = math.nan
            continue
        total = 0.0
        for s in starts:
            words = ids[s + (8 - times) * T:s + 8 * T + 1].astype('int64')
            x = torch.tensor(words, device=device)[None]  # (1, times T + 1)
            targets = x[:, 1:].clone()
            targets[:, :-T] = -1
            total += model(x[:, :-1], targets)[1].item()
        found[times] = total / len(starts)
    return found


def measure(name, out, texts, data_dir, device):
    """Rows (scheme, seed, times, block_size, loss) of one run."""
    model, checkpoint = load_run(out, None, device)
    T = model.config.block_size
    if not model.config.causal:
        die(f'{out} is a masked model; only causal models have a loss at longer lengths')
    _, val, _ = text(checkpoint['settings']['dataset'], data_dir)
    if len(val) <= 8 * T:
        die(f'the validation text of {out} is shorter than 8 times block_size')
    seed = checkpoint['settings']['seed']
    if Path(out).resolve().parent.name == 'compare':  # all seeds of a scheme are one line
        name = name.removesuffix(f'-{seed}')
    found = losses(model, val, texts, device)
    print(f'{name} seed {seed}: ' + ', '.join(f'{times}x {loss:.4f}' for times, loss in found.items()), flush=True)
    return [(name, seed, times, T, loss) for times, loss in found.items()]


def means(rows):
    """Rows -> {scheme: [mean loss over the seeds at each of TIMES]}, schemes in their usual order."""
    table = {}
    for scheme in in_order(list(dict.fromkeys(row[0] for row in rows))):
        table[scheme] = [statistics.mean(row[4] for row in rows if row[:1] + row[2:3] == (scheme, times))
                         for times in TIMES]
    return table


def print_table(table):
    print('\n| scheme | ' + ' | '.join(f'{times}x' for times in TIMES) + ' | 8x less 1x |\n|' + '---|' * 6)
    for scheme, mean in table.items():
        cells = ['-' if math.isnan(loss) else f'{loss:.4f}' for loss in mean]
        change = 'ends at 1x' if math.isnan(mean[-1]) else f'{mean[-1] - mean[0]:+.4f}'
        print(f'| {scheme} | {" | ".join(cells)} | {change} |')


def draw(table):
    fig, ax = pyplot().subplots(figsize=(7, 4.5), layout='constrained')
    color = colors(table)
    ends = []
    for scheme, mean in table.items():
        ax.plot(TIMES, mean, 'o-', ms=4, color=color[scheme])
        if math.isnan(mean[-1]):
            ax.annotate(scheme, (1, mean[0]), (4, 8), textcoords='offset points', fontsize=8, color=color[scheme])
        else:
            ends.append((mean[-1], TIMES[-1], scheme, color[scheme]))
    ax.axvline(1, color='gray', ls=':', lw=1)
    ax.set(xscale='log', xlabel='length of the text, in lengths of training',
           ylabel='loss on the same last block_size tokens (nats per token)')
    ax.set_xticks(TIMES, [f'{t}x' for t in TIMES])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    label_ends(ax, ends)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out_dirs', nargs='*',
                        help='folders of causal runs; those of compare.py that differ only in the seed are one scheme')
    parser.add_argument('--texts', type=positive, default=100, help='of 8 times block_size tokens (default 100)')
    parser.add_argument('--data_dir', default='data', help='default data')
    common_flags(parser, '8 texts', dataset=False, name=True)
    args = parse(parser)
    if bool(args.name) == bool(args.out_dirs):
        parser.error('give folders of runs, or --name')
    args.out_dirs = args.out_dirs or runs_of(args.name)
    if args.quick:
        args.texts = 8
    return args


def main():
    args = arguments()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = []
    for name, out in zip(short_names(args.out_dirs), args.out_dirs):
        rows += measure(name, out, args.texts, args.data_dir, device)
    parts = ['extrapolate', args.name, 'quick' if args.quick else '']
    path = Path(args.results, '-'.join(part for part in parts if part) + '.csv')
    header = 'scheme', 'seed', 'times', 'block_size', 'loss'
    if args.name:
        rows = merge_table(path, header, rows, 2, f'texts: {args.texts}')
    else:
        write_csv(path.parent, path.stem, header, rows)
    table = means(rows)
    print_table(table)
    save(draw(table), path)


if __name__ == '__main__':
    main()
