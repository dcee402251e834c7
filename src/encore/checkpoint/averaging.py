"""The mean of several checkpoints of one model, folder by folder and tensor by tensor.

T5Gemma 2's released weights are such a mean, of the last five checkpoints (arXiv 2512.14856). Sums are made in float64
(float32 when all are 16 bits wide) over pieces of a few million numbers, so memory does not grow with the model; the
result has the first folder's dtypes, tokenizer and licences.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from encore import __version__
from encore.checkpoint import CheckpointError
from encore.checkpoint.config_json import config_to_json, read_config_file
from encore.checkpoint.folder import TensorInfo, weight_files
from encore.checkpoint.hub import CARRIED, LICENCES, carried_files, resolve
from encore.checkpoint.names import public_name
from encore.checkpoint.pretrained import (
    DTYPES,
    as_dtype,
    check_folder,
    dtype_name,
    expected_shapes,
    generation_settings,
    map_tensor,
    tensor_pieces,
    text_only_placeholders,
)
from encore.checkpoint.provenance import check_out, sha256, spoken_name
from encore.checkpoint.writing import (
    MAX_SHARD_BYTES,
    WEIGHT_PATTERNS,
    OutputTensor,
    Piece,
    copy_files,
    new_folder,
    write_json,
    write_weights,
)
from encore.config import ModelConfig

PROVENANCE_FILE = "encore_average.json"
_PIECE_ELEMENTS = 1 << 22
_SHOWN = 5


@dataclass(frozen=True)
class Average:
    """What was written."""

    out: str
    folders: tuple[str, ...]
    parameters: int
    num_bytes: int
    dtype: str
    files: tuple[str, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def average(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Average:
    """Write the mean of the weights of two or more folders as a public folder.

    Args:
        folders: folders, shipped models or hub names, all with the same config.
        dtype: of the result; None keeps the first folder's, tensor by tensor.
        force: write into a folder that holds files already.
        progress: told the bytes done and the bytes in all, hashing and writing together.

    Raises ValueError or CheckpointError, before anything is written, that names the folders and what differs; and
    CheckpointError if a mean is no number.
    """
    started = time.monotonic()
    if len(folders) < 2:
        raise ValueError(f"an average is of two or more folders, got {len(folders)}")
    sources = [resolve(folder) for folder in folders]
    config = read_config_file(sources[0])
    for source in sources[1:]:
        _check_same(sources[0], config, source, read_config_file(source))
    check_out(Path(out), sources, force)
    stored = []
    for source in sources:
        weights = check_folder(source)
        weights.check_tied()
        stored.append(weights)
    shapes = expected_shapes(config)
    result_dtype = stored[0].dtype if dtype is None else dtype_name(as_dtype(dtype))
    codes = {value: code for code, value in DTYPES.items()}
    code = codes[as_dtype(result_dtype)]
    tensors = text_only_placeholders(config, code)
    for name, shape in shapes.items():
        infos = [weights.tensors[name] for weights in stored]
        kind = infos[0].dtype if dtype is None else code
        tensors.append(OutputTensor(public_name(config.file_type, name), kind, shape, _mean_of(infos, kind)))
    hashed = {source: weight_files(source) for source in sources}
    to_write = sum(tensor.num_bytes for tensor in tensors)
    total = to_write + sum(path.stat().st_size for source in sources for path in hashed[source])
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    provenance = {
        "averaged": [
            {
                "name": spoken_name(given, source),
                "sha256": {path.name: sha256(path, advance) for path in hashed[source]},
            }
            for given, source in zip(folders, sources, strict=True)
        ],
        "dtype": result_dtype,
        "versions": {"encore": __version__, "torch": torch.__version__},
    }
    with new_folder(Path(out), replaced=(*WEIGHT_PATTERNS, *CARRIED, *LICENCES, PROVENANCE_FILE)) as staged:
        files = write_weights(staged, sorted(tensors, key=lambda tensor: tensor.name), max_shard_bytes, advance)
        write_json(staged / "config.json", config_to_json(config, result_dtype))
        write_json(staged / PROVENANCE_FILE, provenance)
        copy_files(carried_files(sources[0]), staged)
        if not (staged / "generation_config.json").exists():
            write_json(staged / "generation_config.json", generation_settings(config))
    return Average(
        out=os.fspath(out),
        folders=tuple(os.fspath(folder) for folder in folders),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        num_bytes=to_write,
        dtype=result_dtype,
        files=tuple(path.name for path in files),
        seconds=round(time.monotonic() - started, 3),
    )


def _mean_of(infos: Sequence[TensorInfo], kind: str) -> Callable[[], Iterator[Piece]]:
    """The bytes of the mean of one tensor over all folders, in the dtype `kind`."""

    def pieces() -> Iterator[Piece]:
        tensors = [map_tensor(info).reshape(-1) for info in infos]
        wide = torch.float64 if any(tensor.element_size() > 2 for tensor in tensors) else torch.float32
        for start in range(0, tensors[0].numel(), _PIECE_ELEMENTS):
            parts = [tensor[start : start + _PIECE_ELEMENTS] for tensor in tensors]
            mean = torch.zeros(parts[0].shape, dtype=wide)
            for part in parts:
                mean += part
            mean = (mean / len(parts)).to(DTYPES[kind])
            if not bool(mean.isfinite().all()):
                raise CheckpointError(
                    f"the mean of tensor {infos[0].name} is not finite: one of {', '.join(_places(infos))} holds "
                    f"infinite values or NaN, or {kind} is too narrow; leave that folder out"
                )
            yield from tensor_pieces(mean)

    return pieces


def _places(infos: Iterable[TensorInfo]) -> list[str]:
    return [str(info.path.parent) for info in infos]


def _check_same(first: Path, config: ModelConfig, other: Path, other_config: ModelConfig) -> None:
    left, right = _flat(config), _flat(other_config)
    differing = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    if differing:
        listed = "; ".join(
            f"{key} is {left.get(key, 'absent')} and {right.get(key, 'absent')}" for key in differing[:_SHOWN]
        )
        raise CheckpointError(f"{first} and {other} are different models: {listed}; average checkpoints of one run")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The compared fields of a config by dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if dataclasses.is_dataclass(entry):
            found |= _flat(entry, f"{prefix}{field.name}.")
        elif field.compare:
            found[f"{prefix}{field.name}"] = entry
    return found
