"""GPT-2's weights as a run of ours, from folders in the hub's layout that are made here; positions taken away."""
import hashlib
import json
import math
import re
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import from_gpt2
import lib
import take_positions_away
from conftest import REPO, TINY, run_here
from sample import load_run
from test_experiments import ended, python

C, LAYERS, HEADS, BLOCK, VOCAB = 16, 2, 2, 32, 50257
HUB = dict(model_type='gpt2', activation_function='gelu_new', vocab_size=VOCAB, n_positions=BLOCK, n_ctx=BLOCK,
           n_embd=C, n_layer=LAYERS, n_head=HEADS, layer_norm_epsilon=1e-5)
IDS = torch.randint(VOCAB, (BLOCK,), generator=torch.Generator().manual_seed(2))


def hub_weights():
    """GPT-2's tensors by the hub's names, large enough that each matters; the mean logit is far below 0."""
    shapes = {'wte.weight': (VOCAB, C), 'wpe.weight': (BLOCK, C), 'ln_f.weight': (C,), 'ln_f.bias': (C,)}
    for i in range(LAYERS):
        for name in ('ln_1', 'ln_2'):
            shapes |= {f'h.{i}.{name}.weight': (C,), f'h.{i}.{name}.bias': (C,)}
        for name, out, width in (('attn.c_attn', 3, 1), ('attn.c_proj', 1, 1), ('mlp.c_fc', 4, 1),
                                 ('mlp.c_proj', 1, 4)):
            shapes |= {f'h.{i}.{name}.weight': (width * C, out * C), f'h.{i}.{name}.bias': (out * C,)}
    generator = torch.Generator().manual_seed(1)
    weights = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {name: w + 1 for name, w in weights.items() if 'ln_' in name and name.endswith('weight')}
    weights['ln_f.bias'] += 2
    weights['wte.weight'] -= 1
    return weights


def write_hub(folder, tensors, kind='safetensors', config=HUB):
    """The hub's files; the format of .safetensors from its description: length of the header, header, data."""
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    if kind == 'bin':
        torch.save(tensors, folder / 'pytorch_model.bin')
        return folder
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16'}[tensor.dtype]
        header[name] = dict(dtype=dtype, shape=list(tensor.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(header).encode()
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + data)
    return folder


def gpt2(w, idx, positions=True):
    """GPT-2 in float64, by the hub's tensors, one head at a time: ids (T,) -> logits (T, vocabulary)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    T, hs = len(idx), C // HEADS

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f'{name}.weight'] + w[f'{name}.bias']

    def linear(x, name):
        return x @ w[f'{name}.weight'] + w[f'{name}.bias']
    x = w['wte.weight'][idx] + (w['wpe.weight'][:T] if positions else 0)
    for i in range(LAYERS):
        qkv = linear(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn')
        heads = []
        for h in range(HEADS):
            q, k, v = (qkv[:, n * C + h * hs:n * C + (h + 1) * hs] for n in range(3))
            scores = (q @ k.T / math.sqrt(hs)).masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f'h.{i}.attn.c_proj')
        hidden = linear(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc')
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # the exact GELU
        x = x + linear(hidden, f'h.{i}.mlp.c_proj')
    return norm(x, 'ln_f') @ w['wte.weight'].T


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp('hub') / 'gpt2', hub_weights())


def convert(run, folder, *words, code=0):
    """Run from_gpt2.py -> the model of its run, or None if it has refused."""
    run('experiments/from_gpt2.py', '--path', folder, '--out_dir', 'out/gpt2', *words, code=code)
    return None if code else load_run(run.folder / 'out/gpt2')[0].double()


@pytest.mark.parametrize('kind, prefix, dtype', [
    ('safetensors', '', torch.float32), ('bin', 'transformer.', torch.float32), ('safetensors', '', torch.bfloat16)])
def test_logits_are_those_of_gpt2(run, tmp_path, kind, prefix, dtype):
    """With older masks and a tied head in the file, too. The 47 extra rows have the mean logit."""
    weights = {name: tensor.to(dtype) for name, tensor in hub_weights().items()}
    tensors = {prefix + name: tensor for name, tensor in weights.items()}
    if prefix:
        tensors |= {'lm_head.weight': weights['wte.weight'], 'h.0.attn.bias': torch.ones(1, 1, BLOCK, BLOCK).tril()}
    logits = convert(run, write_hub(tmp_path / 'hub', tensors, kind))(IDS[None])[0][0]  # (T, 50304)
    assert run.out.startswith('out/gpt2: 0.8M weights, positions kept; the scheme adds no tensor')
    ours, extra = logits.split((VOCAB, from_gpt2.ROWS - VOCAB), -1)
    expected = gpt2(weights, IDS)
    assert (ours - expected).abs().max() < 1e-10 and expected.std() > 1
    assert (extra - ours.mean(-1, keepdim=True)).abs().max() < 1e-5  # the rows are float32
    more = F.cross_entropy(logits, IDS) - F.cross_entropy(ours, IDS)
    assert 0 < more < math.log(from_gpt2.ROWS / VOCAB) < 0.00094


ALL_CONVOLUTIONS = '--queries_keys --values --lightweight --dynamic --output'.split()


@pytest.mark.parametrize('name, flags, own', [
    ('composite', ['--dynamic_key'], 'dynamic, dynamic_key, fixed'),
    ('conv', ALL_CONVOLUTIONS, 'conv_k, conv_out, conv_q, conv_v, dynamic, lightweight'), ('tisa', [], 'a, b, c')])
@pytest.mark.parametrize('drop', [True, False])
def test_other_schemes_begin_as_gpt2(run, hub, name, flags, own, drop):
    """Same logits at first, with or without wpe; every tensor of the scheme but tisa's b and c has a gradient."""
    model = convert(run, hub, '--model', name, *flags, *['--drop_positions'] * drop)
    assert f'positions {"dropped" if drop else "kept"}; the scheme adds {own}\n' in run.out
    assert (model.wpe is None) == drop
    logits, loss = model(IDS[None, :-1], IDS[None, 1:])
    expected = gpt2(hub_weights(), IDS[:-1], positions=not drop)
    assert (logits[0, :, :VOCAB] - expected).abs().max() < 1e-10
    loss.backward()
    for parameter, p in model.named_parameters():
        dead = name == 'tisa' and parameter.endswith(('attn.b', 'attn.c'))  # until the heights are not zero
        assert (p.grad.abs().max() > 1e-12) != dead, parameter


def test_the_run_is_one_of_ours(run, hub):
    """train.py --eval_only gives GPT-2's loss, and --resume continues; a run is replaced only with --overwrite."""
    folder = run.folder / 'data/one'
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(VOCAB, size=2000).astype(np.uint16)
    for part in ('train', 'val'):
        ids.tofile(folder / f'{part}.bin')
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    (folder / 'meta.json').write_text(json.dumps(dict(
        tokenizer='gpt2', vocab_size=VOCAB, mask_id=VOCAB, dtype='uint16', train_tokens=2000, train_bytes=8000,
        val_tokens=2000, val_bytes=8000, source='random', sha256={'train': digest, 'val': digest})))
    flags = ['--dataset', 'one', '--device', 'cpu', '--eval_tokens', 500, '--batch_size', 2, '--learning_rate', 0.01]
    convert(run, hub, *flags)
    run('train.py', '--eval_only', '--out_dir', 'out/gpt2', '--device', 'cpu')
    starts = np.linspace(0, 2000 - BLOCK - 1, 500 // BLOCK).astype(int)
    texts = [torch.from_numpy(ids[s:s + BLOCK + 1].astype(np.int64)) for s in starts]
    expected = np.mean([F.cross_entropy(gpt2(hub_weights(), t[:-1]), t[1:]).item() for t in texts])
    found = float(re.search(r'val loss ([\d.]+) nats', run.out)[1])
    assert 0 < found - expected < 0.00094 + 0.0001  # the extra rows; four digits
    run('train.py', '--resume', '--out_dir', 'out/gpt2', '--warmup_iters', 0, '--max_iters', 3)
    losses = [loss for _, loss in lib.losses(run.folder / 'out/gpt2')]
    assert len(losses) == 2 and losses[1] < losses[0]
    for words, message in (([], 'holds a run: add --overwrite'), (['--n_layer', 3], '--n_layer is decided by GPT-2'),
                           (['--resume'], '--resume is for train.py'), (['--size', 'gpt2'], 'not allowed with')):
        convert(run, hub, *words, code=2)
        assert message in run.err and run.err.count('\n') == 1
    convert(run, hub, *flags, '--overwrite')
    assert not (run.folder / 'out/gpt2/ckpt_best.pt').exists() and load_run(run.folder / 'out/gpt2')[1]['step'] == 0


def changed(name, change):
    weights = hub_weights()
    return {**weights, name: change(weights['wte.weight' if name == 'lm_head.weight' else name])}


class Trap:
    def __reduce__(self):
        return print, ('this must never run',)


@pytest.mark.parametrize('tensors, config, message', [
    (lambda: changed('wpe.weight', torch.t) | {'x': torch.ones(1)}, {}, r'also has x'),
    (lambda: changed('h.0.attn.c_attn.weight', torch.t), {}, r'h\.0\.attn\.c_attn\.weight in .* has the shape'),
    (lambda: changed('lm_head.weight', lambda w: w + 1), {}, 'has a head of its own'),
    (hub_weights, dict(model_type='gpt_neo'), 'model_type is gpt_neo; our models can be gpt2 only'),
    (hub_weights, dict(n_head=0), 'describes no GPT-2'),
    (lambda: {'wte.weight': Trap()}, {}, 'is damaged, or does not hold tensors only'),
], ids=range(6))
def test_another_checkpoint_is_refused(run, tmp_path, tensors, config, message):
    """Exit code 2, one line, no folder; a pickle runs no code."""
    tensors = tensors()
    kind = 'bin' if isinstance(tensors['wte.weight'], Trap) else 'safetensors'
    convert(run, write_hub(tmp_path / 'hub', tensors, kind, {**HUB, **config}), code=2)
    assert re.search(message, run.err) and run.err.count('\n') == 1 and not run.out
    assert not (run.folder / 'out/gpt2').exists()


def test_take_positions_away(tmp_path, data_dir, trained, monkeypatch, capsys):
    """Step 0 of the control is the base; of another scheme it is the base without wpe. Other settings are refused."""
    def start(out, words, jobs):
        how = '--resume' if (out / 'ckpt_last.pt').exists() else '--overwrite'
        _, err, code = run_here(REPO / 'train.py', [*words, '--out_dir', str(out), how], tmp_path, {})
        assert code == 0, err
        return ended()
    monkeypatch.setattr(lib, 'start', start)
    words = ['--learning_rate', 0.03, '--base_steps', 4, '--steps', 10, '--seeds', 1, '--schemes', 'nope',
             'mine: --model composite --kernel_size 9', '--dataset', 'code', '--results', 'results']
    tail = ['--train', '--data_dir', data_dir, *TINY]
    python(monkeypatch, tmp_path, take_positions_away, *words, *tail)
    rows = lib.read_csv(tmp_path / 'results/take_positions_away-code.csv')
    assert [int(row['step']) for row in rows] == [*range(11)] * 3
    before = lib.losses(tmp_path / 'out/take_positions_away/code-base')[-1][1]
    first = {row['scheme']: float(row['val_loss']) for row in rows if row['step'] == '0'}
    assert first['absolute'] == before and first['nope'] == first['mine'] != before
    assert len({row['val_loss'] for row in rows if row['step'] == '10'}) == 3
    assert f'| mine | {before:.4f} | {first["mine"]:.4f} | ' in capsys.readouterr().out
    monkeypatch.setattr(lib, 'start', lambda *_: pytest.fail('trained'))
    python(monkeypatch, tmp_path, take_positions_away, *words, *tail)
    for more, message in ((['--learning_rate', 0.1], 'was trained with learning_rate 0.03, not 0.1'),
                          (['--steps', 15], '--steps must be a multiple of 10'),
                          (['--base', trained('nope', 'causal').out_dir], 'is not a causal run of --model nope --abs')):
        with pytest.raises(SystemExit, match='2'):
            python(monkeypatch, tmp_path, take_positions_away, *words, *more, *tail)
        assert message in capsys.readouterr().err
