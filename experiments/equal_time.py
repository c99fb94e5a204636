"""
Equal time instead of equal steps: the loss over seconds on long sequences, softmax against kernelized attention.

    python experiments/equal_time.py --quick                             # a minute: does it run?
    OMP_NUM_THREADS=1 python experiments/equal_time.py --minutes 15      # each run takes 15 minutes

Kernelized attention was made to save time (Luo et al. 2021). So each scheme trains for the same time on bytes of
enwik8, at the tiny preset with sequences of 2,048 and of 4,096 bytes, 4,096 bytes in a step. Some steps of each are
timed first; their median tells how many fit into the minutes, and the schedule ends there.
Runs stay in out/equal_time/: an interrupted command continues. Compare runs whose seconds agree: if the machine has
become slower since the timing, a run gets more time.
Writes experiments/results/equal_time-<data set>.csv (with the seconds that the steps took) and .png.
"""
import json
import statistics
from pathlib import Path

from lib import (
    Parser, check_run, line_panels, merge_csv, positive, print_table, rate, read_log, read_schemes, save, table_path,
    train_all)

HEADER = 'block_size', 'scheme', 'minutes', 'step', 'seconds', 'val_loss'
SMALL = '--n_layer 2 --n_embd 64 --eval_tokens 4096'.split()


def steps_in_time(log, minutes):
    """How many steps like those of a run's log fit into the minutes, at least ten; its first two do not count."""
    ms = statistics.median(row['ms'] for row in log[2:] if 'ms' in row)
    return max(10, round(minutes * 60e3 / ms))


def run(T, scheme, flags, args):
    """-> rows of the table for one run, which is trained if it is not finished."""
    name = f'{args.dataset}-{scheme}-{T}-{args.minutes:g}' + ('-quick' if args.quick else '')
    out = Path('out', 'equal_time', name)
    words = ['--dataset', args.dataset, '--data_dir', args.data_dir, '--block_size', str(T), '--batch_size',
             str(max(1, 4096 // T)), *(SMALL if args.quick else []), *flags]
    if (out / 'config.json').is_file():
        steps = json.loads((out / 'config.json').read_text(encoding='utf-8'))['max_iters']
    else:
        timed = Path(f'{out}-timed')
        n = '6' if args.quick else '30'
        list(train_all([(f'timing of {name}', timed, [*words, '--max_iters', n, '--warmup_iters', '1', '--log_interval',
                                                      '1', '--eval_interval', n, '--eval_tokens', '4096'])]))
        steps = steps_in_time(read_log(timed), args.minutes)
    list(train_all([(name, out, [*words, '--max_iters', str(steps), '--eval_interval', str(max(1, steps // 20))])]))
    rows = [(T, scheme, args.minutes, int(row['step']), row['seconds'], row['val_loss'])
            for row in read_log(out) if 'val_loss' in row]
    print(f'{scheme}, {T} tokens: {rows[-1][3]} steps, {rows[-1][4]:.0f} s, loss {rows[-1][5]:.4f}', flush=True)
    return rows


def time_table(rows):
    """The last row of each run."""
    last = {row[:2]: row for row in rows}
    cells = [(f'{row[0]:,}', row[1], f'{row[3]:,}', f'{row[4]:.0f}', f'{row[5]:.4f}') for row in last.values()]
    return ('tokens per sequence', 'scheme', 'steps', 'seconds', 'loss'), cells


def draw(rows):
    panels = {}
    for T, scheme, _, step, seconds, loss in rows:
        if step:
            x, y = panels.setdefault(f'sequences of {T:,} tokens', {}).setdefault(scheme, ([], []))
            x.append(seconds)
            y.append(loss)
    return line_panels(panels, 'seconds of training', 'validation loss (nats per token)')


def main():
    parser = Parser(__doc__, 'smaller models for seconds')
    parser.add('--minutes', 15.0, 0.05, 'of each run', type=rate)
    parser.add('--lengths', [2048, 4096], [256], 'tokens per sequence', type=positive, nargs='+')
    parser.add('--schemes', ['rope', 'composite', 'nprf+rpe'], nargs='+', metavar='SCHEME',
               note="those of compare.py, or 'name: flags of train.py'")
    parser.add_data('enwik8')
    args = parser.parse_args()
    path = table_path(args, 'equal_time', args.dataset)
    runs = [(T, scheme, flags) for T in args.lengths for scheme, flags in read_schemes(args.schemes).items()]
    for T, _, flags in runs:
        check_run(Path('none'), ['--block_size', str(T), *flags])  # wrong flags are refused before any training
    asked = []
    for T, scheme, flags in runs:
        rows = run(T, scheme, flags, args)
        merge_csv(path, HEADER, rows, 3)
        asked += rows
    print_table(time_table(asked))
    save(draw(asked), path)


if __name__ == '__main__':
    main()
