"""train.py as users run it: batches, the log, stopping and resuming, several processes, wrong input."""
import csv
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import prepare_data
import train as script
from conftest import BASELINES, MODELS, REPO, SIGNALS, TINY, Run

posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has neither these signals nor this lock')


def log(folder, *columns):
    """The values of these columns in the rows that have all of them."""
    with open(folder / 'log.csv', newline='') as f:
        rows = [tuple(row[c] for c in columns) for row in csv.DictReader(f)]
    return [row for row in rows if all(row)]


def checkpoint(folder, which='last'):
    return torch.load(folder / f'ckpt_{which}.pt', weights_only=True)


def one_line(text, part):
    assert len(text.splitlines()) == 1 and part in text, f'not one line with {part!r}: {text}'


DATA = np.random.default_rng(0).integers(256, size=5000).astype(np.uint16)


def make_run(T, data=DATA, **settings):
    """What train.py's functions need, with sequences of T tokens."""
    return script.Run(script.Settings(**settings), SimpleNamespace(block_size=T), train=data, val=data,
                      meta=dict(vocab_size=256, mask_id=256, val_tokens=1000, val_bytes=2000))


def test_causal_targets_are_the_next_tokens():
    idx, targets, masked_positions = script.train_batch(make_run(40, np.arange(43, dtype=np.uint16)), 3, range(200))
    assert (targets == idx + 1).all() and (idx.diff() == 1).all() and masked_positions is None
    assert set(idx[:, 0].tolist()) == {0, 1, 2}, 'every start that leaves T + 1 tokens, and no other'


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_batches_depend_on_seed_step_and_row_only(objective):
    run = make_run(40, objective=objective)
    whole = script.train_batch(run, 7, range(12))
    parts = [script.train_batch(run, 7, range(i, i + 3)) for i in (0, 3, 6, 9)]  # micro batches, or processes
    assert all(a is None or torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts)))
    for other in (script.train_batch(run, 8, range(12)),
                  script.train_batch(make_run(40, objective=objective, seed=2), 7, range(12))):
        assert (other[0] != whole[0]).float().mean() > 0.5
    assert len(whole[0].unique(dim=0)) == 12


def test_masked_batch():
    run = make_run(64, objective='masked')
    plain = script.train_batch(make_run(64), 3, range(400))[0].numpy()
    idx, targets, positions = [x.numpy() for x in script.train_batch(run, 3, range(400))]
    assert positions.shape == (400, round(0.15 * 64)) and (np.diff(positions, axis=1) > 0).all()
    assert (targets == np.take_along_axis(plain, positions, 1)).all(), 'the target is the hidden token'
    untouched = np.ones_like(idx, bool)
    np.put_along_axis(untouched, positions, False, 1)
    assert (idx[untouched] == plain[untouched]).all()
    shown = np.take_along_axis(idx, positions, 1)
    shares = [(shown == 256).mean(), (shown == targets).mean()]
    assert abs(shares[0] - 0.8) < 0.03 and abs(shares[1] - 0.1) < 0.03, shares  # 4000 places: standard error 0.006
    assert np.bincount(positions.ravel(), minlength=64).min() > 20, 'every position is predicted sometimes'
    noise = shown[(shown != targets) & (shown != 256)]
    assert len(np.unique(noise)) > 150 and noise.max() < 256, 'random tokens come from all ordinary ids'
    assert script.train_batch(make_run(3, objective='masked'), 0, range(2))[1].shape == (2, 1), 'at least one'


def test_validation_sequences_are_fixed_spread_and_disjoint():
    for objective in ('causal', 'masked'):
        first, second = [script.val_batch(make_run(64, objective=objective, seed=n), range(10), 10) for n in (1, 2)]
        assert all(a is None or torch.equal(a, b) for a, b in zip(first, second))
    run = make_run(64, np.arange(5000, dtype=np.uint16))
    run.train = DATA
    idx, targets, _ = script.val_batch(run, range(78), 78)
    assert len(idx.unique()) == idx.numel() and idx[0, 0] == 0 and targets.max() == 4999


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_evaluate(objective):
    """The mean over all predictions, without dropout, whatever the micro batch; at least one sequence."""
    module = script.load_model_file('nope')
    torch.manual_seed(0)
    model = module.Model(module.Config(vocab_size=257, causal=objective == 'causal', dropout=0.5, n_layer=1, n_embd=32))

    def by_hand(run, n):
        idx, targets, positions = script.val_batch(run, range(n), n)
        logits = model.eval()(idx, where=positions)[0]
        model.train()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    for eval_tokens, n in ((1, 1), (127, 1), (128, 2), (1000, 15), (10 ** 6, 78)):
        for micro in (1, 4, 7, 100):
            run = make_run(64, objective=objective, eval_tokens=eval_tokens, batch_size=28, micro_batch_size=micro)
            assert abs(script.evaluate(run, model) - by_hand(run, n)) < 2e-6 and model.training, (n, micro)


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_micro_batches_equal_one_batch(objective):
    """Loss, gradient norm and weights after a step are those of the whole batch; matrices decay, vectors do not."""
    module = script.load_model_file('nope')
    config = module.Config(vocab_size=257, causal=objective == 'causal', block_size=32, n_layer=1, bias=True)
    found = []
    for micro, clip in ((0, 0.01), (3, 0.01), (3, 0.0)):
        run = make_run(32, objective=objective, batch_size=12, micro_batch_size=micro, grad_clip=clip, beta1=0.8)
        run.config = config
        model, ddp, optimizer = script.build(run, module, False)
        idx, targets, positions = script.train_batch(run, 5, range(12))
        loss = model(idx, targets, where=positions)[1]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()
        batches = script.micro_batches(run, 5)
        assert [len(idx) for idx, *_ in batches] == ([3] * 4 if micro else [12])
        total, norm = script.train_step(run, ddp, optimizer, 5, batches)
        assert abs(total - loss) < 1e-5 and abs(norm / gradient - 1) < 1e-4
        found.append(model.state_dict())
        moments = torch.cat([state['exp_avg'].flatten() for state in optimizer.state.values()]).norm()
        assert abs(moments / ((clip or gradient) * (1 - 0.8)) - 1) < 1e-4, 'clipped, except with 0'
        for group, decay, dimensions in zip(optimizer.param_groups, (0.1, 0.0), (2, 1), strict=True):
            assert (group['lr'], group['weight_decay'], group['betas']) == (6e-3 * 6 / 100, decay, (0.8, 0.95))
            assert {p.dim() for p in group['params']} == {dimensions}
    assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_weights_and_dropout_depend_on_the_seed(monkeypatch):
    """Dropout depends on the step and the process, too."""
    module, losses = script.load_model_file('nope'), []
    batches = script.micro_batches(make_run(32, batch_size=4), 0)
    for first, seed, step, rank in ((1, 1, 3, 0), (1, 1, 3, 0), (1, 2, 3, 0), (1, 1, 4, 0), (1, 1, 3, 1), (2, 1, 3, 0)):
        run = make_run(32, seed=first)  # decides the weights
        run.config = module.Config(vocab_size=257, block_size=32, n_layer=1, dropout=0.5)
        model, ddp, optimizer = script.build(run, module, False)
        run.settings.seed = seed
        monkeypatch.setattr(script, 'RANK', rank)
        losses.append(script.train_step(run, ddp, optimizer, step, batches)[0].item())
    assert losses[0] == losses[1] and len(set(losses)) == 5


@pytest.mark.parametrize('max_iters, stop_at, code, saved', [
    (0, None, 0, 'last0 best0 last0'), (10, 5, 143, 'last0 last3 last4 best4 last5'),
    (10, None, 0, 'last0 last3 last4 best4 last6 last8 last9 last10 last10')])
def test_the_loop(monkeypatch, tmp_path, capsys, max_iters, stop_at, code, saved):
    """When it saves; neither the first step nor a validation is timed. A signal to the other process stops both."""
    clock, files = [0.0], []

    def takes(seconds, result):
        clock[0] += seconds
        return result
    for name, new in dict(
            WORLD=2, time=SimpleNamespace(time=lambda: clock[0]), handle_signals=lambda signals: None,
            save=lambda run, model, optimizer, name: files.append(f'{name[5:9]}{run.step}'),
            evaluate=lambda run, model: takes(100, 3.0),
            train_step=lambda run, ddp, optimizer, step, batches: takes(2 if step else 50, (2.0, 1.0)),
            dist=SimpleNamespace(all_reduce=lambda x: x.mul_(2).add_(torch.eye(3)[2] * (run.step == stop_at)))).items():
        monkeypatch.setattr(script, name, new)
    run = make_run(4, max_iters=max_iters, eval_interval=4, checkpoint_interval=3, log_interval=2, batch_size=6)
    run.out = tmp_path
    assert script.training_loop(run, None, None, None) == code and ' '.join(files) == saved
    rows = [row for row in run.log if 'ms' in row]
    assert all((row['ms'], row['tokens_per_s']) == ('2000', '12') for row in rows)
    assert not rows or 'norm 1.00  2000.0 ms  12 tokens/s  0:00:16 left' in capsys.readouterr().out
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda figure, *_, **__: files.append(figure.axes[0].lines))
    script.plot(run)
    assert [line.get_ydata().tolist() for line in files[-1]] == [[2] * len(rows), [3] * (len(run.log) - len(rows))]


def test_a_signal_that_nohup_ignores_is_ignored(monkeypatch):
    taken = []
    monkeypatch.setattr(signal, 'getsignal', {signal.SIGINT: signal.SIG_IGN}.get)
    monkeypatch.setattr(signal, 'signal', lambda number, _: taken.append(number))
    script.handle_signals()
    assert taken == SIGNALS[1:]


def test_schedule():
    s = script.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    lr = [script.lr_at(i, s) for i in range(120)]
    assert [lr[i] for i in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert abs(lr[60] - 0.55) < 1e-9 and abs(lr[110] - 0.1) < 1e-9 and lr[119] == lr[110]
    assert all(a >= b for a, b in zip(lr[10:], lr[11:]))


def test_dtype_of_a_cpu(monkeypatch):
    """auto: bfloat16 if the CPU multiplies it; otherwise what is asked for."""
    for able, dtype, chosen in (('avx512_bf16', 'auto', 'bfloat16'), ('amx_bf16', 'auto', 'bfloat16'),
                                ('bf16', 'auto', 'float32'), ('amx_bf16', 'float32', 'float32'),
                                ('bf16', 'bfloat16', 'bfloat16')):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {able: True})
        device, found, compiled = script.choose_device(script.Settings(device='cpu', dtype=dtype))
        assert (device.type, found, compiled) == ('cpu', getattr(torch, chosen), False)
    assert script.choose_device(script.Settings(device='cpu', compile='on'))[2]


@pytest.mark.parametrize('objective', ['causal', 'masked'])
@pytest.mark.parametrize('name', MODELS + BASELINES)
def test_loss_falls(trained, name, objective):
    run = trained(name, objective)
    losses = [float(v) for v, in log(run.out_dir, 'val_loss')]
    assert len(losses) == 3 and 5.3 < losses[0] < 6 and losses[1] < losses[0] - 1 and losses[2] < 3.6, losses
    assert json.loads((run.out_dir / 'config.json').read_text())['causal'] == (objective == 'causal')
    assert (run.out_dir / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    assert f'Now try: python sample.py --out_dir out/{name}-{objective}-code' in run.out.splitlines()[-1]


def test_the_default_run_has_a_known_loss(run):
    """On shakespeare.txt in float32 with one thread: the mean training loss of steps 11 to 20."""
    run('train.py', *'--device cpu --dtype float32 --max_iters 20 --eval_interval 100 --eval_tokens 1024'.split())
    assert abs(float(log(run.folder / 'out/composite-causal-shakespeare', 'train_loss')[-1][0]) - 4.13443) < 1e-3


WORDS = ('--model composite --max_iters 25 --warmup_iters 5 --dropout 0.1 --eval_interval 10 --checkpoint_interval 7 '
         '--learning_rate 2e-2 --data_dir data2').split()


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory, data_dir):
    """A run of 25 steps with a line every 10 steps (out) and the same with a line every step (every). Its validation
    data claims two bytes per token."""
    run = Run(tmp_path_factory.mktemp('unbroken'))
    shutil.copytree(data_dir, run.folder / 'data2')
    path = run.folder / 'data2/code/meta.json'
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(dict(meta, val_bytes=2 * meta['val_tokens'])))
    run.words = ['--dataset', 'code', *TINY, *WORDS]
    run('train.py', *run.words, '--out_dir', 'every', '--log_interval', 1)
    run('train.py', *run.words, '--out_dir', 'out')
    run.every, run.out_dir = run.folder / 'every', run.folder / 'out'
    return run


def test_what_the_log_says(unbroken):
    """train_loss: mean since the last line. lr: of the step just done. bits_per_byte: per byte, not per token."""
    lines = [line for line in unbroken.out.splitlines() if line.startswith('step ')]
    assert not lines[0].endswith('(best)') and lines[2].endswith('(best)'), 'an untrained model is not the best'
    assert len(lines) == 2 + 4 and re.fullmatch(r'step +10/25  loss \S+  lr \S+  norm \S+  \S+ ms  \S+ tokens/s  '
                                                r'0:00:\d\d left', lines[1])
    every = [float(loss) for loss, in log(unbroken.every, 'train_loss')]
    assert len(every) == 25 and [step for step, _ in log(unbroken.out_dir, 'step', 'train_loss')] == ['10', '20']
    settings = script.Settings(**checkpoint(unbroken.out_dir)['settings'])
    for step, loss, lr in np.array(log(unbroken.out_dir, 'step', 'train_loss', 'lr'), float):
        assert abs(loss - np.mean(every[int(step) - 10:int(step)])) < 2e-5
        assert lr == pytest.approx(script.lr_at(step - 1, settings), rel=1e-5)
    rows = np.array(log(unbroken.out_dir, 'step', 'val_loss', 'bits_per_byte'), float)
    assert rows[:, 0].tolist() == [0, 10, 20, 25] and np.allclose(rows[:, 2], rows[:, 1] / math.log(2) / 2, rtol=1e-5)
    ms, speed = np.array(log(unbroken.out_dir, 'ms', 'tokens_per_s'), float).T
    assert np.allclose(ms * speed, 8 * 32 * 1000, rtol=1e-4)
    assert script.describe(make_run(64), math.log(256 ** 2)).endswith(' 8.0000 bits per byte, perplexity 65536.00')
    assert script.describe(make_run(64), 1e4).startswith('10000.0000 nats'), 'too large for exp'


def test_the_best_checkpoint_holds_the_best_loss_and_its_step(unbroken):
    rows = [(float(loss), int(step)) for step, loss in log(unbroken.out_dir, 'step', 'val_loss')]
    loss, step = min(rows[1:])
    best = checkpoint(unbroken.out_dir, 'best')
    assert best['step'] == step and best['best'] == pytest.approx(loss, rel=1e-5)
    unbroken('train.py', '--eval_only', '--out_dir', 'out')
    assert f'out, step {step}, code: val loss {best["best"]:.4f} nats per token' in unbroken.out
    assert len(unbroken.out.splitlines()) == 2, 'the device, and the result'


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'{text!r} never came: {process.stderr.read()[-2000:]}')


def test_killed_and_resumed_is_bit_identical(unbroken):
    """SIGKILL, with dropout; weights, optimizer and log equal those of an uninterrupted run."""
    process = unbroken.start('train.py', *unbroken.words, '--out_dir', 'broken')
    wait_for(process, 'step    20/25  val loss')
    process.kill()
    process.communicate(timeout=60)
    broken = unbroken.folder / 'broken'
    assert checkpoint(broken)['step'] < 25
    unbroken('train.py', '--resume', '--out_dir', 'broken')
    a, b = checkpoint(unbroken.out_dir), checkpoint(broken)
    assert (a['step'], a['losses']) == (b['step'], b['losses']) and len(a['losses']) == 5
    assert_close([a['model'], a['optimizer']['state']], [b['model'], b['optimizer']['state']], rtol=0, atol=0)
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    for columns in (('step', 'train_loss', 'lr', 'grad_norm'), ('step', 'val_loss', 'bits_per_byte')):
        assert log(unbroken.out_dir, *columns) == log(broken, *columns)
    assert checkpoint(unbroken.out_dir, 'best')['best'] == checkpoint(broken, 'best')['best']
    assert not list(broken.glob('*.tmp'))


@pytest.mark.parametrize('number', SIGNALS, ids=lambda number: number.name)
def test_signal_finishes_the_step_saves_and_says_how_to_resume(train, number, monkeypatch):
    step = torch.optim.AdamW.step
    steps = itertools.count(1)

    def patched(*args):
        if next(steps) == 4:
            signal.raise_signal(number)
        step(*args)
    monkeypatch.setattr(torch.optim.AdamW, 'step', patched)
    train.train('--model', 'nope', '--max_iters', 9, '--out_dir', 'out/my run', code=128 + number)
    command = shlex.split(train.out.splitlines()[-1].split('To resume: python ')[1])
    assert 'stopped after step 4, saved' in train.out and checkpoint(train.folder / 'out/my run')['step'] == 4
    train(*command)
    resumed = checkpoint(train.folder / 'out/my run')
    assert resumed['step'] == len(resumed['losses']) == 9, 'the next log line is the mean since the last one'


@posix
def test_a_closed_terminal_saves_and_two_runs_never_share_a_folder(train):
    """While a process trains in a terminal, another run into its folder is refused; then the terminal is closed."""
    import pty
    words = [str(w) for w in (*train.words, '--model', 'nope', '--max_iters', 100000, '--out_dir', 'x')]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(train.folder)
        os.execv(sys.executable, [sys.executable, str(REPO / 'train.py'), *words])
    train.started.append(SimpleNamespace(kill=lambda: os.kill(pid, signal.SIGKILL)))
    output = b''
    while b'step    20/' not in output:
        output += os.read(terminal, 4096)
    config = (train.folder / 'x/config.json').read_bytes()
    for more in ('--resume', '--overwrite'):
        train('train.py', *words, more, '--seed', 5, code=2)
        one_line(train.err, 'another run is writing to x')
    assert (train.folder / 'x/config.json').read_bytes() == config
    os.close(terminal)
    assert os.waitpid(pid, 0)[1], 'not the exit code of a finished run'
    train.started.clear()
    assert checkpoint(train.folder / 'x')['step'] >= 20


@posix
def test_two_processes_equal_one(train):
    words = '--model composite --objective masked --max_iters 6 --eval_interval 3 --log_interval 1'.split()
    train.train(*words, '--out_dir', 'one')
    words = [*train.words, *words, '--micro_batch_size', 2, '--out_dir', 'two']
    train.process('torchrun', '--nproc_per_node=2', 'train.py', *words)
    one, two = train.folder / 'one', train.folder / 'two'
    assert_close(checkpoint(one)['model'], checkpoint(two)['model'], rtol=0, atol=2e-5)
    for columns in (('train_loss', 'grad_norm'), ('val_loss',)):
        a, b = (np.array(log(folder, *columns), float) for folder in (one, two))
        assert np.abs(a - b).max() < 2e-4, columns
    assert train.out.count('step     6/6  val loss') == 1, 'one process prints'
    process = train.start('torchrun', '--nproc_per_node=2', 'train.py', *words, '--resume', '--max_iters', 100000)
    wait_for(process, 'step    20/')
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert 'To resume: torchrun ... train.py --resume --out_dir two' in out and checkpoint(two)['step'] >= 20


@pytest.fixture
def finished(train, unbroken):
    """A copy of the unbroken run in x/; the schedule has a high learning rate, so that its loss is still changing."""
    shutil.copytree(unbroken.out_dir, train.folder / 'x')
    shutil.copytree(unbroken.folder / 'data2', train.folder / 'data2')
    train.x = train.folder / 'x'
    return train


def test_a_finished_run_is_extended(finished):
    """Nothing is repeated; a validation at the old end stays in the log, and its loss stays the best."""
    before = (finished.x / 'log.csv').read_text()
    best = checkpoint(finished.x, 'best')
    assert checkpoint(finished.x)['best'] == best['best'] and best['step'] == 25
    finished('train.py', '--resume', '--out_dir', 'x')  # nothing left to do
    assert (finished.x / 'log.csv').read_text() == before
    finished('train.py', '--resume', '--out_dir', 'x', '--max_iters', 40, '--learning_rate', 0)
    after = (finished.x / 'log.csv').read_text()
    assert after.startswith(before) and after.count('step') == 1, 'one header'
    assert 'changed since the checkpoint: max_iters 25 -> 40' in finished.out
    assert [step for step, _ in log(finished.x, 'step', 'val_loss')][-3:] == ['25', '30', '40']
    assert checkpoint(finished.x, 'best')['best'] <= best['best']
    torch.save(dict(best, step=24), finished.x / 'ckpt_best.pt')
    finished('train.py', '--eval_only', '--out_dir', 'x')
    assert 'x, step 24, code: val loss' in finished.out


def test_a_new_metric_gets_a_column(tmp_path):
    """One more argument of log(): older rows are kept, and there is one header."""
    run = make_run(4)
    run.out = tmp_path
    script.log(run, step=0, val_loss=1.5)
    script.log(run, step=10, train_loss=2.0)
    run.log, run.step = [], 10
    script.start_log(run)
    script.log(run, step=20, train_loss=1 / 3, entropy=0.5)
    assert (tmp_path / 'log.csv').read_text() == 'step,val_loss,train_loss,entropy\n0,1.5,,\n10,,2,\n20,,0.333333,0.5\n'


@pytest.mark.parametrize('change', ['data', 'eval_tokens', 'mask_prob', 'nothing'])
def test_the_best_loss_starts_anew_when_the_data_change(finished, change):
    """The record of the old data might never be beaten; sample.py would use the old model."""
    torch.save(dict(checkpoint(finished.x), best=0.01), finished.x / 'ckpt_last.pt')
    words = {'eval_tokens': ['--eval_tokens', 512], 'mask_prob': ['--mask_prob', 0.3]}.get(change, [])
    if change == 'data':
        text = finished.folder / 'other.txt'
        text.write_text('never seen before, ' * 1000)
        prepare_data.prepare('other', path=text, data_dir=finished.folder / 'data2')
        words = ['--dataset', 'other']
    finished('train.py', '--resume', '--out_dir', 'x', '--max_iters', 30, *words)
    new = checkpoint(finished.x, 'best')
    if change == 'nothing':
        assert new['step'] == 25 and checkpoint(finished.x)['best'] == 0.01 and 'does not count' not in finished.out
    else:
        assert 'the best loss before, 0.0100, does not count' in finished.out and new['step'] == 30
        assert new['best'] == pytest.approx(float(log(finished.x, 'val_loss')[-1][0]), rel=1e-5)


def test_resume_keeps_what_it_must(finished):
    """Other betas and weight decay are taken, the state of AdamW is kept; another architecture is refused."""
    new = ['--max_iters', 27, '--weight_decay', 0.3, '--beta1', 0.8, '--micro_batch_size', 2]
    finished('train.py', '--resume', '--out_dir', 'x', *new)
    optimizer = checkpoint(finished.x)['optimizer']
    found = [(group['weight_decay'], group['betas']) for group in optimizer['param_groups']]
    assert found == [(0.3, (0.8, 0.95)), (0.0, (0.8, 0.95))]
    assert {state['step'].item() for state in optimizer['state'].values()} == {27}
    meta = finished.folder / 'data2/code/meta.json'
    for name, value, old in (('n_layer', 3, 2), ('objective', 'masked', 'causal'), ('model', 'nope', 'composite')):
        finished('train.py', '--resume', '--out_dir', 'x', f'--{name}', value, code=2)
        one_line(finished.err, f'cannot change {name}: it is {old}')
    meta.write_text(meta.read_text().replace('"bytes"', '"gpt2"'))
    finished('train.py', '--resume', '--out_dir', 'x', code=2)
    one_line(finished.err, 'cannot change tokenizer: it is bytes')
    assert checkpoint(finished.x)['step'] == 27


def test_damaged_checkpoints_are_refused(finished):
    last = finished.x / 'ckpt_last.pt'
    good = last.read_bytes()
    flipped = bytearray(good)
    place = good.index(checkpoint(finished.x)['model']['wte.weight'].numpy().tobytes()[:64])
    flipped[place + 2] ^= 64
    without = checkpoint(finished.x)
    without['model'].pop('ln_f.weight')
    for bad, part in ((good[:5000], 'is damaged'), (b'', 'is damaged'), (bytes(flipped), 'wrong checksum'),
                      (torch.zeros(3), 'is damaged'), ({'a': 1}, 'fields are missing'), (without, 'does not fit')):
        last.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, last)
        before = {path: path.read_bytes() for path in finished.x.iterdir()}
        finished('train.py', '--resume', '--out_dir', 'x', code=2)
        one_line(finished.err, part)
        assert before == {path: path.read_bytes() for path in finished.x.iterdir()}


def test_runs_never_overwrite_each_other(train):
    short = ['--model', 'nope', '--max_iters', 1]
    train.train(*short)
    out = train.folder / 'out/nope-causal-code'
    (out / 'notes.txt').touch()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (train.folder / 'out/ckpt_best.pt').touch()  # any file of a run
    for words in ([], ['--out_dir', out], ['--out_dir', 'out']):
        train.train(*short, *words, code=2)
        one_line(train.err, 'holds a run: add --resume to continue it, --overwrite to delete it')
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    train.train('--model', 'nope', '--max_iters', 2, '--resume')
    assert checkpoint(out)['step'] == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, 'eval', lambda self: os.listdir('/nowhere'))
        train.train(*short, '--overwrite', code=1)
    assert {path.name for path in out.iterdir()} == {'config.json', 'ckpt_last.pt', 'notes.txt', '.lock'}, (
        'nothing of the old run; a checkpoint first')


def test_nan_keeps_the_last_good_checkpoint(train, monkeypatch):
    train.train('--model', 'nope', '--learning_rate', 1e9, '--warmup_iters', 4, '--grad_clip', 0, '--max_iters', 50,
                '--checkpoint_interval', 1, '--out_dir', 'x', code=1)
    one_line(train.err, 'x/ckpt_last.pt is the last good checkpoint. Try a lower --learning_rate')
    kept = checkpoint(train.folder / 'x')
    assert all(t.isfinite().all() for t in kept['model'].values())
    assert f'at step {kept["step"] + 1};' in train.err
    train.train('--model', 'nope', '--learning_rate', 1e9, '--max_iters', 50, '--out_dir', 'y', code=1, RANK='1')
    assert not train.err + train.out, 'process 0 prints the line'
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda *_: math.inf)
    train.train('--model', 'nope', '--max_iters', 2, '--out_dir', 'z', code=1)


def test_full_disk_leaves_the_old_files(finished, monkeypatch):
    """n writes succeed, then the disk is full."""
    old = checkpoint(finished.x)
    for n in range(4):
        results = iter([True] * n)
        monkeypatch.setattr(os, 'fsync', lambda _: next(results, False) or os.listdir('/No space left'))
        finished('train.py', '--resume', '--out_dir', 'x', '--max_iters', 26, '--eval_interval', 25, code=1)
        one_line(finished.err, "could not be written: [Errno 2] No such file or directory: '/No space left'")
        assert_close(checkpoint(finished.x)['model'], old['model'], rtol=0, atol=0)
        assert {path.name for path in finished.x.iterdir()} == {*script.FILES, '.lock'}


def test_sigterm_outside_the_loop_leaves_nothing_half_made(train, monkeypatch):
    monkeypatch.setattr(prepare_data, 'atomic_write', lambda *_: signal.raise_signal(signal.SIGTERM))  # of meta.json
    train('train.py', *TINY, code=143)
    assert [path.name for path in (train.folder / 'data').iterdir()] == ['.shakespeare.lock']
    assert not (train.folder / 'out').exists()


REFUSED = {
    '--model nonsense': 'there is no model_nonsense.py; --model may be ',
    '--learning_rate nan': '--learning_rate must be at least 0',
    '--dropout 1.0': '--dropout must be at least 0 and at most 0.9999, not 1.0',
    '--mask_prob 0': '--mask_prob must be above 0 and at most 1',
    '--log_interval 0': '--log_interval must be above 0 and at most',
    '--batch_size 10 --micro_batch_size 4': 'multiple of --micro_batch_size',
    '--no-causal': '--objective causal needs --causal',
    '--learning-rate 1': 'unrecognized arguments: --learning-rate 1',
    '--overwrite --resume': 'argument --resume: not allowed with argument --overwrite',
    '--eval_only': 'out/composite-causal-code has no checkpoint',
    '{"min_lr": "low"}': "--min_lr: invalid float value: 'low'",
    '[1]': 'must hold a JSON object',
    '--n_head 3': 'multiple of n_head, not 32 with 3',
    '--dataset nothere': "--dataset must be shakespeare, enwik8, ",
    '--block_size 2000000': '--block_size must be less than',
    '--vocab_size 100': '--vocab_size must be at least 257',
    '--device tpu9': '--device tpu9 is not available here; auto would be ',
    '--out_dir c.json': '--out_dir c.json is a file; it must be a folder',
}


@pytest.mark.parametrize('words', REFUSED)
def test_refused(train, words):
    """One line that says what is wrong and what is allowed, exit 2. A text in brackets is a file for --config."""
    (train.folder / 'c.json').write_text(words)
    train.train('--max_iters', 1, *(words.split() if words[0] == '-' else ['--config', 'c.json']), code=2)
    one_line(train.err, REFUSED[words])
    assert [path.name for path in train.folder.iterdir()] == ['c.json'], 'nothing was created'


def test_who_decides_a_setting(monkeypatch, tmp_path):
    """Flags win over a file, which wins over a preset; a resumed run has its own settings."""
    monkeypatch.chdir(tmp_path)
    Path('x').mkdir()
    Path('x/ckpt_last.pt').touch()
    Path('x/config.json').write_text('{"model": "nope", "objective": "causal", "causal": true, "learning_rate": 5e-4}')
    Path('c.json').write_text('{"causal": true, "min_lr": 1e-4, "batch_size": 6, "vocab_size": 9, "resume": true}')
    words = '--objective masked --config c.json --preset small --batch_size 2'.split()
    settings, _, config, flags = script.resolve(words)
    assert (settings.batch_size, settings.min_lr, settings.max_iters, config.n_layer) == (2, 1e-4, 5000, 6)
    assert (config.causal, config.vocab_size, flags.resume) == (True, 0, False)
    assert flags.out_dir == 'out/composite-masked-shakespeare'
    assert not script.resolve(['--preset', 'bert_small'])[2].causal, 'the objective of a preset decides'
    assert script.batch_share(script.resolve('--preset gpt2 --batch_size 8'.split())[0]) == (8, 8)
    assert not script.resolve(['--config', 'x/config.json', '--objective', 'masked'])[2].causal
    settings, module, config, _ = script.resolve('--resume --out_dir x --config c.json --preset gpt2'.split())
    assert (settings.learning_rate, settings.batch_size, config.n_layer) == (5e-4, 24, 4)
    assert module.__name__ == 'model_nope'


@pytest.mark.parametrize('folder', ['.', 'baselines'])
def test_a_scheme_of_ones_own_is_one_new_file(train, folder):
    """Its fields are flags, and its choose_attention() is called once."""
    source = (REPO / 'model_nope.py').read_text().replace(
        '    init_std: float = 0.02', '    shift: float = -1.5  # moves all\n    init_std: float = 0.03')
    source += '\n\ndef choose_attention(model, dtype):\n    return f"chosen for {dtype} {model.wte.weight.device}"\n'
    (train.folder / folder).mkdir(exist_ok=True)
    (train.folder / folder / 'model_mine.py').write_text(source)
    for name in ('train.py', 'prepare_data.py'):
        shutil.copy(REPO / name, train.folder)
    train(train.folder / 'train.py', *train.words, '--model', 'mine', '--max_iters', 1, '--shift', -2.5)
    config = json.loads((train.folder / 'out/mine-causal-code/config.json').read_text())
    assert config['init_std'] == 0.03 and config['shift'] == -2.5
    assert train.out.splitlines().count('chosen for torch.float32 cpu') == 1
