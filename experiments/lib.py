"""What several experiments share: prepared text, a training loop of a few lines, and where results go."""
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
from sample import die  # noqa: E402


def text(dataset, data_dir='data'):
    """-> ids to train on, ids to validate on (numpy memory maps), meta; prepares a known data set that is missing."""
    from prepare_data import prepare
    folder = Path(data_dir, dataset)
    if not (folder / 'meta.json').is_file():
        prepare(dataset, data_dir=data_dir)
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    return *(np.memmap(folder / f'{split}.bin', dtype=meta['dtype'], mode='r') for split in ('train', 'val')), meta


def rows(ids, starts, T, device='cpu'):
    """The T + 1 ids from each start: inputs (B, T) and the tokens that follow them (B, T)."""
    x = torch.from_numpy(np.stack([ids[s:s + T + 1] for s in starts]).astype(np.int64)).to(device)
    return x[:, :-1], x[:, 1:]


def optimise(model, ids, steps, batch_size=16, learning_rate=3e-3, warmup=40, seed=1, device='cpu'):
    """Train as train.py does (AdamW, warm-up, cosine to 0, clipping at 1), yielding (step, loss, gradient norm before clipping)."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)], lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * max(0, s - warmup) / max(1, steps - warmup))))
    T, generator = model.config.block_size, np.random.default_rng(seed)
    model.train()
    for step in range(1, steps + 1):
        x, y = rows(ids, generator.integers(len(ids) - T, size=batch_size), T, device)
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield step, loss.item(), norm.item()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def validation(model, ids, T, tokens=16384, batch_size=16, device='cpu'):
    """Mean loss in nats per token over the first `tokens` tokens, in texts of T."""
    starts = range(0, min(tokens, len(ids) - 1) // T * T, T)
    losses = [model(*rows(ids, starts[i:i + batch_size], T, device))[1].item() * len(starts[i:i + batch_size]) for i in range(0, len(starts), batch_size)]
    return sum(losses) / len(starts)


def short_names(outs):
    """The names of runs' folders; of those that compare.py has trained, <setting>-<objective>-<scheme>-<seed>, the last two parts."""
    paths = [Path(out).resolve() for out in outs]
    names = [re.sub(r'.*-(causal|masked)-', '', path.name) if path.parent.name == 'compare' else path.name for path in paths]
    for name in names:
        if names.count(name) > 1:
            die(f'one run of each name, and of one data set and objective: {names.count(name)} are called {name}')
    return names


def positive(word):
    """What argparse makes of a number that must be 1 or more."""
    if int(word) < 1:
        raise ValueError
    return int(word)


def common_flags(parser, quick, dataset=True):
    """The flags that experiments have in common; `quick` says what --quick does."""
    if dataset:
        parser.add_argument('--dataset', default='python', help='default python')
        parser.add_argument('--data_dir', default='data', help='default data')
    parser.add_argument('--quick', action='store_true', help=quick)
    parser.add_argument('--results', default=str(REPO / 'experiments' / 'results'), help='folder of the table and the picture')


def write_csv(folder, name, header, rows):
    """-> path of folder/name.csv; floats with five digits."""
    path = Path(folder, f'{name}.csv')
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([header, *([f'{x:.5g}' if isinstance(x, float) else x for x in row] for row in rows)])
    return path


def save(fig, path):
    """The picture beside the table at path."""
    fig.savefig(path.with_suffix('.png'), dpi=120)
    print(f'\nwrote {path} and its .png')


def pyplot():
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    return plt
