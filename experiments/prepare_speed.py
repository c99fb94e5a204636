"""
How fast and how large is prepare_data.py? GPT-2 tokens of a 1 GB text, against tiktoken's own batch encoding.

    python experiments/prepare_speed.py --path enwik8.xz                  # any text; it is repeated up to --megabytes
    python experiments/prepare_speed.py --path enwik8.xz --megabytes 50   # half a minute

Prints the rate of both on the same cores (tiktoken: encode_ordinary_batch on pieces of 1 MB, the median of three runs
over 50 MB) and the peak of resident memory of the process that prepares. Linux only: memory is read from /proc.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import prepare_data  # noqa: E402

# prints the most memory that the process ever had, in kB
PREPARE = r"""
import re
import prepare_data
prepare_data.prepare('text', 'gpt2', 'text.txt')
print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])
"""


def batch_rate(text, cores):
    """MB/s of tiktoken's own batch encoding, on pieces from all over the text."""
    encoding = prepare_data.load_tiktoken('gpt2')
    step = max(1, len(text) // (50 * 2 ** 20))
    sample = [text[i:i + 2 ** 20] for i in range(0, len(text), step * 2 ** 20)]
    megabytes = sum(len(piece.encode()) for piece in sample) / 1e6
    rates = []
    for _ in range(3):
        began = time.time()
        encoding.encode_ordinary_batch(sample, num_threads=cores)
        rates.append(megabytes / (time.time() - began))
    return statistics.median(rates)


def prepare_text(text, megabytes):
    """Prepare the text, repeated, in a process of its own -> its size in MB, seconds, peak memory in MB."""
    raw = text.encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'text.txt')
        with open(path, 'wb') as f:
            while f.tell() < megabytes * 1e6:
                f.write(raw)
        os.sync()  # the text is on the disk before the clock starts
        size = path.stat().st_size / 1e6
        env = {**os.environ, 'PYTHONPATH': str(REPO)}
        began = time.time()
        done = subprocess.run([sys.executable, '-c', PREPARE], cwd=folder, env=env, stdout=subprocess.PIPE, check=True)
        seconds = time.time() - began
    return size, seconds, int(done.stdout) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--path', required=True, help='a text file; .gz and .xz are unpacked')
    parser.add_argument('--megabytes', type=int, default=1000, help='size of the text to prepare (default 1000)')
    args = parser.parse_args()
    text = ''.join(part for part, _ in prepare_data.from_file(Path(args.path), 'strict'))
    if not text:
        prepare_data.die(f'--path {args.path} is empty')
    cores = len(os.sched_getaffinity(0))
    batch = batch_rate(text, cores)
    size, seconds, memory = prepare_text(text, args.megabytes)
    rate = size / seconds
    print(f'{cores} cores: prepare_data.py {size:.0f} MB in {seconds:.1f} s = {rate:.1f} MB/s, start to end; '
          f"tiktoken's batch encoding {batch:.1f} MB/s; ratio {rate / batch:.2f}; peak memory {memory:.0f} MB")


if __name__ == '__main__':
    main()
