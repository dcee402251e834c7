"""Text tokenised when a step needs it: found from any place, in bounded memory, the same from every process."""

from __future__ import annotations

import gzip
import json
import lzma
import pickle
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from encore.data import corpus as module
from encore.data.corpus import Corpus, open_corpus
from encore.data.examples import Denoise, PairExamples, TextExamples, causal
from encore.data.layout import Arrays
from encore.data.mixture import Mixture
from encore.data.on_the_fly import LiveDocuments, LivePairs, LiveWindows, LocalOrder
from encore.data.pipeline import PairBatches
from encore.data.shards import UnreadableShard
from encore.data.sources import token_stream
from encore.data.steps import Packing, Steps
from encore.objectives import ul2
from encore.tokenizer import Tokenizer

_LETTERS = np.random.default_rng(7).choice(list("abcdefghij"), (200, 3))
WORDS = ["".join(word) for word in _LETTERS]
_NUMBERS = np.random.default_rng(1)
ROWS = [
    {"text": text, "src": text[:20], "tgt": text[20:60] or "a"}
    for text in (" ".join(_NUMBERS.choice(WORDS, _NUMBERS.integers(2, 60))) for _ in range(240))
]
TEXTS = [row["text"] for row in ROWS]


def lines(pack: Callable[[bytes], bytes] = bytes) -> Callable[[Path], object]:
    rows = [json.dumps(row) for row in ROWS]
    data = "\n".join([*rows[:30], "not JSON", *rows[30:]]).encode()
    return lambda path: path.write_bytes(pack(data))


def arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=50)


FORMATS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lines(),
    "a.jsonl.gz": lines(gzip.compress),
    "a.jsonl.xz": lines(lzma.compress),
    "a.jsonl.zst": lines(zstandard.ZstdCompressor().compress),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=70),
    "a.arrow": arrow,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some five documents, of which some ten are held."""
    for name, value in {"_BLOCK_CHARACTERS": 700, "_LARGEST_BLOCK": 1500, "_HELD_CHARACTERS": 8000}.items():
        monkeypatch.setattr(f"encore.data.corpus.{name}", value)
    monkeypatch.setattr("encore.data.on_the_fly._GROUP_CHARACTERS", 4000)
    monkeypatch.setattr("encore.data.on_the_fly._HELD_TOKENS", 3000)


@pytest.fixture
def text(tmp_path: Path, tokenizer: Tokenizer) -> Corpus:
    lines()(tmp_path / "a.jsonl")
    return open_corpus([str(tmp_path / "a.jsonl")], tokenizer, ["text"], tmp_path)


def same(one: list[Arrays], other: list[Arrays]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(np.asarray(a[key]), np.asarray(b[key])) for a, b in zip(one, other, strict=True) for key in a
    )


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_record_is_found_from_any_place(tmp_path: Path, tokenizer: Tokenizer, name: str, far: bool) -> None:
    FORMATS[name](tmp_path / name)
    source = str(tmp_path / name)
    if far:
        fsspec.filesystem("memory").put(source, f"/fly/{tmp_path.name}/{name}")
        source = f"memory://fly/{tmp_path.name}/{name}"
    corpus = open_corpus([source], tokenizer, ["text"], tmp_path)
    assert len(corpus.block_characters) > 5 and corpus.num_records == len(TEXTS)
    for number in [*np.random.default_rng(0).permutation(len(TEXTS))[:60], 0, len(TEXTS) - 1]:
        assert corpus.record(int(number)).values == (TEXTS[number],)
    assert corpus._held_characters <= module._HELD_CHARACTERS  # memory is bounded
    assert corpus.cheap.sum() == {"jsonl": len(corpus.cheap), "parquet": 4}.get(name.split(".")[-1], corpus.cheap.sum())
    assert corpus.cheap.sum() == 1 or not name.endswith(("gz", "xz", "zst"))
    where = corpus.tally.places
    assert not where if "jsonl" not in name else len(where) == 1 and "line" in where[0] and corpus.tally.skipped == 1


def test_long_text_files_are_found_in_pieces(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encore.data.formats._TEXT_PIECE_BYTES", 1000)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join(TEXTS), encoding="utf-8-sig")
    corpus = open_corpus([str(tmp_path)], tokenizer, ["text"], tmp_path / "cache")
    found = [corpus.record(n) for n in reversed(range(corpus.num_records))][::-1]
    assert "".join(record.values[0] for record in found) == 2 * "\n".join(TEXTS)
    assert [record.last for record in found].count(True) == 2


def test_windows_read_the_whole_text_once_an_epoch(text: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    windows = LiveWindows(text, 40, seed=3)
    stream = token_stream([str(tmp_path / "a.jsonl")], tokenizer, cache_folder=tmp_path)
    everything = " ".join(map(str, [*stream[0 : len(stream)], *stream[0:80]]))
    read = [windows[i] for i in range(windows.per_epoch)]
    assert windows.per_epoch == pytest.approx(len(stream) / 40, rel=0.05)
    assert {len(ids) for ids in read} == {windows.tokens(0)} == {40}
    assert all(" ".join(map(str, ids)) in everything for ids in read)  # the last runs on into the first document
    again = [windows[windows.per_epoch + i] for i in range(windows.per_epoch)]
    assert sum(np.array_equal(a, b) for a, b in zip(read, again, strict=True)) < 5
    with pytest.raises(ValueError, match="too few for windows of 40000"):
        LiveWindows(text, 40000)
    short = LiveWindows(text, 40, max_tokens=400)
    assert 8 <= short.per_epoch <= 10


@pytest.mark.parametrize("keep_eos", [True, False])
def test_documents_are_those_of_the_text(text: Corpus, tokenizer: Tokenizer, keep_eos: bool) -> None:
    """As with a cache: pieces of documents, each document's in order; here all fit, so nothing is left out."""
    documents = LiveDocuments(text, 400, seed=3, keep_eos=keep_eos)
    read = sorted(tuple(documents[i].tolist()) for i in range(documents.per_epoch))
    assert read == sorted(tuple(tokenizer.encode(one, eos=keep_eos)) for one in TEXTS)
    cut = LiveDocuments(text, 24, seed=3)
    lengths = [cut.tokens(i) for i in range(cut.per_epoch)]
    assert max(lengths) <= 24 and sum(lengths) > 0.97 * sum(map(len, read))


def test_pairs_that_cannot_be_used_are_replaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(row | ({"src": ""} if n % 7 == 0 else {})) + "\n" for n, row in enumerate(ROWS))
    )
    corpus = open_corpus([str(tmp_path / "p.jsonl")], tokenizer, ["src", "tgt"], tmp_path)
    longest = max(len(tokenizer.encode(row["tgt"])) for row in ROWS) - 1
    pairs = LivePairs(corpus, 64, longest, seed=1)
    usable = {
        (tuple(tokenizer.encode(row["src"])), tuple(tokenizer.encode(row["tgt"])))
        for n, row in enumerate(ROWS)
        if n % 7 and len(tokenizer.encode(row["tgt"])) <= longest
    }
    examples = PairExamples(pairs, tokenizer, encoder=True, seed=1, order=pairs.order)
    found = {(tuple(p.source.tolist()), tuple(p.target.tolist())) for p in (pairs[i] for i in range(len(pairs)))}
    assert found == usable
    assert len({examples._order(i) for i in range(len(pairs))}) == len(pairs)
    batches = PairBatches(pairs, tokenizer, encoder=False, batch_tokens=90, seed=1)
    for step in (7, 0, 30):
        for arrays in batches.arrays(step):
            assert arrays["decoder_target_tokens"].size <= 90 + 2 * len(arrays["decoder_target_tokens"])
        assert same(batches.arrays(step), pickle.loads(pickle.dumps(batches)).arrays(step))
    with pytest.raises(ValueError, match=r"none of the 240 pairs can be used"):
        _ = LivePairs(corpus, 64, 64, max_tokens=1)[0]


@pytest.mark.parametrize("packing", [None, Packing(pool_examples=32)])
def test_a_step_is_the_same_whoever_makes_it_and_whenever(
    text: Corpus, tokenizer: Tokenizer, packing: Packing | None
) -> None:
    objective = Denoise(ul2.mixture_rows("t5gemma2"), tokenizer)
    stretches = [LiveDocuments(text, 24 + 2 * task, seed=5) for task in range(len(objective.tasks))]
    sources = [
        TextExamples(stretches, objective, seed=5),
        TextExamples([LiveWindows(text, 24, seed=5, source=1)], objective, seed=5, source=1),
    ]
    steps = Steps(Mixture(sources, [2, 1]), tokenizer, batch_size=16, seed=5, packing=packing)
    copy = pickle.loads(pickle.dumps(steps))
    in_order = [steps.arrays(step) for step in range(6)]
    assert all(same(copy.arrays(step), in_order[step]) for step in (4, 5, 0, 3))


def test_the_order_stays_near_and_has_each_thing_once() -> None:
    counts, characters = np.array([3, 0, 5, 2, 4, 1]), np.array([2000, 10, 2500, 900, 2000, 300])
    cheap = np.array([True, True, True, False, True, True])
    order = LocalOrder(counts, characters, cheap, seed=1, stream=0)
    epochs = [[order(place) for place in range(e * 15, e * 15 + 15)] for e in range(8)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 8
    assert [order(place) for place in range(15, 30)] == epochs[1]
    groups = order.groups(2)
    assert sorted(np.concatenate(groups)) == list(range(15)) and len(groups) > 1
    follow = [np.flatnonzero([8 in group for group in order.groups(e)])[0] for e in range(8)]
    before = [np.flatnonzero([7 in group for group in order.groups(e)])[0] for e in range(8)]
    assert all(0 <= b - a <= 1 for a, b in zip(before, follow, strict=True))  # block 3 comes right behind block 2


def test_damage(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "bad.jsonl").write_text("nothing\n{}\n")
    with pytest.raises(ValueError, match=r"all 2 records are damaged: .*line 1 .*line 2"):
        open_corpus([str(tmp_path / "bad.jsonl")], tokenizer, ["text"], tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="no text in there"):
        open_corpus([str(tmp_path / "empty.jsonl")], tokenizer, ["text"], tmp_path)
    lines()(tmp_path / "a.jsonl")
    corpus = open_corpus([str(tmp_path / "a.jsonl")], tokenizer, ["text"], tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text[1:]}) + "\n" for text in TEXTS))
    with pytest.raises(UnreadableShard, match=r"a.jsonl is not what it was when the run began"):
        corpus.block(3)


def test_causal_windows_need_no_encoder(text: Corpus, tokenizer: Tokenizer) -> None:
    steps = Steps(Mixture([TextExamples([LiveWindows(text, 16)], causal, seed=0)]), tokenizer, batch_size=4)
    (arrays,) = steps.arrays(3)
    assert arrays["encoder_input_tokens"] is None and np.shape(arrays["decoder_target_tokens"]) == (4, 16)
