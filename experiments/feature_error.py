"""
How far attention by random features is from the softmax, over the norm of queries and keys and the number of features.

    python experiments/feature_error.py --quick    # 10 draws, seconds
    python experiments/feature_error.py            # 100 draws

Answers Figure 1b of Luo et al. 2021: L1 distance between a row of attention and its estimate, 1,024 keys of 64
channels, queries and keys of norm R (1 after normalization). Theorem 3 asks for m that grows like exp(4 R^2).
Writes experiments/results/feature_error.csv and .png (with --quick in out/quick).
"""
import statistics

import torch
import torch.nn.functional as F
from lib import Parser, line_panels, print_table, save, table_path, write_csv

from model_kernelized import Attention, Config, features

KINDS = ('prf', 'orf', 'sphere', 'trf')
NORMS = (1, 2, 4, 8)
SIZES = (4, 16, 64, 256, 1024)
HEADER = 'features', 'norm', 'm', 'l1_mean', 'l1_std'
PAPER = {1: (.51, .33, .20, .09, .05), 2: (1.19, .99, 1.26, .49, .39),  # read off the figure, for each of SIZES
         4: (1.78, 1.82, 1.72, 1.62, 1.62), 8: (2.0, 2.0, 1.97, 2.0, 2.0)}


def error(norm, m, kind, seed):
    """L1 distance of one query's attention over 1,024 keys."""
    torch.manual_seed(seed)
    q = F.normalize(torch.randn(1, 64, dtype=torch.float64), dim=1) * norm
    k = F.normalize(torch.randn(1024, 64, dtype=torch.float64), dim=1) * norm
    w = Attention(Config(n_embd=64, n_head=1, n_features=m, feature_map=kind)).w.double()  # (m, 64)
    a = features(q, w, kind) @ features(k, w, kind).T  # (1, 1024)
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


def means(rows):
    """Rows of the CSV -> {(features, norm, m): mean error}."""
    return {(row[0], int(row[1]), int(row[2])): float(row[3]) for row in rows}


def error_table(found):
    """Ours / the value read off the paper's figure."""
    rows = [(str(R), *(f'{found["prf", R, m]:.2f} / {paper:.2f}' for m, paper in zip(SIZES, PAPER[R])))
            for R in NORMS]
    return ('norm R', *(f'm = {m}' for m in SIZES)), rows


def draw(found):
    norms = {f'R = {R}': (SIZES, [found['prf', R, m] for m in SIZES]) for R in NORMS}
    norms |= {f'R = {R}, the paper': (SIZES, PAPER[R]) for R in NORMS}
    kinds = {kind: (SIZES, [found[kind, 1, m] for m in SIZES]) for kind in KINDS}
    return line_panels({'positive random features, norm R': norms, 'feature maps at R = 1': kinds}, 'm (features)',
                       'L1 distance from the softmax (largest: 2)', 'o-', xscale='log', yscale='log')


def main():
    parser = Parser(__doc__, '10 draws')
    parser.add('--draws', 100, 10, 'of queries, keys and features')
    args = parser.parse_args()
    rows = measure(args.draws)
    path = table_path(args, 'feature_error')
    write_csv(path, HEADER, rows)
    print_table(error_table(means(rows)))
    save(draw(means(rows)), path)


if __name__ == '__main__':
    main()
