"""sample.py as users run it, on runs that train.py made."""
import json
import math
import re
import signal

import pytest
import torch

import sample
from conftest import CORPORA, MODELS, TINY, Run


@pytest.fixture(scope='module')
def runs(tmp_path_factory, data_dir):
    """A folder with a short run of each model and objective, and one with absolute positions."""
    run = Run(tmp_path_factory.mktemp('sample'))
    words = ['--data_dir', data_dir, '--dataset', 'code', *TINY, '--max_iters', 40, '--warmup_iters', 5, '--learning_rate', 5e-3, '--eval_interval', 40]
    for name in MODELS:
        for objective in ('causal', 'masked'):
            run('train.py', '--model', name, '--objective', objective, *words)
    run('train.py', '--model', 'nope', '--absolute', *words, '--out_dir', 'out/absolute')
    return run


@pytest.mark.parametrize('name', MODELS)
def test_causal_continues_the_prompt(runs, name):
    words = ['--out_dir', f'out/{name}-causal-code', '--prompt', 'def grüße(', '--max_new_tokens', 100, '--device', 'cpu']
    text = runs('sample.py', *words).out
    assert text.startswith('def grüße(') and 60 < len(text) <= 111 and len(runs.err.splitlines()) == 1 and 'step 40' in runs.err
    assert runs('sample.py', *words).out == text, 'the same seed writes the same text'
    assert runs('sample.py', *words, '--seed', 2).out != text
    two = runs('sample.py', *words, '--num_samples', 2).out
    assert two.startswith(text) and two.count('def grüße(') >= 2 and len(set(two.split('-' * 40 + '\n'))) == 2
    assert runs('sample.py', *words, '--temperature', '1e-50').out == runs('sample.py', *words, '--temperature', 0).out
    greedy = runs('sample.py', *words, '--temperature', 0).out
    assert greedy == runs('sample.py', *words, '--top_k', 1, '--seed', 9).out, 'the likeliest token is the only one of top 1'
    assert len(runs('sample.py', *words, '--context', 0).out) > 60


@pytest.mark.parametrize('name', MODELS)
def test_drawn_from_the_state_is_drawn_from_the_text(runs, name):
    """Ids drawn from the running state = ids drawn by feeding the whole text anew, across the edge of the context."""
    model, checkpoint = sample.load_run(runs.folder / f'out/{name}-causal-code', 'best', 'cpu')
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # the short training has not taught it to look back; this model does
    for context, ids in ((0, list(b'import ')), (16, list(b'import ')), (16, list(b'from __future__ import'))):
        ids, cut = list(ids), ids[-context:]  # what is longer than the context is cut to it
        drawn = sample.continuation(model, ids, 256, context, 1.0, 0, torch.Generator().manual_seed(5))
        drawn = [next(drawn) for _ in range(30)]
        text, fed, generator = list(ids), len(cut), torch.Generator().manual_seed(5)  # fed: how many tokens the state holds
        for _ in range(30):
            if context and fed > context:
                fed = context // 2
            p = model(torch.tensor([text[-fed:]]))[0][0, -1, :256].softmax(-1)
            text.append(torch.multinomial(p, 1, generator=generator).item())
            fed += 1
        assert drawn == text[len(ids):] and len(set(drawn)) > 10


@pytest.mark.parametrize('name', MODELS)
def test_masked_fills_the_gaps(runs, name):
    out = runs('sample.py', '--out_dir', f'out/{name}-masked-code', '--prompt', 'd[MASK]f f(self[MASK]:').out.splitlines()
    assert re.fullmatch(r'd\[.\]f f\(self\[.\]:', out[0], re.S) and len(out) == 3
    for n, line in enumerate(out[1:], 1):
        p = [float(x) for x in re.findall(r'(\d+\.\d)%', line)]
        assert line.startswith(f'[MASK] {n}: ') and len(p) == 5 and p == sorted(p, reverse=True) and 0 < sum(p) <= 100.5
    model, checkpoint = sample.load_run(runs.folder / f'out/{name}-masked-code', 'best', 'cpu')
    ids = [100, 256, 102, 256]
    (first, _), (_, p) = sample.fill(model, ids, 256, 256)[1][0], sample.fill(model, ids, 256, 256)[0][0]
    logits = model(torch.tensor([ids]))[0][0]
    assert first == logits[3, :256].argmax() and abs(p - logits[1, :256].softmax(-1).max().item()) < 1e-6


def test_newest_run_is_the_default(runs):
    runs('sample.py', '--prompt', 'x', '--max_new_tokens', 3)
    assert 'out/absolute/ckpt_best.pt: step 40' in runs.err


def test_a_run_stopped_early_has_its_last_weights(runs, data_dir):
    process = runs.start('train.py', '--data_dir', data_dir, '--dataset', 'code', *TINY, '--model', 'nope', '--max_iters', 10 ** 6, '--eval_interval', 10 ** 6, '--out_dir', 'early')
    for line in process.stdout:
        if 'step    20/' in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    runs('sample.py', '--out_dir', 'early', '--max_new_tokens', 3)
    assert re.match(r'early/ckpt_last.pt: step [2-9]\d', runs.err) and not (runs.folder / 'early/ckpt_best.pt').exists()


def test_absolute_positions_go_on_past_their_end(runs):
    assert len(runs('sample.py', '--out_dir', 'out/absolute', '--max_new_tokens', 200, '--prompt', 'x' * 100).out) > 250


@pytest.mark.parametrize('words, parts', [
    ('--out_dir nowhere', ['nowhere/ckpt_last.pt', 'train.py']),
    ('--out_dir out/composite-masked-code --prompt text', ['at least one [MASK]']),
    ('--out_dir out/composite-masked-code', ['--prompt', '[MASK]']),
    ('--out_dir out/absolute --context 33', ['--context', 'block_size=32']),
    ('--num_samples 0', ['--num_samples', 'at least 1']),
    ('--temperature -1', ['--temperature', 'at least 0']),
    ('--ckpt first', ["'first'", 'best', 'last']),
    ('--device tpu9', ['--device tpu9']),
    ('--nonsense', ['--nonsense', '--help']),
])
def test_refused(runs, words, parts):
    runs('sample.py', *words.split(), code=2)
    err = [line for line in runs.err.splitlines() if not re.match(r'\S+ckpt_\w+.pt: step', line)]
    assert len(err) == 1 and all(part in err[0] for part in parts), runs.err


def test_refused_checkpoint(runs):
    (runs.folder / 'bad').mkdir(exist_ok=True)
    (runs.folder / 'bad/ckpt_best.pt').write_bytes((runs.folder / 'out/absolute/ckpt_best.pt').read_bytes()[:3000])
    runs('sample.py', '--out_dir', 'bad', code=2)
    assert len(runs.err.splitlines()) == 1 and 'ckpt_best.pt' in runs.err
    good = torch.load(runs.folder / 'out/absolute/ckpt_best.pt', weights_only=True)
    for changed in ({'a': 1}, [torch.zeros(3)], {**good, 'settings': {'model': 'gone'}}, {**good, 'config': {**good['config'], 'n_embd': 64}},
                    {**good, 'config': {**good['config'], 'field_of_another_day': 1}}):
        torch.save(changed, runs.folder / 'bad/ckpt_best.pt')
        runs('sample.py', '--out_dir', 'bad', code=2)
        assert len(runs.err.splitlines()) == 1 and 'ckpt_best.pt' in runs.err


@pytest.mark.skipif(not (CORPORA / 'tiktoken_cache').is_dir(), reason=f'no tiktoken cache in {CORPORA} (set CORPORA)')
def test_gpt2_tokens_from_preparation_to_sample(run):
    """WikiText-2 as GPT-2 tokens: prepare, train a little, continue, fill."""
    env = dict(TIKTOKEN_CACHE_DIR=str(CORPORA / 'tiktoken_cache'))
    run('prepare_data.py', '--dataset', 'wikitext2', '--path', CORPORA / 'wikitext-2-raw', **env)
    for objective in ('causal', 'masked'):
        run('train.py', '--dataset', 'wikitext2', '--objective', objective, *TINY, '--max_iters', 2)
        loss, bits, perplexity = map(float, re.findall(r'val loss (\S+) nats per .*, (\S+) bits per byte, perplexity (\S+)', run.out)[-1])
        meta = json.loads((run.folder / 'data/wikitext2/meta.json').read_text())
        assert abs(bits - loss / math.log(2) * meta['val_tokens'] / meta['val_bytes']) < 1e-3 and abs(math.log(perplexity) - loss) < 1e-3
    out = run('sample.py', '--out_dir', 'out/composite-masked-wikitext2', '--prompt', 'The [MASK] of the', **env).out
    assert out.startswith('The[') and '[MASK] 1:' in out and '] of the\n' in out
    out = run('sample.py', '--out_dir', 'out/composite-causal-wikitext2', '--prompt', 'The', '--max_new_tokens', 20, **env).out
    assert out.startswith('The') and len(out) > 20
