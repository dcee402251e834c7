"""Seconds and peak memory of encoding one long source at the true 270M-270M size with random weights.

    python benchmarks/long_context.py --tokens 8192
    python benchmarks/long_context.py --tokens 8192 --peer transformers     # in a process of its own

Peak memory is that of the whole process (VmHWM), weights and loading included. `transformers` builds S x S masks and
grows about fivefold per doubling, so it is refused above 16,384 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

PEER_LIMIT = 16_384


def peak_bytes() -> int:
    """The highest resident size of this process so far (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@torch.inference_mode()
def measure(who: str, tokens: int, dtype: torch.dtype) -> dict[str, object]:
    """Build the model, encode once, and say what it took."""
    from against_transformers import build_ours, build_theirs, matrix_peak

    from encore.config import T5GemmaConfig
    from encore.presets import preset

    config = preset("t5gemma-2-270m-270m")
    assert isinstance(config, T5GemmaConfig)
    source = torch.randint(3, config.encoder.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    if who == "encore":
        model = build_ours(config, dtype)
        start = time.perf_counter()
        model.encode(source)
    else:
        peer = build_theirs(config, dtype).get_encoder()
        start = time.perf_counter()
        peer(input_ids=source)
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    stack = config.encoder
    linear = 2 * 100_326_016 * tokens
    heads = stack.num_attention_heads * stack.head_dim
    num_global = stack.layer_types.count("full_attention")
    seen = num_global * tokens + (stack.num_hidden_layers - num_global) * min(tokens, stack.sliding_window)
    operations = linear + 4 * heads * seen * tokens
    return {
        "who": who,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "peak_gigabytes": round(peak / 1e9, 2),
        "share_of_matrix_peak": round(operations / seconds / matrix_peak(dtype), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--who", default="encore", choices=["encore", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "transformers" in (args.peer, args.who) and args.tokens > PEER_LIMIT:
        raise SystemExit(f"transformers would not fit at {args.tokens} tokens; measure it at {PEER_LIMIT} or fewer")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peer:
        base = [sys.executable, __file__, "--tokens", str(args.tokens), "--dtype", args.dtype]
        base += ["--threads", str(args.threads)]
        for who in ("encore", "transformers"):
            subprocess.run([*base, "--who", who], check=True)
        return
    print(json.dumps(measure(args.who, args.tokens, getattr(torch, args.dtype))))


if __name__ == "__main__":
    main()
