"""
Draw the kernels that a run has learned, per layer and head.

    python experiments/kernels.py --out_dir out/composite-causal-python

Answers Figures 2 and 3 of Chang et al. 2021: fixed kernels of BERT-small (heads that look at the previous or the next token, one-sided
slopes, flat ones) and the depthwise kernels of the last layer.
  fixed, lightweight, b  beta: what each offset adds to the score, in nats (a softmax does not notice a constant, so each
                         kernel's mean over the offsets it can see is taken off)
  dynamic                q.W / sqrt(hs), in nats: its mean over the queries of a validation text, and below it the standard
                         deviation over them (how much the kernel is the query's own)
  depthwise              the weights of the last layer's output convolution, channels sorted by the offset of their largest weight
Writes experiments/results/kernels-<run, or model without --out_dir>-<objective>-<data set>.png and .csv (kind, row: layer and head, or channel, offset, value).
"""
import argparse
import math

import numpy as np
import torch
from lib import REPO, positive, pyplot, short_names, text, write_csv

from sample import die, load_run


@torch.no_grad()
def queries(model, idx):
    """The queries of each layer for the tokens idx (B, T): a list of (nh, B T, hs)."""
    inputs = []
    hooks = [block.attn.register_forward_hook(lambda _, args, __: inputs.append(args[0])) for block in model.h]
    model.hidden(idx)
    for hook in hooks:
        hook.remove()
    C, nh = model.config.n_embd, model.config.n_head
    return [block.attn.c_attn(x)[..., :C].reshape(-1, nh, C // nh).transpose(0, 1) for block, x in zip(model.h, inputs)]


@torch.no_grad()
def kernels(model, idx):
    """{kind: ((rows, offsets) values, names of the rows, offsets)}."""
    causal, nh = model.config.causal, model.config.n_head
    names = [f'layer {layer}, head {head}' for layer in range(1, len(model.h) + 1) for head in range(1, nh + 1)]
    found = {}
    attention = [block.attn for block in model.h]
    if getattr(model.config, 'mixer', 'attention') != 'attention':
        die('the kernels of a mixer are not drawn: they stand in place of attention, not in its scores')
    if getattr(model.config, 'queries_keys', False) and attention[0].dynamic is not None:
        print('query-made kernels are left out: half of these queries come from a convolution')

    def seen(K):  # the offsets of the scores that are ever looked at, and where in a kernel they stand
        return np.arange(-(K // 2), 1 if causal else K // 2 + 1), slice(0, K // 2 + 1 if causal else K)
    for kind in ('fixed', 'lightweight', 'b'):
        if getattr(attention[0], kind, None) is not None:
            beta = torch.cat([getattr(a, kind) for a in attention])  # (layers nh, K)
            offsets, looked = seen(beta.size(1))
            found[kind] = (beta[:, looked] - beta[:, looked].mean(1, keepdim=True), names, offsets)
    if getattr(attention[0], 'dynamic', None) is not None and not getattr(model.config, 'queries_keys', False):
        offsets, looked = seen(attention[0].dynamic.size(0))
        made = torch.cat([q @ a.dynamic.T[:, looked] / math.sqrt(q.size(-1)) for q, a in zip(queries(model, idx), attention)])  # (layers nh, queries, offsets)
        made = made - made.mean(2, keepdim=True)
        found['dynamic: mean'] = (made.mean(1), names, offsets)
        found['dynamic: spread'] = (made.std(1), names, offsets)
    if getattr(attention[-1], 'conv_out', None) is not None:
        w = attention[-1].conv_out  # (C, K)
        order = sorted(range(w.size(0)), key=lambda c: (w[c].abs().argmax().item(), w[c, w[c].abs().argmax()].item()))
        K = w.size(1)
        taps = np.arange(-(K - 1), 1) if causal else np.arange(-(K // 2), K // 2 + 1)
        found['depthwise, last layer'] = (w[order], [f'channel {c}' for c in order], taps)
    return found


def draw(found, title, path):
    fig, axes = pyplot().subplots(1, len(found), figsize=(3.6 * len(found) + 1.5, 5), squeeze=False, layout='constrained')
    for ax, (kind, (values, names, offsets)) in zip(axes[0], found.items()):
        size = values.abs().max().item() or 1
        image = ax.imshow(values, aspect='auto', cmap='RdBu_r', vmin=-size, vmax=size, interpolation='nearest',
                          extent=(offsets[0] - 0.5, offsets[-1] + 0.5, len(names) - 0.5, -0.5))
        ax.set(title=kind, xlabel='offset j - i (tokens)', xticks=offsets[len(offsets) // 2 % 2::max(2, len(offsets) // 8)])
        if len(names) <= 64:
            ax.set_yticks(range(len(names)), names, fontsize=7)
        else:
            ax.set_ylabel('channel, sorted by its largest weight')
        fig.colorbar(image, ax=ax, label='weight' if kind.startswith('depthwise') else 'nats', location='bottom')
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', help='folder of a run of model_composite.py, model_conv.py or model_kernelized.py (default: the newest run in out/)')
    parser.add_argument('--data_dir', default='data', help='where the prepared text of the run is, for the query-made kernels (default data)')
    parser.add_argument('--tokens', type=positive, default=8192, help='of the validation text (default 8192)')
    parser.add_argument('--results', default=str(REPO / 'experiments' / 'results'), help='folder of the table and the picture')
    args = parser.parse_args()
    model, checkpoint = load_run(args.out_dir, None, 'cpu')
    settings, T = checkpoint['settings'], model.config.block_size
    _, val, _ = text(settings['dataset'], args.data_dir)
    val = torch.from_numpy(val[:max(1, args.tokens // T) * T].astype(np.int64))
    found = kernels(model, val[:len(val) // T * T].view(-1, T))
    if not found:
        die(f'model_{settings["model"]}.py with these settings has no kernels')
    name = short_names([args.out_dir])[0] if args.out_dir else settings['model']
    label = '-'.join([name, *(word for word in (settings['objective'], settings['dataset']) if word not in name)])
    path = write_csv(args.results, f'kernels-{label}', ('kind', 'row', 'offset', 'value'),
                     [(kind, name, o, x) for kind, (values, names, offsets) in found.items() for name, row in zip(names, values.tolist()) for o, x in zip(offsets, row)])
    draw(found, f'{label}\nlearned kernels, step {checkpoint["step"]}', path.with_suffix('.png'))

    print('| kind | offset of the largest value: how many heads or channels |\n|---|---|')
    for kind, (values, _, offsets) in found.items():
        peak = offsets[(values if not kind.startswith('depthwise') else values.abs()).argmax(1).numpy()]
        print(f'| {kind} | {", ".join(f"{o:+d}: {n}" for o, n in zip(*np.unique(peak, return_counts=True)))} |')
    print(f'\nwrote {path} and its .png')


if __name__ == '__main__':
    main()
