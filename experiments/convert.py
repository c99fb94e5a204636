"""
Train with softmax, then swap in random features without fine-tuning: which models survive?

    python experiments/convert.py --quick    # one seed, 100 steps: does it run?
    python experiments/convert.py            # four models, three seeds, 400 steps each; then m = 16 ... 512, five draws

Answers Figure 2 of Luo et al. 2021 (de-en translation, BLEU: oracle, then m = 16 ... 512): standard 35.2 falls to
10.9 ... 19.4, with b 35.4 to 24.3 ... 30.3, normalised 33.5 to 25.8 ... 32.8, normalised with b 35.2 to 34.3 ... 34.9.
Here: a causal language model on the bytes of Python's standard library, validation loss in nats. The oracle is
model_kernelized.py with its features replaced by what they estimate, exp(q.k).
Writes experiments/results/convert.csv and .png (with --quick out/quick/convert-quick).
"""
import argparse
import statistics

import torch
import torch.nn.functional as F
from lib import common_flags, optimise, parse, positive, pyplot, save, text, validation, write_csv

import model_kernelized as M

MODELS = {'standard': dict(normalize=False, rpe=False), 'standard + b': dict(normalize=False),
          'normalised': dict(rpe=False), 'normalised + b': dict()}
SIZES = (16, 32, 64, 128, 256, 512)


def exact(self, x, valid=None, state=None):
    """Attention.forward of model_kernelized.py with softmax in place of features, as an explicit (T, T) matrix."""
    B, T, C = x.shape
    q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, 2))
    if self.normalize:
        q = F.normalize(q, dim=-1, eps=1e-4)
        k = F.normalize(k, dim=-1, eps=1e-4)
    else:
        q = q * q.size(-1) ** -0.25
        k = k * k.size(-1) ** -0.25
    scores = q @ k.transpose(2, 3)  # (B, nh, T, T)
    offset = torch.arange(T, device=x.device) - torch.arange(T, device=x.device)[:, None]  # (T, T): j - i
    if self.b is not None:
        R = self.b.size(1) // 2
        scores = scores + self.b[:, offset.clamp(-R, R) + R]  # b (nh, 2R+1)
    scores = scores.masked_fill(offset > 0, float('-inf'))  # causal
    y = scores.softmax(-1) @ v  # (B, nh, T, hs)
    return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def train_with_softmax(fields, ids, vocab_size, steps, seed, device):
    """A model of model_kernelized.py, trained with `exact` in place of its attention."""
    torch.manual_seed(seed)
    model = M.Model(M.Config(vocab_size=vocab_size, attention='dense', **fields)).to(device)
    for _ in optimise(model, ids, steps, seed=seed, device=device):
        pass
    return model


def measure(args, train, val, vocab_size, device):
    """Rows (model, seed, m, draw, validation loss); m = 0 is the softmax that the model was trained with."""
    rows = []
    with_features = M.Attention.forward
    for name, fields in MODELS.items():
        for seed in range(1, args.seeds + 1):
            M.Attention.forward = exact
            model = train_with_softmax(fields, train, vocab_size, args.steps, seed, device)
            config = model.config
            loss = validation(model, val, config.block_size, args.tokens, device=device)
            rows.append((name, seed, 0, 0, loss))
            print(f'{name} seed {seed}: softmax {loss:.4f}', flush=True)
            M.Attention.forward = with_features
            for m in SIZES:
                for draw in range(args.draws):
                    torch.manual_seed(1000 * seed + draw)
                    for block in model.h:
                        block.attn.w = M.random_matrix(m, config.n_embd // config.n_head).to(device)
                    loss = validation(model, val, config.block_size, args.tokens, device=device)
                    rows.append((name, seed, m, draw, loss))
    return rows


def draw(losses):
    """losses {(model, m): list of losses} -> a figure."""
    fig, ax = pyplot().subplots(figsize=(6.5, 4.5), layout='constrained')
    for i, name in enumerate(MODELS):
        mean = [statistics.mean(losses[name, m]) for m in SIZES]
        spread = [statistics.stdev(losses[name, m]) if len(losses[name, m]) > 1 else 0 for m in SIZES]
        ax.errorbar(SIZES, mean, spread, fmt='o-', capsize=2, color=f'C{i}', label=name)
        ax.axhline(statistics.mean(losses[name, 0]), color=f'C{i}', ls=':', lw=1)
    ax.set(xscale='log', xlabel='m (features), swapped in without training',
           ylabel='validation loss (nats per token)\ndotted: the softmax it was trained with')
    ax.set_xticks(SIZES, SIZES)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    fig.legend(loc='outside lower center', ncols=4, fontsize=8)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=positive, default=400, help='of training (default 400)')
    parser.add_argument('--seeds', type=positive, default=3, help='trained models of each kind (default 3)')
    parser.add_argument('--draws', type=positive, default=5, help='of the random features (default 5)')
    parser.add_argument('--tokens', type=positive, default=16384, help='of the validation text (default 16384)')
    common_flags(parser, 'one seed, 100 steps, two draws')
    args = parse(parser)
    if args.quick:
        args.steps = min(args.steps, 100)
        args.seeds = 1
        args.draws = 2
    return args


def main():
    args = arguments()
    train, val, meta = text(args.dataset, args.data_dir)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    vocab_size = -(-(meta['vocab_size'] + 1) // 64) * 64
    rows = measure(args, train, val, vocab_size, device)
    name = 'convert-quick' if args.quick else 'convert'
    path = write_csv(args.results, name, ('model', 'seed', 'm', 'draw', 'val_loss'), rows)

    losses = {}
    for model, _, m, _, loss in rows:
        losses.setdefault((model, m), []).append(loss)
    print('\n| model | softmax | ' + ' | '.join(f'm = {m}' for m in SIZES) + ' |\n|' + '---|' * 8)
    for model in MODELS:
        cells = [f'{statistics.mean(losses[model, m]):.3f}' for m in (0, *SIZES)]
        print(f'| {model} | {" | ".join(cells)} |')
    save(draw(losses), path)


if __name__ == '__main__':
    main()
