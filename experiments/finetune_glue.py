"""
Fine-tune pre-trained models on four tasks of GLUE and one of word order: how much does a position scheme help?

    python experiments/finetune_glue.py --out_dirs out/composite-masked-wikitext2 --quick    # a minute: does it run?
    python experiments/finetune_glue.py --out_dirs out/nope-masked-wikitext2 out/composite-masked-wikitext2
    python experiments/finetune_glue.py --out_dirs out/composite-masked-wikitext2 --tasks cola --glue GLUE
                                                                        # a folder: GLUE/CoLA/train.tsv, ...

Tables 1 and 6 of Chang et al. 2021, with their settings of fine-tuning (Table 5). Expect less: our models are smaller
and are pre-trained on far less data (theirs on 125,000 steps of 128 sequences of 128 BPE tokens), theirs learn MNLI
before MRPC and RTE, and their test columns are of the best of ten runs on dev. Here, as in their dev columns, it is the
mean of all runs. Inputs longer than block_size are cut.
`order` is not a task of GLUE or of the paper: were two neighboring words of one of CoLA's acceptable sentences swapped?
It needs positions as CoLA does, and much less grammar.
Writes experiments/results/finetune_glue[-<tasks>].csv and .png (with --quick in out/quick).
"""
import lzma
import statistics
from pathlib import Path

import numpy as np
import torch
from lib import Parser, die, line_panels, print_table, save, short_names, table_path, write_csv
from torch.nn import functional as F

from sample import load_run, tokenizer

TASKS = {  # task: folder of the local files, columns of the label and the texts there, epochs
    'order': ('CoLA', (1, 3), 5),
    'cola': ('CoLA', (1, 3), 3),
    'sst2': ('SST-2', (1, 0), 3),
    'mrpc': ('MRPC', (0, 3, 4), 3),
    'rte': ('RTE', (3, 1, 2), 10),
}
BATCH, LEARNING_RATE, WARMUP = 32, 3e-4, 0.1  # Chang et al., Table 5; no weight decay
HEADER = 'run', 'task', 'metric', 'seed', 'value'


def read_file(path, task):
    """Rows (label, text) or (label, text A, text B) of a local file."""
    opened = lzma.open if path.suffix == '.xz' else open
    with opened(path, 'rt', encoding='utf-8-sig', newline='\n') as f:
        # no csv reader: a " is an ordinary character
        lines = [line.rstrip('\r').split('\t') for line in f.read().split('\n') if line]
    label, *texts = TASKS[task][1]
    if lines[0][label] in ('label', 'Quality'):
        lines = lines[1:]
    number = {'entailment': 0, 'not_entailment': 1}.__getitem__ if task == 'rte' else int
    return [(number(line[label]), *(line[c] for c in texts)) for line in lines]


def swapped(rows):
    """CoLA's acceptable sentences, half of them with two neighboring inner words swapped: rows (swapped, text).

    The first and the last word stay: a capital or a full stop in the wrong place would show the swap.
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
        rows = read_file(train, task)
        if dev.is_file() or task != 'mrpc':
            return rows, read_file(dev, task)
        # MRPC was published without a dev set: GLUE holds out 408 pairs, we 408 others
        order = np.random.default_rng(1).permutation(len(rows))
        return [rows[i] for i in order[408:]], [rows[i] for i in order[:408]]
    except Exception as e:  # no network, no package, no such file, a damaged one: errors of many libraries
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
    """Tensors of ids, each of its own length -> (B, classes): the head reads the mean of hidden() over real tokens.

    The mean and not the first token: pre-training teaches no [CLS] here, and the first token is only a letter.
    """
    device = head.weight.device
    idx = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1).to(device)  # (B, T)
    valid = idx >= 0
    x = model.hidden(idx.clamp(min=0), valid)  # (B, T, C)
    return head(x.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True))  # (B, C) -> (B, classes)


def batches(lengths):
    """An epoch in random batches of row numbers, each of texts of similar lengths, so that there is little padding."""
    pools = [pool[lengths[pool].argsort()] for pool in torch.randperm(len(lengths)).split(16 * BATCH)]
    found = [rows for pool in pools for rows in pool.split(BATCH)]
    return [found[i] for i in torch.randperm(len(found))]


def finetune(model, texts, labels, dev, epochs):
    """Train model and a new head on texts and their labels -> predictions for the texts of dev, losses of the steps."""
    device = model.wte.weight.device
    head = torch.nn.Linear(model.config.n_embd, 2).to(device)
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
            logits = predict(model, head, [texts[i] for i in rows])  # (B, 2)
            loss = F.cross_entropy(logits, labels[rows].to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss.detach())
    model.eval()
    return answers(model, head, dev), torch.stack(losses).tolist()


@torch.no_grad()
def answers(model, head, texts):
    """The classes that model and head predict."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    parts = []
    for n in range(0, len(texts), BATCH):
        parts.append(predict(model, head, [texts[i] for i in order[n:n + BATCH]]))
    y = torch.cat(parts).argmax(1)  # (texts,)
    return y.cpu().numpy()[np.argsort(order)]  # back in the order of texts


def metrics(task, y, t):
    """{metric: percent} of predictions y where t is true."""
    found = {}
    if task == 'cola':  # Matthews' correlation is Pearson's of two 0/1 vectors; 0 where one of them is constant
        found['Matthews'] = 0.0 if np.ptp(y) == 0 or np.ptp(t) == 0 else np.corrcoef(y, t)[0, 1]
    else:
        if task == 'mrpc':
            found['F1'] = 2 * (y * t).sum() / max(1, (y + t).sum())  # 2 tp / (2 tp + fp + fn)
        found['accuracy'] = (y == t).mean()
    return {metric: 100 * float(value) for metric, value in found.items()}


def baseline(task, parts):
    """The metrics of a constant answer, the most common label of the training set."""
    y, t = (np.array([row[0] for row in rows]) for rows in parts)
    return metrics(task, np.full(len(t), np.bincount(y).argmax()), t)


def all_seeds(name, model, checkpoint, data, args):
    """{(run, task, metric): a value per seed} of a run."""
    encode, _ = tokenizer(checkpoint['meta']['tokenizer'])
    values = {}
    for task, (train, dev) in data.items():
        texts, dev_texts = ([tokens(row, encode, model.config.block_size) for row in rows] for rows in (train, dev))
        labels, t = (torch.tensor([row[0] for row in rows]) for rows in (train, dev))
        for seed in range(1, 1 + args.seeds):
            torch.manual_seed(seed)
            fresh = type(model)(model.config).to(model.wte.weight.device)
            fresh.load_state_dict(checkpoint['model'])
            some = torch.randperm(len(texts))[:args.examples]
            epochs = 1 if args.quick else TASKS[task][2]
            y, losses = finetune(fresh, [texts[i] for i in some], labels[some], dev_texts, epochs)
            found = metrics(task, y, t.numpy())
            for metric, value in found.items():
                values.setdefault((name, task, metric), []).append(value)
            result = ', '.join(f'{metric} {value:.1f}' for metric, value in found.items())
            print(f'{name} {task} seed {seed}: {len(losses)} steps, {result}', flush=True)
    return values


def score_table(values):
    """values {(run, task, metric): a value per seed} -> mean (standard deviation) by task and metric."""
    columns = list(dict.fromkeys(key[1:] for key in values))
    rows = []
    for run in dict.fromkeys(run for run, _, _ in values):
        cells = []
        for task, metric in columns:
            found = values.get((run, task, metric), [])
            spread = f' ({statistics.stdev(found):.1f})' if len(found) > 1 else ''
            cells.append(f'{statistics.mean(found):.1f}{spread}' if found else '-')
        rows.append((run, *cells))
    return ('run', *(f'{task}, {metric}' for task, metric in columns)), rows


def draw(values):
    """A panel for each task and metric, mean over the seeds."""
    panels = {}
    for (run, task, metric), found in values.items():
        panels.setdefault(f'{task}, {metric}', {})[run] = [0], [statistics.mean(found)]
    return line_panels(panels, '', 'percent on dev, mean over seeds', 'o', xticks=[])


def main():
    parser = Parser(__doc__, 'one seed, one epoch of 320 examples')
    parser.add_argument('--out_dirs', nargs='+', required=True, help='folders that train.py wrote')
    parser.add('--tasks', list(TASKS), nargs='+', choices=list(TASKS))
    parser.add('--seeds', 5, 1, 'seeds 1, 2, ... of head and batches')
    parser.add('--examples', 10 ** 9, 320, 'to train on, at most')
    parser.add_argument('--glue', help="folder of GLUE's .tsv files (or .tsv.xz) instead of a download: "
                                       "CoLA/train.tsv, CoLA/dev.tsv, SST-2/...")
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    data = {task: read(task, args.glue) for task in args.tasks}
    loaded = [load_run(out, None, device) for out in args.out_dirs]  # a missing one ends the script before any training
    values = {('baseline', task, metric): [value] for task, parts in data.items()
              for metric, value in baseline(task, parts).items()}
    for (model, checkpoint), name in zip(loaded, short_names(args.out_dirs)):
        values |= all_seeds(name, model, checkpoint, data, args)
    rows = [(*key, '' if key[0] == 'baseline' else seed, f'{value:.4f}')
            for key, found in values.items() for seed, value in enumerate(found, 1)]
    path = table_path(args, 'finetune_glue', *(args.tasks if args.tasks != list(TASKS) else []))
    write_csv(path, HEADER, rows)
    print_table(score_table(values))
    save(draw(values), path)


if __name__ == '__main__':
    main()
