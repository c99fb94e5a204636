"""
Plain random-feature attention against the normalised one with relative positions, as the learning rate rises: which
models stay stable?

    python experiments/stability.py --quick    # 60 steps, two learning rates
    python experiments/stability.py            # 400 steps, learning rates 1e-3, 3e-3, 1e-2, 3e-2, 1e-1

Answers the claim of Luo et al. 2021 that plain PRF attention cannot be trained from scratch at BERT's size ("all
attempts diverged") and that NPRF with RPE can; the authors find every variant stable in small translation models.
Shown: training loss, norm of the gradient before clipping at 1, and the largest |q||k| of any head after scaling. The
error of the features grows with it (Theorem 3); with normalisation it is 1.
One seed. A loss that is not finite ends its run.
Writes experiments/results/stability.csv and .png (with --quick out/quick/stability-quick).
"""
import argparse
import math

import torch
from lib import common_flags, optimise, parse, positive, pyplot, save, text, write_csv

import model_kernelized as M

MODELS = {'plain PRF': dict(normalize=False, rpe=False), 'PRF + b': dict(normalize=False), 'NPRF': dict(rpe=False),
          'NPRF + b': dict()}
HEADER = ('learning_rate', 'model', 'step', 'loss', 'gradient_norm', 'largest_qk')


def watch(model):
    """-> a list that gets, at each forward pass, the largest |q||k| of each layer that the features are made of."""
    seen = []

    def look(attention, out):
        if attention.normalize:
            seen.append(1.0)
            return
        q, k, _ = out.chunk(3, -1)
        q = q.detach().unflatten(-1, (attention.n_head, -1)).norm(dim=-1)  # (B, T, nh)
        k = k.detach().unflatten(-1, (attention.n_head, -1)).norm(dim=-1)
        hs = out.size(-1) / 3 / attention.n_head
        seen.append((q.amax((0, 1)) * k.amax((0, 1))).max().item() / math.sqrt(hs))
    for block in model.h:
        block.attn.c_attn.register_forward_hook(lambda _, args, out, attention=block.attn: look(attention, out))
    return seen


def train(rate, name, ids, vocab_size, steps, device):
    """Rows of one run, until its end or the first loss that is not finite."""
    torch.manual_seed(1)
    model = M.Model(M.Config(vocab_size=vocab_size, attention='dense', **MODELS[name])).to(device)
    seen = watch(model)
    rows = []
    for step, loss, norm in optimise(model, ids, steps, learning_rate=rate, device=device):
        rows.append((rate, name, step, loss, norm, max(seen)))
        seen.clear()
        if not math.isfinite(loss + norm):
            break
    return rows


def print_row(rows, steps):
    rate, name = rows[0][:2]
    last = rows[-max(1, steps // 10):]
    late = rows[40:] or rows  # after the warm-up
    mean = sum(row[3] for row in last) / len(last)
    note = '' if len(rows) == steps else f' (not finite at step {len(rows)})'
    largest_loss = max(row[3] for row in late)
    largest_norm = max(row[4] for row in rows)
    largest_qk = max(row[5] for row in rows)
    print(f'| {rate:g} | {name} | {mean:.3f}{note} | {largest_loss:.2f} | {largest_norm:.2f} | {largest_qk:.1f} |',
          flush=True)


def draw(rows, rates):
    fig, axes = pyplot().subplots(3, len(rates), figsize=(3.2 * len(rates) + 1, 8), sharex=True, sharey='row',
                                  squeeze=False, layout='constrained')
    for column, rate in zip(axes.T, rates):
        for i, name in enumerate(MODELS):
            run = [row for row in rows if row[:2] == (rate, name)]
            for ax, what in zip(column, (3, 4, 5)):
                ax.plot([row[2] for row in run], [row[what] for row in run], color=f'C{i}', lw=1, label=name)
                ax.grid(alpha=0.3)
        column[0].set_title(f'learning rate {rate:g}')
        column[1].set_yscale('log')
        column[2].set_yscale('log')
        column[2].set_xlabel('step')
    for ax, label in zip(axes[:, 0], ('training loss (nats per token)', 'gradient norm', 'largest |q||k|')):
        ax.set_ylabel(label)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=positive, default=400, help='of training (default 400)')
    parser.add_argument('--rates', nargs='+', type=float, default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1], help='learning rates')
    common_flags(parser, '60 steps, two learning rates')
    args = parse(parser)
    if args.quick:
        args.steps = min(args.steps, 60)
        args.rates = args.rates[1:4:2]
    return args


def main():
    args = arguments()
    ids, _, meta = text(args.dataset, args.data_dir)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    vocab_size = -(-(meta['vocab_size'] + 1) // 64) * 64
    rows = []
    print('| learning rate | model | mean loss of the last tenth | largest loss after the warm-up '
          '| largest gradient norm | largest \\|q\\|\\|k\\| |\n|' + '---|' * 6)
    for rate in args.rates:
        for name in MODELS:
            run = train(rate, name, ids, vocab_size, args.steps, device)
            print_row(run, args.steps)
            rows += run
    path = write_csv(args.results, 'stability-quick' if args.quick else 'stability', HEADER, rows)
    save(draw(rows, args.rates), path)


if __name__ == '__main__':
    main()
