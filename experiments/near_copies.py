"""
How much of a validation text stands in the training text word for word, and what is the loss of the rest?

    python experiments/near_copies.py --name python-8000                         # causal runs of compare.py
    python experiments/near_copies.py --name python-8000 --objective masked

Python's library has families of files that are nearly equal (tables of character codes), and the split into files to
train on and files to validate on parts them. A row of the validation counts as copied if at least half of its windows
of 64 tokens are in the training text. The rows are those of train.py, in float32, with the last weights.
Writes experiments/results/near_copies-<name>-<objective>.csv. Rows of other runs stay in the table.
"""
import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from lib import common_flags, merge_table, parse, runs_of, short_names, text

import train
from common import die
from sample import load_run

WINDOW = 64  # tokens
STRIDE = 4  # of the windows that are looked up
HEADER = 'run', 'rows', 'copied_percent', 'loss', 'loss_copied', 'loss_rest'


def hashes(ids):
    """A number of 64 bits for each window of ids."""
    found = np.zeros(len(ids) - WINDOW + 1, dtype=np.uint64)
    for k in range(WINDOW):
        found = found * np.uint64(0x9E3779B97F4A7C15) + ids[k:len(ids) - WINDOW + 1 + k]  # modulo 2^64
    return found


def copied(ids, val, starts, T):
    """-> which of the rows of T + 1 tokens are copies: at least half of their windows are in ids. (rows,) bool"""
    known = np.unique(hashes(np.asarray(ids, dtype=np.uint64)))
    windows = np.stack([hashes(np.asarray(val[s:s + T + 1], dtype=np.uint64))[::STRIDE] for s in starts])
    return np.isin(windows, known).mean(1) >= 0.5


@torch.no_grad()
def row_losses(model, checkpoint, val):
    """Mean loss of each row of the validation of train.py, in nats per predicted token, and where the rows start."""
    T = model.config.block_size
    run = SimpleNamespace(config=model.config, settings=train.Settings(**checkpoint['settings']),
                          meta=checkpoint['meta'], val=val)
    n = min(max(1, run.settings.eval_tokens // T), (len(val) - 1) // T)
    losses = []
    for numbers in np.array_split(np.arange(n), -(-n // 32)):
        idx, targets, where = [None if a is None else torch.from_numpy(a) for a in train.val_rows(run, numbers, n)]
        logits = model(idx, where=where)[0]
        losses.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction='none').mean(1))
    return torch.cat(losses).numpy(), np.linspace(0, len(val) - T - 1, n).astype(int)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--objective', choices=['causal', 'masked'], default='causal', help='default causal')
    parser.add_argument('--data_dir', default='data', help='default data')
    common_flags(parser, None, dataset=False, name=True)
    args = parse(parser)
    if not args.name:
        parser.error('give --name')
    path = Path(args.results, f'near_copies-{args.name}-{args.objective}.csv')
    folders = runs_of(args.name, args.objective)
    copies = None
    print(f'| {" | ".join(HEADER)} |\n{"|---" * len(HEADER)}|')
    for name, folder in zip(short_names(folders), folders):
        model, checkpoint = load_run(folder, 'last')
        if model.config.block_size < WINDOW:
            die(f'{folder} was trained on texts of {model.config.block_size} tokens; {WINDOW} are needed to see a copy')
        ids, val, _ = text(checkpoint['settings']['dataset'], args.data_dir)
        losses, starts = row_losses(model, checkpoint, val)
        if copies is None:  # runs of one name have one text
            copies = copied(ids, val, starts, model.config.block_size)
        share = 100 * copies.mean()
        everywhere = np.ones_like(copies)
        means = [losses[rows].mean() if rows.any() else math.nan for rows in (everywhere, copies, ~copies)]
        print(f'| {name} | {len(losses)} | {share:.1f} | {" | ".join(f"{x:.4f}" for x in means)} |', flush=True)
        merge_table(path, HEADER, [(name, len(losses), *map(float, (share, *means)))], 1)


if __name__ == '__main__':
    main()
