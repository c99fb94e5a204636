"""
Take the positions away from a trained model, measure the damage, and train it on with another scheme for 500 steps.

    python experiments/take_positions_away.py --quick          # a few minutes on two CPU cores: does it run?
    python experiments/take_positions_away.py                  # a small GPT-2 of ours, trained for 2,000 steps
    python experiments/from_gpt2.py --size gpt2 --out_dir out/gpt2
    python experiments/take_positions_away.py --base out/gpt2 --name gpt2 --seeds 1 --learning_rate 3e-4    # GPT-2

The base is a model with learned absolute positions. Each scheme gets its weights without them (wpe) and kernels of
zero, and is trained on. The loss at step 0 tells how much the model needs its positions, and the curve how fast the
scheme replaces them. The control, `absolute`, keeps wpe and is trained on as well. All have a new optimizer, and the
same batches for the same seed. The schemes are those of compare.py.
Runs stay in out/take_positions_away/: an interrupted command continues. Other settings need another --name.
Writes experiments/results/take_positions_away-<name>.csv and .png.
"""
import statistics
from pathlib import Path

from compare import HEADER, read_curves
from from_gpt2 import begin_run
from lib import (
    QUICK, Parser, check_name, check_run, die, line_panels, losses, positive, print_table, rate, read_schemes,
    refuse_flags, save, train_all, write_csv)
from train import load_checkpoint

OURS = ('config model objective absolute vocab_size dataset seed max_iters warmup_iters learning_rate eval_interval '
        'out_dir resume overwrite').split()  # flags of train.py that are set here
CONTROL = 'absolute'


def train_base(out, args):
    """The small GPT-2 that replaces GPT-2: model_nope.py with learned absolute positions and biases."""
    words = ['--model', 'nope', '--absolute', '--bias', '--dataset', args.dataset, *args.train,
             '--max_iters', str(args.base_steps)]
    list(train_all([('the base', out, words)]))


def read_base(out):
    """-> the checkpoint of a causal run with learned absolute positions and nothing else."""
    if not (out / 'ckpt_last.pt').is_file():
        die(f'{out} holds no run; --base is a folder that train.py or from_gpt2.py wrote')
    base = load_checkpoint(out / 'ckpt_last.pt')
    plain = base['settings']['model'] == 'nope' and base['settings']['objective'] == 'causal'
    if not plain or not base['config']['absolute']:
        die(f'{out} is not a causal run of --model nope --absolute, whose positions could be taken away')
    return base


def fine_tuning(base, base_out, name, flags, seed, args):
    """-> the run (label, folder, flags) of one scheme, which begins with the weights of the base."""
    out = Path('out', 'take_positions_away', f'{args.name}-{name}-{seed}')
    words = ['--config', str(base_out / 'config.json'), *args.train, '--vocab_size', str(base['config']['vocab_size']),
             '--dataset', args.dataset or base['settings']['dataset'], '--seed', str(seed),
             '--max_iters', str(args.steps), '--eval_interval', str(args.steps // 10),
             '--warmup_iters', str(args.steps // 10), '--learning_rate', str(args.learning_rate),
             '--no-absolute', *flags]
    check_run(out, words)
    if not (out / 'ckpt_last.pt').exists():
        begin_run(out, words, base['model'], base['meta'])
    return f'{name} seed {seed}', out, words


def by_scheme(path):
    """{scheme: [[(step, loss)] of each seed]} of the table."""
    return {scheme: list(seeds.values()) for (_, scheme), seeds in read_curves(path).items()}


def loss_table(curves):
    """Mean loss over the seeds at some steps, and the last loss of each seed."""
    steps = [next(iter(curves.values()))[0][i][0] for i in (1, 2, 4, 10)]
    before = curves[CONTROL][0][0][1]
    rows = []
    for scheme, runs in curves.items():
        means = [statistics.mean(run[i][1] for run in runs) for i in (0, 1, 2, 4, 10)]
        rows.append((scheme, f'{before:.4f}', *(f'{mean:.4f}' for mean in means),
                     ', '.join(f'{run[10][1]:.4f}' for run in runs)))
    return ('scheme', 'before', 'positions gone', *(f'{step} steps' for step in steps), 'by seed'), rows


def draw(curves, title):
    """Mean loss over the seeds."""
    lines = {}
    for scheme, runs in curves.items():
        lines[scheme] = [step for step, _ in runs[0]], [statistics.mean(loss) for loss in zip(*(
            [loss for _, loss in run] for run in runs))]
    return line_panels({title: lines}, 'steps of fine-tuning after the positions were taken away',
                       'validation loss (nats per token)')


def arguments():
    parser = Parser(__doc__, 'a much smaller setting: one seed, 60 steps and 20')
    parser.add_argument('--base', type=Path, help='a run with absolute positions (default: one is trained first)')
    parser.add('--base_steps', 2000, 60, 'of that training')
    parser.add('--schemes', ['nope', 'fixed', 'composite', 'rope'], nargs='+', metavar='SCHEME',
               note="those of compare.py, or 'name: flags of train.py'")
    parser.add('--steps', 500, 20, 'of fine-tuning, a multiple of 10')
    parser.add('--learning_rate', 1e-3, note='of the fine-tuning', type=rate)
    parser.add('--seeds', 3, 1, 'of the fine-tuning: 1, 2, ...')
    parser.add_argument('--dataset', help='default: that of the base, and shakespeare for a base that is trained here')
    parser.add_argument('--name', help='of this setting, for folders and files (default: the name of the data set)')
    parser.add_argument('--jobs', type=positive, default=1, help='runs at a time (default 1)')
    parser.add_argument('--train', nargs='...', default=[], help='everything after it goes to train.py')
    args = parser.parse_args()
    args.schemes = {CONTROL: ['--model', 'nope', '--absolute'],
                    **read_schemes([word for word in args.schemes if word != CONTROL])}
    refuse_flags(args.train, OURS, '--train')
    if args.steps % 10:
        die(f'--steps must be a multiple of 10, not {args.steps}')
    args.dataset = args.dataset or (None if args.base else 'shakespeare')
    args.name = (args.name or args.dataset or args.base.name) + ('-quick' if args.quick else '')
    check_name('--name', args.name)
    if args.quick and not args.base:
        args.train = [*QUICK, *args.train]
    return args


def main():
    args = arguments()
    base_out = args.base or Path('out', 'take_positions_away', f'{args.name}-base')
    if args.base is None:
        train_base(base_out, args)
    base = read_base(base_out)
    runs = [fine_tuning(base, base_out, scheme, flags, seed, args)
            for scheme, flags in args.schemes.items() for seed in range(1, 1 + args.seeds)]
    for n in train_all(runs, args.jobs):
        curve = losses(runs[n][1])
        print(f'{runs[n][0]}: {curve[0][1]:.4f} to {curve[-1][1]:.4f}', flush=True)
    rows = []
    for label, out, _ in runs:
        scheme, _, seed = label.split()
        rows += [('causal', scheme, seed, step, f'{loss:g}') for step, loss in losses(out)]
    path = args.results / f'take_positions_away-{args.name}.csv'
    write_csv(path, HEADER, rows)
    print_table(loss_table(by_scheme(path)))
    save(draw(by_scheme(path), args.name), path)


if __name__ == '__main__':
    main()
