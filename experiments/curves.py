"""
Draw the training and validation losses of any runs in one picture: left over steps, right over seconds.

    python experiments/curves.py out/composite-causal-python out/nope-causal-python

Everything is read from the log.csv of each run. Seconds are those of training steps: ms per step times the steps since
the last log line, added up. Validation is not counted, and a resumed run just continues.
Thick lines: validation; thin lines: training. Losses are in nats per token (per masked token in a masked run); to
compare different tokenizers, take the bits per byte of the table.
"""
import argparse
import csv
import math
from pathlib import Path

from lib import pyplot, short_names

from common import die


def read_log(folder):
    """The rows of folder/log.csv: dicts of the numbers they hold, and of the seconds of training so far."""
    path = Path(folder, 'log.csv')
    if not path.is_file():
        die(f'{folder} has no log.csv; name folders that train.py wrote')
    try:
        with open(path, newline='', encoding='utf-8') as f:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(f)]
        add_seconds(rows)
    except (OSError, ValueError, KeyError, TypeError) as e:
        die(f'{path} is damaged: {type(e).__name__} {e}')
    return rows or die(f'{path} is empty')


def add_seconds(rows):
    """A row without ms (validation) takes the ms of the next row that has them, or of the last one."""
    step, seconds, ms = 0, 0.0, math.nan
    for n, row in enumerate(rows):
        ms = next((later['ms'] for later in rows[n:] if 'ms' in later), ms)
        if row['step'] > step:
            seconds += (row['step'] - step) * ms / 1000
            step = row['step']
        row['seconds'] = seconds


def label_ends(ax, ends):
    """Write names at the ends (y, x) of their curves, right of the picture and none over another."""
    low, high = ax.get_ylim()
    free = low
    for y, x, name, color in sorted(ends):
        free = max(free, y)
        line = dict(arrowstyle='-', color='0.5', lw=0.5, ls=':', relpos=(0, 0.5))  # dotted: no curve
        ax.annotate(name, (x, y), (1.06, free), textcoords=('axes fraction', 'data'), color=color, fontsize=8,
                    va='center', annotation_clip=False, arrowprops=line)
        free += (high - low) / 25


def label_points(ax, points):
    """Write a name beside each dot (x, y, name, color), on the first side where it covers no dot and no other name."""
    from matplotlib.transforms import Bbox  # here: matplotlib may be missing
    ax.figure.draw_without_rendering()  # places the axes
    names = []
    dots = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in ax.transData.transform([p[:2] for p in points])]
    sides = [(6, 3, 'left'), (6, -9, 'left'), (-6, 3, 'right'), (-6, -9, 'right'), (0, 7, 'center'), (0, -14, 'center')]
    for x, y, name, color in points:
        for dx, dy, ha in sides:
            label = ax.annotate(name, (x, y), (dx, dy), textcoords='offset points', ha=ha, fontsize=8, color=color)
            if not label.get_window_extent().count_overlaps(dots + names):
                break
            label.remove()
        else:  # no side is free
            label = ax.annotate(name, (x, y), sides[0][:2], textcoords='offset points', fontsize=8, color=color)
        names.append(label.get_window_extent())


def draw(runs):
    """runs: {name: rows} -> the figure."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout='constrained')
    late, ends = [], []  # losses after the first tenth of each run, which set the scale; where curves end
    for n, (name, rows) in enumerate(runs.items()):
        color = f'C{n}' if len(runs) <= 10 else plt.get_cmap('turbo')(n / (len(runs) - 1))
        for kind, width in (('train_loss', 0.6), ('val_loss', 2)):
            found = [row for row in rows if kind in row]
            late += [row[kind] for row in found if row['step'] >= rows[-1]['step'] / 10]
            losses = [row[kind] for row in found]
            for ax, x in zip(axes, ('step', 'seconds')):
                label = name if kind == 'val_loss' else None
                ax.plot([row[x] for row in found], losses, color=color, lw=width, alpha=min(1, width), label=label)
            if kind == 'val_loss' and found:
                ends.append((losses[-1], found[-1]['step'], name, color))
    margin = 0.05 * (max(late) - min(late)) or 0.1
    axes[0].set(xlabel='step', ylabel='loss (nats per token)', ylim=(min(late) - margin, max(late) + margin))
    axes[1].set(xlabel='seconds of training')
    for ax in axes:
        ax.grid(alpha=0.3)
    if len(runs) > 6:
        label_ends(axes[0], ends)
    else:
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc='outside lower center', ncols=3, fontsize=8)
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out_dirs', nargs='+', help='folders of runs')
    parser.add_argument('--out', default='out/curves.png', help='the picture, a .png file (default %(default)s)')
    args = parser.parse_args()
    out = Path(args.out)
    if out.suffix != '.png':
        die(f'--out must end in .png, not {out}')
    runs = {name: read_log(folder) for name, folder in zip(short_names(args.out_dirs), args.out_dirs)}
    print('| run | steps | seconds | best validation loss | bits per byte |\n|---|---|---|---|---|')
    for name, rows in runs.items():
        best = min((row for row in rows if 'val_loss' in row), key=lambda row: row['val_loss'], default={})
        print(f'| {name} | {rows[-1]["step"]:.0f} | {rows[-1]["seconds"]:.0f} | {best.get("val_loss", math.nan):.4f} | '
              f'{best.get("bits_per_byte", math.nan):.4f} |')
    fig = draw(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=120)
    print(f'\nwrote {out}')


if __name__ == '__main__':
    main()
