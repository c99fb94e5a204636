"""
Continue a prompt with a causal model, or fill in each [MASK] with a masked model.

    python sample.py --out_dir out/composite-causal-shakespeare --prompt "ROMEO:" --max_new_tokens 400 --temperature 0.8
    python sample.py --out_dir out/composite-masked-wikitext2 --prompt "The capital of France is [MASK] ."

<|endoftext|> in a prompt is the token that ends a document, if the data set has one. A continuation stops at it.
"""
import argparse
import codecs
import re
import sys
from pathlib import Path

import torch

from prepare_data import load_tiktoken
from train import die, load_checkpoint, load_model_file, one_line


def load_run(out_dir=None, which=None, device='cpu'):
    """A run of train.py -> its model in eval mode, its checkpoint (a dict with settings, config, meta, step, ...).

    out_dir None: the newest run in out/. which: 'best', 'last', or None: best if it exists, else last. Prints its path.
    """
    if out_dir is None:
        checkpoints = sorted(Path('out').glob('*/ckpt_last.pt'), key=lambda path: path.stat().st_mtime)
        if not checkpoints:
            die('there is no run in out/: train one, or name its --out_dir')
        out_dir = checkpoints[-1].parent
    which = which or ('best' if Path(out_dir, 'ckpt_best.pt').is_file() else 'last')
    path = Path(out_dir, f'ckpt_{which}.pt')
    if not path.is_file():
        die(f'{path} does not exist; --out_dir is a folder that train.py wrote')
    checkpoint = load_checkpoint(path)
    module = load_model_file(checkpoint['settings']['model'])
    try:
        model = module.Model(module.Config(**checkpoint['config'])).to(device).eval()
        model.load_state_dict(checkpoint['model'])
    except Exception as e:  # the model file may have changed in any way since
        die(f'{path} does not fit {module.__name__}.py as it is now: {one_line(e)}')
    print(f'{path}: step {checkpoint["step"]}, best validation loss so far {checkpoint["best"]:.4f}', file=sys.stderr)
    return model, checkpoint


def tokenizer(name):
    """-> encode (text -> list of ids), decode (one id -> its bytes)."""
    if name == 'bytes':
        return lambda text: list(text.encode('utf-8', 'surrogateescape')), lambda i: bytes([i])
    tokens = load_tiktoken(name)
    return tokens.encode_ordinary, tokens.decode_single_token_bytes


def encode_prompt(prompt, meta, masked):
    """Text -> ids. [MASK] (masked models) and <|endoftext|> (if the data set has that token) are one id each."""
    special = {'[MASK]': meta['mask_id']} if masked else {}
    if meta.get('eot_id') is not None:
        special['<|endoftext|>'] = meta['eot_id']
    if masked and meta['tokenizer'] != 'bytes':
        prompt = prompt.replace(' [MASK]', '[MASK]')  # GPT-2's tokens begin with the space before them
    encode, _ = tokenizer(meta['tokenizer'])
    parts = re.split(f'({"|".join(map(re.escape, special))})', prompt) if special else [prompt]
    return [i for part in parts for i in ([special[part]] if part in special else encode(part))]


def draw(logits, temperature, top_k, generator):
    """Draw one id from logits (vocab_size,). temperature 0: the most likely. top_k: from exactly k ids; 0: from all."""
    logits = logits.to('cpu', torch.float64, copy=True)  # a CPU generator draws the same on every device
    if temperature == 0:
        return logits.argmax().item()
    if top_k:
        logits[logits.argsort(descending=True, stable=True)[top_k:]] = float('-inf')  # of equal logits the first stay
    p = ((logits - logits.max()) / temperature).softmax(-1)
    return torch.multinomial(p, 1, generator=generator).item()


@torch.no_grad()
def continuation(model, ids, vocab_size, context, temperature, top_k, generator):
    """Yield new ids. The state has at most `context` tokens (0: no limit); the newer half of a full one is kept."""
    ids = list(ids)[-context:]
    new, state = ids, model.new_state()
    while True:
        if context and state[0]['seen'] + len(new) > context:
            new, state = ids[-max(1, context // 2):], model.new_state()
        logits, _ = model(torch.tensor([new], device=model.wte.weight.device), state=state)
        i = draw(logits[0, -1, :vocab_size], temperature, top_k, generator)  # not [MASK], no padding of the embedding
        new = [i]
        ids += new
        yield i


@torch.no_grad()
def fill(model, ids, mask_id, vocab_size, top=5):
    """For each [MASK] the `top` most likely ids and their probabilities p: a list of lists of (id, p)."""
    idx = torch.tensor([ids], device=model.wte.weight.device)
    logits, _ = model(idx, where=(idx[0] == mask_id).nonzero().T)  # logits (1, M, rows of the embedding)
    best = logits[0, :, :vocab_size].float().softmax(-1).topk(min(top, vocab_size))  # (M, top)
    return [list(zip(i, p)) for i, p in zip(best.indices.tolist(), best.values.tolist())]


def print_filled(model, meta, args):
    """Print the prompt with the most likely token at each [MASK], then the five most likely tokens for each."""
    if '[MASK]' not in (args.prompt or ''):
        die('this model is masked: it needs --prompt with at least one [MASK]')
    ids = encode_prompt(args.prompt, meta, True)
    if model.config.absolute and len(ids) > model.config.block_size:
        die(f'absolute positions end at block_size={model.config.block_size}: the prompt has {len(ids)} tokens')
    _, decode = tokenizer(meta['tokenizer'])
    found = fill(model, ids, meta['mask_id'], meta['vocab_size'])
    answers = iter(found)
    text = [b'[' + decode(next(answers)[0][0]) + b']' if i == meta['mask_id'] else decode(i) for i in ids]
    print(b''.join(text).decode('utf-8', 'replace'))
    for n, guesses in enumerate(found, 1):
        shown = [f'{decode(i).decode("utf-8", "backslashreplace")!r} {p:.1%}' for i, p in guesses]
        print(f'[MASK] {n}: {"  ".join(shown)}')


def print_continued(model, meta, args):
    """Print --num_samples continuations, each token as soon as it is drawn."""
    prompt = '\n' if args.prompt is None else args.prompt
    context = model.config.block_size if args.context is None else args.context
    if model.config.absolute and not 0 < context <= model.config.block_size:
        die(f'absolute positions end at block_size={model.config.block_size}: --context must be from 1 to that')
    if '[MASK]' in prompt:
        print('note: this model is causal, so [MASK] in the prompt is literal text', file=sys.stderr)
    ids = encode_prompt(prompt, meta, False)
    if not ids:
        die('--prompt must not be empty')
    _, decode = tokenizer(meta['tokenizer'])
    stop = None if args.no_stop else meta.get('eot_id')
    for n in range(args.num_samples):
        print(('-' * 40 + '\n' if n else '') + prompt.lstrip('\n'), end='', flush=True)
        text = codecs.getincrementaldecoder('utf-8')('replace')  # a character may be several tokens
        generator = torch.Generator().manual_seed(args.seed + n)
        new_ids = continuation(model, ids, meta['vocab_size'], context, args.temperature, args.top_k, generator)
        for _, i in zip(range(args.max_new_tokens), new_ids):
            if i == stop:
                break
            print(text.decode(decode(i)), end='', flush=True)
        print(text.decode(b'', final=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: die(f'{message} (see python sample.py --help)')
    parser.add_argument('--out_dir', help='a folder that train.py wrote (default: the newest in out/)')
    parser.add_argument('--ckpt', choices=('best', 'last'), help='which checkpoint (default best, else last)')
    parser.add_argument('--prompt', help='text to continue, or text with [MASK] in it')
    parser.add_argument('--num_samples', type=int, default=1, help='continuations (default 1)')
    parser.add_argument('--max_new_tokens', type=int, default=500, help='length of each (default 500)')
    parser.add_argument('--no-stop', action='store_true', help='continue after the token that ends a document')
    parser.add_argument('--temperature', type=float, default=0.8, help='0: always the most likely (default 0.8)')
    parser.add_argument('--top_k', type=int, default=0, help='draw from the k most likely tokens; 0: all (default 0)')
    parser.add_argument('--context', type=int, help='tokens that each new one sees; 0: no limit (default: block_size)')
    parser.add_argument('--seed', type=int, default=1, help='random seed of the draws (default 1)')
    best_device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    parser.add_argument('--device', default=best_device, help='default: cuda if available, else mps or cpu')
    args = parser.parse_args()
    for name, low in dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=0, context=0, seed=0).items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2 ** 63:
            die(f'--{name} must be at least {low} and under 2^63, not {value}')
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as e:
        die(f'--device {args.device} cannot be used here, {best_device} can: {one_line(e)}')
    if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook. A console prints ? for what it cannot show
        sys.stdout.reconfigure(errors='replace')
    model, checkpoint = load_run(args.out_dir, args.ckpt, args.device)
    command = print_filled if checkpoint['settings']['objective'] == 'masked' else print_continued
    command(model, checkpoint['meta'], args)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # sample.py | head
        sys.stderr.close()
