"""sample.py as users run it, on runs that train.py made."""
import importlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prepare_data
import sample
from conftest import CORPORA, MODELS, TINY

needs_tokens = pytest.mark.skipif(not (CORPORA / 'tiktoken_cache').is_dir(),
                                  reason=f'no tiktoken cache in {CORPORA} (set CORPORA)')


@pytest.fixture(scope='module')
def runs(trained):
    """A folder with a short run of each model and objective, two baselines, and one with absolute positions."""
    for name in MODELS:
        for objective in ('causal', 'masked'):
            trained(name, objective)
    for name in ('rope', 'cape'):
        trained(name, 'causal')
    return trained('nope', 'causal', '--absolute', '--out_dir', 'out/absolute')


@pytest.fixture
def main(runs, monkeypatch, capsys):
    """main('--prompt', ...) -> what sample.py prints, in this process; code=2: its exit."""
    monkeypatch.chdir(runs.folder)

    def call(*words, code=None):
        monkeypatch.setattr(sys, 'argv', ['sample.py', *map(str, words)])
        if code is None:
            sample.main()
        else:
            with pytest.raises(SystemExit) as stop:
                sample.main()
            assert stop.value.code == code
        return capsys.readouterr()
    return call


@pytest.mark.parametrize('name', [*MODELS, 'rope', 'cape'])
def test_causal_continues_the_prompt(main, name):
    words = ['--out_dir', f'out/{name}-causal-code', '--prompt', 'def grüße(', '--max_new_tokens', 100]
    text, err = main(*words)
    assert text.startswith('def grüße(') and 60 < len(text) <= 111
    assert len(err.splitlines()) == 1 and 'step 60' in err
    assert main(*words).out == text, 'the same seed writes the same text'
    assert main(*words, '--seed', 2).out != text
    assert len(main(*words, '--context', 0).out) > 60


def test_options_of_drawing(main):
    words = ['--out_dir', 'out/nope-causal-code', '--prompt', 'def grüße(', '--max_new_tokens', 100]
    text = main(*words).out
    two = main(*words, '--num_samples', 2).out
    first, second = two.split('-' * 40 + '\n')
    assert first == text != second and second.startswith('def grüße(')
    greedy = main(*words, '--temperature', 0).out
    assert greedy != text and main(*words, '--temperature', '1e-50').out == greedy
    assert main(*words, '--top_k', 1, '--seed', 9).out == greedy, 'the likeliest token is the only one of top 1'


def test_top_k_draws_from_k_ids():
    generator = torch.Generator().manual_seed(0)
    logits = torch.linspace(0, 1, 20)[torch.randperm(20, generator=generator)]
    for k in (1, 3, 50):
        drawn = {sample.draw(logits, 1.0, k, generator) for _ in range(400)}
        assert drawn == set(logits.topk(min(k, 20)).indices.tolist())


def test_temperature_and_seed_decide_the_draws():
    """At temperature 1/2 the probabilities are those of the doubled logits; the same generator draws the same ids."""
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        drawn.append([sample.draw(logits, 0.5, 0, generator) for _ in range(2000)])
    share = torch.bincount(torch.tensor(drawn[0])) / 2000
    assert (share - (2 * logits).softmax(-1)).abs().max() < 0.03
    assert [drawn[0] == other for other in drawn] == [True, True, False]  # short: a diff takes hours


class Likes(torch.nn.Module):
    """A model whose likeliest row is the last one of its embedding, then the row before it, and so on."""
    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(320, 1)

    def new_state(self):
        return [dict(seen=0)]

    def forward(self, idx, state=None, where=None):
        return torch.arange(320.0).expand(1, (idx if where is None else where).size(1), 320), None


def test_only_ordinary_ids_are_drawn_and_filled_in():
    """Never [MASK], nor a row that only fills the embedding up."""
    new_ids = sample.continuation(Likes(), [1, 2], 256, 0, 0, 0, torch.Generator())
    assert [next(new_ids) for _ in range(3)] == [255] * 3
    (guesses,) = sample.fill(Likes(), [1, 256, 2], 256, 256, top=2)
    assert [i for i, _ in guesses] == [255, 254]
    assert abs(guesses[0][1] - torch.arange(256.0).softmax(-1)[255].item()) < 1e-6


@pytest.mark.parametrize('name', MODELS)
def test_drawn_from_the_state_is_drawn_from_the_text(runs, name):
    """Ids drawn from the running state = ids drawn by feeding the whole text anew, across the edge of the context."""
    model, checkpoint = sample.load_run(runs.folder / f'out/{name}-causal-code')
    assert checkpoint['settings']['model'] == name and not model.training
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # the short training has not taught it to look back; this model does
    for context, prompt in ((0, b'import '), (16, b'import '), (16, b'from __future__ import')):
        ids = list(prompt)
        drawn = sample.continuation(model, ids, 256, context, 1.0, 0, torch.Generator().manual_seed(5))
        drawn = [next(drawn) for _ in range(30)]
        text = list(ids)
        fed = min(len(ids), context) if context else len(ids)  # tokens that the state holds; a long prompt is cut
        generator = torch.Generator().manual_seed(5)
        for _ in range(30):
            if context and fed > context:
                fed = context // 2
            p = model(torch.tensor([text[-fed:]]))[0][0, -1, :256].softmax(-1)
            text.append(torch.multinomial(p, 1, generator=generator).item())
            fed += 1
        assert drawn == text[len(ids):] and len(set(drawn)) > 10


@pytest.mark.parametrize('name', MODELS)
def test_masked_fills_the_gaps(main, name):
    out = main('--out_dir', f'out/{name}-masked-code', '--prompt', 'd[MASK]f f(self[MASK]:').out.splitlines()
    assert re.fullmatch(r'd\[.\]f f\(self\[.\]:', out[0], re.S) and len(out) == 3
    for n, line in enumerate(out[1:], 1):
        p = [float(x) for x in re.findall(r'(\d+\.\d)%', line)]
        assert line.startswith(f'[MASK] {n}: ') and len(p) == 5
        assert p == sorted(p, reverse=True) and 0 < sum(p) <= 100.5
    model, _ = sample.load_run(f'out/{name}-masked-code', 'best', 'cpu')
    ids = [100, 256, 102, 256]
    first, second = sample.fill(model, ids, 256, 256)
    logits = model(torch.tensor([ids]))[0][0]
    assert second[0][0] == logits[3, :256].argmax()
    assert abs(first[0][1] - logits[1, :256].softmax(-1).max().item()) < 1e-6


@pytest.mark.parametrize('kind', ['bytes', 'gpt2'])
def test_each_gap_shows_its_own_answers(kind, monkeypatch, capsys):
    """In the order of the gaps, in the text and in the list below it, whatever the tokenizer."""
    guesses = [[(ord('a'), 0.5), (ord('b'), 0.25)], [(ord('c'), 0.75), (ord('d'), 0.125)], [(ord('e'), 1.0)]]
    found = []

    def fill(model, ids, mask_id, vocab_size):
        found.append(ids)
        return guesses
    monkeypatch.setattr(sample, 'fill', fill)
    letters = sample.tokenizer('bytes')
    monkeypatch.setattr(sample, 'tokenizer', lambda name: letters)
    model = SimpleNamespace(config=SimpleNamespace(absolute=False, block_size=32))
    sample.print_filled(model, dict(tokenizer=kind, mask_id=256, vocab_size=256), 'x [MASK]y[MASK][MASK] z')
    space = [ord(' ')] if kind == 'bytes' else []  # a GPT-2 token begins with the space before it
    assert found == [[ord('x'), *space, 256, ord('y'), 256, 256, ord(' '), ord('z')]]
    assert capsys.readouterr().out.splitlines() == [
        'x [a]y[c][e] z' if kind == 'bytes' else 'x[a]y[c][e] z',
        "[MASK] 1: 'a' 50.0%  'b' 25.0%", "[MASK] 2: 'c' 75.0%  'd' 12.5%", "[MASK] 3: 'e' 100.0%"]


def test_newest_run_is_the_default(runs):
    """In a process of its own: the script starts and ends well."""
    checkpoints = (runs.folder / 'out').glob('*/ckpt_last.pt')
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime).parent.name
    runs.process('sample.py', '--prompt', 'x', '--max_new_tokens', 3)
    assert f'out/{newest}/ckpt_best.pt: step' in runs.err


def test_a_run_without_a_best_has_its_last_weights(main):
    """As a run that is stopped before its first validation leaves it."""
    Path('early').mkdir()
    shutil.copy('out/absolute/ckpt_last.pt', 'early')
    assert main('--out_dir', 'early', '--max_new_tokens', 3).err.startswith('early/ckpt_last.pt: step 60')
    assert 'early/ckpt_best.pt' in main('--out_dir', 'early', '--ckpt', 'best', code=2).err


def test_absolute_positions_go_on_past_their_end(main):
    assert len(main('--out_dir', 'out/absolute', '--max_new_tokens', 200, '--prompt', 'x' * 100).out) > 250


def test_mask_is_literal_text_to_a_causal_model(main):
    words = ['--out_dir', 'out/nope-causal-code', '--max_new_tokens', 3, '--prompt']
    out, err = main(*words, 'a [MASK] b')
    assert out.startswith('a [MASK] b') and len(err.splitlines()) == 2 and '[MASK]' in err and 'literal text' in err
    assert 'literal' not in main(*words, 'a MASK b').err


@pytest.mark.parametrize('words, parts', [
    ('--out_dir nowhere', ['nowhere/ckpt_last.pt', 'train.py']),
    ('--out_dir out/composite-masked-code --prompt text', ['at least one [MASK]']),
    ('--out_dir out/composite-masked-code', ['--prompt', '[MASK]']),
    ('--out_dir out/absolute --context 33', ['--context', 'block_size=32']),
    ('--out_dir out/absolute --prompt=', ['--prompt', 'empty']),
    ('--num_samples 0', ['--num_samples', 'at least 1']),
    ('--temperature -1', ['--temperature', 'at least 0']),
    ('--ckpt first', ["'first'", 'best', 'last']),
    ('--device tpu9', ['--device tpu9']),
    ('--device meta', ['--device meta', 'cuda, mps and cpu']),
    ('--nonsense', ['--nonsense', '--help']),
])
def test_refused(main, words, parts):
    out, err = main(*words.split(), code=2)
    lines = [line for line in err.splitlines() if not re.match(r'\S+ckpt_\w+.pt: step', line)]
    assert len(lines) == 1 and all(part in lines[0] for part in ['sample.py: ', *parts]), err


def test_no_run_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        sample.load_run()
    assert 'no run in out/' in capsys.readouterr().err


def test_refused_checkpoint(main):
    """Damaged, of something else, of a model file that is gone or that has changed since: one line that names it."""
    Path('bad').mkdir()
    Path('bad/ckpt_best.pt').write_bytes(Path('out/absolute/ckpt_best.pt').read_bytes()[:3000])
    err = main('--out_dir', 'bad', code=2).err
    assert len(err.splitlines()) == 1 and 'bad/ckpt_best.pt is damaged' in err
    good = torch.load('out/absolute/ckpt_best.pt', weights_only=True)
    damaged = 'is damaged'
    changed = 'does not fit model_nope.py'
    gone = {**good['settings'], 'model': 'gone'}
    for checkpoint, reason in (({'a': 1}, damaged), ([torch.zeros(3)], damaged),
                               ({**good, 'settings': gone}, 'needs model_gone.py'),
                               ({**good, 'config': {**good['config'], 'n_embd': 64}}, changed),
                               ({**good, 'config': {**good['config'], 'field_of_another_day': 1}}, changed)):
        torch.save(checkpoint, 'bad/ckpt_best.pt')
        err = main('--out_dir', 'bad', code=2).err
        assert len(err.splitlines()) == 1 and 'bad/ckpt_best.pt' in err and reason in err, err


def test_tiktoken_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(SystemExit) as stop:
        sample.tokenizer('gpt2')
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert 'not installed' in err and 'pip install tiktoken' in err


@needs_tokens
def test_gpt2_tokens_from_preparation_to_sample(run, main, monkeypatch):
    """Shakespeare as GPT-2 tokens: prepare, train a little, continue, fill."""
    monkeypatch.chdir(run.folder)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CORPORA / 'tiktoken_cache'))
    prepare_data.prepare('plays', 'gpt2', CORPORA / 'shakespeare.txt')
    meta = json.loads(Path('data/plays/meta.json').read_text())
    for objective in ('causal', 'masked'):
        run('train.py', '--dataset', 'plays', '--objective', objective, *TINY, '--max_iters', 2)
        said = re.findall(r'val loss (\S+) nats per .*, (\S+) bits per byte, perplexity (\d+\.\d+)', run.out)[-1]
        loss, bits, perplexity = map(float, said)
        assert abs(bits - loss / math.log(2) * meta['val_tokens'] / meta['val_bytes']) < 1e-3
        assert abs(math.log(perplexity) - loss) < 1e-3
    out = main('--out_dir', 'out/composite-masked-plays', '--prompt', 'The [MASK] of the').out
    assert out.startswith('The[') and '[MASK] 1:' in out and '] of the\n' in out
    out = main('--out_dir', 'out/composite-causal-plays', '--prompt', 'The', '--max_new_tokens', 20).out
    assert out.startswith('The') and len(out) > 20
    assert os.listdir('data') == ['plays']


@pytest.mark.parametrize('name, fields', [
    ('kernelized', dict(max_distance=4)),
    ('conv', dict(mixer='lightweight', values=True)),
])
def test_a_state_of_constant_size_stays_small_after_a_long_prompt(name, fields):
    """Its tensors are no views of the whole prompt: 2,000 tokens of 16 channels would be 128,000 bytes."""
    module = importlib.import_module(f'model_{name}')
    model = module.Model(module.Config(n_embd=16, n_head=2, n_layer=1, **fields))
    state = model.new_state()
    with torch.no_grad():
        model(torch.randint(256, (1, 2000)), state=state)
    kept = {name: x.untyped_storage().nbytes() for name, x in state[0].items() if torch.is_tensor(x)}
    assert len(kept) >= 2 and max(kept.values()) < 10_000, kept
