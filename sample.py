"""
Continue a prompt with a causal model, or fill each [MASK] with a masked one.

    python sample.py                                        # the newest run in out/
    python sample.py --out_dir out/composite-causal-python --prompt "def " --max_new_tokens 400 --temperature 0.8
    python sample.py --out_dir out/composite-masked-wikitext2 --prompt "The capital of France is [MASK] ."

A causal model is fed one token at a time; what it needs of the past is in its state (Model.new_state()).
"""
import argparse
import codecs
import sys
from pathlib import Path

import torch

from prepare_data import die, load_tiktoken
from train import load_checkpoint, load_model_file, one_line


def load_run(out_dir=None, which=None, device='cpu'):
    """A run that train.py wrote -> its model in eval mode, its checkpoint (a dict with settings, config, meta, step).

    out_dir: the run's folder; None takes the newest in out/. which: 'best' or 'last'; None takes the best, or the last
    where there is no best yet.
    """
    if out_dir is None:
        checkpoints = list(Path('out').glob('*/ckpt_last.pt'))
        if not checkpoints:
            die('there is no run in out/: train one, or name its --out_dir')
        out_dir = max(checkpoints, key=lambda path: path.stat().st_mtime).parent
    if which is None:
        which = 'best' if Path(out_dir, 'ckpt_best.pt').is_file() else 'last'
    path = Path(out_dir, f'ckpt_{which}.pt')
    if not path.is_file():
        die(f'{path} does not exist; --out_dir is a folder that train.py wrote')
    checkpoint = load_checkpoint(path)
    name = checkpoint['settings']['model']
    repository = Path(__file__).resolve().parent
    if not any((folder / f'model_{name}.py').is_file() for folder in (repository, repository / 'baselines')):
        die(f'{path} needs model_{name}.py, which is neither beside train.py nor in baselines/')
    try:
        module = load_model_file(name)
        model = module.Model(module.Config(**checkpoint['config'])).to(device).eval()
        model.load_state_dict(checkpoint['model'])
    except (ImportError, TypeError, RuntimeError, ValueError, AttributeError, SyntaxError, LookupError,
            ArithmeticError) as e:  # changed since
        die(f'{path} does not fit model_{name}.py as it is now: {one_line(e)}')
    print(f'{path}: step {checkpoint["step"]}, best validation loss so far {checkpoint["best"]:.4f}', file=sys.stderr)
    return model, checkpoint


def tokenizer(name):
    """-> function from text to a list of ids, function from one id to its bytes."""
    if name == 'bytes':
        def encode(text):
            return list(text.encode('utf-8', 'surrogateescape'))

        def decode(i):
            return bytes([i])
        return encode, decode
    tokens = load_tiktoken(name)
    return tokens.encode_ordinary, tokens.decode_single_token_bytes


def draw(logits, temperature, top_k, generator):
    """One id from logits (vocab_size,); temperature 0: the likeliest."""
    logits = logits.float().cpu()  # one CPU generator: the same draws on every device
    if temperature == 0:
        return logits.argmax().item()
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, float('-inf'))
    p = ((logits.double() - logits.max()) / temperature).softmax(-1)
    return torch.multinomial(p, 1, generator=generator).item()


@torch.no_grad()
def continuation(model, ids, vocab_size, context, temperature, top_k, generator):
    """Yield new ids without end.

    The state holds at most `context` tokens (0: no limit). When it is full, the newer half is fed to a new state.
    """
    device = model.wte.weight.device
    ids = list(ids)
    new = ids
    state = model.new_state()
    while True:
        seen = state[0]['seen']
        if context and seen + len(new) > context:
            keep = max(1, context // 2) if seen else context  # a long prompt is cut to the context
            new = ids[-keep:]
            state = model.new_state()
        logits, _ = model(torch.tensor([new], device=device), state=state)  # (1, len(new), rows of the embedding)
        i = draw(logits[0, -1, :vocab_size], temperature, top_k, generator)  # never [MASK] or a row that fills up
        ids.append(i)
        new = [i]
        yield i


@torch.no_grad()
def fill(model, ids, mask_id, vocab_size, top=5):
    """For each [MASK] the likeliest ids and their probabilities: a list of lists of (id, p)."""
    device = model.wte.weight.device
    where = torch.tensor([[i for i, t in enumerate(ids) if t == mask_id]], device=device)  # (1, M)
    logits, _ = model(torch.tensor([ids], device=device), where=where)  # (1, M, rows of the embedding)
    best = logits[0, :, :vocab_size].float().softmax(-1).topk(min(top, vocab_size))  # (M, top)
    return [list(zip(i, p)) for i, p in zip(best.indices.tolist(), best.values.tolist())]


def print_filled(model, meta, prompt):
    """The prompt with the likeliest piece in each gap, then the five likeliest pieces of each."""
    if prompt is None:
        die('a masked model needs --prompt with [MASK] in it')
    parts = prompt.split('[MASK]')
    if len(parts) == 1:
        die('this model is masked: --prompt must hold at least one [MASK]')
    if meta['tokenizer'] != 'bytes':  # GPT-2's tokens begin with the space before them
        parts = [part.removesuffix(' ') for part in parts[:-1]] + parts[-1:]
    encode, decode = tokenizer(meta['tokenizer'])
    ids = encode(parts[0])
    for part in parts[1:]:
        ids += [meta['mask_id'], *encode(part)]
    if model.config.absolute and len(ids) > model.config.block_size:
        die(f'absolute positions end at block_size={model.config.block_size}: the prompt has {len(ids)} tokens')
    found = fill(model, ids, meta['mask_id'], meta['vocab_size'])
    answers = iter(found)
    text = [b'[' + decode(next(answers)[0][0]) + b']' if i == meta['mask_id'] else decode(i) for i in ids]
    print(b''.join(text).decode('utf-8', 'replace'))
    for n, guesses in enumerate(found, 1):
        shown = [f'{decode(i).decode("utf-8", "backslashreplace")!r} {p:.1%}' for i, p in guesses]
        print(f'[MASK] {n}: {"  ".join(shown)}')


def print_continued(model, meta, prompt, args):
    """--num_samples continuations, each printed as it comes."""
    block_size = model.config.block_size
    context = block_size if args.context is None else args.context
    if model.config.absolute and not 0 < context <= block_size:
        die(f'absolute positions end at block_size={block_size}: --context must be from 1 to that')
    if '[MASK]' in prompt:
        print('note: this model is causal, so [MASK] in the prompt is literal text', file=sys.stderr)
    encode, decode = tokenizer(meta['tokenizer'])
    ids = encode(prompt)
    if not ids:
        die('--prompt must not be empty')
    for n in range(args.num_samples):
        if n:
            print('-' * 40)
        print(prompt.lstrip('\n'), end='', flush=True)
        text = codecs.getincrementaldecoder('utf-8')('replace')  # a character may come in several tokens
        generator = torch.Generator().manual_seed(args.seed + n)
        new_ids = continuation(model, ids, meta['vocab_size'], context, args.temperature, args.top_k, generator)
        for _ in range(args.max_new_tokens):
            print(text.decode(decode(next(new_ids))), end='', flush=True)
        print(text.decode(b'', final=True))


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: die(f'{message} (see python sample.py --help)')
    parser.add_argument('--out_dir', help='a folder that train.py wrote (default: the newest in out/)')
    parser.add_argument('--ckpt', choices=('best', 'last'), help='which checkpoint (default best, else last)')
    parser.add_argument('--prompt', help='text to continue, or text with [MASK] in it')
    parser.add_argument('--num_samples', type=int, default=1, help='continuations (default 1)')
    parser.add_argument('--max_new_tokens', type=int, default=500, help='length of each (default 500)')
    parser.add_argument('--temperature', type=float, default=0.8, help='0: always the likeliest (default 0.8)')
    parser.add_argument('--top_k', type=int, default=0, help='draw from the k likeliest only; 0: from all (default 0)')
    parser.add_argument('--context', type=int, help='tokens to look back on; 0: no limit (default: its block_size)')
    parser.add_argument('--seed', type=int, default=1, help='of the draws (default 1)')
    best_device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    parser.add_argument('--device', default=best_device, help='cpu, cuda, cuda:N or mps (default: cuda > mps > cpu)')
    args = parser.parse_args()
    for name, low in dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=0, context=0, seed=0).items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2 ** 63:
            die(f'--{name} must be at least {low} and under 2^63, not {value}')
    try:
        if torch.device(args.device).type not in ('cuda', 'mps', 'cpu'):
            die(f'--device {args.device} cannot be used here: only cuda, mps and cpu can')
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        die(f'--device {args.device} cannot be used here: {str(e).splitlines()[0]}')
    return args


def main():
    args = read_arguments()
    sys.stdout.reconfigure(errors='replace')  # a console that lacks a character shows ? for it
    model, checkpoint = load_run(args.out_dir, args.ckpt, args.device)
    if checkpoint['settings']['objective'] == 'masked':
        print_filled(model, checkpoint['meta'], args.prompt)
    else:
        print_continued(model, checkpoint['meta'], '\n' if args.prompt is None else args.prompt, args)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # sample.py | head
        sys.stderr.close()
