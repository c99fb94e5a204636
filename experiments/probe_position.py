"""
Where does a frozen Transformer hold the position of a token, and can it be read? Probes at three taps of every layer.

    python experiments/probe_position.py --quick    # about two minutes on two CPU cores: 4 layers of 128, 128 tokens
    python experiments/probe_position.py            # the paper's size, 12 layers of 768, 512 tokens: needs a GPU
    python experiments/probe_position.py --quick --out_dir out/nope-causal-python out/composite-causal-python --shuffled
    python experiments/probe_position.py --quick --model composite --vocab_size 256    # another scheme, few kinds

Answers the probe of Chi et al. 2023 (a random, frozen model knows positions) and Figure 2 of Haviv et al. 2022 (error
per layer of a trained one). Taps: the attention's output o_m, the residual stream after it, the stream after the MLP
(of layer 0: the embedding). Error: mean absolute error in tokens on sequences the probes did not see; always answering
the middle has an error of L/4.
  MLP         two layers with ReLU, the position as L sigmoid(.), trained on the absolute error (a softmax over
              positions, as in Haviv et al., was worse with few sequences)
  linear      ridge regression in closed form
  log-norm    the length of the vector alone, in 64 bins: the median position of each
The first layer of a random model writes position into a variance, an even function: a linear probe finds nothing there
and little later, and an MLP needs many sequences. They are new at every step, and so is the test. Trained runs read
their own validation text, the first 4/5 to train, the rest to test. The table names the kinds of tokens: with few,
their mean vector stands out against the noise, and a linear probe reads more from layer 2 on. So each run is also
probed before its training, on the same text. Controls: initial weights 10 times as large, no causal mask, and
--shuffled: the tokens of each test sequence in random order, the probes as before.
Found with --quick (the middle: 32 tokens): 9.0 by the length of o_m in layer 1, 17.3 by the MLP, 32.2 by the linear
probe; without a mask 32 everywhere; with large weights 32 in layer 1, and 28 at best in later ones. Order hardly
matters, except to a trained kernelized model.
Writes experiments/results/probe_position[-<model>][-trained].png and .csv, or probe_position-<name> with --name; with
--quick out/quick/probe_position-quick[-<model>][-trained].
"""
import argparse
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from attention_variance import before_training, random_model
from lib import (
    REPO, common_flags, merge_table, parse, positive, pyplot, runs_of, save, short_names, text, write_csv)

from sample import load_run

TAPS = ('attention output', 'after attention', 'after MLP')
PROBES = ('MLP', 'linear', 'log-norm')
SIZES = {'n_embd': (768, 128, 'width of the random model'), 'n_head': (12, 4, 'its heads'),  # full, with --quick, help
         'n_layer': (12, 4, 'its layers'), 'block_size': (512, 128, 'tokens in its sequences'),
         'steps': (2000, 200, 'of training the probes'), 'batch': (32, 8, 'sequences in a step'),
         'test': (256, 64, 'sequences'), 'hidden': (256, 128, 'ReLUs of the MLP')}
HEADER = ('model', 'tokens', 'layer', 'tap', 'probe', 'error', 'always the middle')


@torch.no_grad()
def states(model, idx):
    """What the taps see of the tokens idx (B, T): (1 + 3 layers, B T, C), the embedding first."""
    found = []
    hooks = [model.drop.register_forward_hook(lambda _, __, out: found.append(out))]
    for block in model.h:
        hooks.append(block.attn.register_forward_hook(lambda _, __, out: found.append(out)))
        hooks.append(block.ln_2.register_forward_hook(lambda _, args, __: found.append(args[0])))
        hooks.append(block.register_forward_hook(lambda _, __, out: found.append(out)))
    model.hidden(idx.to(model.wte.weight.device))
    for hook in hooks:
        hook.remove()
    return torch.stack(found).float().flatten(1, 2)


def length(x):
    return x.norm(dim=-1).clamp_min(1e-30).log()


def train_probes(model, fresh, args):
    """Probes of all taps at once, on the sequences (batch, T) that fresh() draws.

    -> a function: idx (B, T) to positions (3 probes, taps, B T).
    """
    x = states(model, fresh())
    taps, _, C = x.shape
    mean = x.mean(1, keepdim=True)  # of each channel; the length survives it
    std = x.std(1, keepdim=True).clamp_min(1e-12)
    torch.manual_seed(args.seed)
    net = [torch.randn(taps, C, args.hidden) / math.sqrt(C), torch.zeros(taps, 1, args.hidden),
           torch.zeros(taps, args.hidden, 1), torch.zeros(taps, 1, 1)]
    net = [p.to(x.device).requires_grad_() for p in net]
    optimizer = torch.optim.Adam(net, lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.1)

    def mlp(z):  # (taps, N, C) -> (taps, N), in (0, 1)
        z = torch.baddbmm(net[1], z, net[0]).relu()
        return torch.baddbmm(net[3], z, net[2])[..., 0].sigmoid()

    xx = torch.zeros(taps, C + 1, C + 1, dtype=torch.float64, device=x.device)
    xy = torch.zeros(taps, C + 1, 1, dtype=torch.float64, device=x.device)
    lengths = []
    for step in range(args.steps):
        idx = fresh()
        B, T = idx.shape
        x = states(model, idx)
        z = (x - mean) / std
        m = torch.arange(1, T + 1, device=x.device).repeat(B) / T  # (B T,)
        loss = (mlp(z) - m).abs().mean(1).sum()  # each tap's probe has its own weights: their sum trains them apart
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        w = F.pad(z, (0, 1), value=1)  # the last weight is a bias
        xx += w.mT @ w
        xy += w.mT @ m[:, None]
        if step * B * T < 2 ** 20:  # enough for the medians
            lengths.append(length(x))
    eye = torch.eye(C + 1, dtype=xx.dtype, device=xx.device)
    ridge = 1e-3 * args.steps * B * T * eye  # the channels have variance 1
    linear = torch.linalg.solve(xx + ridge, xy).float()  # (taps, C+1, 1)
    edges, medians = length_bins(torch.cat(lengths, 1), T)

    @torch.no_grad()
    def predict(idx):
        x = states(model, idx)
        z = (x - mean) / std
        by_regression = (F.pad(z, (0, 1), value=1) @ linear)[..., 0].clamp(0, 1) * T
        by_length = medians.gather(1, torch.searchsorted(edges, length(x)))
        return torch.stack((mlp(z) * T, by_regression, by_length))

    return predict


def length_bins(lengths, T):
    """lengths (taps, N), entry n at position n % T + 1 -> edges of 64 bins (taps, 63), median positions (taps, 64)."""
    bins = lengths.argsort(1).tensor_split(64, 1)
    edges = torch.cat([lengths.gather(1, which[:, :1]) for which in bins[1:]], 1)
    medians = torch.stack([(which % T + 1).float().median(1).values for which in bins], 1)
    return edges, medians


def errors(predict, test, batch):
    """Mean absolute error in tokens on the sequences test (B, T): (3 probes, taps)."""
    m = torch.arange(1, test.size(1) + 1)
    parts = [(predict(part).cpu() - m.repeat(len(part))).abs().sum(-1) for part in test.split(batch)]
    return sum(parts) / test.numel()


def draw(rows):
    """Rows of the CSV -> a figure with a panel for each model, not shuffled."""
    chance = {}  # {(model, tokens): error of always answering the middle}
    for row in rows:
        if not row[0].endswith('shuffled'):
            chance[row[:2]] = row[6]
    down = -(-len(chance) // 4)
    wide = min(4, len(chance))
    size = (3.6 * wide, 3 * down)
    fig, axes = pyplot().subplots(down, wide, figsize=size, squeeze=False, layout='constrained')
    for ax, case in zip(axes.flat, chance):
        for tap, color in zip(TAPS, ('C0', 'C1', 'C2')):
            for probe, style in zip(PROBES, ('o-', ':', '^--')):
                line = [row for row in rows if row[:2] == case and row[3:5] == (tap, probe)]
                ax.plot([row[2] for row in line], [row[5] for row in line], style, color=color, lw=1.2, ms=3.5,
                        label=f'{tap}, {probe}')
        ax.axhline(chance[case], color='k', lw=1, ls='-.', label='always the middle')
        ax.set(xlabel='layer (0: the embedding)', ylabel='mean absolute error, tokens', ylim=(0, 1.15 * chance[case]))
        ax.set_title('\n'.join(textwrap.fill(name, 60) for name in case), fontsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', fontsize=8, ncols=5)
    for ax in axes.flat[len(chance):]:
        ax.set_axis_off()
    return fig


def probe(name, tokens, model, fresh, test, generator, args):
    """Train probes on what fresh() draws and test them -> rows of the CSV; with --shuffled two tests."""
    predict = train_probes(model, fresh, args)
    tests = {name: test}
    if args.shuffled:
        tests[f'{name}, test shuffled'] = test.gather(1, torch.rand(test.shape, generator=generator).argsort(1))
    middle = test.size(1) / 4
    rows = []
    for name, idx in tests.items():
        found = errors(predict, idx, args.batch)  # (3 probes, taps)
        print(f'{name}: the best error at a tap is {found.min():.1f}, the middle has {middle:g}', flush=True)
        for probe_name, (embedding, *others) in zip(PROBES, found.tolist()):
            rows.append((name, tokens, 0, TAPS[-1], probe_name, embedding, middle))
            for i, error in enumerate(others):
                rows.append((name, tokens, 1 + i // 3, TAPS[i % 3], probe_name, error, middle))
    return rows


def probe_random(args):
    """Rows for random models: as they are, with large weights, without the mask."""
    scheme = args.model or 'nope'
    rows = []
    for what, times, causal in (('', 1, True), (', weights x 10', 10, True), (', no causal mask', 1, False)):
        model = random_model(scheme, args.sigma * times, args.seed, args.device, causal=causal,
                             vocab_size=args.vocab_size, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd,
                             block_size=args.block_size, scale_residual_init=args.scaled_init)
        generator = torch.Generator().manual_seed(args.seed)

        def draw_tokens(n):
            return torch.randint(args.vocab_size, (n, args.block_size), generator=generator)
        rows += probe(f'random {scheme}{what}', f'{args.vocab_size} kinds, random', model,
                      lambda: draw_tokens(args.batch), draw_tokens(args.test), generator, args)
    return rows


def probe_trained(name, out_dir, args):
    """Rows for a run before and after its training."""
    model, checkpoint = load_run(out_dir, None, args.device)
    T = model.config.block_size
    val = torch.from_numpy(text(checkpoint['settings']['dataset'], args.data_dir)[1].astype(np.int64))
    val, rest = val.tensor_split([len(val) * 4 // 5])
    test = rest[:len(rest) // T * T].view(-1, T)
    test = test[torch.linspace(0, len(test) - 1, min(len(test), args.test)).long()]  # from all over it
    tokens = f'{checkpoint["meta"]["vocab_size"]} kinds, text'
    rows = []
    for what, which in (('before training', before_training(model, checkpoint)), ('trained', model)):
        generator = torch.Generator().manual_seed(args.seed)

        def draw_windows():
            starts = torch.randint(len(val) - T + 1, (args.batch, 1), generator=generator)
            return val[starts + torch.arange(T)]  # (batch, T)
        rows += probe(f'{what}: {name}', tokens, which, draw_windows, test, generator, args)
    return rows


def print_table(rows):
    heads = ' | '.join(f'{tap}: MLP / linear / log-norm' for tap in TAPS)
    print(f'\n| model | tokens | layer | {heads} | always the middle |\n|' + '---|' * 7)
    for name, tokens, layer, middle in dict.fromkeys((*row[:3], row[6]) for row in rows):
        cells = []
        for tap in TAPS:
            cells.append(' / '.join(f'{row[5]:.1f}' for row in rows if row[:4] == (name, tokens, layer, tap)))
        print(f'| {name} | {tokens} | {layer} | {" | ".join(cells)} | {middle:g} |')


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = (*REPO.glob('model_*.py'), *REPO.glob('baselines/model_*.py'))
    models = sorted(path.stem[6:] for path in files)
    parser.add_argument('--model', choices=models,
                        help='probe random models of this file (default nope, if there is no --out_dir)')
    for name, (full, quick, note) in SIZES.items():
        parser.add_argument(f'--{name}', type=positive, help=f'{note} (default {full}, {quick} with --quick)')
    parser.add_argument('--learning_rate', type=float, default=1e-2, help='of the MLP (default 0.01)')
    parser.add_argument('--sigma', type=float, default=0.02, help='of the initial weights at width 768 (default 0.02)')
    parser.add_argument('--scaled_init', action='store_true',
                        help='random models with residual projections divided by sqrt(2 n_layer), as in GPT-2')
    parser.add_argument('--vocab_size', type=positive, default=50304, help='kinds of random tokens (default 50304)')
    parser.add_argument('--out_dir', nargs='+', default=[], help='folders of trained runs, of any model')
    parser.add_argument('--data_dir', default='data', help='where their prepared text is (default data)')
    parser.add_argument('--shuffled', action='store_true',
                        help='each test once more, with the tokens of its sequences in random order')
    parser.add_argument('--seed', type=int, default=1, help='of weights, tokens and probes (default 1)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    common_flags(parser, 'a smaller model and fewer steps', dataset=False, name=True)
    args = parse(parser, {name: (full, quick) for name, (full, quick, _) in SIZES.items()})
    if args.name and args.out_dir:
        parser.error('give --out_dir or --name, not both')
    if args.name:
        args.out_dir = runs_of(args.name)
    return args


def main():
    args = arguments()
    names = short_names(args.out_dir)
    print(f'on {args.device}', flush=True)
    if args.device.startswith('cuda'):
        torch.set_float32_matmul_precision('high')  # TF32: its rounding is far below the noise of the probes
    rows = []
    if args.model or not args.out_dir:
        rows += probe_random(args)
    for name, out_dir in zip(names, args.out_dir):
        rows += probe_trained(name, out_dir, args)
    parts = ['probe_position', 'quick' if args.quick else '', args.model, 'trained' if args.out_dir else '']
    path = Path(args.results, '-'.join(part for part in parts if part) + '.csv')
    if args.name:
        path = path.with_name(f'probe_position-{args.name}.csv')
        sizes = ', '.join(f'{name} {getattr(args, name)}' for name in ('steps', 'batch', 'test', 'hidden', 'seed'))
        rows = merge_table(path, HEADER, rows, 2, sizes)
    else:
        write_csv(path.parent, path.stem, HEADER, rows)
    print_table(rows)
    save(draw(rows), path)


if __name__ == '__main__':
    main()
