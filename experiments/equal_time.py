"""
Equal time instead of equal steps: the loss over seconds on long texts, softmax against kernelized attention.

    python experiments/equal_time.py --quick                             # a minute: does it run?
    OMP_NUM_THREADS=1 python experiments/equal_time.py --minutes 15      # each run takes 15 minutes
    OMP_NUM_THREADS=1 python experiments/equal_time.py --minutes 15 --lengths 4096 --schemes rope nprf+rpe

Kernelized attention was made to save time (Luo et al. 2021). So each scheme trains for the same time on bytes of
enwik8, at the tiny preset with texts of 2,048 and of 4,096 bytes, two of them or one in a step. First some steps of
each are timed; their median tells how many fit into the minutes, and the schedule ends there. Prepare the data before:

    python prepare_data.py --dataset enwik8 --tokenizer bytes --path enwik8.xz

Runs stay in out/equal_time/: an interrupted experiment goes on where it stopped. Compare runs whose seconds agree: a
machine that has become slower since the timing gives a run more time.
Writes experiments/results/equal_time-<data set>.csv (with the seconds that the steps really took) and .png.
"""
import argparse
import json
import math
import statistics
from pathlib import Path

from compare import check_run, colors, read_schemes, train_run
from curves import label_ends, read_log
from lib import common_flags, merge_table, parse, positive, pyplot, save

import train

HEADER = 'block_size', 'scheme', 'minutes', 'step', 'seconds', 'val_loss'
SMALL = '--n_layer 2 --n_embd 64 --eval_tokens 4096'.split()


def words_of(flags, T, out, args):
    """The flags of train.py: 4,096 bytes in a step."""
    return ['--dataset', args.dataset, '--data_dir', args.data_dir, '--block_size', str(T), '--batch_size',
            str(max(1, 4096 // T)), '--out_dir', str(out), *(SMALL if args.quick else []), *flags]


def steps_in_time(log, minutes):
    """How many steps like those of a run's log.csv fit into the minutes, at least ten; its first steps do not count."""
    ms = statistics.median(row['ms'] for row in log[2:] if 'ms' in row)
    return max(10, round(minutes * 60e3 / ms))


def run(T, scheme, flags, args):
    """-> rows of the table for one run, which is trained if it has not ended yet."""
    out = folder(T, scheme, args)
    words = words_of(flags, T, out, args)
    config = out / 'config.json'
    if config.is_file():
        steps = json.loads(config.read_text(encoding='utf-8'))['max_iters']
    else:
        timed = Path(f'{out}-timed')
        n = '6' if args.quick else '30'
        train_run([*words, '--out_dir', str(timed), '--max_iters', n, '--warmup_iters', '1', '--log_interval', '1',
                   '--eval_interval', n, '--eval_tokens', '4096'], f'the timing of {scheme}, texts of {T}')
        steps = steps_in_time(read_log(timed), args.minutes)
    words += ['--max_iters', str(steps), '--eval_interval', str(max(1, steps // 20))]
    check_run(out, words)
    if not (out / 'loss.png').exists():  # the last file that a run writes
        train_run(words, f'{scheme}, texts of {T}')
    rows = [(T, scheme, args.minutes, int(row['step']), row['seconds'], row['val_loss'])
            for row in read_log(out) if 'val_loss' in row]
    print(f'{scheme}, texts of {T}: {rows[-1][3]} steps, {rows[-1][4]:.0f} s, loss {rows[-1][5]:.4f}', flush=True)
    return rows


def folder(T, scheme, args):
    name = f'{args.dataset}-{scheme}-{T}-{args.minutes:g}'
    return Path('out', 'equal_time', name + ('-quick' if args.quick else ''))


def minutes(word):
    """The argparse type of a time."""
    number = float(word)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def draw(rows):
    lengths = sorted({row[0] for row in rows})
    color = colors(list(dict.fromkeys(row[1] for row in rows)))
    fig, axes = pyplot().subplots(1, len(lengths), figsize=(6 * len(lengths), 4.5), squeeze=False,
                                  layout='constrained')
    for ax, T in zip(axes[0], lengths):
        ends = []
        for scheme in color:
            line = [row[4:] for row in rows if row[:2] == (T, scheme)][1:]  # without step 0
            if line:
                ax.plot(*zip(*line), '.-', color=color[scheme])
                ends.append((line[-1][1], line[-1][0], scheme, color[scheme]))
        ax.set(title=f'texts of {T:,} bytes', xlabel='seconds of training', ylabel='validation loss (nats per byte)')
        ax.grid(alpha=0.3)
        label_ends(ax, ends)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=minutes, help='of each run (default 15, 0.05 with --quick)')
    parser.add_argument('--lengths', type=positive, nargs='+',
                        help='of the texts (default 2048 4096, 256 with --quick)')
    parser.add_argument('--schemes', nargs='+', default=['rope', 'composite', 'nprf+rpe'], metavar='SCHEME',
                        help='those of compare.py, or your own (default: rope composite nprf+rpe)')
    parser.add_argument('--dataset', default='enwik8', help='default enwik8')
    parser.add_argument('--data_dir', default='data', help='default data')
    common_flags(parser, 'smaller models for seconds', dataset=False)
    return parse(parser, {'minutes': (15.0, 0.05), 'lengths': ([2048, 4096], [256])})


def main():
    args = arguments()
    schemes = read_schemes(args.schemes)
    parts = 'equal_time', args.dataset, 'quick' if args.quick else ''
    path = Path(args.results, '-'.join(part for part in parts if part) + '.csv')
    runs = [(T, scheme, flags) for T in args.lengths for scheme, flags in schemes.items()]
    for T, scheme, flags in runs:  # what does not fit is refused before anything is trained
        train.resolve(words_of(flags, T, folder(T, scheme, args), args))
    asked = []
    for T, scheme, flags in runs:
        rows = run(T, scheme, flags, args)
        merge_table(path, HEADER, rows, 3)
        asked += rows
    print('\n| texts of | scheme | steps | seconds | loss |\n|---|---|---|---|---|')
    for T, scheme, _, step, seconds, loss in asked:
        if step == max(row[3] for row in asked if row[:2] == (T, scheme)):
            print(f'| {T:,} | {scheme} | {step:,} | {seconds:.0f} | {loss:.4f} |')
    save(draw(asked), path)


if __name__ == '__main__':
    main()
