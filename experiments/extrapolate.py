"""
Loss at 1, 2, 4 and 8 times the length of training, for any checkpoints.

    python experiments/extrapolate.py out/compare/python-causal-*    # what compare.py has trained: one line per scheme, all its seeds
    python experiments/extrapolate.py out/composite-causal-python out/nope-causal-python --quick

None of the three papers shows it for all schemes. The same tokens are predicted at every length: the last block_size tokens of texts of 8 times
block_size, with 0, 1, 3 or 7 times block_size tokens fed before them (so that at 1x the first of them have little to go by). A scheme that carries on gains from the longer context or stays level;
learned absolute positions end at block_size and cannot answer at all.
Writes experiments/results/extrapolate.csv and .png.
"""
import argparse
import statistics
from pathlib import Path

import torch
from compare import COLORS
from lib import common_flags, positive, pyplot, save, short_names, text, write_csv

from sample import die, load_run

TIMES = (1, 2, 4, 8)


@torch.no_grad()
def losses(model, ids, texts, device):
    """{times: mean loss in nats per token}; NaN where the scheme has no such positions."""
    T, found = model.config.block_size, {}
    starts = range(0, (len(ids) - 1) // (8 * T) * 8 * T, 8 * T)[:texts]
    for times in TIMES:
        if model.config.absolute and times > 1:  # they end at block_size
            found[times] = float('nan')
            continue
        total = 0.0
        for s in starts:
            x = torch.tensor(ids[s + (8 - times) * T:s + 8 * T + 1].astype('int64'), device=device)[None]  # (1, times T + 1)
            targets = x[:, 1:].clone()
            targets[:, :-T] = -1
            total += model(x[:, :-1], targets)[1].item()
        found[times] = total / len(starts)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out_dirs', nargs='+', help='folders of causal runs; those of compare.py that differ in the seed alone are one scheme')
    parser.add_argument('--texts', type=positive, default=100, help='of 8 times block_size tokens (default 100)')
    parser.add_argument('--data_dir', default='data', help='default data')
    common_flags(parser, '8 texts', dataset=False)
    args = parser.parse_args()
    device, rows = 'cuda' if torch.cuda.is_available() else 'cpu', []
    for name, out in zip(short_names(args.out_dirs), args.out_dirs):
        model, checkpoint = load_run(out, None, device)
        if not model.config.causal:
            die(f'{out} is a masked model; the loss at longer lengths is asked of causal ones')
        _, val, _ = text(checkpoint['settings']['dataset'], args.data_dir)
        seed = checkpoint['settings']['seed']
        if Path(out).resolve().parent.name == 'compare':
            name = name.removesuffix(f'-{seed}')
        if len(val) <= 8 * model.config.block_size:
            die(f'the validation text of {out} is shorter than 8 times block_size')
        rows += [(name, seed, times, model.config.block_size, loss)
                 for times, loss in losses(model, val, 8 if args.quick else args.texts, device).items()]
        print(f'{name} seed {seed}: ' + ', '.join(f'{times}x {loss:.4f}' for _, _, times, _, loss in rows[-len(TIMES):]), flush=True)
    path = write_csv(args.results, 'extrapolate' + '-quick' * args.quick, ('scheme', 'seed', 'times', 'block_size', 'loss'), rows)

    table = {}
    for name, _, times, _, loss in rows:
        table.setdefault(name, {}).setdefault(times, []).append(loss)
    order = sorted(table, key=lambda name: list(COLORS).index(name) if name in COLORS else 99)
    print('\n| scheme | ' + ' | '.join(f'{times}x' for times in TIMES) + ' | 8x less 1x |\n|' + '---|' * 6)
    for name in order:
        mean = {times: statistics.mean(x) for times, x in table[name].items()}
        print(f'| {name} | ' + ' | '.join(f'{mean[times]:.4f}' if mean[times] == mean[times] else '-' for times in TIMES) +
              (f' | {mean[8] - mean[1]:+.4f} |' if mean[8] == mean[8] else ' | ends at 1x |'))
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for i, name in enumerate(order):
        ax.plot(TIMES, [statistics.mean(table[name][times]) for times in TIMES], 'o-', ms=4, color=COLORS.get(name, f'C{i}'), label=name)
    ax.axvline(1, color='gray', ls=':', lw=1)
    ax.set(xscale='log', xlabel='length of the text, in lengths of training', ylabel='loss on the same last block_size tokens (nats per token)')
    ax.set_xticks(TIMES, [f'{t}x' for t in TIMES])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, ncols=2)
    save(fig, path)


if __name__ == '__main__':
    main()
