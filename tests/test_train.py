"""train.py as users run it: learning, stopping, going on, several processes, wrong input."""
import csv
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare_data
import common
import train as script
from conftest import BASELINES, MODELS, REPO


posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no signals between processes')


def log(folder, *columns):
    with open(folder / 'log.csv', newline='') as f:
        return [tuple(r[c] for c in columns) for r in csv.DictReader(f)]


def checkpoint(folder, which='last'):
    return torch.load(folder / f'ckpt_{which}.pt', weights_only=True)


def tensors(x):
    """All tensors in nested dicts and lists, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (list, tuple)):
        return []
    return [t for v in x for t in tensors(v)]


def equal(a, b, tolerance=0.0):
    """Whether two checkpoints, or parts of them, hold the same tensors."""
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(tensors(a), tensors(b), strict=True))


def one_line(text, *parts):
    """One line on stderr, which holds all the parts."""
    assert len(text.splitlines()) == 1, text
    for part in parts:
        assert part in text, f'{part!r} is not in {text}'


# -- data -------------------------------------------------------------------------------------------------------------

META = dict(vocab_size=256, mask_id=256)
DATA = np.random.default_rng(0).integers(256, size=5000).astype(np.uint16)


def make_run(T, data=DATA, **settings):
    """What train.py's functions are given, with rows of T tokens and without a model file."""
    return script.Run(script.Settings(**settings), SimpleNamespace(block_size=T), META, data, data)


def test_causal_targets_are_the_next_tokens():
    idx, targets, where = script.train_rows(make_run(40, np.arange(5000, dtype=np.uint16)), 3, range(6))
    assert (targets == idx + 1).all() and (np.diff(idx) == 1).all() and where is None


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_batches_depend_on_seed_and_step_alone(objective):
    run = make_run(40, objective=objective)
    whole = script.train_rows(run, 7, range(12))
    parts = [script.train_rows(run, 7, range(i, i + 3)) for i in (0, 3, 6, 9)]  # micro batches, or processes
    for i, a in enumerate(whole):
        assert a is None or (a == np.concatenate([p[i] for p in parts])).all()
    other_step = script.train_rows(run, 8, range(12))
    other_seed = script.train_rows(make_run(40, objective=objective, seed=2), 7, range(12))
    for other in (other_step, other_seed):
        assert (other[0] != whole[0]).mean() > 0.5
    assert len({row.tobytes() for row in whole[0]}) == 12, 'rows of a batch differ'


def test_masked_rows_hide_what_they_ask_for_and_nothing_else():
    plain = script.train_rows(make_run(64), 3, range(400))[0]
    idx, targets, where = script.train_rows(make_run(64, objective='masked', mask_prob=0.15), 3, range(400))
    assert where.shape == (400, round(0.15 * 64))
    assert (np.diff(where, axis=1) > 0).all(), 'no place twice'
    assert (targets == np.take_along_axis(plain, where, 1)).all(), 'the target is the hidden token'
    untouched = np.ones_like(idx, bool)
    np.put_along_axis(untouched, where, False, 1)
    assert (idx[untouched] == plain[untouched]).all(), 'other places are as they were'
    shown = np.take_along_axis(idx, where, 1)
    share = [(shown == META['mask_id']).mean(), (shown == targets).mean()]
    assert abs(share[0] - 0.8) < 0.03 and abs(share[1] - 0.1) < 0.03, share  # 4000 places: standard error 0.006
    assert np.bincount(where.ravel(), minlength=64).min() > 20, 'every place of the row is predicted sometimes'
    noise = shown[(shown != targets) & (shown != META['mask_id'])]
    assert len(np.unique(noise)) > 150 and noise.max() < 256, 'random tokens are drawn from all ordinary ids'


@pytest.mark.parametrize('name', MODELS)
def test_masked_objective_scores_masked_places_alone(name):
    """The loss of a batch is unchanged by the targets of other places, and its gradient at other logits is zero."""
    module = common.load_model_file(name)
    model = module.Model(module.Config(vocab_size=257, causal=False)).double()
    rows = script.train_rows(make_run(64, objective='masked'), 3, range(4))
    idx, targets, where = map(torch.from_numpy, rows)
    _, loss = model(idx, targets, where=where)
    logits = model(idx)[0].detach().requires_grad_()
    everywhere = torch.full_like(idx, -1).scatter(1, where, targets)
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), everywhere.flatten(), ignore_index=-1)
    assert abs(loss.item() - by_hand.item()) < 1e-10
    scored = torch.autograd.grad(by_hand, logits)[0].abs().sum(-1) > 0
    assert (scored == (everywhere >= 0)).all() and scored.sum() == 4 * round(0.15 * 64)


def test_validation_rows_are_fixed_spread_and_disjoint():
    for objective in ('causal', 'masked'):
        first, second = [script.val_rows(make_run(64, seed=seed, objective=objective), np.arange(10), 10)
                         for seed in (1, 2)]
        for a, b in zip(first, second):
            assert a is None or (a == b).all()
    position = np.arange(5000, dtype=np.uint16)
    idx = script.val_rows(make_run(64, position), np.arange(78), 78)[0]
    assert len(np.unique(idx)) == idx.size and idx.max() > 4900, 'no token twice, and up to the end'


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_validation_does_not_depend_on_the_micro_batch_or_on_dropout(objective):
    """Rows that fill the last batch do not count, and nothing is dropped."""
    module = common.load_model_file('nope')
    config = module.Config(vocab_size=257, causal=objective == 'causal', dropout=0.5, n_layer=1, n_embd=32)
    torch.manual_seed(0)
    model = module.Model(config)
    runs = [make_run(64, objective=objective, eval_tokens=1000, batch_size=micro) for micro in (1, 4, 7, 15, 15)]
    losses = [script.evaluate(run, model) for run in runs]
    assert max(losses) - min(losses) < 1e-6 and model.training, losses
    rows = script.on_device(runs[0], script.val_rows(runs[0], np.arange(15), 15))
    assert abs(losses[0] - script.forward(runs[0], model.eval(), rows).item()) < 1e-5


def test_random_draws_depend_on_seed_and_step():
    draws = set()
    for seed in (1, 2, 3):
        for step in (0, 1, 2):
            script.reseed(script.Settings(seed=seed), step)
            draws.add(torch.rand(4).sum().item())
    assert len(draws) == 9
    script.reseed(script.Settings(seed=3), 2)
    assert torch.rand(4).sum().item() in draws


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    common.write(path, lambda f: f.write(b'old'))

    def fail(error):
        def put(f):
            f.write(b'half')
            if not isinstance(f, common.Size):
                raise error
        return put
    for error in (OSError('disk full'), RuntimeError('enforce fail'), KeyboardInterrupt()):
        with pytest.raises((OSError, KeyboardInterrupt)) as stop:
            common.write(path, fail(error))
        assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['file']
        for part in ('file', str(error), 'needs 4 bytes', 'are free'):
            assert part in str(stop.value) or isinstance(error, KeyboardInterrupt), stop.value


def test_a_written_file_takes_its_place_at_once(tmp_path):
    """By a rename: the file at the path is the very one that was filled beside it, and nobody ever sees half of it."""
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    written = []

    def put(f):
        f.write(b'new')
        written.append(os.fstat(f.fileno()).st_ino)
        assert path.read_bytes() == b'old'
    common.write(path, put)
    assert path.read_bytes() == b'new' and os.stat(path).st_ino == written[0]


def test_bits_per_byte_are_those_of_the_text():
    """A uniform guess among all pairs of bytes: each byte costs 8 bits, whatever the tokens are."""
    run = make_run(64)
    run.meta = dict(META, val_tokens=1000, val_bytes=2000)
    loss = math.log(256 ** 2)
    assert abs(script.bits_per_byte(run, loss) - 8) < 1e-12
    assert f'{loss:.4f} nats per token, 8.0000 bits per byte, perplexity 65536.00' in script.describe(run, loss)


def test_the_last_line_is_a_command_to_copy(capsys):
    run = make_run(64)
    run.meta = dict(META, val_tokens=1000, val_bytes=1000)
    run.out = Path('out/my run')
    script.conclude(run, script.Progress(best=1.0), False)
    run.out = Path('out/mine')
    run.settings.objective = 'masked'
    script.conclude(run, script.Progress(best=1.0), False)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith('sample.py --out_dir "out/my run"')
    assert second.endswith('sample.py --out_dir out/mine --prompt "a text with [MASK] in it"')


def test_schedule():
    s = script.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    lr = [script.lr_at(i, s) for i in range(120)]
    assert [lr[i] for i in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert abs(lr[60] - 0.55) < 1e-9 and abs(lr[110] - 0.1) < 1e-9 and lr[119] == lr[110]
    assert all(a >= b for a, b in zip(lr[10:], lr[11:]))


# -- device and speed -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('able, dtype, chosen', [
    (dict(avx512_bf16=True, amx_bf16=False), 'auto', 'bfloat16 (--dtype float32 for float32)'),
    (dict(avx512_bf16=False, amx_bf16=True), 'auto', 'bfloat16 (--dtype float32 for float32)'),
    (dict(avx512_bf16=False, amx_bf16=False), 'auto', 'float32'),
    (dict(bf16=True, architecture='arm64'), 'auto', 'float32'),
    (dict(avx512_bf16=True), 'float32', 'float32'),
    (dict(), 'bfloat16', 'bfloat16'),
], ids=str)
def test_dtype_of_a_cpu(able, dtype, chosen, monkeypatch, capsys):
    """auto: bfloat16 where the CPU has instructions for it; what is asked for is taken everywhere."""
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: able)
    found = common.choose_device(script.Settings(device='cpu', dtype=dtype))[1]
    assert found == (torch.bfloat16 if 'bfloat16' in chosen else torch.float32)
    assert f' threads), {chosen}, compile off' in capsys.readouterr().out


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_bfloat16_learns_as_float32_does(train, objective):
    """The products alone are bfloat16, in training and validation; weights and their checkpoint are float32."""
    losses = {}
    for dtype in ('float32', 'bfloat16'):
        train.train('--model', 'composite', '--objective', objective, '--max_iters', 40, '--warmup_iters', 10,
                    '--learning_rate', 5e-3, '--eval_interval', 20, '--dtype', dtype, '--out_dir', dtype)
        losses[dtype] = [float(v) for v, in log(train.folder / dtype, 'val_loss') if v]
        saved = checkpoint(train.folder / dtype)
        assert all(x.dtype == torch.float32 for x in tensors(saved['model']) + tensors(saved['optimizer']))
    for a, b in zip(losses['float32'], losses['bfloat16'], strict=True):
        assert 0 < abs(a - b) < 0.03, losses


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_operations_are_those_of_the_scheme(objective):
    """By hand for a model without positions; a scheme adds its own products, and chunks make fewer than a matrix."""
    def count(name, T, **fields):
        module = common.load_model_file(name)
        config = module.Config(vocab_size=320, block_size=T, causal=objective == 'causal', **fields)
        run = make_run(T, objective=objective)
        run.config = config
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # as products, which torch can count
            return script.flops_per_token(run, module.Model(config))
    C, L, T = 128, 4, 256
    predicted = 1 if objective == 'causal' else round(0.15 * T) / T
    by_hand = 3 * (L * (2 * 12 * C * C + 2 * 2 * T * C) + predicted * 2 * 320 * C)
    assert count('nope', T) == pytest.approx(by_hand)
    assert count('composite', T, attention='dense') == pytest.approx(by_hand + 3 * L * 2 * C * 17)
    assert count('kernelized', 2048, attention='chunked') < 0.6 * count('nope', 2048)
    q = torch.empty(1, 1024, 12, 64, device='meta', dtype=torch.bfloat16)  # (B, T, nh, hs)
    flash = [torch.ops.aten._flash_attention_forward, q, q, q, None, None, 1024, 1024, 0.0, True, False]
    assert common.count_flops(functools.partial(*flash)) == 2 * 2 * 12 * 1024 ** 2 * 64


# -- learning ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('objective', ['causal', 'masked'])
@pytest.mark.parametrize('name', MODELS + BASELINES)
def test_loss_falls(train, name, objective, recwarn):
    """60 steps: well under the log(257) = 5.5 of a blank model, and no warning on the way."""
    train.train('--model', name, '--objective', objective, '--max_iters', 60, '--warmup_iters', 10,
                '--learning_rate', 5e-3, '--eval_interval', 30, '--eval_tokens', 20480)
    out = train.folder / 'out' / f'{name}-{objective}-code'
    losses = [float(v) for v, in log(out, 'val_loss') if v]
    assert len(losses) == 3 and 5.3 < losses[0] < 6 and losses[1] < losses[0] - 1 and losses[2] < 3.6, losses
    assert not recwarn.list
    assert (out / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    bits = float(log(out, 'bits_per_byte')[-1][0])
    assert abs(bits - losses[2] / math.log(2)) < 1e-4  # bytes: one token is one byte
    for part in ('left', 'tokens/s', f'python sample.py --out_dir out/{name}-{objective}-code'):
        assert part in train.out
    for part in ('did not learn', 'left of each mask', 'no checkpoint'):
        assert part not in train.out
    assert json.loads((out / 'config.json').read_text())['causal'] == (objective == 'causal')
    groups = checkpoint(out)['optimizer']['param_groups']
    assert [g['weight_decay'] for g in groups] == [0.1, 0.0] and [g['betas'] for g in groups] == [(0.9, 0.95)] * 2
    weights = [p for name, p in checkpoint(out)['model'].items() if not name.endswith('attn.w')]  # but random features
    assert len(groups[0]['params']) == sum(p.dim() >= 2 for p in weights), 'vectors do not decay'
    assert checkpoint(out, 'best')['step'] == 30 * losses.index(min(losses))


def test_gradients_are_clipped(train):
    """To 1e-12, under AdamW's eps, nothing moves but by weight decay."""
    words = '--model nope --max_iters 10 --warmup_iters 1 --learning_rate 1e-2 --weight_decay 0'.split()
    train.train(*words, '--grad_clip', 1e-12, '--out_dir', 'clipped')
    train.train(*words, '--grad_clip', 0, '--out_dir', 'free')
    fall = {}
    for name in ('clipped', 'free'):
        before, after = [float(v) for v, in log(train.folder / name, 'val_loss') if v]
        fall[name] = before - after
    assert abs(fall['clipped']) < 0.01 < 0.5 < fall['free'], fall


def test_another_micro_batch_goes_on_with_the_same_curve(train, monkeypatch):
    """Stopped halfway and resumed in smaller parts: weights up to rounding. Other processes: experiments/soak.py."""
    words = ['--model', 'composite', '--max_iters', 8, '--log_interval', 1]
    train.train(*words, '--out_dir', 'whole')
    with monkeypatch.context() as patch:
        patch.setattr(common, 'any_process', lambda flag, peers: flag or stops[-1]())
        steps = iter([False] * 8 + [True] * 2)
        stops = [lambda: next(steps)]
        train.train(*words, '--out_dir', 'parts', code=143)
    stopped = checkpoint(train.folder / 'parts')['step']
    train('train.py', '--resume', '--out_dir', 'parts', '--micro_batch_size', 2)
    whole, parts = [checkpoint(train.folder / name)['model'] for name in ('whole', 'parts')]
    assert 0 < stopped < 8 and equal(whole, parts, 2e-5) and not equal(whole, parts)


def test_accumulation_changes_nothing_but_rounding(train):
    for objective in ('causal', 'masked'):
        for n, micro in enumerate((8, 2)):
            train.train('--model', 'composite', '--objective', objective, '--max_iters', 5, '--log_interval', 1,
                        '--micro_batch_size', micro, '--out_dir', f'{objective}{n}')
        a, b = (train.folder / f'{objective}{n}' for n in (0, 1))
        assert equal(checkpoint(a)['model'], checkpoint(b)['model'], 2e-5)
        for x, y in zip(log(a, 'train_loss', 'grad_norm'), log(b, 'train_loss', 'grad_norm'), strict=True):
            assert all(p == q or abs(float(p) / float(q) - 1) < 1e-4 for p, q in zip(x, y)), (x, y)


@pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')
def test_two_compiled_processes_equal_one(train):
    """Compiled inside DDP: the same curve, and weights by their own names."""
    words = '--model nope --n_layer 1 --max_iters 3 --eval_interval 3 --log_interval 1'.split()
    train.train(*words, '--out_dir', 'one')
    words += ['--micro_batch_size', 2, '--compile', 'on', '--out_dir', 'two']
    train.process('torchrun', '--nproc_per_node=2', 'train.py', *train.words, *words)
    assert 'compile on' in train.out
    one, two = (checkpoint(train.folder / name)['model'] for name in ('one', 'two'))
    assert list(one) == list(two) and equal(one, two, 2e-5)


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_two_processes_equal_one(train, objective):
    words = f'--model composite --objective {objective} --max_iters 6 --eval_interval 3 --log_interval 1'.split()
    train.train(*words, '--out_dir', 'one')
    words += ['--micro_batch_size', 2, '--out_dir', 'two']
    train.process('torchrun', '--nproc_per_node=2', 'train.py', *train.words, *words)
    one, two = train.folder / 'one', train.folder / 'two'
    assert equal(checkpoint(one)['model'], checkpoint(two)['model'], 2e-5)
    columns = ('train_loss', 'val_loss', 'grad_norm')
    for x, y in zip(log(one, *columns), log(two, *columns), strict=True):
        assert all(a == b or abs(float(a) - float(b)) < 2e-4 for a, b in zip(x, y)), (x, y)
    assert train.out.count('step     6/6  val loss') == 1, 'one process speaks'
    alone = train('train.py', *train.words, '--eval_only', '--out_dir', 'two').out.splitlines()[-1]
    words = ['--eval_only', '--out_dir', 'two']
    together = train.process('torchrun', '--nproc_per_node=2', 'train.py', *train.words, *words).out
    assert alone.split(' perplexity')[0] in together


# -- stopping and going on --------------------------------------------------------------------------------------------

def wait_for(process, text):
    """Read the output of a process up to a line that holds `text`."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f'{text!r} never came: {process.stderr.read()[-2000:]}')


def test_killed_and_resumed_is_bit_for_bit_unbroken(train):
    """SIGKILL at an arbitrary moment, twice; dropout on; weights, optimizer and log equal those of an unbroken run."""
    words = '--model composite --max_iters 40 --dropout 0.1 --eval_interval 20 --checkpoint_interval 7 --log_interval 5'
    words = words.split()
    train.train(*words, '--out_dir', 'unbroken')
    for moment in ('step    10/40', 'step    25/40'):
        process = train.start_train(*words, '--out_dir', 'broken', '--resume')
        wait_for(process, moment)
        process.kill()
        process.communicate()
        assert checkpoint(train.folder / 'broken')['step'] < 40
    train('train.py', '--resume', '--out_dir', 'broken')
    a, b = (checkpoint(train.folder / n) for n in ('unbroken', 'broken'))
    assert a['step'] == b['step'] == 40 and a['best'] == b['best']
    assert equal(a['model'], b['model']) and equal(a['optimizer'], b['optimizer'])
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    columns = ('step', 'train_loss', 'val_loss', 'bits_per_byte', 'lr', 'grad_norm')
    assert log(train.folder / 'unbroken', *columns) == log(train.folder / 'broken', *columns)
    assert not list((train.folder / 'broken').glob('*.tmp'))


@posix
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(train, number):
    process = train.start_train('--model', 'nope', '--max_iters', 100000, '--out_dir', 'out/my run')
    wait_for(process, 'step    10/')
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and 'Traceback' not in err
    command = shlex.split(out.strip().splitlines()[-1].split('To go on: python ')[1])
    step = checkpoint(train.folder / 'out/my run')['step']
    assert step >= 10
    train(*command, '--max_iters', step + 3)
    assert checkpoint(train.folder / 'out/my run')['step'] == step + 3


@pytest.fixture
def sigterm():
    """A function that sends SIGTERM to this process, once."""
    left = [signal.SIGTERM]

    def send(*_, **__):
        if left:
            signal.raise_signal(left.pop())
    return send


def test_sigterm_while_data_is_prepared(train, monkeypatch, sigterm):
    """Exit 143, and nothing half-made."""
    monkeypatch.setattr(prepare_data, 'sha256', sigterm)  # all is written but meta.json
    train('train.py', '--model', 'nope', '--dataset', 'python', '--device', 'cpu', code=143)
    assert not list((train.folder / 'data').iterdir()) and not (train.folder / 'out').exists()


def test_sigterm_while_the_first_step_is_compiled(train, monkeypatch, sigterm):
    """The step is finished and saved."""
    monkeypatch.setattr(common, 'compile_lacks', lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda model, **_: model.register_forward_pre_hook(sigterm))
    train.train('--model', 'nope', '--max_iters', 50, '--compile', 'on', '--out_dir', 'x', code=143)
    assert 'To go on' in train.out and checkpoint(train.folder / 'x')['step'] == 1


def test_sigterm_while_the_picture_is_drawn(train, monkeypatch, sigterm):
    """All but the picture is there, nothing half of it; --resume draws it."""
    figure = pytest.importorskip('matplotlib.figure')
    with monkeypatch.context() as patch:
        def savefig(self, f, **_):
            f.write(b'half')
            sigterm()
        patch.setattr(figure.Figure, 'savefig', savefig)
        train.train('--model', 'nope', '--max_iters', 2, '--out_dir', 'x', code=143)
    files = set(common.FILES)
    assert {path.name for path in (train.folder / 'x').iterdir()} == files - {'loss.png'}
    train('train.py', '--resume', '--out_dir', 'x')
    assert {path.name for path in (train.folder / 'x').iterdir()} == files and not train.err


@posix
def test_signal_stops_all_processes(train):
    words = [*train.words, '--model', 'nope', '--max_iters', 100000, '--out_dir', 'x']
    process = train.start('torchrun', '--nproc_per_node=2', 'train.py', *words)
    wait_for(process, 'step    10/')
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert 'To go on' in out and checkpoint(train.folder / 'x')['step'] >= 10


@posix
def test_restart_by_torchrun(train):
    """A worker that dies is started again by torchrun --max-restarts and goes on from the checkpoint."""
    words = '--model nope --max_iters 300 --eval_interval 100 --checkpoint_interval 10 --resume --out_dir x'.split()
    process = train.start('torchrun', '--nproc_per_node=1', '--max-restarts=1', 'train.py', *train.words, *words)
    wait_for(process, 'step    50/')
    worker = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in worker:
        os.kill(int(pid), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'done' in out and checkpoint(train.folder / 'x')['step'] == 300
    steps = [int(s) for s, t in log(train.folder / 'x', 'step', 'train_loss') if t]
    assert steps == list(range(10, 301, 10))


def test_nan_keeps_the_last_good_checkpoint(train):
    train.train('--model', 'nope', '--learning_rate', 1e9, '--warmup_iters', 4, '--grad_clip', 0, '--max_iters', 50,
                '--checkpoint_interval', 1, code=1)
    one_line(train.err, 'step', '--learning_rate', 'train.py: ')
    kept = checkpoint(train.folder / 'out/nope-causal-code')
    assert all(t.isfinite().all() for t in tensors(kept['model']))
    assert str(kept['step'] + 1) in train.err.split(':')[1]


@pytest.fixture
def failing_validation(monkeypatch):
    """failing_validation(n): the n-th validation from now on fails, as a full memory would make it fail."""
    def plant(n):
        calls = iter([*[None] * (n - 1), OSError('no validation')])

        def fail_at_the_last(model):
            error = next(calls)
            if error:
                raise error
            return model.train(False)
        monkeypatch.setattr(torch.nn.Module, 'eval', fail_at_the_last)
    return plant


def test_checkpoint_is_written_before_validation(train, failing_validation):
    """A validation that fails loses no step."""
    for n, step in ((1, 0), (2, 4)):
        failing_validation(n)
        out = f'failed{n}'
        train.train('--model', 'nope', '--max_iters', 8, '--eval_interval', 4, '--out_dir', out, code=1)
        one_line(train.err, 'no validation')
        assert checkpoint(train.folder / out)['step'] == step


def test_overwrite_deletes_the_run_that_was_there(train, failing_validation):
    """Before the new run has a best checkpoint or a picture, the old ones are gone. Other files stay."""
    words = ['--model', 'nope', '--max_iters', 2, '--out_dir', 'x']
    train.train(*words)
    (train.folder / 'x/notes.txt').touch()
    assert {path.name for path in (train.folder / 'x').iterdir()} == {*common.FILES, 'notes.txt'}
    failing_validation(1)
    train.train(*words, '--overwrite', code=1)
    names = {path.name for path in (train.folder / 'x').iterdir()}
    assert names == {'config.json', 'log.csv', 'ckpt_last.pt', 'notes.txt'}
    assert checkpoint(train.folder / 'x')['step'] == 0 and not log(train.folder / 'x', 'step')


def test_full_disk_leaves_the_old_checkpoint(train, monkeypatch):
    """Whichever write fails after resuming: log.csv, config.json or the checkpoint."""
    train.train('--model', 'nope', '--max_iters', 2, '--out_dir', 'x')
    old = checkpoint(train.folder / 'x')
    for n in range(3):
        room = iter(range(n))  # so many writes still succeed

        def fsync(_):
            if next(room, None) is None:
                raise OSError(28, 'No space left on device')
        with monkeypatch.context() as patch:
            patch.setattr(os, 'fsync', fsync)
            train('train.py', '--resume', '--out_dir', 'x', '--max_iters', 4, code=1)
        one_line(train.err, 'train.py: ', 'No space left on device')
        found = checkpoint(train.folder / 'x')
        assert found['step'] == 2 and equal(found, old)
        assert {path.name for path in (train.folder / 'x').iterdir()} == set(common.FILES)

    def save(values, f):
        f.write(bytes(12345))
        if not isinstance(f, common.Size):
            raise RuntimeError('unexpected pos 64 vs 0')  # what torch.save says of a full disk
    monkeypatch.setattr(torch, 'save', save)
    train('train.py', '--resume', '--out_dir', 'x', '--max_iters', 4, code=1)
    one_line(train.err, 'ckpt_last.pt could not be written', '12,345 bytes', 'are free')


def test_the_size_of_a_checkpoint_that_does_not_fit_is_that_of_the_file(train):
    train.train('--model', 'nope', '--max_iters', 1, '--out_dir', 'x')
    path = train.folder / 'x/ckpt_last.pt'
    needed = common.Size()
    torch.save(checkpoint(train.folder / 'x'), needed)
    assert abs(needed.size / path.stat().st_size - 1) < 0.01


def test_second_signal_exits_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        for number in numbers:
            signals = common.catch_signals()
            signal.raise_signal(number)
            assert signals == [number] and 128 + number not in codes, 'the first one is left to the loop'
            signal.raise_signal(number)
            assert codes[-1] == 128 + number
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def test_resumed_run_has_the_present_weight_decay_and_betas(train):
    """The optimizer's running means and its step count go on."""
    train.train('--model', 'nope', '--max_iters', 2, '--out_dir', 'x')
    new = ['--max_iters', 3, '--weight_decay', 0.3, '--beta1', 0.8, '--beta2', 0.9]
    train('train.py', '--resume', '--out_dir', 'x', *new)
    optimizer = checkpoint(train.folder / 'x')['optimizer']
    assert [group['weight_decay'] for group in optimizer['param_groups']] == [0.3, 0.0]
    assert [group['betas'] for group in optimizer['param_groups']] == [(0.8, 0.9)] * 2
    assert {state['step'].item() for state in optimizer['state'].values()} == {3}


def test_runs_never_overwrite_each_other(train):
    short = ['--model', 'nope', '--max_iters', 1]
    for _ in range(3):
        train.train(*short)
    folders = sorted(p.name for p in (train.folder / 'out').iterdir())
    assert folders == ['nope-causal-code', 'nope-causal-code-2', 'nope-causal-code-3']
    train.train(*short, '--out_dir', 'out/nope-causal-code', code=2)
    one_line(train.err, '--resume', '--overwrite')
    train.train(*short, '--out_dir', 'out/nope-causal-code', '--overwrite', '--seed', 5)
    assert json.loads((train.folder / 'out/nope-causal-code/config.json').read_text())['seed'] == 5
    train.train('--model', 'nope', '--resume', '--max_iters', 2)  # the newest
    assert checkpoint(train.folder / 'out/nope-causal-code')['step'] == 2
    train.train('--model', 'nope', '--resume', '--n_layer', 3, code=2)
    assert 'cannot change n_layer: it is 2' in train.err
    assert checkpoint(train.folder / 'out/nope-causal-code')['step'] == 2


def test_a_finished_run_goes_on(train):
    """Extended with --max_iters: the validation at its old end stays in the log, and the best is the best of all."""
    train.train('--model', 'nope', '--max_iters', 25, '--eval_interval', 10, '--vocab_size', 512)
    out = train.folder / 'out/nope-causal-code'
    before = log(out, 'step', 'val_loss')
    train('train.py', '--resume', '--out_dir', out, '--max_iters', 40, '--learning_rate', 0)
    after = log(out, 'step', 'val_loss')
    assert [r for r in after if r[1]][:len([r for r in before if r[1]])] == [r for r in before if r[1]], (before, after)
    assert 'changed on resume: max_iters 25 -> 40' in train.out
    assert abs(checkpoint(out)['best'] - min(float(v) for _, v in after if v)) < 1e-4
    assert checkpoint(out, 'best')['step'] in (20, 25)
    train('train.py', '--resume', '--out_dir', out)  # nothing left to do is no error
    assert log(out, 'step', 'val_loss') == after


def test_a_torn_log_is_cut_to_whole_rows(train):
    """A full disk may leave half a row and an empty line."""
    train.train('--model', 'nope', '--max_iters', 20)
    path = train.folder / 'out/nope-causal-code/log.csv'
    rows = path.read_bytes()
    path.write_bytes(rows + b'\n20,5.1')
    train.train('--model', 'nope', '--max_iters', 30, '--resume')
    after = path.read_bytes()
    assert after.startswith(rows[:rows.rindex(b'20,')]) and b'20,5.1' not in after.splitlines() and b'\n\n' not in after
    assert [row.split(b',')[0] for row in after.splitlines()[-2:]] == [b'30', b'30']


def test_a_resume_that_dies_keeps_the_row_of_the_last_validation(train, failing_validation, monkeypatch):
    """Until it has validated again; then the new row stands in its place."""
    train.train('--model', 'nope', '--max_iters', 4, '--out_dir', 'x', '--log_interval', 2)
    path = train.folder / 'x/log.csv'
    before = path.read_bytes()
    with monkeypatch.context():
        failing_validation(1)
        train('train.py', '--resume', '--out_dir', 'x', '--max_iters', 6, code=1)
    assert path.read_bytes() == before
    monkeypatch.undo()
    train('train.py', '--resume', '--out_dir', 'x', '--max_iters', 6)
    assert [step for step, loss in log(train.folder / 'x', 'step', 'val_loss') if loss] == ['0', '4', '6']


def test_several_runs_at_once_take_folders_of_their_own(train):
    runs = [train.start_train('--model', 'nope', '--max_iters', 1, '--seed', seed) for seed in (1, 2, 3)]
    assert all(p.communicate(timeout=120) and p.returncode == 0 for p in runs)
    assert sorted(json.loads(p.read_text())['seed'] for p in (train.folder / 'out').glob('*/config.json')) == [1, 2, 3]


def test_config_file_repeats_a_run(train):
    train.train('--model', 'composite', '--kernel_size', 5, '--max_iters', 3, '--seed', 7)
    first = train.folder / 'out/composite-causal-code'
    train('train.py', '--config', first / 'config.json')
    again = train.folder / 'out/composite-causal-code-2'
    assert (first / 'config.json').read_text() == (again / 'config.json').read_text()
    assert equal(checkpoint(first)['model'], checkpoint(again)['model'])
    train('train.py', '--config', first / 'config.json', '--objective', 'masked', '--max_iters', 1)
    masked = json.loads((train.folder / 'out/composite-masked-code/config.json').read_text())
    assert masked['causal'] is False and masked['kernel_size'] == 5 and masked['max_iters'] == 1  # flags win


def test_who_decides_a_setting(monkeypatch, tmp_path, capsys):
    """A file without an objective may say causal; a run that goes on keeps its own settings, and says so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c.json').write_text('{"causal": true, "learning_rate": 1e-4}')
    settings, _, config, _ = script.resolve('--objective masked --config c.json'.split())
    assert settings.learning_rate == 1e-4 and config.causal and not capsys.readouterr().out
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x/ckpt_last.pt').touch()
    (tmp_path / 'x/config.json').write_text('{"model": "nope", "objective": "causal", "learning_rate": 5e-4}')
    for more, said in (('', False), ('--config c.json', True), ('--preset gpt2', True), ('--preset tiny', True)):
        settings, _, config, _ = script.resolve(f'--model nope --resume --out_dir x {more}'.split())
        assert settings.learning_rate == 5e-4 and settings.batch_size == 24 and config.n_layer == 4
        assert ('replaces --config and --preset' in capsys.readouterr().out) == said


def test_help_shows_what_data_and_objective_decide(capsys):
    with pytest.raises(SystemExit):
        script.resolve(['--model', 'nope', '--objective', 'masked', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert re.search(r'--causal[^(]*\([^(]*\) \(default False\)', text)
    assert re.search(r'--vocab_size[^(]*\(default 0\)', text[text.index('options:'):])


@pytest.fixture
def mine(train, monkeypatch):
    """mine(old, new) makes model_mine.py, which is model_nope.py with one change, beside train.py or in baselines/."""
    monkeypatch.setattr(common, '__file__', str(train.folder / 'common.py'))

    def write(old, new, folder='.'):
        (train.folder / folder).mkdir(exist_ok=True)
        source = (REPO / 'model_nope.py').read_text()
        assert old in source
        (train.folder / folder / 'model_mine.py').write_text(source.replace(old, new))
    return write


def test_a_scheme_of_ones_own_is_one_file(train, mine):
    """README, "a scheme of your own": copy a model file, and train.py runs it. Here beside copies, in a process."""
    mine('init_std: float = 0.02', 'init_std: float = 0.03')
    for name in ('train.py', 'common.py', 'prepare_data.py'):
        shutil.copy(REPO / name, train.folder)
    train.process(train.folder / 'train.py', *train.words, '--model', 'mine', '--max_iters', 1)
    assert json.loads((train.folder / 'out/mine-causal-code/config.json').read_text())['init_std'] == 0.03


def test_baselines_are_found_and_named(train, mine):
    mine('init_std: float = 0.02', 'init_std: float = 0.03', 'baselines')
    (train.folder / 'model_yours.py').touch()
    train('train.py', *train.words, '--model', 'mine', '--max_iters', 1)
    assert json.loads((train.folder / 'out/mine-causal-code/config.json').read_text())['init_std'] == 0.03
    train('train.py', *train.words, '--model', 'nonsense', code=2)
    one_line(train.err, '--model may be yours, mine')


# -- what is easily overlooked, and evaluating ------------------------------------------------------------------------

def test_config_of_another_scheme(train):
    """The fields that both schemes have carry over, the others are dropped and named; flags win."""
    values = dict(model='composite', kernel_size=5, fixed=False, attention='fast', n_layer=1, seed=7, max_iters=1)
    (train.folder / 'c.json').write_text(json.dumps(values))
    for model, dropped in (('nope', 'kernel_size, fixed, attention'), ('kernelized', 'kernel_size, fixed, attention'),
                           ('conv', 'fixed')):
        words = [*train.words[:4], '--config', 'c.json', '--model', model]
        train('train.py', *words, '--device', 'cpu')
        note = next(line for line in train.out.splitlines() if 'dropped' in line)
        assert 'model composite' in note and f'model {model} has no {dropped}: dropped' in note
        config = json.loads((train.folder / f'out/{model}-causal-code/config.json').read_text())
        assert config['n_layer'] == 1 and config['seed'] == 7 and config.get('kernel_size', 5) == 5
    train('train.py', *words, '--fixed', code=2)
    one_line(train.err, 'unrecognized arguments: --fixed')
    (train.folder / 'c.json').write_text(json.dumps(dict(values, nonsense=1)))
    train('train.py', *words, code=2)
    one_line(train.err, 'unrecognized arguments: --nonsense=1')


def test_nothing_to_resume_is_said_first_and_last(train):
    for words in (['--out_dir', 'x'], []):
        train.train('--model', 'nope', '--max_iters', 1, '--resume', *words)
        lines = train.out.splitlines()
        for line in (lines[0], lines[-1]):
            assert '--resume found no checkpoint' in line and 'step 0' in line, line
        train.train('--model', 'nope', '--max_iters', 2, '--resume', *words)
        assert 'found no checkpoint' not in train.out


def test_resume_of_a_run_without_a_checkpoint_has_its_settings(train):
    """A run that was killed before its first checkpoint starts again as it was."""
    train.train('--model', 'composite', '--kernel_size', 5, '--max_iters', 1, '--out_dir', 'x')
    for name in ('ckpt_last.pt', 'ckpt_best.pt'):
        (train.folder / 'x' / name).unlink()
    train('train.py', '--resume', '--out_dir', 'x')
    config = json.loads((train.folder / 'x/config.json').read_text())
    assert config['kernel_size'] == 5 and config['n_embd'] == 32 and checkpoint(train.folder / 'x')['step'] == 1


def test_a_diverged_run_is_called_so(train):
    """Its loss is finite, and far above that of a uniform guess."""
    train.train('--model', 'nope', '--max_iters', 20, '--learning_rate', 30, '--warmup_iters', 1)
    last = train.out.splitlines()[-1]
    for part in ('best val loss', 'did not learn', '5.5452', '--learning_rate', '--warmup_iters'):
        assert part in last, last
    assert 'sample.py' not in last


def test_evaluate_only(train):
    """The loss of the best checkpoint, else of the last, on its own or another data set; nothing is written."""
    for objective in ('causal', 'masked'):
        words = f'--model composite --objective {objective} --max_iters 12 --warmup_iters 12 --eval_interval 4'.split()
        train.train(*words, '--learning_rate', 0.5, '--kernel_size', 5, '--causal')  # soon too high: the loss rises
        assert ('left of each mask' in train.out) == (objective == 'masked')
        out = train.folder / f'out/composite-{objective}-code'
        files = {path: path.read_bytes() for path in out.iterdir()}
        rows = [row for row in log(out, 'step', 'val_loss', 'bits_per_byte') if row[1]]
        step, loss, bits = min(rows[1:], key=lambda row: float(row[1]))
        assert int(step) < 12, 'the best checkpoint is not the last one'
        by_name = train.train('--model', 'composite', '--objective', objective, '--eval_only', '--resume').out
        by_folder = train('train.py', '--eval_only', '--out_dir', out.relative_to(train.folder)).out
        line = by_folder.splitlines()[-1]
        assert line == by_name.splitlines()[-1] and len(by_folder.splitlines()) == 2, 'the device, and the result'
        for part in (f'step {step}', 'code', f'val loss {float(loss):.4f} nats per',
                     f'{float(bits):.4f} bits per byte', f'perplexity {math.exp(float(loss)):.2f}'[:-1]):
            assert part in line, line
        assert files == {path: path.read_bytes() for path in out.iterdir()}
    (out / 'ckpt_best.pt').unlink()
    train('train.py', '--eval_only', '--out_dir', out)
    assert 'step 12' in train.out

    (train.folder / 'text.txt').write_text('never seen before, ' * 1000)
    prepare_data.prepare('other', path=train.folder / 'text.txt', data_dir=train.folder / 'data')
    train('train.py', '--eval_only', '--out_dir', out, '--data_dir', 'data', '--dataset', 'other')
    assert 'other: val loss' in train.out and float(train.out.split('val loss ')[1].split()[0]) > float(loss)
    meta = train.folder / 'data/other/meta.json'
    meta.write_text(json.dumps(dict(json.loads(meta.read_text()), tokenizer='letters')))
    train('train.py', '--eval_only', '--out_dir', out, '--data_dir', 'data', '--dataset', 'other', code=2)
    one_line(train.err, 'other has the tokenizer letters', 'has another one')
    train('train.py', '--eval_only', '--out_dir', out, '--objective', 'causal', code=2)
    one_line(train.err, 'cannot change objective: it is masked')
    train('train.py', '--eval_only', '--out_dir', out, '--n_layer', 3, code=2)
    one_line(train.err, 'cannot change n_layer: it is 2')
    train('train.py', '--eval_only', '--out_dir', out, '--model', 'nope', code=2)
    one_line(train.err, 'cannot change model: it is composite')


def test_without_matplotlib(train):
    (train.folder / 'matplotlib.py').write_text('raise ImportError')
    (train.folder / 'sitecustomize.py').write_text(
        'import importlib.util as u\nfind = u.find_spec\n'
        'u.find_spec = lambda n, *a: None if n == "matplotlib" else find(n, *a)\n')
    train.process('train.py', *train.words, '--model', 'nope', '--max_iters', 1, PYTHONPATH=str(train.folder))
    assert 'matplotlib is not installed' in train.out and not (train.folder / 'out/nope-causal-code/loss.png').exists()


# -- wrong input ------------------------------------------------------------------------------------------------------

REFUSED = {
    '--model nonsense': ['there is no model_nonsense.py', 'composite, ', 'nope'],
    '--preset huge': ["'huge'", 'tiny', 'gpt2'],
    '--objective both': ["'both'", 'causal', 'masked'],
    '--dtype float8': ["'float8'", 'bfloat16'],
    '--max_iters many': ["'many'", 'int'],
    '--learning_rate -1': ['--learning_rate', 'from 0', '-1'],
    '--learning_rate nan': ['--learning_rate', 'nan'],
    '--learning_rate inf': ['--learning_rate', 'inf'],
    '--batch_size 0': ['--batch_size', 'from 1', '0'],
    '--block_size 0': ['--block_size', 'from 1', '0'],
    '--dropout 1.0': ['--dropout', 'from 0', '1.0'],
    '--mask_prob 0': ['--mask_prob', '0'],
    '--seed -3': ['--seed', '-3'],
    '--batch_size 10 --micro_batch_size 4': ['--micro_batch_size', '10', '4'],
    '--no-causal': ['--objective causal needs --causal'],
    '--config missing.json': ['missing.json', 'No such file'],
    '--learning-rate 1': ['unrecognized arguments: --learning-rate 1', '--help'],
    '--overwrite': ['--overwrite needs --out_dir'],
    '--overwrite --resume --out_dir x': ['excludes --resume'],
    '--eval_only': ['--eval_only found no checkpoint', '--out_dir'],
    '--eval_only --resume': ['no checkpoint', 'out/composite-causal-python', '--out_dir'],
    '--eval_only --out_dir nowhere': ['no checkpoint in nowhere'],
    '--eval_only --out_dir nowhere --overwrite': ['excludes', '--eval_only'],
    '--model conv --mixer sum': ["'sum'", 'lightweight'],
    '--nonsense': ['--nonsense', '--help'],
}


@pytest.mark.parametrize('words', REFUSED)
def test_refused_at_once(words, capsys, monkeypatch, tmp_path):
    """One line that says what is wrong and what is allowed, exit 2."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.resolve(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2
    one_line(err, *REFUSED[words])
    assert not list(tmp_path.iterdir()), 'nothing was made'


@pytest.mark.parametrize('text, parts', {
    '{"n_layers": 2}': ['unrecognized', '--n_layers=2'],
    '{"model": "nope", "kernel_size": 5}': ['unrecognized', '--kernel_size=5'],
    '{"n_layer": 2.5}': ['--n_layer', 'invalid int', '2.5'],
    '{"n_layer": true}': ['--n_layer', 'expected'],
    '{"bias": 1}': ['--bias', "'1'"],
    '{"objective": "both"}': ["'both'", 'causal'],
    '[1]': ['JSON object'],
    '{': ['cannot be read'],
    '{"model": "none"}': ['model_none.py'],
    '{"overwrite": true, "out_dir": "x"}': ['fields of Settings', "not 'overwrite', 'out_dir'"],
    '{"out_dir=x": true}': ["not 'out_dir=x'"],
}.items())
def test_refused_config_files(text, parts, capsys, tmp_path):
    (tmp_path / 'c.json').write_text(text)
    with pytest.raises(SystemExit) as stop:
        script.resolve(['--config', str(tmp_path / 'c.json')])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    one_line(err, *parts)


@pytest.mark.parametrize('words, parts', [
    ('--n_head 3', ['multiple of n_head', '32 with 3']),
    ('--model composite --kernel_size 4', ['kernel_size must be odd', '4']),
    ('--model conv --mixer lightweight --queries_keys', ['queries_keys', 'mixer lightweight']),
    ('--dataset nothere', ["'nothere'", 'python, shakespeare', '--path']),
    ('--block_size 2000000', ['--block_size', 'under']),
    ('--vocab_size 100', ['--vocab_size', '257']),
    ('--device cuda', ['--device cuda', 'auto']),
    ('--device tpu9', ['--device tpu9']),
    ('--device meta', ['--device meta', 'cpu']),
    ('--dataset ../x', ['--dataset', 'letters', "'../x'"]),
    ('--out_dir file', ['--out_dir file', 'folder']),
])
def test_refused_by_the_real_command(train, words, parts):
    (train.folder / 'file').touch()
    if words == '--device cuda' and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    train.train('--max_iters', 1, *words.split(), code=2)
    one_line(train.err, *parts)
    assert not (train.folder / 'out').exists(), 'nothing was made'


def test_refused_checkpoint(train):
    """Damaged, not ours, of another model: one line, and what is there stays."""
    train.train('--model', 'nope', '--max_iters', 1, '--out_dir', 'x')
    last = train.folder / 'x/ckpt_last.pt'
    good, config = last.read_bytes(), (train.folder / 'x/config.json').read_bytes()
    train('train.py', '--resume', '--out_dir', 'x', '--model', 'composite', code=2)
    one_line(train.err, 'cannot change model: it is nope')
    for bad in (good[:5000], b'', None, {'a': 1}, torch.zeros(3)):
        last.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, last)
        before = last.read_bytes()
        train('train.py', '--resume', '--out_dir', 'x', code=2)
        one_line(train.err, 'ckpt_last.pt')
        assert last.read_bytes() == before and (train.folder / 'x/config.json').read_bytes() == config
    checkpoint = torch.load(io.BytesIO(good), weights_only=True)
    checkpoint['model'].pop('ln_f.weight')
    torch.save(checkpoint, last)
    train('train.py', '--resume', '--out_dir', 'x', code=2)
    one_line(train.err, 'does not fit model_nope.py')


@pytest.mark.parametrize('damage, part', {
    'train.bin': 'No such file', 'val.bin': 'No such file', 'meta.json': 'needs tokenizer',
    'half': 'train.bin: ValueError it has',
    'id': 'val.bin: ValueError it holds the id 256, the vocabulary ends at 255',
    'checksum': 'train.bin: ValueError its checksum is not the one',
}.items())
def test_refused_data(train, damage, part):
    folder = train.folder / 'data/code'
    shutil.copytree(train.words[1] / 'code', folder)
    if damage == 'half':
        (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-1000])
    elif damage == 'meta.json':
        (folder / 'meta.json').write_text('{}')
    elif damage in ('id', 'checksum'):
        name, place, value = ('val', -7, 256) if damage == 'id' else ('train', 0, 0)
        ids = np.memmap(folder / f'{name}.bin', np.uint16, 'r+')
        ids[place] = value
        ids.flush()
    else:
        (folder / damage).unlink()
    train.train('--data_dir', 'data', '--max_iters', 1, code=2)
    one_line(train.err, 'data/code is damaged', 'prepare it again', part)


@pytest.mark.parametrize('field, part', [
    ('seed: int = 1', 'Literal'), ('width: list = None', 'Literal'), ('width: float | None = None', 'Literal'),
    ('width = 3', 'needs a type and a comment'), ('width = None', 'needs a type and a comment'),
])
def test_refused_fields_of_ones_own_scheme(train, mine, field, part):
    mine('    init_std: float = 0.02', f'    {field}\n    init_std: float = 0.02')
    train('train.py', *train.words, '--model', 'mine', '--width', 4, code=2)
    one_line(train.err, field.split(':')[0].split(' ')[0], part, 'model_mine.py')


def test_fields_of_ones_own_scheme_may_be_negative(train, mine):
    mine('    init_std: float = 0.02', '    shift: float = -1.5  # moves all\n    init_std: float = 0.02')
    train('train.py', *train.words, '--model', 'mine', '--max_iters', 1, '--shift', -2.5)
    assert json.loads((train.folder / 'out/mine-causal-code/config.json').read_text())['shift'] == -2.5


def test_what_ones_own_scheme_refuses_has_a_place(train, mine):
    mine('        self.n_head = config.n_head\n', '        self.n_head = int("two")\n')
    train('train.py', *train.words, '--model', 'mine', code=2)
    one_line(train.err, 'invalid literal', 'model_mine.py, line ')


# -- on a GPU ---------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('name', MODELS)
def test_on_a_gpu(train, name):
    for objective in ('causal', 'masked'):
        words = ['--device', 'cuda', '--dtype', 'auto']
        train.train('--model', name, '--objective', objective, '--max_iters', 20, *words)
        assert 'bfloat16 (--dtype float32 for float32), compile on' in train.out
        losses = [float(v) for v, in log(train.folder / 'out' / f'{name}-{objective}-code', 'val_loss') if v]
        assert losses[-1] < losses[0]
