"""
Does the variance of causal attention's output tell the position? Without any training, layer by layer.

    python experiments/attention_variance.py --quick     # seconds: 4 layers of 256, 256 tokens
    python experiments/attention_variance.py             # the paper's size, 12 layers of 768, 512 tokens
    python experiments/attention_variance.py --quick --vocab_size 256    # few kinds: twice the theory at m = 256
    python experiments/attention_variance.py --quick --out_dir out/nope-causal-python    # and a trained run

Answers the variance figures of Chi et al. 2023: o_m, the attention's output at token m (after c_proj, before the
residual), against the theory d^2 sigma^4 / m. Random models are model_nope.py with random tokens and the plain
initialisation; where d is not the paper's 768, sigma grows by sqrt(768/d), which keeps d sigma^2 = 0.307 and with it
the theory line. Variance is over the channels of a token, its mean over sequences. Panels: every layer; the first layer
at other sigmas; no causal mask; trained runs, and dotted the same runs before training.

Found at the paper's size (in parentheses what an independent program found); theory at m = 1 is .0944:
  layer 1   .0922 at m = 1, .000200 at 512 (.0939, .00021), slope -0.99; at 512 it is 9 % above 1/m (5-12 %), because
            attention is not quite flat
  layer 2   .0974, .0333 (.0944, .0325);  layer 12   .0927, .0585 (.0961, .0638): the inputs of deeper layers are
            correlated, so the law holds in the first layer only
  sigma     0.002: 0.28 of theory (0.28), because LayerNorm's eps is not small then; 0.2: flat, because each token
            attends to one other. No mask: flat in all layers
Writes experiments/results/attention_variance.png and .csv (what, sigma, layer, m, variance, theory); with --quick
out/quick/attention_variance-quick; with --name attention_variance-<name>, trained runs alone.
"""
import argparse
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from lib import (common_flags, layer_calls, merge_table, parse, positive, pyplot, runs_of, save, short_names, text,
                 write_csv)

from common import die, load_model_file
from sample import load_run

SIZES = {'n_embd': (768, 256), 'n_head': (12, 4), 'n_layer': (12, 4), 'block_size': (512, 256)}  # full, with --quick
HEADER = ('what', 'sigma', 'layer', 'm', 'variance', 'theory')


def random_model(name, sigma, seed, device, **config):
    """A frozen model, by default as the theory wants it; sigma is meant at width 768."""
    module = load_model_file(name)
    sigma = sigma * math.sqrt(768 / config['n_embd'])
    torch.manual_seed(seed)
    try:
        model = module.Model(module.Config(**{'init_std': sigma, 'scale_residual_init': False, **config}))
    except ValueError as e:  # n_head, for example
        die(e)
    return model.to(device).eval().requires_grad_(False)


def before_training(model, checkpoint):
    """The run at its first step: the same config, and the weights that its seed gives train.py."""
    torch.manual_seed(checkpoint['settings']['seed'])
    return type(model)(model.config).to(model.wte.weight.device).eval()


@torch.no_grad()
def variances(model, idx, batch=4):
    """Variance of the attention's output over the channels, its mean over the sequences idx (B, T): (layers, T)."""
    sums = torch.zeros(len(model.h), idx.size(1))
    for part in idx.split(batch):
        outputs = [y for _, y in layer_calls(model, part.to(model.wte.weight.device))]  # each (batch, T, C)
        sums += torch.stack([y.float().var(-1).sum(0).cpu() for y in outputs])
    return sums.numpy() / len(idx)


def slope(v):
    """Of log variance against log m, at m = 1, 2, 4, ... so that every octave counts alike."""
    at = 2 ** np.arange(len(v).bit_length())
    return np.polyfit(np.log(at), np.log(v[at - 1]), 1)[0]


def random_curves(args):
    """(what, sigma, layer, variance (T,), theory at m = 1) of random models."""
    generator = torch.Generator().manual_seed(args.seed)
    idx = torch.randint(args.vocab_size, (args.sequences, args.block_size), generator=generator)
    cases = [('causal', args.sigma, args.n_layer, True)]
    cases += [('sigmas, first layer', args.sigma * times, 1, True) for times in (0.1, 1, 3, 10)]
    cases += [('no causal mask', args.sigma, args.n_layer, False)]
    curves = []
    for what, sigma, n_layer, causal in cases:
        model = random_model('nope', sigma, args.seed, args.device, n_layer=n_layer, causal=causal,
                             vocab_size=args.vocab_size, block_size=args.block_size, n_head=args.n_head,
                             n_embd=args.n_embd)
        theory = (args.n_embd * model.config.init_std ** 2) ** 2
        curves += [(what, sigma, layer, v, theory) for layer, v in enumerate(variances(model, idx), 1)]
    return curves


def trained_curves(name, out_dir, args):
    """(what, None, layer, variance (T,), None) of a run before and after its training, on its validation text."""
    model, checkpoint = load_run(out_dir, None, args.device)
    T = model.config.block_size
    val = text(checkpoint['settings']['dataset'], args.data_dir)[1]
    val = torch.from_numpy(val[:len(val) // T * T].astype(np.int64)).view(-1, T)
    val = val[torch.linspace(0, len(val) - 1, min(len(val), 4 * args.sequences)).long()]  # from all over it
    curves = []
    for what, which in (('before training', before_training(model, checkpoint)), ('trained', model)):
        curves += [(f'{what}: {name}', None, layer, v, None) for layer, v in enumerate(variances(which, val), 1)]
    return curves


def table_rows(curves, at):
    """Rows of the CSV: (what, sigma, layer, m, variance, theory) at about a hundred m, enough for any plot."""
    longest = max(len(v) for *_, v, _ in curves)
    shown = {*np.geomspace(1, longest, 100).round().astype(int).tolist(), *at}
    rows = []
    for what, sigma, layer, v, theory in curves:
        for m, x in enumerate(v.tolist(), 1):
            if m in shown:
                rows.append((what, sigma, layer, m, x, theory / m if theory else None))
    return rows


def draw_lines(ax, lines, labelled, dotted):
    """lines [(sigma, layer, [m], [variance], theory at m = 1)] of a panel, from dark to light."""
    for n, (sigma, layer, m, v, theory) in enumerate(lines):
        label = None
        if labelled == 'sigma':  # every sigma has a theory line of its own: divided by its d^2 sigma^4 they are one
            label = f'sigma {sigma:g}'
            v = np.array(v) / theory
        elif labelled == 'layer' and (len(lines) < 7 or layer in (1, 2, len(lines))):
            label = f'layer {layer}'
        elif dotted and n == 0:
            label = 'before training'
        color = pyplot().cm.viridis(0.9 * n / max(1, len(lines) - 1))
        ax.plot(m, v, color=color, lw=1 if dotted else 1.2, ls=':' if dotted else '-', label=label)


def draw(rows, title):
    """Rows of the CSV -> a figure with a panel for each case."""
    panels = {}  # {what: {(sigma, layer): (sigma, layer, [m], [variance], theory at m = 1)}}
    for what, sigma, layer, m, v, theory in rows:
        line = panels.setdefault(what, {}).setdefault((sigma, layer), (sigma, layer, [], [], theory))  # m = 1 is first
        line[2].append(m)
        line[3].append(v)
    shown = [what for what in panels if not what.startswith('before training')]
    down = -(-len(shown) // 3)
    fig, axes = pyplot().subplots(down, 3, figsize=(14, 4.2 * down), squeeze=False, layout='constrained')
    for ax in axes.flat[len(shown):]:
        ax.set_axis_off()
    for ax, what in zip(axes.flat, shown):
        lines = list(panels[what].values())
        sweep = what.startswith('sigmas')
        draw_lines(ax, lines, 'sigma' if sweep else 'layer', dotted=False)
        if what.startswith('trained'):
            before = panels[what.replace('trained', 'before training', 1)]
            draw_lines(ax, list(before.values()), None, dotted=True)
        m, theory = np.array(lines[0][2]), lines[0][4]
        if theory:
            ax.plot(m, (1 if sweep else theory) / m, 'k--', lw=1, label='theory')
        ax.set_title(textwrap.fill(what, 60), fontsize=8)
        ax.set(xscale='log', yscale='log', xlabel='position m',
               ylabel='variance / (d^2 sigma^4)' if sweep else 'variance of o_m')
        ax.grid(alpha=0.3)
        ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8)  # below the panel
    fig.suptitle(title)
    return fig


def print_table(curves, at):
    heads = ''.join(f' m={m} |' for m in at)
    print(f'\n| what | sigma | layer |{heads} / theory, m=1 | / theory, last m | slope |\n|' + '---|' * (len(at) + 6))
    for what, sigma, layer, v, theory in curves:
        cells = [f'{v[m - 1]:.3g}' if m <= len(v) else '' for m in at]
        cells += [f'{v[0] / theory:.2f}', f'{v[-1] * len(v) / theory:.2f}'] if theory else ['', '']
        sigma = f'{sigma:g}' if sigma else ''
        print(f'| {what} | {sigma} | {layer} | {" | ".join(cells)} | {slope(v):.2f} |')


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (full, quick) in SIZES.items():
        parser.add_argument(f'--{name}', type=positive, help=f'(default {full}, {quick} with --quick)')
    parser.add_argument('--sequences', type=positive, default=20, help='of each case (default 20)')
    parser.add_argument('--sigma', type=float, default=0.02, help='of the initial weights at width 768 (default 0.02)')
    parser.add_argument('--vocab_size', type=positive, default=50304,
                        help='kinds of random tokens; the theory wants many (default 50304)')
    parser.add_argument('--out_dir', nargs='+', default=[], help='folders of trained runs, of any model')
    parser.add_argument('--data_dir', default='data', help='where their prepared text is (default data)')
    parser.add_argument('--seed', type=int, default=1, help='of weights and tokens (default 1)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    common_flags(parser, 'smaller: width 256, 4 heads, 4 layers, 256 tokens', dataset=False, name=True)
    args = parse(parser, SIZES)
    if args.name and args.out_dir:
        parser.error('give --out_dir or --name, not both')
    if args.name:
        args.out_dir = runs_of(args.name)
    return args


def main():
    args = arguments()
    names = short_names(args.out_dir)
    print(f'on {args.device}')
    if args.device.startswith('cuda'):
        torch.set_float32_matmul_precision('high')  # TF32: its rounding is far below what is seen here
    curves = [] if args.name else random_curves(args)
    for name, out_dir in zip(names, args.out_dir):
        curves += trained_curves(name, out_dir, args)
    longest = max(len(v) for *_, v, _ in curves)
    at = [2 ** i for i in range(longest.bit_length())]
    rows = table_rows(curves, at)
    parts = ['attention_variance', args.name, 'quick' if args.quick else '']
    path = Path(args.results, '-'.join(part for part in parts if part) + '.csv')
    if args.name:
        rows = merge_table(path, HEADER, rows, 1, f'sequences: {args.sequences}')
    else:
        write_csv(path.parent, path.stem, HEADER, rows)
    print_table(curves, at)
    random = f'random models: d {args.n_embd}, {args.n_layer} layers, {args.vocab_size} kinds of tokens'
    save(draw(rows, f'variance of the attention output ({args.name or random})'), path)


if __name__ == '__main__':
    main()
