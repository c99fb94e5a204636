"""
Train with softmax, then swap in random features without fine-tuning: which models survive?

    python experiments/convert.py --quick    # one seed, 100 steps: does it run?
    python experiments/convert.py            # four models, three seeds, 400 steps each, then m = 16 ... 512 features, five draws of each

Answers Figure 2 of Luo et al. 2021 (de-en translation, BLEU: oracle, then m = 16 ... 512): standard 35.2 falls to 10.9 ... 19.4, with b 35.4 to
24.3 ... 30.3, normalised 33.5 to 25.8 ... 32.8, normalised with b 35.2 to 34.3 ... 34.9. Here: a causal language model on the bytes of Python's
standard library, validation loss in nats. The oracle is model_kernelized.py with its features replaced by what they estimate, exp(q.k).
Writes experiments/results/convert.csv and .png.
"""
import argparse
import statistics

import torch
import torch.nn.functional as F
from lib import common_flags, optimise, positive, pyplot, save, text, validation, write_csv

import model_kernelized as M

MODELS = {'standard': dict(normalize=False, rpe=False), 'standard + b': dict(normalize=False), 'normalised': dict(rpe=False), 'normalised + b': dict()}
SIZES = (16, 32, 64, 128, 256, 512)


def exact(self, x, valid=None, state=None):
    """Attention.forward of model_kernelized.py with softmax in place of features."""
    B, T, C = x.shape
    q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, 2))
    q, k = (F.normalize(t, dim=-1, eps=1e-4) if self.normalize else t * t.size(-1) ** -0.25 for t in (q, k))
    mask = x.new_zeros(1, T, T) if self.b is None else M.spread(self.b[:, None].expand(-1, T, -1), 0, T)
    mask = mask.masked_fill(~M.visible(T, T, True, None, x.device), float('-inf'))
    y = F.scaled_dot_product_attention(q, k, v, mask[None].expand(B, self.n_head, T, T), scale=1.0)
    return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=positive, default=400, help='of training (default 400)')
    parser.add_argument('--seeds', type=positive, default=3, help='trained models of each kind (default 3)')
    parser.add_argument('--draws', type=positive, default=5, help='of the random features (default 5)')
    parser.add_argument('--tokens', type=positive, default=16384, help='of the validation text (default 16384)')
    common_flags(parser, 'one seed, 100 steps, two draws')
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.draws = min(args.steps, 100), 1, 2
    train, val, meta = text(args.dataset, args.data_dir)
    device, forward, rows = 'cuda' if torch.cuda.is_available() else 'cpu', M.Attention.forward, []
    for name, fields in MODELS.items():
        for seed in range(1, args.seeds + 1):
            torch.manual_seed(seed)
            config = M.Config(vocab_size=-(-(meta['vocab_size'] + 1) // 64) * 64, attention='dense', **fields)
            model = M.Model(config).to(device)
            M.Attention.forward = exact
            for step, loss, _ in optimise(model, train, args.steps, seed=seed, device=device):
                pass
            rows.append((name, seed, 0, 0, validation(model, val, config.block_size, args.tokens, device=device)))
            print(f'{name} seed {seed}: softmax {rows[-1][-1]:.4f}', flush=True)
            M.Attention.forward = forward
            for m in SIZES:
                for draw in range(args.draws):
                    torch.manual_seed(1000 * seed + draw)
                    for block in model.h:
                        block.attn.w = M.random_matrix(m, config.n_embd // config.n_head).to(device)
                    rows.append((name, seed, m, draw, validation(model, val, config.block_size, args.tokens, device=device)))
    path = write_csv(args.results, 'convert' + '-quick' * args.quick, ('model', 'seed', 'm', 'draw', 'val_loss'), rows)

    loss = {(name, m): [r[4] for r in rows if r[0] == name and r[2] == m] for name in MODELS for m in (0, *SIZES)}
    print('\n| model | softmax | ' + ' | '.join(f'm = {m}' for m in SIZES) + ' |\n|' + '---|' * 8)
    for name in MODELS:
        print(f'| {name} | ' + ' | '.join(f'{statistics.mean(loss[name, m]):.3f}' for m in (0, *SIZES)) + ' |')
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.5, 4.2), layout='constrained')
    for i, name in enumerate(MODELS):
        mean, spread = ([f(loss[name, m]) for m in SIZES] for f in (statistics.mean, lambda x: statistics.stdev(x) if len(x) > 1 else 0))
        ax.errorbar(SIZES, mean, spread, fmt='o-', capsize=2, color=f'C{i}', label=name)
        ax.axhline(statistics.mean(loss[name, 0]), color=f'C{i}', ls=':', lw=1)
    ax.set(xscale='log', xlabel='m (features), swapped in without training', ylabel='validation loss (nats per token)\ndotted: the softmax it was trained with')
    ax.set_xticks(SIZES, SIZES)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    save(fig, path)


if __name__ == '__main__':
    main()
