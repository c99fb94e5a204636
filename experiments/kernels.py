"""
Draw the kernels that a run has learned, per layer and head.

    python experiments/kernels.py --out_dir out/composite-causal-shakespeare

Answers Figures 2 and 3 of Chang et al. 2021: fixed kernels of BERT-small (heads that look at the previous or the next
token, one-sided slopes, flat ones) and the depthwise kernels of the last layer.
  fixed, lightweight, b  beta: what each offset adds to the score, in nats. softmax(x + c) = softmax(x), so the mean of
                         each kernel over the visible offsets is subtracted
  dynamic                q.W / sqrt(hs), in nats: its mean over the queries of validation tokens, and its standard
                         deviation over them (how much the kernel depends on the query)
  depthwise              the weights of the last layer's output convolution, channels sorted by the offset of their
                         largest weight
Writes experiments/results/kernels-<run>-<objective>-<data set>.csv and .png.
"""
import math

import numpy as np
import torch
from lib import Parser, data_set, die, layer_calls, print_table, pyplot, save, sequences, short_names, write_csv

from sample import load_run

HEADER = 'kind', 'row', 'offset', 'value'


@torch.no_grad()
def queries(model, idx):
    """The queries of each layer for the tokens idx (B, T): a list of (nh, B T, hs)."""
    C, nh = model.config.n_embd, model.config.n_head
    found = []
    for block, (x, _) in zip(model.h, layer_calls(model, idx)):
        q = block.attn.c_attn(x)[..., :C]  # (B, T, C)
        found.append(q.reshape(-1, nh, C // nh).transpose(0, 1))  # (nh, B T, hs)
    return found


def visible(K, causal):
    """The visible offsets of a kernel of K entries, and their places in it."""
    if causal:
        return np.arange(-(K // 2), 1), slice(0, K // 2 + 1)
    return np.arange(-(K // 2), K // 2 + 1), slice(0, K)


def depthwise(w, causal):
    """Kernels w (C, K) sorted by the offset and size of their largest weight, names, offsets."""
    C, K = w.shape
    largest = w.abs().argmax(1)
    order = sorted(range(C), key=lambda c: (largest[c].item(), w[c, largest[c]].item()))
    offsets = np.arange(-(K - 1), 1) if causal else np.arange(-(K // 2), K // 2 + 1)
    return w[order], [f'channel {c}' for c in order], offsets


@torch.no_grad()
def kernels(model, idx):
    """{kind: ((rows, offsets) values, names of the rows, offsets)}."""
    config = model.config
    attention = [block.attn for block in model.h]
    names = [f'layer {layer}, head {head}' for layer in range(1, config.n_layer + 1)
             for head in range(1, config.n_head + 1)]
    if getattr(config, 'mixer', 'attention') != 'attention':
        die('the kernels of a mixer are not drawn: it replaces attention and has no scores')
    found = {}
    for kind in ('fixed', 'lightweight', 'b'):
        if getattr(attention[0], kind, None) is not None:
            beta = torch.cat([getattr(a, kind) for a in attention])  # (layers nh, K)
            offsets, places = visible(beta.size(1), config.causal)
            found[kind] = (beta[:, places] - beta[:, places].mean(1, keepdim=True), names, offsets)
    # convolved queries are not those of c_attn
    if getattr(attention[0], 'dynamic', None) is not None and not getattr(config, 'queries_keys', False):
        offsets, places = visible(attention[0].dynamic.size(0), config.causal)
        scores = [q @ a.dynamic.T[:, places] / math.sqrt(q.size(-1)) for q, a in zip(queries(model, idx), attention)]
        scores = torch.cat(scores)  # (layers nh, queries, offsets)
        scores = scores - scores.mean(2, keepdim=True)
        found['dynamic: mean'] = (scores.mean(1), names, offsets)
        found['dynamic: spread'] = (scores.std(1), names, offsets)
    if getattr(attention[-1], 'conv_out', None) is not None:
        found['depthwise, last layer'] = depthwise(attention[-1].conv_out, config.causal)
    return found


def peak_table(rows):
    """Rows of the CSV -> how many heads or channels have their largest value at each offset."""
    lines = {}
    for kind, name, offset, value in rows:
        value = abs(float(value)) if kind.startswith('depthwise') else float(value)
        lines.setdefault(kind, {}).setdefault(name, []).append((value, int(offset)))
    cells = []
    for kind, of_row in lines.items():
        peaks, counts = np.unique([max(line)[1] for line in of_row.values()], return_counts=True)
        cells.append((kind, ', '.join(f'{offset:+d}: {count}' for offset, count in zip(peaks, counts))))
    return ('kind', 'offset of the largest value: number of heads or channels'), cells


def draw(found, title):
    size = (3.6 * len(found) + 1.5, 5)
    fig, axes = pyplot().subplots(1, len(found), figsize=size, squeeze=False, layout='constrained')
    for ax, (kind, (values, names, offsets)) in zip(axes[0], found.items()):
        largest = values.abs().max().item() or 1
        image = ax.imshow(values.numpy(), aspect='auto', cmap='RdBu_r', vmin=-largest, vmax=largest,
                          interpolation='nearest', extent=(offsets[0] - 0.5, offsets[-1] + 0.5, len(names) - 0.5, -0.5))
        ax.set(title=kind, xlabel='offset j - i (tokens)')
        if len(names) <= 64:
            ax.set_yticks(range(len(names)), names, fontsize=7)
        else:
            ax.set_ylabel('channel, sorted by its largest weight')
        fig.colorbar(image, ax=ax, label='weight' if kind.startswith('depthwise') else 'nats', location='bottom')
    fig.suptitle(title, fontsize=9)
    return fig


def main():
    parser = Parser(__doc__)
    parser.add_argument('--out_dir', required=True,
                        help='folder of a run of model_composite.py, model_conv.py or model_kernelized.py')
    parser.add('--tokens', 8192, note='of the validation data, for the query-dependent kernels')
    parser.add_data()
    args = parser.parse_args()
    model, checkpoint = load_run(args.out_dir, None, 'cpu')
    settings = checkpoint['settings']
    T = model.config.block_size
    val = data_set(settings['dataset'], args.data_dir)[1]
    found = kernels(model, sequences(val, max(1, args.tokens // T), T))
    if not found:
        die(f'model_{settings["model"]}.py with these settings has no kernels')
    name = short_names([args.out_dir])[0]
    label = '-'.join([name, *(word for word in (settings['objective'], settings['dataset']) if word not in name)])
    rows = []
    for kind, (values, names, offsets) in found.items():
        for row_name, row in zip(names, values.tolist()):
            rows += [(kind, row_name, offset, x) for offset, x in zip(offsets, row)]
    path = args.results / f'kernels-{label}.csv'
    write_csv(path, HEADER, rows)
    print_table(peak_table(rows))
    save(draw(found, f'{label}\nlearned kernels, step {checkpoint["step"]}'), path)


if __name__ == '__main__':
    main()
