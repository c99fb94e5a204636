"""
Draw the validation losses of any runs in one picture: left over steps, right over seconds.

    python experiments/curves.py out/composite-causal-shakespeare out/nope-causal-shakespeare --level 1.886

Everything is read from the log.csv of each run. Seconds are those of training steps, without validation.
Losses are in nats per token (per masked token in a masked run). To compare different tokenizers, use the bits per byte
of the table. `seconds to`: to the first validation with a loss of at most --level.
"""
import argparse
import math
from pathlib import Path

from lib import die, line_panels, print_table, read_log, short_names


def curve_table(runs, level):
    """runs {name: rows of log.csv} -> the best validation loss of each run, and the seconds to a level."""
    rows = []
    for name, log in runs.items():
        best = min((row for row in log if 'val_loss' in row), key=lambda row: row['val_loss'], default={})
        seconds = next((f'{row["seconds"]:.0f}' for row in log if row.get('val_loss', math.inf) <= level), '-')
        rows.append((name, f'{log[-1]["step"]:.0f}', f'{log[-1]["seconds"]:.0f}',
                     *(f'{best.get(key, math.nan):.4f}' for key in ('val_loss', 'bits_per_byte')), seconds))
    return ('run', 'steps', 'seconds', 'best validation loss', 'bits per byte', f'seconds to {level:g}'), rows


def draw(runs):
    """runs {name: rows of log.csv} -> the figure."""
    panels = {}
    late = []  # the losses after the first tenth of each run set the scale
    for x in ('step', 'seconds'):
        for name, rows in runs.items():
            found = [row for row in rows if 'val_loss' in row]
            late += [row['val_loss'] for row in found if row['step'] >= rows[-1]['step'] / 10]
            panel = panels.setdefault(f'over {x}', {})
            panel[name] = [row[x] for row in found], [row['val_loss'] for row in found]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    return line_panels(panels, 'steps, or seconds of training', 'validation loss (nats per token)',
                       ylim=(min(late) - margin, max(late) + margin))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out_dirs', nargs='+', help='folders of runs')
    parser.add_argument('--out', type=Path, default=Path('out/curves.png'),
                        help='the picture, a .png file (default %(default)s)')
    parser.add_argument('--level', type=float, metavar='LOSS', default=2, help='see above (default 2)')
    args = parser.parse_args()
    if args.out.suffix != '.png':
        die(f'--out must end in .png, not {args.out}')
    runs = {name: read_log(folder) for name, folder in zip(short_names(args.out_dirs), args.out_dirs)}
    print_table(curve_table(runs, args.level))
    fig = draw(runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=90)
    print(f'\nwrote {args.out}')


if __name__ == '__main__':
    main()
