"""Documents and pairs from files of every kind, and the token stream made of them once."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from encore.data.sources import Pair, documents, files, pairs, resolve, token_stream
from encore.tokenizer import Tokenizer

TEXTS = ["abc def", "über\nzwei Zeilen", "日本"]


def jsonl(path: Path, rows: list[dict[str, str]]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_documents_of_each_packing(tmp_path: Path, suffix: str) -> None:
    name = jsonl(tmp_path / f"a.jsonl{suffix}", [{"text": text} for text in [*TEXTS, "  "]])
    assert list(documents([name])) == TEXTS


def test_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\nfile", encoding="utf-8")
    jsonl(tmp_path / "a.jsonl", [{"body": "first"}])
    (tmp_path / "notes.csv").write_text("ignored", encoding="utf-8")
    assert [path.name for path in files([str(tmp_path)])] == ["a.jsonl", "b.txt"]
    assert list(documents([str(tmp_path)], text_key="body")) == ["first", "second\nfile"]


def test_pairs(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "p.jsonl", [{"src": "a", "tgt": "b", "id": "7"}])
    assert list(pairs([name])) == [Pair("a", "b")]


def test_the_shipped_text_and_pairs_are_there() -> None:
    assert next(documents(["asset:text/train"])).strip()
    assert next(pairs(["asset:pairs/train"])).source
    assert resolve("asset:tokenizer").is_dir()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "line 1: not JSON"), ("[]", "expected an object"), ('{"other": 1}', "expected a string under 'text'")],
)
def test_damaged_rows_name_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        list(documents([str(path)]))
    assert "a.jsonl" in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "asset:nothing", "asset:../config.py"])
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ValueError, match=r"no file or folder|ships no"):
        files([name])


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="unknown kind"):
        files([str(tmp_path / "a.csv")])
    with pytest.raises(ValueError, match="holds no"):
        files([str(tmp_path)])


def test_the_stream_is_the_documents_each_with_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    stream = token_stream([name], tokenizer, cache_folder=tmp_path)
    assert stream.tolist() == [i for text in TEXTS for i in tokenizer.encode(text, eos=True)]
    assert isinstance(stream, np.memmap) and stream.dtype == np.uint16
    assert token_stream([name], tokenizer, max_tokens=5, cache_folder=tmp_path).tolist() == stream[:5].tolist()


def test_the_stream_is_made_once_and_anew_for_other_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    token_stream([name], tokenizer, cache_folder=tmp_path)
    (made,) = (tmp_path / "tokens").iterdir()
    stamp = made.stat().st_mtime_ns
    token_stream([name], tokenizer, cache_folder=tmp_path)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()] == [stamp]
    jsonl(tmp_path / "a.jsonl", [{"text": "abd"}])
    assert token_stream([name], tokenizer, cache_folder=tmp_path).tolist() == tokenizer.encode("abd", eos=True)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_no_text_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = jsonl(tmp_path / "a.jsonl", [{"text": " "}])
    with pytest.raises(ValueError, match="no text"):
        token_stream([name], tokenizer, cache_folder=tmp_path)
