"""Cached, batched, streamed generation against the naive generator, on every kind of model and past every window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from encore.generate.batch import generate, stream
from encore.generate.decoding import naive_generate
from encore.generate.padding import by_length, pad_rows
from encore.generate.request import Event, Generation
from encore.generate.rows import check_ids, source_limit
from encore.generate.sampling import SamplingSettings
from encore.generate.torch_rows import TorchRows

WINDOW = 6
KINDS = ("gemma2", "gemma3", "t5gemma", "t5gemma2")
GREEDY = SamplingSettings(repetition_penalty=3.0, max_target_tokens=3 * WINDOW, stop_ids=(), log_probabilities=True)
DRAWN = SamplingSettings(
    temperature=2.0,
    top_k=40,
    top_p=0.97,
    min_p=0.0001,
    repetition_penalty=1.5,
    seed=3,
    max_target_tokens=2 * WINDOW,
    stop_ids=(),
    log_probabilities=True,
)

each_kind = pytest.mark.parametrize("kind", KINDS)


def sources(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 61, n).tolist() for n in lengths]


def same(a: Generation, b: Generation) -> None:
    assert a.tokens == b.tokens
    np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=1e-4)
    assert (a.finish_reason, a.stop, a.text) == (b.finish_reason, b.stop, b.text)


@each_kind
@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_batch_of_unequal_sources_equals_the_oracle_row_by_row(tiny: Callable, kind: str, settings) -> None:
    model = tiny(kind)
    rows = sources(WINDOW - 1, WINDOW, WINDOW + 1, 1, 2 * WINDOW + 3)
    for source, ours in zip(rows, generate(model, rows, settings), strict=True):
        same(ours, naive_generate(model, source, settings))
        assert len(ours.tokens) == settings.max_target_tokens
        assert ours.finish_reason == "length"


@each_kind
def test_a_row_does_not_depend_on_its_neighbours(tiny: Callable, kind: str) -> None:
    model = tiny(kind)
    rows = sources(4, 9, 2)
    alone = generate(model, [rows[1]], DRAWN)[0]
    same(generate(model, rows, DRAWN)[1], alone)
    same(generate(model, [rows[1], rows[1], rows[2]], [DRAWN, DRAWN, GREEDY])[0], alone)


@each_kind
def test_each_row_stops_by_itself_and_is_dropped(tiny: Callable, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    rows = sources(3, 8, 5, 12, 7, 2, seed=1)
    free = generate(model, rows, DRAWN)
    # Stop ids that rows meet at different times: each row's own 2nd, 5th, … token, or none of its own.
    settings = [dataclasses.replace(DRAWN, stop_ids=(g.tokens[(2 + 3 * i) % 11],)) for i, g in enumerate(free)]
    settings[2] = dataclasses.replace(DRAWN, max_target_tokens=1)
    batch_sizes: list[int] = []
    step = TorchRows.step
    monkeypatch.setattr(TorchRows, "step", lambda self, x, **how: (batch_sizes.append(len(x)), step(self, x, **how))[1])
    stopped = generate(model, rows, settings)
    monkeypatch.undo()
    assert batch_sizes[0] == len(rows) and batch_sizes[-1] < len(rows), "ended rows are dropped"
    for row, (ours, chosen) in enumerate(zip(stopped, settings, strict=True)):
        same(ours, naive_generate(model, rows[row], chosen))
        if chosen.stop_ids:
            end = free[row].tokens.index(chosen.stop_ids[0]) + 1
            assert ours.tokens == free[row].tokens[:end]
            assert (ours.finish_reason, ours.stop) == ("stop", chosen.stop_ids[0])
    assert len({len(g.tokens) for g in stopped}) > 2


@each_kind
def test_streaming_gives_the_same_tokens_as_they_come(tiny: Callable, kind: str) -> None:
    model = tiny(kind)
    rows = sources(5, 11)
    events = list(stream(model, rows, DRAWN))
    for row, whole in enumerate(generate(model, rows, DRAWN)):
        own = [event for event in events if event.row == row]
        assert [event.token for event in own] == whole.tokens
        assert [event.log_probability for event in own] == whole.log_probabilities
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + ["length"]
    assert [event.row for event in events[:4]] == [0, 1, 0, 1], "rows advance together"


def test_closing_a_stream_stops_the_work(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("t5gemma2")
    steps: list[int] = []
    step = TorchRows.step
    monkeypatch.setattr(TorchRows, "step", lambda self, x, **how: (steps.append(1), step(self, x, **how))[1])
    events = stream(model, sources(4), GREEDY)
    assert [isinstance(next(events), Event) for _ in range(3)] == [True] * 3
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(steps) == 3


@each_kind
def test_inference_mode_does_not_leak_to_the_caller(tiny: Callable, kind: str) -> None:
    for _ in stream(tiny(kind), sources(4), dataclasses.replace(GREEDY, max_target_tokens=2)):
        assert not torch.is_inference_mode_enabled()


@each_kind
def test_log_probabilities_are_those_of_one_pass_over_the_whole(tiny: Callable, kind: str) -> None:
    model = tiny(kind)
    (source,) = sources(9)
    ours = generate(model, [source], DRAWN)[0]
    with torch.no_grad():
        if kind.startswith("t5"):
            logits = model(torch.tensor([source]), torch.tensor([[2, *ours.tokens[:-1]]]))[0]
        else:
            logits = model(torch.tensor([[*source, *ours.tokens[:-1]]]))[0, len(source) - 1 :]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ours.tokens)[:, None])[:, 0]
    np.testing.assert_allclose(ours.log_probabilities, expected.numpy(), atol=1e-4)


@each_kind
def test_the_repetition_penalty_counts_what_the_decoder_read(tiny: Callable, kind: str) -> None:
    model = tiny(kind)
    strong = dataclasses.replace(GREEDY, repetition_penalty=1e6, max_target_tokens=20)
    (source,) = sources(8)
    tokens = generate(model, [source], strong)[0].tokens
    assert len(set(tokens)) == len(tokens), "nothing is said twice"
    assert 2 not in tokens if kind.startswith("t5") else not set(tokens) & set(source)


def test_seeds(tiny: Callable) -> None:
    model = tiny("t5gemma2")
    (source,) = sources(6)
    hot = dataclasses.replace(DRAWN, temperature=2.0, top_k=0, top_p=1.0)
    answers = generate(model, [source] * 3, [hot, dataclasses.replace(hot, seed=4), hot])
    assert answers[0].tokens == answers[2].tokens
    assert answers[0].tokens != answers[1].tokens


def test_an_empty_source_is_a_row_without_memory(tiny: Callable) -> None:
    settings = dataclasses.replace(GREEDY, max_target_tokens=8)
    for kind in ("t5gemma", "t5gemma2"):
        alone, beside = [generate(tiny(kind), rows, settings)[0] for rows in ([[]], [[], *sources(7)])]
        same(alone, beside)
        assert np.isfinite(alone.log_probabilities).all()
    assert generate(tiny("t5gemma2"), [], settings) == []


def test_default_stop_is_eos(tiny: Callable) -> None:
    model = tiny("t5gemma2")
    hot = SamplingSettings(temperature=3.0, seed=0, max_target_tokens=128)
    answers = generate(model, sources(*[4] * 8), [dataclasses.replace(hot, seed=s) for s in range(8)])
    ended = [a for a in answers if a.finish_reason == "stop"]
    assert ended
    for answer in ended:
        assert answer.tokens.index(1) == len(answer.tokens) - 1 and answer.stop == 1


def test_errors(tiny: Callable) -> None:
    encoder_decoder, decoder_only = tiny("t5gemma2"), tiny("gemma3")
    with pytest.raises(ValueError, match="source 1 has 129 tokens; the model takes 128"):
        generate(encoder_decoder, sources(3, 129), GREEDY)
    with pytest.raises(ValueError, match="source 0 has 120 tokens; the model takes 110 when up to 18"):
        generate(decoder_only, sources(120), GREEDY)
    with pytest.raises(ValueError, match="max_target_tokens is 129; the model has 128"):
        generate(encoder_decoder, sources(3), dataclasses.replace(GREEDY, max_target_tokens=129))
    with pytest.raises(ValueError, match="needs a token to start from"):
        generate(decoder_only, [[]], GREEDY)
    with pytest.raises(ValueError, match="source 0 holds the id 61; the model has ids 0 to 60"):
        generate(encoder_decoder, [[61]], GREEDY)
    with pytest.raises(ValueError, match="2 settings for 1 sources"):
        generate(encoder_decoder, sources(3), [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(encoder_decoder, sources(3), dataclasses.replace(GREEDY, stop_strings=("x",)))


def test_the_longest_source_and_target_fit(tiny: Callable) -> None:
    settings = dataclasses.replace(GREEDY, max_target_tokens=40)
    for kind in KINDS:
        model = tiny(kind, max_position_embeddings=48)
        (source,) = sources(source_limit(model, 40))
        assert len(source) == (48 if kind.startswith("t5") else 8)
        same(generate(model, [source], settings)[0], naive_generate(model, source, settings))


def test_padding() -> None:
    tokens, mask = pad_rows([[5, 6], [7]], 0, side="right")
    assert tokens.tolist() == [[5, 6], [7, 0]] and mask is not None
    assert mask.tolist() == [[True, True], [True, False]]
    tokens, mask = pad_rows([[5, 6], [7], []], 9, side="left")
    assert tokens.tolist() == [[5, 6], [9, 7], [9, 9]] and mask is not None
    assert mask.tolist() == [[True, True], [False, True], [False, False]]
    assert pad_rows([[5], [6]], 0, side="left")[1] is None
    tokens, mask = pad_rows([[]], 0, side="right")
    assert tokens.tolist() == [[0]] and mask is not None and mask.tolist() == [[False]]


def test_batches_by_length_hold_every_row_once() -> None:
    rows = sources(3, 9, 1, 9, 4)
    batches = list(by_length(rows, 2))
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    assert [[len(rows[i]) for i in batch] for batch in batches] == [[9, 9], [4, 3], [1]]
    with pytest.raises(ValueError, match="batch_size is 0"):
        list(by_length(rows, 0))
    with pytest.raises(ValueError, match="target 1 holds the id -1"):
        check_ids([[1], [-1]], 5, "target")
