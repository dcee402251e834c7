"""What packed weights cost in quality: the shipped translator exported in each kind, on the held-out sentences.

    python benchmarks/exported_quality.py --sentences 1000

One row per kind of weights: size of the folder, bits per weight, BLEU and chrF against all references, and how many
answers are, letter for letter, those of the bfloat16 checkpoint run by torch in float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from encore import assets
from encore.evaluate.translation import corpus_scores
from encore.export.folder import export
from encore.generate.sampling import SamplingSettings
from encore.generate.text import TextGenerator

KINDS = ("float32", "int8", "int8-head-int4", "int4")


def answers(model: str | Path, sentences: list[str], dtype: torch.dtype | None = None) -> tuple[list[str], float]:
    """Greedy translations and the seconds they took, loading not included."""
    generator = TextGenerator.load(model, dtype=dtype)
    start = time.perf_counter()
    found = [a.text.strip() for a in generator.generate(sentences, SamplingSettings(max_target_tokens=64))]
    return found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="translator")
    parser.add_argument("--sentences", type=int, default=1000)
    args = parser.parse_args()
    rows = list(assets.read_jsonl("pairs/test.jsonl"))[: args.sentences]
    sentences, references = [row["src"] for row in rows], [row["refs"] for row in rows]

    def report(kind: str, found: list[str], seconds: float, **more: object) -> None:
        bleu, chrf = corpus_scores(found, references)
        same = sum(one == other for one, other in zip(found, exact, strict=True))
        row = {"weights": kind, "bleu": round(bleu, 2), "chrf": round(chrf, 2), "same_answers": same}
        print(json.dumps({**row, "seconds": round(seconds, 1), **more}), flush=True)

    exact, seconds = answers(args.model, sentences, torch.float32)
    report("torch float32", exact, seconds)
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            written = export(args.model, Path(folder) / kind, kind)
            size = sum(path.stat().st_size for path in (Path(folder) / kind).iterdir())
            found, seconds = answers(Path(folder) / kind, sentences)
            report(kind, found, seconds, bits_per_weight=round(written.bits_per_weight, 2), folder_bytes=size)


if __name__ == "__main__":
    main()
