"""
Train with softmax, then replace it by random features without fine-tuning: which models survive?

    python experiments/convert.py --quick    # one seed, 100 steps: does it run?
    python experiments/convert.py            # four models, three seeds, 400 steps each; then m = 16 ... 512, five draws

Answers Figure 2 of Luo et al. 2021 (German-English translation, BLEU: softmax, then m = 16 ... 512): standard 35.2
falls to 10.9 ... 19.4, with b 35.4 to 24.3 ... 30.3, normalized 33.5 to 25.8 ... 32.8, normalized with b 35.2 to
34.3 ... 34.9. Here: a causal language model, validation loss in nats. It is model_kernelized.py with its features
replaced by what they estimate, exp(q.k).
Writes experiments/results/convert.csv and .png (with --quick in out/quick).
"""
import statistics

import torch
import torch.nn.functional as F
from lib import (
    Parser, data_set, line_panels, optimize, print_table, save, table_path, validation, vocab_size, write_csv)

import model_kernelized as M

MODELS = {'standard': dict(normalize=False, rpe=False), 'standard + b': dict(normalize=False),
          'normalized': dict(rpe=False), 'normalized + b': dict()}
SIZES = (16, 32, 64, 128, 256, 512)
HEADER = 'model', 'seed', 'm', 'draw', 'val_loss'


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


def draw_features(model, m):
    """Give every layer m new random features."""
    config = M.Config(n_embd=model.config.n_embd, n_head=model.config.n_head, n_features=m)
    for block in model.h:
        block.attn.w = M.Attention(config).w.to(block.attn.w.device)


def measure(args, train, val, rows_of_embedding, device):
    """Rows (model, seed, m, draw, validation loss); m = 0 is the softmax that the model was trained with."""
    rows = []
    with_features = M.Attention.forward
    for name, fields in MODELS.items():
        for seed in range(1, args.seeds + 1):
            M.Attention.forward = exact
            torch.manual_seed(seed)
            model = M.Model(M.Config(vocab_size=rows_of_embedding, attention='dense', **fields)).to(device)
            for _ in optimize(model, train, args.steps, seed=seed):
                pass
            loss = validation(model, val, args.tokens)
            M.Attention.forward = with_features
            rows.append((name, seed, 0, 0, loss))
            print(f'{name} seed {seed}: softmax {loss:.4f}', flush=True)
            for m in SIZES:
                for draw in range(args.draws):
                    torch.manual_seed(1000 * seed + draw)
                    draw_features(model, m)
                    rows.append((name, seed, m, draw, validation(model, val, args.tokens)))
    return rows


def by_size(rows):
    """Rows of the CSV -> {(model, m): losses}."""
    found = {}
    for model, _, m, _, loss in rows:
        found.setdefault((model, int(m)), []).append(float(loss))
    return found


def loss_table(found):
    rows = [(model, *(f'{statistics.mean(found[model, m]):.3f}' for m in (0, *SIZES))) for model in MODELS]
    return ('model', 'softmax', *(f'm = {m}' for m in SIZES)), rows


def draw(found):
    lines = {model: (SIZES, [statistics.mean(found[model, m]) for m in SIZES]) for model in MODELS}
    return line_panels({'softmax replaced by random features': lines}, 'm (features), without training',
                       'validation loss (nats per token)', 'o-', xscale='log')


def main():
    parser = Parser(__doc__, 'one seed, 100 steps, two draws')
    parser.add('--steps', 400, 100, 'of training')
    parser.add('--seeds', 3, 1, 'trained models of each kind')
    parser.add('--draws', 5, 2, 'of the random features')
    parser.add('--tokens', 16384, note='of the validation data')
    parser.add_data('shakespeare')
    args = parser.parse_args()
    train, val, meta = data_set(args.dataset, args.data_dir)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = measure(args, train, val, vocab_size(meta), device)
    path = table_path(args, 'convert')
    write_csv(path, HEADER, rows)
    print_table(loss_table(by_size(rows)))
    save(draw(by_size(rows)), path)


if __name__ == '__main__':
    main()
