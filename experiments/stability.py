"""
Plain random-feature attention against the normalised one with relative positions, as the learning rate rises: who stays stable?

    python experiments/stability.py --quick    # 60 steps, two learning rates
    python experiments/stability.py            # 400 steps, learning rates 1e-3, 3e-3, 1e-2, 3e-2, 1e-1

Answers the claim of Luo et al. 2021 that plain PRF attention cannot be trained from scratch at BERT's size ("all attempts diverged") and
that NPRF with RPE can; the authors find every variant stable in small translation models. Shown: training loss, norm of the gradient before
clipping at 1, and the largest |q||k| of any head (after scaling; what the features' error grows with: Theorem 3; normalised it is 1).
One seed. A loss that is not finite ends its run.
Writes experiments/results/stability.csv and .png.
"""
import argparse
import math

import torch
from lib import common_flags, optimise, positive, pyplot, save, text, write_csv

import model_kernelized as M

MODELS = {'plain PRF': dict(normalize=False, rpe=False), 'PRF + b': dict(normalize=False), 'NPRF': dict(rpe=False), 'NPRF + b': dict()}


def watch(model):
    """-> a list that holds, for each forward pass and layer, the largest |q||k| of what the features get to see."""
    seen = []

    def hook(attention, _, out):
        q, k = (t.detach().unflatten(-1, (attention.n_head, -1)).norm(dim=-1) for t in out.chunk(3, -1)[:2])
        seen.append(1.0 if attention.normalize else (q.amax((0, 1)) * k.amax((0, 1))).max().item() / math.sqrt(out.size(-1) / 3 / attention.n_head))
    for block in model.h:
        block.attn.c_attn.register_forward_hook(lambda _, args, out, attention=block.attn: hook(attention, args, out))
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=positive, default=400, help='of training (default 400)')
    parser.add_argument('--rates', nargs='+', type=float, default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1], help='learning rates')
    common_flags(parser, '60 steps, two learning rates')
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rates = min(args.steps, 60), args.rates[1:4:2]
    train, _, meta = text(args.dataset, args.data_dir)
    device, rows = 'cuda' if torch.cuda.is_available() else 'cpu', []
    print('| learning rate | model | mean loss of the last tenth | largest loss after the warm-up | largest gradient norm | largest \\|q\\|\\|k\\| |\n|' + '---|' * 6)
    for rate in args.rates:
        for name, fields in MODELS.items():
            torch.manual_seed(1)
            model = M.Model(M.Config(vocab_size=-(-(meta['vocab_size'] + 1) // 64) * 64, attention='dense', **fields)).to(device)
            seen, run = watch(model), []
            for step, loss, norm in optimise(model, train, args.steps, learning_rate=rate, device=device):
                run.append((rate, name, step, loss, norm, max(seen)))
                seen.clear()
                if not math.isfinite(loss + norm):
                    break
            rows += run
            last, late = run[-max(1, args.steps // 10):], run[40:] or run
            print(f'| {rate:g} | {name} | {sum(r[3] for r in last) / len(last):.3f}{"" if len(run) == args.steps else f" (not finite at step {len(run)})"} | '
                  f'{max(r[3] for r in late):.2f} | {max(r[4] for r in run):.2f} | {max(r[5] for r in run):.1f} |', flush=True)
    path = write_csv(args.results, 'stability' + '-quick' * args.quick, ('learning_rate', 'model', 'step', 'loss', 'gradient_norm', 'largest_qk'), rows)
    plt = pyplot()
    fig, axes = plt.subplots(3, len(args.rates), figsize=(3.2 * len(args.rates) + 1, 8), sharex=True, sharey='row', squeeze=False, layout='constrained')
    for column, rate in zip(axes.T, args.rates):
        for i, name in enumerate(MODELS):
            run = [r for r in rows if r[:2] == (rate, name)]
            for ax, what in zip(column, (3, 4, 5)):
                ax.plot([r[2] for r in run], [r[what] for r in run], color=f'C{i}', lw=1, label=name)
                ax.grid(alpha=0.3)
        column[0].set_title(f'learning rate {rate:g}')
        column[1].set_yscale('log')
        column[2].set_yscale('log')
        column[2].set_xlabel('step')
    for ax, label in zip(axes[:, 0], ('training loss (nats per token)', 'gradient norm', 'largest |q||k|')):
        ax.set_ylabel(label)
    axes[0, 0].legend()
    save(fig, path)


if __name__ == '__main__':
    main()
