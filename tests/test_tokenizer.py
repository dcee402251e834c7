"""The tokenizer against `transformers` and `sentencepiece`, and the promises that hold for any text."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from encore import assets
from encore.tokenizer import SourceFormat, Tokenizer, load_tokenizer

AWKWARD = [
    "",
    " ",
    "   three spaces,\ttab,\r\nline ends\n\n\n  and more  ",
    "Geht's dir gut? „Ja“, sagte sie – 1234,56 €.",
    "\u2581 a literal \u2581\u2581mark",
    "\u0010 \u0010_ \u0010- \u0010\u0010_\u0010-_ \u2581\u0010",
    "日本語のテキスト、👩‍👩‍👧‍👦 👍🏽 ह्रिद्यं",
    "<0x41> <0xE2><0x96> <unused5> <unused100>",
    "<start_of_turn>user\nHi<end_of_turn>\n",
    "e\u0301 \u00e9 \ufb01 \u00a0 \u200b \ufffd \x00",
]
anything = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(list(" \u2581\u0010_-\naeé<>0xß'")))
)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer(assets.path("tokenizer"))


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(assets.path("tokenizer")))


# --- layout and framing


def test_the_layout_is_gemma_3s(ours: Tokenizer) -> None:
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]"]
    names += [f"<unused{i}>" for i in range(99)] + ["<start_of_turn>", "<end_of_turn>"]
    names += [f"<0x{i:02X}>" for i in range(256)]
    assert [ours.token_id(name) for name in names] == list(range(363))
    assert ours.vocab_size == 6144
    assert (ours.pad_id, ours.eos_id, ours.bos_id, ours.stop_ids) == (0, 1, 2, (1, 106))
    assert ours.sentinel_ids == tuple(ours.token_id(f"<unused{100 + i}>") for i in range(128))
    assert ours.sentinel_ids == tuple(range(6016, 6144))
    assert ours.source_format == SourceFormat(bos=True, eos=True)


def test_framing(ours: Tokenizer) -> None:
    plain = ours.encode("Guten Tag.")
    assert not {ours.bos_id, ours.eos_id} & set(plain)
    assert ours.encode_source("Guten Tag.") == [2, *plain, 1]
    assert ours.encode_target("Guten Tag.") == [*plain, 1]
    assert ours.encode("", bos=True, eos=True) == [2, 1]
    assert ours.encode_batch(["a", "Guten Tag.", ""], bos=True) == [[2, *ours.encode("a")], [2, *plain], [2]]


def test_bos_and_eos_are_never_doubled(ours: Tokenizer) -> None:
    assert ours.encode("<bos>Guten Tag.", bos=True) == [2, *ours.encode("Guten Tag.")]
    assert ours.encode_source("<bos>Hallo<eos>") == [2, *ours.encode("Hallo"), 1]


@pytest.mark.parametrize(("name", "token"), [("<start_of_turn>", 105), ("<end_of_turn>", 106), ("<unused100>", 6016)])
def test_a_special_name_gives_its_one_id(ours: Tokenizer, name: str, token: int) -> None:
    assert ours.encode(name) == [token]
    assert ours.encode(f"x{name}y") == [*ours.encode("x"), token, *ours.encode("y")]


# --- against transformers


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_like_transformers(ours: Tokenizer, reference: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert ours.encode_source(text) == reference.encode(text)
    assert ours.decode(ids, skip_special=False) == reference.decode(ids) == text
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(text=anything)
def test_any_text_comes_back_and_has_the_ids_of_transformers(ours: Tokenizer, reference: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special=False) == text
    assert reference.decode(ids) == text
    assert ours.token_id("<unk>") not in ids


def test_real_text_like_transformers(ours: Tokenizer, reference: Any) -> None:
    texts = [row["text"] for row, _ in zip(assets.read_jsonl("text/validation.jsonl"), range(20), strict=False)]
    assert len({text[:20] for text in texts}) == 20
    batch = ours.encode_batch(texts)
    assert batch == reference(texts, add_special_tokens=False)["input_ids"]
    assert ours.decode_batch(batch) == texts
    assert sum(map(len, texts)) > 3.2 * sum(map(len, batch))  # pieces of words, not letters


def test_special_ids_are_left_out_of_decoded_text_only_if_asked(ours: Tokenizer) -> None:
    ids = [2, *ours.encode("Hallo"), 6016, 106, 1, 0, 0]
    assert ours.decode(ids) == "Hallo<unused100>"
    assert ours.decode(ids, skip_special=False) == "<bos>Hallo<unused100><end_of_turn><eos><pad><pad>"


# --- streaming


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> list[str]:
    streamer = tokenizer.streamer(skip_special=skip_special)
    return [streamer.push(i) for i in ids] + [streamer.finish()]


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, 6143), st.integers(107, 362), st.sampled_from([107 + 0x10, 107 + 0x5F, 0]))),
    skip_special=st.booleans(),
)
@example(ids=[107 + 0x10], skip_special=True)
@example(ids=[107 + 0xF0, 107 + 0x9F, 107 + 0x91, 500, 107 + 0xE2], skip_special=False)
def test_a_stream_of_any_ids_equals_decode(ours: Tokenizer, ids: list[int], skip_special: bool) -> None:
    assert "".join(streamed(ours, ids, skip_special=skip_special)) == ours.decode(ids, skip_special=skip_special)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from(list("日本語é👩\u200d👧🏽 ab\u2581\u0010_-")), min_size=1))
def test_a_stream_never_shows_half_a_character(ours: Tokenizer, text: str) -> None:
    shown = ""
    for piece in streamed(ours, ours.encode(text)):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_a_stream_shows_a_character_as_soon_as_it_is_whole(ours: Tokenizer) -> None:
    assert streamed(ours, ours.encode("日本")) == ["", "", "日", "", "", "本", ""]
    assert streamed(ours, ours.encode("\u2581")) == ["", "\u2581", ""]


def test_a_stream_that_ends_in_half_a_character_says_so(ours: Tokenizer) -> None:
    half = ours.encode("日")[:2]
    streamer = ours.streamer()
    assert [streamer.push(i) for i in half] == ["", ""]
    assert streamer.finish() == "\ufffd" == ours.decode(half)
    assert streamer.push(ours.encode("a")[0]) == "a"


# --- conversations


def test_chat_of_one_turn(ours: Tokenizer) -> None:
    text = ours.chat([{"role": "user", "content": " Wie geht's? \n"}])
    assert text == "<start_of_turn>user\nWie geht's?<end_of_turn>\n<start_of_turn>model\n"
    ids = ours.encode_source(text)
    assert ids[:2] == [2, 105] and ids.count(106) == 1 and ids.count(105) == 2


def test_chat_with_system_message_and_history(ours: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    assert ours.chat(messages) == (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "must end with the user"),
        ([{"role": "system", "content": "x"}], "must end with the user"),
        ([{"role": "assistant", "content": "x"}], "message 0 has the role 'assistant' where 'user' is due"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "message 1 .* 'model' is due"),
        ([{"role": "user", "content": "x"}, {"role": "model", "content": "y"}], "must end with the user"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "at most one system message"),
        ([{"role": "user"}], "message 0 has content None"),
    ],
)
def test_chat_refuses(ours: Tokenizer, messages: list[dict[str, str]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ours.chat(messages)


def test_no_torch() -> None:
    code = (
        "import sys, encore.tokenizer, encore.tokenizer_training, encore.assets as a; "
        "encore.tokenizer.load_tokenizer(a.path('tokenizer')); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'sentencepiece')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
