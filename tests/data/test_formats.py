"""Every format gives the same records; damage is passed over, counted and told with its place."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from encore.data import formats
from encore.data.formats import Damage, Record, Tally, records
from encore.data.shards import MissingLibrary, Shard, UnreadableShard, shards
from encore.data.sources import Pair, documents, pairs

ROWS = [{"text": f"row {i}: über 日本", "src": f"s{i}", "tgt": f"t{i}"} for i in range(2500)]


def as_jsonl(path: Path, pack: Callable[[bytes], bytes] = bytes) -> None:
    path.write_bytes(pack("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()))


def as_arrow(folder: Path) -> None:
    """What datasets.save_to_disk writes: Arrow streams, their names in state.json, in that order."""
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (ROWS[:1200], ROWS[1200:]), strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=1000)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": as_jsonl,
    "a.jsonl.gz": lambda path: as_jsonl(path, gzip.compress),
    "a.jsonl.xz": lambda path: as_jsonl(path, lzma.compress),
    "a.jsonl.zst": lambda path: as_jsonl(path, zstandard.ZstdCompressor().compress),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=700),
    "saved": as_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_texts_and_pairs(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert list(documents([str(tmp_path / name)])) == [row["text"] for row in ROWS]
    assert list(pairs([str(tmp_path / name)])) == [Pair(row["src"], row["tgt"]) for row in ROWS]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_far_away(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / name), f"/far/{tmp_path.name}/{name}", recursive=True)
    url = f"memory://far/{tmp_path.name}/{name}"
    assert [shard.is_remote for shard in shards([url])] == [True] * (2 if name == "saved" else 1)
    assert list(documents([url])) == [row["text"] for row in ROWS]


def test_wildcards_and_folders_here_and_far_away(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "note.csv"):
        as_jsonl(tmp_path / name)
    here = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert [s.name for s in shards([f"{tmp_path}/*.jsonl"])] == [s.name for s in shards([str(tmp_path)])] == here
    for url in (f"file://{tmp_path}/*.jsonl", f"file://{tmp_path}"):
        assert [s.name.removeprefix("file://") for s in shards([url])] == here
    with pytest.raises(ValueError, match="no file or folder"):
        shards([f"file://{tmp_path}/nothing"])


def test_keys_into_nested_rows(tmp_path: Path) -> None:
    rows = [{"translation": {"en": "a", "de": "b"}, "x.y": "flat"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert list(pairs([str(tmp_path / name)], "translation.en", "translation.de")) == [Pair("a", "b")]
        assert list(documents([str(tmp_path / name)], "x.y")) == ["flat"]


def test_a_data_set_of_several_splits_names_them(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="'train', 'test'"):
        shards([str(tmp_path)])


BAD_LINES = {
    "not JSON": b"{oops",
    "not UTF-8": b'{"text": "\xff"}',
    "expected an object, got list": b"[1]",
    "expected a string under 'text'; got int": b'{"text": 3}',
    "expected a string under 'text'; it holds 'other'": b'{"other": "x"}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "not JSON: maximum recursion": b'{"text": ' + b"[" * 100_000 + b"}",
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_damaged_line_is_passed_over(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + BAD_LINES[reason] + b'\n\n{"text": "two"}')
    tally = Tally()
    assert list(documents([str(path)], tally=tally)) == ["one", "two"]
    assert (tally.records, tally.skipped) == (3, 1)
    assert tally.places[0].startswith(f"{path} line 2 (") and reason in tally.places[0]


def test_a_line_without_end_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "two"}\n')
    found = list(records(Shard(str(path), ".jsonl"), ["text"]))
    assert [type(record) for record in found] == [Record, Damage, Record]
    assert isinstance(found[1], Damage) and found[1].place == "line 2"


PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_packed_file_that_breaks_off_gives_what_came_before(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    packed = b"".join(PACKERS[suffix](b"".join(lines[i : i + 100])) for i in range(0, len(lines), 100))
    path.write_bytes(packed[: len(packed) // 2])
    tally = Tally()
    texts = list(documents([str(path)], tally=tally))
    assert len(texts) >= 1000 and texts == [row["text"] for row in ROWS[: len(texts)]]
    assert tally.skipped == 1 and f"after line {len(texts)} (the file breaks off" in tally.places[0]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_shard_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is no such file at all, whatever its name says")
    with pytest.raises(UnreadableShard, match=name) as caught:
        list(documents([str(tmp_path / name)]))
    assert "repair it" in str(caught.value)


def test_a_row_group_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"text": f"{i:08d}" * 20} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, compression="gzip", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = group.data_page_offset
    data[start : start + group.total_compressed_size] = bytes(group.total_compressed_size)
    path.write_bytes(data)
    tally = Tally()
    texts = list(documents([str(path)], tally=tally))
    assert texts == [row["text"] for row in rows[:1000] + rows[2000:]]
    assert (tally.records, tally.skipped) == (3000, 1000)
    assert "rows 1001-2000 (row group 1" in tally.places[0]


def test_damaged_rows_of_tables(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff\xfe", None, b"fine"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, column.buffers())  # bytes that are no UTF-8, under a string's type
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    tally = Tally()
    assert list(documents([str(tmp_path / "a.parquet")], tally=tally)) == ["good", "fine"]
    assert [place.split(" ", 1)[1][:5] for place in tally.places] == ["row 2", "row 3"]
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"all 2 records are damaged: .*no column 'text'; there are 'number'"):
        list(documents([str(tmp_path / "b.parquet")]))


def test_an_arrow_file_that_breaks_off(tmp_path: Path) -> None:
    as_arrow(tmp_path / "saved")
    path = tmp_path / "saved" / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:-4000])
    tally = Tally()
    texts = list(documents([str(tmp_path / "saved")], tally=tally))
    assert texts == [row["text"] for row in ROWS[:1000] + ROWS[1200:]]
    assert tally.skipped == 1 and "after row 1000 (the file breaks off" in tally.places[0]


def test_damage_is_told_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 20 + b"bad\n" * 9)
    assert len(list(documents([str(path)]))) == 20
    told = capsys.readouterr().err
    assert told.startswith("skipped 9 of 29 records: ") and "line 21 (not JSON" in told
    assert told.rstrip().endswith("and 4 more")


def test_a_source_that_is_all_damaged_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"bad\nworse\n")
    with pytest.raises(ValueError, match=r"all 2 records are damaged: .*line 1 \(not JSON"):
        list(documents([str(tmp_path / "a.jsonl")]))


def test_a_long_text_comes_in_pieces_that_end_with_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_TEXT_PIECE_BYTES", 1001)  # so that characters are cut too
    text = "".join(f"line {i} – é\n" for i in range(3000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = list(records(Shard(str(tmp_path / "a.txt"), ".txt"), ["text"]))
    pieces = [record for record in found if isinstance(record, Record)]
    assert len(pieces) == len(found) > 3
    assert "".join(piece.values[0] for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.values[0].endswith("\n") and len(piece.values[0]) < 3003 for piece in pieces)


def test_text_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine " * 10 + b"\xff")
    (tmp_path / "b.txt").write_text("fine")
    tally = Tally()
    assert list(documents([str(tmp_path)], tally=tally)) == ["fine"]
    assert "a.txt byte 50 (not UTF-8" in tally.places[0]
    with pytest.raises(ValueError, match="pairs are read from rows"):
        list(pairs([str(tmp_path / "b.txt")]))


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_library_names_the_extra(
    tmp_path: Path, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path / name)
    for module in [m for m in sys.modules if m.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingLibrary, match=rf"needs {library}.*encore-lm\[data\]"):
        list(documents([str(tmp_path / name)]))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingLibrary, match=r"fsspec.*encore-lm\[data\]"):
        list(documents(["memory://x.jsonl"]))


def test_zstandard_in_several_frames(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(frame(b'{"text": "on') + frame(b'e"}\n') + frame(b'{"text": "two"}\n'))
    assert list(documents([str(tmp_path / "a.jsonl.zst")])) == ["one", "two"]
    with Shard(str(tmp_path / "a.jsonl.zst"), ".jsonl").unpacked() as file:
        assert isinstance(file, io.BufferedReader)
