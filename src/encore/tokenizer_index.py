"""An index of a large tokenizer.json, for a start without reading all of it: `tokenizer_index.npz` beside the file.

Byte-pair encoding (Sennrich et al., 2016) joins neighbours in a text, so that all it ever makes are parts of the text:
pieces that do not occur in it, and merges that touch or make such a piece, change nothing. The index finds the pieces
that occur, and the `tokenizers` library encodes with these alone: its ids are those of the whole vocabulary. Reading
all of Gemma's 262,144 pieces and half a million merges takes it one to two seconds; the index takes hundredths.

    build_index(folder / "tokenizer.json")    # when a model is exported; False where it does not pay, or would not hold
    open_json(folder / "tokenizer.json")      # by its index, if there is one and it is of this very file

Parts of the text are looked up by a polynomial hash (Karp and Rabin, 1987), for all places at once. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from encore.tokenizer_backends import BYTE, Backend, JsonBackend, read_decoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_INDEX = "tokenizer_index.npz"
MIN_PIECES = 32_768
"""A smaller tokenizer.json is read at once in a tenth of a second."""

WHOLE_AFTER, WHOLE_FROM = 1.0, 100_000
"""Seconds spent on parts of the vocabulary, or characters at a time, from which on all of it is the better choice."""

BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the polynomial, modulo 2^64: odd, its bits without a pattern (2^64 / golden ratio)."""

Hashes = NDArray[np.uint64]


def open_json(path: Path) -> Backend:
    """A tokenizer.json, through its index where it has one."""
    try:
        return IndexedBackend(path)
    except (FileNotFoundError, KeyError, ValueError, zipfile.BadZipFile):  # none, or of another file
        return JsonBackend(path)


class IndexedBackend:
    """tokenizer.json through its index; the whole of it only once much has been encoded."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.with_name(TOKENIZER_INDEX).open("rb") as file, np.load(file) as stored:
            if stored["digest"].tobytes() != _digest(path):
                raise ValueError(f"{path.with_name(TOKENIZER_INDEX)} was made of another {path.name}")
            self._index: dict[str, NDArray[Any]] = {name: stored[name] for name in stored.files}
        self._head: dict[str, Any] = json.loads(self._index["head"].tobytes())
        added: list[dict[str, Any]] = self._head.pop("added_tokens")
        self._added: dict[str, list[dict[str, Any]]] = {}  # by their first characters
        for token in added:
            self._added.setdefault(token["content"][:3], []).append(token)
        self._blob = self._index["pieces"].tobytes()
        self._lengths: list[int] = self._index["lengths"].tolist()
        self._spent = 0.0
        self.size = len(self._index["ends"])
        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        self.strip_space: bool
        self.escapes: Mapping[str, str]
        self.strip_space, self.escapes = read_decoder(self._head["decoder"], path)

    @functools.cached_property
    def _whole(self) -> JsonBackend:
        return JsonBackend(self._path)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._spent > WHOLE_AFTER or sum(map(len, texts)) > WHOLE_FROM:
            return self._whole.encode_batch(texts)
        started = time.perf_counter()
        coded = self._part(texts).encode_batch(list(texts), add_special_tokens=False)
        self._spent += time.perf_counter() - started
        return [row.ids for row in coded]

    def piece(self, token: int) -> str | None:
        if not 0 <= token < self.size:
            return None
        ends = self._index["ends"]
        return self._blob[ends[token - 1] if token else 0 : ends[token]].decode() or None

    def token_id(self, piece: str) -> int | None:
        found = self._found(_hashes(piece, [len(piece)])) if piece else ()
        return next((int(token) for token in found if self.piece(int(token)) == piece), None)

    def _part(self, texts: Sequence[str]) -> Tokenizer:
        """The tokenizer of all pieces and added tokens that occur in the texts, under their own ids."""
        from tokenizers import Tokenizer

        whole_text = "\0".join(texts)
        begun = [token for start, tokens in self._added.items() if start in whole_text for token in tokens]
        added = [token for token in begun if token["content"] in whole_text]
        normal = whole_text
        for step in _replacements(self._head["normalizer"]):
            normal = normal.replace(step["pattern"]["String"], step["content"])
        here = np.zeros(self.size, bool)
        here[self._index["always"]] = True
        here[[token["id"] for token in added]] = True
        here[self._found(_hashes(normal, self._lengths))] = True
        # A merge is there if both of its parts and what it makes are.
        left, right, made = (self._index[name] for name in ("left", "right", "made"))
        merges = np.flatnonzero(here[made])
        merges = merges[here[left[merges]] & here[right[merges]]]
        pieces = {token: self.piece(token) for token in np.flatnonzero(here).tolist()}
        pairs = zip(left[merges].tolist(), right[merges].tolist(), strict=True)
        model = self._head["model"] | {
            "vocab": {piece: token for token, piece in pieces.items()},
            "merges": [(pieces[one], pieces[other]) for one, other in pairs],
        }
        return Tokenizer.from_str(json.dumps(self._head | {"added_tokens": added, "model": model}))

    def _found(self, wanted: Iterable[Hashes]) -> NDArray[np.intp]:
        """The ids of pieces with these hashes."""
        known = self._index["hashes"]
        hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *wanted]))
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return self._index["ids"][places[known[places] == hashes]]


def build_index(path: Path, min_pieces: int = MIN_PIECES) -> bool:
    """Write the index of a tokenizer.json beside it, if it has many pieces and is of a kind that can be cut."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    model = raw.get("model") or {}
    vocab: dict[str, int] = model.get("vocab") or {}
    if not isinstance(vocab, dict) or len(vocab) < min_pieces or not _can_be_cut(raw):
        return False
    pieces = dict(vocab)
    for token in raw["added_tokens"]:
        pieces.setdefault(token["content"], token["id"])
    size = max(pieces.values()) + 1
    names, ids = list(pieces), np.array(list(pieces.values()), np.uint32)
    hashes = _hashes_of(names)
    order = np.argsort(hashes)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    always = [token for piece, token in pieces.items() if BYTE.fullmatch(piece) or piece == model.get("unk_token")]
    parts = {part for pair in merges for part in pair}
    unique = len(np.unique(hashes)) == len(hashes) and len(set(pieces.values())) == len(pieces) and "" not in pieces
    if not unique or any(BYTE.fullmatch(part) or part == model.get("unk_token") for part in parts):
        return False
    by_id = [b""] * size
    for piece, token in pieces.items():
        by_id[token] = piece.encode()
    head = {key: value for key, value in raw.items() if key not in ("truncation", "padding", "post_processor")}
    head["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    np.savez(
        path.with_name(TOKENIZER_INDEX),
        digest=np.frombuffer(_digest(path), np.uint8),
        head=np.frombuffer(json.dumps(head).encode(), np.uint8),
        pieces=np.frombuffer(b"".join(by_id), np.uint8),
        ends=np.cumsum([len(piece) for piece in by_id], dtype=np.uint32),
        lengths=np.unique([len(name) for name in names]),
        hashes=hashes[order],
        ids=ids[order],
        always=np.array(always, np.int64),
        left=np.array([vocab[left] for left, _ in merges], np.uint32),
        right=np.array([vocab[right] for _, right in merges], np.uint32),
        made=np.array([vocab[left + right] for left, right in merges], np.uint32),
    )
    return True


def _can_be_cut(raw: Mapping[str, Any]) -> bool:
    """Whether all that the encoder makes of a text lies in it, and depends on what lies there alone."""
    model, vocab = raw["model"], raw["model"]["vocab"]
    splits, added = raw.get("pre_tokenizer") or {"type": "Split"}, raw.get("added_tokens") or []
    normal = all(
        step.get("type") == "Replace" and len(step["pattern"].get("String", "")) == 1
        for step in _replacements(raw.get("normalizer"))
    )
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and normal
        and splits.get("type") == "Split"
        and all(not token["normalized"] for token in added)
        and all(vocab.get(token["content"], token["id"]) == token["id"] for token in added)
        and all(len(token["content"]) > 1 or token["content"] in vocab for token in added)
    )


def _replacements(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]


def _hashes(text: str, lengths: Sequence[int]) -> Iterator[Hashes]:
    """The hashes of all parts of the text that have these lengths (ascending), one length after the other."""
    points = _points(text)
    found, done = np.zeros(len(points) + 1, np.uint64), 0
    for length in lengths:
        while done < length <= len(points):
            found, done = found[:-1] * BASE + points[done:], done + 1
        if done == length:
            yield found


def _hashes_of(names: Sequence[str]) -> Hashes:
    """The hash of each whole name; those of one length together."""
    lengths = np.array([len(name) for name in names])
    hashes = np.zeros(len(names), np.uint64)
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length).tolist()
        for column in _points("".join(names[row] for row in rows)).reshape(-1, length).T:
            hashes[rows] = hashes[rows] * BASE + column
    return hashes


def _points(text: str) -> Hashes:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64) + np.uint64(1)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(person=b"encore-index-1")).digest()
