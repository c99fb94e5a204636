"""
Take the positions away from a trained model, measure the damage, and teach it another scheme in 500 steps.

    python experiments/take_positions_away.py --quick          # a few minutes on two CPU cores: does it run?
    python experiments/take_positions_away.py                  # a small GPT-2 of ours: 2,000 steps on Python's library
    python experiments/from_gpt2.py --size gpt2 --out_dir out/gpt2
    python experiments/take_positions_away.py --base out/gpt2 --name gpt2 --seeds 1    # GPT-2 itself, on WikiText-2

The base is a model with learned absolute positions. Each scheme gets its weights without them (wpe) and kernels of
zero, and is trained on: a model that needs its positions breaks at step 0, and the curve says how fast the scheme
gives them back. The scheme `absolute` keeps wpe and is trained on all the same: the control. All have a new optimizer,
and the batches of a seed are the same for all. The schemes are those of compare.py.
Runs stay in out/take_positions_away/: an interrupted experiment goes on where it stopped. Runs of one --name have the
same settings; other settings need another name.
Writes experiments/results/take_positions_away-<name>.csv and .png. The CSV's first line is the command.
"""
import argparse
import re
import shlex
import statistics
import sys
from pathlib import Path

from compare import QUICK, check_run, colors, losses, read_schemes, train_run
from from_gpt2 import begin_run
from lib import common_flags, parse, positive, pyplot, save, write_csv

import common
from common import die

OURS = ('config model objective absolute vocab_size dataset seed max_iters warmup_iters learning_rate eval_interval '
        'out_dir resume overwrite').split()  # flags of train.py that are set here
CONTROL = 'absolute'


def train_base(out, args):
    """The small GPT-2 that stands in for GPT-2: model_nope.py with learned absolute positions and biases."""
    words = ['--model', 'nope', '--absolute', '--bias', '--dataset', args.dataset, '--out_dir', str(out), *args.train,
             '--max_iters', str(args.base_steps)]
    check_run(out, words)
    if not (out / 'loss.png').exists():  # the last file that a run writes
        train_run(words, 'the base')


def read_base(out):
    """-> the checkpoint of a causal run with learned absolute positions and nothing else."""
    if not (out / 'ckpt_last.pt').is_file():
        die(f'{out} holds no run; --base is a folder that train.py or from_gpt2.py wrote')
    base = common.load_checkpoint(out / 'ckpt_last.pt')
    plain = base['settings']['model'] == 'nope' and base['settings']['objective'] == 'causal'
    if not plain or not base['config']['absolute']:
        die(f'{out} is not a causal run of --model nope --absolute, whose positions could be taken away')
    return base


def fine_tune(base, base_out, name, flags, seed, args):
    """One scheme with the weights of the base, trained on -> [(step, validation loss)], from step 0 on."""
    out = Path('out', 'take_positions_away', f'{args.name}-{name}-{seed}')
    words = ['--config', str(base_out / 'config.json'), *args.train, '--vocab_size', str(base['config']['vocab_size']),
             '--dataset', args.dataset or base['settings']['dataset'], '--out_dir', str(out), '--seed', str(seed),
             '--max_iters', str(args.steps), '--eval_interval', str(args.steps // 10),
             '--warmup_iters', str(args.steps // 10), '--learning_rate', str(args.learning_rate),
             '--no-absolute', *flags]
    check_run(out, words)
    if not (out / 'ckpt_last.pt').exists():
        begin_run([*words, '--overwrite'], base['model'], base['meta'])
    if not (out / 'loss.png').exists():
        train_run(words, f'{name} seed {seed}')
    return losses(out)


def table(curves):
    """curves {scheme: [[(step, loss)] of each seed]} -> a Markdown table of mean losses."""
    runs = next(iter(curves.values()))
    steps = [runs[0][i][0] for i in (1, 2, 4, 10)]
    before = curves[CONTROL][0][0][1]
    lines = [f'| scheme | before | positions gone | {" | ".join(f"{step} steps" for step in steps)} | by seed |',
             '|---|---|---|' + '---|' * (len(steps) + 1)]
    for scheme, runs in curves.items():
        means = [statistics.mean(run[i][1] for run in runs) for i in (0, 1, 2, 4, 10)]
        cells = [f'{before:.4f}', *(f'{mean:.4f}' for mean in means), ', '.join(f'{run[10][1]:.4f}' for run in runs)]
        lines.append(f'| {scheme} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw(curves, title):
    """Mean loss over the steps of fine-tuning, and each seed as a thin line; dotted: the base."""
    fig, ax = pyplot().subplots(figsize=(6.5, 4.8), layout='constrained')
    color = colors(list(curves))
    for scheme, runs in curves.items():
        steps = [step for step, _ in runs[0]]
        means = [statistics.mean(run[i][1] for run in runs) for i in range(len(steps))]
        ax.plot(steps, means, '.-', color=color[scheme], label=scheme)
        for run in runs:
            ax.plot(steps, [loss for _, loss in run], color=color[scheme], lw=0.5, alpha=0.5)
    ax.axhline(curves[CONTROL][0][0][1], color='0.3', ls=':', lw=1)
    ax.set(xlabel='steps of fine-tuning after the positions were taken away', title=title,
           ylabel='validation loss (nats per token)\nthin: each seed; dotted: before')
    ax.grid(alpha=0.3)
    fig.legend(loc='outside lower center', ncols=5, fontsize=8)
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--base', type=Path, help='a run with absolute positions (default: one is trained first)')
    parser.add_argument('--base_steps', type=positive, default=2000, help='of that training (default 2000)')
    parser.add_argument('--schemes', nargs='+', default=['nope', 'fixed', 'composite', 'rope'], metavar='SCHEME',
                        help='those of compare.py, or your own (default: nope fixed composite rope)')
    parser.add_argument('--steps', type=positive, default=500, help='of fine-tuning, a multiple of 10 (default 500)')
    parser.add_argument('--learning_rate', type=float, default=1e-3, help='of the fine-tuning (default 1e-3)')
    parser.add_argument('--seeds', type=positive, default=3, help='of the fine-tuning: 1, 2, ... (default 3)')
    parser.add_argument('--dataset', help='default: that of the base, and python for a base that is trained here')
    parser.add_argument('--name', help='of this setting, for folders and files (default: the name of the data set)')
    common_flags(parser, 'a much smaller setting: one seed, 60 steps and 20', dataset=False)
    parser.add_argument('--train', nargs=argparse.REMAINDER, default=[], help='everything after it goes to train.py')
    args = parse(parser)
    args.schemes = {CONTROL: ['--model', 'nope', '--absolute'],
                    **read_schemes([word for word in args.schemes if word != CONTROL])}
    for word in args.train:
        flag = word.split('=')[0].removeprefix('--').removeprefix('no-')
        if word.startswith('--') and flag in OURS:
            die(f'--train must not set --{flag}: take_positions_away.py sets it')
    if args.steps % 10:
        die(f'--steps must be a multiple of 10, not {args.steps}')
    args.dataset = args.dataset or (None if args.base else 'python')
    args.name = (args.name or args.dataset or args.base.name) + ('-quick' if args.quick else '')
    if not re.fullmatch(r'[\w.+-]+', args.name):
        die('--name has letters, digits, dots, dashes, plus signs and underscores only')
    if args.quick:
        args.base_steps = 60
        args.steps = 20
        args.seeds = 1
        args.train = [*([] if args.base else QUICK), *args.train]
    return args


def main():
    command = shlex.join(['python', 'experiments/take_positions_away.py', *sys.argv[1:]])
    args = arguments()
    base_out = args.base or Path('out', 'take_positions_away', f'{args.name}-base')
    if args.base is None:
        train_base(base_out, args)
    base = read_base(base_out)
    curves = {}
    for scheme, flags in args.schemes.items():
        for seed in range(1, 1 + args.seeds):
            curve = fine_tune(base, base_out, scheme, flags, seed, args)
            curves.setdefault(scheme, []).append(curve)
            print(f'{scheme} seed {seed}: {curve[0][1]:.4f} to {curve[-1][1]:.4f}', flush=True)
    rows = []
    for scheme, runs in curves.items():
        for seed, run in enumerate(runs, 1):
            rows += [(scheme, seed, step, f'{loss:g}') for step, loss in run]
    path = write_csv(args.results, f'take_positions_away-{args.name}', ('scheme', 'seed', 'step', 'val_loss'), rows,
                     command)
    print(f'\n{table(curves)}')
    save(draw(curves, args.name), path)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
