"""
The one table: every position scheme on one footing, put together from the results of the other experiments.

    python experiments/atlas.py --time    # measures the steps again, in turns: a few minutes on a quiet machine
    python experiments/atlas.py           # the table and the picture, from the CSV files in experiments/results
    python experiments/atlas.py --short   # the table of README.md: nine schemes, fewer columns

Reads what these commands wrote, and shows a dash where one has not been run:

    compare.py --name NAME              the last losses, their mean over the seeds and (standard deviation)
    extrapolate.py --name NAME          the loss at 8 times the length of training, of the best checkpoint
    probe_position.py --name NAME       by how many tokens an MLP after the last layer misses the position, untrained
                                        and trained
    tasks.py                            right answers at twice the longest length of training, in percent
    atlas.py --time                     the time of a training step, as a multiple of that of nope

Parameters are counted in the models themselves, here at the tiny preset. What decoding keeps is seen by feeding them
tokens: how many numbers more per token and layer, from token 300 to token 400.
Writes experiments/results/atlas.csv and .png; with --time first atlas-time.csv.
"""
import argparse
import dataclasses
import re
import statistics
from pathlib import Path

import torch
from compare import SCHEMES, colors
from curves import label_points
from laptop import in_turns
from lib import common_flags, parse, pyplot, read_csv, save, write_csv
from speed import training_step

import common
import train
from common import die

ATLAS = {  # scheme: what it adds to the score of query i and key j; where it is described
    'nope': ('nothing', 'Haviv et al. 2022, Chi et al. 2023'),
    'absolute': ('nothing; `p_i` to the embedding', 'Gehring et al. 2017, GPT-2'),
    'rope': ('nothing; turns `q_i`, `k_j` by `i`, `j` times `theta`', 'Su et al. 2021'),
    'alibi': ('`-slope abs(i - j)`', 'Press et al. 2022'),
    'tisa': ('`sum_s a_s exp(-abs(b_s) (j - i - c_s)^2)`', 'Wennberg and Henter 2021'),
    'cape': ('nothing; sinusoids to the embedding, shifted and scaled in training', 'Likhomanenko et al. 2021'),
    'fixed': ('`beta_{j-i}`', 'Raffel et al. 2020 (T5)'),
    'dynamic': ('`q_i.W_{j-i}/sqrt(hs)`', 'Shaw et al. 2018'),
    'composite': ('`q_i.W_{j-i}/sqrt(hs) + beta_{j-i}`', 'Chang et al. 2021'),
    'composite+key': ('the same and `k_j.U_{i-j}/sqrt(hs)`', 'Chang et al. 2021'),
    'composite+output': ('as composite; a convolution of the values after the softmax', 'Chang et al. 2021'),
    'conv-output': ('nothing; a convolution of the values after the softmax', 'Chang et al. 2021'),
    'conv-qkv': ('nothing; convolves the input of `q`, `k`, `v` in half of the heads', 'Chang et al. 2021'),
    'nprf+rpe': ('`b_{j-i}`, with features in place of the softmax', 'Luo et al. 2021'),
    'nprf+rpe-64': ('the same, with one `b` for all beyond 64 on a side', 'Luo et al. 2021'),
}
LENGTHS = 128, 1024  # of the texts whose steps are timed
TASKS = 'copy', 'reverse', 'addition'
MAIN = 'nope absolute rope alibi fixed dynamic composite conv-output nprf+rpe'.split()  # the schemes of --short
SHORT = 'scheme', 'adds to the score', 'loss, causal', 'masked', '8x length', 'step, 128', 'keeps', 'paper'
HEADER = ('scheme', 'parameters_added', 'causal', 'causal_seeds', 'causal_spread', 'masked', 'masked_seeds',
          'masked_spread', 'at_8x', *TASKS, *(f'step_{T}' for T in LENGTHS), 'kept', 'probe_before', 'probe_after')


def build(scheme, **fields):
    """A model of a scheme at the tiny preset."""
    _, module, config, _ = train.resolve(SCHEMES[scheme])
    return module.Model(dataclasses.replace(config, vocab_size=256, **fields))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def kept(model):
    """Numbers that decoding keeps of each further token in each layer, between tokens 300 and 400."""
    state = model.eval().new_state()
    totals = []
    for n in (300, 100):
        model(torch.zeros(1, n, dtype=torch.int64), state=state)
        totals.append(sum(x.numel() for layer in state for x in layer.values() if torch.is_tensor(x)))
    return (totals[1] - totals[0]) / 100 / len(state)


def measure_steps(seconds):
    """Rows (scheme, tokens in a text, ms per step): 3,072 bytes in a step, in turns, as precise as --dtype auto."""
    bf16 = common.multiplies_bf16(torch.device('cpu'))
    rows = []
    for T in LENGTHS:
        idx = torch.randint(256, (3072 // T, T))
        jobs = {scheme: training_step(build(scheme, block_size=T), idx, bf16, compiled=False) for scheme in ATLAS}
        rows += [(scheme, T, ms) for scheme, ms in in_turns(jobs, seconds).items()]
    return rows


def read(folder, name, **wanted):
    """The rows of a table where the columns `wanted` have these values; none if there is no such table."""
    path = Path(folder, f'{name}.csv')
    rows = read_csv(path) if path.is_file() else []
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def last_losses(folder, name, objective, scheme):
    """The last validation loss of each seed."""
    last = {}
    for table in (f'compare-{name}', f'compare-{name}-{objective}'):  # of a command with both objectives, or with one
        for row in read(folder, table, objective=objective, scheme=scheme):
            last[row['seed']] = float(row['val_loss'])
    return list(last.values())


def probe_errors(folder, name, what, scheme):
    """The error of the MLP after the last layer in each run of a scheme, 'trained' or 'before training'."""
    errors = {}
    for row in read(folder, f'probe_position-{name}', tap='after MLP', probe='MLP'):
        if re.fullmatch(rf'{what}: {re.escape(scheme)}-\d+', row['model']):
            errors.setdefault(row['model'], {})[int(row['layer'])] = float(row['error'])
    return [of_layer[max(of_layer)] for of_layer in errors.values()]


def mean(numbers):
    return statistics.mean(numbers) if numbers else None


def collect(folder, name):
    """A row of the CSV for each scheme; None where nothing has been measured."""
    base = parameters(build('nope'))
    rows = []
    for scheme in ATLAS:
        row = [scheme, parameters(build(scheme)) - base]
        for objective in ('causal', 'masked'):
            last = last_losses(folder, name, objective, scheme)
            row += [mean(last), len(last), statistics.stdev(last) if len(last) > 1 else None]
        row.append(mean([float(r['loss']) for r in read(folder, f'extrapolate-{name}', scheme=scheme, times='8')]))
        for task in TASKS:
            asked = read(folder, 'tasks', task=task, scheme=scheme, length='40')
            longest = max((int(r['steps']) for r in asked), default=0)
            row.append(mean([float(r['right_percent']) for r in asked if int(r['steps']) == longest]))
        for T in LENGTHS:
            times = {r['scheme']: float(r['ms']) for r in read(folder, 'atlas-time', tokens=str(T))}
            row.append(times[scheme] / times['nope'] if scheme in times else None)
        row.append(kept(build(scheme, block_size=512)))
        row += [mean(probe_errors(folder, name, what, scheme)) for what in ('before training', 'trained')]
        rows.append(tuple(row))
    return rows


def cells_of(values):
    """{heading: cell} of a row of the CSV; a dash where nothing has been measured."""
    row = dict(zip(HEADER, values))

    def cell(key, form):
        return '-' if row[key] is None else 'ends' if row[key] != row[key] else format(row[key], form)

    def loss(objective):
        spread = row[f'{objective}_spread']
        return cell(objective, '.3f') + ('' if spread is None else f' ({spread:.3f})')
    formula, paper = ATLAS[row['scheme']]
    return {'scheme': row['scheme'], 'adds to the score': formula, 'parameters': cell('parameters_added', ',d'),
            'loss, causal': loss('causal'), 'masked': loss('masked'), '8x length': cell('at_8x', '.3f'),
            'copy, reverse, add': ', '.join(cell(task, '.0f') for task in TASKS),
            **{f'step, {T:,}': cell(f'step_{T}', '.1f') for T in LENGTHS}, 'keeps': cell('kept', '.0f'),
            'probe': f'{cell("probe_before", ".0f")}, {cell("probe_after", ".0f")}', 'paper': paper}


def print_table(rows, short):
    """short: the columns and the schemes of MAIN only."""
    table = [cells_of(values) for values in rows if not short or values[0] in MAIN]
    heads = SHORT if short else list(table[0])
    print(f'\n| {" | ".join(heads)} |\n{"|---" * len(heads)}|')
    for cells in table:
        print(f'| {" | ".join(cells[head] for head in heads)} |')


def draw(rows):
    """Loss over the time of a step, for each objective."""
    fig, axes = pyplot().subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    color = colors([row[0] for row in rows])
    for ax, objective in zip(axes, ('causal', 'masked')):
        points = []
        for values in rows:
            row = dict(zip(HEADER, values))
            if row[objective] is not None and row['step_128'] is not None:
                points.append((row['step_128'], row[objective], row['scheme'], color[row['scheme']]))
                ax.plot(*points[-1][:2], 'o', color=points[-1][3])
        ax.set(title=f'{objective} language model', xlabel='time of a step, 128 tokens, in steps of nope',
               ylabel='last validation loss (nats per token)')
        ax.margins(x=0.15)
        ax.grid(alpha=0.3)
        label_points(ax, points)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--name', default='python-8000', help='of the comparison (default %(default)s)')
    parser.add_argument('--time', action='store_true', help='measure the time of a step of every scheme first')
    parser.add_argument('--seconds', type=float, default=60, help='of this measurement, for each length (default 60)')
    parser.add_argument('--short', action='store_true', help='print the table of README.md')
    common_flags(parser, None, dataset=False)
    return parse(parser)


def main():
    args = arguments()
    if not list(Path(args.results).glob(f'compare-{args.name}*.csv')):
        die(f'found no compare-{args.name}.csv in {args.results}; compare.py --name {args.name} writes it')
    if args.time:
        write_csv(args.results, 'atlas-time', ('scheme', 'tokens', 'ms'), measure_steps(args.seconds))
    rows = collect(args.results, args.name)
    path = write_csv(args.results, 'atlas', HEADER, rows)
    print_table(rows, args.short)
    save(draw(rows), path)


if __name__ == '__main__':
    main()
