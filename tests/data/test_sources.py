"""Documents and pairs from files of every kind, and the token stream made of them once."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from encore.data.examples import TablePairs
from encore.data.shards import resolve, shards
from encore.data.sources import Pair, documents, pair_tables, pairs, token_stream
from encore.data.token_cache import TokenStream
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
    assert [Path(shard.name).name for shard in shards([str(tmp_path)])] == ["a.jsonl", "b.txt"]
    assert list(documents([str(tmp_path)], text_key="body")) == ["first", "second\nfile"]


def test_pairs(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "p.jsonl", [{"src": "a", "tgt": "b", "id": "7"}])
    assert list(pairs([name])) == [Pair("a", "b")]


def test_the_shipped_text_and_pairs_are_there() -> None:
    assert next(documents(["asset:text/train"])).strip()
    assert next(pairs(["asset:pairs/train"])).source
    assert resolve("asset:tokenizer").is_dir()


@pytest.mark.parametrize("name", ["nowhere.jsonl", "asset:nothing", "asset:../config.py"])
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ValueError, match=r"no file or folder|ships no"):
        shards([name])


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="unknown kind"):
        shards([str(tmp_path / "a.csv")])
    with pytest.raises(ValueError, match="holds no"):
        shards([str(tmp_path)])


def ids(stream: TokenStream) -> list[int]:
    return stream[:].tolist()


def test_the_stream_is_the_documents_each_with_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    stream = token_stream([name], tokenizer, cache_folder=tmp_path)
    assert ids(stream) == [i for text in TEXTS for i in tokenizer.encode(text, eos=True)]
    assert isinstance(stream.tables[0].tokens, np.memmap) and stream.tables[0].tokens.dtype == np.uint16
    ends = np.cumsum([len(tokenizer.encode(text, eos=True)) for text in TEXTS]).tolist()
    assert stream.document_ends().tolist() == ends
    short = token_stream([name], tokenizer, max_tokens=5, cache_folder=tmp_path)
    assert ids(short) == ids(stream)[:5]
    assert short.document_ends().tolist() == sorted({*(end for end in ends if end < 5), 5})


def test_several_shards_are_one_stream(tmp_path: Path, tokenizer: Tokenizer) -> None:
    names = [jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{text} {n}"} for text in TEXTS]) for n in range(4)]
    stream = token_stream(names, tokenizer, cache_folder=tmp_path)
    whole = [i for n in range(4) for text in TEXTS for i in tokenizer.encode(f"{text} {n}", eos=True)]
    assert ids(stream) == whole and len(stream) == len(whole)
    for start in range(0, len(whole), 7):
        for length in (0, 1, 5, len(whole) // 2):
            assert stream[start : start + length].tolist() == whole[start : start + length]
    assert [whole[end - 1] for end in stream.document_ends()] == [tokenizer.eos_id] * 12
    cut = token_stream(names, tokenizer, max_tokens=len(whole) // 2, cache_folder=tmp_path)
    assert ids(cut) == whole[: len(whole) // 2] and len(cut.tables) < 4


def test_a_long_text_file_is_one_document(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encore.data.formats._TEXT_PIECE_BYTES", 1000)
    (tmp_path / "a.txt").write_text("abc def\n" * 2000, encoding="utf-8")
    stream = token_stream([str(tmp_path / "a.txt")], tokenizer, cache_folder=tmp_path)
    assert stream.document_ends().tolist() == [len(stream)]
    assert np.flatnonzero(stream[:] == tokenizer.eos_id).tolist() == [len(stream) - 1]
    assert tokenizer.decode(stream[: len(stream) - 1].tolist()) == "abc def\n" * 2000


def tables(folder: Path) -> list[Path]:
    return [path for path in (folder / "tokens").iterdir() if path.is_dir()]


def test_the_stream_is_made_once_and_anew_for_other_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    first = token_stream([name], tokenizer, cache_folder=tmp_path).tables[0]
    stamp = (first.folder / "tokens.npy").stat().st_mtime_ns
    again = token_stream([name], tokenizer, cache_folder=tmp_path).tables[0]
    assert again.folder == first.folder and (again.folder / "tokens.npy").stat().st_mtime_ns == stamp
    jsonl(tmp_path / "a.jsonl", [{"text": "abd"}])
    other = token_stream([name], tokenizer, cache_folder=tmp_path)
    assert ids(other) == tokenizer.encode("abd", eos=True) and other.tables[0].digest != first.digest
    assert len(tables(tmp_path)) == 2
    Path(name).rename(tmp_path / "moved.jsonl")  # the same bytes under another name are known
    moved = token_stream([str(tmp_path / "moved.jsonl")], tokenizer, cache_folder=tmp_path)
    assert moved.tables[0].folder == other.tables[0].folder


def test_no_text_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = jsonl(tmp_path / "a.jsonl", [{"text": " "}])
    with pytest.raises(ValueError, match="no text"):
        token_stream([name], tokenizer, cache_folder=tmp_path)


def test_what_was_skipped_is_told_from_the_cache_too(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\nbad\n')
    for _ in range(2):
        token_stream([str(tmp_path / "a.jsonl")], tokenizer, cache_folder=tmp_path)
        assert "skipped 1 of 2 records" in capsys.readouterr().err


def test_pairs_lie_in_tables_side_by_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"src": "abc", "tgt": "de"}, {"src": "", "tgt": "a"}, {"src": "f g h i", "tgt": "j"}]
    name = jsonl(tmp_path / "p.jsonl", rows)
    found = TablePairs(pair_tables([name, name], tokenizer, cache_folder=tmp_path), 100, 100)
    assert (found.read, found.empty, found.too_long, len(found)) == (6, 2, 0, 4)
    expected = [(tokenizer.encode(row["src"]), tokenizer.encode(row["tgt"])) for row in rows if row["src"]] * 2
    assert [(pair.source.tolist(), pair.target.tolist()) for pair in found] == expected
    assert found.side_lengths.tolist() == [[len(source), len(target)] for source, target in expected]


def test_a_writer_that_is_killed_leaves_nothing_behind_and_others_wait(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "abc def ghi " * 30} for _ in range(3000)]
    name = jsonl(tmp_path / "a.jsonl", rows)
    script = (
        "import sys; from pathlib import Path; from encore.tokenizer import load_tokenizer; "
        "from encore.data.sources import token_stream; tokenizer = load_tokenizer(sys.argv[1]); "
        "print('go', flush=True); print(len(token_stream([sys.argv[2]], tokenizer, cache_folder=Path(sys.argv[3]))))"
    )
    command = [sys.executable, "-c", script, str(tokenizer.folder), name, str(tmp_path)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert killed.stdout is not None and killed.stdout.readline() == b"go\n"
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("tokens/.writing-*/tokens.npy")) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    assert tables(tmp_path) == [] or all(path.name.startswith(".writing-") for path in tables(tmp_path))
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = {process.communicate(timeout=100)[0] for process in both}
    assert outputs == {f"go\n{3000 * len(tokenizer.encode(rows[0]['text'], eos=True))}\n".encode()}
    (made,) = tables(tmp_path)
    assert sorted(path.name for path in made.iterdir()) == ["ends.npy", "info.json", "tokens.npy"]
