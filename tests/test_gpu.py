"""The GPU path: fast forms and compiled training steps against float64 on a CPU.

Without a GPU these tests rehearse on the CPU at small sizes, with a compiler that generates no code.
"""
import copy
import importlib
from functools import partial

import pytest
import torch

import model_composite as composite
import model_kernelized as kernelized
from conftest import BASELINES, MODELS
from test_equivalence import difference, kernelized_inputs, random, with_gradients

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
BOTH = pytest.mark.parametrize('causal', [True, False], ids=['causal', 'not causal'])
COMPILE = partial(torch.compile, dynamic=False, backend='inductor' if CUDA else 'aot_eager', fullgraph=True)
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}  # TF32 products where the device has them


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()  # or it reaches its limit of recompilations and runs uncompiled


def worst(ours, reference, floor=1e-3):
    """Largest relative difference of two lists of tensors, the second in float64 on the CPU."""
    return max(difference(a.cpu(), b, floor) for a, b in zip(ours, reference, strict=True))


@BOTH
@pytest.mark.parametrize('batch, tokens, hs, scale',
                         [(1, 300, 32, 1), (8, 1024, 64, 1), (2, 1024, 64, 30), (1, 4096, 64, 1)] if CUDA else
                         [(1, 40, 16, 1), (2, 41, 16, 30)])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_near_and_far(dtype, batch, tokens, hs, scale, causal):
    """Near + far, compiled and not, against dense: values and gradients, small and large kernel scores."""
    shapes = [(batch, 2, tokens, hs)] * 3 + [(batch, 2, tokens, 17)]
    inputs = [random(*s, seed=n, scale=scale if n == 3 else 1).detach().to(dtype) for n, s in enumerate(shapes)]
    exact = [x.double().requires_grad_() for x in inputs]
    exact = with_gradients(partial(composite.attend_dense, causal=causal), exact)
    inputs = [x.to(DEVICE).requires_grad_() for x in inputs]
    for form in (composite.attend_near_and_far, COMPILE(composite.attend_near_and_far)):
        ours = with_gradients(partial(form, causal=causal), inputs)
        rounded = not CUDA and dtype == torch.bfloat16 and scale > 1  # the CPU's matrices round large scores
        assert worst(ours, exact) < (0.3 if rounded else TOLERANCE[dtype]), form


@BOTH
@pytest.mark.parametrize('form', [kernelized.attend_fft, kernelized.attend_chunked])
def test_kernelized_forms(form, causal):
    for tokens, R in ((1, 3), (200, 300), (1031 if CUDA else 150, 7)):
        inputs = kernelized_inputs(tokens, R)
        exact = with_gradients(partial(kernelized.attend_dense, causal=causal), inputs)
        inputs = [x.detach().float().to(DEVICE).requires_grad_() for x in inputs]
        assert worst(with_gradients(partial(form, causal=causal), inputs), exact, 1) < 1e-2, (tokens, R)


def training_step(model, batch, dtype, device):
    """[loss, gradient of every parameter] as train.py computes them."""
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**{name: x.to(device) for name, x in batch.items()})[1]
    loss.backward()
    found = [loss.detach(), *[p.grad for p in model.parameters()]]
    model.zero_grad(set_to_none=True)
    return found


@BOTH
@pytest.mark.parametrize('tokens', [300, 1024] if CUDA else [40])
@pytest.mark.parametrize('name', MODELS + BASELINES)
def test_training_step(name, tokens, causal):
    """Loss and all gradients, compiled and not, in bfloat16 and float32, against the dense form in float64."""
    module = importlib.import_module(f'model_{name}')
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, block_size=tokens, n_layer=2, n_head=2, n_embd=128)
    model = module.Model(module.Config(**sizes, causal=causal)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)  # else some kernels are zero
    batch = dict(idx=torch.randint(64, (2, tokens)))
    batch['targets'] = batch['idx'].roll(-1, 1)
    if not causal:
        batch['where'] = torch.rand(2, tokens).argsort(1)[:, :tokens // 7]
        batch['targets'] = batch['idx'].gather(1, batch['where'])
    exact = training_step(copy.deepcopy(model).double(), batch, torch.float64, 'cpu')
    model = model.to(DEVICE)
    if name == 'composite':
        line = composite.choose_attention(model, torch.bfloat16)
        assert not CUDA or 'fast' in line[:45], line
    compiled = COMPILE(model)
    for dtype, limit in ((torch.bfloat16, 0.1), (torch.float32, 5e-3)):
        for form in (model, compiled):
            assert worst(training_step(form, batch, dtype, DEVICE), exact) < limit, (dtype, form is compiled)


@BOTH
@pytest.mark.parametrize('tokens', [40, 300])  # a CPU: with the explicit softmax and without
@pytest.mark.parametrize('name', MODELS + BASELINES)
def test_padding(name, tokens, causal):
    """Hidden states of real tokens in bfloat16, with padding."""
    module = importlib.import_module(f'model_{name}')
    torch.manual_seed(0)
    model = module.Model(module.Config(n_layer=2, n_head=2, block_size=tokens, causal=causal)).eval()
    idx = torch.randint(256, (4, tokens))
    valid = torch.arange(tokens) < torch.tensor([[tokens], [tokens // 2], [7], [1]])
    exact = copy.deepcopy(model).double().hidden(idx, valid)[valid]
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        ours = model.to(DEVICE).hidden(idx.to(DEVICE), valid.to(DEVICE)).cpu()[valid]
    assert worst([ours], [exact]) < 0.1


def test_a_wrong_compiler_is_seen(monkeypatch):
    """The control: a compiler that returns a loss that is a tenth too small fails the test above."""
    def wrong(graph, _):
        return lambda *inputs: [y * 0.9 if y.dim() == 0 and y.is_floating_point() else y for y in graph(*inputs)]
    monkeypatch.setitem(globals(), 'COMPILE', partial(torch.compile, dynamic=False, backend=wrong))
    with pytest.raises(AssertionError, match='True'):
        test_training_step('nope', 40, True)
