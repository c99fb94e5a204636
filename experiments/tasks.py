"""
Length generalization: models that trained on problems of up to 20 symbols are asked for up to 40.

    python experiments/tasks.py --quick    # a minute on two CPU cores: does it run?
    python experiments/tasks.py            # three tasks, seven schemes, two seeds
    python experiments/tasks.py --tasks copy --schemes nope rope 'mine: --model mine' --seeds 1

The question of Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization in Transformers",
where models without positions win. A text is a problem, '=', its answer and an end:

    copy        a k c = a k c .
    reverse     a k c = c k a .
    addition    3 7 1 + 9 5 = 2 3 2 0 .     173 + 59 = 232: the lowest digit first, so that no digit needs a later one

The length of a problem is the number of its letters, or of the digits of both numbers, which have about the same
length. Models are those of compare.py, at the tiny preset. All texts of a batch have one length, drawn from those up to
20; the loss is that of the answer. An answer is right if all of it is, as greedy decoding would write it: that is so
exactly if each token is the likeliest after the right ones before it, which one forward pass tells.
Absolute positions end at block_size, far beyond 40, but those past the longest text of training are never trained.
Writes experiments/results/tasks.csv, again after each model, and .png. Rows of other models stay in the table, so that
two commands can fill it side by side. An interrupted command goes on with --from_table.
"""
import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from compare import SCHEMES, colors, in_order, read_schemes
from curves import label_ends
from lib import common_flags, descend, from_table_flag, merge_table, parse, positive, pyplot, read_csv, save
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import train
from common import die

DIGITS, PLUS, EQUALS, END = 26, 36, 37, 38  # ids: 26 letters, 10 digits, and three signs
TRAINED, ASKED = 20, 40  # lengths
BATCH = 64  # problems in a step
RATE = 3e-3  # learning rate, of the tiny preset: with 1e-3 RoPE copied 20 letters in 65 % of the cases, with this in 99
MAIN = 'nope absolute rope alibi composite conv-output nprf+rpe'.split()
HEADER = 'task', 'scheme', 'seed', 'steps', 'length', 'right_percent'


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


def texts(task, generator, B, n):
    """-> inputs (B, T) and targets (B, T), -1 where the loss has nothing to predict: inside the problem."""
    problem, answer = TASKS[task](generator, B, n)
    equals = np.full((B, 1), EQUALS)
    end = np.full((B, 1), END)
    ids = torch.from_numpy(np.concatenate((problem, equals, answer, end), 1))
    targets = ids[:, 1:].clone()
    targets[:, :problem.shape[1]] = -1
    return ids[:, :-1], targets


def build(flags, quick=False):
    """The model of a scheme at the tiny preset, or half of it; one line if the flags do not fit."""
    size = ['--n_layer', '2', '--n_embd', '64'] if quick else []
    _, module, config, _ = train.resolve([*size, *flags])
    try:
        return module.Model(dataclasses.replace(config, vocab_size=64, causal=True))
    except ValueError as e:
        die(e)


def train_and_ask(task, scheme, flags, seed, args):
    """-> rows of the table for one model."""
    torch.manual_seed(seed)
    model = build(flags, args.quick)
    generator = np.random.default_rng(seed)

    def batches():
        while True:
            yield texts(task, generator, BATCH, generator.integers(SHORTEST[task], TRAINED + 1))
    start = time.perf_counter()
    bf16 = common.multiplies_bf16(torch.device('cpu'))
    with sdpa_kernel(SDPBackend.MATH):  # on such short texts torch's flash attention for CPUs takes twice as long
        for step, loss, _ in descend(model, batches(), args.steps, RATE, max(1, args.steps // 20), bf16):
            if step % max(1, args.steps // 5) == 0:
                seconds = time.perf_counter() - start
                print(f'{task} {scheme} seed {seed}: step {step}, loss {loss:.3f}, {seconds:.0f} s', flush=True)
    fresh = np.random.default_rng(10 ** 6 + seed)
    rows = []
    for n in range(2, ASKED + 1, 2):
        right = share_right(model, *texts(task, fresh, 20 if args.quick else 500, n))
        rows.append((task, scheme, seed, args.steps, n, 100 * right))
    return rows


@torch.no_grad()
def share_right(model, x, targets):
    """The share of the problems whose answer is right to the last token."""
    wrong = (model(x)[0].argmax(-1) != targets) & (targets >= 0)  # (B, T)
    return 1 - wrong.any(1).double().mean().item()


def read_table(path):
    """{(task, scheme, seed, steps): rows} of earlier commands."""
    found = {}
    for row in read_csv(path) if path.is_file() else []:
        key = row['task'], row['scheme'], int(row['seed']), int(row['steps'])
        found.setdefault(key, []).append((*key, int(row['length']), float(row['right_percent'])))
    return found


def by_length(rows):
    """{(task, scheme): {length: [right answers of each seed, in percent]}}."""
    found = {}
    for task, scheme, _, _, n, right in rows:
        found.setdefault((task, scheme), {}).setdefault(n, []).append(right)
    return found


def print_table(table):
    asked = 10, TRAINED, 24, 30, ASKED
    tasks = list(dict.fromkeys(task for task, _ in table))
    print('\n| task | scheme | ' + ' | '.join(f'{n} symbols' for n in asked) + ' |\n' + '|---' * (2 + len(asked)) + '|')
    for task in tasks:
        for scheme in in_order([s for t, s in table if t == task]):
            cells = [' / '.join(f'{right:.0f}' for right in table[task, scheme][n]) for n in asked]
            print(f'| {task} | {scheme} | {" | ".join(cells)} |')


def draw(table):
    """A line for the mean over the seeds, a dot for each seed."""
    tasks = list(dict.fromkeys(task for task, _ in table))
    color = colors(in_order(list(dict.fromkeys(scheme for _, scheme in table))))
    fig, axes = pyplot().subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, layout='constrained')
    for ax, task in zip(axes[0], tasks):
        ends = []
        for scheme in color:
            if (task, scheme) not in table:
                continue
            line = table[task, scheme]
            means = [statistics.mean(right) for right in line.values()]
            ax.plot(line.keys(), means, color=color[scheme])
            ax.plot(*zip(*[(n, x) for n, right in line.items() for x in right]), '.', color=color[scheme], ms=4)
            ends.append((means[-1], ASKED, scheme, color[scheme]))
        ax.axvline(TRAINED, color='gray', ls=':', lw=1)
        ax.set(title=task, xlabel='length of the problem (dotted: the longest of training)', ylim=(-4, 104),
               ylabel='right answers, percent')
        ax.grid(alpha=0.3)
        label_ends(ax, ends)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS), help='default: all')
    parser.add_argument('--schemes', nargs='+', default=MAIN, metavar='SCHEME',
                        help=f"those of compare.py, or your own, 'name: flags of train.py' (default {' '.join(MAIN)})")
    parser.add_argument('--seeds', type=positive, default=2, help='seeds 1, 2, ... (default 2)')
    parser.add_argument('--steps', type=positive, help='of training (default 3000, 20 with --quick)')
    from_table_flag(parser)
    common_flags(parser, 'smaller models and 20 steps', dataset=False)
    args = parse(parser, {'steps': (3000, 20)})
    args.schemes = read_schemes(args.schemes)
    return args


def main():
    args = arguments()
    path = Path(args.results, 'tasks-quick.csv' if args.quick else 'tasks.csv')
    old = read_table(path) if args.from_table else {}
    for flags in args.schemes.values():
        build(flags, args.quick)  # what does not fit is refused before anything is trained
    rows = []
    for task, (scheme, flags), seed in itertools.product(args.tasks, args.schemes.items(), range(1, args.seeds + 1)):
        found = old.get((task, scheme, seed, args.steps)) if scheme in SCHEMES else None  # no table says what yours was
        found = found or train_and_ask(task, scheme, flags, seed, args)
        merge_table(path, HEADER, found, 4)
        rows += found
    table = by_length(rows)
    print_table(table)
    save(draw(table), path)


if __name__ == '__main__':
    main()
