"""The model read on real text: what each matrix is multiplied with, and from it the matrix's packed weights.

Per matrix the sum of x x' over all real tokens is needed (K x K numbers). The matrices go through in groups, in the
order of the model, as many as fit into `budget` bytes: the text is read once per group, and what is packed is put in
place before the next group is looked at, so later layers make up for the errors of earlier ones. The vocabulary's
matrix comes last. It is written with and read from: half of its weight are the decoder's states, half a plain sum of
squares, which is what looking up a row asks for.

Texts are read one at a time, unpadded, in the order of the file: the outcome is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from encore.checkpoint.packing import is_packed_matrix
from encore.data.sources import documents, pairs
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.quantize.blocks import Codes, Floats, dequantise
from encore.quantize.gptq import Rounding
from encore.tokenizer import Tokenizer

BUDGET = 1 << 28
"""Bytes of the sums that are held at a time."""

READING = 0.5
"""The share of the plain sum of squares in what the vocabulary's matrix is rounded for."""

ROWS_AT_ONCE = 8192
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Example:
    """Ids that are read (none for a decoder-only model) and ids that the decoder reads."""

    source: list[int]
    target: list[int]


def examples(
    names: Sequence[str], tokenizer: Tokenizer, *, encoder_decoder: bool, num_examples: int, max_tokens: int
) -> list[Example]:
    """The first rows of files of pairs (`src`, `tgt`) or texts (`text`). A text is cut in two: read, and written on."""
    try:
        rows = _first(((pair.source, pair.target) for pair in pairs(names)), num_examples)
    except ValueError:
        rows = []
    made: list[Example] = []
    for source, target in rows:
        read, written = tokenizer.encode_source(source), tokenizer.encode_target(target)
        made.append(_example(read, [tokenizer.bos_id, *written[:-1]], encoder_decoder, max_tokens))
    if rows:
        return made
    for text in _first(documents(names), num_examples):
        ids = tokenizer.encode(text)[: 2 * max_tokens]
        half = len(ids) // 2 if encoder_decoder else 0
        made.append(_example(ids[:half], [tokenizer.bos_id, *ids[half:]], encoder_decoder, max_tokens))
    if not made:
        raise ValueError(f"{', '.join(names)}: no rows to calibrate on; expected `src` and `tgt`, or `text`")
    return made


def _first(rows: Iterator, number: int) -> list:
    return [row for row, _ in zip(rows, range(number), strict=False)]


def _example(source: list[int], target: list[int], encoder_decoder: bool, max_tokens: int) -> Example:
    if not encoder_decoder:
        return Example([], [*source, *target][:max_tokens])
    return Example(source[:max_tokens] or [target[0]], target[:max_tokens])


class Calibration:
    """Packs the matrices of a model, one group after the other, and puts what they stand for in their places."""

    def __init__(self, model: Gemma | T5Gemma, texts: Sequence[Example], folder: Path, *, budget: int = BUDGET) -> None:
        self.model, self.texts, self.folder, self.budget = model, texts, folder, budget
        self.squared_error = self.squared_norm = 0.0

    def run(
        self, bits: int, vocabulary_bits: int, block_size: int, progress: Progress = lambda done, total: None
    ) -> None:
        """Write `NAME.codes.npy` and `NAME.scales.npy` of every matrix. `progress`: texts read, and of how many."""
        groups = list(self._groups())
        total, done = (len(groups) + 1) * len(self.texts), 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        for group in groups:
            sums = self._sums(group, advance)
            for name, linear in group.items():
                rounding = Rounding(sums.pop(name))
                self._pack(name, linear.weight, rounding, bits, block_size)
        size = self.model.head_weight.shape[1]
        found = torch.zeros(size, size)
        for text in self.texts:
            states = self._states(text)
            found += states.T @ states
            advance()
        used = found.numpy() / max(float(found.trace()), 1e-30) * size
        rounding = Rounding((1 - READING) * used + READING * np.eye(size, dtype=np.float32))
        for name, parameter in self.model.named_parameters():  # a matrix that several modules share is named once
            if name.endswith("embed_tokens.weight"):
                self._pack(name.removesuffix(".weight"), parameter, rounding, vocabulary_bits, block_size)

    def _groups(self) -> Iterator[dict[str, nn.Linear]]:
        group: dict[str, nn.Linear] = {}
        held = 0
        for name, module in self.model.named_modules():
            if not is_packed_matrix(f"{name}.weight") or not isinstance(module, nn.Linear):
                continue
            size = 4 * module.in_features**2
            if group and held + size > self.budget:
                yield group
                group, held = {}, 0
            group[name] = module
            held += size
        if group:
            yield group

    def _sums(self, group: dict[str, nn.Linear], advance: Callable[[], None]) -> dict[str, Floats]:
        sums = {name: torch.zeros(linear.in_features, linear.in_features) for name, linear in group.items()}

        def watch(name: str, linear: nn.Linear) -> torch.utils.hooks.RemovableHandle:
            def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].detach().float().flatten(0, -2)
                sums[name] += x.T @ x

            return linear.register_forward_pre_hook(add)

        handles = [watch(name, linear) for name, linear in group.items()]
        try:
            for text in self.texts:
                self._states(text)
                advance()
        finally:
            for handle in handles:
                handle.remove()
        return {name: value.numpy() for name, value in sums.items()}

    @torch.no_grad()
    def _states(self, text: Example) -> Tensor:
        target = torch.tensor([text.target])
        if isinstance(self.model, T5Gemma):
            return self.model.states(torch.tensor([text.source]), target)[0].float()
        return self.model.states(target)[0].float()

    @torch.no_grad()
    def _pack(self, name: str, weight: Tensor, rounding: Rounding, bits: int, block_size: int) -> None:
        codes: list[Codes] = []
        scales: list[Floats] = []
        for rows in weight.split(ROWS_AT_ONCE):
            before = rows.float().numpy().copy()
            packed = rounding.quantise(before, bits, block_size)
            after = dequantise(*packed, bits, weight.shape[1])
            self.squared_error += float(np.square(after - before, dtype=np.float64).sum())
            self.squared_norm += float(np.square(before, dtype=np.float64).sum())
            rows.copy_(torch.from_numpy(after))
            codes.append(packed[0])
            scales.append(packed[1])
        np.save(self.folder / f"{name}.codes.npy", np.concatenate(codes))
        np.save(self.folder / f"{name}.scales.npy", np.concatenate(scales))
