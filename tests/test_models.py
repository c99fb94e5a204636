"""Model files: one text outside the position scheme, what they accept and refuse, initial values, low precision."""
import ast
import dataclasses
import importlib
import math
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import model_composite as composite
import model_conv as conv
import model_kernelized as kernelized
import test_equivalence as equivalence
from conftest import BASELINES, MODELS, REPO
from test_equivalence import difference, equation_10, make, random, random_qkv, with_gradients

BOTH = pytest.mark.parametrize('causal', [True, False], ids=['causal', 'not causal'])
EVERY = pytest.mark.parametrize('name', MODELS + BASELINES)
LIMITS = dict(nope=190, composite=330, conv=350, kernelized=430)  # lines


def load(name):
    return importlib.import_module(f'model_{name}')


def parts(name):
    """{name: text} of the top-level classes and functions of a model file, its syntax tree, its whole text."""
    source = (REPO / ('baselines' if name in BASELINES else '.') / f'model_{name}.py').read_text(encoding='utf-8')
    tree = ast.parse(source)
    named = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return {n.name: ast.get_source_segment(source, n) for n in named}, tree, source


# ------------------------------------------------------------------------------------------------ the text of the files

def test_functions_of_one_name_are_one_text():
    """MLP, Block, Model and every helper that several files have; Config starts with the same fields."""
    own = {'Config', 'Attention', 'equation', 'attend_dense'}
    scheme = {('alibi', 'attend'), ('tisa', 'attend'), ('rope', 'Model'), ('cape', 'Model')}
    texts = {}
    for name in MODELS + BASELINES:
        ours, _, source = parts(name)
        assert ours['Config'].startswith(parts('nope')[0]['Config']), name
        for part in set(ours) - own:
            if (name, part) not in scheme:
                assert texts.setdefault(part, ours[part]) == ours[part], f'{part} of model_{name}.py differs'
    assert parts('alibi')[0]['attend'] == parts('tisa')[0]['attend']


@EVERY
def test_file_is_self_contained_and_in_order(name):
    """Only torch is imported; Config, equation, the scheme, Attention ... Model, then perhaps a fast form."""
    ours, tree, source = parts(name)
    imported = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= {'functools', 'math', 'dataclasses', 'typing', 'torch'}
    paper, _, fast = source.partition('\n# ' + '-' * 117 + '\n# Not in the paper: ')
    order = [n.name for n in ast.parse(paper).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    assert order[:2] == ['Config', 'equation'] and 'Attention MLP Block Model' in ' '.join(order)
    assert bool(fast) == (name in ('composite', 'kernelized'))
    assert all(ast.get_docstring(n) for n in tree.body if isinstance(n, ast.FunctionDef))
    assert len(source.splitlines()) <= LIMITS.get(name, LIMITS['nope'] + 30)


# --------------------------------------------------------------------------------------- what a model file must provide

@EVERY
def test_contract(name):
    """Fields of Config, shapes, names of parameters, a gradient for each of them, and what is refused."""
    module = load(name)
    fields = [f.name for f in dataclasses.fields(module.Config)]
    shared = 'vocab_size block_size n_layer n_head n_embd dropout bias causal absolute init_std scale_residual_init'
    assert fields[:11] == shared.split()
    idx = torch.randint(256, (2, 40))
    for causal in (True, False):
        model = module.Model(module.Config(causal=causal, bias=True, dropout=0.1))
        logits, loss = model(idx, idx.roll(1, 1))
        assert logits.shape == (2, 40, 256) and not logits.requires_grad and loss.shape == () and 5 < loss.item() < 7
        assert model(idx)[1] is None and model.hidden(idx).shape == (2, 40, 128)
        assert model(idx, where=idx[:, :3] % 40)[0].shape == (2, 3, 256)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), 'several processes would wait for it for ever'
        attention = model.h[0].attn
        assert attention.c_attn.weight.shape == (3 * 128, 128) and attention.c_proj.weight.shape == (128, 128)
    with pytest.raises(ValueError, match='n_embd must be a multiple of n_head, not 128 with 3 heads'):
        module.Model(module.Config(n_head=3))
    with pytest.raises(ValueError, match='needs causal=True and no padding'):
        model(idx, state=model.new_state())
    model = module.Model(module.Config(absolute=True, block_size=16))
    with pytest.raises(ValueError, match='needs causal=True and no padding'):
        model(idx[:, :9], valid=idx[:, :9] >= 0, state=model.new_state())
    assert model(idx[:, :16])[0].shape == (2, 16, 256)
    with pytest.raises(ValueError, match='17 tokens exceed block_size=16'):
        model(idx[:, :17])
    state = model.new_state()
    model(idx[:, :16], state=state)
    with pytest.raises(ValueError, match='17 tokens exceed block_size=16'):
        model(idx[:, 16:17], state=state)


@pytest.mark.parametrize('variant', equivalence.VARIANTS)
def test_every_parameter_is_trained(variant):
    name, fields = equivalence.VARIANTS[variant]
    model, idx = make(load(name), **fields)
    model(idx, idx.roll(-1, 1))[1].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize('name, fields, message', [
    ('composite', dict(kernel_size=16), 'kernel_size must be odd and positive, not 16'),
    ('conv', dict(values=True, n_head=1), 'n_head must be at least 2'),
    ('conv', dict(queries_keys=True, mixer='lightweight'), 'queries_keys must be False'),
    ('kernelized', dict(n_features=0), 'n_features must be positive'),
    ('kernelized', dict(max_distance=-1), 'max_distance must not be negative'),
    ('rope', dict(n_embd=12), 'an even number of channels'),
    ('tisa', dict(n_kernels=0), 'n_kernels must be 1 or more, not 0'),
    ('cape', dict(n_embd=15, n_head=3), 'n_embd must be even'),
    ('cape', dict(max_scale=0.9), 'max_scale at least 1'),
], ids=str)
def test_fields_that_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        load(name).Model(load(name).Config(**fields))


@EVERY
def test_initial_values(name):
    """Normal weights of the given scale, zero biases, norms that change nothing."""
    module = load(name)
    for scaled in (True, False):
        model = module.Model(module.Config(n_layer=8, init_std=0.05, scale_residual_init=scaled, bias=True))
        for weight in (model.wte.weight, model.h[3].attn.c_attn.weight, model.h[3].mlp.c_fc.weight):
            assert abs(weight.std().item() - 0.05) < 0.002 and abs(weight.mean().item()) < 0.002
        for block in model.h:
            for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                assert abs(weight.std().item() / (0.05 / 4 if scaled else 0.05) - 1) < 0.05
        for part in model.modules():
            if isinstance(part, (torch.nn.Linear, torch.nn.LayerNorm)):
                assert (part.bias == 0).all()
            if isinstance(part, torch.nn.LayerNorm):
                assert (part.weight == 1).all()


def test_initial_kernels():
    """Chang et al.'s code: fixed kernels start at zero, all others uniform in +-1/sqrt(width). Luo et al.: b = 0."""
    a = 17 ** -0.5
    att = conv.Model(conv.Config(lightweight=True, dynamic=True, queries_keys=True, values=True, n_embd=512)).h[0].attn
    uniform = [(att.dynamic, (17, 128))] + [(k, (512, 17)) for k in (att.conv_q, att.conv_k, att.conv_v, att.conv_out)]
    assert (att.lightweight == 0).all() and att.lightweight.shape == (4, 17)
    att = composite.Model(composite.Config(dynamic_key=True, n_embd=512)).h[0].attn
    assert (att.fixed == 0).all() and att.fixed.shape == (4, 17) and not torch.equal(att.dynamic, att.dynamic_key)
    for kernel, shape in uniform + [(att.dynamic, (17, 128)), (att.dynamic_key, (17, 128))]:
        assert kernel.shape == shape and kernel.abs().max() <= a and abs(kernel.std() / (a / 3 ** 0.5) - 1) < 0.05
    layers = [block.attn for block in kernelized.Model(kernelized.Config()).h]
    assert all((att.b == 0).all() and att.b.shape == (4, 257) and att.w.shape == (64, 32) for att in layers)
    assert not torch.equal(layers[0].w, layers[1].w) and abs(layers[0].w.std() - 1) < 0.1
    w = kernelized.random_matrix(12, 4, 'orf').view(3, 4, 4)
    assert torch.allclose(w @ w.mT, torch.diag_embed(w.square().sum(-1)), atol=1e-5)
    assert torch.allclose(kernelized.random_matrix(20, 4, 'sphere').norm(dim=1), torch.tensor(2.0))


@EVERY
def test_dropout(name):
    """On the embedding and on both branches, in training only."""
    model, idx = load(name).Model(load(name).Config(dropout=1.0)), torch.randint(256, (2, 9))
    x = torch.randn(2, 9, 128)
    assert torch.equal(model.h[0](x), x) and (model.hidden(idx) == 0).all(), 'all dropped: nothing is added to x'
    model.eval()
    assert not torch.equal(model.h[0](x), x) and torch.equal(model(idx)[0], model(idx)[0])


# ------------------------------------------------------------------------------------------ forms, and how 'auto' picks

def results(model, form, idx):
    for block in model.h:
        block.attn.attention = form
    logits, loss = model(idx, idx.roll(-1, 1))
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@BOTH
@pytest.mark.parametrize('module, forms, fields', [
    (composite, ('fast', 'auto'), dict(kernel_size=5)),
    (kernelized, ('fft', 'chunked', 'auto'), dict(max_distance=5)),
], ids=['composite', 'kernelized'])
def test_whole_models_agree_in_every_form(module, forms, fields, causal):
    model, _ = make(module, causal=causal, **fields)
    idx = torch.randint(50, (2, 530))
    dense = results(model, 'dense', idx)
    for form in forms:
        errors = [difference(a, b, 1e-30) for a, b in zip(results(model, form, idx), dense)]
        assert max(errors) < 1e-8, (form, errors)


@pytest.mark.parametrize('module, tokens, form, fields', [
    (composite, 255, 'attend_dense', {}), (composite, 256, 'attend_fast', {}),
    (composite, 256, 'attend_dense', dict(dynamic_key=True)), (composite, 256, 'attend_dense', dict(attention='dense')),
    (kernelized, 511, 'attend_dense', {}), (kernelized, 512, 'attend_chunked', {}),
    (kernelized, 1023, 'attend_dense', dict(causal=False)), (kernelized, 1024, 'attend_chunked', dict(causal=False)),
    (kernelized, 600, 'attend_dense', dict(max_distance=300)), (kernelized, 9, 'attend_fft', dict(attention='fft')),
], ids=str)
def test_auto_picks(module, tokens, form, fields):
    model, _ = make(module, n_layer=1, **fields)
    forms = [f for f in ('attend_dense', 'attend_fast', 'attend_chunked', 'attend_fft') if hasattr(module, f)]
    called = []
    with mock.patch.multiple(module, **{f: lambda q, k, v, *_, f=f: called.append(f) or v for f in forms}):
        model.hidden(torch.zeros(1, tokens, dtype=torch.int64))
        if form == 'attend_fast':
            model.hidden(torch.zeros(1, tokens, dtype=torch.int64), valid=torch.ones(1, tokens).bool())
            form = 'attend_fast attend_dense'
    assert ' '.join(called) == form


def test_choose_attention(monkeypatch):
    """On CUDA 'auto' is fast only if attend_fast agrees with attend_dense; the printed line says why."""
    assert composite.choose_attention(composite.Model(composite.Config()), torch.float32) is None
    randn = torch.randn
    monkeypatch.setattr(torch, 'randn', lambda *a, device=None, **kw: randn(*a, **kw))
    layer = SimpleNamespace(attention='auto', causal=True, n_head=2, half_width=8,
                            c_attn=SimpleNamespace(weight=SimpleNamespace(is_cuda=True)))
    sizes = SimpleNamespace(n_embd=32, n_head=2, block_size=1000)
    model = SimpleNamespace(h=[SimpleNamespace(attn=layer)], config=sizes)
    dense = composite.attend_dense
    cases = {
        'fast': composite.attend_near_and_far,
        'dense (difference: 0.1)': lambda *a: dense(*a) * 1.1,
        'dense (difference: nan)': lambda q, k, *a: dense(q, k, *a) + (k - k).sqrt(),  # only the gradient is nan
        'dense (difference: ZeroDivisionError: division by zero)': lambda *a: 1 / 0,
    }
    for expected, form in cases.items():
        monkeypatch.setattr(composite, 'attend_fast', form)
        line = composite.choose_attention(model, torch.float32)
        assert line.startswith(f'attention from 512 tokens on: {expected[:22]}') and '\n' not in line
        assert layer.fast_on_cuda == (expected == 'fast') and not composite.Attention.fast_on_cuda


# ---------------------------------------------------------------------------------------------------- low precision

@BOTH
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_fast_forms_are_as_exact_as_dense(dtype, causal):
    """Their distance from float64 is at most twice that of the dense form, plus rounding."""
    exact = [x.detach().to(dtype).double() for x in [random(2, 2, 300, 16, seed=s) for s in range(3)]]
    exact.append(random(2, 2, 300, 17, scale=3).detach().to(dtype).double())

    def run(form, to):
        return with_gradients(partial(form, causal=causal), [x.to(to).requires_grad_() for x in exact])
    reference = run(composite.attend_dense, torch.float64)
    unit = torch.finfo(dtype).eps
    dense = [difference(a, b, 1e-30) for a, b in zip(run(composite.attend_dense, dtype), reference)]
    for form in (composite.attend_fast, composite.attend_near_and_far):
        errors = [difference(a, b, 1e-30) for a, b in zip(run(form, dtype), reference)]
        assert all(error < 2 * limit + 16 * unit for error, limit in zip(errors, dense)), (form.__name__, errors, dense)


def test_positions_are_float32_in_bfloat16():
    """In bfloat16 position 2001 would be 2000."""
    rope, cape = load('rope'), load('cape')
    x = torch.randn(1, 1, 2, 64)
    assert difference(rope.rotate(x.bfloat16(), 2001), rope.rotate(x.double(), 2001), 1e-30) < 0.01
    model = cape.Model(cape.Config(block_size=8)).bfloat16().eval()
    with mock.patch.object(cape, 'sinusoids', wraps=cape.sinusoids) as called:
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert called.call_args[0][0].dtype == torch.float32
    layer = load('tisa').Model(load('tisa').Config(n_layer=1)).h[0].attn
    layer.a.data.fill_(2.0)
    layer.c.data.fill_(-301.0)  # offsets near -301, of which bfloat16 has every second one
    x = torch.randn(1, 400, 128).bfloat16()
    ours = layer.bfloat16()(x)
    assert difference(ours[:, 320:], layer.double()(x.double())[:, 320:], 1e-30) < 0.05


@pytest.mark.parametrize('autocast', [True, False])
def test_running_sums_are_float32(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model = make(kernelized, max_distance=4, n_layer=1, n_features=8)[0].to(dtype)
    idx = torch.randint(50, (1, 700), generator=torch.Generator().manual_seed(0))
    state = model.new_state()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        full = model(idx)[0].float()  # 700 tokens: the chunked form
        parts = torch.cat([model(token, state=state)[0] for token in idx.split(1, 1)], 1).float()
    assert difference(parts, full, 1e-30) < 0.05 and state[0]['kv'].dtype == torch.float32


@BOTH
@pytest.mark.parametrize('R', [3, 30])
def test_range_of_b(R, causal):
    """In float32 the visible entries of b may span 80 nats in every form but the FFT, which stays finite."""
    n = 23
    w = random(8, 4, seed=5).detach().float()
    for slope in (1, -1):
        q, k, v = [x.detach().float() for x in random_qkv(n)]
        q, k = [kernelized.features(x, w, normalize=True) for x in (q, k)]
        b = 100 + slope * torch.linspace(-40, 40, 2 * R + 1).repeat(3, 1)  # e^b itself overflows in float32
        inputs = [x.requires_grad_() for x in (q, k, v, b)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        exact = with_gradients(partial(equation_10, causal=causal), exact)
        for form in (kernelized.attend_dense, partial(kernelized.attend_chunked, chunk=4)):
            found = with_gradients(partial(form, causal=causal), inputs)
            assert max(difference(a, b, 1) for a, b in zip(found, exact)) < 2e-4
        fft = with_gradients(partial(kernelized.attend_fft, causal=causal), inputs)
        assert all(x.isfinite().all() for x in fft)
        if causal:
            y, _ = equivalence.decode(q, k, v, b, [1] * n)
            assert difference(y, exact[0], 1) < 2e-4


@pytest.mark.parametrize('normalize', [True, False])
def test_kernelized_layer_stays_finite(normalize):
    """Inputs of any size, zero vectors included, in float32: values and gradients."""
    attention = make(kernelized, n_layer=1, normalize=normalize, max_distance=3)[0].float().h[0].attn
    for size in (0.0, 1e-8, 1.0, 10.0, 25.0, 1000.0):
        y = attention(size * torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)))
        gradients = torch.autograd.grad(y.sum(), list(attention.parameters()))
        assert all(x.isfinite().all() for x in (y, *gradients)), size


# ------------------------------------------------------------------------------------------------------------ the rest

def test_future_entries_of_b_do_not_count():
    """Causal: entries for later keys may be anything, even beyond the range of exp; their gradient is 0."""
    q, k, v, b = equivalence.kernelized_inputs(9, 3)
    large = b.detach().clone()
    large[:, 4:] = 1000.0
    large.requires_grad_()
    for form in (kernelized.attend_dense, kernelized.attend_fft, kernelized.attend_chunked):
        y = form(q, k, v, large)
        gradient = torch.autograd.grad(y.sum(), large)[0]
        assert difference(y, form(q, k, v, b), 1e-30) < 1e-12 and (gradient[:, 4:] == 0).all()


def test_decoding_state_keeps_no_long_prompt():
    """After a long prompt, what a convolution or a running state keeps owns its memory: no views of the prompt."""
    for name, keys in (('conv', ['past_v']), ('kernelized', ['k', 'values'])):
        model = load(name).Model(load(name).Config(max_distance=4) if name == 'kernelized' else conv.Config())
        state = model.new_state()
        with torch.no_grad():
            model(torch.zeros(1, 500, dtype=torch.int64), state=state)
        for key in keys:
            assert state[0][key].untyped_storage().nbytes() == state[0][key].numel() * 4


def test_augmentation_is_for_training():
    """CAPE changes positions in training only: one shift and factor per sequence, half a step at most per token."""
    cape = load('cape')
    model, idx = make(cape, init_std=0.7)
    plain, _ = make(cape, init_std=0.7, augment=False)
    logits = model(idx)[0]
    assert torch.equal(logits, plain(idx)[0]) and torch.equal(logits, plain.train()(idx)[0])
    first, second = model.train()(idx)[0], model(idx)[0]
    assert min((a - b).abs().max() for a, b in ((first, logits), (second, logits), (first, second))) > 1e-3
    torch.manual_seed(0)
    p = torch.arange(1000, 1009).double().expand(4000, 9)  # positions of 4,000 sequences
    for change, largest in (((cape.augment(p, 0, 1) - p), 0.5), ((cape.augment(p, 5, 1) - p).mean(1), 5),
                            ((cape.augment(p, 0, 1.5) / p).log().mean(1), math.log(1.5))):
        assert abs(change.min() / -largest - 1) < 0.07 and abs(change.max() / largest - 1) < 0.07
    within = cape.augment(p, 5, 1) - p
    assert ((within.amax(1) - within.amin(1)) <= 1).all(), 'tokens of a sequence share one shift'
