"""Seconds from the start of `encore generate` to its first token, and what they go to.

    python benchmarks/first_token.py                       # 270M-270M, int8, a tokenizer of 262,144 entries
    python benchmarks/first_token.py --json rows.json

Each run is the real command in a fresh process on a terminal of its own, where a text is answered as it is written; the
files have been read before, so the disk is warm. The stages are timed in further fresh processes that call the same
functions one after the other; the command overlaps some of them, so it takes less than their sum. Weights are random;
they and the tokenizer are made once, in --folder, the cache of cpu_generate.py.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpu_generate import CACHE
from peers import SIZES, exported, our_checkpoint

from encore.tokenizer_index import build_index

SHORT = "Good morning."
WORDS = "the small boat left the harbour before noon while two old men watched from a bench and spoke of rain"
LONG = " ".join((WORDS.split() * 2)[:32])
MERGES = 514_906
"""How many merges Gemma 3's tokenizer.json has for its 262,144 entries: most pieces can be made in several ways."""


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A BPE tokenizer with Gemma 3's pipeline and special tokens, whose pieces are all parts of random words."""
    import numpy as np
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from encore.tokenizer_backends import SPACE
    from encore.tokenizer_training import BYTES, FRONT

    images = ("<start_of_image>", "<end_of_image>")
    tail = [*images, *(f"<unused{i}>" for i in range(99, 6242))] if vocab_size > 100_000 else list(images)
    letters = [chr(i) for i in (*range(0x61, 0x7B), *range(0xE0, 0x100))]
    pieces = ["\n", SPACE, *map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0x180))]
    count = vocab_size - len(FRONT) - len(BYTES) - len(tail)
    more = MERGES * vocab_size // 262_144 - (count - len(pieces))
    known, merges = set(pieces), []
    rng = np.random.default_rng(0)
    while len(pieces) < count:
        word = SPACE + "".join(rng.choice(letters, 8))
        parts = [word[start : start + length] for length in range(2, 10) for start in range(10 - length)]
        for part in parts:  # short ones first, so both sides of any cut are pieces
            if part not in known and len(pieces) < count:
                known.add(part)
                pieces.append(part)
                cuts = [(part[:place], part[place:]) for place in range(1, len(part))][: 1 + more]
                more -= len(cuts) - 1
                merges += cuts
    names = [*FRONT, *BYTES, *pieces, *tail]
    model = models.BPE(
        {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made: Any = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {*FRONT[:5], *FRONT[-2:], *images}
    made.add_tokens([AddedToken(name, normalized=False, special=name in special) for name in (*FRONT, *tail)])
    config = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    config |= {"add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    made.save(str(folder / "tokenizer.json"))


def prepare(size: str, weights: str, cache: Path) -> Path:
    """The exported folder with its tokenizer."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = exported(our_checkpoint(size, cache), weights, 1).manifest.folder
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer(folder, SIZES[size]["vocab"])
        build_index(folder / "tokenizer.json")  # as `encore export` does
    return folder


def run_command(folder: Path, text: str, tokens: int = 1) -> dict[str, float]:
    """The command once: wall seconds to its first output and to its end, processor seconds of all its threads."""
    command = [sys.executable, "-m", "encore", "generate", "--model", str(folder)]
    ours, theirs = pty.openpty()
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--max-target-tokens", str(tokens), text],
        stdout=theirs,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    first = None
    try:
        while os.read(ours, 4096):
            first = first or time.perf_counter() - started
    except OSError:  # the terminal's other end is closed
        pass
    os.close(ours)
    assert process.stderr is not None
    notes = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    ended = time.perf_counter() - started
    process.stderr.close()
    if process.returncode or first is None:
        raise SystemExit(f"the command gave status {process.returncode}: {notes.decode(errors='replace')}")
    return {"first": first, "end": ended, "cpu": used.ru_utime + used.ru_stime}


def stages(folder: Path, text: str) -> dict[str, list[float]]:
    """Wall and processor seconds of each stage, in this process: call it in a fresh one."""
    found: dict[str, list[float]] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        found[name] = [time.perf_counter() - wall, time.process_time() - cpu]

    with stage("import command"):
        import typer

        import encore.cli

        typer.main.get_command(encore.cli.app)
    with stage("import onnxruntime"):
        import onnxruntime as onnxruntime
    with stage("import the rest"):
        import tokenizers as tokenizers

        from encore.checkpoint.config_json import read_config_file
        from encore.config import T5GemmaConfig
        from encore.export.manifest import check_folder
        from encore.generate import onnx_backend
        from encore.tokenizer import load_tokenizer
    with stage("check folder"):
        manifest, config = check_folder(folder), read_config_file(folder)
        assert isinstance(config, T5GemmaConfig)
    with stage("load tokenizer"):
        tokenizer = load_tokenizer(folder)
    sessions = {}
    for part in ("encoder", "memory", "step"):
        with stage(f"open {part}"):
            sessions[part] = onnx_backend._session(manifest.graph(part), None)
    model = onnx_backend.OnnxModel(manifest, config, sessions)
    with stage("tokenize"):
        source = tokenizer.encode_source(text)
    with stage(f"encode {len(source)} tokens"):
        memory = model.encode([source])
    with stage("memory"):
        cache = model.make_cache(memory, 1)
    with stage("first step"):
        token = int(model.step([config.bos_token_id], cache)[0].argmax())
    with stage("decode text"):
        tokenizer.decode([token])
    return found


def profile(folder: Path, text: str, runs: int) -> dict[str, list[float]]:
    """Medians of `stages` over fresh processes, after the bare interpreter."""
    command = [sys.executable, __file__, "--stages", str(folder), "--text", text]
    told, bare = [], []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(time.perf_counter() - started)
        told.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    rows = {"interpreter": [statistics.median(bare)] * 2}
    for name in told[0]:
        rows[name] = [statistics.median(row[name][i] for row in told) for i in (0, 1)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m-270m", choices=list(SIZES))
    parser.add_argument("--weights", default="int8", choices=["int8", "int4"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=CACHE, help="where the model is kept between runs")
    parser.add_argument("--json", type=Path, help="write the medians here")
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages:
        print(json.dumps(stages(options.stages, options.text)))
        return
    folder = prepare(options.size, options.weights, options.folder)
    rows = []
    for text in (SHORT, LONG):
        run_command(folder, text)  # warms the disk
        runs = [run_command(folder, text) for _ in range(options.runs)]
        row: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        row = {"size": options.size, "weights": options.weights, "source_words": len(text.split()), **row}
        row["fastest"] = min(run["first"] for run in runs)
        row["stages"] = profile(folder, text, options.runs)
        rows.append(row)
        print(
            f"{row['source_words']:>3} words: first token {row['first']:.2f} s (fastest {row['fastest']:.2f}), "
            f"end {row['end']:.2f} s, processor {row['cpu']:.2f} s"
        )
    print(f"\n{'stage':<22}" + "".join(f"{row['source_words']:>10} words: wall, cpu" for row in rows))
    for one, other in zip(rows[0]["stages"].items(), rows[1]["stages"].items(), strict=True):
        name = one[0] if one[0] == other[0] else "encode"
        print(f"{name:<22}" + "".join(f"{wall:>20.3f} {cpu:>7.3f}" for wall, cpu in (one[1], other[1])))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
