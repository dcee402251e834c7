"""How fast steps are made, and how full packed rows are: the data pipeline alone, on the shipped text.

    python benchmarks/data_speed.py --windows 256,1024,4096 --json rows.json

Tokens per second of processor time, in one process and one thread, so that a busy machine changes them little. The
text is tokenised before the clock starts. "budget" is text cut task by task to fit 16,384 input and target tokens. Long
examples take more sentinels than the shipped tokenizer has, so there are as many here as Gemma 3 has, without pieces.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from encore.data.shards import resolve
from encore.data.steps import Steps
from encore.tokenizer import load_tokenizer
from encore.train.reading import open_reading
from encore.train.recipe_file import load_recipe


def measure(steps: Steps, examples: int) -> dict[str, Any]:
    """Whole pools of steps, at least `examples` examples."""
    shape = steps.shape if steps.packing else None
    used, places = np.zeros(2), np.zeros(2)
    pools = max(1, -(-examples // (steps.batch_size * steps.pool_steps)))
    begin = time.process_time()
    for step in range(pools * steps.pool_steps):
        for arrays in steps.arrays(step):
            for side, mask in enumerate((arrays["encoder_mask"], arrays["decoder_mask"])):
                if mask is not None:
                    used[side] += mask.sum()
                    places[side] += mask.size
    seconds = time.process_time() - begin
    fills = [round(float(share), 4) for share in used / np.maximum(places, 1)]
    return {
        "tokens_per_cpu_second": round(used.sum() / seconds),
        "encoder_fill": fills[0],
        "decoder_fill": fills[1],
        "row_tokens": [shape.encoder, shape.decoder] if shape else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--windows", default="256,1024,4096,budget", help="tokens of text per example, comma apart")
    parser.add_argument("--objectives", default="t5gemma2,ul2,prefixlm", help="mixtures, comma apart")
    parser.add_argument("--examples", type=int, default=1024, help="how many at least per line")
    parser.add_argument("--max-tokens", type=int, default=2_000_000, help="of the text, from its beginning")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    asked = parser.parse_args()
    tokenizer = load_tokenizer(resolve("asset:tokenizer"))
    tokenizer.sentinel_ids = tuple(range(tokenizer.vocab_size, tokenizer.vocab_size + 6142))
    rows: list[dict[str, Any]] = []
    for objective in asked.objectives.split(","):
        for window in asked.windows.split(","):
            lengths = ["data.lengths=budget", "data.max_source_tokens=16384", "data.max_target_tokens=16384"]
            changes = lengths if window == "budget" else [f"data.window_tokens={window}"]
            for pack in ("false", "true"):
                text = ["data.train=asset:text/train", f"data.max_tokens={asked.max_tokens}"]
                recipe = load_recipe(None, [*text, *changes, f"objective={objective}", f"data.pack={pack}"])
                steps = open_reading(recipe, tokenizer, encoder=True).steps
                row = {"objective": objective, "window": window, "packed": pack == "true"}
                rows.append(row | measure(steps, asked.examples))
                print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
