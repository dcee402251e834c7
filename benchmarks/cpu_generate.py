"""Decoding on a CPU: exported Encore graphs beside every peer that is installed, in one run.

    python benchmarks/cpu_generate.py --quick                      # 270M-270M, batch 1, 512 source tokens
    python benchmarks/cpu_generate.py --json rows.json             # batch 1, 4, 8; sources of 128, 512, 2,048, 8,192
    python benchmarks/cpu_generate.py --size 1b-1b --source 512 --batch 1
    python benchmarks/cpu_generate.py --python "llama.cpp=venv/bin/python"      # peers of another environment

Each runner is a process of its own (peers.py) and they take turns, so a noisy machine hurts all alike; read the ratios.
Tokens per second count from the first target token to the last, Python and the choice of the token included. `limit` is
what the memory bandwidth allows, which takes its turns with the runners (medians of both): each step reads the
decoder's weights, the head and the keys and values once. Weights are random and made once, in --folder; that first time
takes minutes more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers import PEERS, SIZES, missing, preview_width

from encore.quantize.blocks import DEFAULT_BLOCK_SIZE

BITS = {"int8": 8 + 32 / DEFAULT_BLOCK_SIZE, "int4": 4 + 32 / DEFAULT_BLOCK_SIZE, "bf16": 16.0, "float32": 32.0}
"""Of a weight, with its part of the scale. A step reads four bits of an int8 head, and all of a few rows."""
CACHE = Path(os.environ.get("ENCORE_CACHE") or Path.home() / ".cache" / "encore") / "benchmarks"


@dataclass
class Row:
    """One comparison; `ratio` above 1 means that Encore is faster."""

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
    our_peak_bytes: int
    peer_peak_bytes: int


class Runner:
    """A peer's process, asked one question at a time."""

    def __init__(self, name: str, size: str, folder: Path, threads: int, python: str) -> None:
        self.name = name
        command = [python, str(Path(__file__).with_name("peers.py")), name]
        command += ["--size", size, "--folder", str(folder), "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **_threads(threads)}
        )
        self.version = self._answer()["version"]

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise RuntimeError(f"{self.name} ended without an answer (status {self.process.wait()})")
        return json.loads(line)

    def can(self, batch: int) -> bool:
        return self.process.poll() is None and (batch == 1 or not self.name.startswith("llama.cpp"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _threads(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)}


def start(names: Sequence[str], size: str, folder: Path, threads: int, pythons: dict[str, str]) -> dict[str, Runner]:
    """The runners that this machine has; a line on stderr for each that it has not."""
    runners: dict[str, Runner] = {}
    for name in names:
        other = pythons.get(name.split()[0])
        if other is None and (command := missing(name)):
            print(f"{name}: not installed, left out; {command}", file=sys.stderr)
            continue
        print(f"{name}: getting ready", file=sys.stderr, flush=True)
        try:
            runners[name] = Runner(name, size, folder, threads, other or sys.executable)
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
    return runners


def take_turns(
    runners: dict[str, Runner], rounds: int, gauge: Callable[[], float], **question: Any
) -> tuple[dict[str, tuple[float, int]], float]:
    """Median tokens per second and peak bytes of each runner that can answer; and the median of what `gauge` measures.

    With several rounds a first turn warms up; a single one is long enough not to need it.
    """
    values: dict[str, list[float]] = {name: [] for name in runners}
    gauged: list[float] = []
    peaks = dict.fromkeys(runners, 0)
    warm_up = int(rounds > 1)
    for turn in range(rounds + warm_up):
        gauged.append(gauge())
        for name, runner in runners.items():
            if name not in values:
                continue
            try:
                answer = runner.ask(**question)
            except (RuntimeError, BrokenPipeError) as error:
                print(f"left out from here on: {error}", file=sys.stderr)
                del values[name]
                runner.close()
                continue
            peaks[name] = answer["peak_bytes"]
            if turn >= warm_up:
                values[name].append(answer["tokens_per_second"])
    found = {name: (statistics.median(of_name), peaks[name]) for name, of_name in values.items()}
    return found, statistics.median(gauged)


def bandwidth(threads: int) -> float:
    """Bytes per second of reading 1 GiB of float32, the best of several passes."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(1 << 28)
    best = 0.0
    for _ in range(6):
        begin = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.numel() * 4 / (time.perf_counter() - begin))
    return best


def matrix_peak(threads: int) -> float:
    """Operations per second of the best of some 2048-wide int8 products (torch), or float32 ones if they are faster."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a8, b8 = (x.mul(30).clamp(-127, 127).to(torch.int8) for x in (a, b))
    best = 0.0
    for product in (lambda: a @ b, lambda: torch._int_mm(a8, b8)):
        for _ in range(4):
            begin = time.perf_counter()
            product()
            best = max(best, 2 * 2048**3 / (time.perf_counter() - begin))
    return best


def stack_weights(size: str) -> int:
    """Weights in the matrices of one stack."""
    s = SIZES[size]
    attention = s["width"] * s["head_dim"] * (2 * s["heads"] + 2 * s["kv_heads"])
    return s["layers"] * (attention + 3 * s["width"] * s["ffn"])


def step_bytes(size: str, weights: str, batch: int, source_tokens: int) -> float:
    """What one step has to read: the decoder's matrices, the head, and the memory's keys and values (float32)."""
    s, (kind, _, preview) = SIZES[size], weights.partition(" ")
    head = BITS["int4" if kind == "int8" else kind] * s["vocab"] * (preview_width(size) if preview else s["width"])
    matrices = (stack_weights(size) * BITS[kind] + head) / 8
    return matrices + batch * source_tokens * s["layers"] * 2 * s["kv_heads"] * s["head_dim"] * 4


def compared(ours: Sequence[str], peers: Sequence[str]) -> list[tuple[str, str]]:
    """Which of ours stands beside which peer: like weights beside like, and all beside bfloat16 and float32."""

    def fits(mine: str, peer: str) -> bool:
        bits = {"Q8_0": "int8", "Q4_0": "int4", "int8": "int8", "int4": "int4"}.get(peer.split()[-1])
        return bits is None or bits in mine

    return [(mine, peer) for mine in ours for peer in peers if fits(mine, peer)]


def parser_for(description: str | None, sources: str, batches: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m-270m", choices=list(SIZES))
    parser.add_argument("--ours", default="encore int8,encore int4", help="which of ours, by their names in peers.py")
    parser.add_argument("--peers", default=",".join(name for name in PEERS if not name.startswith("encore")))
    parser.add_argument("--source", default=sources, help="source lengths")
    parser.add_argument("--batch", default=batches, help="batch sizes; llama.cpp runs at 1 only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=CACHE, help="where random weights are kept")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON", help="another environment")
    parser.add_argument("--quick", action="store_true", help="batch 1 and 512 source tokens only, two rounds")
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser


def run(args: argparse.Namespace, work: str, gauge: Callable[[int], float], limit_of: Any, **question: Any) -> None:
    """All rows of one kind of work: printed as they come, and written as JSON.

    `gauge` measures with so many threads what `limit_of` counts with.
    """
    if args.quick:
        args.source, args.batch, args.rounds = "512", "1", min(args.rounds, 2)
        if args.peers == parser_for(None, "", "").get_default("peers"):
            args.peers = args.peers.replace("transformers float32,", "")
    pythons = dict(entry.split("=", 1) for entry in args.python)
    ours, peers = args.ours.split(","), args.peers.split(",")
    if unknown := [name for name in (*ours, *peers) if name not in PEERS]:
        raise SystemExit(f"unknown runners {unknown}; known: {', '.join(PEERS)}")
    runners = start([*ours, *peers], args.size, args.folder, args.threads, pythons)
    ours, peers = ([name for name in names if name in runners] for names in (ours, peers))
    print("  ".join(f"{name} {runner.version}" for name, runner in runners.items()), file=sys.stderr)
    rows: list[Row] = []
    try:
        for batch in map(int, args.batch.split(",")):
            for source in map(int, args.source.split(",")):
                able = {name: r for name, r in runners.items() if r.can(batch)}
                rounds = 1 if source > 4096 else args.rounds
                asked = {"work": work, "batch": batch, "source_tokens": source, **question}
                found, gauged = take_turns(able, rounds, lambda: gauge(args.threads), **asked)
                print(f"{gauge.__name__} {gauged / 1e9:.1f} G/s, {args.threads} threads", file=sys.stderr)
                for mine, peer in compared(ours, peers):
                    if mine not in found or peer not in found:
                        continue
                    (value, peak), (other, peer_peak) = found[mine], found[peer]
                    weights = mine.removeprefix("encore ")
                    limit = limit_of(gauged, args.size, weights, batch, source)
                    row = Row(
                        work, args.size, weights, batch, source, value, "tokens/s", peer, other, value / other,
                        limit, value / limit, peak, peer_peak,
                    )  # fmt: skip
                    rows.append(row)
                    print(
                        f"{work} {args.size} {weights:5} batch {batch} source {source:5}: ours {value:8.1f}, {peer} "
                        f"{other:8.1f} tokens/s, ratio {row.ratio:5.2f}; {row.share_of_limit:4.0%} of the limit; peak "
                        f"{peak / 1e6:,.0f} MB, {peer_peak / 1e6:,.0f} MB",
                        flush=True,
                    )
    finally:
        for runner in runners.values():
            runner.close()
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = parser_for(__doc__, "128,512,2048,8192", "1,4,8")
    parser.add_argument("--target", type=int, default=33, help="target tokens")
    args = parser.parse_args()

    def limit(bytes_per_second: float, size: str, weights: str, batch: int, source: int) -> float:
        return batch * bytes_per_second / step_bytes(size, weights, batch, source)

    run(args, "decode", bandwidth, limit, target_tokens=args.target)


if __name__ == "__main__":
    main()
