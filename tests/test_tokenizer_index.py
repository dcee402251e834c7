"""The index of a tokenizer.json against the whole file, which is its oracle: the same ids for any text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encore import assets
from encore.tokenizer import load_tokenizer
from encore.tokenizer_backends import JsonBackend
from encore.tokenizer_index import TOKENIZER_INDEX, IndexedBackend, build_index, open_json

SHIPPED = assets.path("tokenizer") / "tokenizer.json"


def write(folder: Path, change: Callable[[dict[str, Any]], object] = lambda raw: None) -> Path:
    raw = json.loads(SHIPPED.read_text(encoding="utf-8"))
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def whole() -> JsonBackend:
    return JsonBackend(SHIPPED)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> IndexedBackend:
    path = tmp_path_factory.mktemp("indexed") / "tokenizer.json"
    shutil.copyfile(SHIPPED, path)
    assert build_index(path, min_pieces=0)
    return IndexedBackend(path)


PIECES = [
    *json.loads(SHIPPED.read_text(encoding="utf-8"))["model"]["vocab"],
    " ",
    "ẞ",
    "👩‍👩‍👧",
    "<0x41",
    "\ud7ff",
    "\0",
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=40)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(texts.map("".join), max_size=3))
def test_any_text_has_the_ids_of_the_whole_vocabulary(
    whole: JsonBackend, indexed: IndexedBackend, rows: list[str]
) -> None:
    indexed._spent = 0.0
    assert indexed.encode_batch(rows) == whole.encode_batch(rows)
    assert "_whole" not in vars(indexed)


def test_pieces_are_those_of_the_whole_vocabulary(whole: JsonBackend, indexed: IndexedBackend) -> None:
    assert (indexed.size, indexed.special_ids) == (whole.size, whole.special_ids)
    assert (indexed.strip_space, indexed.escapes) == (whole.strip_space, whole.escapes)
    ids = range(-1, whole.size + 2)
    assert [indexed.piece(token) for token in ids] == [
        whole.piece(max(token, 0)) if token >= 0 else None for token in ids
    ]
    for piece in (*PIECES, "", "no piece"):
        assert indexed.token_id(piece) == whole.token_id(piece)


def test_much_text_is_left_to_the_whole_vocabulary(indexed: IndexedBackend, whole: JsonBackend) -> None:
    indexed._spent = 0.0
    text = "Guten Morgen. " * 10_000
    assert indexed.encode_batch([text]) == whole.encode_batch([text])
    assert "_whole" in vars(indexed)
    del indexed._whole
    indexed._spent = 10.0
    assert indexed.encode_batch(["Guten Tag"]) == whole.encode_batch(["Guten Tag"])
    assert vars(indexed).pop("_whole")


def test_an_index_of_another_file_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert isinstance(open_json(path), JsonBackend)
    assert build_index(path, min_pieces=0) and isinstance(open_json(path), IndexedBackend)
    write(tmp_path, lambda raw: raw["model"]["merges"].pop())
    assert isinstance(open_json(path), JsonBackend)
    (tmp_path / TOKENIZER_INDEX).write_bytes(b"PK\x03\x04 cut off")
    assert isinstance(open_json(path), JsonBackend)
    assert load_tokenizer(tmp_path).encode_source("Guten Tag")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        lambda raw: raw.update(normalizer={"type": "Prepend", "prepend": "\u2581"}),
        lambda raw: raw.update(normalizer={"type": "Replace", "pattern": {"String": "  "}, "content": "\u2581"}),
        lambda raw: raw["model"].update(continuing_subword_prefix="##"),
        lambda raw: raw["model"].update(dropout=0.1),
        lambda raw: raw["added_tokens"][0].update(normalized=True),
        lambda raw: raw["model"]["merges"].append(["<0x41>", "<0x42>"]),
    ],
)
def test_a_tokenizer_of_another_kind_gets_no_index(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    assert not build_index(write(tmp_path, change), min_pieces=0)
    assert not (tmp_path / TOKENIZER_INDEX).exists()


def test_a_small_vocabulary_needs_none(tmp_path: Path) -> None:
    assert not build_index(write(tmp_path))
    assert not (tmp_path / TOKENIZER_INDEX).exists()


def test_added_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    def add(raw: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        raw["added_tokens"].append({"id": 6144, "content": "<image_soft_token>", **flags})
        raw["added_tokens"].append({"id": 6145, "content": "Morgen", **flags, "single_word": True})

    path = write(tmp_path, add)
    assert build_index(path, min_pieces=0)
    indexed, whole = IndexedBackend(path), JsonBackend(path)
    assert indexed.size == whole.size == 6146
    rows = ["a<image_soft_token>b", "Guten Morgen, Morgengabe", "Morgen"]
    assert indexed.encode_batch(rows) == whole.encode_batch(rows)
    assert indexed.piece(6144) == whole.piece(6144) == "<image_soft_token>"
