"""Text in, text out: sources and their limits, stop strings in what a model writes, order, checkpoint folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import encore
from encore.generate.batch import generate, stream
from encore.generate.decoding import naive_generate
from encore.generate.sampling import SamplingSettings
from encore.generate.source import SourceCutWarning, SourceReader
from encore.generate.text import TextGenerator
from encore.tokenizer import SourceFormat, Tokenizer

TEXTS = ["Good morning.", "", "The cat is asleep on the warm stove.", "Why?", "We saw them, but they did not see us."]
DRAWN = SamplingSettings(temperature=1.5, seed=1, max_target_tokens=24, stop_ids=())

each_pair = pytest.mark.parametrize("kind", ["t5gemma2", "gemma3"])


# --- text ------------------------------------------------------------------------------------------------------------


@each_pair
def test_answers_come_in_order_and_equal_the_oracle(speaker: Callable, tokenizer: Tokenizer, kind: str) -> None:
    model = speaker(kind)
    answers = list(TextGenerator(model, tokenizer).generate(TEXTS, DRAWN, batch_size=2))
    assert [answer.source.text for answer in answers] == TEXTS
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = tokenizer.encode_source(text)
        expected = naive_generate(model, ids, DRAWN, tokenizer=tokenizer)
        assert answer.source.tokens == ids
        assert answer.generation.tokens == expected.tokens
        assert answer.text == expected.text == tokenizer.decode(expected.tokens)


def test_with_a_batch_of_one_each_text_is_answered_before_the_next_is_read(
    speaker: Callable, tokenizer: Tokenizer
) -> None:
    read: list[str] = []

    def lines() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    answers = TextGenerator(speaker("t5gemma2"), tokenizer).generate(lines(), DRAWN, batch_size=1)
    assert next(answers).source.text == TEXTS[0]
    assert read == TEXTS[:1]


@each_pair
def test_stop_strings_cut_the_text_and_end_the_row(speaker: Callable, tokenizer: Tokenizer, kind: str) -> None:
    model = speaker(kind)
    source = tokenizer.encode(TEXTS[2], bos=True)
    free = generate(model, [source], DRAWN, tokenizer=tokenizer)[0]
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 5]
    assert len(stop) == 5
    settings = dataclasses.replace(DRAWN, stop_strings=("never written", stop))
    stopped, other = generate(
        model, [source, tokenizer.encode(TEXTS[0], bos=True)], [settings, DRAWN], tokenizer=tokenizer
    )
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop) == ("stop", stop)
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert 0 < len(stopped.tokens) < len(free.tokens)
    assert len(other.tokens) == DRAWN.max_target_tokens
    pieces = [event.text for event in stream(model, [source], settings, tokenizer=tokenizer)]
    assert "".join(pieces) == stopped.text


def test_the_pieces_of_a_stream_join_to_the_text(speaker: Callable, tokenizer: Tokenizer) -> None:
    generator = TextGenerator(speaker("t5gemma2"), tokenizer)
    for seed in range(4):
        settings = dataclasses.replace(DRAWN, seed=seed, temperature=3.0)
        pieces = [event.text for event in generator.stream(TEXTS[0], settings)]
        assert "".join(pieces) == next(generator.generate(TEXTS[:1], settings)).text


def test_the_tokenizers_stop_ids_end_a_target(speaker: Callable, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.stop_ids) == 2
    model = speaker("t5gemma2")
    source = tokenizer.encode_source(TEXTS[0])
    third = generate(model, [source], DRAWN, tokenizer=tokenizer)[0].tokens[2]
    settings = dataclasses.replace(DRAWN, stop_ids=(*tokenizer.stop_ids, third))
    stopped = generate(model, [source], settings, tokenizer=tokenizer)[0]
    assert stopped.stop == third and stopped.tokens[-1] == third
    assert stopped.text == tokenizer.decode(stopped.tokens[:-1]), "the stop token is not part of the text"


def test_a_checkpoint_folder_is_enough(speaker: Callable, tokenizer: Tokenizer, tmp_path: Path) -> None:
    encore.save(speaker("t5gemma2"), tmp_path / "model", tokenizer=tokenizer)
    here = [a.text for a in TextGenerator(speaker("t5gemma2"), tokenizer).generate(TEXTS, DRAWN)]
    loaded = TextGenerator.load(tmp_path / "model")
    assert [a.text for a in loaded.generate(TEXTS, DRAWN)] == here
    with pytest.raises(ValueError, match="one string"):
        next(loaded.generate("text", DRAWN))


def test_chat_wraps_the_text_in_turns(speaker: Callable, tokenizer: Tokenizer) -> None:
    generator = TextGenerator(speaker("t5gemma2"), tokenizer, chat=True)
    (answer,) = generator.generate(["Why?"], DRAWN)
    assert answer.source.tokens == tokenizer.encode_source(tokenizer.chat([{"role": "user", "content": "Why?"}]))
    assert tokenizer.stop_ids[1] in answer.source.tokens, "the user's turn is ended"


# --- sources that are too long ---------------------------------------------------------------------------------------

LONG = " ".join(f"word number {i}." for i in range(40))


def reader(tokenizer: Tokenizer, max_tokens: int, overflow: str) -> SourceReader:
    return SourceReader(tokenizer, max_tokens=max_tokens, overflow=overflow)  # pyright: ignore


def test_too_long_is_an_error_that_says_what_to_do(tokenizer: Tokenizer) -> None:
    count = len(tokenizer.encode_source(LONG))
    assert reader(tokenizer, count, "error").read(LONG).num_tokens_cut == 0
    with pytest.raises(ValueError, match=f"source 7 has {count} tokens and {count - 1} are allowed; shorten it"):
        reader(tokenizer, count - 1, "error").read(LONG, 7)


@pytest.mark.parametrize("eos", [True, False])
def test_cutting_keeps_the_end_asked_for_and_says_which(tokenizer: Tokenizer, eos: bool) -> None:
    tokenizer = tokenizer.with_source_format(SourceFormat(bos=True, eos=eos))
    whole = tokenizer.encode(LONG)
    with pytest.warns(SourceCutWarning, match=r"cut from its end, its beginning was kept"):
        start = reader(tokenizer, 30, "keep-start").read(LONG)
    with pytest.warns(SourceCutWarning, match=r"cut from its beginning, its end was kept"):
        end = reader(tokenizer, 30, "keep-end").read(LONG)
    frame = tokenizer.encode_source("")
    for source in (start, end):
        assert len(source.tokens) == 30
        assert source.num_tokens_cut == len(whole) + len(frame) - 30
        assert source.tokens[0] == tokenizer.bos_id
        assert (source.tokens[-1] == tokenizer.eos_id) == eos
    body = 30 - len(frame)
    assert start.tokens[1 : body + 1] == whole[:body]
    assert end.tokens[1 : body + 1] == whole[-body:]


@pytest.mark.parametrize("overflow", ["keep-start", "keep-end"])
def test_a_chat_keeps_its_turns_when_cut(tokenizer: Tokenizer, overflow: str) -> None:
    said: list[str] = []
    cutter = SourceReader(
        tokenizer,
        max_tokens=40,
        chat=True,
        overflow=overflow,  # pyright: ignore
        warn=said.append,
    )
    tokens = cutter.read(LONG, 3).tokens
    assert 30 < len(tokens) <= 40
    frame = tokenizer.encode_source(tokenizer.chat([{"role": "user", "content": ""}]))
    for special in set(frame):
        if special < 363:  # control tokens
            assert tokens.count(special) >= frame.count(special)
    assert len(said) == 1 and "source 3 has" in said[0]


def test_limits_that_leave_no_room(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="at most 2 source tokens are allowed, and 2 of them stand around"):
        reader(tokenizer, 2, "error")
    with pytest.raises(ValueError, match="overflow is 'truncate'; expected one of error, keep-start, keep-end"):
        reader(tokenizer, 9, "truncate")


def test_the_models_own_limit_holds_beside_the_asked_one(speaker: Callable, tokenizer: Tokenizer) -> None:
    assert TextGenerator(speaker("t5gemma2"), tokenizer).reader(24).max_tokens == 320
    assert TextGenerator(speaker("gemma3"), tokenizer).reader(24).max_tokens == 320 - 24
    assert TextGenerator(speaker("gemma3"), tokenizer, max_source_tokens=9).reader(24).max_tokens == 9
    too_much = TextGenerator(speaker("t5gemma2"), tokenizer, max_source_tokens=5).generate([LONG], DRAWN)
    with pytest.raises(ValueError, match=r"source 1 has .* 5 are allowed"):
        next(too_much)
