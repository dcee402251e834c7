"""What an exported folder holds: `encore_export.json`, its provenance, and the check that every file is there whole.

The graphs are small, so their SHA-256 is compared whenever a folder is opened; the weights may be gigabytes, so of
them the size is compared, and the SHA-256 only by `check_folder(folder, thorough=True)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from encore.checkpoint.packing import BLOCK_SIZES
from encore.export import ExportError
from encore.quantize.blocks import DEFAULT_BLOCK_SIZE, PACKED_BITS

MANIFEST_FILE = "encore_export.json"
WEIGHTS_FILE = "weights.bin"
GRAPH_FILES = {"encoder": "encoder.onnx", "memory": "memory.onnx", "step": "step.onnx"}
FORMAT = 4

Weights = Literal["float32", "int8", "int4", "int8-head-int4"]
Activations = Literal["float32", "int8", "int8-rows"]
CacheKind = Literal["float32", "int8"]

BITS: dict[Weights, tuple[int | None, int | None]] = {"float32": (None, None), **PACKED_BITS}
"""Bits of the layers' matrices and of the vocabulary's (embedding and head); None = float32."""


CANDIDATES = 64
"""How many of the best logits of a head's first pass are computed in full by the second."""

LARGE_VOCABULARY = 32_768
"""From so many words on an int8 head goes in two passes, unless asked otherwise."""


@dataclass(frozen=True)
class Manifest:
    """An opened folder. `parts` are the graphs it has; `provenance` is the whole file."""

    folder: Path
    parts: tuple[str, ...]
    provenance: Mapping[str, Any]

    def graph(self, part: str) -> Path:
        if part not in self.parts:
            raise ExportError(
                f"{self.folder} was exported without its {part} graph; export the model again without --encoder-only"
            )
        return self.folder / GRAPH_FILES[part]


def is_exported(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).is_file()


def check_folder(folder: Path, *, thorough: bool = False) -> Manifest:
    """The manifest, after every file it names was found whole. Raises ExportError."""
    path = folder / MANIFEST_FILE
    again = "export the model again, or copy the folder again"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}); expected what `encore export` wrote") from error
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON ({error}); {again}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise ExportError(f"{path} has the format {found!r:.40}, this version reads {FORMAT}; export the model again")
    files, parts = raw.get("files"), raw.get("parts")
    if not isinstance(files, dict) or not isinstance(parts, list):
        raise ExportError(f"{path} does not name its files and parts; {again}")
    if not {"encoder"} <= set(map(str, parts)) <= set(GRAPH_FILES):
        raise ExportError(f"{path} names the parts {parts!r:.80}, of which some are unknown or missing; {again}")
    for name in (*(GRAPH_FILES[part] for part in parts), WEIGHTS_FILE):
        expected = files.get(name)
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise ExportError(f"{path} does not describe {name}; {again}")
        file = folder / name
        if not file.is_file():
            raise ExportError(f"{folder} lacks {name}; {again}")
        if file.stat().st_size != expected["bytes"]:
            raise ExportError(f"{file} has {file.stat().st_size} bytes, expected {expected['bytes']}; {again}")
        if (thorough or name != WEIGHTS_FILE) and sha256(file) != expected["sha256"]:
            raise ExportError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST_FILE}; {again}")
    return Manifest(folder, tuple(parts), raw)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(weights: str, block_size: int | None, activations: str, cache: str = "float32") -> int:
    """The block size to use. Raises ExportError for what does not exist."""
    if cache not in get_args(CacheKind):
        raise ExportError(f"cache is {cache!r}; expected one of {', '.join(get_args(CacheKind))}")
    if weights not in BITS:
        raise ExportError(f"weights is {weights!r}; expected one of {', '.join(BITS)}")
    if activations not in get_args(Activations):
        raise ExportError(f"activations is {activations!r}; expected one of {', '.join(get_args(Activations))}")
    if weights == "float32":
        if block_size is not None:
            raise ExportError(f"block_size is {block_size}, but float32 weights have no blocks; leave it out")
        return 0
    if block_size is None:
        return DEFAULT_BLOCK_SIZE
    if block_size not in BLOCK_SIZES:
        raise ExportError(f"block_size is {block_size}; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    return block_size
