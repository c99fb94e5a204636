"""
The one table of all position schemes, put together from the results of the other experiments.

    python experiments/results_table.py --time    # measure the step times again, then the table: a few minutes
    python experiments/results_table.py           # the table and the picture, from the CSV files in experiments/results
    python experiments/results_table.py --short   # the table of README.md: nine schemes, fewer columns

It reads what these commands wrote, and shows a dash where one has not been run:

    compare.py --name NAME              mean and (standard deviation) of the last losses over the seeds
    extrapolate.py --name NAME          the loss at 8 times the training length
    probe_position.py --name NAME       the error of an MLP that reads the position after the last layer, in tokens,
                                        before and after training
    tasks.py                            correct answers at twice the longest training length, in percent
    results_table.py --time             the time of a training step, as a multiple of that of nope

Bits per byte are those of the causal loss, for data sets of bytes. Parameters are those of the tiny preset. The cache
is the number of elements that decoding stores per further token and layer, from token 300 to 400.
Writes experiments/results/results_table.csv and .png; with --time also results_table-time.csv.
"""
import math
import re
import statistics

import torch
from compare import MAIN
from lib import SCHEMES, Parser, cpu_has_bf16, die, line_panels, new_model, print_table, read_csv, save, write_csv
from speed import in_turns, training_step

TABLE = {  # scheme: what it adds to the score of query i and key j; where it is described
    'nope': ('nothing', 'Haviv et al. 2022, Chi et al. 2023'),
    'absolute': ('nothing; `p_i` to the embedding', 'Gehring et al. 2017, GPT-2'),
    'rope': ('nothing; rotates `q_i`, `k_j` by `i theta`, `j theta`', 'Su et al. 2021'),
    'rope+nope': ('as rope, in every second layer only', 'Yang et al. 2025'),
    'alibi': ('`-slope abs(i - j)`', 'Press et al. 2022'),
    'tisa': ('`sum_s a_s exp(-abs(b_s) (j - i - c_s)^2)`', 'Wennberg and Henter 2021'),
    'cape': ('nothing; sinusoids to the embedding, shifted and scaled in training', 'Likhomanenko et al. 2021'),
    'fixed': ('`beta_{j-i}`', 'Raffel et al. 2020 (T5)'),
    'dynamic': ('`q_i.W_{j-i}/sqrt(hs)`', 'Shaw et al. 2018'),
    'composite': ('`q_i.W_{j-i}/sqrt(hs) + beta_{j-i}`', 'Chang et al. 2021'),
    'composite+key': ('as composite, and `k_j.U_{i-j}/sqrt(hs)`', 'Chang et al. 2021'),
    'composite+output': ('as composite; a convolution of the values after the softmax', 'Chang et al. 2021'),
    'conv-output': ('nothing; a convolution of the values after the softmax', 'Chang et al. 2021'),
    'conv-qkv': ('nothing; convolves the input of `q`, `k`, `v` in half of the heads', 'Chang et al. 2021'),
    'nprf+rpe': ('`b_{j-i}`, with random features in place of the softmax', 'Luo et al. 2021'),
    'nprf+rpe-64': ('as nprf+rpe, with one `b` for all offsets beyond 64 on a side', 'Luo et al. 2021'),
}
LENGTHS = 128, 1024  # of the sequences whose steps are timed
TASKS = 'copy', 'reverse', 'addition'
SHORT = 'scheme', 'adds to the score', 'loss, causal', 'loss, masked', '8x length', 'paper'
HEADER = ('scheme', 'parameters_added', 'causal', 'causal_seeds', 'causal_spread', 'masked', 'masked_seeds',
          'masked_spread', 'at_8x', *TASKS, *(f'step_{T}' for T in LENGTHS), 'cache', 'probe_before', 'probe_after')


@torch.no_grad()
def cache_size(model):
    """Elements that decoding stores per further token and layer, between tokens 300 and 400."""
    state = model.eval().new_state()
    totals = []
    for n in (300, 100):
        model(torch.zeros(1, n, dtype=torch.int64), state=state)
        totals.append(sum(x.numel() for layer in state for x in layer.values() if torch.is_tensor(x)))
    return (totals[1] - totals[0]) / 100 / len(state)


def measure_steps(repeats):
    """Rows (scheme, tokens per sequence, ms per step of 3,072 bytes), in turns; bfloat16 if the CPU has it."""
    rows = []
    for T in LENGTHS:
        idx = torch.randint(256, (3072 // T, T))
        jobs = {scheme: training_step(new_model(SCHEMES[scheme], block_size=T), idx, cpu_has_bf16(), False)
                for scheme in TABLE}
        rows += [(scheme, T, ms) for scheme, ms in in_turns(jobs, repeats).items()]
    return rows


def column(path, key, **wanted):
    """The column `key` of a table in the rows where other columns have the wanted values."""
    return [row[key] for row in read_csv(path) if all(row[name] == value for name, value in wanted.items())]


def last_losses(folder, name, objective, scheme):
    """The last validation loss of each seed."""
    last = {}
    for row in read_csv(folder / f'compare-{name}-{objective}.csv'):
        if row['scheme'] == scheme:
            last[row['seed']] = float(row['val_loss'])
    return list(last.values())


def probe_error(folder, name, what, scheme):
    """Mean over the seeds of the error of the MLP after the last layer, 'trained' or 'before training'."""
    errors = {}
    for row in read_csv(folder / f'probe_position-{name}.csv'):
        named = re.fullmatch(rf'{what}: {re.escape(scheme)}-\d+', row['model'])
        if named and (row['tap'], row['probe']) == ('after MLP', 'MLP'):
            errors.setdefault(row['model'], {})[int(row['layer'])] = float(row['error'])
    return mean([of_layer[max(of_layer)] for of_layer in errors.values()])


def mean(values):
    return statistics.mean(map(float, values)) if values else None


def collect(folder, name):
    """A row of the CSV for each scheme; None where nothing has been measured."""
    def parameters(scheme):
        return sum(p.numel() for p in new_model(SCHEMES[scheme]).parameters())
    rows, base = [], parameters('nope')
    for scheme in TABLE:
        row = [scheme, parameters(scheme) - base]
        for objective in ('causal', 'masked'):
            last = last_losses(folder, name, objective, scheme)
            row += [mean(last), len(last), statistics.stdev(last) if len(last) > 1 else None]
        row.append(mean(column(folder / f'extrapolate-{name}.csv', 'loss', scheme=scheme, times='8')))
        for task in TASKS:
            row.append(mean(column(folder / 'tasks.csv', 'right_percent', task=task, scheme=scheme, length='40')))
        for T in LENGTHS:
            ms = mean(column(folder / 'results_table-time.csv', 'ms', scheme=scheme, tokens=str(T)))
            nope = mean(column(folder / 'results_table-time.csv', 'ms', scheme='nope', tokens=str(T)))
            row.append(ms / nope if ms and nope else None)
        row.append(cache_size(new_model(SCHEMES[scheme], block_size=512)))
        row += [probe_error(folder, name, what, scheme) for what in ('before training', 'trained')]
        rows.append(tuple(row))
    return rows


def cells_of(values):
    """{heading: cell} of a row of the CSV; a dash where nothing has been measured."""
    row = dict(zip(HEADER, values))

    def cell(value, form):
        return '-' if value is None else 'ends' if value != value else format(value, form)

    def loss(objective):
        spread = row[f'{objective}_spread']
        return cell(row[objective], '.3f') + ('' if spread is None else f' ({spread:.3f})')
    formula, paper = TABLE[row['scheme']]
    bits = None if row['causal'] is None else row['causal'] / math.log(2)
    return {'scheme': row['scheme'], 'adds to the score': formula, 'parameters': f'{row["parameters_added"]:,}',
            'loss, causal': loss('causal'), 'bits per byte': cell(bits, '.3f'), 'loss, masked': loss('masked'),
            '8x length': cell(row['at_8x'], '.3f'), 'copy, reverse, add': ', '.join(cell(row[t], '.0f') for t in TASKS),
            **{f'step, {T:,}': cell(row[f'step_{T}'], '.1f') for T in LENGTHS}, 'cache': cell(row['cache'], '.0f'),
            'probe': f'{cell(row["probe_before"], ".0f")}, {cell(row["probe_after"], ".0f")}', 'paper': paper}


def the_table(rows, short=False):
    """Rows of the CSV -> header and cells. short: the columns SHORT and the schemes MAIN only."""
    table = [cells_of(row) for row in rows if not short or row[0] in MAIN]
    heads = SHORT if short else tuple(table[0])
    return heads, [tuple(cells[head] for head in heads) for cells in table]


def draw(rows):
    """Causal and masked loss over the time of a step."""
    panels = {'causal': {}, 'masked': {}}
    for values in rows:
        row = dict(zip(HEADER, values))
        for objective, panel in panels.items():
            if row[objective] is not None and row['step_128'] is not None:
                panel[row['scheme']] = [row['step_128']], [row[objective]]
    return line_panels(panels, 'time of a step, 128 tokens, over that of nope', 'last validation loss (nats per token)',
                       'o')


def main():
    parser = Parser(__doc__)
    parser.add('--name', 'enwik8-8000', note='of the comparison')
    parser.add_argument('--time', action='store_true', help='measure the time of a step of every scheme first')
    parser.add('--repeats', 10, note='steps of each scheme in this measurement')
    parser.add_argument('--short', action='store_true', help='print the table of README.md')
    args = parser.parse_args()
    if not list(args.results.glob(f'compare-{args.name}-*.csv')):
        die(f'found no compare-{args.name}-causal.csv in {args.results}; compare.py --name {args.name} writes it')
    if args.time:
        path = args.results / 'results_table-time.csv'
        write_csv(path, ('scheme', 'tokens', 'ms'), measure_steps(args.repeats))
    rows = collect(args.results, args.name)
    path = args.results / 'results_table.csv'
    write_csv(path, HEADER, rows)
    print_table(the_table(rows, args.short))
    save(draw(rows), path)


if __name__ == '__main__':
    main()
