"""What the engine adds to the model at batch 1: seconds of a turn outside the model's own call, by a profile.

    python benchmarks/engine_overhead.py translator FOLDER …        # checkpoints or exported folders

"Model" is the call of torch or onnxruntime; the rest (scheduling, sampling, what is fed) is counted as overhead, and
so is the choice of the token with its log-probability, which is named apart: it reads all logits.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import encore
from encore.checkpoint.hub import resolve
from encore.export.manifest import is_exported
from encore.generate import request
from encore.generate.backends import make_rows
from encore.generate.onnx_backend import OnnxModel
from encore.generate.rows import Size, make_requests
from encore.generate.sampling import SamplingSettings
from encore.generate.scheduler import Job, Scheduler


class Timed:
    """A function that adds up the seconds it takes."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        started = time.thread_time()
        try:
            return self.function(*arguments, **named)
        finally:
            self.seconds += time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="shipped name or folder")
    parser.add_argument("--tokens", type=int, default=64, help="target tokens to time")
    parser.add_argument("--source-tokens", type=int, default=128)
    options = parser.parse_args()
    for name in options.models:
        measure(name, options.source_tokens, options.tokens)


def measure(name: str, source_tokens: int, tokens: int) -> None:
    folder = resolve(name)
    exported = is_exported(folder)
    model: Any = OnnxModel.load(folder, threads=1) if exported else encore.load(folder)
    settings = SamplingSettings(max_target_tokens=tokens + 8, stop_ids=())
    source = [5 + i % 100 for i in range(source_tokens)]
    scheduler = Scheduler(model.config, make_rows(model, Size(1, source_tokens, tokens + 8)), 1)
    scheduler.add(Job(source, make_requests(model, [source], settings, None)))
    for _ in range(8):
        scheduler.turn()
    if exported:
        session = model._sessions["step"]
        called = Timed(session.run_with_iobinding)
        scheduler.rows.cache.session = _Session(session, called)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        called = Timed(model.decode)
        model.decode = called
    sample, request.sample = request.sample, Timed(request.sample)
    started = time.thread_time()
    for _ in range(tokens):
        scheduler.turn()
    whole = time.thread_time() - started
    chosen = request.sample.seconds  # pyright: ignore[reportFunctionMemberAccess]
    request.sample = sample
    rest = whole - called.seconds - chosen
    print(
        f"{name}: {1e3 * whole / tokens:.3f} ms a token; model {100 * called.seconds / whole:.1f} %, choice of the "
        f"token {100 * chosen / whole:.1f} % ({1e6 * chosen / tokens:.0f} us), engine {100 * rest / whole:.1f} % "
        f"({1e6 * rest / tokens:.0f} us)"
    )


class _Session:
    def __init__(self, session: Any, run: Timed) -> None:
        self.session, self.run_with_iobinding = session, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


if __name__ == "__main__":
    main()
