"""
Does the variance of causal attention's output tell the position? Without any training, layer by layer.

    python experiments/attention_variance.py --quick                # seconds: 4 layers of 256, 256 tokens
    python experiments/attention_variance.py                        # the paper's size, 12 layers of 768, 512 tokens
    python experiments/attention_variance.py --vocab_size 256       # few kinds of tokens: twice the theory at m = 256 (with --quick)
    python experiments/attention_variance.py --quick --out_dir out/nope-causal-python   # and the same of a trained run

Answers the variance figures of Chi et al. 2023: o_m, the attention's output at token m (behind c_proj, before the residual),
against the theory d^2 sigma^4 / m. Random models are model_nope.py with random tokens and the plain initialisation; where d is not
the paper's 768, sigma grows by sqrt(768/d), which keeps d sigma^2 = 0.307 and with it the theory line. Variance is over the
channels of a token, its mean over sequences. Panels: every layer; the first layer at other sigmas; no causal mask; trained runs,
and dotted the same runs before training.

Found at the paper's size, in parentheses what an independent program found before: theory at m = 1 is .0944;
  layer 1   .0922 at m = 1, .000200 at 512 (.0939, .00021), slope -0.99; it ends 9 % above 1/m (5-12 %): attention is not quite flat
  layer 2   .0974, .0333 (.0944, .0325);  layer 12   .0927, .0585 (.0961, .0638): deeper inputs are correlated, the law is the first layer's
  sigma     0.002: 0.28 of theory (0.28), for LayerNorm's eps counts; 0.2: flat, for each token attends to one. No mask: flat in all layers
Writes experiments/results/attention_variance[-quick].png and .csv (what, sigma, layer, m, variance, theory).
"""
import argparse
import importlib
import math
import sys
import textwrap

import numpy as np
import torch
from lib import REPO, positive, pyplot, short_names, text, write_csv

from sample import die, load_run


def random_model(name, sigma, seed, device, **config):
    """A frozen model as the theory wants it; sigma is meant at width 768."""
    module, sigma = importlib.import_module(f'model_{name}'), sigma * math.sqrt(768 / config['n_embd'])
    torch.manual_seed(seed)
    try:
        return module.Model(module.Config(init_std=sigma, scale_residual_init=False, **config)).to(device).eval().requires_grad_(False)
    except ValueError as e:  # n_head, say
        die(e)


def before_training(model, checkpoint):
    """The run at its first step: the same config, and the weights that its seed gives train.py."""
    torch.manual_seed(checkpoint['settings']['seed'])
    return type(model)(model.config).to(model.wte.weight.device).eval()


@torch.no_grad()
def variances(model, idx, batch=4):
    """Variance of the attention's output over the channels, its mean over the sequences idx (B, T): (layers, T)."""
    found = [[] for _ in model.h]
    hooks = [block.attn.register_forward_hook(lambda _, __, o, seen=seen: seen.append(o.float().var(-1).sum(0).cpu()))
             for block, seen in zip(model.h, found)]
    for part in idx.split(batch):
        model.hidden(part.to(model.wte.weight.device))
    for hook in hooks:
        hook.remove()
    return torch.stack([sum(seen) for seen in found]).numpy() / len(idx)


def slope(v):
    """Of log variance against log m, at m = 1, 2, 4, ... so that every octave counts alike."""
    at = 2 ** np.arange(len(v).bit_length())
    return np.polyfit(np.log(at), np.log(v[at - 1]), 1)[0]


def draw(curves, args, path):
    plt = pyplot()
    panels = [what for what in dict.fromkeys(what for what, *_ in curves) if not what.startswith('before training')]
    fig, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(14, 4.2 * -(-len(panels) // 3)), squeeze=False, layout='constrained')
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, panels):
        lines = [c for c in curves if c[0] == panel]
        for n, (_, sigma, layer, v, theory) in enumerate(lines):
            m = np.arange(1, len(v) + 1)
            sweep = panel.startswith('sigmas')  # every sigma has a line of its own: in units of its d^2 sigma^4 they are one
            label = f'sigma {sigma:g}' if sweep else f'layer {layer}' if len(lines) < 7 or layer in (1, 2, len(lines)) else None
            ax.plot(m, v / theory if sweep else v, color=plt.cm.viridis(0.9 * n / max(1, len(lines) - 1)), lw=1.2, label=label)
        for n, (*_, v, _) in enumerate(c for c in curves if c[0] == panel.replace('trained', 'before training') != panel):
            ax.plot(np.arange(1, len(v) + 1), v, color=plt.cm.viridis(0.9 * n / max(1, len(lines) - 1)), lw=1, ls=':', label=None if n else 'before training')
        if theory:
            ax.plot(m, (1 if sweep else theory) / m, 'k--', lw=1, label='theory')
        ax.set_title(textwrap.fill(panel, 60), fontsize=8)
        ax.set(xscale='log', yscale='log', xlabel='position m', ylabel='variance / (d^2 sigma^4)' if sweep else 'variance of o_m')
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.suptitle(f'variance of the attention output (random models: d {args.n_embd}, {args.n_layer} layers, {args.vocab_size} kinds of tokens)')
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--quick', action='store_true', help='smaller: width 256, 4 heads, 4 layers, 256 tokens')
    for name, full, quick in (('n_embd', 768, 256), ('n_head', 12, 4), ('n_layer', 12, 4), ('block_size', 512, 256), ('sequences', 20, 20)):
        parser.add_argument(f'--{name}', type=positive, default=(full, quick)['--quick' in sys.argv], help=f'(default {full}, {quick} with --quick)')
    parser.add_argument('--sigma', type=float, default=0.02, help='of the initial weights at width 768 (default 0.02)')
    parser.add_argument('--vocab_size', type=positive, default=50304, help='kinds of random tokens; the theory wants many (default 50304)')
    parser.add_argument('--out_dir', nargs='+', default=[], help='folders of trained runs, of any model')
    parser.add_argument('--data_dir', default='data', help='where their prepared text is (default data)')
    parser.add_argument('--seed', type=int, default=1, help='of weights and tokens (default 1)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--results', default=str(REPO / 'experiments' / 'results'), help='folder of the table and the picture')
    args = parser.parse_args()
    names = short_names(args.out_dir)
    print(f'on {args.device}')
    shape = dict(vocab_size=args.vocab_size, block_size=args.block_size, n_head=args.n_head, n_embd=args.n_embd)
    idx = torch.randint(args.vocab_size, (args.sequences, args.block_size), generator=torch.Generator().manual_seed(args.seed))
    cases = [('causal', args.sigma, args.n_layer, True), *(('sigmas, first layer', args.sigma * times, 1, True) for times in (0.1, 1, 3, 10)),
             ('no causal mask', args.sigma, args.n_layer, False)]
    curves = []  # (what, sigma, layer, variance (T,), theory at m = 1 or None)
    for what, sigma, n_layer, causal in cases:
        model = random_model('nope', sigma, args.seed, args.device, n_layer=n_layer, causal=causal, **shape)
        theory = (args.n_embd * model.config.init_std ** 2) ** 2
        curves += [(what, sigma, layer, v, theory) for layer, v in enumerate(variances(model, idx), 1)]
    for name, out_dir in zip(names, args.out_dir):
        model, checkpoint = load_run(out_dir, None, args.device)
        T = model.config.block_size
        val = text(checkpoint['settings']['dataset'], args.data_dir)[1]
        val = torch.from_numpy(val[:len(val) // T * T].astype(np.int64)).view(-1, T)
        val = val[torch.linspace(0, len(val) - 1, min(len(val), 4 * args.sequences)).long()]  # from all over it
        for what, seen in (('before training', before_training(model, checkpoint)), ('trained', model)):
            curves += [(f'{what}: {name}', None, layer, v, None) for layer, v in enumerate(variances(seen, val), 1)]

    longest = max(len(c[3]) for c in curves)
    at = [2 ** i for i in range(longest.bit_length())]
    shown = {*np.geomspace(1, longest, 100).round().astype(int).tolist(), *at}  # enough for any plot
    rows = [(what, sigma, layer, m, x, theory and theory / m) for what, sigma, layer, v, theory in curves
            for m, x in enumerate(v.tolist(), 1) if m in shown]
    path = write_csv(args.results, f'attention_variance{"-quick" if args.quick else ""}', ('what', 'sigma', 'layer', 'm', 'variance', 'theory'), rows)
    draw(curves, args, path.with_suffix('.png'))

    print(f'\n| what | sigma | layer |{"".join(f" m={m} |" for m in at)} / theory, m=1 | / theory, last m | slope |\n|{"---|" * (len(at) + 6)}')
    for what, sigma, layer, v, theory in curves:
        cells = [f'{v[m - 1]:.3g}' if m <= len(v) else '' for m in at]
        ratios = [f'{v[0] / theory:.2f}', f'{v[-1] * len(v) / theory:.2f}'] if theory else ['', '']
        print(f'| {what} | {f"{sigma:g}" if sigma else ""} | {layer} | {" | ".join([*cells, *ratios])} | {slope(v):.2f} |')
    print(f'\nwrote {path} and its .png')


if __name__ == '__main__':
    main()
