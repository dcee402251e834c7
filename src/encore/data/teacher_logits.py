"""A teacher's top-k distributions on disk, mapped into memory: found by what the example is, not by when it comes.

    FOLDER/
      manifest.json            teacher, k, temperature, vocabulary, counts; finished folders alone have it
      keys.npy                 (E, 2) uint64, sorted: a hash of each example's source, target and learned tokens
      offsets.npy              (E, 2) int64: where its tokens begin, and how many the teacher speaks about
      ids.npy                  (M, k) uint16 or uint32, likeliest first
      log_probabilities.npy    (M, k) float16: natural logs, so the likeliest are the most exact
      log_rest.npy             (M,)   float32: the log of the mass outside the k

What a teacher says of an example depends on nothing but the example. So the same store serves any packing, any number
of devices and any resume, examples that come again (epochs of pairs) are stored once, and an example that the store
has never seen, from another seed or other data, is an error instead of a wrong distribution.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from encore.data.teacher_text import ExampleText

_FORMAT_VERSION = 1
_KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
_ARRAYS = ("ids", "log_probabilities", "log_rest")


class MissingExample(ValueError):
    """An example that the stored logits do not cover."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds. `fingerprint` is that of the teacher's weights."""

    teacher: str
    fingerprint: str
    vocab_size: int
    top_k: int
    temperature: float
    num_examples: int
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """The size of the arrays, known before anything is written."""
        per_token = self.top_k * (id_dtype(self.vocab_size).itemsize + 2) + 4
        return self.num_tokens * per_token + self.num_examples * 32


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest kind of number that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def example_key(example: ExampleText) -> bytes:
    """16 bytes that tell examples apart: a hash of what is read, what is written and what of it is learned."""
    source = b"" if example.source is None else example.source.astype("<i8").tobytes()
    digest = hashlib.blake2b(len(source).to_bytes(8, "little") + source, digest_size=16)
    digest.update(example.target.astype("<i8").tobytes())
    digest.update(example.taught.astype("<i8").tobytes())
    return digest.digest()


class TeacherLogits:
    """An opened store."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            table = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{self.folder} holds no teacher logits ({error.strerror}); write them with: encore distill-logits"
            ) from error
        if table.pop("format", None) != _FORMAT_VERSION:
            raise ValueError(f"{self.folder} was written in another format; write it anew with: encore distill-logits")
        self.manifest = Manifest(**table)
        self._keys = self._array("keys").view(_KEY)[:, 0]
        self._offsets = self._array("offsets")
        self.ids, self.log_probabilities, self.log_rest = (self._array(name) for name in _ARRAYS)

    @property
    def fingerprint(self) -> str:
        """Changes with what is stored."""
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()

    def rows(self, example: ExampleText) -> slice:
        """Where the tokens of an example stand that the teacher speaks about. Raises MissingExample."""
        key = np.frombuffer(example_key(example), _KEY)
        place = int(np.searchsorted(self._keys, key)[0])
        if place == len(self._keys) or self._keys[place] != key[0]:
            raise MissingExample(
                f"{self.folder} says nothing about an example of this run, of {len(example.target)} target tokens: it "
                "was written for other data, another objective, seed or number of steps; write it anew with: "
                "encore distill-logits"
            )
        start, number = (int(value) for value in self._offsets[place])
        return slice(start, start + number)

    def _array(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            return cast("np.ndarray", np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); write the folder anew with: encore distill-logits"
            ) from error


def write_teacher_logits(
    folder: Path,
    manifest: Manifest,
    keys: list[bytes],
    lengths: list[int],
    parts: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a store into an existing empty folder.

    Args:
        keys, lengths: of the examples, in the order in which `parts` brings their tokens.
        parts: (ids, log-probabilities, log of the rest) of some tokens each, `manifest.num_tokens` in all.
        progress: is told the bytes written and the bytes in all.
    """
    table = np.frombuffer(b"".join(keys), _KEY)
    order = np.argsort(table, kind="stable")
    offsets = np.stack([np.cumsum([0, *lengths])[:-1], np.asarray(lengths)], axis=1).astype("<i8")
    np.save(folder / "keys.npy", table[order].view("<u8").reshape(-1, 2))
    np.save(folder / "offsets.npy", offsets[order])
    kinds = {"ids": id_dtype(manifest.vocab_size), "log_probabilities": np.dtype("<f2"), "log_rest": np.dtype("<f4")}
    files: dict[str, IO[bytes]] = {}
    done = 32 * len(keys)
    try:
        for name, dtype in kinds.items():
            files[name] = open(folder / f"{name}.npy", "wb")  # noqa: SIM115 (three files, filled side by side)
            shape = (manifest.num_tokens,) if name == "log_rest" else (manifest.num_tokens, manifest.top_k)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(files[name], header)
        for part in parts:
            for (name, dtype), array in zip(kinds.items(), part, strict=True):
                data = np.ascontiguousarray(array.astype(dtype))
                files[name].write(data.data)
                done += data.nbytes
            progress(done, manifest.num_bytes)
    finally:
        for file in files.values():
            file.close()
    assert done == manifest.num_bytes, f"{done} bytes written, {manifest.num_bytes} announced"
    text = json.dumps({"format": _FORMAT_VERSION, **asdict(manifest)}, indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def spoken_size(num_bytes: int) -> str:
    """ "1.5 GB": for people."""
    power = min(4, int(math.log(max(num_bytes, 1), 1000)))
    return f"{num_bytes / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
