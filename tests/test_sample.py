"""sample.py: the right token is drawn, generation stops where it should, and any prompt and checkpoint is handled."""
import functools
import importlib
import io
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model_nope
import sample
from conftest import MODELS

# other tests train the first two, too; the others have names of their own, because their flags differ
CAUSAL, MASKED = '--out_dir=out/composite-causal-code', '--out_dir=out/composite-masked-code'
LONG, ABSOLUTE = '--out_dir=out/absolute-causal', '--out_dir=out/absolute-masked'
DRAW = [CAUSAL, '--max_new_tokens', 100, '--prompt', 'def grüße(']


@pytest.fixture
def main(trained):
    """main('--prompt', ...) runs sample.py in a folder with short runs; .out and .err are what it printed."""
    for words in (['composite', 'causal'], ['composite', 'masked'], ['nope', 'causal', '--absolute', LONG]):
        trained(*words)
    return functools.partial(trained('nope', 'masked', '--absolute', ABSOLUTE), 'sample.py')


def test_options_of_drawing(main, monkeypatch):
    run = main(*DRAW)
    text = run.out
    assert text.startswith('def grüße(') and 60 < len(text) <= 111
    assert re.fullmatch(f'{CAUSAL[10:]}/ckpt_best.pt: step \\d+, best validation loss so far \\d\\.\\d+\n', run.err)
    first, second = main(*DRAW, '--num_samples', 2, '--seed', 0).out.split('-' * 40 + '\n')
    assert first != text == second != main(*DRAW, '--seed', 2).out
    greedy = main(*DRAW, '--temperature', 0).out
    assert greedy != text and greedy == main(*DRAW, '--temperature', '1e-50', '--seed', 3).out
    assert main(*DRAW, '--top_k', 1, '--seed', 9).out == greedy
    assert len(main(LONG, '--prompt', 'x' * 100).out) > 250, 'absolute positions continue beyond their end'
    assert main(*DRAW[:-1], '\n  a [MASK] b').out.startswith('  a [MASK] b')
    assert len(run.err.splitlines()) == 2 and 'literal text' in run.err
    monkeypatch.chdir(run.folder)
    monkeypatch.setattr(sys, 'argv', ['sample.py', *map(str, DRAW)])
    monkeypatch.setattr(sys, 'stdout', out := io.StringIO())  # as in a notebook, it does not have reconfigure
    sample.main()
    assert out.getvalue() == text
    process = run.start('sample.py', *DRAW)
    process.stdout.close()  # as sample.py | head does
    assert 'Traceback' not in process.stderr.read()
    monkeypatch.setattr(torch, 'multinomial', lambda *_, **__: signal.raise_signal(signal.SIGINT))
    main(*DRAW, code=130)


def test_top_k_is_exactly_k():
    """Of equal logits the first ids are kept; the temperature applies to the probabilities of those that are kept."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.linspace(0, 1, 20)[torch.randperm(20, generator=generator)].double()
    for logits, k, kept in ((torch.zeros(256), 1, {0}), (torch.tensor([0., 2, 1, 1, 1]), 3, {1, 2, 3}),
                            (shuffled, 3, set(shuffled.topk(3).indices.tolist())), (shuffled, 50, set(range(20))),
                            (shuffled, 0, set(range(20)))):
        before = logits.clone()
        assert {sample.draw(logits, 1.0, k, generator) for _ in range(400)} == kept
        assert torch.equal(before, logits), 'the logits stay as they are'
    drawn = torch.tensor([sample.draw(torch.tensor([0.0, 1.0, 2.0, -1.0]), 0.5, 2, generator) for _ in range(3000)])
    assert abs((drawn == 2).double().mean() - torch.tensor([2.0, 4.0]).softmax(0)[1]) < 0.03
    assert sample.draw(torch.tensor([1.0, 3.0, 3.0]), 0, 0, generator) == 1


class Likes:
    """A model that gives row r of its embedding the logit r, but likes `ids` best, one after the other."""
    wte = torch.nn.Embedding(320, 1)
    config = SimpleNamespace(block_size=8, absolute=False)

    def __init__(self, ids=()):
        self.ids = iter(ids)

    def new_state(self):
        return [dict(seen=0)]

    def __call__(self, idx, state=None, where=None):
        logits = torch.arange(320.0).expand(1, (idx if where is None else where).size(1), 320).clone()
        logits[..., next(self.ids, 319)] = 1e6
        return logits, None


def test_only_ordinary_ids_are_drawn_and_filled_in():
    """Never [MASK], nor a row that only pads the embedding; each [MASK] has its own answer."""
    new_ids = sample.continuation(Likes(), [1, 2], 256, 0, 0, 0, torch.Generator())
    assert [next(new_ids) for _ in range(3)] == [255] * 3
    (guesses,) = sample.fill(Likes(), [1, 256, 2], 256, 256, top=2)
    assert [i for i, _ in guesses] == [255, 254]
    assert abs(guesses[0][1] - torch.arange(256.0).softmax(-1)[255].item()) < 1e-6
    model = model_nope.Model(model_nope.Config(vocab_size=320, n_layer=1, causal=False, absolute=True)).eval()
    ids = [100, 256, 102, 256]
    best = model(torch.tensor([ids]))[0][0, :, :256].argmax(-1)
    assert [guesses[0][0] for guesses in sample.fill(model, ids, 256, 256)] == [best[1], best[3]] and best[1] != best[3]


def test_the_end_of_a_document(capsys):
    """Generation stops before that token unless --no-stop; in a prompt its name is the token, if the data has it."""
    args = SimpleNamespace(num_samples=2, max_new_tokens=3, temperature=0, top_k=0, context=None, seed=1, prompt='x')
    meta = dict(tokenizer='bytes', mask_id=256, vocab_size=256)
    for eot, args.no_stop, text in ((255, False, 'xé'), (255, True, 'xé\ufffd'), (None, False, 'xé\ufffd')):
        sample.print_continued(Likes([*'é'.encode(), 255] * 2), {**meta, 'eot_id': eot}, args)
        assert capsys.readouterr().out == f'{text}\n{"-" * 40}\n{text}\n'
    prompt = 'a<|endoftext|>[MASK]'
    for eot, masked, ids in ((255, True, [97, 255, 256]), (255, False, [97, 255, *b'[MASK]']),
                             (None, True, [*b'a<|endoftext|>', 256]), (None, False, [*prompt.encode()])):
        assert sample.encode_prompt(prompt, {**meta, 'eot_id': eot}, masked) == ids
    assert sample.encode_prompt('\udc80', meta, False) == [128], 'bytes of a terminal that are no UTF-8'


@pytest.mark.parametrize('name', [*MODELS, 'rope'])
def test_drawn_from_the_state_is_drawn_from_the_text(name):
    """Ids drawn from the running state = ids drawn with the whole text, across the edge of the context."""
    module = importlib.import_module(f'model_{name}')
    torch.manual_seed(0)
    model = module.Model(module.Config(vocab_size=320, block_size=32, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    for context, prompt in ((0, b'import '), (16, b'import '), (16, b'from __future__ im'), (16, b'x' * 16), (1, b'x')):
        drawn = sample.continuation(model, prompt, 256, context, 1.0, 0, torch.Generator().manual_seed(5))
        drawn = [next(drawn) for _ in range(30)]
        text = list(prompt)
        fed = min(len(text), context or 99)  # tokens that the state holds; a long prompt is cut
        generator = torch.Generator().manual_seed(5)
        for _ in range(30):
            if context and fed > context:
                fed = max(1, context // 2)
            p = model(torch.tensor([text[-fed:]]))[0][0, -1, :256].double().softmax(-1)
            text.append(torch.multinomial(p, 1, generator=generator).item())
            fed += 1
        assert drawn == text[len(prompt):] and len(set(drawn)) > 10


def test_each_gap_shows_its_own_answers(monkeypatch, capsys):
    """In the order of the gaps, in the text and in the list. A GPT-2 token begins with the space before it."""
    guesses = [[(ord('a'), 0.5), (ord('b'), 0.25)], [(ord('c'), 0.75), (ord('d'), 0.125)], [(ord('e'), 1.0)]]
    letters = sample.tokenizer('bytes')
    monkeypatch.setattr(sample, 'fill', lambda model, ids, *_: guesses)
    monkeypatch.setattr(sample, 'tokenizer', lambda name: letters)
    args = SimpleNamespace(prompt='x [MASK]y[MASK][MASK] z')
    for kind, x in (('bytes', 'x '), ('gpt2', 'x')):
        sample.print_filled(Likes(), dict(tokenizer=kind, mask_id=256, vocab_size=256), args)
        assert capsys.readouterr().out.splitlines() == [
            f'{x}[a]y[c][e] z', "[MASK] 1: 'a' 50.0%  'b' 25.0%", "[MASK] 2: 'c' 75.0%  'd' 12.5%",
            "[MASK] 3: 'e' 100.0%"]
    assert bytes(sample.encode_prompt('x [MASK]', dict(tokenizer='gpt2', mask_id=256), False)) == b'x [MASK]'


def test_which_checkpoint(main, monkeypatch, capsys):
    """The newest run, its best weights, or its last ones if there is no best yet; damage is one line."""
    monkeypatch.chdir(main.func.folder)
    Path('out/absolute-causal/ckpt_last.pt').touch()
    assert not sample.load_run()[0].training
    assert capsys.readouterr().err.startswith('out/absolute-causal/ckpt_best.pt')
    Path('early').mkdir()
    shutil.copy('out/composite-causal-code/ckpt_last.pt', 'early')
    assert main('--out_dir=early', '--max_new_tokens', 3).err.startswith('early/ckpt_last.pt: step 60')
    assert 'early/ckpt_best.pt' in main('--out_dir=early', '--ckpt=best', code=2).err
    good = torch.load('early/ckpt_last.pt', weights_only=True)
    for change in ({'settings': {**good['settings'], 'model': 'gone'}}, {'config': {**good['config'], 'n_embd': 64}},
                   {'config': {**good['config'], 'field_of_another_day': 1}}, {'model': {}}):
        torch.save({**good, **change}, 'early/ckpt_best.pt')
        err = main('--out_dir=early', code=2).err
        assert re.fullmatch('.*(model_gone.py|early/ckpt_best.pt does not fit model_composite.py).*\n', err)


def test_refused(main, run):
    """One line on stderr, exit 2. Absolute positions end at block_size, not before."""
    assert len(main(ABSOLUTE, '--prompt', 'x' * 31 + '[MASK]').out.splitlines()) == 2
    for words, said in ((['--out_dir=nowhere'], 'nowhere/ckpt_last.pt train.py'), (['--device=tpu9'], 'tpu9 cpu'),
                        ([MASKED, '--prompt=text'], 'at least one [MASK]'), ([MASKED], '--prompt [MASK]'),
                        ([ABSOLUTE, '--prompt', 'x' * 32 + '[MASK]'], 'block_size=32: the prompt has 33'),
                        ([LONG, '--context=33'], '--context block_size=32'),
                        ([LONG, '--context=0'], '--context block_size=32'), ([CAUSAL, '--prompt='], '--prompt empty'),
                        (['--num_samples=0'], '--num_samples at least 1'), (['--device=meta'], '--device meta'),
                        *(([f'--{name}=-1'], f'--{name} at least 0') for name in ('temperature', 'top_k'))):
        err = re.sub(r'\S+ckpt_\w+.pt: step.*\n', '', main(*words, code=2).err)
        assert err.startswith('sample.py: ') and err.count('\n') == 1 and all(part in err for part in said.split()), err
    assert 'no run in out/' in run('sample.py', code=2).err
