"""
Is this code fast on a CPU? Each aim measured in one run, in turns with what it is compared with.

    python experiments/laptop.py --nanogpt ../nanoGPT --chang ../BERT_Convolutions   # under ten minutes on two cores
    python experiments/laptop.py --parts auto sampling                               # some parts of it
    python experiments/laptop.py --quick                                             # small: does it run?

The parts (all on the CPU; times are forward and backward, unless said otherwise):
    steps       a training step of every model at the tiny preset, against nanoGPT's model in float32
    chang       attention, both sides, against the module of Chang et al. (2021) with the same weights
    near        the fast form of composite attention, 1,024 tokens, against flash attention
    auto        the form that `--attention auto` takes, against the faster of the two, over lengths and settings
    linear      kernelized attention, 4,096 tokens: without b against three lines, with b against flash attention
    sampling    milliseconds per token, one token at a time from a state

`--nanogpt` and `--chang` name checkouts of github.com/karpathy/nanoGPT and of github.com/tylerachang/BERT_Convolutions:
nothing of them is here. Outputs are checked to be equal before they are timed. Without --nanogpt the steps are compared
with model_nope.py in float32, and their aims are not judged; without --chang that part is left out.
Each figure is the median of jobs that run in turns, so that a ratio belongs to one moment.
Writes experiments/results/laptop.csv, again after each row, and .png; with --quick in out/quick.
"""
import argparse
import ast
import itertools
import math
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from lib import common_flags, parse, pyplot, save, write_csv
from speed import nanogpt, training_step
from torch import nn

import model_composite as composite
import model_conv as conv
import model_kernelized as kernelized
import model_nope as nope
from common import die

MODELS = {'nope': nope, 'composite': composite, 'conv': conv, 'kernelized': kernelized}
HEADER = 'part', 'what', 'ours_ms', 'theirs_ms', 'measure', 'value', 'aim', 'verdict'


def row(part, what, ours, theirs, measure, aim=None):
    """A row of the table from two times in ms.

    measure: 'speed', theirs / ours, should be at least the aim; 'time', ours / theirs, and 'ms', ours alone, should be
    at most the aim.
    """
    value = {'speed': theirs / ours, 'time': ours / theirs, 'ms': ours}[measure]
    reached = aim is not None and (value >= aim if measure == 'speed' else value <= aim)
    verdict = 'reached' if reached else 'missed'
    return part, what, ours, theirs, measure, value, aim, '' if aim is None or math.isnan(value) else verdict


def in_turns(jobs, seconds, hopeless=math.inf):
    """{name: median ms} of jobs that run in turns for some seconds, at least three times, after a first run of each.

    A job that is `hopeless` times as slow as the quickest in the first turn keeps that one measurement.
    """
    times = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    alive = list(jobs)
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 3 or time.perf_counter() < end:
        for name in alive:
            start = time.perf_counter()
            jobs[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
        turns += 1
        if turns == 1:
            limit = hopeless * min(t[0] for t in times.values())
            alive = [name for name in jobs if times[name][0] <= limit]
        alive = alive[1:] + alive[:1]  # another one begins: no job always follows the same one
    return {name: statistics.median(t) for name, t in times.items()}


def steps(args):
    """Training steps, 24 texts of 128 bytes: float32, bfloat16 autocast, and bfloat16 compiled."""
    size = dict(vocab_size=320, block_size=128, n_layer=4, n_head=4, n_embd=128)
    batch = 24
    if args.quick:
        size.update(block_size=32, n_layer=1, n_head=2, n_embd=32)
        batch = 2
    idx = torch.randint(256, (batch, size['block_size']))
    aims = {'float32': dict(nope=1.0, composite=0.95, conv=0.95, kernelized=0.95),
            'bfloat16': dict(nope=1.0, composite=1.5, conv=1.4, kernelized=1.3)}

    def build(name):
        return nanogpt(args.nanogpt, size) if name == 'nanoGPT' else MODELS[name].Model(MODELS[name].Config(**size))
    base = 'nanoGPT' if args.nanogpt else 'nope'
    names = list(MODELS) if base == 'nope' else ['nanoGPT', *MODELS]
    jobs = {}
    for name, mode in itertools.product(names, ('float32', 'bfloat16', 'bfloat16, compiled')):
        if not (args.quick and 'compiled' in mode):
            jobs[name, mode] = training_step(build(name), idx, bf16=mode != 'float32', compiled='compiled' in mode)
    ms = in_turns(jobs, args.seconds * 8)
    for (name, mode), time_of_step in ms.items():
        aim = aims.get(mode, {}).get(name) if args.nanogpt else None
        yield row('steps', f'{name}, {mode}, against {base}, float32', time_of_step, ms[base, 'float32'], 'speed', aim)


class Given(nn.Module):
    """In the place of c_attn: queries, keys and values that are there already, so that attention alone is timed."""

    def __init__(self, qkv):
        super().__init__()
        self.qkv = nn.Parameter(qkv)  # (B, T, 3 C)

    def forward(self, x):
        return self.qkv


def alone(module, n, hs=32, tokens=4096, dtype=torch.float32, **fields):
    """Attention of a model file without its projections: four heads of hs, texts of n tokens -> a layer and its x."""
    layer = module.Attention(module.Config(n_head=4, n_embd=4 * hs, **fields))
    B = max(1, tokens // n)
    layer.c_attn = Given(torch.randn(B, n, 12 * hs, dtype=dtype))
    layer.c_proj = nn.Identity()
    return layer, torch.zeros(B, n, 4 * hs, dtype=dtype)  # of x only the shape is read


def passes(layer, x, grad=True, form=None):
    """-> a function that runs form(x), by default the layer itself, forward and backward, or forward alone."""
    form = form or layer
    bf16 = torch.autocast('cpu', torch.bfloat16, enabled=x.dtype == torch.bfloat16)
    dy = torch.randn_like(x)

    def job():
        with torch.set_grad_enabled(grad), bf16:
            y = form(x)
        if grad:
            y.backward(dy.to(y.dtype))
            layer.zero_grad(set_to_none=True)
    return job


def changs_attention(path, layer, T):
    """The attention module of Chang et al., from a checkout, with the weights of a layer of model_composite.py."""
    file = Path(path, 'src', 'transformers', 'modeling_bert.py')
    if not file.is_file():
        die(f'--chang {path} is no checkout of BERT_Convolutions: it has no {file.relative_to(path)}')
    classes = [n for n in ast.parse(file.read_text(encoding='utf-8')).body if isinstance(n, ast.ClassDef)]
    wanted = ast.Module([n for n in classes if n.name == 'BertSelfAttention'], [])
    space = dict(math=math, torch=torch, nn=nn, print=str)  # without what it prints
    exec(compile(wanted, file, 'exec'), space)
    C = layer.c_attn.in_features
    config = argparse.Namespace(
        attention_kernel=f'qk_convfixed_convq {layer.kernel_size // 2}', value_forward='linear', qk='linear',
        remove_qk=False, max_position_embeddings=T, num_attention_heads=layer.n_head, hidden_size=C,
        attention_head_size=-1, attention_probs_dropout_prob=0.0)
    theirs = space['BertSelfAttention'](config)
    with torch.no_grad():
        for i, linear in enumerate((theirs.query, theirs.key, theirs.value)):
            linear.weight.copy_(layer.c_attn.weight[i * C:(i + 1) * C])
            linear.bias.copy_(layer.c_attn.bias[i * C:(i + 1) * C])
        theirs.convfixed_param.copy_(layer.fixed[None, :, None])
        theirs.convq_param.copy_(layer.dynamic.T)
    return theirs


def chang(args):
    """With the projections of queries, keys and values, and without that of the output: their module has none."""
    if not args.chang:
        print('chang: left out, for it needs --chang')
        return
    for T in (16, 24) if args.quick else (128, 512):
        layers = {}
        for form in ('dense', 'auto'):
            torch.manual_seed(0)
            config = composite.Config(n_embd=256, bias=True, causal=False, attention=form)
            layers[form] = composite.Attention(config)
            layers[form].c_proj = nn.Identity()
            nn.init.normal_(layers[form].fixed)
        theirs = changs_attention(args.chang, layers['dense'], T)
        x = torch.randn((64 if args.quick else 4096) // T, T, 256, requires_grad=True)
        for form, layer in layers.items():
            torch.testing.assert_close(layer(x), theirs(x)[0], rtol=1e-4, atol=1e-5)
        jobs = {form: passes(layer, x) for form, layer in layers.items()}
        jobs['theirs'] = passes(theirs, x, form=lambda x: theirs(x)[0])
        ms = in_turns(jobs, args.seconds * 2)
        for form in layers:
            yield row('chang', f"{form}, {T} tokens, both sides, against Chang et al.'s module", ms[form], ms['theirs'],
                      'time', 1.0)


def near(args):
    """The kernels' scores are made from the queries, which is timed, too."""
    n = 64 if args.quick else 1024
    for causal, aim in ((True, 1.15), (False, 1.4)):
        layers = {'dense': alone(composite, n, causal=causal, attention='dense'),
                  'ours': alone(composite, n, causal=causal, attention='fast'), 'flash': alone(nope, n, causal=causal)}
        layers['dense'][0].load_state_dict(layers['ours'][0].state_dict())
        torch.testing.assert_close(*(layers[form][0](layers[form][1]) for form in ('ours', 'dense')))
        ms = in_turns({form: passes(*layers[form]) for form in ('ours', 'flash')}, args.seconds * 4)
        side = 'causal' if causal else 'both sides'
        yield row('near', f'composite, fast, {n} tokens, {side}, against flash', ms['ours'], ms['flash'], 'time', aim)


def auto(args):
    """Every setting of both models: the time of the form that auto takes over the faster; then the worst of each."""
    lengths, heads = ((16, 32), (32,)) if args.quick else ((64, 128, 256, 512, 1024, 2048, 4096), (32, 64))
    for name, forms in (('composite', ('dense', 'fast')), ('kernelized', ('dense', 'chunked'))):
        worst = None
        for n, hs, causal, dtype, grad in itertools.product(
                lengths, heads, (True, False), (torch.float32, torch.bfloat16), (True, False)):
            jobs = {}
            for form in forms:
                fields = dict(causal=causal, attention=form)
                jobs[form] = passes(*alone(MODELS[name], n, hs, min(2048, 32 * n), dtype, **fields), grad)
            ms = in_turns(jobs, args.seconds, hopeless=1.5)
            with mock.patch.object(MODELS[name], 'attend_dense', wraps=MODELS[name].attend_dense) as dense:
                passes(*alone(MODELS[name], n, hs, n, dtype, causal=causal), grad)()
            chosen = 'dense' if dense.called else forms[1]
            side = 'causal' if causal else 'both sides'
            pass_name = 'forward + backward' if grad else 'no_grad'
            what = f'{name}, {n} tokens, heads of {hs}, {side}, {str(dtype)[6:]}, {pass_name}'
            this = row('auto', f'{what}: {chosen}', ms[chosen], min(ms.values()), 'time')
            yield this
            worst = max(worst or this, this, key=lambda r: r[5])
        yield row('auto', f'worst: {worst[1]}', worst[2], worst[3], 'time', 1.1)


def three_lines(layer, x):
    """Linear attention, both sides, from the queries, keys, values and features of a layer of model_kernelized.py."""
    B, T, C = x.shape
    q, k, v = layer.c_attn(x).view(B, T, 3, layer.n_head, C // layer.n_head).transpose(1, 3).unbind(2)
    q = kernelized.features(F.normalize(q, dim=-1, eps=1e-4), layer.w)  # (B, nh, T, m)
    k = kernelized.features(F.normalize(k, dim=-1, eps=1e-4), layer.w)
    kv = k.transpose(2, 3) @ v  # (B, nh, m, hs)
    total = q @ k.sum(2)[..., None]  # (B, nh, T, 1)
    y = q @ kv / total
    return y.transpose(1, 2).reshape(B, T, C)


def linear(args):
    """Features from queries and keys are part of both sides of the first comparison, and of ours in the second."""
    n = 64 if args.quick else 4096
    layer, x = alone(kernelized, n, causal=False, rpe=False)
    torch.testing.assert_close(layer(x), three_lines(layer, x), rtol=1e-3, atol=1e-5)
    jobs = {'ours': passes(layer, x), 'theirs': passes(layer, x, form=lambda x: three_lines(layer, x))}
    ms = in_turns(jobs, args.seconds * 4)
    yield row('linear', f'kernelized without b, {n} tokens, both sides, against three lines', ms['ours'], ms['theirs'],
              'time', 1.2)
    ms = in_turns({'ours': passes(*alone(kernelized, n)), 'flash': passes(*alone(nope, n))}, args.seconds * 4)
    yield row('linear', f'kernelized with b, {n} tokens, causal, against flash', ms['ours'], ms['flash'], 'speed', 4.0)


@torch.no_grad()
def sampling(args):
    """One text, token by token up to block_size, 4 layers of 128, float32."""
    aims = dict(composite=0.38, kernelized=0.75)
    T = 8 if args.quick else 128
    models = {name: module.Model(module.Config()).eval() for name, module in MODELS.items()}
    ids = torch.randint(256, (T, 1, 1))

    def text(model):
        def job():
            state = model.new_state()
            for token in ids:
                model(token, state=state)
        return job
    ms = in_turns({name: text(model) for name, model in models.items()}, args.seconds * 6)
    for name in models:
        yield row('sampling', f'{name}, per token of a text of {T}', ms[name] / T, math.nan, 'ms', aims.get(name))


PARTS = dict(steps=steps, chang=chang, near=near, auto=auto, linear=linear, sampling=sampling)


def show(part, what, ours, theirs, measure, value, aim, verdict):
    """A row as a line of the printed table."""
    least = '>=' if measure == 'speed' else '<='
    wanted = '' if aim is None else f'{least} {aim:.2f}'
    other = '' if math.isnan(theirs) else f'{theirs:.2f}'
    print(f'| {part} | {what} | {ours:.2f} | {other} | {measure} {value:.2f} | {wanted} | {verdict} |', flush=True)


def draw(rows):
    """Every aim as a bar: how much of it is reached, 1 and more is all."""
    judged = [r for r in rows if r[7]]
    fig, ax = pyplot().subplots(figsize=(9, 1 + 0.3 * len(judged)), layout='constrained')
    for i, (part, what, _, _, measure, value, aim, verdict) in enumerate(judged):
        ax.barh(i, value / aim if measure == 'speed' else aim / value, color='C2' if verdict == 'reached' else 'C3')
    ax.axvline(1, color='black', lw=0.8)
    ax.set_yticks(range(len(judged)), [f'{r[0]}: {r[1]}' for r in judged], fontsize=6)
    ax.invert_yaxis()
    ax.set(xlabel='value over aim (times: aim over value); from 1 on it is reached')
    return fig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nanogpt', metavar='PATH', help='a checkout of nanoGPT')
    parser.add_argument('--chang', metavar='PATH', help="a checkout of Chang et al.'s BERT_Convolutions")
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='which parts (default all)')
    common_flags(parser, 'few tokens, nothing compiled, each job a few times', dataset=False)
    return parse(parser)


def main():
    args = arguments()
    args.seconds = 0.01 if args.quick else 1.0  # a unit of time, for in_turns
    name = f'{torch.get_num_threads()} CPU threads, torch {torch.__version__}'
    print(f'{name}\n\n| part | what | ours, ms | theirs, ms | measure | aim | |\n|---|---|---|---|---|---|---|')
    torch.manual_seed(0)
    rows = []
    for part in args.parts:
        for found in PARTS[part](args):
            rows.append(found)
            path = write_csv(args.results, 'laptop', HEADER, rows, comment=name)
            show(*found)
    if rows:
        save(draw(rows), path)


if __name__ == '__main__':
    main()
