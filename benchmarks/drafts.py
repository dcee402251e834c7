"""Drafts copied from the source: how many are accepted, what they save, and that nothing else changes.

    python benchmarks/drafts.py translator --sentences 500            # held-out sentences, greedy, with and without
    python benchmarks/drafts.py FOLDER --steps                        # what a step over 1, 2, 4, 8 tokens costs

Runs with and without drafts alternate, sentence by sentence, on one thread; seconds are the processor's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

import encore
from encore import assets
from encore.checkpoint.hub import resolve
from encore.export.manifest import is_exported
from encore.generate.backends import make_drafting, make_rows
from encore.generate.drafts import DraftSettings
from encore.generate.onnx_backend import OnnxModel
from encore.generate.rows import Size, make_requests
from encore.generate.sampling import SamplingSettings
from encore.generate.scheduler import Job, Scheduler, run_to_end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name, checkpoint or exported folder")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--steps", action="store_true", help="time steps of several tokens instead")
    options = parser.parse_args()
    folder = resolve(options.model)
    torch.set_num_threads(1)
    exported = is_exported(folder)
    model: Any = OnnxModel.load(folder, threads=1) if exported else encore.load(folder, dtype=torch.float32)
    if options.steps:
        time_steps(model)
    else:
        sources = [row["src"] for row in assets.read_jsonl("pairs/test.jsonl")][: options.sentences]
        tokenizer = encore.load_tokenizer(folder)
        compare(model, [tokenizer.encode_source(text) for text in sources], tokenizer)


def compare(model: Any, sources: list[list[int]], tokenizer: Any) -> None:
    settings = SamplingSettings(max_target_tokens=64)
    ways = {"without": None, "always": DraftSettings(max_tokens=4, adaptive=False), "adaptive": DraftSettings()}
    seconds, found = dict.fromkeys(ways, 0.0), {name: [] for name in ways}
    size = Size(1, max(map(len, sources)), settings.max_target_tokens, 8)
    running = {  # each goes on from sentence to sentence, as an engine does, and so learns what pays
        name: Scheduler(
            model.config,
            make_rows(model, size),
            1,
            drafting=None if drafts is None else make_drafting(drafts, model, size),
        )
        for name, drafts in ways.items()
    }
    for source in sources:
        for name, scheduler in running.items():
            started = time.thread_time()
            (request,) = make_requests(model, [source], settings, tokenizer)
            scheduler.add(Job(source, [request]))
            for _ in run_to_end(scheduler):
                pass
            found[name].append(request.result())
            seconds[name] += time.thread_time() - started
    for name in ("always", "adaptive"):
        answers = found[name]
        drafted, accepted = (sum(getattr(g, key) for g in answers) for key in ("drafted", "accepted"))
        tokens = sum(len(g.tokens) for g in answers)
        different = sum(a.tokens != b.tokens for a, b in zip(answers, found["without"], strict=True))
        row = {
            "drafts": name,
            "sentences": len(answers),
            "tokens": tokens,
            "drafted": drafted,
            "accepted": accepted,
            "acceptance": round(accepted / max(1, drafted), 3),
            "tokens_per_step": round(tokens / (tokens - accepted), 3),
            "different_targets": different,
            "near_ties": sum(g.near_ties for g in answers),
            "speed_up": round(seconds["without"] / seconds[name], 3),
        }
        print(json.dumps(row))


def time_steps(model: Any, rounds: int = 12) -> None:
    rows = make_rows(model, Size(1, 512, 256, 8))
    rows.join([[5 + i % 200 for i in range(512)]], [1])
    taken: dict[int, list[float]] = {}
    for _ in range(rounds):
        for width in (1, 2, 4, 8):
            started = time.thread_time()
            rows.step([[7] * width])
            taken.setdefault(width, []).append(time.thread_time() - started)
            rows.rollback([width - 1])
    middle = {width: statistics.median(times) for width, times in taken.items()}
    print(json.dumps({f"{width}_tokens_ms": round(1e3 * value, 2) for width, value in middle.items()}))
    print(
        json.dumps({f"{width}_tokens_ratio": round(float(np.divide(middle[width], middle[1])), 2) for width in middle})
    )


if __name__ == "__main__":
    main()
