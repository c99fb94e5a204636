"""
GPT-2's own weights as a run of ours, with its own positions or with another scheme.

    python experiments/from_gpt2.py --size gpt2 --out_dir out/gpt2            # downloaded by huggingface_hub: 0.5 GB
    python experiments/from_gpt2.py --path FOLDER --out_dir out/gpt2          # a copy of the hub's files
    python experiments/from_gpt2.py --size gpt2 --model composite --drop_positions --out_dir out/gpt2-composite
    python sample.py --out_dir out/gpt2 --prompt "The capital of France is"
    python train.py --eval_only --out_dir out/gpt2                            # on WikiText-2
    python train.py --resume --out_dir out/gpt2-composite --max_iters 500     # fine-tuning

Every other flag is one of train.py: settings of the fine-tuning, or fields of the model's Config.
GPT-2 (Radford et al. 2019) is model_nope.py with --absolute and --bias. Three things differ:
* GPT-2 stores its linear layers as (in, out); here they are transposed.
* Our embedding has 50,304 rows, GPT-2's 50,257. The other 47 are the mean of GPT-2's rows, so their logit is the mean
  logit. By Jensen's inequality its probability is below the mean probability, 1/50,257. All 47 together add at most
  log(50,304/50,257) = 0.0009 nats to a loss. sample.py never draws one of them.
* GPT-2 has the tanh approximation of GELU, our MLP the exact function.
The parameters of another scheme start at zero (convolutions before the attention: at one for the token itself), so
that the model computes the same function as GPT-2. Kernelized attention, rope, alibi and cape do not.
"""
import dataclasses
import json
import math
import pickle
from pathlib import Path

import torch
from lib import Parser, adamw, resolve
from train import atomic_write, die, load_model_file, one_line

SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
META = dict(tokenizer='gpt2', vocab_size=50257, mask_id=50257, sha256={})  # what sample.py and train.py ask for
ROWS = 50304  # of our embedding: the next multiple of 64
FINE_TUNING = dict(model='nope', dataset='wikitext2', batch_size=8, micro_batch_size=1, max_iters=500,
                   warmup_iters=50, learning_rate=1e-4)  # defaults; flags win, here and when train.py resumes
FIXED = 'objective causal absolute bias vocab_size block_size n_layer n_head n_embd'.split()  # GPT-2 decides them
KEPT = {'model_tisa': ('b', 'c')}  # width and center: if they were zero, all bumps would stay equal
DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
          'U8': torch.uint8, 'BOOL': torch.bool}


# ---------------------------------------------------------------------------------------------------------------------
# a folder in the hub's layout

def download(size):
    """Download config.json and model.safetensors, or find them in the hub's cache -> their folder."""
    try:
        from huggingface_hub import hf_hub_download
        files = [hf_hub_download(f'openai-community/{size}', name) for name in ('config.json', 'model.safetensors')]
        return Path(files[0]).parent
    except Exception as e:  # no network, no huggingface_hub, a full disk: errors of many libraries
        die(f'{size} cannot be downloaded: {type(e).__name__}: {one_line(e)}. Without a network: --path with a copy')


def read_shape(folder):
    """config.json of the hub -> the fields of our Config that it decides. Anything but a GPT-2 is refused."""
    path = folder / 'config.json'
    try:
        theirs = json.loads(path.read_text(encoding='utf-8'))
        names = dict(block_size='n_positions', n_layer='n_layer', n_head='n_head', n_embd='n_embd')
        shape = {ours: int(theirs[name]) for ours, name in names.items()}
    except (OSError, ValueError, TypeError, KeyError) as e:
        die(f'{path} is not the config.json of a GPT-2: {type(e).__name__} {one_line(e)}')
    allowed = dict(model_type=['gpt2'], vocab_size=[META['vocab_size']], n_inner=[None, 4 * shape['n_embd']],
                   activation_function=['gelu_new', 'gelu'], layer_norm_epsilon=[1e-5], scale_attn_weights=[True],
                   scale_attn_by_inverse_layer_idx=[False], tie_word_embeddings=[True])
    for name, values in allowed.items():
        if theirs.get(name, values[0]) not in values:
            die(f'{path}: {name} is {theirs[name]}; our models can be {" or ".join(map(str, values))} only')
    return dict(absolute=True, bias=True, vocab_size=ROWS, **shape)


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: the length of a header in 8 bytes, the header as JSON, the data."""
    with open(path, 'rb') as f:
        length = int.from_bytes(f.read(8), 'little')
        if length > path.stat().st_size:
            raise ValueError(f'a header of {length} bytes')
        header = json.loads(f.read(length))
        data = bytearray(f.read())
    header.pop('__metadata__', None)
    tensors = {}
    for name, about in header.items():
        begin, end = about['data_offsets']
        dtype = DTYPES[about['dtype']]
        flat = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin)
        tensors[name] = flat.view(about['shape'])
    return tensors


def read_weights(folder):
    """The tensors in a folder in the hub's layout -> {name without `transformer.`: float32 tensor}."""
    files = [folder / 'model.safetensors', folder / 'pytorch_model.bin']
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        die(f'{folder} has no model.safetensors and no pytorch_model.bin')
    try:
        if path.suffix == '.safetensors':
            tensors = read_safetensors(path)
        else:
            tensors = torch.load(path, map_location='cpu', weights_only=True)
        weights = {name.removeprefix('transformer.'): tensor.float() for name, tensor in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, EOFError,
            pickle.UnpicklingError) as e:
        die(f'{path} is damaged, or does not hold tensors only: {type(e).__name__} {one_line(e)}')
    return {name: w for name, w in weights.items() if not name.endswith(('.attn.bias', '.attn.masked_bias'))}  # masks


def translate(theirs, shape, folder):
    """GPT-2's tensors by the hub's names -> the state dict of model_nope.py with --absolute --bias."""
    head = theirs.get('lm_head.weight')
    theirs = {name: w for name, w in theirs.items() if name != 'lm_head.weight'}
    nope = load_model_file('nope')
    try:
        with torch.device('meta'):  # shapes without data
            wanted = nope.Model(nope.Config(**shape)).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as e:
        die(f'{folder / "config.json"} describes no GPT-2: {one_line(e)}')
    for what, names in (('lacks', wanted.keys() - theirs.keys()), ('also has', theirs.keys() - wanted.keys())):
        if names:
            die(f'the checkpoint in {folder} {what} {", ".join(sorted(names)[:3])} ({len(names)} tensors)')
    if head is not None and not torch.equal(head, theirs['wte.weight']):
        die(f'the checkpoint in {folder} has a head of its own; in our models it is the embedding')
    ours = {}
    for name, weight in theirs.items():
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            weight = weight.transpose(0, -1)  # (in, out) -> (out, in)
        size = list(wanted[name].shape)
        if name == 'wte.weight':
            size[0] = META['vocab_size']
        if list(weight.shape) != size:
            die(f'{name} in {folder} has the shape {list(weight.shape)}; by its config.json it should be {size}')
        ours[name] = weight
    wte = ours['wte.weight']
    ours['wte.weight'] = torch.cat((wte, wte.mean(0).expand(ROWS - len(wte), -1)))  # (50304, C)
    return ours


# ---------------------------------------------------------------------------------------------------------------------
# weights -> a run; take_positions_away.py does the same with a run of our own in place of GPT-2

def transplant(weights, model):
    """Load the weights of model_nope.py into a model of any scheme, in place -> names of the scheme's own tensors.

    Tensors that the scheme adds start at zero, so that they change nothing before the first step (exceptions: KEPT, and
    convolutions of queries, keys and values, which start at one for the token itself). wpe.weight is left out where the
    model has no absolute positions. Raises ValueError if another tensor has no place, or one is missing.
    """
    needed = {f'h.{len(model.h) - 1}.ln_1.weight', *(['wpe.weight'] if model.wpe is not None else [])}
    if needed - weights.keys():
        raise ValueError(f'the weights are of another model: they lack {", ".join(sorted(needed - weights.keys()))}')
    kept = KEPT.get(model.__module__, ())
    with torch.no_grad():
        for name, p in model.named_parameters():
            own = name.split('.')[-1]
            if name not in weights and own not in kept:
                p.zero_()
            if own in ('conv_q', 'conv_k', 'conv_v'):
                p[:, -1] = 1  # causal: the last entry is the token itself
    missing, left = model.load_state_dict(weights, strict=False)
    if set(left) - {'wpe.weight'}:
        raise ValueError(f'{model.__module__}.py has no place for {", ".join(left)}')
    return missing


def begin_run(out, words, weights, meta):
    """Write a run of train.py with these weights at step 0 -> the names of the tensors that the scheme adds.

    words: flags of train.py, vocab_size among them. weights: a state dict of model_nope.py. meta: what sample.py and
    train.py ask about the tokens.
    """
    settings, module, config = resolve(words)
    torch.manual_seed(settings.seed)
    try:
        model = module.Model(config)
        own = transplant(weights, model)
    except (ValueError, RuntimeError) as e:  # RuntimeError: another shape
        die(one_line(e))
    values = {**dataclasses.asdict(settings), **dataclasses.asdict(config)}
    checkpoint = dict(step=0, best=math.inf, losses=[], config=dataclasses.asdict(config),
                      settings=dataclasses.asdict(settings), meta=meta, model=model.state_dict(),
                      optimizer=adamw(model, settings.learning_rate, settings.weight_decay).state_dict())
    out.mkdir(parents=True, exist_ok=True)
    for name in ('log.csv', 'loss.png', 'ckpt_best.pt'):
        (out / name).unlink(missing_ok=True)
    atomic_write(out / 'config.json', lambda f: f.write(f'{json.dumps(values, indent=1)}\n'.encode()))
    atomic_write(out / 'ckpt_last.pt', lambda f: torch.save(checkpoint, f))
    return sorted({name.split('.')[-1] for name in own})


def arguments():
    """-> our own arguments, and the flags that go to train.py."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--size', choices=SIZES, help='download this one')
    source.add_argument('--path', type=Path, help='a folder with config.json and the weights, in the layout of the hub')
    parser.add_argument('--out_dir', type=Path, required=True, help='folder of the run')
    parser.add_argument('--overwrite', action='store_true', help='replace the run that --out_dir holds')
    parser.add_argument('--drop_positions', action='store_true', help="leave out GPT-2's positions (wpe)")
    args, words = parser.parse_known_args()
    for word in words:
        name = word.split('=')[0].removeprefix('--').removeprefix('no-')
        if name in FIXED:
            die(f'--{name} is decided by GPT-2' + ' and --drop_positions' * (name == 'absolute'))
        if name in ('resume', 'eval_only', 'config'):
            die(f'--{name} is for train.py: this script only begins a run')
    if (args.out_dir / 'config.json').exists() and not args.overwrite:
        die(f'{args.out_dir} holds a run: add --overwrite to replace it, or name another --out_dir')
    return args, words


def flags_of(values):
    return [f'--no-{k}' if v is False else f'--{k}' if v is True else f'--{k}={v}' for k, v in values.items()]


def main():
    args, words = arguments()
    folder = args.path or download(args.size)
    shape = read_shape(folder)
    weights = translate(read_weights(folder), shape, folder)
    shape['absolute'] = not args.drop_positions
    words = [*flags_of(FINE_TUNING), *words, *flags_of(shape), '--objective', 'causal', '--causal']
    own = begin_run(args.out_dir, words, weights, META)
    n = sum(w.numel() for w in weights.values()) / 1e6
    print(f'{args.out_dir}: {n:.1f}M weights, positions {"dropped" if args.drop_positions else "kept"}; '
          f'the scheme adds {", ".join(own) or "no tensor"}')


if __name__ == '__main__':
    main()
