"""Windows and pairs become the batches of a step, as a pure function of the step's number."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from encore.data.batch import Batch
from encore.data.examples import TablePairs, TokenPair, causal, pair_row, source_tokens
from encore.data.layout import Row
from encore.data.pipeline import PairBatches, WindowBatches
from encore.data.sources import Pair, pair_tables
from encore.data.windows import Windows
from encore.objectives import ul2
from encore.tokenizer import Tokenizer
from encore.train.reading import objective_named, read_pairs

STREAM = np.random.default_rng(0).integers(370, 440, 1000).astype(np.uint16)


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for a, b in zip(left, right, strict=True) for f in fields(Batch)]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_an_epoch_holds_each_stretch_of_text_once() -> None:
    windows = Windows(np.arange(1000, dtype=np.uint16), 32, seed=3)
    epochs = [[windows[i] for i in range(e * windows.per_epoch, (e + 1) * windows.per_epoch)] for e in range(3)]
    starts = [sorted(int(window[0]) for window in epoch) for epoch in epochs]
    for epoch, begins in zip(epochs, starts, strict=True):
        assert all(window.tolist() == list(range(window[0], window[0] + 32)) for window in epoch)
        assert begins == list(range(begins[0], begins[0] + 32 * windows.per_epoch, 32))
    assert len({begins[0] for begins in starts}) > 1, "every epoch is cut at the same places"
    orders = [[int(window[0]) - begins[0] for window in epoch] for epoch, begins in zip(epochs, starts, strict=True)]
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_windows_in_order_for_validation() -> None:
    windows = Windows(np.arange(100, dtype=np.uint16), 32, shuffle=False)
    assert [windows[i][0] for i in range(windows.per_epoch)] == [0, 32, 64]


def test_too_little_text_says_what_would_do() -> None:
    with pytest.raises(ValueError, match="at most 20"):
        Windows(np.arange(40, dtype=np.uint16), 32)


def raw_text(row: Row, tokenizer: Tokenizer) -> list[int]:
    """Inputs and targets put together again."""
    assert row.source is not None
    source = [i for i in row.source.tolist() if i not in (tokenizer.bos_id, tokenizer.eos_id)]
    target = row.target.tolist()[:-1]
    if not set(source) & set(tokenizer.sentinel_ids):
        return source + target
    spans: dict[int, list[int]] = {}
    for i in target:
        if i in tokenizer.sentinel_ids:
            spans[i] = current = []
        else:
            current.append(i)
    return [j for i in source for j in (spans[i] if i in tokenizer.sentinel_ids else [i])]


def test_causal_and_denoising_read_the_same_text_in_the_same_order(tokenizer: Tokenizer) -> None:
    denoise = objective_named("t5gemma2", tokenizer, encoder=True)
    plain, noisy = (
        WindowBatches(Windows(STREAM, 64, seed=5), objective, tokenizer, batch_size=4, seed=5)
        for objective in (causal, denoise)
    )
    for index in range(60):
        assert raw_text(noisy.row(index), tokenizer) == plain.row(index).target.tolist()


def test_a_step_is_a_pure_function_of_its_number(tokenizer: Tokenizer) -> None:
    def make() -> WindowBatches:
        objective = objective_named("t5gemma2", tokenizer, encoder=True)
        return WindowBatches(
            Windows(STREAM, 48, seed=1), objective, tokenizer, batch_size=6, accumulation_steps=2, seed=1
        )

    walked = make()
    in_order = [walked(step) for step in range(12)]
    for step in (11, 3, 7):
        assert same(make()(step), in_order[step])
    assert not same(in_order[0], in_order[1])


def test_denoising_rows_are_in_the_source_format_and_end_in_eos(tokenizer: Tokenizer) -> None:
    row = objective_named("prefixlm", tokenizer, encoder=True).make(0, np.arange(370, 380), np.random.default_rng(0))
    assert row.source is not None
    assert row.source.tolist() == [tokenizer.bos_id, *range(370, 375), tokenizer.eos_id]
    assert row.target.tolist() == [*range(375, 380), tokenizer.eos_id]


def test_each_kind_of_model_has_its_objectives(tokenizer: Tokenizer) -> None:
    for name, encoder in (("causal", True), ("t5gemma2", False)):
        with pytest.raises(ValueError, match="but the model is"):
            objective_named(name, tokenizer, encoder=encoder)
    with pytest.raises(ValueError, match="no mixture"):
        objective_named("nonsense", tokenizer, encoder=True)
    assert "t5gemma2" in ul2.MIXTURES


def test_batches_are_cut_by_length(tokenizer: Tokenizer) -> None:
    objective = objective_named("t5gemma2", tokenizer, encoder=True)
    made = WindowBatches(Windows(STREAM, 64, seed=0), objective, tokenizer, batch_size=8, accumulation_steps=2)
    for step in range(5):
        short, long = made(step)
        assert short.decoder_mask.sum(1).max() <= long.decoder_mask.sum(1).min()
    with pytest.raises(ValueError, match="equal parts"):
        WindowBatches(Windows(STREAM, 64), objective, tokenizer, batch_size=8, accumulation_steps=3)


def token_pairs(rows: list[Pair], tokenizer: Tokenizer, folder: Path, longest: int) -> TablePairs:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"src": row.source, "tgt": row.target}) + "\n" for row in rows))
    return read_pairs(pair_tables([str(path)], tokenizer, cache_folder=folder), longest, longest, 0)


def test_pairs_are_framed_as_the_tokenizer_says(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, target = "abc de", "fgh i"
    (pair,) = token_pairs([Pair(source, target)], tokenizer, tmp_path, 50)
    row = pair_row(pair, tokenizer, encoder=True)
    assert row.source is not None
    assert row.source.tolist() == tokenizer.encode_source(source) == source_tokens(pair.source, tokenizer).tolist()
    assert row.target.tolist() == tokenizer.encode_target(target)
    text = pair_row(pair, tokenizer, encoder=False)
    prompt = tokenizer.encode(source, bos=True, eos=True)
    assert [tokenizer.bos_id, *text.target.tolist()] == prompt + row.target.tolist()
    assert text.target[: text.prompt_tokens].tolist() == prompt[1:]


def test_long_and_empty_pairs_are_left_out_and_counted(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Pair("a", "b"), Pair("a " * 50, "b"), Pair("a", "b " * 50), Pair("", "b")]
    kept = token_pairs(rows, tokenizer, tmp_path, 20)
    assert [pair.source.tolist() for pair in kept] == [tokenizer.encode("a")]
    assert "2 of 4 pairs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the 1"):
        token_pairs(rows[1:2], tokenizer, tmp_path, 20)


def toy_pairs(number: int) -> list[TokenPair]:
    numbers = random.Random(1)
    made: list[TokenPair] = []
    for i in range(number):
        source = numbers.randint(1, 12)
        target = max(1, source + numbers.randint(-1, 1))
        made.append(TokenPair(np.full(source, 370 + i % 60, np.int32), np.full(target, 370 + i % 60, np.int32)))
    return made


def test_an_epoch_of_pairs_holds_each_once_within_the_budget(tokenizer: Tokenizer) -> None:
    pairs = toy_pairs(200)
    made = PairBatches(pairs, tokenizer, encoder=True, batch_tokens=100, seed=2)
    seen: list[int] = []
    number = 0
    orders: list[list[int]] = []
    for _ in range(3):
        seen = []
        while len(seen) < 200:
            indices = made.indices(number).tolist()
            longest = [max(len(getattr(pairs[i], side)) for i in indices) for side in ("source", "target")]
            assert sum(longest) * len(indices) <= 100
            seen += indices
            number += 1
        assert sorted(seen) == list(range(200))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    padding = sum(
        1 - batch.num_tokens / (batch.decoder_mask.numel() + batch.encoder_mask.numel())
        for batch in (made.collate(made.indices(i)) for i in range(10))
        if batch.encoder_mask is not None
    )
    assert padding / 10 < 0.25, "batches are not of like lengths"
    fresh = PairBatches(pairs, tokenizer, encoder=True, batch_tokens=100, seed=2)
    for step in (number - 1, 3, number // 2):  # far ahead, and back
        assert fresh.indices(step).tolist() == made.indices(step).tolist()


def test_both_kinds_of_model_get_the_same_pairs_in_the_same_batches(tokenizer: Tokenizer) -> None:
    pairs = toy_pairs(50)
    one, other = (PairBatches(pairs, tokenizer, encoder=e, batch_tokens=90, seed=2) for e in (True, False))
    assert all(one.indices(i).tolist() == other.indices(i).tolist() for i in range(30))
    left, right = one(4)[0], other(4)[0]
    assert left.encoder_mask is not None and right.encoder_mask is None
    assert left.total_weight == right.total_weight


def test_a_pair_over_the_budget_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_tokens"):
        PairBatches(toy_pairs(50), tokenizer, encoder=True, batch_tokens=8)
