"""
Does the gap without positions close with depth and training?

    python experiments/depth.py --quick                      # a minute: does it run?
    OMP_NUM_THREADS=1 python experiments/depth.py            # 2, 4 and 8 layers, 1,000 and 4,000 steps, three schemes
    OMP_NUM_THREADS=1 python experiments/depth.py --steps 1000

Chi et al. 2023 and Haviv et al. 2022: a causal model without positions loses little, with 16 layers and hundreds of
thousands of steps. Here the tiny preset with more or fewer layers, one seed. The gap is the loss of nope less that of
the best other scheme.
Runs stay in out/depth/: an interrupted experiment goes on where it stopped.
Writes experiments/results/depth-<data set>.csv, again after each run, and .png. Rows of other runs stay in the table.
"""
import argparse
import itertools
from pathlib import Path

from compare import SCHEMES, check_run, colors, losses, read_schemes, train_run
from lib import common_flags, from_table_flag, merge_table, parse, positive, pyplot, read_csv, save

HEADER = 'steps', 'layers', 'scheme', 'val_loss'
SMALL = '--n_embd 64 --batch_size 4 --eval_tokens 4096'.split()


def place_and_words(steps, layers, scheme, flags, args):
    """The folder of a run and its flags of train.py."""
    out = Path('out', 'depth', f'{args.dataset}-{steps}-{layers}-{scheme}' + ('-quick' if args.quick else ''))
    return out, ['--dataset', args.dataset, '--data_dir', args.data_dir, '--out_dir', str(out), '--n_layer',
                 str(layers), '--max_iters', str(steps), '--eval_interval', str(max(1, steps // 10)),
                 *(SMALL if args.quick else []), *flags]


def draw(table, schemes):
    """table {(steps, layers, scheme): loss}: the losses over depth, and the gap of nope, a line for each training."""
    fig, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4), layout='constrained')
    color = colors(schemes)
    lengths = sorted({steps for steps, _, _ in table})
    depths = sorted({layers for _, layers, _ in table})
    for style, steps in zip(itertools.cycle(('o--', 'o-', 'o:', 'o-.')), lengths):
        for scheme in schemes:
            left.plot(depths, [table[steps, layers, scheme] for layers in depths], style, color=color[scheme],
                      label=f'{scheme}, {steps:,} steps')
        if 'nope' in schemes and len(schemes) > 1:
            gap = [table[steps, layers, 'nope'] - min(table[steps, layers, s] for s in schemes if s != 'nope')
                   for layers in depths]
            right.plot(depths, gap, style, color='k', label=f'{steps:,} steps')
    left.set(ylabel='validation loss (nats per byte)')
    right.set(ylabel='nope less the best other loss')
    right.axhline(0, color='gray', lw=1)
    for ax in (left, right):
        ax.set(xlabel='layers')
        ax.set_xticks(depths)
        ax.grid(alpha=0.3)
    handles = left.get_legend_handles_labels()
    fig.legend(*handles, loc='outside lower center', ncols=len(lengths), fontsize=8)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=positive, nargs='+', default=[2, 4, 8], help='default 2 4 8')
    parser.add_argument('--steps', type=positive, nargs='+', help='of training (default 1000 4000, 5 with --quick)')
    parser.add_argument('--schemes', nargs='+', default=['nope', 'rope', 'composite'], metavar='SCHEME',
                        help='those of compare.py, or your own (default: nope rope composite)')
    from_table_flag(parser)
    common_flags(parser, 'narrow models for five steps')
    return parse(parser, {'steps': ([1000, 4000], [5])})


def main():
    args = arguments()
    schemes = read_schemes(args.schemes)
    parts = 'depth', args.dataset, 'quick' if args.quick else ''
    path = Path(args.results, '-'.join(part for part in parts if part) + '.csv')
    old = {}
    if args.from_table and path.is_file():
        old = {tuple(row.values())[:3]: float(row['val_loss']) for row in read_csv(path)}
    runs = [(steps, layers, scheme) for steps in args.steps for layers in args.layers for scheme in schemes]
    for key in runs:
        check_run(*place_and_words(*key, schemes[key[2]], args))
    table = {}
    for key in runs:
        steps, layers, scheme = key
        table[key] = old.get(tuple(map(str, key))) if scheme in SCHEMES else None  # no table says what yours was
        if table[key] is None:
            out, words = place_and_words(*key, schemes[scheme], args)
            if not (out / 'loss.png').exists():  # the last file that a run writes
                train_run(words, f'{scheme}, {layers} layers, {steps} steps')
            table[key] = losses(out)[-1][1]
        merge_table(path, HEADER, [(*key, table[key])], 3)
        print(f'{steps:,} steps, {layers} layers, {scheme}: {table[key]:.4f}', flush=True)
    print(f'\n| steps | layers | {" | ".join(schemes)} |\n|---|---{"|---" * len(schemes)}|')
    for steps in args.steps:
        for layers in args.layers:
            cells = [f'{table[steps, layers, scheme]:.4f}' for scheme in schemes]
            print(f'| {steps:,} | {layers} | {" | ".join(cells)} |')
    save(draw(table, list(schemes)), path)


if __name__ == '__main__':
    main()
