"""
How a model without positions counts: the attention output of each layer along one direction, over position.

    python experiments/counter.py out/nope-causal-python out/composite-causal-python

Chi et al. 2023: the causal mask leaves the position in the variance of the attention output. This shows what a
trained model makes of it. The direction is the mean output at the first position, from one half of the texts; all
outputs of the other half are projected onto it. If the coordinate moves steadily with the position and has most of
the squared length (the share; 1 / n_embd in a random direction), the layer holds a counter. Lines over log m and sqrt
m tell which of the two it follows. For causal models of any scheme.
Writes experiments/results/counter.csv and .png (with --quick in out/quick).
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from lib import common_flags, layer_calls, parse, positive, pyplot, save, short_names, text, write_csv

from common import die
from sample import load_run

HEADER = 'run', 'layer', 'm', 'coordinate', 'deviation', 'share'


@torch.no_grad()
def attention_outputs(model, idx, batch=50):
    """-> the attention output of each layer for the texts idx (N, T): a list of (N, T, C)."""
    found = [[y.float() for _, y in layer_calls(model, part)] for part in idx.split(batch)]
    return [torch.cat(parts) for parts in zip(*found)]


def along_first(y):
    """Outputs y (N, T, C) -> (3, T): coordinate along the mean at the first position, its deviation, its share.

    The direction is that of the first half of the texts, the rest is of the second half.
    """
    half = len(y) // 2
    first = y[:half, 0].mean(0)
    y = y[half:]
    along = y @ (first / first.norm())  # (N - half, T)
    share = along.square().sum(0) / y.square().sum((0, 2))
    return torch.stack((along.mean(0), along.std(0), share)).numpy()


def line(x, y):
    """Slope and R^2 of the line that fits best."""
    fit = np.polyfit(x, y, 1)
    return fit[0], 1 - np.var(y - np.polyval(fit, x)) / np.var(y)


def fits(coordinate):
    """Of the coordinate (T,) at m = 1, 2, 4, ...: its gain per doubling of m; R^2 of lines over log m and sqrt m."""
    octave = np.arange(len(coordinate).bit_length())
    seen = coordinate[2 ** octave - 1]
    slope, log_fit = line(octave, seen)
    return slope, log_fit, line(2 ** (octave / 2), seen)[1]


def measure(name, out, args):
    """Rows of one run, (run, layer, m, coordinate, deviation, share)."""
    model, checkpoint = load_run(out)
    if not model.config.causal:
        die(f'{out} is a masked model; only a causal mask tells the position')
    T = model.config.block_size
    val = text(checkpoint['settings']['dataset'], args.data_dir)[1]
    starts = np.linspace(0, len(val) - T, args.texts).astype(int)
    starts = np.random.default_rng(1).permutation(starts)  # both halves from all over the text
    idx = torch.from_numpy(np.stack([val[s:s + T] for s in starts]).astype(np.int64))
    rows = []
    for layer, y in enumerate(attention_outputs(model, idx), 1):
        found = along_first(y)  # (3, T)
        rows += [(name, layer, m, *map(float, values)) for m, values in enumerate(found.T, 1)]
    return rows


def print_table(curves):
    """curves {(run, layer): (T, 3)}"""
    at = [2 ** i for i in range(max(map(len, curves.values())).bit_length())]
    print('\n| run | layer | ' + ' | '.join(f'm={m}' for m in at)
          + ' | share at 1 | per doubling | R^2, log m | R^2, sqrt m |\n' + '|---' * (len(at) + 6) + '|')
    for (name, layer), curve in curves.items():
        slope, *fit = fits(curve[:, 0])
        cells = [f'{curve[m - 1, 0]:.1f}' if m <= len(curve) else '' for m in at]
        cells += [f'{curve[0, 2]:.2f}', f'{slope:+.1f}', *(f'{x:.2f}' for x in fit)]
        print(f'| {name} | {layer} | {" | ".join(cells)} |')


def draw(curves):
    runs = list(dict.fromkeys(name for name, _ in curves))
    fig, axes = pyplot().subplots(1, len(runs), figsize=(4.5 * len(runs), 4), squeeze=False, layout='constrained')
    for ax, name in zip(axes[0], runs):
        layers = [layer for run, layer in curves if run == name]
        for layer in layers:
            mean, deviation, _ = curves[name, layer].T
            m = np.arange(1, len(mean) + 1)
            color = pyplot().get_cmap('viridis')(0.9 * (layer - 1) / max(1, len(layers) - 1))
            ax.plot(m, mean, color=color, label=f'layer {layer}')
            ax.fill_between(m, mean - deviation, mean + deviation, color=color, alpha=0.2, lw=0)
        ax.set(title=name, xscale='log', xlabel='position m', ylabel='attention output along its mean at m = 1')
        ax.grid(alpha=0.3)
        ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.15), ncols=4, fontsize=8)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out_dirs', nargs='+', help='folders of causal runs')
    parser.add_argument('--texts', type=positive, help='of block_size tokens (default 200, 20 with --quick)')
    parser.add_argument('--data_dir', default='data', help='default data')
    common_flags(parser, 'fewer texts', dataset=False)
    args = parse(parser, {'texts': (200, 20)})
    if args.texts < 4:
        parser.error('--texts must be 4 or more: half of them give the direction')
    return args


def main():
    args = arguments()
    rows = []
    for name, out in zip(short_names(args.out_dirs), args.out_dirs):
        rows += measure(name, out, args)
    path = write_csv(Path(args.results), 'counter', HEADER, rows)
    curves = {}
    for name, layer, _, *values in rows:
        curves.setdefault((name, layer), []).append(values)
    curves = {key: np.array(values) for key, values in curves.items()}
    print_table(curves)
    save(draw(curves), path)


if __name__ == '__main__':
    main()
