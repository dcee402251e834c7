"""Encoding on a CPU: exported Encore graphs (and our torch path) beside every peer that is installed, in one run.

    python benchmarks/cpu_encode.py --quick                        # 270M-270M, batch 1, 512 source tokens
    python benchmarks/cpu_encode.py --json rows.json               # 128, 512, 2,048 and 8,192 source tokens

Told in cpu_generate.py: processes that take turns, random weights, --python. For llama.cpp and OpenVINO, without an
encoder of this kind, the peer's value is their prompt speed on Gemma 3 of the same layers. `limit` is the stack's
products alone at the matrix peak (int8 or float32, whichever is faster here), which takes its turns with the runners.
"""

from __future__ import annotations

from cpu_generate import matrix_peak, parser_for, run, stack_weights


def main() -> None:
    parser = parser_for(__doc__, "128,512,2048,8192", "1")
    parser.set_defaults(ours="encore int8,encore int4,encore float32")

    def limit(operations_per_second: float, size: str, weights: str, batch: int, source: int) -> float:
        return operations_per_second / (2 * stack_weights(size))

    run(parser.parse_args(), "encode", matrix_peak, limit)


if __name__ == "__main__":
    main()
