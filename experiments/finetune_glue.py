"""
Fine-tune pre-trained models on five tasks of GLUE and one of word order, with several seeds: what is a position scheme worth to a reader?

    python experiments/finetune_glue.py --out_dirs out/composite-masked-wikitext2 --quick              # a minute on two CPU cores: does it run?
    python experiments/finetune_glue.py --out_dirs out/nope-masked-wikitext2 out/composite-masked-wikitext2 --scratch
    python experiments/finetune_glue.py --out_dirs out/composite-masked-wikitext2 --tasks cola --glue GLUE   # a folder GLUE/CoLA/train.tsv, ...

Tables 1 and 6 of Chang et al. 2021, with their settings of fine-tuning (Table 5). Their numbers for BERT-small, 13.4M parameters:

                CoLA (Matthews)   SST-2 (accuracy)   MRPC    RTE (accuracy)   STS-B
                test    dev       test    dev        test    test    dev      test
    none        13.9     7.0      81.9    80.9       77.9    62.0    61.0     79.3
    absolute    30.8    33.5      85.1    85.0       80.4    62.2    64.4     76.8
    fixed       42.1    38.3      87.1    86.9       83.8    64.4    64.7     81.4
    dynamic     39.1    38.4      87.3    86.8       83.8    64.4    65.1     81.4
    composite   40.4    40.9      87.8    86.9       85.0    64.7    66.1     82.1

Expect less: our models are smaller and have read far less (theirs 125,000 steps of 128 texts of 128 word pieces), theirs learn MNLI before
MRPC, RTE and STS-B, and the test columns are of the best of ten runs on dev; here, as in their dev columns, it is the mean of all. A model of
bytes with block_size 128 sees half of a usual pair of MRPC and RTE; schemes other than absolute can try --max_length 512.
`order` is not of GLUE, and not of the paper: were two neighbouring words of one of CoLA's good sentences swapped? It asks for positions
as CoLA does, and for far less grammar; a masked model without positions sees the same bag of letters either way.
Writes experiments/results/finetune_glue[-quick][-<tasks>].csv (run, task, metric, seed, value) and .png.
"""
import argparse
import csv
import itertools
import lzma
import statistics
from pathlib import Path

import numpy as np
import torch
from compare import COLORS
from lib import REPO, positive, pyplot, short_names
from torch.nn import functional as F

from sample import die, load_run, tokenizer

TASKS = {  # task: folder of the local files, columns of the label and the texts there, epochs
    'order': ('CoLA', (1, 3), 5),
    'cola': ('CoLA', (1, 3), 3),
    'sst2': ('SST-2', (1, 0), 3),
    'mrpc': ('MRPC', (0, 3, 4), 3),
    'rte': ('RTE', (3, 1, 2), 10),
    'stsb': ('STS-B', (4, 5, 6), 10),
}
BATCH, LEARNING_RATE, WARMUP = 32, 3e-4, 0.1  # Chang et al., Table 5; no weight decay


def table(path, task):
    """Rows (label, text) or (label, text A, text B) of a local file."""
    with (lzma.open if path.suffix == '.xz' else open)(path, 'rt', encoding='utf-8-sig', newline='\n') as f:
        lines = [line.rstrip('\r').split('\t') for line in f.read().split('\n') if line]  # no csv reader: a " is a " here
    label, *texts = (9, 7, 8) if task == 'stsb' and lines[0][0] == 'index' else TASKS[task][1]  # GLUE's STS-B, or the STS benchmark's
    number = {'entailment': 0, 'not_entailment': 1}.__getitem__ if task == 'rte' else float if task == 'stsb' else int
    header = lines[0][label] in ('label', 'Quality', 'score')
    return [(number(line[label]), *(line[c] for c in texts)) for line in lines[header:]]


def swapped(rows):
    """CoLA's good sentences with two inner words to swap, half of them with two neighbours swapped: rows (swapped or not, text).

    Not the first or the last word, whose capital or full stop would tell. Each sentence is there once.
    """
    rng, found = np.random.default_rng(1), []
    for label, text in rows:
        words = text.split()
        places = [i for i in range(1, len(words) - 2) if words[i] != words[i + 1]]
        if label and places:
            found.append((int(rng.integers(2)), words))
            if found[-1][0]:
                i = rng.choice(places)
                words[i:i + 2] = words[i + 1], words[i]
    return [(label, ' '.join(words)) for label, words in found]


def read(task, glue):
    """-> rows to train on, rows of dev."""
    if task == 'order':
        return [swapped(rows) for rows in read('cola', glue)]
    try:
        if glue is None:
            import datasets
            parts = datasets.load_dataset('nyu-mll/glue', task)
            names = [n for n in ('label', 'sentence', 'sentence1', 'sentence2') if n in parts['train'].column_names]
            return [[tuple(row[n] for n in names) for row in parts[part]] for part in ('train', 'validation')]
        folder = Path(glue, TASKS[task][0])
        train, dev = (next(folder.glob(f'{part}.tsv*'), folder / f'{part}.tsv') for part in ('train', 'dev'))
        rows = table(train, task)
        if dev.is_file() or task != 'mrpc':
            return rows, table(dev, task)
        order = np.random.default_rng(1).permutation(len(rows))  # MRPC was published without a dev set: GLUE holds out 408 pairs, we 408 others
        return [rows[i] for i in order[408:]], [rows[i] for i in order[:408]]
    except Exception as e:  # no network, no package, no such file, a broken one: many libraries, one line
        die(f'{task} cannot be read from {glue or "nyu-mll/glue"}: {type(e).__name__}: {" ".join(str(e).split())[:200]}'
            + '. Without a network, --glue takes a folder' * (glue is None))


def tokens(row, encode, T):
    """The text, or A, newline, B, as a tensor of at most T ids; of a pair the longer text is cut first, so that a part of both remains."""
    a, *b = (encode(text.strip()) for text in row[1:])
    if b:
        newline, b = encode('\n'), b[0]
        room = T - len(newline)
        a = a[:max(room - len(b), (room + 1) // 2)]
        a = [*a, *newline, *b[:room - len(a)]]
    return torch.tensor(a[:T])


def predict(model, head, texts):
    """Tensors of ids, each of its own length -> (B, classes): the head reads the mean of hidden() over the real tokens.

    The mean and not the first token: there is no [CLS] here that pre-training has taught anything, and the first token is but a letter.
    """
    device = head.weight.device
    idx = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1).to(device)  # (B, T)
    valid = idx >= 0
    x = model.hidden(idx.clamp(min=0), valid)  # (B, T, C)
    return head(x.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True))  # (B, C) -> (B, classes)


def batches(lengths):
    """An epoch in random batches of rows, each of texts of similar lengths: half of the tokens or more would be padding otherwise."""
    pools = [pool[lengths[pool].argsort()] for pool in torch.randperm(len(lengths)).split(16 * BATCH)]
    found = [rows for pool in pools for rows in pool.split(BATCH)]
    return [found[i] for i in torch.randperm(len(found))]


def finetune(model, texts, labels, dev, epochs):
    """Train model and a new head on texts and their labels -> predictions for the texts of dev, the loss of each step."""
    regression, device = labels.is_floating_point(), model.wte.weight.device
    head = torch.nn.Linear(model.config.n_embd, 1 if regression else 2).to(device)
    params = [*model.parameters(), *head.parameters()]
    steps, losses = epochs * -(-len(texts) // BATCH), []
    warmup = max(1, round(WARMUP * steps))
    optimizer = torch.optim.Adam(params, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warmup, (steps - n) / max(1, steps - warmup)))
    lengths = torch.tensor([len(text) for text in texts])
    model.train()
    for rows in (rows for _ in range(epochs) for rows in batches(lengths)):
        y, target = predict(model, head, [texts[i] for i in rows]), labels[rows].to(device)  # (B, classes), (B,)
        loss = F.mse_loss(y[:, 0], target) if regression else F.cross_entropy(y, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
    model.eval()
    order = sorted(range(len(dev)), key=lambda i: len(dev[i]))  # texts of one length together: little padding
    with torch.no_grad():
        y = torch.cat([predict(model, head, [dev[i] for i in order[n:n + BATCH]]) for n in range(0, len(dev), BATCH)])
    y = (y[:, 0].clamp(0, 5) if regression else y.argmax(1)).cpu().numpy()
    return y[np.argsort(order)], torch.stack(losses).tolist()  # y is back in the order of dev


def correlation(a, b):
    """Pearson's; of two 0/1 vectors it is Matthews'. 0 where one of them is constant."""
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.corrcoef(a, b)[0, 1])


def ranks(a):
    """1 for the smallest; equal values share the mean of their places."""
    _, place, count = np.unique(a, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def metrics(task, y, t):
    """{metric: percent} of predictions y where t is true; the first is the one of the picture."""
    if task == 'stsb':
        found = dict(Spearman=correlation(ranks(y), ranks(t)), Pearson=correlation(y, t))
    elif task == 'cola':
        found = dict(Matthews=correlation(y, t))
    else:
        found = dict(F1=2 * (y * t).sum() / max(1, (y + t).sum())) if task == 'mrpc' else {}  # 2 tp / (2 tp + fp + fn)
        found['accuracy'] = (y == t).mean()
    return {metric: 100 * float(value) for metric, value in found.items()}


def plot(values, path):
    """values {(run, task, metric): a value per seed}: a group of bars per task, a bar per run, a line where the baseline is."""
    plt = pyplot()
    first = {}  # the picture has one metric of each task
    for run, task, metric in values:
        first.setdefault(task, metric)
    runs = list(dict.fromkeys(run for run, _, _ in values if run != 'baseline'))
    fig, ax = plt.subplots(figsize=(3 + 1.4 * len(first), 4.5), layout='constrained')
    for x, (task, metric) in enumerate(first.items()):
        for n, run in enumerate(runs):
            found, scheme = values[run, task, metric], run.split(',')[0].rsplit('-', 1)[0]  # of compare.py's <scheme>-<seed>
            ax.bar(x + 0.8 * ((n + 0.5) / len(runs) - 0.5), statistics.mean(found), 0.76 / len(runs), color=COLORS.get(scheme, f'{0.9 - 0.8 * n / len(runs):.2f}'),
                   alpha=0.4 if ',' in run else 1, yerr=statistics.stdev(found) if len(found) > 1 else None, capsize=3, label=None if x else run)
        ax.hlines(values['baseline', task, metric], x - 0.45, x + 0.45, color='black', ls='--', label=None if x else 'baseline')
    ax.set_xticks(range(len(first)), [f'{task}\n{metric}' for task, metric in first.items()])
    ax.set(title='fine-tuned on GLUE, all seeds', xlabel='task and metric', ylabel='percent on dev, mean and std over seeds')
    fig.legend(loc='outside lower center', fontsize=8, ncols=4)
    fig.savefig(path, dpi=120, bbox_inches='tight')
    print(f'\nwrote {path} and its .csv; the baseline answers the commonest label of the training set, or its mean score')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dirs', nargs='+', required=True, help='folders that train.py wrote')
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS), help='default: all')
    parser.add_argument('--seeds', type=positive, default=5, help='seeds 1, 2, ... of head and batches (default 5)')
    parser.add_argument('--examples', type=positive, help='to train on, at most (default: all)')
    parser.add_argument('--max_length', type=positive, help='of a text or pair in tokens; longer ones are cut (default: the block_size of the training)')
    parser.add_argument('--glue', help="folder of GLUE's .tsv files (or .tsv.xz) instead of a download: CoLA/train.tsv, CoLA/dev.tsv, SST-2/...")
    parser.add_argument('--scratch', action='store_true', help='each run also from random weights of the same config: what is pre-training worth?')
    parser.add_argument('--quick', action='store_true', help='one seed, one epoch of 320 examples')
    parser.add_argument('--results', default=str(REPO / 'experiments' / 'results'), help='folder of the table and the picture')
    args = parser.parse_args()
    names = short_names(args.out_dirs)
    if (args.max_length or 3) < 3:
        die('--max_length must be at least 3: both texts of a pair and what parts them')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    print(f'device: {device}', flush=True)
    data, values = {task: read(task, args.glue) for task in args.tasks}, {}  # values {(run, task, metric): a value per seed}
    for task, parts in data.items():
        y, t = (np.array([row[0] for row in rows]) for rows in parts)
        constant = np.full(len(t), y.mean() if task == 'stsb' else np.bincount(y).argmax())  # the best answer of one who does not read
        values |= {('baseline', task, metric): [value] for metric, value in metrics(task, constant, t).items()}
    loaded = [load_run(out, None, device) for out in args.out_dirs]  # all at once: what is missing is missed before the hours of work
    if any(model.config.absolute and (args.max_length or 0) > model.config.block_size for model, _ in loaded):
        die('absolute positions end at the block_size of their run, and so must --max_length')
    for (model, checkpoint), name in zip(loaded, names):
        encode, T = tokenizer(checkpoint['meta']['tokenizer'])[0], args.max_length or model.config.block_size
        for task, parts in data.items():
            texts, dev = ([tokens(row, encode, T) for row in rows] for rows in parts)
            labels, t = (torch.tensor([row[0] for row in rows]) for rows in parts)
            for run, seed in itertools.product([name, f'{name}, random weights'][:1 + args.scratch], range(1, 1 + (1 if args.quick else args.seeds))):
                torch.manual_seed(seed)
                fresh = type(model)(model.config).to(device)
                if run == name:
                    fresh.load_state_dict(checkpoint['model'])
                some = torch.randperm(len(texts))[:min(320, args.examples or 320) if args.quick else args.examples]
                y, losses = finetune(fresh, [texts[i] for i in some], labels[some], dev, 1 if args.quick else TASKS[task][2])
                found, tenth = metrics(task, y, t.numpy()), -(-len(losses) // 10)
                for metric, value in found.items():
                    values.setdefault((run, task, metric), []).append(value)
                print(f'{run} {task} seed {seed}: {len(losses)} steps, loss {statistics.mean(losses[:tenth]):.3f} -> '
                      f'{statistics.mean(losses[-tenth:]):.3f}, ' + ', '.join(f'{metric} {value:.1f}' for metric, value in found.items()), flush=True)

    path = Path(args.results, '-'.join(['finetune_glue', *(['quick'] if args.quick else []), *(args.tasks if args.tasks != list(TASKS) else [])]) + '.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    print('\n| run | task | metric | mean on dev | standard deviation | seeds | baseline |\n|---|---|---|---|---|---|---|')
    with open(path.with_suffix('.csv'), 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerow(('run', 'task', 'metric', 'seed', 'value'))
        for (run, task, metric), found in values.items():
            writer.writerows((run, task, metric, seed if run != 'baseline' else '', f'{value:.4f}') for seed, value in enumerate(found, 1))
            if run != 'baseline':
                mean, spread = statistics.mean(found), f'{statistics.stdev(found):.2f}' if len(found) > 1 else '-'
                print(f'| {run} | {task} | {metric} | {mean:.2f} | {spread} | {len(found)} | {values["baseline", task, metric][0]:.2f} |')
    plot(values, path)


if __name__ == '__main__':
    main()
