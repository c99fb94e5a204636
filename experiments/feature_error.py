"""
How far attention by positive random features is from the softmax, over the norm of queries and keys and the number of features.

    python experiments/feature_error.py --quick    # 10 draws, seconds
    python experiments/feature_error.py            # 100 draws

Answers Figure 1b of Luo et al. 2021: L1 distance between a row of attention and its estimate, 1,024 keys of 64 channels, queries and keys
of norm R. At R = 1 (what --normalize makes of them) the error falls with m as 1/sqrt(m), from R = 4 on no number of features helps:
Theorem 3 asks for m that grows like exp(4 R^2). Largest possible distance: 2.
Writes experiments/results/feature_error.csv and .png.
"""
import argparse
import statistics

import torch
import torch.nn.functional as F
from lib import common_flags, positive, pyplot, save, write_csv

from model_kernelized import features, random_matrix

NORMS, SIZES = (1, 2, 4, 8), (4, 16, 64, 256, 1024)
PAPER = {1: (.51, .33, .20, .09, .05), 2: (1.19, .99, 1.26, .49, .39), 4: (1.78, 1.82, 1.72, 1.62, 1.62), 8: (2.0, 2.0, 1.97, 2.0, 2.0)}  # read off the figure


def error(norm, m, kind, seed):
    """L1 distance of one query's attention over 1,024 keys."""
    torch.manual_seed(seed)
    q, k = (F.normalize(torch.randn(n, 64, dtype=torch.float64), dim=1) * norm for n in (1, 1024))
    w = random_matrix(m, 64, kind).double()
    a = features(q, w, kind, stable=True) @ features(k, w, kind).T
    return (a / a.sum(1, keepdim=True) - (q @ k.T).softmax(1)).abs().sum().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--draws', type=positive, default=100, help='of queries, keys and features (default 100)')
    common_flags(parser, '10 draws', dataset=False)
    args = parser.parse_args()
    draws = 10 if args.quick else args.draws
    rows = [(kind, R, m, statistics.mean(e), statistics.stdev(e) if draws > 1 else 0.0) for kind in ('prf', 'orf', 'sphere', 'trf') for R in NORMS for m in SIZES
            for e in [[error(R, m, kind, seed) for seed in range(draws)]]]
    path = write_csv(args.results, 'feature_error' + '-quick' * args.quick, ('features', 'norm', 'm', 'l1_mean', 'l1_std'), rows)

    found = {(kind, R, m): mean for kind, R, m, mean, _ in rows}
    print(f'L1 error, mean of {draws} draws / read off the paper\n\n| norm R | ' + ' | '.join(f'm = {m}' for m in SIZES) + ' |\n|' + '---|' * 6)
    for R in NORMS:
        print(f'| {R} | ' + ' | '.join(f'{found["prf", R, m]:.2f} / {paper:.2f}' for m, paper in zip(SIZES, PAPER[R])) + ' |')
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout='constrained')
    for i, R in enumerate(NORMS):
        axes[0].plot(SIZES, [found['prf', R, m] for m in SIZES], 'o-', color=f'C{i}', label=f'R = {R}')
        axes[0].plot(SIZES, PAPER[R], 'x', color=f'C{i}', label='the paper' if i == 3 else None)
    for i, kind in enumerate(('prf', 'orf', 'sphere', 'trf')):
        axes[1].plot(SIZES, [found[kind, 1, m] for m in SIZES], 'o-', color=f'C{4 + i}', label=kind)
    axes[1].plot(SIZES, [found['prf', 1, 4] * (4 / m) ** 0.5 for m in SIZES], 'k--', lw=1, label='1/sqrt(m)')
    for ax, title in zip(axes, ('positive random features, norm R', 'feature maps at R = 1')):
        ax.axhline(2, color='gray', lw=1, ls=':')
        ax.set(title=title, xscale='log', yscale='log', xlabel='m (features)', ylabel='L1 distance from the softmax (largest: 2)')
        ax.set_xticks(SIZES, SIZES)
        ax.grid(alpha=0.3)
        ax.legend()
    save(fig, path)


if __name__ == '__main__':
    main()
