"""
How fast and how large is prepare_data.py? GPT-2 tokens of a 1 GB text, against tiktoken's own batch encoding.

    python experiments/prepare_speed.py --path enwik8.xz             # any text; it is repeated up to --megabytes
    python experiments/prepare_speed.py --path enwik8.xz --megabytes 50   # half a minute

Prints the rate of both on the same cores, tiktoken's encode_ordinary_batch on pieces of 1 MB (median of three runs over
50 MB), and the peak of resident memory of the process that prepares.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import prepare_data  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--path', required=True, help='a text file, .gz and .xz unpacked')
parser.add_argument('--megabytes', type=int, default=1000)
args = parser.parse_args()

text = ''.join(t for t, _ in prepare_data.from_file(Path(args.path), 'strict'))
raw = text.encode()
cores = len(os.sched_getaffinity(0))
prepare_data.tokenizer('gpt2')  # one clear line where the vocabulary cannot be had
enc = tiktoken.get_encoding('gpt2')
sample = [text[i:i + 2 ** 20] for i in range(0, len(text), 2 ** 20)][::max(1, len(text) // (50 * 2 ** 20))]  # from all over the text
size, rates = sum(len(s.encode()) for s in sample), []
for _ in range(3):
    began = time.time()
    enc.encode_ordinary_batch(sample, num_threads=cores)
    rates.append(size / 1e6 / (time.time() - began))
batch = statistics.median(rates)

with tempfile.TemporaryDirectory() as folder:
    with open(Path(folder, 'text.txt'), 'wb') as f:
        for _ in range(-(-args.megabytes * 10 ** 6 // len(raw))):
            f.write(raw)
    os.sync()  # the text is on the disk before the clock starts
    total = Path(folder, 'text.txt').stat().st_size / 1e6
    program = ('import prepare_data, re\nprepare_data.prepare("text", "gpt2", "text.txt")\n'
               'print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])')  # kB, the most it ever was (Linux)
    began = time.time()
    done = subprocess.run([sys.executable, '-c', program], cwd=folder, env={**os.environ, 'PYTHONPATH': str(REPO)}, stdout=subprocess.PIPE, check=True)
    seconds = time.time() - began
print(f'{cores} cores: prepare_data.py {total:.0f} MB in {seconds:.1f} s = {total / seconds:.1f} MB/s, start to end; '
      f"tiktoken's batch encoding {batch:.1f} MB/s; ratio {total / seconds / batch:.2f}; peak memory {int(done.stdout) / 1e3:.0f} MB")
