"""
Continue a prompt with a causal model, or fill each [MASK] with a masked one.

    python sample.py                                        # the newest run in out/
    python sample.py --out_dir out/composite-causal-python --prompt "def " --max_new_tokens 400 --temperature 0.8
    python sample.py --out_dir out/composite-masked-wikitext2 --prompt "The capital of France is [MASK] ."

A causal model is fed one token at a time; what it needs of the past is in its state (Model.new_state()).
"""
import argparse
import codecs
import importlib
import pickle
import sys
from pathlib import Path

import torch


def die(message):
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


def load_run(out_dir, which, device):
    """-> model in eval mode and its checkpoint; out_dir None: the newest run."""
    if out_dir is None:
        runs = sorted(Path('out').glob('*/ckpt_last.pt'), key=lambda p: p.stat().st_mtime)
        out_dir = runs[-1].parent if runs else die('there is no run in out/: train one, or name its --out_dir')
    if which is None:  # the best; a run stopped before its first validation has none yet
        which = 'best' if Path(out_dir, 'ckpt_best.pt').is_file() else 'last'
    path = Path(out_dir, f'ckpt_{which}.pt')
    if not path.is_file():
        die(f'{path} does not exist; --out_dir is a folder that train.py wrote')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        name, config = checkpoint['settings']['model'], checkpoint['config']
    except (RuntimeError, EOFError, OSError, TypeError, KeyError, IndexError, pickle.UnpicklingError) as e:
        die(f'{path} is damaged, or no checkpoint of train.py: {type(e).__name__} {" ".join(str(e).split())[:100]}')
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        module = importlib.import_module(f'model_{name}')
        model = module.Model(module.Config(**config)).to(device).eval()
        model.load_state_dict(checkpoint['model'])
    except (ImportError, TypeError, RuntimeError, ValueError, AttributeError, SyntaxError) as e:  # the file was changed since, or is gone
        die(f'{path} does not fit model_{name}.py as it is now: {" ".join(str(e).split())[:200]}')
    print(f'{path}: step {checkpoint["step"]}, best validation loss so far {checkpoint["best"]:.4f}', file=sys.stderr)
    return model, checkpoint


def tokenizer(name):
    """-> text to a list of ids, and one id to its bytes."""
    if name == 'bytes':
        return lambda text: list(text.encode('utf-8', 'surrogateescape')), lambda i: bytes([i])
    try:
        import tiktoken
        enc = tiktoken.get_encoding(name)
    except Exception as e:  # not installed, or no vocabulary: tiktoken fetches it on first use
        die(f'tiktoken cannot load {name}: {type(e).__name__}. Without a network set TIKTOKEN_CACHE_DIR')
    return enc.encode_ordinary, enc.decode_single_token_bytes


@torch.no_grad()
def continuation(model, ids, vocab_size, context, temperature, top_k, generator):
    """Yield new ids without end. The state holds `context` tokens at most: when it is full, the newer half is fed again."""
    state, ids, new = model.new_state(), list(ids), list(ids)
    device = model.wte.weight.device
    while True:
        if context and len(new) + state[0]['seen'] > context:
            keep = context // 2 if state[0]['seen'] else context  # a long prompt fills the context
            state, new = model.new_state(), ids[-max(1, keep):]
        logits = model(torch.tensor([new], device=device), state=state)[0][0, -1, :vocab_size].float().cpu()  # no [MASK], no filler
        if top_k:
            logits[logits < logits.topk(min(top_k, vocab_size)).values[-1]] = float('-inf')
        if temperature:
            i = torch.multinomial(((logits.double() - logits.max()) / temperature).softmax(-1), 1, generator=generator).item()
        else:
            i = logits.argmax().item()
        ids.append(i)
        new = [i]
        yield i


@torch.no_grad()
def fill(model, ids, mask_id, vocab_size, top=5):
    """For each [MASK] the likeliest ids and their probabilities: a list of lists of (id, p)."""
    device = model.wte.weight.device
    where = torch.tensor([[i for i, t in enumerate(ids) if t == mask_id]], device=device)  # (1, M)
    p = model(torch.tensor([ids], device=device), where=where)[0][0, :, :vocab_size].float().softmax(-1)  # (M, vocab_size)
    best = p.topk(min(top, vocab_size))
    return [list(zip(i, q)) for i, q in zip(best.indices.tolist(), best.values.tolist())]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: die(f'{message} (see python sample.py --help)')
    parser.add_argument('--out_dir', help='a folder that train.py wrote (default: the newest in out/)')
    parser.add_argument('--ckpt', choices=('best', 'last'), help='which checkpoint (default best, or last where there is no best yet)')
    parser.add_argument('--prompt', help='text to continue, or text with [MASK] in it')
    parser.add_argument('--num_samples', type=int, default=1, help='continuations (default 1)')
    parser.add_argument('--max_new_tokens', type=int, default=500, help='length of each (default 500)')
    parser.add_argument('--temperature', type=float, default=0.8, help='0: always the likeliest (default 0.8)')
    parser.add_argument('--top_k', type=int, default=0, help='draw from the k likeliest only; 0: from all (default 0)')
    parser.add_argument('--context', type=int, help='tokens to look back on; 0: no limit (default: the block_size of the training)')
    parser.add_argument('--seed', type=int, default=1, help='of the draws (default 1)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')
    args = parser.parse_args()
    sys.stdout.reconfigure(errors='replace')  # a console that lacks a character shows ? for it
    for name, low in (('num_samples', 1), ('max_new_tokens', 1), ('temperature', 0.0), ('top_k', 0), ('context', 0), ('seed', 0)):
        if getattr(args, name) is not None and not low <= getattr(args, name) < 2 ** 63:
            die(f'--{name} must be at least {low}, not {getattr(args, name)}')
    try:
        assert torch.device(args.device).type in ('cuda', 'mps', 'cpu'), 'only cuda, mps and cpu can'
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        die(f'--device {args.device} cannot be used here: {str(e).splitlines()[0]}')
    model, checkpoint = load_run(args.out_dir, args.ckpt, args.device)
    config, meta = model.config, checkpoint['meta']
    encode, piece = tokenizer(meta['tokenizer'])

    if checkpoint['settings']['objective'] == 'masked':
        prompt = args.prompt if args.prompt is not None else die('a masked model needs --prompt with [MASK] in it')
        parts = prompt.split('[MASK]')
        if meta['tokenizer'] != 'bytes':  # a token of GPT-2 brings the space before it
            parts = [part.removesuffix(' ') for part in parts[:-1]] + parts[-1:]
        parts = [encode(part) for part in parts]
        if len(parts) == 1:
            die('this model is masked: --prompt must hold at least one [MASK]')
        ids = [i for part in parts for i in (meta['mask_id'], *part)][1:]
        if config.absolute and len(ids) > config.block_size:
            die(f'absolute positions end at block_size={config.block_size}: the prompt has {len(ids)} tokens')
        show = lambda i: repr(piece(i).decode('utf-8', 'backslashreplace'))
        found = fill(model, ids, meta['mask_id'], meta['vocab_size'])
        answers = [b'[' + piece(guess[0][0]) + b']' for guess in found]
        print(b''.join(answers.pop(0) if i == meta['mask_id'] else piece(i) for i in ids).decode('utf-8', 'replace'))
        for n, guess in enumerate(found, 1):
            print(f'[MASK] {n}: ' + '  '.join(f'{show(i)} {p:.1%}' for i, p in guess))
        return

    context = config.block_size if args.context is None else args.context
    if config.absolute and not 0 < context <= config.block_size:
        die(f'absolute positions end at block_size={config.block_size}: --context must be from 1 to that')
    prompt = '\n' if args.prompt is None else args.prompt
    ids = encode(prompt) or die('--prompt must not be empty')
    for n in range(args.num_samples):
        print('-' * 40 + '\n' if n else '', end='')
        print(prompt.lstrip('\n'), end='', flush=True)
        text = codecs.getincrementaldecoder('utf-8')('replace')  # a character may come in several tokens
        generator = torch.Generator().manual_seed(args.seed + n)
        for _, i in zip(range(args.max_new_tokens), continuation(model, ids, meta['vocab_size'], context, args.temperature, args.top_k, generator)):
            print(text.decode(piece(i)), end='', flush=True)
        print(text.decode(b'', final=True))


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # sample.py | head
        sys.stderr.close()
