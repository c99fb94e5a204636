"""
Where does a frozen Transformer hold the position of a token, and can it be read? Probes at three taps of every layer.

    python experiments/probe_position.py --quick    # about two minutes on two CPU cores: 4 layers of 128, 128 tokens
    python experiments/probe_position.py            # the paper's size, 12 layers of 768, 512 tokens: needs a GPU
    python experiments/probe_position.py --quick out/nope-causal-shakespeare out/composite-causal-shakespeare
    python experiments/probe_position.py --quick --name enwik8-8000    # the causal runs of compare.py

Answers the probe of Chi et al. 2023 (a random, frozen model knows positions) and Figure 2 of Haviv et al. 2022 (error
per layer of a trained one). Taps: the output of attention, the residual stream after it, and the stream after the MLP
(of layer 0: the embedding). Error: mean absolute error in tokens on sequences that the probes did not see. Always
answering the middle has an error of T/4.
  MLP         two layers with ReLU, the position as T sigmoid(.), trained on the absolute error
  linear      ridge regression in closed form
  log-norm    the norm of the vector alone, in 64 bins: the median position of each
Random models get new random tokens at every step; controls are initial weights 10 times as large, and no causal mask.
Trained runs read their validation tokens, the first 4/5 to train the probes, the rest to test; each is also probed
before its training, and tested with the tokens of each test sequence shuffled.
Writes experiments/results/probe_position[-<name>].csv and .png (with --quick in out/quick).
"""
import math
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from attention_variance import DEVICE, random_model
from lib import (
    Parser, before_training, data_set, in_order, merge_csv, print_table, pyplot, runs_of, save, sequences,
    short_names, table_path)

from sample import load_run

TAPS = ('attention output', 'after attention', 'after MLP')
PROBES = ('MLP', 'linear', 'log-norm')
FULL = dict(n_embd=768, n_head=12, n_layer=12, block_size=512)  # the paper's size
SMALL = dict(n_embd=128, n_head=4, n_layer=4, block_size=128)
HEADER = ('model', 'tokens', 'layer', 'tap', 'probe', 'error', 'always the middle')


@torch.no_grad()
def states(model, idx):
    """The vectors at all taps for the tokens idx (B, T): (1 + 3 layers, B T, C), the embedding first."""
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


def log_norm(x):
    return x.norm(dim=-1).clamp_min(1e-30).log()


def train_probes(model, fresh, args):
    """Train probes of all taps together on the sequences (batch, T) that fresh() draws.

    Returns a function from idx (B, T) to positions (3 probes, taps, B T).
    """
    x = states(model, fresh())
    taps, _, C = x.shape
    mean = x.mean(1, keepdim=True)
    std = x.std(1, keepdim=True).clamp_min(1e-12)
    torch.manual_seed(args.seed)
    net = [torch.randn(taps, C, args.hidden) / math.sqrt(C), torch.zeros(taps, 1, args.hidden),
           torch.zeros(taps, args.hidden, 1), torch.zeros(taps, 1, 1)]
    net = [p.to(x.device).requires_grad_() for p in net]
    optimizer = torch.optim.Adam(net, lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, args.steps, pct_start=0.1)

    def mlp(z):
        """z (taps, N, C) -> (taps, N), in (0, 1)."""
        z = torch.baddbmm(net[1], z, net[0]).relu()
        return torch.baddbmm(net[3], z, net[2])[..., 0].sigmoid()

    xx = torch.zeros(taps, C + 1, C + 1, dtype=torch.float64, device=x.device)
    xy = torch.zeros(taps, C + 1, 1, dtype=torch.float64, device=x.device)
    norms = []
    for step in range(args.steps):
        idx = fresh()
        B, T = idx.shape
        x = states(model, idx)
        z = (x - mean) / std
        m = torch.arange(1, T + 1, device=x.device).repeat(B) / T  # (B T,)
        loss = (mlp(z) - m).abs().mean(1).sum()  # each tap has its own weights, so the sum trains them separately
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        w = F.pad(z, (0, 1), value=1)  # the last weight is a bias
        xx += w.mT @ w
        xy += w.mT @ m[:, None]
        if step * B * T < 2 ** 20:  # enough for the medians
            norms.append(log_norm(x))
    eye = torch.eye(C + 1, dtype=xx.dtype, device=xx.device)
    linear = torch.linalg.solve(xx + 1e-3 * args.steps * B * T * eye, xy).float()  # (taps, C+1, 1)
    edges, medians = norm_bins(torch.cat(norms, 1), T)

    @torch.no_grad()
    def predict(idx):
        x = states(model, idx)
        z = (x - mean) / std
        by_regression = (F.pad(z, (0, 1), value=1) @ linear)[..., 0].clamp(0, 1) * T
        by_norm = medians.gather(1, torch.searchsorted(edges, log_norm(x)))
        return torch.stack((mlp(z) * T, by_regression, by_norm))

    return predict


def norm_bins(norms, T):
    """norms (taps, N), entry n at position n % T + 1 -> edges of 64 bins (taps, 63), median positions (taps, 64)."""
    bins = norms.argsort(1).tensor_split(64, 1)
    edges = torch.cat([norms.gather(1, which[:, :1]) for which in bins[1:]], 1)
    medians = torch.stack([(which % T + 1).float().median(1).values for which in bins], 1)
    return edges, medians


def errors(predict, test, batch):
    """Mean absolute error in tokens on the sequences test (B, T): (3 probes, taps)."""
    m = torch.arange(1, test.size(1) + 1)
    parts = [(predict(part).cpu() - m.repeat(len(part))).abs().sum(-1) for part in test.split(batch)]
    return sum(parts) / test.numel()


def probe(name, tokens, model, fresh, tests, args):
    """Train probes on what fresh() draws; tests {suffix of the name: sequences} -> rows of the CSV."""
    predict = train_probes(model, fresh, args)
    rows = []
    for suffix, idx in tests.items():
        found = errors(predict, idx, args.batch)  # (3 probes, taps)
        middle = idx.size(1) / 4
        print(f'{name}{suffix}: the smallest error at a tap is {found.min():.1f}', flush=True)
        for probe_name, (embedding, *others) in zip(PROBES, found.tolist()):
            rows.append((name + suffix, tokens, 0, TAPS[-1], probe_name, embedding, middle))
            for i, error in enumerate(others):
                rows.append((name + suffix, tokens, 1 + i // 3, TAPS[i % 3], probe_name, error, middle))
    return rows


def probe_random(args, size):
    """Rows for random models: as they are, with large weights, without the mask."""
    rows = []
    for what, times, causal in (('', 1, True), (', weights x 10', 10, True), (', no causal mask', 1, False)):
        model = random_model('nope', 0.02 * times, args.seed, DEVICE, causal=causal, vocab_size=args.vocab_size, **size)
        generator = torch.Generator().manual_seed(args.seed)

        def draw_tokens(n):
            return torch.randint(args.vocab_size, (n, size['block_size']), generator=generator)
        rows += probe(f'random nope{what}', f'{args.vocab_size} kinds, random', model,
                      lambda: draw_tokens(args.batch), {'': draw_tokens(args.test)}, args)
    return rows


def probe_trained(name, out_dir, args):
    """Rows for a run before and after its training."""
    model, checkpoint = load_run(out_dir, None, DEVICE)
    T = model.config.block_size
    val = data_set(checkpoint['settings']['dataset'], args.data_dir)[1]
    split = len(val) * 4 // 5
    test = sequences(val[split:], args.test, T)
    val = torch.from_numpy(val[:split].astype(np.int64))
    tokens = f'{checkpoint["meta"]["vocab_size"]} kinds, text'
    rows = []
    for what, which in (('before training', before_training(model, checkpoint)), ('trained', model)):
        generator = torch.Generator().manual_seed(args.seed)

        def draw_sequences():
            starts = torch.randint(len(val) - T + 1, (args.batch, 1), generator=generator)
            return val[starts + torch.arange(T)]  # (batch, T)
        shuffled = test.gather(1, torch.rand(test.shape, generator=torch.Generator().manual_seed(1)).argsort(1))
        rows += probe(f'{what}: {name}', tokens, which, draw_sequences, {'': test, ', test shuffled': shuffled}, args)
    return rows


def error_table(rows):
    """Rows of the CSV -> the error at every layer and tap of random models."""
    cells = []
    for name, layer in dict.fromkeys((row[0], str(row[2])) for row in rows):
        of_layer = {(row[3], row[4]): float(row[5]) for row in rows if (row[0], str(row[2])) == (name, layer)}
        if len(of_layer) == 9 and name.startswith('random'):
            taps = (' / '.join(f'{of_layer[tap, probe]:.1f}' for probe in PROBES) for tap in TAPS)
            cells.append((name, layer, *taps))
    return ('model', 'layer', *(f'{tap}: MLP / linear / log-norm' for tap in TAPS)), cells


def last_layer_table(rows):
    """Rows of the CSV -> the error after the last layer of trained runs."""
    found = {(row[0], row[4], int(row[2])): float(row[5]) for row in rows if row[3] == 'after MLP'}
    runs = [name.removeprefix('trained: ') for name, _, _ in found if name.startswith('trained') and ',' not in name]
    schemes = {run.rsplit('-', 1)[0]: run for run in runs}
    cells = []
    for scheme in in_order(schemes):
        run = schemes[scheme]
        last = max(layer for name, _, layer in found if name == f'trained: {run}')
        both = [', '.join(f'{found[f"{what}: {run}", probe, last]:.1f}' for what in ('before training', 'trained'))
                for probe in ('MLP', 'linear')]
        shuffled = found.get((f'trained: {run}, test shuffled', 'MLP', last))
        cells.append((run, *both, '-' if shuffled is None else f'{shuffled:.1f}'))
    return ('run', 'MLP: before, after training', 'linear: before, after', 'MLP after training, test shuffled'), cells


def draw(rows):
    """A panel for each model, without shuffled tests."""
    chance = {row[:2]: float(row[6]) for row in rows if not row[0].endswith('shuffled')}
    wide = min(6, len(chance))
    down = -(-len(chance) // wide)
    fig, axes = pyplot().subplots(down, wide, figsize=(2.8 * wide, 2.4 * down), squeeze=False, layout='constrained')
    for ax, case in zip(axes.flat, chance):
        for tap, color in zip(TAPS, ('C0', 'C1', 'C2')):
            for probe, style in zip(PROBES, ('o-', ':', '^--')):
                line = [(int(row[2]), float(row[5])) for row in rows if row[:2] == case and row[3:5] == (tap, probe)]
                ax.plot(*zip(*line), style, color=color, lw=1.2, ms=3, label=f'{tap}, {probe}')
        ax.axhline(chance[case], color='k', lw=1, ls='-.', label='always the middle')
        ax.set(xlabel='layer (0: the embedding)', ylabel='error, tokens', ylim=(0, 1.15 * chance[case]))
        ax.set_title(textwrap.fill(case[0], 40), fontsize=8)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', fontsize=8, ncols=5)
    for ax in axes.flat[len(chance):]:
        ax.set_axis_off()
    return fig


def main():
    parser = Parser(__doc__, 'a smaller random model and fewer steps')
    parser.add_argument('out_dirs', nargs='*', help='folders of trained runs, of any model')
    parser.add_argument('--name', help='all causal runs of this --name of compare.py; other rows stay in the table')
    parser.add('--steps', 2000, 200, 'of training the probes')
    parser.add('--test', 256, 64, 'sequences in the test')
    parser.add('--vocab_size', 50304, note='number of different random tokens')
    parser.add('--seed', 1, note='of weights, tokens and probes')
    parser.add_data()
    args = parser.parse_args()
    args.batch, args.hidden = (8, 128) if args.quick else (32, 256)  # sequences in a step; hidden units of the MLP
    if args.name and args.out_dirs:
        parser.error('give folders of runs or --name, not both')
    out_dirs = runs_of(args.name) if args.name else args.out_dirs
    path = args.results / f'probe_position-{args.name}.csv' if args.name else table_path(args, 'probe_position')
    if not args.name:
        path.unlink(missing_ok=True)
    sizes = ', '.join(f'{name} {getattr(args, name)}' for name in ('steps', 'batch', 'test', 'hidden', 'seed'))
    rows = [] if out_dirs else probe_random(args, SMALL if args.quick else FULL)
    for name, out_dir in zip(short_names(out_dirs), out_dirs):
        rows += probe_trained(name, out_dir, args)
    rows = merge_csv(path, HEADER, rows, 2, sizes)
    print_table(last_layer_table(rows) if out_dirs else error_table(rows))
    save(draw(rows), path)


if __name__ == '__main__':
    main()
