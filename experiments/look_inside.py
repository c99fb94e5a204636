"""
Draw one sentence through one head of each layer: the parts of its attention. The axes are the tokens.

    python experiments/look_inside.py --out_dir out/composite-causal-python --text "def get(self, name):"

Row i is the query, column j the key; what a query does not see is grey. From left to right:
  composite   the parts of the score (equation 6 of Chang et al. 2021), and the attention
  conv        the same, and the kernels of the output convolution in the channels of this head
  kernelized  products of the features, the Toeplitz matrix e^{b_{j-i}}, and the attention
  nope        content; attention; the sum of its squares in each row, which is 1/m if a query gives its m keys equal
              weights: the shrinking variance that tells the position (Chi et al. 2023)
  any other   content, what the file adds to it, and the attention, which is measured (--measure does it for the known
              ones too): with value 1 at one token and 0 at all others, a layer returns the weights of that token
What does not change the attention is taken off: the mean of each row of a score (not of the fixed kernel), the largest
product of a row, the largest e^b. Every layer is checked: the weights, times the values, must give the layer's own
output; otherwise nothing is drawn.

The same as numbers (in experiments/, after `sys.path.append('..')`):

    from look_inside import load_run, look, measured, torch
    model, checkpoint = load_run('out/composite-causal-python')
    layers, _ = look(model, torch.tensor([list(b'def get(self, name):')]), measured)
    print(layers[0]['weights'][-1])  # layer 1, the head furthest from equal weights: what the last token attends to
"""
import argparse
import math
import sys
from pathlib import Path

import torch
from lib import layer_calls, positive, pyplot
from torch.nn import functional as F

from common import die
from sample import load_run, tokenizer

LONGEST = 40  # tokens; the labels of more are too small to read
CONTENT = 'content\n$q_i\\cdot k_j\\,/\\sqrt{hs}$'
FIXED = 'fixed kernel\n$\\beta_{j-i}$'


def softmax_attention(module, attn, x, q, k, see):
    """Composite, conv, nope: -> the parts of the score {title: (nh, T, T)}, and the weights (nh, T, T)."""
    T, scale = q.size(1), q.size(-1) ** -0.5
    dynamic = getattr(attn, 'dynamic', None)
    fixed = getattr(attn, 'fixed', getattr(attn, 'lightweight', None))
    parts = {}
    if getattr(attn, 'content', True):
        parts[CONTENT] = q @ k.transpose(1, 2) * scale
    if dynamic is not None:
        made = module.along_diagonals(q @ dynamic.T * scale, 0, T)
        parts['query-made kernel\n$q_i\\cdot W_{j-i}\\,/\\sqrt{hs}$'] = made
    if fixed is not None:
        parts[FIXED] = module.along_diagonals(fixed[:, None].expand(-1, T, -1), 0, T)
    score = sum(parts.values(), torch.zeros(T, T))
    return parts, score.masked_fill(~see, -math.inf).softmax(-1)


def kernelized(module, attn, x, q, k, see):
    """Kernelized: as softmax_attention(), but the parts are multiplied, and divided by the sum of the row."""
    if attn.normalize:
        q, k = F.normalize(q, dim=-1, eps=1e-4), F.normalize(k, dim=-1, eps=1e-4)
    else:
        q, k = q * q.size(-1) ** -0.25, k * k.size(-1) ** -0.25
    q = module.features(q, attn.w, attn.kind, stable=not attn.normalize)  # (nh, T, m)
    k = module.features(k, attn.w, attn.kind)
    products = q @ k.transpose(1, 2) * see
    parts = {'features\n$\\phi(q_i)\\cdot\\phi(k_j)$': products / products.abs().amax(-1, keepdim=True)}
    if attn.b is not None:
        b = module.along_diagonals(attn.b[:, None].expand(-1, q.size(1), -1), 0, q.size(1))
        largest = b.masked_fill(~see, -math.inf).amax((1, 2), keepdim=True)  # of each head
        parts['Toeplitz matrix\n$e^{\\,b_{j-i}}$'] = (b - largest).exp()
    weights = math.prod(parts.values()) * see
    return parts, weights / weights.sum(-1, keepdim=True)


def measured(module, attn, x, q, k, see):
    """Any attention that takes q, k, v from c_attn and ends in c_proj: as softmax_attention()."""
    nh, T, hs = q.shape
    results = []

    def set_values(_, args, output):
        output[..., 2 * nh * hs:] = torch.eye(T)[..., None]  # (T, T, C): in text j the value is 1 at token j alone

    def keep(_, args):
        y = args[0]  # (T, T, C)
        if getattr(attn, 'conv_out', None) is not None:
            y = y - module.depthwise_conv(torch.eye(T)[..., None].expand(y.shape), attn.conv_out, attn.causal)
        results.append(y.unflatten(-1, (nh, hs))[..., 0].permute(2, 1, 0))  # (nh, T, T): row i, text j

    hooks = attn.c_attn.register_forward_hook(set_values), attn.c_proj.register_forward_pre_hook(keep)
    attn(x.expand(T, -1, -1))
    for hook in hooks:
        hook.remove()
    weights = results[0]
    content = q @ k.transpose(1, 2) * hs ** -0.5
    added = weights.log() - content
    if not added[:, see].isfinite().all():  # a weight is 0 or negative: no softmax of a sum
        return {}, weights
    return {CONTENT: content, 'what the file adds\n$\\log a_{ij} - q_i\\cdot k_j\\,/\\sqrt{hs}$': added}, weights


SCHEMES = {'composite': softmax_attention, 'conv': softmax_attention, 'nope': softmax_attention,
           'kernelized': kernelized}  # any other file is measured


@torch.no_grad()
def look(model, idx, scheme, head=None):
    """One head of each layer at the tokens idx (1, T): -> a list of dicts, and which key a query sees, bool (T, T).

    scheme: a function above. head counts from 0; None: in each layer the one whose weights differ most from equal ones.
    ValueError where weights times values are not the layer's own output.
    """
    see = torch.ones(idx.size(1), idx.size(1), dtype=torch.bool)
    see = see.tril() if model.config.causal else see
    layers = []
    for n, (block, (x, own)) in enumerate(zip(model.h, layer_calls(model, idx)), 1):
        attn, module = block.attn, sys.modules[type(model).__module__]
        q, k, v = [t[0].unflatten(-1, (model.config.n_head, -1)).transpose(0, 1) for t in attn.c_attn(x).chunk(3, -1)]
        parts, weights = scheme(module, attn, x, q, k, see)
        y = (weights @ v).transpose(0, 1).flatten(1)[None]  # (1, T, C)
        kernels = getattr(attn, 'conv_out', None)
        if kernels is not None:
            y = y + module.depthwise_conv(v.transpose(0, 1).flatten(1)[None], kernels, attn.causal)
        gap = ((attn.c_proj(y) - own).abs().max() / own.abs().max()).item()
        if not gap <= 1e-5:
            raise ValueError(f'weights times values miss the output of layer {n} by {gap:.0e}')
        unequal = (weights - see / see.sum(-1, keepdim=True)).abs().sum((1, 2))  # (nh,)
        chosen = unequal.argmax().item() if head is None else head
        if kernels is not None:
            kernels = kernels.unflatten(0, (len(weights), -1))[chosen]  # (hs, K)
        parts = {title: part[chosen] for title, part in parts.items()}
        squares = weights.square().sum(-1)  # (nh, T)
        layers.append(dict(number=n, head=chosen, parts=parts, weights=weights[chosen], squares=squares,
                           kernels=kernels))
    return layers, see


def draw_column(fig, axes, images, signed, **how):
    """A matrix per layer, all on one scale, and its colour bar; NaN is grey."""
    largest = max(image[image.isfinite()].abs().max().item() for image in images)
    colors = pyplot().get_cmap('RdBu_r' if signed else 'magma_r').with_extremes(bad='0.92')
    for ax, image in zip(axes, images):
        shades = ax.imshow(image.numpy(), cmap=colors, vmin=-largest if signed else 0, vmax=largest, **how)
    bar = fig.colorbar(shades, ax=list(axes), location='bottom', shrink=0.8, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=8)


def draw_output_kernels(fig, axes, layers, causal):
    """The weights of the output convolution in the channels of the head, sorted by the offset of the largest."""
    kernels = [layer['kernels'][layer['kernels'].abs().argmax(1).argsort(stable=True)] for layer in layers]
    hs, K = kernels[0].shape
    first = 1 - K if causal else -(K // 2)
    draw_column(fig, axes, kernels, True, aspect='auto', extent=(first - 0.5, first + K - 0.5, hs - 0.5, -0.5))
    axes[0].set_title('output convolution\nchannels of the head', fontsize=10)
    axes[-1].set_xticks(range(first, first + K, 4))
    axes[-1].set_xlabel('offset j - i', fontsize=8)


def draw_squares(axes, layers, see):
    """The sum of the squared weights of each query, and what it is if all its keys have equal weights."""
    for ax, layer in zip(axes, layers):
        ax.plot(layer['squares'].T.numpy(), color='0.8', lw=1)
        ax.plot(layer['squares'][layer['head']].numpy(), color='C4', marker='o', ms=3)
        ax.plot((1 / see.sum(-1)).numpy(), 'k--', lw=1)
        ax.set(ylim=(0, 1.04), yticks=[0, 1])
    axes[0].set_title('$\\Sigma_j\\,a_{ij}^2$ of query i; grey: other\nheads; dashed: equal weights', fontsize=8)


def draw(layers, see, tokens, multiplied, squares):
    """-> the figure: a row per layer; its parts, added or multiplied; its weights; its kernels or their squares."""
    titles = [title for title in layers[0]['parts'] if all(title in layer['parts'] for layer in layers)]
    convolves, n = layers[0]['kernels'] is not None, len(titles)
    columns = n + 2 if convolves or squares else n + 1
    side = max(2.15, 0.085 * len(tokens))  # of a panel, in inches
    fig, axes = pyplot().subplots(len(layers), columns, squeeze=False, layout='constrained',
                                  figsize=((side + 0.12) * columns + 0.5, (side + 0.05) * len(layers) + 1.25))
    labels = dict(family='monospace', fontsize=7 if len(tokens) <= 24 else 6, parse_math=False)
    sign = '\u00d7' if multiplied else '+'
    turned = 90 if max(len(token) for token in tokens) > 2 else 0
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], box_aspect=1)
        ax.tick_params(length=0, labelsize=7)
    for c, title in enumerate(titles):
        images = [layer['parts'][title].masked_fill(~see, math.nan) for layer in layers]
        if not multiplied and title != FIXED:
            images = [image - image.nanmean(1, keepdim=True) for image in images]
        draw_column(fig, axes[:, c], images, signed=not multiplied)
        axes[0, c].set_title(title, fontsize=10)
        between = '\u2192' if c == n - 1 else sign  # this panel and the next
        for ax in axes[:, c + 1]:
            ax.text(-0.085, 0.5, between, transform=ax.transAxes, ha='center', va='center', fontsize=12,
                    in_layout=False)
    draw_column(fig, axes[:, n], [layer['weights'].masked_fill(~see, math.nan) for layer in layers], signed=False)
    axes[0, n].set_title('attention\n$a_{ij}$' if titles else 'weights\n$a_{ij}$', fontsize=10)
    if convolves:
        draw_output_kernels(fig, axes[:, -1], layers, causal=not see[0, -1])
    elif squares:
        draw_squares(axes[:, -1], layers, see)
    on_tokens = axes[-1, :n + 1] if convolves else axes[-1]
    for ax in on_tokens:
        ax.set_xticks(range(len(tokens)), tokens, rotation=turned, **labels)
    for ax, layer in zip(axes[:, 0], layers):
        ax.set_yticks(range(len(tokens)), tokens, **labels)
        ax.set_ylabel(f'layer {layer["number"]}, head {layer["head"] + 1}')
    return fig


def shown(piece):
    """A token as it is drawn: bytes that are no text as \\x.., blanks as signs."""
    text = piece.decode('utf-8', 'backslashreplace')
    return text.replace(' ', '\u2423').replace('\n', '\u21b5').replace('\t', '\u2192')


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', required=True, help='folder of a run')
    parser.add_argument('--text', default='def get(self, name):', help=f'up to {LONGEST} tokens (default: %(default)s)')
    parser.add_argument('--layer', type=positive, help='1, 2, ... (default: all)')
    parser.add_argument('--head', type=positive, help='1, 2, ... (default: in each layer the one that is furthest from '
                        'equal weights)')
    parser.add_argument('--measure', action='store_true', help='measure the attention, as of a file that is not known')
    parser.add_argument('--out', help='the picture, a .png file (default: look_inside.png in the folder of the run)')
    args = parser.parse_args()
    out = Path(args.out or Path(args.out_dir, 'look_inside.png'))
    if out.suffix != '.png':
        die(f'--out must end in .png, not {out}')
    model, checkpoint = load_run(args.out_dir, None, 'cpu')
    for what, number, most in (('layer', args.layer, model.config.n_layer), ('head', args.head, model.config.n_head)):
        if number is not None and number > most:
            die(f'--{what} must be from 1 to {most}, not {number}')
    encode, piece = tokenizer(checkpoint['meta']['tokenizer'])
    ids = encode(args.text)
    if not 2 <= len(ids) <= LONGEST:
        die(f'--text must have from 2 to {LONGEST} tokens, and this one has {len(ids)}')
    if model.config.absolute and len(ids) > model.config.block_size:
        die(f'absolute positions end at block_size={model.config.block_size}: --text has {len(ids)} tokens')
    name = checkpoint['settings']['model']
    scheme = measured if args.measure else SCHEMES.get(name, measured)
    head = None if args.head is None else args.head - 1
    try:
        layers, see = look(model, torch.tensor([ids]), scheme, head)
    except (ValueError, AttributeError, RuntimeError, IndexError) as e:  # another kind of layer
        why = ' '.join(str(e).split())[:200]
        hint = '' if scheme is measured else ' (try --measure)'
        die(f'model_{name}.py with these settings cannot be drawn: {why}{hint}')
    layers = [layer for layer in layers if args.layer in (None, layer['number'])]
    fig = draw(layers, see, [shown(piece(i)) for i in ids], scheme is kernelized, name == 'nope')
    run = Path(args.out_dir).resolve().name
    fig.suptitle(f'{run}, step {checkpoint["step"]}: row i is the query, column j the key', fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=120)
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
