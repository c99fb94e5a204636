"""
Draw the training and validation losses of any runs in one picture: left over steps, right over seconds.

    python experiments/curves.py out/composite-causal-python out/nope-causal-python

Everything comes from the runs' log.csv. Seconds are those of training: each row's ms per step times the steps since the
row before, added up. The first step (it compiles), validation and saving are not in ms, and a resumed run just continues.
Thick: validation; thin: training. The losses are nats per token (of a masked run, per masked token): with different
tokenizers compare bits per byte, which the table has at the step of the best validation loss.
"""
import argparse
import csv
import math
from pathlib import Path

from lib import die, pyplot, short_names


def read_log(folder):
    """-> rows (step, seconds, training loss or None, validation loss or None, bits per byte or None) of folder/log.csv."""
    path = Path(folder, 'log.csv')
    if not path.is_file():
        die(f'{folder} has no log.csv: name folders that train.py wrote')
    try:
        with open(path, newline='', encoding='utf-8') as f:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(f)]
        return with_seconds(rows)
    except (ValueError, KeyError, AttributeError) as e:
        die(f'{path} is damaged: {type(e).__name__} {e}')


def with_seconds(rows):
    """The rows, each with the seconds of training up to its step; steps after the last row with ms take as long as before."""
    step, seconds, ms = 0, 0.0, math.nan
    for n, row in enumerate(rows):
        ms = next((later['ms'] for later in rows[n:] if 'ms' in later), ms)  # of the row that the step belongs to
        seconds += (row['step'] - step) * ms / 1000 if row['step'] > step else 0
        step = row['step']
        row['seconds'] = seconds
    return rows


def label_ends(ax, ends):
    """Write each name beside the end (x, y) of its curve, right of the picture, none over another."""
    low, high = ax.get_ylim()
    gap = (high - low) / 28
    y = -math.inf
    for name, color, x_end, y_end in sorted(ends, key=lambda end: end[3]):
        y = max(y + gap, y_end)
        ax.annotate(name, (x_end, y_end), (1.03, y), textcoords=('axes fraction', 'data'), color=color, fontsize=8,
                    va='center', annotation_clip=False, arrowprops=dict(arrowstyle='-', color=color, lw=0.5))
