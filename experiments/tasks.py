"""
Length generalization: models trained on problems of up to 20 symbols are asked for up to 40.

    python experiments/tasks.py --quick    # a minute on two CPU cores: does it run?
    python experiments/tasks.py            # three tasks, seven schemes, two seeds
    python experiments/tasks.py --tasks copy --schemes nope rope 'mine: --model mine' --seeds 1

The question of Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization in Transformers",
where models without positions are best. A sequence is a problem, '=', its answer and an end token:

    copy        a k c = a k c .
    reverse     a k c = c k a .
    addition    3 7 1 + 9 5 = 2 3 2 0 .     173 + 59 = 232: the lowest digit first, so that no digit needs a later one

The length of a problem is the number of its letters, or of the digits of both numbers. Models are those of compare.py
at the tiny preset. All sequences of a batch have one length, at most 20. The loss is that of the answer. An answer is
correct if greedy decoding would write all of it. One forward pass tells: each token must be the most likely one after
the correct tokens before it. Learned absolute positions beyond the longest training sequence are never trained.
Writes experiments/results/tasks.csv after each model, and .png. What is in the table is not trained again, except
schemes of your own.
"""
import itertools
import statistics

import numpy as np
import torch
from lib import (
    SCHEMES, Parser, cpu_has_bf16, descend, in_order, line_panels, merge_csv, new_model, print_table, read_csv,
    read_schemes, save, table_path)
from torch.nn.attention import SDPBackend, sdpa_kernel

DIGITS, PLUS, EQUALS, END = 26, 36, 37, 38  # ids: 26 letters, 10 digits, and three signs
TRAINED, ASKED = 20, 40  # lengths
BATCH = 64  # problems in a step
RATE = 3e-3  # learning rate; with 1e-3 RoPE copied 20 letters in 65 % of the cases, with this one in 99 %
MAIN = 'nope absolute rope alibi composite conv-output nprf+rpe'.split()
HEADER = 'task', 'scheme', 'seed', 'steps', 'length', 'right_percent'
SMALL = ['--n_layer', '2', '--n_embd', '64']


def copy(generator, B, n):
    """-> B problems of length n and their answers, ids (B, ...)."""
    letters = generator.integers(26, size=(B, n))
    return letters, letters


def reverse(generator, B, n):
    letters = generator.integers(26, size=(B, n))
    return letters, letters[:, ::-1]


def addition(generator, B, n):
    """Two numbers of n digits together, the first as long as the second or one longer; a sum with one digit more."""
    a = generator.integers(10, size=(B, n - n // 2))
    b = generator.integers(10, size=(B, n // 2))
    total = np.zeros((B, a.shape[1] + 1), dtype=np.int64)
    total[:, :-1] = a
    total[:, :b.shape[1]] += b
    for i in range(a.shape[1]):  # carry
        total[:, i + 1] += total[:, i] // 10
        total[:, i] %= 10
    plus = np.full((B, 1), PLUS)
    return np.concatenate((DIGITS + a, plus, DIGITS + b), 1), DIGITS + total


TASKS = dict(copy=copy, reverse=reverse, addition=addition)
SHORTEST = dict(copy=1, reverse=1, addition=2)


def problems(task, generator, B, n):
    """-> inputs (B, T) and targets (B, T), which are -1 inside the problem."""
    problem, answer = TASKS[task](generator, B, n)
    equals = np.full((B, 1), EQUALS)
    end = np.full((B, 1), END)
    ids = torch.from_numpy(np.concatenate((problem, equals, answer, end), 1))
    targets = ids[:, 1:].clone()
    targets[:, :problem.shape[1]] = -1
    return ids[:, :-1], targets


def train_and_ask(task, scheme, flags, seed, args):
    """-> rows of the table for one model."""
    torch.manual_seed(seed)
    model = new_model([*(SMALL if args.quick else []), *flags], vocab_size=64, causal=True)
    generator = np.random.default_rng(seed)

    def batches():
        while True:
            yield problems(task, generator, BATCH, generator.integers(SHORTEST[task], TRAINED + 1))
    with sdpa_kernel(SDPBackend.MATH):  # flash attention on a CPU is slow for such short sequences
        for step, loss, _ in descend(model, batches(), args.steps, RATE, max(1, args.steps // 20), cpu_has_bf16()):
            if step % max(1, args.steps // 5) == 0:
                print(f'{task} {scheme} seed {seed}: step {step}, loss {loss:.3f}', flush=True)
    fresh = np.random.default_rng(10 ** 6 + seed)
    rows = []
    for n in range(2, ASKED + 1, 2):
        right = share_right(model, *problems(task, fresh, 20 if args.quick else 500, n))
        rows.append((task, scheme, seed, args.steps, n, 100 * right))
    return rows


@torch.no_grad()
def share_right(model, x, targets):
    """The share of the problems whose answer is correct to the last token."""
    wrong = (model(x)[0].argmax(-1) != targets) & (targets >= 0)  # (B, T)
    return 1 - wrong.any(1).double().mean().item()


def read_rows(path):
    """{(task, scheme, seed, steps): rows} of a table."""
    found = {}
    for row in read_csv(path):
        key = row['task'], row['scheme'], int(row['seed']), int(row['steps'])
        found.setdefault(key, []).append((*key, int(row['length']), float(row['right_percent'])))
    return found


def by_length(rows):
    """{(task, scheme): {length: [percent of correct answers of each seed]}}."""
    found = {}
    for task in TASKS:
        for scheme in in_order([row[1] for row in rows if row[0] == task]):
            lengths = found.setdefault((task, scheme), {})
            for row in rows:
                if row[:2] == (task, scheme):
                    lengths.setdefault(row[4], []).append(row[5])
    return found


def length_table(found):
    asked = 10, TRAINED, 24, 30, ASKED
    rows = []
    for (task, scheme), lengths in found.items():
        rows.append((task, scheme, *(' / '.join(f'{right:.0f}' for right in lengths[n]) for n in asked)))
    return ('task', 'scheme', *(f'{n} symbols' for n in asked)), rows


def draw(found):
    """The mean over the seeds."""
    panels = {}
    for (task, scheme), lengths in found.items():
        panels.setdefault(task, {})[scheme] = list(lengths), [statistics.mean(right) for right in lengths.values()]
    return line_panels(panels, f'length of the problem (in training: up to {TRAINED})', 'correct answers, percent')


def main():
    parser = Parser(__doc__, 'smaller models and 20 steps')
    parser.add('--tasks', list(TASKS), nargs='+', choices=list(TASKS))
    parser.add('--schemes', MAIN, nargs='+', metavar='SCHEME',
               note="those of compare.py, or 'name: flags of train.py'")
    parser.add('--seeds', 2, 1, 'seeds 1, 2, ...')
    parser.add('--steps', 3000, 20, 'of training')
    args = parser.parse_args()
    args.schemes = read_schemes(args.schemes)
    path = table_path(args, 'tasks')
    old = read_rows(path)
    for flags in args.schemes.values():
        new_model(flags)  # wrong flags are refused before any training
    rows = []
    for task, (scheme, flags), seed in itertools.product(args.tasks, args.schemes.items(), range(1, args.seeds + 1)):
        found = old.get((task, scheme, seed, args.steps)) if scheme in SCHEMES else None
        if not found:
            found = train_and_ask(task, scheme, flags, seed, args)
            merge_csv(path, HEADER, found, 4)
        rows += found
    found = by_length(rows)
    print_table(length_table(found))
    save(draw(found), path)


if __name__ == '__main__':
    main()
