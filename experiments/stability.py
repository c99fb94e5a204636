"""
Which random-feature models stay stable as the learning rate rises: plain or normalized, without or with b?

    python experiments/stability.py --quick    # 60 steps, two learning rates
    python experiments/stability.py            # 400 steps, learning rates 1e-3, 3e-3, 1e-2, 3e-2, 1e-1

Answers the claim of Luo et al. 2021 that plain PRF attention cannot be trained from scratch at BERT's size ("all
attempts diverged") and that NPRF with RPE can; the authors find every variant stable in small translation models.
Shown: training loss, gradient norm before clipping at 1, and the largest |q||k| of any head after scaling. The error of
the features grows with it (Theorem 3); with normalization it is 1. A loss that is not finite ends its run.
Writes experiments/results/stability.csv and .png (with --quick in out/quick).
"""
import math

import torch
from lib import Parser, data_set, line_panels, optimize, print_table, rate, save, table_path, vocab_size, write_csv

import model_kernelized as M

MODELS = {'plain PRF': dict(normalize=False, rpe=False), 'PRF + b': dict(normalize=False), 'NPRF': dict(rpe=False),
          'NPRF + b': dict()}
HEADER = ('learning_rate', 'model', 'step', 'loss', 'gradient_norm', 'largest_qk')


def watch(model):
    """-> a list that gets, at each forward pass, the largest |q||k| of each layer."""
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


def train(learning_rate, name, ids, rows_of_embedding, steps, device):
    """Rows of one run, until its end or the first loss that is not finite."""
    torch.manual_seed(1)
    model = M.Model(M.Config(vocab_size=rows_of_embedding, attention='dense', **MODELS[name])).to(device)
    seen = watch(model)
    rows = []
    for step, loss, norm in optimize(model, ids, steps, learning_rate):
        rows.append((learning_rate, name, step, loss, norm, max(seen)))
        seen.clear()
        if not math.isfinite(loss + norm):
            break
    return rows


def stability_table(rows):
    """A line per run; the warm-up of 40 steps does not count for the largest loss."""
    steps = max(int(row[2]) for row in rows)
    cells = []
    for key in dict.fromkeys(row[:2] for row in rows):
        loss, norm, qk = zip(*(map(float, row[3:]) for row in rows if row[:2] == key))
        last = loss[-max(1, steps // 10):]
        note = '' if len(loss) == steps else f' (not finite at step {len(loss)})'
        cells.append((f'{float(key[0]):g}', key[1], f'{sum(last) / len(last):.3f}{note}',
                      f'{max(loss[40:] or loss):.2f}', f'{max(norm):.2f}', f'{max(qk):.1f}'))
    return ('learning rate', 'model', 'mean loss of the last tenth', 'largest loss after the warm-up',
            'largest gradient norm', 'largest \\|q\\|\\|k\\|'), cells


def draw(rows):
    panels = {}
    for value, name, step, loss, _, _ in rows:
        x, y = panels.setdefault(f'learning rate {float(value):g}', {}).setdefault(name, ([], []))
        x.append(int(step))
        y.append(float(loss))
    return line_panels(panels, 'step', 'training loss (nats per token)', '-')


def main():
    parser = Parser(__doc__, '60 steps, two learning rates')
    parser.add('--steps', 400, 60, 'of training')
    parser.add('--rates', [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], [3e-3, 3e-2], 'learning rates', nargs='+', type=rate)
    parser.add_data('shakespeare')
    args = parser.parse_args()
    ids, _, meta = data_set(args.dataset, args.data_dir)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = []
    for learning_rate in args.rates:
        for name in MODELS:
            print(f'learning rate {learning_rate:g}, {name}', flush=True)
            rows += train(learning_rate, name, ids, vocab_size(meta), args.steps, device)
    path = table_path(args, 'stability')
    write_csv(path, HEADER, rows)
    print_table(stability_table(rows))
    save(draw(rows), path)


if __name__ == '__main__':
    main()
