"""What a run waits for before its first step, with a token cache and tokenising on the fly: time, memory, disk.

    python benchmarks/data_start.py --megabytes 300

Each way in a process of its own, over the same JSONL file, drawn from the shipped text; seconds are processor time of
one thread, so that a busy machine changes them little. Then steps of 16 windows of 512 tokens are made for a while.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from encore.data.shards import resolve
from encore.tokenizer import load_tokenizer
from encore.train.reading import open_reading
from encore.train.recipe_file import load_recipe


def write_text(path: Path, size: int) -> None:
    """`size` bytes of records, stretches of the shipped documents."""
    with lzma.open(resolve("asset:text/train"), "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    numbers = random.Random(0)
    with open(path, "w", encoding="utf-8") as out:
        while out.tell() < size:
            text, length = numbers.choice(texts), numbers.randint(500, 6000)
            start = numbers.randrange(max(1, len(text) - length))
            out.write(json.dumps({"text": text[start : start + length]}, ensure_ascii=False) + "\n")


def measure(text: Path, folder: Path, *, cache: bool, seconds: float) -> dict[str, Any]:
    """Start, and make steps for some seconds."""
    data = [f"data.train={text}", f"data.cache={str(cache).lower()}", f"data.cache_folder={folder}"]
    recipe = load_recipe(None, [*data, "objective=t5gemma2", "data.window_tokens=512", "train.batch_size=16"])
    begin = time.process_time()
    reading = open_reading(recipe, load_tokenizer(resolve("asset:tokenizer")), encoder=True)
    reading.steps.arrays(0)
    started, tokens, step = time.process_time() - begin, 0, 1
    while (took := time.process_time() - begin - started) < seconds:
        tokens += sum(int(a["encoder_mask"].sum() + a["decoder_mask"].sum()) for a in reading.steps.arrays(step))  # pyright: ignore
        step += 1
    return {
        "cache": cache,
        "start_cpu_seconds": round(started, 1),
        "tokens_per_cpu_second": round(tokens / took),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "disk_megabytes": round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1),
        "text_tokens": reading.sources[0].tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=300, help="of text")
    parser.add_argument("--seconds", type=float, default=8, help="how long to make steps")
    parser.add_argument("--one", nargs=3, metavar=("TEXT", "FOLDER", "CACHE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        text, folder, cache = asked.one
        print(json.dumps(measure(Path(text), Path(folder), cache=cache == "True", seconds=asked.seconds)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        write_text(text, int(asked.megabytes * 1e6))
        for cache in (False, True):
            one = ["--one", str(text), str(Path(scratch) / f"cache-{cache}"), str(cache)]
            environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--seconds", str(asked.seconds), *one]
            subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
