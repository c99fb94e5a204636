"""
Draw one sentence through one head of each layer: the parts of its attention. The axes are the tokens. The head is the
one whose weights differ most from equal weights.

    python experiments/look_inside.py --out_dir out/composite-causal-shakespeare --text "To be, or not to be"

Row i is the query, column j the key; keys that a query does not see are grey. From left to right:
  composite, conv, nope   the parts of the score (equation 6 of Chang et al. 2021), and the attention
  kernelized              products of the features, the Toeplitz matrix e^{b_{j-i}}, and the attention
softmax(x + c) = softmax(x), so the mean of each row of a score is subtracted; products are divided by the largest of
their row, e^b by its largest. Every layer is checked: the weights times the values must give the layer's own output;
otherwise nothing is drawn.
Writes look_inside.png in the folder of the run, or --out.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
from lib import die, layer_calls, positive, pyplot
from torch.nn import functional as F
from train import one_line

from sample import load_run, tokenizer

LONGEST = 40  # tokens; the labels of more are too small to read
CONTENT = 'content\n$q_i\\cdot k_j\\,/\\sqrt{hs}$'


def along_diagonals(kernel):
    """Kernel scores (nh, T, 2k+1) of each query -> (nh, T, T): entry i, j is that of offset j - i, clipped to +-k."""
    T, k = kernel.size(1), kernel.size(2) // 2
    offset = torch.arange(T) - torch.arange(T)[:, None]  # (T, T): j - i
    return kernel.gather(2, (offset.clamp(-k, k) + k).expand(len(kernel), T, T))


def softmax_attention(model, attn, x, q, k, see):
    """Composite, conv, nope: -> the parts of the score {title: (nh, T, T)}, and the weights (nh, T, T)."""
    T, scale = q.size(1), q.size(-1) ** -0.5
    dynamic = getattr(attn, 'dynamic', None)
    fixed = getattr(attn, 'fixed', getattr(attn, 'lightweight', None))
    parts = {}
    if getattr(attn, 'content', True):
        parts[CONTENT] = q @ k.transpose(1, 2) * scale
    if dynamic is not None:
        parts['query-dependent kernel\n$q_i\\cdot W_{j-i}\\,/\\sqrt{hs}$'] = along_diagonals(q @ dynamic.T * scale)
    if fixed is not None:
        parts['fixed kernel\n$\\beta_{j-i}$'] = along_diagonals(fixed[:, None].expand(-1, T, -1))
    score = sum(parts.values(), torch.zeros(T, T))
    return parts, score.masked_fill(~see, -math.inf).softmax(-1)


def kernelized(model, attn, x, q, k, see):
    """Kernelized: as softmax_attention(), but the parts are multiplied, and divided by the sum of the row."""
    if attn.normalize:
        q, k = F.normalize(q, dim=-1, eps=1e-4), F.normalize(k, dim=-1, eps=1e-4)
    else:
        q, k = q * q.size(-1) ** -0.25, k * k.size(-1) ** -0.25
    features = sys.modules[type(model).__module__].features
    q = features(q, attn.w, model.config.feature_map)  # (nh, T, m)
    k = features(k, attn.w, model.config.feature_map)
    products = q @ k.transpose(1, 2) * see
    parts = {'features\n$\\phi(q_i)\\cdot\\phi(k_j)$': products / products.abs().amax(-1, keepdim=True)}
    if attn.b is not None:
        b = along_diagonals(attn.b[:, None].expand(-1, q.size(1), -1))
        largest = b.masked_fill(~see, -math.inf).amax((1, 2), keepdim=True)  # of each head
        parts['Toeplitz matrix\n$e^{\\,b_{j-i}}$'] = (b - largest).exp()
    weights = math.prod(parts.values()) * see
    return parts, weights / weights.sum(-1, keepdim=True)


SCHEMES = {'composite': softmax_attention, 'conv': softmax_attention, 'nope': softmax_attention,
           'kernelized': kernelized}


@torch.no_grad()
def look(model, idx, scheme):
    """One head of each layer at the tokens idx (1, T): -> a list of dicts, and which key a query sees, bool (T, T).

    scheme: a function above. Raises ValueError if weights times values are not the layer's own output.
    """
    see = torch.ones(idx.size(1), idx.size(1), dtype=torch.bool)
    see = see.tril() if model.config.causal else see
    layers = []
    for n, (block, (x, own)) in enumerate(zip(model.h, layer_calls(model, idx)), 1):
        attn = block.attn
        q, k, v = [t[0].unflatten(-1, (model.config.n_head, -1)).transpose(0, 1) for t in attn.c_attn(x).chunk(3, -1)]
        parts, weights = scheme(model, attn, x, q, k, see)
        y = (weights @ v).transpose(0, 1).flatten(1)[None]  # (1, T, C)
        if getattr(attn, 'conv_out', None) is not None:
            module = sys.modules[type(model).__module__]
            y = y + module.depthwise_conv(v.transpose(0, 1).flatten(1)[None], attn.conv_out, attn.causal)
        gap = ((attn.c_proj(y) - own).abs().max() / own.abs().max()).item()
        if not gap <= 1e-5:
            raise ValueError(f'weights times values miss the output of layer {n} by {gap:.0e}')
        unequal = (weights - see / see.sum(-1, keepdim=True)).abs().sum((1, 2))  # (nh,)
        chosen = unequal.argmax().item()
        layers.append(dict(number=n, head=chosen, parts={title: part[chosen] for title, part in parts.items()},
                           weights=weights[chosen]))
    return layers, see


def draw_column(fig, axes, images, signed):
    """A matrix per layer, all on one scale, and its color bar; NaN is grey."""
    largest = max(image[image.isfinite()].abs().max().item() for image in images)
    colors = pyplot().get_cmap('RdBu_r' if signed else 'magma_r').with_extremes(bad='0.92')
    for ax, image in zip(axes, images):
        shades = ax.imshow(image.numpy(), cmap=colors, vmin=-largest if signed else 0, vmax=largest)
    bar = fig.colorbar(shades, ax=list(axes), location='bottom', shrink=0.8, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=8)


def draw(layers, see, tokens, multiplied):
    """-> the figure: a row per layer; its parts, added or multiplied, and its weights."""
    titles = list(layers[0]['parts'])
    n = len(titles)
    side = max(2.15, 0.085 * len(tokens))  # of a panel, in inches
    fig, axes = pyplot().subplots(len(layers), n + 1, squeeze=False, layout='constrained',
                                  figsize=((side + 0.12) * (n + 1) + 0.5, (side + 0.05) * len(layers) + 1.25))
    labels = dict(family='monospace', fontsize=7 if len(tokens) <= 24 else 6, parse_math=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], box_aspect=1)
        ax.tick_params(length=0, labelsize=7)
    for c, title in enumerate(titles):
        images = [layer['parts'][title].masked_fill(~see, math.nan) for layer in layers]
        if not multiplied:
            images = [image - image.nanmean(1, keepdim=True) for image in images]
        draw_column(fig, axes[:, c], images, signed=not multiplied)
        axes[0, c].set_title(title, fontsize=10)
        sign = '\u2192' if c == n - 1 else '\u00d7' if multiplied else '+'  # between this panel and the next
        for ax in axes[:, c + 1]:
            ax.text(-0.085, 0.5, sign, transform=ax.transAxes, ha='center', va='center', fontsize=12, in_layout=False)
    draw_column(fig, axes[:, n], [layer['weights'].masked_fill(~see, math.nan) for layer in layers], signed=False)
    axes[0, n].set_title('attention\n$a_{ij}$', fontsize=10)
    turned = 90 if max(map(len, tokens)) > 2 else 0
    for ax in axes[-1]:
        ax.set_xticks(range(len(tokens)), tokens, rotation=turned, **labels)
    for ax, layer in zip(axes[:, 0], layers):
        ax.set_yticks(range(len(tokens)), tokens, **labels)
        ax.set_ylabel(f'layer {layer["number"]}, head {layer["head"] + 1}')
    return fig


def shown(piece):
    """A token as it is drawn: invalid UTF-8 as \\x.., white space as signs."""
    text = piece.decode('utf-8', 'backslashreplace')
    return text.replace(' ', '\u2423').replace('\n', '\u21b5').replace('\t', '\u2192')


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', required=True, help='folder of a run')
    parser.add_argument('--text', default='To be, or not to be', help=f'up to {LONGEST} tokens (default: %(default)s)')
    parser.add_argument('--layer', type=positive, help='1, 2, ... (default: all)')
    parser.add_argument('--out', help='the picture, a .png file (default: look_inside.png in the folder of the run)')
    args = parser.parse_args()
    out = Path(args.out or Path(args.out_dir, 'look_inside.png'))
    if out.suffix != '.png':
        die(f'--out must end in .png, not {out}')
    model, checkpoint = load_run(args.out_dir, None, 'cpu')
    if args.layer and args.layer > model.config.n_layer:
        die(f'--layer must be from 1 to {model.config.n_layer}, not {args.layer}')
    encode, piece = tokenizer(checkpoint['meta']['tokenizer'])
    ids = encode(args.text)
    if not 2 <= len(ids) <= LONGEST:
        die(f'--text must have from 2 to {LONGEST} tokens, and this one has {len(ids)}')
    name = checkpoint['settings']['model']
    if name not in SCHEMES:
        die(f'runs of {", ".join(SCHEMES)} can be drawn, and this one is of {name}')
    try:
        layers, see = look(model, torch.tensor([ids]), SCHEMES[name])
    except (ValueError, AttributeError, RuntimeError, IndexError) as e:  # another kind of layer, too many positions
        die(f'model_{name}.py with these settings cannot be drawn: {one_line(e)}')
    layers = [layer for layer in layers if args.layer in (None, layer['number'])]
    fig = draw(layers, see, [shown(piece(i)) for i in ids], multiplied=name == 'kernelized')
    run = Path(args.out_dir).resolve().name
    fig.suptitle(f'{run}, step {checkpoint["step"]}: row i is the query, column j the key', fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=120)
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
