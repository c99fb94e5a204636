"""
How a model without positions counts: the attention output of each layer along one direction, over position.

    python experiments/counter.py out/nope-causal-python out/composite-causal-python

Chi et al. 2023: the causal mask leaves the position in the variance of the attention output. This shows what a
trained model makes of it. The direction is the mean output at the first position, from one half of the texts; all
outputs of the other half are projected onto it. If the coordinate moves steadily with the position and has most of
the squared length (the share; 1 / n_embd in a random direction), the layer holds a counter. Lines over log m and sqrt
m tell which of the two it follows.

The second table tells what the coordinate is for: losses, in nats per token, of the other half of the texts when the
model runs with another coordinate.
  constant         its mean over all positions: the counter is gone
  position alone   its mean at each position: all else that it says is gone
  aside            the change that `constant` makes, along a random direction at right angles to it: what any change of
                   this size does
  far              nothing is changed; the second half of texts of 4 times the training length, as in the next two
  far alone        position alone
  squeezed         the means of positions 1 ... T spread evenly over 1 ... 4T: position m gets about that of m / 4
Half as many long texts, other ones, tell the means of `far alone`, and as many are measured. The last columns are the
coordinate itself: its 1 % quantile within the training length, and its means at 2T and 4T.
For causal models of any scheme. Writes experiments/results/counter.csv, counter-use.csv and counter.png (with --quick
in out/quick).
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lib import common_flags, layer_calls, parse, positive, pyplot, save, short_names, text, write_csv

from common import die
from sample import load_run

HEADER = 'run', 'layer', 'm', 'coordinate', 'deviation', 'share'
LOSSES = 'loss', 'constant', 'position_alone', 'aside', 'far', 'far_alone', 'squeezed'
USE = 'run', 'layer', *LOSSES, 'lowest', 'at_2T', 'at_4T'


@torch.no_grad()
def attention_outputs(model, idx, batch=50):
    """-> the attention output of each layer for the texts idx (N, T): a list of (N, T, C)."""
    found = [[y.float() for _, y in layer_calls(model, part)] for part in idx.split(batch)]
    return [torch.cat(parts) for parts in zip(*found)]


def at_first(y):
    """The direction (C,) of the mean output at the first position, for outputs y (N, T, C)."""
    return F.normalize(y[:, 0].mean(0), dim=0)


def along_first(y):
    """Outputs y (N, T, C) -> (3, T): coordinate along the mean at the first position, its deviation, its share.

    The direction is that of the first half of the texts, the rest is of the second half.
    """
    half = len(y) // 2
    direction = at_first(y[:half])
    y = y[half:]
    along = y @ direction  # (N - half, T)
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


@torch.no_grad()
def losses(model, idx, layer=0, direction=None, curve=None, aside=None, batch=25):
    """Loss at each position (T,) of the texts idx (N, T + 1).

    direction (C,), curve (T,) or one number: what the output of the layer's attention gets as its coordinate there.
    aside (C,): the change is made along it instead.
    """
    def exchange(_, __, y):
        return y + (curve - y @ direction)[..., None] * (direction if aside is None else aside)
    hooks = [] if curve is None else [model.h[layer].attn.register_forward_hook(exchange)]
    found = []
    for part in idx.split(batch):
        logits = model(part[:, :-1])[0]
        found.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction='none'))
    for hook in hooks:
        hook.remove()
    return torch.cat(found).mean(0)


def use(model, layer, y, idx, long_y, long):
    """Losses of the texts idx (N, T + 1) and long (M, 4T + 1) with other coordinates, and the rest of USE.

    The layer's outputs for other texts, y (N, T, C) and long_y (M, 4T, C), tell direction and curves. long may be None.
    """
    direction = at_first(y)
    along = y @ direction  # (N, T)
    curve = along.mean(0)
    random = torch.randn(len(direction), generator=torch.Generator().manual_seed(layer))
    aside = F.normalize(random - (random @ direction) * direction, dim=0)
    known = [(), (layer, direction, curve.mean()), (layer, direction, curve), (layer, direction, curve.mean(), aside)]
    found = [losses(model, idx, *change).mean() for change in known]
    lowest = along.flatten().quantile(0.01)
    if long is None:
        return [*map(float, found), None, None, None, float(lowest), None, None]
    T, n = len(curve), long.size(1) - 1
    squeezed = torch.from_numpy(np.interp(np.linspace(1, T, n), np.arange(1, T + 1), curve)).to(curve)
    far = (long_y @ direction).mean(0)  # (4T,)
    known = [(), (layer, direction, far), (layer, direction, squeezed)]
    found += [losses(model, long, *change)[n // 2:].mean() for change in known]
    return list(map(float, (*found, lowest, far[n // 2 - 1], far[-1])))


def windows(ids, T, texts):
    """Texts (texts, T + 1) from all over ids, in an order that is always the same."""
    starts = np.linspace(0, len(ids) - T - 1, texts).astype(int)
    starts = np.random.default_rng(1).permutation(starts)  # both halves from all over the text
    return torch.from_numpy(np.stack([ids[s:s + T + 1] for s in starts]).astype(np.int64))


def measure(name, out, args):
    """Rows of one run: (run, layer, m, coordinate, deviation, share), and those of USE."""
    model, checkpoint = load_run(out)
    if not model.config.causal:
        die(f'{out} is a masked model; only a causal mask tells the position')
    T = model.config.block_size
    val = text(checkpoint['settings']['dataset'], args.data_dir)[1]
    half = args.texts // 2
    idx = windows(val, T, args.texts)
    outputs = attention_outputs(model, idx[:, :-1])
    long = None
    long_outputs = [None] * len(outputs)
    if not model.config.absolute:
        long = windows(val, 4 * T, half)
        long_outputs = attention_outputs(model, long[:half // 2, :-1])
        long = long[half // 2:]
    rows = []
    uses = []
    for layer, (y, long_y) in enumerate(zip(outputs, long_outputs)):
        found = along_first(y)  # (3, T)
        rows += [(name, layer + 1, m, *map(float, values)) for m, values in enumerate(found.T, 1)]
        uses.append((name, layer + 1, *use(model, layer, y[:half], idx[half:], long_y, long)))
    return rows, uses


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


def print_uses(uses):
    names = [name.replace('_', ' ') for name in USE]
    print(f'\n| {" | ".join(names)} |\n' + '|---' * len(USE) + '|')
    for name, layer, *values in uses:
        cells = ['-' if x is None else f'{x:.2f}' for x in values[:len(LOSSES)]]
        cells += ['-' if x is None else f'{x:.1f}' for x in values[len(LOSSES):]]
        print(f'| {name} | {layer} | ' + ' | '.join(cells) + ' |')


def draw(curves):
    runs = list(dict.fromkeys(name for name, _ in curves))
    columns = min(4, len(runs))
    rows = math.ceil(len(runs) / columns)
    fig, axes = pyplot().subplots(rows, columns, figsize=(4.5 * columns, 4.5 * rows), squeeze=False,
                                  layout='constrained')
    for ax in axes.flat[len(runs):]:
        ax.remove()
    for ax, name in zip(axes.flat, runs):
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
    uses = []
    for name, out in zip(short_names(args.out_dirs), args.out_dirs):
        of_run, its_uses = measure(name, out, args)
        rows += of_run
        uses += its_uses
    path = write_csv(Path(args.results), 'counter', HEADER, rows)
    write_csv(Path(args.results), 'counter-use', USE, uses)
    curves = {}
    for name, layer, _, *values in rows:
        curves.setdefault((name, layer), []).append(values)
    curves = {key: np.array(values) for key, values in curves.items()}
    print_table(curves)
    print_uses(uses)
    save(draw(curves), path)


if __name__ == '__main__':
    main()
