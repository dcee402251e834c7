"""Training speed and memory of a small T5Gemma 2 with the full vocabulary, beside `transformers` and its Trainer.

    python benchmarks/train_speed.py                     # all variants, several minutes
    python benchmarks/train_speed.py --quick --json out.json

Each variant is a process of its own, and runs a whole training loop: `encore.train.loop.fit`, or the Trainer of
`transformers` on its T5Gemma 2 class. All learn from the same examples, in float32, on the same number of threads, with
fused AdamW and clipping. `encore` is what a user gets; each further variant leaves out one thing, or adds one:

    encore, padded                     one example a row, padded to the longest of the step, as the Trainer has it
    encore, all logits at once         the usual loss: logits of all positions, then torch's cross-entropy
    encore, dense lookups              lookups make a (V, D) gradient each, beside that of the head
    encore, activation checkpointing   layers keep their inputs alone, and are computed twice

Examples differ in length unless `--lengths equal`: then nothing is left for packing to save, and what remains is the
rest. Processes take turns, a step each, so that a noisy machine hurts all alike: read the ratios, which are medians
over rounds of one step's time against that of `transformers` (without it: of the first variant) in the same round.

    tokens_per_second   real tokens read and written (padding does not count)
    utilisation         model FLOPs (`encore.flops`) per second, as a share of the best matrix product of the same run
    peak_gigabytes      the highest resident size of the process (VmHWM), libraries, model and optimizer included
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from against_transformers import build_theirs, matrix_peak
from long_context import peak_bytes
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from encore.config import Rope, StackConfig, T5GemmaConfig
from encore.data.batch import Batch, encoder_decoder_batch
from encore.data.packing import RowShape, pack, whole
from encore.flops import training_flops
from encore.model.t5gemma import T5Gemma
from encore.presets import layer_types

BOS, PAD = 2, 0
PEER = "transformers"
VARIANTS = {
    "encore": {},
    "encore, padded": {"padded": True},
    "encore, all logits at once": {"all_logits": True},
    "encore, dense lookups": {"dense_lookups": True},
    "encore, activation checkpointing": {"train": {"activation_checkpointing": True}},
    "encore, bfloat16": {"train": {"precision": "bfloat16"}},
    "encore, compiled": {"train": {"compile": True}},
    PEER: {},
}
USUAL = tuple(name for name in VARIANTS if name not in ("encore, bfloat16", "encore, compiled"))


@dataclass
class Row:
    """`ratio`: how many times as fast as `transformers` (without it: as the first variant), median over rounds."""

    variant: str
    step_seconds: float
    tokens: int
    tokens_per_second: float
    utilisation: float
    peak_gigabytes: float
    ratio: float


@dataclass(frozen=True)
class Setting:
    """What all variants train: sizes, and the lengths of the examples of one step."""

    hidden_size: int
    layers: int
    vocab_size: int
    lengths: tuple[tuple[int, int], ...]
    threads: int

    @property
    def config(self) -> T5GemmaConfig:
        stack = StackConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            layer_types=layer_types(self.layers, self.layers),
            sliding_window=512,
            local_rope=Rope(10_000.0),
            global_rope=Rope(1_000_000.0),
            query_pre_attn_scalar=64,
            qk_norm=True,
        )
        return T5GemmaConfig("t5gemma2", stack, stack)

    @property
    def flops(self) -> int:
        return sum(training_flops(self.config, source, target) for source, target in self.lengths)

    def examples(self, step: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        random = np.random.default_rng(step)
        sources, targets = zip(*self.lengths, strict=True)
        return tuple([random.integers(3, self.vocab_size, n) for n in side] for side in (sources, targets))  # type: ignore


def padded(setting: Setting, step: int) -> Batch:
    return encoder_decoder_batch(*setting.examples(step), bos_id=BOS, pad_id=PAD)


def packed(setting: Setting, step: int) -> Batch:
    """The same examples in rows as long as the longest."""
    sources, targets = setting.examples(step)
    shape = RowShape(max(map(len, sources)), max(map(len, targets)))
    rows = pack(whole(setting.lengths), shape)
    size = (len(rows), shape.encoder), (len(rows), shape.decoder)
    source, source_ids = np.full(size[0], PAD), np.zeros(size[0], dtype=np.int64)
    target, given, target_ids = np.full(size[1], PAD), np.full(size[1], PAD), np.zeros(size[1], dtype=np.int64)
    for i, row in enumerate(rows):
        at = [0, 0]
        for segment, piece in enumerate(row, start=1):
            mine, learned = sources[piece.item], targets[piece.item]
            here, there = slice(at[0], at[0] + len(mine)), slice(at[1], at[1] + len(learned))
            source[i, here], source_ids[i, here] = mine, segment
            target[i, there], target_ids[i, there] = learned, segment
            given[i, there] = np.concatenate(([BOS], learned[:-1]))
            at = [here.stop, there.stop]
    tensors = map(torch.from_numpy, (source, source_ids > 0, given, target, target_ids > 0))
    tokens, mask, inputs, labels, learned_mask = tensors
    ids = (torch.from_numpy(source_ids), torch.from_numpy(target_ids))
    return Batch(tokens, mask, inputs, labels, learned_mask.float(), learned_mask, *ids)


def all_logits_loss(model: Any, batch: Batch) -> Tensor:
    """What everybody writes first: all logits, and torch's cross-entropy."""
    from encore.train.loss import target_states

    logits = model.logits(target_states(model, batch))
    losses = F.cross_entropy(logits.flatten(0, 1), batch.decoder_target_tokens.flatten(), reduction="none")
    return (losses * batch.decoder_loss_weights.flatten()).sum()


def dense_lookups_loss(model: Any, batch: Batch) -> Tensor:
    """`summed_loss`, but for how the gradients of lookups are added to the head's."""
    from encore.objectives.losses import cross_entropy
    from encore.train.loss import target_states

    states, weights = target_states(model, batch).flatten(0, 1), batch.decoder_loss_weights.flatten()
    return cross_entropy(states, model.head_weight, batch.decoder_target_tokens.flatten(), weights)[0]


class Turns:
    """A worker's side of taking turns: `wait` for one, `done` says what the step took."""

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "step":
            os._exit(0)
        self.started = time.perf_counter()

    def done(self) -> None:
        print(json.dumps({"seconds": time.perf_counter() - self.started, "peak": peak_bytes()}), flush=True)


def work_ours(setting: Setting, options: dict[str, Any], turns: Turns) -> None:
    from encore.checkpoint.training import RunFolder
    from encore.data.sources import resolve
    from encore.tokenizer import load_tokenizer
    from encore.train.loop import fit
    from encore.train.loss import summed_loss
    from encore.train.metrics import Silent
    from encore.train.recipe import OptimRecipe, Recipe, TrainRecipe

    settings = {"precision": "float32", "tracker": "none", **options.get("train", {})}
    never = {"evaluate_every_steps": 0, "checkpoint_every_steps": 0, "divergence_nats": 0.0}
    train = TrainRecipe(steps=1_000_000, threads=setting.threads, **never, **settings)
    recipe = Recipe("t5gemma2", optim=OptimRecipe(learning_rate=1e-4, warmup_steps=0), train=train)
    model = T5Gemma(setting.config)
    model.init_weights(torch.Generator().manual_seed(0))

    class Reporting(Silent):
        def step(self, row: Any) -> None:
            turns.done()

    def batches(step: int) -> Sequence[Batch]:
        made = (padded if options.get("padded") else packed)(setting, step)
        turns.wait()
        return [made]

    loss = summed_loss
    if options.get("all_logits") or options.get("dense_lookups"):
        loss = all_logits_loss if options.get("all_logits") else dense_lookups_loss
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            batches,
            recipe,
            RunFolder(folder),
            tokenizer=load_tokenizer(resolve("asset:tokenizer")),
            data_fingerprint="",
            loss=loss,
            progress=Reporting(),
        )


def work_theirs(setting: Setting, turns: Turns) -> None:
    import transformers

    model = build_theirs(setting.config, torch.float32)

    class Steps(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Any:
            for step in range(1_000_000):
                batch = padded(setting, step)
                assert batch.encoder_input_tokens is not None and batch.encoder_mask is not None
                yield {
                    "input_ids": batch.encoder_input_tokens,
                    "attention_mask": batch.encoder_mask.long(),
                    "decoder_input_ids": batch.decoder_input_tokens,
                    "decoder_attention_mask": batch.decoder_mask.long(),
                    "labels": batch.decoder_target_tokens.masked_fill(~batch.decoder_mask, -100),
                }

    class Waiting(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **more: Any) -> None:
            turns.wait()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            turns.done()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=1_000_000,
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Steps(), data_collator=lambda made: made[0], callbacks=[Waiting()]
        )
        trainer.train()


class Worker:
    """A variant's process, as the script sees it."""

    def __init__(self, variant: str, setting: Setting) -> None:
        command = [sys.executable, __file__, "--worker", variant, json.dumps(asdict(setting))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.peak = 0

    def step(self, *, counted: bool) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} has died with status {self.process.wait()}")
        told = json.loads(line)
        self.peak = told["peak"]
        if counted:
            self.seconds.append(told["seconds"])

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(names: Sequence[str], setting: Setting, rounds: int, advance: Callable[[], None]) -> list[Row]:
    """One step of each variant in turn, the first two rounds not counted (they allocate the moments)."""
    peak = matrix_peak(torch.float32)
    workers = {name: Worker(name, setting) for name in names}
    for turn in range(2 + rounds):
        for worker in workers.values():
            worker.step(counted=turn >= 2)
        advance()
    beside = workers[PEER if PEER in workers else names[0]].seconds
    tokens = sum(map(sum, setting.lengths))
    rows = []
    for name, worker in workers.items():
        worker.end()
        seconds = statistics.median(worker.seconds)
        ratio = statistics.median(theirs / mine for mine, theirs in zip(worker.seconds, beside, strict=True))
        share = setting.flops / seconds / peak
        rows.append(Row(name, seconds, tokens, tokens / seconds, share, worker.peak / 1e9, ratio))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="of each stack")
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--rows", type=int, default=8, help="examples of a step")
    parser.add_argument("--tokens", default="512/128", help="SOURCE/TARGET of the longest example")
    parser.add_argument("--lengths", default="mixed", choices=["mixed", "equal"], help="of the examples")
    parser.add_argument("--variants", default="", help=f"names with semicolons between, of: {'; '.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny vocabulary and two rounds")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        told = json.loads(args.worker[1])
        setting = Setting(**{**told, "lengths": tuple(map(tuple, told["lengths"]))})
        torch.set_num_threads(setting.threads)
        if args.worker[0] == PEER:
            work_theirs(setting, Turns())
        else:
            work_ours(setting, VARIANTS[args.worker[0]], Turns())
        return
    if args.quick:
        args.vocab, args.hidden, args.layers, args.rounds, args.tokens = 4096, 64, 2, 2, "64/32"
    torch.set_num_threads(args.threads)
    names = [name.strip() for name in args.variants.split(";")] if args.variants else list(USUAL)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise SystemExit(f"unknown variants {unknown}; expected some of: {'; '.join(VARIANTS)}")
    source, target = map(int, args.tokens.split("/"))
    shares = [1.0] * args.rows
    if args.lengths == "mixed":
        shares = [1.0, *np.random.default_rng(0).uniform(0.1, 1.0, args.rows - 1)]
    lengths = tuple((math.ceil(share * source), math.ceil(share * target)) for share in shares)
    setting = Setting(args.hidden, args.layers, args.vocab, lengths, args.threads)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rounds", total=args.rounds + 2)
        rows = measure(names, setting, args.rounds, lambda: bar.advance(task))
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, float32")
    print(f"width {args.hidden}, {args.layers}+{args.layers} layers, {args.vocab:,} words, {lengths} tokens a step")
    for row in rows:
        print(
            f"{row.variant:34} {row.step_seconds:6.2f} s  {row.tokens_per_second:8.0f} tokens/s  "
            f"{row.utilisation:5.1%}  {row.peak_gigabytes:5.2f} GB  {row.ratio:.2f} x"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
