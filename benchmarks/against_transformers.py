"""Encoding and decoding at the true 270M-270M size with random weights, beside `transformers`, in one run.

    python benchmarks/against_transformers.py                        # all rows, several minutes
    python benchmarks/against_transformers.py --quick --json out.json

Both models are built in one process and take turns, so a noisy machine hurts both alike; read the ratios. `ours` and
`peer_value` are tokens per second (encode: source tokens; decode: target tokens over the batch). `limit` is what the
machine could do by a matrix product (encode: operations over measured peak) or a copy (decode: weight bytes over
measured bandwidth) timed in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import encore
from encore.config import T5GemmaConfig
from encore.model.t5gemma import T5Gemma
from encore.presets import preset


@dataclass
class Row:
    work: str
    size: str
    weights: str
    batch: int
    source_tokens: int
    ours: float
    unit: str
    peer: str
    peer_value: float
    ratio: float
    limit: float
    share_of_limit: float


def build_ours(config: T5GemmaConfig, dtype: torch.dtype) -> T5Gemma:
    with torch.device("meta"):
        model = T5Gemma(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def build_theirs(config: T5GemmaConfig, dtype: torch.dtype) -> Any:
    """The same shapes in transformers, text only (a one-layer tower that is never run)."""
    stack = config.encoder
    text = dict(
        vocab_size=stack.vocab_size,
        hidden_size=stack.hidden_size,
        intermediate_size=stack.intermediate_size,
        num_hidden_layers=stack.num_hidden_layers,
        num_attention_heads=stack.num_attention_heads,
        num_key_value_heads=stack.num_key_value_heads,
        head_dim=stack.head_dim,
        sliding_window=stack.sliding_window,
        layer_types=list(stack.layer_types),
        max_position_embeddings=131_072,
    )
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    theirs = transformers.T5Gemma2Config(
        encoder=dict(text_config=text, vision_config=vision, mm_tokens_per_image=4), decoder=dict(text)
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return transformers.T5Gemma2ForConditionalGeneration(theirs).eval()
    finally:
        torch.set_default_dtype(default)


def decode_ours(model: T5Gemma, source: torch.Tensor, steps: int) -> Callable[[], None]:
    memory = model.encode(source)

    def run() -> None:
        cache = model.make_cache(memory, steps)
        token = torch.full((source.shape[0], 1), 2)
        for _ in range(steps):
            token = model.decode(token, memory, cache)[:, -1].argmax(-1, keepdim=True)

    return run


def decode_theirs(model: Any, source: torch.Tensor, steps: int) -> Callable[[], None]:
    encoded = model.get_encoder()(input_ids=source)

    def run() -> None:
        token, past = torch.full((source.shape[0], 1), 2), None
        for _ in range(steps):
            out = model(decoder_input_ids=token, encoder_outputs=encoded, past_key_values=past, use_cache=True)
            token, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    return run


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of each; they take turns, one unmeasured round first if there are several."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + (rounds > 1)):
        for which, run in enumerate((ours, theirs)):
            start = time.perf_counter()
            run()
            if turn or rounds == 1:
                times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def matrix_peak(dtype: torch.dtype) -> float:
    """Operations per second of the best of some 2048 x 2048 products."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    seconds = min(_timed(lambda: a @ b) for _ in range(6))
    return 2 * 2048**3 / seconds


def bandwidth() -> float:
    """Bytes per second of reading 1 GiB (a sum)."""
    x = torch.ones(1 << 28)
    return x.numel() * 4 / min(_timed(x.sum) for _ in range(4))


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t5gemma-2-270m-270m", help="a T5Gemma 2 preset")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--source", default="512,2048,8192", help="source lengths to encode")
    parser.add_argument("--batch", default="1,8", help="batch sizes to decode at 512 source tokens")
    parser.add_argument("--steps", type=int, default=24, help="target tokens per decoding")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="512 source tokens and batch 1 only")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.source, args.batch = "512", "1"
    dtype = getattr(torch, args.dtype)
    config = preset(args.model)
    size = args.model.removeprefix("t5gemma-2-")
    assert isinstance(config, T5GemmaConfig)
    ours, theirs = build_ours(config, dtype), build_theirs(config, dtype)
    peer = f"transformers {args.dtype}"
    peak, read = matrix_peak(dtype), bandwidth()
    print(
        f"encore {encore.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {peak / 1e9:.0f} GFLOP/s, {read / 1e9:.0f} GB/s",
        file=sys.stderr,
    )
    stack_weights = sum(p.numel() for p in ours.encoder.layers.parameters())
    step_bytes = dtype.itemsize * (sum(p.numel() for p in ours.decoder.layers.parameters()) + ours.head_weight.numel())
    rows: list[Row] = []

    def add(work: str, batch: int, source: int, tokens: int, mine: float, peers: float, limit: float) -> None:
        value, other = tokens / mine, tokens / peers
        row = Row(
            work,
            size,
            args.dtype,
            batch,
            source,
            value,
            "tokens/s",
            peer,
            other,
            value / other,
            limit,
            value / limit,
        )
        rows.append(row)
        print(
            f"{work:6} batch {batch} source {source:5}: ours {value:8.1f}  {peer} {other:8.1f} tokens/s  "
            f"ratio {row.ratio:.2f}  {row.share_of_limit:.0%} of the limit",
            flush=True,
        )

    for length in map(int, args.source.split(",")):
        tokens = torch.randint(3, config.encoder.vocab_size, (1, length))
        seconds = alternate(
            lambda: ours.encode(tokens),  # noqa: B023
            lambda: theirs.get_encoder()(input_ids=tokens),  # noqa: B023
            1 if length > 4096 else args.rounds,
        )
        add("encode", 1, length, length, *seconds, peak / (2 * stack_weights))
    for batch in map(int, args.batch.split(",")):
        source = torch.randint(3, config.encoder.vocab_size, (batch, 512))
        seconds = alternate(
            decode_ours(ours, source, args.steps), decode_theirs(theirs, source, args.steps), args.rounds
        )
        add("decode", batch, 512, batch * args.steps, *seconds, batch * read / step_bytes)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
