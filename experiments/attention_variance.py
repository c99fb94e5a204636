"""
Does the variance of the output of causal attention tell the position? Layer by layer, without any training.

    python experiments/attention_variance.py --quick     # seconds: 4 layers of 256, 256 tokens
    python experiments/attention_variance.py             # the paper's size, 12 layers of 768, 512 tokens
    python experiments/attention_variance.py --name enwik8-8000    # the causal runs of compare.py, before and after

Answers the variance figures of Chi et al. 2023: o_m, the output of attention at token m (after c_proj, before the
residual), against the theory d^2 sigma^4 / m. Random models are model_nope.py with random tokens and the plain
initialization; where d is not the paper's 768, sigma grows by sqrt(768/d), which keeps d sigma^2 = 0.307 and the theory
line. Variance is over the channels of a token, its mean over sequences. Panels: every layer; the first layer with other
sigmas; no causal mask; trained runs, and the same runs before training.
Writes experiments/results/attention_variance[-<name>].csv and .png (with --quick in out/quick).
"""
import math

import numpy as np
import torch
from lib import (
    Parser, before_training, data_set, layer_calls, line_panels, merge_csv, print_table, runs_of, save, sequences,
    short_names, table_path)
from train import load_model_file

from sample import load_run

FULL = dict(n_embd=768, n_head=12, n_layer=12, block_size=512)  # the paper's size
SMALL = dict(n_embd=256, n_head=4, n_layer=4, block_size=256)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HEADER = ('what', 'sigma', 'layer', 'm', 'variance', 'theory')


def random_model(name, sigma, seed, device, **config):
    """A frozen model, by default as the theory wants it; sigma is meant at width 768."""
    module = load_model_file(name)
    torch.manual_seed(seed)
    sigma = sigma * math.sqrt(768 / config['n_embd'])
    model = module.Model(module.Config(init_std=sigma, scale_residual_init=False, **config))
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def variances(model, idx, batch=4):
    """Variance of the output of attention over the channels, its mean over the sequences idx (B, T): (layers, T)."""
    sums = torch.zeros(len(model.h), idx.size(1))
    for part in idx.split(batch):
        outputs = [y for _, y in layer_calls(model, part.to(model.wte.weight.device))]  # each (batch, T, C)
        sums += torch.stack([y.float().var(-1).sum(0).cpu() for y in outputs])
    return sums.numpy() / len(idx)


def slope(variances):
    """Of log variance against log m, at m = 1, 2, 4, ... so that every octave counts alike."""
    return np.polyfit(np.log(2) * np.arange(len(variances)), np.log(variances), 1)[0]


def random_curves(args, size):
    """(what, sigma, layer, variance (T,), theory at m = 1) of random models."""
    generator = torch.Generator().manual_seed(args.seed)
    idx = torch.randint(args.vocab_size, (args.sequences, size['block_size']), generator=generator)
    cases = [('causal', 0.02, size['n_layer'], True)]
    cases += [('sigmas, first layer', 0.02 * times, 1, True) for times in (0.1, 1, 3, 10)]
    cases += [('no causal mask', 0.02, size['n_layer'], False)]
    curves = []
    for what, sigma, n_layer, causal in cases:
        model = random_model('nope', sigma, args.seed, DEVICE, vocab_size=args.vocab_size, causal=causal,
                             **{**size, 'n_layer': n_layer})
        theory = (size['n_embd'] * model.config.init_std ** 2) ** 2
        curves += [(what, sigma, layer, v, theory) for layer, v in enumerate(variances(model, idx), 1)]
    return curves


def trained_curves(name, out_dir, args):
    """(what, None, layer, variance (T,), None) of a run before and after its training, on its validation tokens."""
    model, checkpoint = load_run(out_dir, None, DEVICE)
    val = data_set(checkpoint['settings']['dataset'], args.data_dir)[1]
    idx = sequences(val, 4 * args.sequences, model.config.block_size)
    curves = []
    for what, which in (('before training', before_training(model, checkpoint)), ('trained', model)):
        curves += [(f'{what}: {name}', None, layer, v, None) for layer, v in enumerate(variances(which, idx), 1)]
    return curves


def csv_rows(curves):
    """(what, sigma, layer, m, variance, theory) at m = 1, 2, 4, ... and some 25 others."""
    rows = []
    for what, sigma, layer, v, theory in curves:
        octaves = 2 ** np.arange(len(v).bit_length())
        for m in sorted({*np.geomspace(1, len(v), 25).round().astype(int).tolist(), *octaves.tolist()}):
            rows.append((what, sigma, layer, m, float(v[m - 1]), theory / m if theory else None))
    return rows


def in_panels(rows):
    """{what: {(sigma, layer): ([m], [variance], [theory or None])}} of rows of the CSV."""
    panels = {}
    for what, sigma, layer, m, v, theory in rows:
        line = panels.setdefault(what, {}).setdefault((sigma, layer), ([], [], []))
        for values, value in zip(line, (m, v, theory)):
            values.append(float(value) if value not in (None, '') else None)
    return panels


def slope_of(line):
    octaves = [v for m, v in zip(*line[:2]) if math.log2(m).is_integer()]
    return f'{slope(octaves):.2f}'


def random_table(rows):
    """Rows of the CSV -> variance over the theory at the first and last m, and the slope, of random models."""
    cells = []
    for what, lines in in_panels(rows).items():
        for (sigma, layer), line in lines.items():
            if line[2][0]:
                ratios = [f'{line[1][i] / line[2][i]:.2f}' for i in (0, -1)]
                cells.append((what, f'{float(sigma):g}', str(layer), *ratios, slope_of(line)))
    return ('random models', 'sigma', 'layer', 'variance / theory, m = 1', 'last m', 'slope'), cells


def trained_table(rows):
    """Rows of the CSV -> the slope in each layer of trained runs, before and after their training."""
    panels = in_panels(rows)
    cells = []
    for what, lines in panels.items():
        if what.startswith('trained'):
            before = panels[what.replace('trained', 'before training', 1)]
            cells.append((what.removeprefix('trained: '), *(f'{slope_of(before[key])}, {slope_of(line)}'
                                                            for key, line in lines.items())))
    layers = range(1, max(map(len, cells), default=1))
    return ('slope: before, after training', *(f'layer {layer}' for layer in layers)), cells


def draw(rows):
    """A panel for each case, trained runs with their lines before training."""
    panels = {}
    for what, lines in in_panels(rows).items():
        sweep = what.startswith('sigmas')
        panel = panels.setdefault(what.replace('before training: ', 'trained: '), {})
        for (sigma, layer), (m, v, theory) in lines.items():
            name = f'sigma {float(sigma):g}' if sweep else f'layer {layer}' + ', before' * what.startswith('before')
            scale = theory[0] if sweep else 1  # each sigma has a theory of its own
            panel[name] = m, [x / scale for x in v]
            if theory[0]:
                panel['theory'] = m, [x / scale for x in theory]
    return line_panels(panels, 'position m', 'variance of o_m', '-', xscale='log',
                       yscale='log')


def main():
    parser = Parser(__doc__, 'smaller random models: width 256, 4 heads, 4 layers, 256 tokens')
    parser.add_argument('out_dirs', nargs='*', help='folders of trained runs, of any model')
    parser.add_argument('--name', help='all causal runs of this --name of compare.py; other rows stay in the table')
    parser.add('--sequences', 20, note='of each case')
    parser.add('--vocab_size', 50304, note='number of different random tokens; the theory needs many')
    parser.add('--seed', 1, note='of weights and tokens')
    parser.add_data()
    args = parser.parse_args()
    if args.name and args.out_dirs:
        parser.error('give folders of runs or --name, not both')
    out_dirs = runs_of(args.name) if args.name else args.out_dirs
    curves = [] if out_dirs else random_curves(args, SMALL if args.quick else FULL)
    for name, out_dir in zip(short_names(out_dirs), out_dirs):
        curves += trained_curves(name, out_dir, args)
    path = table_path(args, 'attention_variance', args.name)
    if not args.name:
        path.unlink(missing_ok=True)
    rows = merge_csv(path, HEADER, csv_rows(curves), 1, f'sequences: {args.sequences}')
    print_table(trained_table(rows) if out_dirs else random_table(rows))
    save(draw(rows), path)


if __name__ == '__main__':
    main()
