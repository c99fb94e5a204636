"""
Draw the kernels that a run has learned, per layer and head.

    python experiments/kernels.py --out_dir out/composite-causal-python

Answers Figures 2 and 3 of Chang et al. 2021: fixed kernels of BERT-small (heads that look at the previous or the next
token, one-sided slopes, flat ones) and the depthwise kernels of the last layer.
  fixed, lightweight, b  beta: what each offset adds to the score, in nats. A constant changes nothing in a softmax, so
                         each kernel's mean over the offsets it can see is taken off
  dynamic                q.W / sqrt(hs), in nats: its mean over the queries of a validation text, and the standard
                         deviation over them (how much the kernel depends on the query)
  depthwise              the weights of the last layer's output convolution, channels sorted by the offset of their
                         largest weight
Writes experiments/results/kernels-<run, or model without --out_dir>-<objective>-<data set>.png and .csv (kind, row:
layer and head, or channel, offset, value).
"""
import argparse
import math

import numpy as np
import torch
from lib import common_flags, parse, positive, pyplot, save, short_names, text, write_csv

from common import die
from sample import load_run


@torch.no_grad()
def queries(model, idx):
    """The queries of each layer for the tokens idx (B, T): a list of (nh, B T, hs)."""
    inputs = []
    hooks = [block.attn.register_forward_hook(lambda _, args, __: inputs.append(args[0])) for block in model.h]
    model.hidden(idx)
    for hook in hooks:
        hook.remove()
    C = model.config.n_embd
    nh = model.config.n_head
    found = []
    for block, x in zip(model.h, inputs):
        q = block.attn.c_attn(x)[..., :C]  # (B, T, C)
        found.append(q.reshape(-1, nh, C // nh).transpose(0, 1))  # (nh, B T, hs)
    return found


def seen(K, causal):
    """The offsets of a kernel of K entries that are ever looked at, and their places in it."""
    if causal:
        return np.arange(-(K // 2), 1), slice(0, K // 2 + 1)
    return np.arange(-(K // 2), K // 2 + 1), slice(0, K)


def depthwise(attention, causal):
    """The output convolution: its kernels sorted by the offset and size of their largest weight, names, offsets."""
    w = attention.conv_out  # (C, K)
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
    names = []
    for layer in range(1, config.n_layer + 1):
        names += [f'layer {layer}, head {head}' for head in range(1, config.n_head + 1)]
    if getattr(config, 'mixer', 'attention') != 'attention':
        die('the kernels of a mixer are not drawn: it replaces attention and has no scores')
    found = {}
    for kind in ('fixed', 'lightweight', 'b'):
        if getattr(attention[0], kind, None) is not None:
            beta = torch.cat([getattr(a, kind) for a in attention])  # (layers nh, K)
            offsets, places = seen(beta.size(1), config.causal)
            found[kind] = (beta[:, places] - beta[:, places].mean(1, keepdim=True), names, offsets)
    if getattr(attention[0], 'dynamic', None) is not None:
        if getattr(config, 'queries_keys', False):
            print('query-made kernels are left out: half of these queries come from a convolution')
        else:
            offsets, places = seen(attention[0].dynamic.size(0), config.causal)
            made = [q @ a.dynamic.T[:, places] / math.sqrt(q.size(-1)) for q, a in zip(queries(model, idx), attention)]
            made = torch.cat(made)  # (layers nh, queries, offsets)
            made = made - made.mean(2, keepdim=True)
            found['dynamic: mean'] = (made.mean(1), names, offsets)
            found['dynamic: spread'] = (made.std(1), names, offsets)
    if getattr(attention[-1], 'conv_out', None) is not None:
        found['depthwise, last layer'] = depthwise(attention[-1], config.causal)
    return found


def draw(found, title):
    size = (3.6 * len(found) + 1.5, 5)
    fig, axes = pyplot().subplots(1, len(found), figsize=size, squeeze=False, layout='constrained')
    for ax, (kind, (values, names, offsets)) in zip(axes[0], found.items()):
        largest = values.abs().max().item() or 1
        image = ax.imshow(values.numpy(), aspect='auto', cmap='RdBu_r', vmin=-largest, vmax=largest,
                          interpolation='nearest', extent=(offsets[0] - 0.5, offsets[-1] + 0.5, len(names) - 0.5, -0.5))
        ax.set(title=kind, xlabel='offset j - i (tokens)')
        ax.set_xticks(offsets[len(offsets) // 2 % 2::max(2, len(offsets) // 8)])
        if len(names) <= 64:
            ax.set_yticks(range(len(names)), names, fontsize=7)
        else:
            ax.set_ylabel('channel, sorted by its largest weight')
        fig.colorbar(image, ax=ax, label='weight' if kind.startswith('depthwise') else 'nats', location='bottom')
    fig.suptitle(title, fontsize=9)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', help='folder of a run of model_composite.py, model_conv.py or model_kernelized.py '
                                          '(default: the newest run in out/)')
    parser.add_argument('--data_dir', default='data',
                        help='where the prepared text of the run is, for the query-made kernels (default data)')
    parser.add_argument('--tokens', type=positive, default=8192, help='of the validation text (default 8192)')
    common_flags(parser, None, dataset=False)
    return parse(parser)


def main():
    args = arguments()
    model, checkpoint = load_run(args.out_dir, None, 'cpu')
    settings = checkpoint['settings']
    T = model.config.block_size
    _, val, _ = text(settings['dataset'], args.data_dir)
    val = torch.from_numpy(val[:max(1, args.tokens // T) * T].astype(np.int64))
    found = kernels(model, val[:len(val) // T * T].view(-1, T))
    if not found:
        die(f'model_{settings["model"]}.py with these settings has no kernels')
    name = short_names([args.out_dir])[0] if args.out_dir else settings['model']
    label = '-'.join([name, *(word for word in (settings['objective'], settings['dataset']) if word not in name)])
    rows = []
    for kind, (values, names, offsets) in found.items():
        for row_name, row in zip(names, values.tolist()):
            rows += [(kind, row_name, offset, x) for offset, x in zip(offsets, row)]
    path = write_csv(args.results, f'kernels-{label}', ('kind', 'row', 'offset', 'value'), rows)

    print('| kind | offset of the largest value: how many heads or channels |\n|---|---|')
    for kind, (values, _, offsets) in found.items():
        size = values.abs() if kind.startswith('depthwise') else values
        peaks, counts = np.unique(offsets[size.argmax(1).numpy()], return_counts=True)
        how_many = ', '.join(f'{offset:+d}: {count}' for offset, count in zip(peaks, counts))
        print(f'| {kind} | {how_many} |')
    save(draw(found, f'{label}\nlearned kernels, step {checkpoint["step"]}'), path)


if __name__ == '__main__':
    main()
