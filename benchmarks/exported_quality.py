"""What packed weights and a packed cache cost in quality: the shipped translator on the held-out sentences.

    python benchmarks/exported_quality.py --sentences 1000
    python benchmarks/exported_quality.py --sentences 200 --only int4/32,int4/32/gptq

One row per way to run it, named WEIGHTS/BLOCK[/gptq][/cache8][/blocks][/two-pass][/preview-WIDTH]: bits per weight
(scales included), folder size, loss of the references in nats per token, BLEU and chrF against all references, and how
many answers are, letter for letter, those of torch in float32. Without gptq weights are rounded to nearest; gptq reads
pairs of the training data. The encoder's layers are int8 with a scale for each token (`--activations int8-rows`); with
blocks or gptq they are packed like the decoder's. two-pass reads the int8 head in two passes, as is the default for
large vocabularies; preview-WIDTH sees the head in a view so wide, which leaves no exact loss.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import cast

import torch

from encore import assets
from encore.evaluate.translation import corpus_scores
from encore.export.folder import export
from encore.generate.sampling import SamplingSettings
from encore.generate.score import score
from encore.generate.text import TextGenerator
from encore.quantize.blocks import PackedKind
from encore.quantize.folder import quantize

CALIBRATION = "asset:pairs/train"
WAYS = (
    "float32/0",
    "float32/0/cache8",
    "int8/128",
    "int8/128/cache8",
    "int8/128/two-pass",
    *(f"{weights}/128/preview-{width}" for weights in ("int8", "int4") for width in (96, 128)),
    "int8/128/blocks",
    *(f"{weights}/{block}{method}" for weights in ("int8-head-int4", "int4") for block in (32, 64, 128)
      for method in ("", "/blocks", "/gptq")),
)  # fmt: skip


def measure(
    generator: TextGenerator, rows: list[dict], answer: bool, scored: bool = True
) -> tuple[dict[str, float], list[str]]:
    """With `scored` the loss and the seconds it took; with `answer` greedy translations too."""
    tokenizer, start, found = generator.tokenizer, time.perf_counter(), dict[str, float]()
    if scored:
        sources = [tokenizer.encode_source(row["src"]) for row in rows]
        scores = score(generator.model, sources, [tokenizer.encode_target(row["tgt"]) for row in rows], batch_size=32)
        found["loss"] = round(-sum(s.total for s in scores) / sum(len(s.tokens) for s in scores), 4)
        found["score_seconds"] = round(time.perf_counter() - start, 1)
    answers: list[str] = []
    if answer:
        start, settings = time.perf_counter(), SamplingSettings(max_target_tokens=64)
        answers = [given.text.strip() for given in generator.generate([row["src"] for row in rows], settings)]
        bleu, chrf = corpus_scores(answers, [row["refs"] for row in rows])
        found |= {"bleu": round(bleu, 2), "chrf": round(chrf, 2)}
        found["answer_seconds"] = round(time.perf_counter() - start, 1)
    return found, answers


def write(model: str, way: str, scratch: Path, num_examples: int) -> tuple[Path, dict[str, float]]:
    """Export one way; its folder, bits per weight and size."""
    weights, block, *rest = way.split("/")
    out, block_size = scratch / "exported", int(block) or None
    source: str | Path = model
    if "gptq" in rest:
        source = scratch / "packed"
        kind, files = cast(PackedKind, weights), (CALIBRATION,)
        quantize(model, source, kind, block_size=block_size, calibrate=files, num_examples=num_examples, force=True)
    cache = "int8" if "cache8" in rest else "float32"
    activations = "int8" if {"blocks", "gptq"} & set(rest) else "int8-rows"
    options = {"block_size": block_size, "cache": cache, "activations": activations, "force": True}
    options["two_pass_head"] = "two-pass" in rest
    options["head_preview"] = next((int(flag.removeprefix("preview-")) for flag in rest if "preview-" in flag), None)
    written = export(source, out, weights, **options)  # pyright: ignore
    size = sum(path.stat().st_size for path in out.iterdir())
    return out, {"bits_per_weight": round(written.bits_per_weight, 2), "folder_bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="translator")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=256, help="pairs that calibration reads")
    parser.add_argument("--only", help="these ways, with commas between")
    parser.add_argument("--loss-only", action="store_true", help="write no translations: minutes become seconds")
    args = parser.parse_args()
    rows = list(assets.read_jsonl("pairs/test.jsonl"))[: args.sentences]
    ways = args.only.split(",") if args.only else WAYS

    exact: list[str] = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        generator = TextGenerator.load(args.model, dtype=dtype)
        found, answers = measure(generator, rows, not args.loss_only)
        exact = exact or answers
        report(f"torch {name}", found, answers, exact)
    for way in ways:
        with tempfile.TemporaryDirectory() as scratch:
            folder, described = write(args.model, way, Path(scratch), args.examples)
            found, answers = measure(TextGenerator.load(folder), rows, not args.loss_only, "preview-" not in way)
            report(way, {**described, **found}, answers, exact)


def report(way: str, found: dict[str, float], answers: list[str], exact: list[str]) -> None:
    same = {"same_answers": sum(map(str.__eq__, answers, exact))} if answers else {}
    print(json.dumps({"way": way, **found, **same}), flush=True)


if __name__ == "__main__":
    main()
