"""quantize(): a checkpoint folder -> the same folder with packed weights, for `encore.load` and `encore export`.

Rounded to nearest, a matrix goes through some rows at a time and nothing else is held. Calibrated (`calibrate.py`),
the model is held once in float32, and packed matrices wait on disk until they are written.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encore.checkpoint import CheckpointError
from encore.checkpoint.config_json import read_config_file
from encore.checkpoint.folder import INDEX_FILE, TensorInfo, read_folder, weight_files
from encore.checkpoint.hub import CARRIED, LICENCES, carried_files, load_tokenizer, resolve
from encore.checkpoint.names import our_name
from encore.checkpoint.packing import BLOCK_SIZES, KEY, is_packed_matrix, packing, scales_name
from encore.checkpoint.provenance import check_out, sha256, spoken_name
from encore.checkpoint.writing import OutputTensor, Piece, copy_files, new_folder, write_json, write_weights
from encore.config import ModelConfig, T5GemmaConfig
from encore.quantize.blocks import DEFAULT_BLOCK_SIZE, PACKED_BITS, PackedKind, dequantise, quantise, scales_of
from encore.quantize.tensors import float_rows

NUM_EXAMPLES, MAX_TOKENS = 256, 512
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantized:
    """What was written. `error` is the relative error of the packed weights, root mean square."""

    out: str
    weights: str
    block_size: int
    method: str
    bits_per_weight: float
    error: float
    num_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    weights: PackedKind = "int4",
    *,
    block_size: int | None = None,
    calibrate: Sequence[str] = (),
    num_examples: int = NUM_EXAMPLES,
    max_tokens: int = MAX_TOKENS,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Quantized:
    """Pack the matrices of a folder, shipped model or hub name.

    Args:
        weights: bits of the layers' matrices, and of the vocabulary's.
        block_size: how many weights share a scale, 32, 64 or 128; None takes `blocks.DEFAULT_BLOCK_SIZE`.
        calibrate: files of pairs or texts (as a recipe names them) to round for; none = round to nearest.
        num_examples: rows of them that are read, each up to `max_tokens` tokens a side.
        progress: told texts read and of how many, while calibrating.

    Raises CheckpointError before `out` changes.
    """
    started = time.monotonic()
    if weights not in PACKED_BITS:
        raise CheckpointError(f"weights is {weights!r}; expected one of {', '.join(PACKED_BITS)}")
    block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
    if block_size not in BLOCK_SIZES:
        raise CheckpointError(f"block_size is {block_size}; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    folder = resolve(source)
    config = read_config_file(folder)
    if packing(config) is not None:
        raise CheckpointError(f"{folder} holds packed weights already; give the checkpoint that they were made of")
    check_out(Path(out), [folder], force)
    infos = {our_name(config.file_type, public): info for public, info in read_folder(folder).items()}
    stored = {name: info for (name, role), info in infos.items() if role == "weight"}
    bits, vocabulary_bits = PACKED_BITS[weights]
    counted = _Counted()
    with tempfile.TemporaryDirectory() as scratch:
        calibrated = None
        if calibrate:
            calibrated = Path(scratch)
            limits = (num_examples, max_tokens)
            counted.error = _calibrate(folder, config, calibrated, calibrate, weights, block_size, limits, progress)
        tensors: list[OutputTensor] = []
        for name, info in stored.items():
            if is_packed_matrix(name):
                of_this = vocabulary_bits if name.endswith("embed_tokens.weight") else bits
                tensors += _packed(name, info, of_this, block_size, calibrated, counted)
            else:
                tensors.append(OutputTensor(info.name, info.dtype, info.shape, lambda info=info: [info.map()]))
        said = {
            "weights": weights,
            "bits": bits,
            "vocabulary_bits": vocabulary_bits,
            "block_size": block_size,
            "method": "gptq" if calibrate else "round to nearest",
            "bits_per_weight": round(counted.bits_per_weight, 4),
            "source": {
                "name": spoken_name(source, folder),
                "sha256": {path.name: sha256(path) for path in (folder / "config.json", *weight_files(folder))},
            },
        }
        if calibrate:
            names = [Path(name).name if Path(name).exists() else name for name in calibrate]
            said["calibration"] = {"files": names, "examples": num_examples, "max_tokens": max_tokens}
        replaced = ("*.safetensors", INDEX_FILE, *CARRIED, *LICENCES)
        with new_folder(Path(out), replaced=replaced) as staged:
            write_weights(staged, sorted(tensors, key=lambda tensor: tensor.name))
            said["error"] = round(counted.error.relative, 6)
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            write_json(staged / "config.json", {**raw, KEY: said})
            copy_files(carried_files(folder), staged)
    return Quantized(
        out=os.fspath(out),
        weights=weights,
        block_size=block_size,
        method=said["method"],
        bits_per_weight=said["bits_per_weight"],
        error=said["error"],
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass
class _Error:
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def relative(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


class _Counted:
    """Bits and errors over all packed matrices."""

    def __init__(self) -> None:
        self.error, self.num_weights, self.num_bytes = _Error(), 0, 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / max(1, self.num_weights)


def _packed(
    name: str, info: TensorInfo, bits: int, block_size: int, calibrated: Path | None, counted: _Counted
) -> list[OutputTensor]:
    """Codes and scales of a matrix, computed, or taken from where calibration left them."""
    num_rows, num_columns = info.shape
    blocks = -(-num_columns // block_size)
    shapes = ((num_rows, blocks, block_size * bits // 8), (num_rows, blocks))
    counted.num_weights += num_rows * num_columns
    counted.num_bytes += math.prod(shapes[0]) + 4 * math.prod(shapes[1])

    def codes() -> Iterator[Piece]:
        if calibrated is not None:
            yield np.load(calibrated / f"{name.removesuffix('.weight')}.codes.npy").reshape(-1)
            return
        for rows in float_rows(info):
            made = quantise(rows, bits, block_size)
            difference = dequantise(*made, bits, num_columns) - rows
            counted.error.squared_error += float(np.vdot(difference, difference))
            counted.error.squared_norm += float(np.vdot(rows, rows))
            yield made[0].reshape(-1)

    def scales() -> Iterator[Piece]:
        if calibrated is not None:
            yield np.load(calibrated / f"{name.removesuffix('.weight')}.scales.npy").reshape(-1).view(np.uint8)
            return
        for rows in float_rows(info):
            yield scales_of(rows, bits, block_size).reshape(-1).view(np.uint8)

    return [
        OutputTensor(info.name, "U8", shapes[0], codes),
        OutputTensor(scales_name(info.name), "F32", shapes[1], scales),
    ]


def _calibrate(
    folder: Path,
    config: ModelConfig,
    scratch: Path,
    files: Sequence[str],
    weights: PackedKind,
    block_size: int,
    limits: tuple[int, int],
    progress: Progress,
) -> _Error:
    from encore.checkpoint.pretrained import load
    from encore.model.encoder import Encoder
    from encore.quantize.calibrate import Calibration, examples

    encoder_decoder = isinstance(config, T5GemmaConfig)
    tokenizer = load_tokenizer(folder)
    texts = examples(files, tokenizer, encoder_decoder=encoder_decoder, num_examples=limits[0], max_tokens=limits[1])
    model = load(folder, dtype="float32")
    assert not isinstance(model, Encoder)
    calibration = Calibration(model, texts, scratch)
    calibration.run(*PACKED_BITS[weights], block_size, progress)
    return _Error(calibration.squared_error, calibration.squared_norm)
