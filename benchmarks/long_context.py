"""Seconds and peak memory of encoding one long source at the true 270M-270M size with random weights.

    python benchmarks/long_context.py --tokens 8192
    python benchmarks/long_context.py --tokens 4096,8192,16384              # and how both grow
    python benchmarks/long_context.py --tokens 32768 --chunk-tokens 4096    # the source in chunks, encoded apart
    python benchmarks/long_context.py --tokens 8192,16384 --peer transformers

Each length runs in a process of its own. Peak memory is that of the whole process (VmHWM), weights and loading
included. Operations per second stand beside those of a plain matrix product, measured in the same process. Weights of
released models are bfloat16: without --dtype, Encore runs in bfloat16 where the processor has units for it and in
float32 elsewhere (`encore.train.loss.resolve_precision`), and the peer runs in bfloat16, as it loads them, and in
float32. With --peer, lines at the end give how many times as fast Encore was.
`transformers` builds S x S masks and grows about fivefold per doubling, so it is refused above 16,384 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PEER_LIMIT = 16_384


def peak_bytes() -> int:
    """The highest resident size of this process so far (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@torch.inference_mode()
def measure(who: str, tokens: int, dtype: torch.dtype, chunk_tokens: int) -> dict[str, object]:
    """Build the model, encode once, and say what it took."""
    from against_transformers import build_ours, build_theirs, matrix_peak

    from encore.config import T5GemmaConfig
    from encore.generate.chunks import Chunks
    from encore.generate.encoding import encode_sources
    from encore.presets import preset

    config = preset("t5gemma-2-270m-270m")
    assert isinstance(config, T5GemmaConfig)
    source = torch.randint(3, config.encoder.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    length = chunk_tokens or tokens
    if who == "encore":
        model = build_ours(config, dtype)
        start, processor_start = time.perf_counter(), time.process_time()
        if chunk_tokens:
            rows = [row.tolist() for row in source[0].split(chunk_tokens)]
            assert encode_sources(model.encoder, [Chunks(rows)]).states.shape[1] == tokens
        else:
            model.encode(source)
    else:
        peer = build_theirs(config, dtype).get_encoder()
        start, processor_start = time.perf_counter(), time.process_time()
        peer(input_ids=source)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    peak = peak_bytes()
    stack = config.encoder
    linear = 2 * 100_326_016 * tokens
    heads = stack.num_attention_heads * stack.head_dim
    num_global = stack.layer_types.count("full_attention")
    seen = num_global * length + (stack.num_hidden_layers - num_global) * min(length, stack.sliding_window)
    operations = (linear + 4 * heads * seen * tokens) / seconds
    product = matrix_peak(dtype)
    return {
        "who": who,
        "tokens": tokens,
        **({"chunk_tokens": chunk_tokens} if chunk_tokens else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor_seconds, 2),
        "peak_gigabytes": round(peak / 1e9, 2),
        "gigaflops": round(operations / 1e9, 1),
        "matrix_product_gigaflops": round(product / 1e9, 1),
        "share_of_matrix_peak": round(operations / product, 3),
    }


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Between neighbouring lengths of one program: how many times the tokens, the seconds, the memory."""
    pairs = [(a, b) for a, b in itertools.pairwise(rows) if (a["who"], a["dtype"]) == (b["who"], b["dtype"])]
    names = ("tokens", "seconds", "peak_gigabytes")
    return [{"who": a["who"], **{f"times_{name}": round(b[name] / a[name], 2) for name in names}} for a, b in pairs]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times the peer's seconds and memory are ours, for each length; above 1, Encore is ahead."""
    ours = {row["tokens"]: row for row in rows if row["who"] == "encore"}
    return [
        {
            "peer": f"{row['who']} {row['dtype']}",
            "tokens": row["tokens"],
            "times_as_fast": round(row["seconds"] / ours[row["tokens"]]["seconds"], 2),
            "times_less_memory": round(row["peak_gigabytes"] / ours[row["tokens"]]["peak_gigabytes"], 2),
        }
        for row in rows
        if row["who"] != "encore"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192", help="one length, or several with commas between")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="encode in chunks of so many tokens; 0: whole")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of both programs")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--who", choices=["encore", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = sorted(int(text) for text in args.tokens.split(","))
    if "transformers" in (args.peer, args.who) and lengths[-1] > PEER_LIMIT:
        raise SystemExit(f"transformers would not fit at {lengths[-1]} tokens; measure it at {PEER_LIMIT} or fewer")
    if args.who:
        if args.threads:
            torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.who, lengths[0], getattr(torch, args.dtype), args.chunk_tokens)))
        return
    from encore.train.loss import resolve_precision

    ours = args.dtype or str(resolve_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    runs = [("encore", ours)]
    if args.peer:
        runs += [(args.peer, dtype) for dtype in ([args.dtype] if args.dtype else ["bfloat16", "float32"])]
    rows: list[dict[str, Any]] = []
    for who, dtype in runs:
        for tokens in lengths:
            command = [sys.executable, __file__, "--who", who, "--tokens", str(tokens), "--dtype", dtype]
            command += ["--threads", str(args.threads), "--chunk-tokens", str(args.chunk_tokens)]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
            print(line, flush=True)
            rows.append(json.loads(line))
    for row in growth(rows) + ratios(rows):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
