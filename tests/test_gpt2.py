"""GPT-2's weights as a run of ours, from folders in the hub's layout that are made here; positions taken away."""
import json
import math
import re
import struct
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import BASELINES, CORPORA, MODELS, REPO, TINY, Run

sys.path.insert(0, str(REPO / 'experiments'))
import from_gpt2  # noqa: E402
import lib  # noqa: E402
import prepare_data  # noqa: E402
from sample import load_run  # noqa: E402

C, LAYERS, HEADS, BLOCK, VOCAB = 16, 2, 2, 32, 50257
HUB = dict(model_type='gpt2', activation_function='gelu_new', vocab_size=VOCAB, n_positions=BLOCK, n_ctx=BLOCK,
           n_embd=C, n_layer=LAYERS, n_head=HEADS, layer_norm_epsilon=1e-5)


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
    for name in weights:
        if 'ln_' in name and name.endswith('weight'):
            weights[name] += 1
    weights['ln_f.bias'] += 2
    weights['wte.weight'] -= 1
    return weights


def buffers():
    """What older checkpoints hold besides: the causal mask of each layer."""
    mask = torch.ones(1, 1, BLOCK, BLOCK).tril()
    return {f'h.{i}.attn.{name}': value for i in range(LAYERS)
            for name, value in (('bias', mask), ('masked_bias', torch.tensor(-1e4)))}


def write_safetensors(path, tensors):
    """The format, from its description: length of the header, header, numbers."""
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16'}[tensor.dtype]
        header[name] = dict(dtype=dtype, shape=list(tensor.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def write_hub(folder, tensors, kind='safetensors', config=HUB):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    if kind == 'safetensors':
        write_safetensors(folder / 'model.safetensors', tensors)
    else:
        torch.save(tensors, folder / 'pytorch_model.bin')
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
    """A tiny GPT-2 in the hub's layout; .weights are its tensors."""
    weights = hub_weights()
    return write_hub(tmp_path_factory.mktemp('hub') / 'gpt2', weights), weights


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    """Two data sets of random ids that say they are GPT-2's."""
    folder = tmp_path_factory.mktemp('tokens')
    for seed, name in enumerate(('one', 'two')):
        (folder / name).mkdir()
        ids = np.random.default_rng(seed).integers(VOCAB, size=2000).astype(np.uint16)
        for part in ('train', 'val'):
            ids.tofile(folder / name / f'{part}.bin')
        digest = prepare_data.sha256(folder / name / 'train.bin')
        (folder / name / 'meta.json').write_text(json.dumps(dict(
            tokenizer='gpt2', vocab_size=VOCAB, mask_id=VOCAB, dtype='uint16', train_tokens=2000, train_bytes=8000,
            val_tokens=2000, val_bytes=8000, source='random', sha256={'train': digest, 'val': digest})))
    return folder


def convert(run, folder, *words, **kw):
    return run('experiments/from_gpt2.py', '--path', folder, '--out_dir', 'out/gpt2', *words, **kw)


def loaded(run):
    return load_run(run.folder / 'out/gpt2')[0].double()


IDS = torch.randint(VOCAB, (BLOCK,), generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------------------------------------------------------
# from_gpt2.py

@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
@pytest.mark.parametrize('prefix, more', [('', {}), ('transformer.', buffers())], ids=['plain', 'prefix and masks'])
def test_logits_are_those_of_gpt2(run, tmp_path, kind, prefix, more):
    weights = hub_weights()
    tensors = {prefix + name: tensor for name, tensor in {**weights, **more}.items()}
    if prefix:
        tensors['lm_head.weight'] = weights['wte.weight']
    convert(run, write_hub(tmp_path / 'hub', tensors, kind))
    assert run.out.startswith('out/gpt2: 0.8M weights, positions kept; the scheme adds no tensor')
    logits = loaded(run)(IDS[None])[0][0]  # (T, 50304)
    expected = gpt2(weights, IDS)
    assert (logits[:, :VOCAB] - expected).abs().max() < 1e-10 and expected.std() > 1


def test_rows_that_fill_up_the_vocabulary(run, hub):
    """Their logit is the mean logit: at most 1/50,257 of the probability each, though all of GPT-2's are below 0."""
    logits = loaded(convert(run, hub[0]))(IDS[None])[0][0]
    ours, filled = logits.split((VOCAB, from_gpt2.ROWS - VOCAB), -1)
    assert logits.size(-1) % 64 == 0 and ours.mean() < -5
    assert (filled - ours.mean(-1, keepdim=True)).abs().max() < 1e-5  # the rows are float32
    assert logits.softmax(-1)[:, VOCAB:].max() < 1 / VOCAB
    more = F.cross_entropy(logits, IDS) - F.cross_entropy(ours, IDS)
    assert 0 < more < math.log(from_gpt2.ROWS / VOCAB) < 0.00094


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(run, tmp_path, dtype):
    """Nothing is rounded a second time, not even the mean of the rows."""
    weights = {name: tensor.to(dtype) for name, tensor in hub_weights().items()}
    ours, filled = loaded(convert(run, write_hub(tmp_path / 'hub', weights)))(IDS[None])[0][0].split((VOCAB, 47), -1)
    assert (ours - gpt2(weights, IDS)).abs().max() < 1e-10
    assert (filled - ours.mean(-1, keepdim=True)).abs().max() < 1e-5


ALL_CONVOLUTIONS = '--queries_keys --values --lightweight --dynamic --output'.split()


@pytest.mark.parametrize('name, flags, own', [
    ('nope', [], 'no tensor'),
    ('composite', ['--dynamic_key'], 'dynamic, dynamic_key, fixed'),
    ('conv', ALL_CONVOLUTIONS, 'conv_k, conv_out, conv_q, conv_v, dynamic, lightweight'),
    ('tisa', [], 'a, b, c'),
], ids=['nope', 'composite', 'conv', 'tisa'])
@pytest.mark.parametrize('drop', [True, False])
def test_other_schemes_begin_as_gpt2(run, hub, name, flags, own, drop):
    """Same logits at first, with or without wpe; every tensor of the scheme but tisa's b and c has a gradient."""
    convert(run, hub[0], '--model', name, *flags, *['--drop_positions'] * drop)
    assert f'positions {"dropped" if drop else "kept"}; the scheme adds {own}\n' in run.out
    model = loaded(run)
    assert (model.wpe is None) == drop
    logits, loss = model(IDS[None, :-1], IDS[None, 1:])
    expected = gpt2(hub[1], IDS[:-1], positions=not drop)
    assert (logits[0, :, :VOCAB] - expected).abs().max() < 1e-10
    loss.backward()
    for parameter, p in model.named_parameters():
        dead = name == 'tisa' and parameter.endswith(('attn.b', 'attn.c'))  # until the heights are not zero
        assert (p.grad.abs().max() > 1e-12) != dead, parameter


@pytest.mark.parametrize('name', [name for name in MODELS + BASELINES if name not in ('nope', 'composite', 'conv')])
def test_schemes_that_begin_as_something_else(run, hub, name):
    """They have GPT-2's weights all the same, and a finite loss."""
    model = loaded(convert(run, hub[0], '--model', name, '--drop_positions'))
    theirs = hub[1]['h.1.attn.c_attn.weight'].T
    assert torch.equal(model.h[1].attn.c_attn.weight, theirs.double()) and model.wpe is None
    assert model(IDS[None, :-1], IDS[None, 1:])[1].isfinite()
    if name == 'kernelized':
        assert (model.h[0].attn.b == 0).all() and model.h[0].attn.w.std() > 0.5  # b learns, the features are drawn
    if name == 'tisa':
        assert (model.h[0].attn.a == 0).all() and model.h[0].attn.c.std() > 1


def test_the_run_is_one_of_ours(run, hub, tokens):
    """--eval_only, --resume with another data set, and a second --resume go on from it; flags become settings."""
    data = ['--data_dir', tokens, '--device', 'cpu', '--eval_tokens', 500]
    convert(run, hub[0], *data, '--dataset', 'one', '--batch_size', 2, '--learning_rate', 0.01)
    run('train.py', '--eval_only', '--out_dir', 'out/gpt2', '--device', 'cpu')
    starts = np.linspace(0, 2000 - BLOCK - 1, 500 // BLOCK).astype(int)
    ids = torch.from_numpy(np.fromfile(tokens / 'one/val.bin', np.uint16).astype(np.int64))
    expected = [F.cross_entropy(gpt2(hub[1], ids[s:s + BLOCK]), ids[s + 1:s + BLOCK + 1]) for s in starts]
    found = float(re.search(r'step 0, one: val loss ([\d.]+) nats', run.out)[1])
    assert 0 < found - sum(expected) / len(expected) < 0.00094 + 0.0001  # the rows that fill up; four digits
    resume = ['train.py', '--resume', '--out_dir', 'out/gpt2', '--dataset', 'two', '--warmup_iters', 0]
    run(*resume, '--max_iters', 3)
    losses = [float(row['val_loss']) for row in lib.read_csv(run.folder / 'out/gpt2/log.csv') if row['val_loss']]
    assert len(losses) == 2 and losses[1] < losses[0] and 'changed on resume: dataset one -> two' in run.out
    run(*resume, '--max_iters', 4)
    assert 'changed on resume: max_iters 3 -> 4' in run.out and 'step     4/4  val loss' in run.out


def test_it_writes_text(run, hub):
    if not (CORPORA / 'tiktoken_cache').is_dir():
        pytest.skip("needs GPT-2's vocabulary")
    convert(run, hub[0])
    run('sample.py', '--out_dir', 'out/gpt2', '--prompt', 'The capital', '--max_new_tokens', 40, '--device', 'cpu',
        TIKTOKEN_CACHE_DIR=str(CORPORA / 'tiktoken_cache'))
    assert run.out.startswith('The capital') and len(run.out) > 60


def test_download(monkeypatch, tmp_path, hub):
    """--size asks the hub for two files of one repository."""
    import huggingface_hub
    asked = []

    def hf_hub_download(repository, name):
        asked.append((repository, name))
        return str(hub[0] / name)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
    Run(tmp_path)('experiments/from_gpt2.py', '--size', 'gpt2-xl', '--out_dir', 'out/xl')
    assert asked == [('openai-community/gpt2-xl', name) for name in ('config.json', 'model.safetensors')]
    assert (tmp_path / 'out/xl/ckpt_last.pt').is_file()


def refused(run, *words):
    """Exit 2, one line, and no folder -> the line."""
    run('experiments/from_gpt2.py', '--out_dir', 'out/gpt2', *words, code=2)
    assert run.err.count('\n') == 1 and not run.out and not (run.folder / 'out/gpt2').exists(), run.err
    return run.err


def test_no_network(run, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(run.folder))  # the usual one may have a copy
    error = refused(run, '--size', 'gpt2')
    assert 'gpt2 cannot be fetched' in error and 'Without a network, use --path with a copy' in error


def without(name):
    return {key: tensor for key, tensor in hub_weights().items() if key != name}


def changed(name, change):
    weights = hub_weights()
    return {**weights, name: change(weights['wte.weight' if name == 'lm_head.weight' else name])}


@pytest.mark.parametrize('tensors, config, message', [
    (lambda: without('h.1.mlp.c_fc.bias'), {}, r'lacks h\.1\.mlp\.c_fc\.bias \(1 tensors\)'),
    (lambda: without('wpe.weight'), {}, r'lacks wpe\.weight'),
    (hub_weights, dict(n_layer=1), r'also has h\.1\.attn\.c_attn\.bias, h\.1\.attn\.c_attn\.weight, .* \(12 tensors\)'),
    (lambda: changed('h.0.attn.c_attn.weight', torch.t), {}, r'h\.0\.attn\.c_attn\.weight in .* has the shape'),
    (lambda: changed('wte.weight', lambda w: w[1:]), {}, r'wte\.weight in .* \[50256, 16\].* should be \[50257, 16\]'),
    (hub_weights, dict(n_positions=64), r'wpe\.weight in .* has the shape \[32, 16\].* should be \[64, 16\]'),
    (lambda: changed('lm_head.weight', lambda w: w + 1), {}, 'has a head of its own'),
    (hub_weights, dict(model_type='gpt_neo'), 'model_type is gpt_neo; our models can be gpt2 only'),
    (hub_weights, dict(activation_function='relu'), 'activation_function is relu; .* gelu_new or gelu only'),
    (hub_weights, dict(n_inner=40), 'n_inner is 40; our models can be None or 64 only'),
    (hub_weights, dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx is True'),
    (hub_weights, dict(vocab_size=50258), 'vocab_size is 50258; our models can be 50257 only'),
    (hub_weights, dict(n_head=3), 'n_embd must be a multiple of n_head'),
    (hub_weights, dict(n_head=0), 'describes no GPT-2'),
    (hub_weights, dict(n_embd='wide'), 'is not the config.json of a GPT-2: ValueError'),
], ids=range(15))
def test_another_checkpoint_is_refused(run, tmp_path, tensors, config, message):
    folder = write_hub(tmp_path / 'hub', tensors(), config={**HUB, **config})
    assert re.search(message, refused(run, '--path', folder))


@pytest.mark.parametrize('files, message', [
    ({}, r'hub.config\.json is not the config\.json of a GPT-2: FileNotFoundError'),
    ({'config.json': b'{}'}, r"config\.json of a GPT-2: KeyError 'n_positions'"),
    ({'config.json': b'[1]'}, r'config\.json of a GPT-2: TypeError'),
    ({'config.json': json.dumps(HUB).encode()}, r'has no model\.safetensors and no pytorch_model\.bin'),
    ({'config.json': json.dumps(HUB).encode(), 'model.safetensors': b'x' * 99}, 'damaged'),
    ({'config.json': json.dumps(HUB).encode(), 'model.safetensors': struct.pack('<Q', 2) + b'[]'}, 'damaged'),
    ({'config.json': json.dumps(HUB).encode(), 'pytorch_model.bin': b'x' * 99}, 'damaged'),
], ids=['nothing', 'no fields', 'no object', 'no weights', 'no header', 'no tensors', 'no checkpoint'])
def test_a_folder_without_a_checkpoint(run, files, message):
    folder = run.folder / 'hub'
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert re.search(message, refused(run, '--path', folder))


def test_half_a_file(run, tmp_path):
    for kind, name in (('safetensors', 'model.safetensors'), ('bin', 'pytorch_model.bin')):
        file = write_hub(tmp_path / kind, hub_weights(), kind) / name
        file.write_bytes(file.read_bytes()[:10 ** 6])
        assert f'{file} is damaged' in refused(run, '--path', file.parent)


class Trap:
    def __reduce__(self):
        return print, ('this must never run',)


def test_a_pickle_runs_no_code(run, tmp_path):
    folder = write_hub(tmp_path / 'hub', {'wte.weight': Trap()}, 'bin')
    assert 'is damaged, or holds other things than tensors' in refused(run, '--path', folder)


@pytest.mark.parametrize('words, message', [
    (['--n_layer', '3'], '--n_layer is decided by GPT-2\n'),
    (['--no-absolute'], '--absolute is decided by GPT-2 and --drop_positions'),
    (['--objective=masked'], '--objective is decided by GPT-2'),
    (['--resume'], '--resume is for train.py'),
    (['--learning_rat', '1'], 'unrecognized arguments: --learning_rat'),
    (['--model', 'none'], 'there is no model_none.py'),
    (['--size', 'gpt2'], 'not allowed with argument --path'),
])
def test_flags_that_are_refused(run, hub, words, message):
    assert message in refused(run, '--path', hub[0], *words)


def test_a_run_is_not_overwritten(run, hub):
    convert(run, hub[0])
    convert(run, hub[0], code=2)
    assert 'holds a run' in run.err
    convert(run, hub[0], '--overwrite')


# ---------------------------------------------------------------------------------------------------------------------
# take_positions_away.py

@pytest.fixture(scope='module')
def taken(tmp_path_factory, data_dir):
    """Its smallest setting: a base of 4 steps, 10 steps of fine-tuning, one seed."""
    run = Run(tmp_path_factory.mktemp('taken'))
    run.words = ['experiments/take_positions_away.py', '--learning_rate', 0.03, '--base_steps', 4, '--steps', 10,
                 '--seeds', 1, '--schemes', 'nope', 'mine: --model composite --kernel_size 9', '--dataset', 'code',
                 '--results', 'results', '--train', '--data_dir', data_dir, *TINY]
    run(*run.words)
    return run


def test_take_positions_away(taken):
    """Step 0 of the control is the base; of the others it is the base without wpe, whatever the scheme."""
    rows = lib.read_csv(taken.folder / 'results/take_positions_away-code.csv')
    assert (taken.folder / 'results/take_positions_away-code.png').read_bytes()[:4] == b'\x89PNG'
    assert [int(row['step']) for row in rows] == [*range(11)] * 3
    base = lib.read_csv(taken.folder / 'out/take_positions_away/code-base/log.csv')
    before = [row['val_loss'] for row in base if row['val_loss']][-1]
    first = {row['scheme']: row['val_loss'] for row in rows if row['step'] == '0'}
    assert first['absolute'] == before and first['nope'] == first['mine'] != before
    last = [row['val_loss'] for row in rows if row['step'] == '10']
    assert len(set(last)) == 3, 'the schemes differ after training'
    lines = [line for line in taken.out.splitlines() if line.startswith('| mine |')]
    assert len(lines) == 1 and lines[0].startswith(f'| mine | {float(before):.4f} | {float(first["mine"]):.4f} | ')


def test_taking_away_goes_on_where_it_stopped(taken):
    made = {p: p.stat().st_mtime for p in taken.folder.glob('out/take_positions_away/*/ckpt_last.pt')}
    again = Run(taken.folder)(*taken.words)
    assert len(made) == 4 and again.out == taken.out and made == {p: p.stat().st_mtime for p in made}
    other = Run(taken.folder)(*taken.words[:2], 0.1, *taken.words[3:], code=2)
    assert 'was trained with learning_rate 0.03, not 0.1: give this comparison a --name' in other.err


@pytest.mark.parametrize('words, message', [
    (['--base', 'out/none'], 'out/none holds no run'),
    (['--steps', '15'], '--steps must be a multiple of 10, not 15'),
    (['--schemes', 'what'], "'what' is not one of"),
    (['--name', 'a/b'], '--name has letters'),
    (['--train', '--no-absolute'], '--train must not set --absolute'),
])
def test_taking_away_refuses(run, words, message):
    run('experiments/take_positions_away.py', *words, code=2)
    assert message in run.err and run.err.count('\n') == 1


def test_a_base_of_another_size_is_refused(taken):
    """Layers that the base has not would be zero."""
    words = [*taken.words, '--n_layer', 3]
    words[1:1] = ['--base', 'out/take_positions_away/code-base', '--name', 'deep']
    run = Run(taken.folder)(*words, code=2)
    assert run.err == 'take_positions_away.py: the weights are of another model: they lack h.2.ln_1.weight\n'


def test_only_positions_can_be_taken_away(trained):
    base = trained('nope', 'causal')
    run = Run(base.folder)('experiments/take_positions_away.py', '--base', base.out_dir, code=2)
    assert 'is not a causal run of --model nope --absolute' in run.err
