"""Sources in chunks: cut without loss, framed alike, encoded apart, and read by the decoder as one memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import encore
from encore.cli import app
from encore.config import Rope, StackConfig, T5GemmaConfig, VisionConfig
from encore.export.folder import export
from encore.generate import chunks as chunking
from encore.generate.batch import generate
from encore.generate.chunks import Chunks, cut
from encore.generate.decoding import encoder_states, naive_generate
from encore.generate.encoding import encode_sources
from encore.generate.onnx_backend import OnnxModel
from encore.generate.sampling import SamplingSettings
from encore.generate.source import PictureFormat, SourceReader
from encore.generate.text import TextGenerator
from encore.model.encoder import Memory
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import Tokenizer

SETTINGS = SamplingSettings(max_target_tokens=12, stop_ids=())
SOURCES = [
    Chunks([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]),
    Chunks([[20, 21]]),
    [22, 23, 24, 25, 26, 27, 28, 29, 30],
]
BOOK = "It was late.\nThe rain is warm. We walk on, and then we rest. " * 6


def alone(model: T5Gemma, source: list[int]) -> torch.Tensor:
    """The states of each chunk, encoded without batch or padding, one behind the other."""
    rows = source.chunks if isinstance(source, Chunks) else [source]
    return torch.cat([model.encode(torch.tensor([list(row)])).states[0] for row in rows])


@given(st.lists(st.integers(1, 4), max_size=40), st.integers(4, 12))
def test_a_cut_loses_nothing_and_splits_no_atom(sizes: list[int], room: int) -> None:
    atoms = [tuple(range(100 * i, 100 * i + size)) for i, size in enumerate(sizes)]
    pieces = cut(atoms, room, lambda token: b" word" if token % 3 else b"\n")
    assert [token for piece in pieces for token in piece] == [token for atom in atoms for token in atom]
    assert all(0 < len(piece) <= room for piece in pieces)
    starts = {piece[0] for piece in pieces}
    assert starts <= {atom[0] for atom in atoms}


def test_cuts_come_after_lines_then_sentences_then_words() -> None:
    def first_piece(words: list[str]) -> list[str]:
        pieces = cut([(i,) for i in range(len(words))], 8, lambda i: words[i].encode())
        return [words[i] for i in pieces[0]]

    assert first_piece([" a", " b", " c", " d", " e", " f", "\n", "g", " h", " i"])[-1] == "\n"
    assert first_piece([" a", " b", " c", " d", " e", " f", ".", " g", " h", " i"])[-1] == "."
    assert first_piece([" a", " b", " c", " d", " e", "f", " g", "h", "i", "j"])[-1] == "f"
    assert len(first_piece(list("abcdefghij"))) == 8
    assert first_piece(["\n", *list("abcdefghij")]) != ["\n"]  # not so early


def test_an_atom_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="a picture takes 5"):
        cut([(1, 2, 3, 4, 5)], 4, lambda _: b"")


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
@pytest.mark.parametrize("at_once", [1, 16, 8192])
def test_chunks_are_encoded_as_if_alone(tiny, kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    monkeypatch.setattr(chunking, "TOKENS_AT_ONCE", at_once)
    with torch.inference_mode():
        memory = encode_sources(model.encoder, SOURCES)
        assert memory.mask is not None and memory.mask.sum(dim=1).tolist() == [15, 2, 9]
        for row, source in enumerate(SOURCES):
            torch.testing.assert_close(memory.states[row, : len(source)], alone(model, source), atol=1e-5, rtol=1e-5)


def test_chunks_are_as_packed_segments(tiny) -> None:
    """The other way to keep tokens from seeing each other gives the same states."""
    model = tiny("t5gemma2")
    source = SOURCES[0]
    assert isinstance(source, Chunks)
    segments = [i for i, chunk in enumerate(source.chunks, start=1) for _ in chunk]
    with torch.inference_mode():
        packed = model.encode(torch.tensor([list(source)]), segment_ids=torch.tensor([segments])).states
        torch.testing.assert_close(encode_sources(model.encoder, [source]).states, packed, atol=1e-5, rtol=1e-5)


def test_join_drops_padding_and_keeps_order() -> None:
    left = Memory(torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[True, False, True]]))
    right = Memory(torch.arange(10.0, 18.0).reshape(2, 2, 2), torch.tensor([[True, True], [True, False]]))
    joined = Memory.join([[left, right], [left]])
    assert joined.states[..., 0].tolist() == [[0, 4, 10, 12, 14], [0, 4, 0, 0, 0]]
    assert joined.mask is not None and joined.mask.tolist() == [[True] * 5, [True] * 2 + [False] * 3]
    assert Memory.join([[left], [left]]).mask is None
    with pytest.raises(ValueError, match="at least one"):
        Memory.join([[left], []])


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
def test_generation_reads_all_chunks(tiny, kind: str) -> None:
    model = tiny(kind)
    found = generate(model, SOURCES, SETTINGS)
    for source, generation in zip(SOURCES, found, strict=True):
        assert generation.tokens == naive_generate(model, source, SETTINGS).tokens
    with torch.inference_mode():  # by hand, without any of the generation code
        memory = Memory(alone(model, SOURCES[0])[None])
        target = [model.config.bos_token_id]
        for _ in range(SETTINGS.max_target_tokens):
            target.append(int(model.decode(torch.tensor([target]), memory)[0, -1].argmax()))
    assert found[0].tokens == target[1:]
    assert found[0].tokens != generate(model, [list(SOURCES[0])], SETTINGS)[0].tokens  # whole is another thing


def test_only_a_chunk_has_to_fit_the_positions(tiny) -> None:
    model = tiny("t5gemma2")  # 128 positions
    long = Chunks([[5 + i % 40 for i in range(100)]] * 3)
    assert len(generate(model, [long], SETTINGS)[0].tokens) == 12
    with pytest.raises(ValueError, match="300 tokens; the model takes 128"):
        generate(model, [list(long)], SETTINGS)


def test_exported_models_read_the_same_chunks(tmp_path: Path) -> None:
    model = encore.load("translator", dtype=torch.float32)
    export("translator", tmp_path / "exported", "float32")
    exported = OnnxModel.load(tmp_path / "exported", threads=1)
    memory = exported.encode(SOURCES)
    assert memory.lengths.tolist() == [15, 2, 9]
    for row, states in enumerate(encoder_states(model, SOURCES)):
        np.testing.assert_allclose(memory.states[row, : len(states)], states, atol=2e-4)
    ours, theirs = (generate(m, SOURCES, SETTINGS) for m in (model, exported))
    assert [g.tokens for g in ours] == [g.tokens for g in theirs]


@settings(deadline=None, max_examples=30)
@given(st.text(alphabet="abc. \n", max_size=200), st.integers(8, 40))
def test_a_reader_loses_no_text_between_chunks(tokenizer: Tokenizer, text: str, chunk_tokens: int) -> None:
    reader = SourceReader(tokenizer, max_tokens=10_000, chunk_tokens=chunk_tokens, instruction="Go:")
    source = reader.read(text).tokens
    assert isinstance(source, Chunks)
    head = tokenizer.encode("Go:\n", bos=tokenizer.source_format.bos)
    tail = [tokenizer.eos_id] if tokenizer.source_format.eos else []
    body: list[int] = []
    for chunk in source.chunks:
        assert len(chunk) <= chunk_tokens
        assert list(chunk[: len(head)]) == head and list(chunk[len(chunk) - len(tail) :]) == tail
        body += chunk[len(head) : len(chunk) - len(tail)]
    assert body == tokenizer.encode(text)


def test_a_text_of_one_chunk_is_read_as_ever(tokenizer: Tokenizer) -> None:
    plain, chunked = SourceReader(tokenizer, max_tokens=90), SourceReader(tokenizer, max_tokens=90, chunk_tokens=40)
    for text in ("Good morning.", ""):
        assert chunked.read(text).tokens == plain.read(text).tokens


def test_each_chunk_of_a_chat_is_a_turn(tokenizer: Tokenizer) -> None:
    reader = SourceReader(tokenizer, max_tokens=1000, chat=True, chunk_tokens=50, instruction="Translate:")
    source = reader.read(BOOK).tokens
    assert isinstance(source, Chunks) and len(source.chunks) > 2
    for chunk in source.chunks:
        text = tokenizer.decode(chunk, skip_special=False)
        assert text.count("<start_of_turn>user\nTranslate:\n") == 1 and text.endswith("<start_of_turn>model\n<eos>")


def test_a_reader_says_what_it_cannot_do(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="say with chunk_tokens"):
        SourceReader(tokenizer, max_tokens=90, instruction="Go:")
    with pytest.raises(ValueError, match="shorten the instruction"):
        SourceReader(tokenizer, max_tokens=90, chunk_tokens=5, instruction="A long instruction that leaves no room.")
    reader = SourceReader(tokenizer, max_tokens=30, chunk_tokens=20)
    with pytest.raises(ValueError, match="30 are allowed; shorten it"):
        reader.read(BOOK)
    said: list[str] = []
    reader = SourceReader(tokenizer, max_tokens=30, chunk_tokens=20, overflow="keep-end", warn=said.append)
    source = reader.read(BOOK)
    whole = tokenizer.encode(BOOK)
    assert source.num_tokens_cut == len(whole) - 30 and "its end was kept" in said[0]
    assert [t for t in source.tokens if t not in (tokenizer.bos_id, tokenizer.eos_id)] == whole[-30:]


def test_pictures_stay_whole_and_go_with_their_chunk(tokenizer: Tokenizer) -> None:
    stack = StackConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=6,
        local_rope=Rope(10_000.0),
        global_rope=Rope(1_000_000.0),
        query_pre_attn_scalar=8,
        qk_norm=True,
    )
    vision = VisionConfig(16, 24, 1, 2, image_size=28, patch_size=7, mm_tokens_per_image=4)
    ids = {"boi_token_index": 6, "eoi_token_index": 7, "image_token_index": 8}
    model = T5Gemma(T5GemmaConfig("t5gemma2", stack, stack, vision=vision, **ids), vision=True)
    torch.manual_seed(0)
    model.init_weights()
    model.eval()
    pictures = [Image.new("RGB", (28, 28), color) for color in ("red", "green", "blue")]
    text = "<start_of_image> and <start_of_image> are not at all like this one here: <start_of_image>."
    form = PictureFormat.of(model.config)
    source = SourceReader(tokenizer, max_tokens=200, chunk_tokens=16, picture_format=form).read(text, pictures=pictures)
    assert isinstance(source.tokens, Chunks) and len(source.tokens.chunks) > 2 and source.pictures is not None
    numbers = [chunk.count(8) // 4 for chunk in source.tokens.chunks]
    assert sum(numbers) == 3 and all(chunk.count(8) % 4 == 0 for chunk in source.tokens.chunks)
    pixels = torch.as_tensor(source.pictures)
    with torch.inference_mode():
        found = encode_sources(model.encoder, [source.tokens, [5, 6, 9]], pixels).states[0]
        start, expected = 0, []
        for chunk, number in zip(source.tokens.chunks, numbers, strict=True):
            own = pixels[start : start + number] if number else None
            expected.append(model.encode(torch.tensor([list(chunk)]), pictures=own).states[0])
            start += number
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_texts_longer_than_the_model_are_answered_in_chunks(
    tokenizer: Tokenizer, speaker: Callable[[str], T5Gemma], tmp_path: Path
) -> None:
    encore.save(speaker("t5gemma2"), tmp_path, tokenizer=tokenizer)  # 320 positions
    book = BOOK * 6
    options = ["--model", str(tmp_path), "--max-target-tokens", "5", "--json", book]
    assert CliRunner().invoke(app, ["generate", *options]).exception is not None
    chunked = ["--chunk-tokens", "60", "--instruction", "Retell:"]
    done = CliRunner().invoke(app, ["generate", *chunked, *options])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    generator = TextGenerator.load(tmp_path, chunk_tokens=60, instruction="Retell:")
    source = generator.reader(5).read(book).tokens
    assert row["source_tokens"] == len(source) > 320
    assert row["tokens"] == naive_generate(generator.model, source, SamplingSettings(max_target_tokens=5)).tokens


def test_who_cannot_read_chunks_says_so(tokenizer: Tokenizer, speaker: Callable[[str], T5Gemma]) -> None:
    with pytest.raises(ValueError, match="no encoder to read chunks with"):
        TextGenerator(speaker("gemma3"), tokenizer, chunk_tokens=50).reader(5)
    with pytest.raises(ValueError, match="at most 320 at a time"):
        TextGenerator(speaker("t5gemma2"), tokenizer, chunk_tokens=500).reader(5)
