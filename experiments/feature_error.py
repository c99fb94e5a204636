"""
How far attention by positive random features is from the softmax, over the norm of queries and keys and the number of
features.

    python experiments/feature_error.py --quick    # 10 draws, seconds
    python experiments/feature_error.py            # 100 draws

Answers Figure 1b of Luo et al. 2021: L1 distance between a row of attention and its estimate, 1,024 keys of 64
channels, queries and keys of norm R. At R = 1 (what --normalize makes of them) the error falls with m as 1/sqrt(m);
from R = 4 on no number of features here is enough: Theorem 3 asks for m that grows like exp(4 R^2). The largest
possible distance is 2.
Writes experiments/results/feature_error.csv and .png (with --quick out/quick/feature_error-quick).
"""
import argparse
import statistics

import torch
import torch.nn.functional as F
from lib import common_flags, parse, positive, pyplot, save, write_csv

from model_kernelized import features, random_matrix

KINDS = ('prf', 'orf', 'sphere', 'trf')
NORMS = (1, 2, 4, 8)
SIZES = (4, 16, 64, 256, 1024)
PAPER = {1: (.51, .33, .20, .09, .05), 2: (1.19, .99, 1.26, .49, .39),  # read off the figure, for each of SIZES
         4: (1.78, 1.82, 1.72, 1.62, 1.62), 8: (2.0, 2.0, 1.97, 2.0, 2.0)}


def error(norm, m, kind, seed):
    """L1 distance of one query's attention over 1,024 keys."""
    torch.manual_seed(seed)
    q = F.normalize(torch.randn(1, 64, dtype=torch.float64), dim=1) * norm
    k = F.normalize(torch.randn(1024, 64, dtype=torch.float64), dim=1) * norm
    w = random_matrix(m, 64, kind).double()
    a = features(q, w, kind, stable=True) @ features(k, w, kind).T  # (1, 1024)
    return (a / a.sum(1, keepdim=True) - (q @ k.T).softmax(1)).abs().sum().item()


def measure(draws):
    """Rows (features, norm, m, mean, standard deviation over the draws)."""
    rows = []
    for kind in KINDS:
        for R in NORMS:
            for m in SIZES:
                errors = [error(R, m, kind, seed) for seed in range(draws)]
                spread = statistics.stdev(errors) if draws > 1 else 0.0
                rows.append((kind, R, m, statistics.mean(errors), spread))
    return rows


def print_table(found, draws):
    print(f'L1 error, mean of {draws} draws / read off the paper\n')
    print('| norm R | ' + ' | '.join(f'm = {m}' for m in SIZES) + ' |\n|' + '---|' * 6)
    for R in NORMS:
        cells = [f'{found["prf", R, m]:.2f} / {paper:.2f}' for m, paper in zip(SIZES, PAPER[R])]
        print(f'| {R} | {" | ".join(cells)} |')


def draw(found):
    fig, axes = pyplot().subplots(1, 2, figsize=(10, 4.6), sharey=True, layout='constrained')
    for i, R in enumerate(NORMS):
        axes[0].plot(SIZES, [found['prf', R, m] for m in SIZES], 'o-', color=f'C{i}', label=f'R = {R}')
        axes[0].plot(SIZES, PAPER[R], 'x', color=f'C{i}', label='the paper' if i == 3 else None)
    for i, kind in enumerate(KINDS):
        axes[1].plot(SIZES, [found[kind, 1, m] for m in SIZES], 'o-', color=f'C{4 + i}', label=kind)
    axes[1].plot(SIZES, [found['prf', 1, 4] * (4 / m) ** 0.5 for m in SIZES], 'k--', lw=1, label='1/sqrt(m)')
    for ax, title in zip(axes, ('positive random features, norm R', 'feature maps at R = 1')):
        ax.axhline(2, color='gray', lw=1, ls=':')
        ax.set(title=title, xscale='log', yscale='log', xlabel='m (features)',
               ylabel='L1 distance from the softmax (largest: 2)')
        ax.set_xticks(SIZES, SIZES)
        ax.grid(alpha=0.3)
        ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.16), ncols=5, fontsize=8)  # below the panel
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--draws', type=positive, default=100, help='of queries, keys and features (default 100)')
    common_flags(parser, '10 draws', dataset=False)
    args = parse(parser)
    if args.quick:
        args.draws = 10
    return args


def main():
    args = arguments()
    rows = measure(args.draws)
    name = 'feature_error-quick' if args.quick else 'feature_error'
    path = write_csv(args.results, name, ('features', 'norm', 'm', 'l1_mean', 'l1_std'), rows)
    found = {(kind, R, m): mean for kind, R, m, mean, _ in rows}
    print_table(found, args.draws)
    save(draw(found), path)


if __name__ == '__main__':
    main()
