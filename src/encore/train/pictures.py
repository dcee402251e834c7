"""Rows of text and pictures as examples, so that they are mixed with text like any other source. No torch here.

    {"src": "What is this?", "tgt": "a lily", "images": ["lily.jpg"]}       asked and answered
    {"text": "A lily: <start_of_image> It grows in ponds.", "images": ["lily.jpg"]}

A row of text is a prefix LM whose prefix ends at its last picture (T5Gemma 2 paper, section 3): the encoder reads what
stands up to there, the decoder writes the rest. Paths are relative to the row's file. Every picture is decoded once
when the rows are read, so that a damaged one costs its rows and not the run; pixels are made anew for each step, unless
`keep_features` has computed what a frozen tower makes of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from encore.data.examples import Ids, SpecialIds
from encore.data.formats import Damage, Tally
from encore.data.layout import Row
from encore.data.shards import Shard, shards
from encore.data.windows import Order
from encore.generate.source import PictureFormat, SourceReader
from encore.images import START_OF_IMAGE, load_picture, views
from encore.tokenizer import Tokenizer

_BLANK = Image.new("RGB", (1, 1))


@dataclass(frozen=True)
class PictureRow:
    """What the encoder reads, with placeholders where its pictures stand, and what the decoder writes."""

    source: Ids
    target: Ids
    images: tuple[str, ...]


@dataclass(frozen=True)
class Keys:
    """Where a row's fields are."""

    source: str = "src"
    target: str = "tgt"
    text: str = "text"
    images: str = "images"


def read_rows(
    names: Sequence[str],
    tokenizer: Tokenizer,
    form: PictureFormat,
    keys: Keys,
    *,
    max_source_tokens: int,
    max_target_tokens: int,
    max_rows: int = 0,
    tally: Tally | None = None,
) -> list[PictureRow]:
    """The good rows of JSONL files, in order; what is damaged, lacks its picture or is too long is skipped and counted.

    Raises ValueError if nothing is left.
    """
    seen = Tally() if tally is None else tally
    reader = SourceReader(tokenizer, max_tokens=max_source_tokens, picture_format=form)
    rows: list[PictureRow] = []
    for shard in shards(names):
        if shard.suffix != ".jsonl":
            raise ValueError(f"{shard.name}: rows with pictures are read from JSONL files")
        with shard.unpacked() as file:
            for number, line in enumerate(file, start=1):
                if max_rows and len(rows) >= max_rows:
                    return rows
                if not line.strip():
                    continue
                try:
                    rows.append(_row(line, shard, keys, tokenizer, reader, max_target_tokens))
                    seen.records += 1
                except (ValueError, OSError) as error:
                    seen.damage(shard.name, Damage(f"line {number}", " ".join(str(error).split())))
    seen.check(names)
    if not rows:
        raise ValueError(f"{', '.join(names)}: no rows with pictures in there")
    return rows


def _row(
    line: bytes, shard: Shard, keys: Keys, tokenizer: Tokenizer, reader: SourceReader, max_target_tokens: int
) -> PictureRow:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    images = row.get(keys.images, [])
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError(f"{keys.images!r} should be a list of file names, got {images!r:.80}")
    source, target = _sides(row, keys, len(images))
    paths = tuple(str(_inside(Path(shard.name).parent, name)) for name in images)
    for path in paths:
        _check_picture(path)
    ids = reader.read(source, pictures=[_BLANK] * len(images)).tokens
    labels = tokenizer.encode_target(target)
    if len(labels) > max_target_tokens:
        raise ValueError(f"the target has {len(labels)} tokens and {max_target_tokens} are allowed")
    return PictureRow(np.asarray(ids, np.int32), np.asarray(labels, np.int32), paths)


def _sides(row: Mapping[str, Any], keys: Keys, num_images: int) -> tuple[str, str]:
    """Source and target: as they are given, or a text cut behind its last picture."""
    given = row.get(keys.source), row.get(keys.target)
    if isinstance(given[0], str) and isinstance(given[1], str):
        return given[0], given[1]
    text = row.get(keys.text)
    if not isinstance(text, str):
        raise ValueError(f"expected strings under {keys.source!r} and {keys.target!r}, or one under {keys.text!r}")
    if not num_images:
        raise ValueError("the text has no pictures to end a prefix at")
    before, mark, after = text.rpartition(START_OF_IMAGE)
    target = after if mark else text  # all pictures in front
    if not target.strip():
        raise ValueError("nothing stands behind the last picture")
    return before + mark if mark else "", target


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the picture {name} lies outside the folder of its rows, {folder}")
    return path


@lru_cache(maxsize=1 << 20)
def _check_picture(path: str) -> None:
    load_picture(path)


@lru_cache(maxsize=1 << 20)
def picture_digest(path: str) -> str:
    """SHA-256 of the file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Pictures:
    """What a run's model makes of pictures: ids around placeholders, pixels of one size, and kept features, if any."""

    form: PictureFormat
    keep: Callable[[Sequence[str]], Mapping[str, np.ndarray]] | None = None


class PictureExamples:
    """Rows with pictures, in another order in each epoch. Rows without a picture may be among them."""

    rules: Sequence[Callable[[int], tuple[int, int]]] = ()

    def __init__(
        self,
        rows: Sequence[PictureRow],
        form: PictureFormat,
        tokenizer: Tokenizer,
        *,
        seed: int,
        source: int = 0,
        shuffle: bool = True,
        features: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.rows, self.form, self.features = list(rows), form, features
        self.framing = SpecialIds.of(tokenizer)
        self.per_epoch = len(self.rows)
        self._order = Order(len(self.rows), seed, source, shuffle=shuffle)

    def with_features(self, features: Mapping[str, np.ndarray]) -> PictureExamples:
        """The same examples, their pictures as the (tokens, W) that a frozen tower makes of them, by path."""
        made = object.__new__(PictureExamples)
        made.__dict__ = {**self.__dict__, "features": features}
        return made

    @property
    def digest(self) -> str:
        """Equal for equal rows, in their order, with pictures of the same bytes."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.source.tobytes() + b"|" + row.target.tobytes() + b"|")
            for path in row.images:
                digest.update(picture_digest(path).encode())
        return digest.hexdigest()

    @property
    def paths(self) -> list[str]:
        """Every picture once, in the order of the rows."""
        return list(dict.fromkeys(path for row in self.rows for path in row.images))

    def lengths(self, index: int) -> tuple[int, int]:
        row = self.rows[self._order(index)]
        return len(row.source), len(row.target)

    def text(self, index: int) -> tuple[int, int]:
        return sum(self.lengths(index)), -1

    def row(self, index: int, start: int = 0, stop: int | None = None) -> Row:
        row = self.rows[self._order(index)]
        made = Row(row.source.astype(np.int64), row.target.astype(np.int64))
        if not row.images:
            return made
        return replace(made, pictures=np.stack([self._picture(path) for path in row.images]))

    def _picture(self, path: str) -> np.ndarray:
        if self.features is not None:
            return self.features[path]
        return views(load_picture(path), self.form.image_size)[0]

    def kind(self, index: int) -> str:
        return "pictures"
