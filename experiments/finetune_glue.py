"""
Fine-tune pre-trained models on five tasks of GLUE and one of word order, with several seeds: how much does a position
scheme help a reader?

    python experiments/finetune_glue.py --out_dirs out/composite-masked-wikitext2 --quick    # a minute: does it run?
    python experiments/finetune_glue.py --out_dirs out/nope-masked-wikitext2 out/composite-masked-wikitext2 --scratch
    python experiments/finetune_glue.py --out_dirs out/composite-masked-wikitext2 --tasks cola --glue GLUE
                                                                        # a folder: GLUE/CoLA/train.tsv, ...

Tables 1 and 6 of Chang et al. 2021, with their settings of fine-tuning (Table 5). Their numbers for BERT-small, 13.4M
parameters:

                CoLA (Matthews)   SST-2 (accuracy)   MRPC    RTE (accuracy)   STS-B
                test    dev       test    dev        test    test    dev      test
    none        13.9     7.0      81.9    80.9       77.9    62.0    61.0     79.3
    absolute    30.8    33.5      85.1    85.0       80.4    62.2    64.4     76.8
    fixed       42.1    38.3      87.1    86.9       83.8    64.4    64.7     81.4
    dynamic     39.1    38.4      87.3    86.8       83.8    64.4    65.1     81.4
    composite   40.4    40.9      87.8    86.9       85.0    64.7    66.1     82.1

Expect less: our models are smaller and have read far less (theirs 125,000 steps of 128 texts of 128 word pieces),
theirs learn MNLI before MRPC, RTE and STS-B, and their test columns are of the best of ten runs on dev. Here, as in
their dev columns, it is the mean of all runs. A model of bytes with block_size 128 sees half of a typical pair of MRPC
and RTE; schemes other than absolute can try --max_length 512.
`order` is not a task of GLUE or of the paper: were two neighbouring words of one of CoLA's good sentences swapped? It
needs positions as CoLA does, and much less grammar; a masked model without positions sees the same bag of letters in
both cases.
Writes experiments/results/finetune_glue[-<tasks>].csv (run, task, metric, seed, value) and .png; with --quick
out/quick/finetune_glue-quick[-<tasks>].
"""
import argparse
import lzma
import statistics
from pathlib import Path

import numpy as np
import torch
from compare import colors
from lib import common_flags, parse, positive, pyplot, save, short_names, write_csv
from torch.nn import functional as F

from common import die
from sample import load_run, tokenizer

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
    opened = lzma.open if path.suffix == '.xz' else open
    with opened(path, 'rt', encoding='utf-8-sig', newline='\n') as f:
        # no csv reader: a " is a character like others
        lines = [line.rstrip('\r').split('\t') for line in f.read().split('\n') if line]
    label, *texts = TASKS[task][1]
    if task == 'stsb' and lines[0][0] == 'index':  # GLUE's own STS-B; TASKS has the columns of the STS benchmark
        label, *texts = 9, 7, 8
    if lines[0][label] in ('label', 'Quality', 'score'):
        lines = lines[1:]
    return [(number(line[label], task), *(line[c] for c in texts)) for line in lines]


def number(label, task):
    if task == 'rte':
        return {'entailment': 0, 'not_entailment': 1}[label]
    return float(label) if task == 'stsb' else int(label)


def swapped(rows):
    """CoLA's good sentences with inner words to swap, half of them with two neighbours swapped: rows (swapped, text).

    The first and the last word stay: a capital or a full stop in the wrong place would show the swap. Each sentence is
    there once.
    """
    rng = np.random.default_rng(1)
    found = []
    for good, text in rows:
        words = text.split()
        places = [i for i in range(1, len(words) - 2) if words[i] != words[i + 1]]
        if not (good and places):
            continue
        swap = int(rng.integers(2))
        if swap:
            i = rng.choice(places)
            words[i:i + 2] = words[i + 1], words[i]
        found.append((swap, ' '.join(words)))
    return found


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
        train = next(folder.glob('train.tsv*'), folder / 'train.tsv')
        dev = next(folder.glob('dev.tsv*'), folder / 'dev.tsv')
        rows = table(train, task)
        if dev.is_file() or task != 'mrpc':
            return rows, table(dev, task)
        # MRPC was published without a dev set: GLUE holds out 408 pairs, we 408 others
        order = np.random.default_rng(1).permutation(len(rows))
        return [rows[i] for i in order[408:]], [rows[i] for i in order[:408]]
    except Exception as e:  # no network, no package, no such file, a broken one: many libraries, one line
        reason = ' '.join(str(e).split())[:200]
        hint = '. Without a network, --glue takes a folder' if glue is None else ''
        die(f'{task} cannot be read from {glue or "nyu-mll/glue"}: {type(e).__name__}: {reason}{hint}')


def tokens(row, encode, T):
    """The text, or A, newline, B, as a tensor of at most T ids. Of a pair the longer text is cut first: both remain."""
    a, *others = (encode(text.strip() or '\n') for text in row[1:])  # an empty text is a newline: a model needs a token
    if others:
        b = others[0]
        newline = encode('\n')
        room = T - len(newline)
        a = a[:max(room - len(b), (room + 1) // 2)]
        a = [*a, *newline, *b[:room - len(a)]]
    return torch.tensor(a[:T])


def predict(model, head, texts):
    """Tensors of ids, each of its own length -> (B, classes): the head reads the mean of hidden() over the real tokens.

    The mean and not the first token: pre-training teaches no [CLS] here, and the first token is only a letter.
    """
    device = head.weight.device
    idx = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1).to(device)  # (B, T)
    valid = idx >= 0
    x = model.hidden(idx.clamp(min=0), valid)  # (B, T, C)
    return head(x.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True))  # (B, C) -> (B, classes)


def batches(lengths):
    """An epoch in random batches of rows, each of texts of similar lengths, so that little is padding."""
    pools = [pool[lengths[pool].argsort()] for pool in torch.randperm(len(lengths)).split(16 * BATCH)]
    found = [rows for pool in pools for rows in pool.split(BATCH)]
    return [found[i] for i in torch.randperm(len(found))]


def finetune(model, texts, labels, dev, epochs):
    """Train model and a new head on texts and their labels -> predictions for the texts of dev, losses of the steps."""
    regression = labels.is_floating_point()
    device = model.wte.weight.device
    head = torch.nn.Linear(model.config.n_embd, 1 if regression else 2).to(device)
    params = [*model.parameters(), *head.parameters()]
    steps = epochs * -(-len(texts) // BATCH)
    warmup = max(1, round(WARMUP * steps))

    def rate(step):
        """As a share of LEARNING_RATE: a linear warm-up, then linearly to 0."""
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    optimizer = torch.optim.Adam(params, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    lengths = torch.tensor([len(text) for text in texts])
    losses = []
    model.train()
    for _ in range(epochs):
        for rows in batches(lengths):
            y = predict(model, head, [texts[i] for i in rows])  # (B, classes)
            target = labels[rows].to(device)  # (B,)
            loss = F.mse_loss(y[:, 0], target) if regression else F.cross_entropy(y, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss.detach())
    model.eval()
    return answers(model, head, dev, regression), torch.stack(losses).tolist()


@torch.no_grad()
def answers(model, head, texts, regression):
    """What model and head predict: scores from 0 to 5, or classes."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one length together: little padding
    parts = []
    for n in range(0, len(texts), BATCH):
        parts.append(predict(model, head, [texts[i] for i in order[n:n + BATCH]]))
    y = torch.cat(parts)  # (texts, classes)
    y = y[:, 0].clamp(0, 5) if regression else y.argmax(1)
    return y.cpu().numpy()[np.argsort(order)]  # back in the order of texts


def correlation(a, b):
    """Pearson's; of two 0/1 vectors it is Matthews'. 0 where one of them is constant."""
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.corrcoef(a, b)[0, 1])


def ranks(a):
    """1 for the smallest; equal values share the mean of their places."""
    _, place, count = np.unique(a, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def metrics(task, y, t):
    """{metric: percent} of predictions y where t is true; the picture shows the first."""
    found = {}
    if task == 'stsb':
        found['Spearman'] = correlation(ranks(y), ranks(t))
        found['Pearson'] = correlation(y, t)
    elif task == 'cola':
        found['Matthews'] = correlation(y, t)
    else:
        if task == 'mrpc':
            found['F1'] = 2 * (y * t).sum() / max(1, (y + t).sum())  # 2 tp / (2 tp + fp + fn)
        found['accuracy'] = (y == t).mean()
    return {metric: 100 * float(value) for metric, value in found.items()}


def baseline(task, parts):
    """The metrics of an answer that does not read: the most common label of the training set, or its mean score."""
    y, t = (np.array([row[0] for row in rows]) for rows in parts)
    constant = y.mean() if task == 'stsb' else np.bincount(y).argmax()
    return metrics(task, np.full(len(t), constant), t)


def draw(values):
    """values {(run, task, metric): a value per seed}: bars in a group per task, one per run, a line at the baseline."""
    first = {}  # the picture has one metric of each task
    for _, task, metric in values:
        first.setdefault(task, metric)
    runs = list(dict.fromkeys(run for run, _, _ in values if run != 'baseline'))
    schemes = {run: run.split(',')[0].rsplit('-', 1)[0] for run in runs}  # of compare.py's <scheme>-<seed>
    color = colors(dict.fromkeys(schemes.values()))
    fig, ax = pyplot().subplots(figsize=(3 + 1.4 * len(first), 4.5), layout='constrained')
    for x, (task, metric) in enumerate(first.items()):
        for n, run in enumerate(runs):
            if (run, task, metric) not in values:
                continue
            found = values[run, task, metric]
            place = x + 0.8 * ((n + 0.5) / len(runs) - 0.5)
            spread = statistics.stdev(found) if len(found) > 1 else None
            ax.bar(place, statistics.mean(found), 0.76 / len(runs), color=color[schemes[run]],
                   alpha=0.4 if 'random weights' in run else 1, yerr=spread, capsize=3, label=None if x else run)
        ax.hlines(values['baseline', task, metric], x - 0.45, x + 0.45, color='black', ls='--',
                  label=None if x else 'baseline')
    ax.set_xticks(range(len(first)), [f'{task}\n{metric}' for task, metric in first.items()])
    ax.set(title='fine-tuned on GLUE, all seeds', xlabel='task and metric',
           ylabel='percent on dev, mean and std over seeds')
    fig.legend(loc='outside lower center', fontsize=8, ncols=4)
    return fig


def one_run(model, task, texts, labels, dev, t, args):
    """Fine-tune one model on texts with labels, test it on dev with t -> {metric: percent}, the losses."""
    some = torch.randperm(len(texts))[:args.examples]
    epochs = 1 if args.quick else TASKS[task][2]
    y, losses = finetune(model, [texts[i] for i in some], labels[some], dev, epochs)
    return metrics(task, y, t.numpy()), losses


def all_seeds(name, model, checkpoint, data, args):
    """{(run, task, metric): a value per seed} of a run, and with --scratch of its model with random weights."""
    encode, _ = tokenizer(checkpoint['meta']['tokenizer'])
    T = args.max_length or model.config.block_size
    runs = [name, f'{name}, random weights'] if args.scratch else [name]
    values = {}
    for task, (train, dev) in data.items():
        texts = [tokens(row, encode, T) for row in train]
        labels = torch.tensor([row[0] for row in train])
        dev_texts = [tokens(row, encode, T) for row in dev]
        t = torch.tensor([row[0] for row in dev])
        for run in runs:
            for seed in range(1, 1 + args.seeds):
                torch.manual_seed(seed)
                fresh = type(model)(model.config).to(model.wte.weight.device)
                if run == name:
                    fresh.load_state_dict(checkpoint['model'])
                found, losses = one_run(fresh, task, texts, labels, dev_texts, t, args)
                for metric, value in found.items():
                    values.setdefault((run, task, metric), []).append(value)
                tenth = -(-len(losses) // 10)
                begin = statistics.mean(losses[:tenth])
                end = statistics.mean(losses[-tenth:])
                result = ', '.join(f'{metric} {value:.1f}' for metric, value in found.items())
                print(f'{run} {task} seed {seed}: {len(losses)} steps, loss {begin:.3f} -> {end:.3f}, {result}',
                      flush=True)
    return values


def print_table(values):
    print('\n| run | task | metric | mean on dev | standard deviation | seeds | baseline |\n|' + '---|' * 7)
    for (run, task, metric), found in values.items():
        if run == 'baseline':
            continue
        mean = statistics.mean(found)
        spread = f'{statistics.stdev(found):.2f}' if len(found) > 1 else '-'
        base = values['baseline', task, metric][0]
        print(f'| {run} | {task} | {metric} | {mean:.2f} | {spread} | {len(found)} | {base:.2f} |')
    print('\nThe baseline always answers the most common label of the training set, or its mean score.')


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dirs', nargs='+', required=True, help='folders that train.py wrote')
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS), help='default: all')
    parser.add_argument('--seeds', type=positive, default=5, help='seeds 1, 2, ... of head and batches (default 5)')
    parser.add_argument('--examples', type=positive, help='to train on, at most (default: all)')
    parser.add_argument('--max_length', type=positive, help='of a text or pair in tokens; longer ones are cut '
                                                            '(default: the block_size of the training)')
    parser.add_argument('--glue', help="folder of GLUE's .tsv files (or .tsv.xz) instead of a download: "
                                       "CoLA/train.tsv, CoLA/dev.tsv, SST-2/...")
    parser.add_argument('--scratch', action='store_true',
                        help='each run also from random weights of the same config: how much does pre-training help?')
    common_flags(parser, 'one seed, one epoch of 320 examples', dataset=False)
    args = parse(parser)
    if (args.max_length or 3) < 3:
        die('--max_length must be at least 3: both texts of a pair and the newline between them')
    if args.quick:
        args.seeds = 1
        args.examples = min(320, args.examples or 320)
    return args


def main():
    args = arguments()
    names = short_names(args.out_dirs)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    print(f'device: {device}', flush=True)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32, as in train.py
    data = {task: read(task, args.glue) for task in args.tasks}
    loaded = [load_run(out, None, device) for out in args.out_dirs]  # all now: a missing one ends the script at once
    for model, _ in loaded:
        if model.config.absolute and (args.max_length or 0) > model.config.block_size:
            die('absolute positions end at the block_size of their run, and so must --max_length')
    values = {}  # {(run, task, metric): a value per seed}
    for task, parts in data.items():
        for metric, value in baseline(task, parts).items():
            values['baseline', task, metric] = [value]
    for (model, checkpoint), name in zip(loaded, names):
        values |= all_seeds(name, model, checkpoint, data, args)

    rows = []
    for (run, task, metric), found in values.items():
        for seed, value in enumerate(found, 1):
            rows.append((run, task, metric, '' if run == 'baseline' else seed, f'{value:.4f}'))
    parts = ['finetune_glue', *(['quick'] if args.quick else []), *(args.tasks if args.tasks != list(TASKS) else [])]
    path = write_csv(args.results, '-'.join(parts), ('run', 'task', 'metric', 'seed', 'value'), rows)
    print_table(values)
    save(draw(values), path)


if __name__ == '__main__':
    main()
