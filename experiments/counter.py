"""
How a model without positions counts: the attention output of each layer along one direction, over position.

    python experiments/counter.py out/nope-causal-shakespeare out/composite-causal-shakespeare

Chi et al. 2023: the causal mask leaves the position in the variance of the attention output. This shows what a trained
model makes of it. The direction is the mean output at the first position, from one half of the sequences; all outputs
of the other half are projected onto it. If the coordinate changes steadily with the position and has most of the
squared norm (the share; 1 / n_embd in a random direction), the layer holds a counter.
The second table has losses, in nats per token, when the coordinate of one layer is replaced:
  constant         by its mean over all positions: the counter is gone
  position alone   by its mean at each position: everything else in it is gone
  aside            the change that `constant` makes, along a random orthogonal direction, as a control
  far              nothing is replaced; the second half of sequences of 4 times the training length, as in the next two
  far alone        as position alone
  squeezed         by the means of positions 1 ... T spread evenly over 1 ... 4T: position m gets about that of m / 4
The last columns are the coordinate: its 1 % quantile within the training length, and its means at 2T and 4T.
Writes experiments/results/counter.csv, counter-use.csv and counter.png (with --quick in out/quick).
"""
import numpy as np
import torch
import torch.nn.functional as F
from lib import (
    Parser, data_set, die, layer_calls, line_panels, print_table, save, sequences, short_names, table_path, write_csv)

from sample import load_run

HEADER = 'run', 'layer', 'm', 'coordinate', 'deviation', 'share'
LOSSES = 'loss', 'constant', 'position_alone', 'aside', 'far', 'far_alone', 'squeezed'
USE = 'run', 'layer', *LOSSES, 'lowest', 'at_2T', 'at_4T'


@torch.no_grad()
def attention_outputs(model, idx, batch=50):
    """The attention output of each layer for the sequences idx (N, T): a list of (N, T, C)."""
    found = [[y.float() for _, y in layer_calls(model, part)] for part in idx.split(batch)]
    return [torch.cat(parts) for parts in zip(*found)]


def at_first(y):
    """The direction (C,) of the mean output at the first position, for outputs y (N, T, C)."""
    return F.normalize(y[:, 0].mean(0), dim=0)


def along_first(y):
    """Outputs y (N, T, C) -> (3, T): coordinate along the mean at the first position, its deviation, its share.

    The first half of the sequences gives the direction, the second half the rest.
    """
    half = len(y) // 2
    direction = at_first(y[:half])
    y = y[half:]
    along = y @ direction  # (N - half, T)
    share = along.square().sum(0) / y.square().sum((0, 2))
    return torch.stack((along.mean(0), along.std(0), share)).numpy()


@torch.no_grad()
def losses(model, idx, layer=0, direction=None, curve=None, aside=None, batch=25):
    """Loss at each position (T,) of the sequences idx (N, T + 1).

    direction (C,), curve (T,) or one number: the new coordinate of the layer's attention output.
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
    """Losses of the sequences idx (N, T + 1) and long (M, 4T + 1) with other coordinates, and the rest of USE.

    The layer's outputs for other sequences, y (N, T, C) and long_y (M, 4T, C), give the direction and the curves. long
    may be None.
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


def shuffled(ids, n, T):
    """n sequences of T tokens from all over ids, in a fixed random order, so that each half is from all over them."""
    return sequences(ids, n, T)[torch.randperm(n, generator=torch.Generator().manual_seed(1))]


def measure(name, out, args):
    """Rows of HEADER and of USE of one run."""
    model, checkpoint = load_run(out)
    if not model.config.causal:
        die(f'{out} is a masked model; only a causal mask tells the position')
    T = model.config.block_size
    val = data_set(checkpoint['settings']['dataset'], args.data_dir)[1]
    half = args.sequences // 2
    idx = shuffled(val, args.sequences, T + 1)
    outputs = attention_outputs(model, idx[:, :-1])
    long = None
    long_outputs = [None] * len(outputs)
    if not model.config.absolute:
        long = shuffled(val, half, 4 * T + 1)
        long_outputs = attention_outputs(model, long[:half // 2, :-1])
        long = long[half // 2:]
    rows = []
    uses = []
    for layer, (y, long_y) in enumerate(zip(outputs, long_outputs)):
        found = along_first(y)  # (3, T)
        for m in sorted({*np.geomspace(1, T, 25).round().astype(int).tolist(), *(2 ** np.arange(T.bit_length()))}):
            rows.append((name, layer + 1, int(m), *map(float, found[:, m - 1])))
        uses.append((name, layer + 1, *use(model, layer, y[:half], idx[half:], long_y, long)))
    return rows, uses


def coordinate_table(rows):
    """Rows of the CSV -> the coordinate at m = 1, 2, 4, ..., and its share at m = 1."""
    lines = {}
    for run, layer, m, *values in rows:
        lines.setdefault((run, str(layer)), {})[int(m)] = list(map(float, values))
    at = [2 ** i for i in range(max(map(max, lines.values())).bit_length())]
    cells = []
    for (run, layer), of_m in lines.items():
        cells.append((run, layer, *(f'{of_m[m][0]:.1f}' if m in of_m else '' for m in at), f'{of_m[1][2]:.2f}'))
    return ('run', 'layer', *(f'm={m}' for m in at), 'share at m=1'), cells


def use_table(rows):
    def cell(value, form):
        return '-' if value in (None, '') else format(float(value), form)
    cells = []
    for run, layer, *values in rows:
        cells.append((run, str(layer), *(cell(x, '.2f') for x in values[:len(LOSSES)]),
                      *(cell(x, '.1f') for x in values[len(LOSSES):])))
    return tuple(name.replace('_', ' ') for name in USE), cells


def draw(rows):
    panels = {}
    for run, layer, m, coordinate, *_ in rows:
        x, y = panels.setdefault(run, {}).setdefault(f'layer {layer}', ([], []))
        x.append(int(m))
        y.append(float(coordinate))
    return line_panels(panels, 'position m', 'attention output along its mean at m = 1', xscale='log')


def main():
    parser = Parser(__doc__, '20 sequences')
    parser.add_argument('out_dirs', nargs='+', help='folders of causal runs')
    parser.add('--sequences', 200, 20, 'of block_size tokens, 4 or more: half of them give the direction')
    parser.add_data()
    args = parser.parse_args()
    if args.sequences < 4:
        parser.error('--sequences must be 4 or more: half of them give the direction')
    rows, uses = [], []
    for name, out in zip(short_names(args.out_dirs), args.out_dirs):
        of_run, its_uses = measure(name, out, args)
        rows += of_run
        uses += its_uses
    path = table_path(args, 'counter')
    write_csv(path, HEADER, rows)
    write_csv(table_path(args, 'counter-use'), USE, uses)
    print_table(coordinate_table(rows))
    print_table(use_table(uses))
    save(draw(rows), path)


if __name__ == '__main__':
    main()
