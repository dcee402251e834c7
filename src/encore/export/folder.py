"""export(): a checkpoint folder -> a folder of graphs, weights, tokenizer, configs and provenance.

The folder appears whole or not at all, and is all that generation needs. No torch; one slice of one tensor is in memory
at a time, so a model of any size is exported in a few hundred megabytes.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from encore import __version__
from encore.checkpoint.config_json import read_config_file
from encore.checkpoint.folder import INDEX_FILE, weight_files
from encore.checkpoint.hub import CARRIED, LICENCES, carried_files, resolve
from encore.checkpoint.packing import packing
from encore.checkpoint.writing import copy_files, new_folder, write_json
from encore.config import StackConfig, T5GemmaConfig
from encore.export import ExportError
from encore.export.manifest import (
    BITS,
    CANDIDATES,
    FORMAT,
    GRAPH_FILES,
    LARGE_VOCABULARY,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Activations,
    CacheKind,
    Weights,
    check_weights,
    is_exported,
    sha256,
)
from encore.export.preview import check_width, view
from encore.export.weights import Matrix, StoredWeights, WeightsFile
from encore.tokenizer_index import TOKENIZER_INDEX, build_index

REPLACED = (
    *("*.onnx", WEIGHTS_FILE, "*.safetensors", INDEX_FILE, MANIFEST_FILE),
    *(TOKENIZER_INDEX, *CARRIED, *LICENCES),
)
"""What a folder that is written again never keeps from its former content."""

SAID_BEFORE = ("method", "calibration", "source")
"""What `encore quantize` said of packed weights that holds for their export too."""


@dataclass(frozen=True)
class Export:
    """What was written. `error` is the relative error of the packed weights, root mean square.

    `preview_energy`: the part of the sum of the head's squares that its view holds (`preview.py`), if it has one.
    """

    out: str
    weights: str
    block_size: int
    bits_per_weight: float
    error: float
    preview_energy: float | None
    parts: tuple[str, ...]
    num_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    weights: Weights | None = None,
    *,
    block_size: int | None = None,
    activations: Activations | None = None,
    cache: CacheKind = "float32",
    two_pass_head: bool | None = None,
    head_preview: int | None = None,
    encoder_only: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Export:
    """Write the graphs of a T5Gemma or T5Gemma 2 folder, shipped model or hub name.

    Args:
        weights: of the layers and the vocabulary's matrix; see `manifest.BITS`. Norms and the rest stay float32. None
            is int8, or what the folder holds, if `encore quantize` packed it.
        block_size: how many weights share a scale, 32, 64 or 128; None is 128, or that of a packed folder.
        activations: "int8" rounds what is multiplied with packed weights to int8 too, block by block, where the
            processor has instructions for it; "float32" leaves it exact and is slower. "int8-rows" is "int8" for the
            decoder, which waits for its weights; the encoder's layers, which wait for products, are int8 whatever
            `weights` says, with one scale for each row and for each token: products in a third of the time, encoding in
            two thirds, at the loss of "int8" on the shipped translator; but it would err more where a few activations
            are much larger than the rest.
            None is "int8-rows", or "int8" for a folder that `encore quantize` packed, whose weights are kept.
        cache: how keys and values of memory and target are kept; see `attention.py`.
        two_pass_head: multiply with the upper four bits of an int8 head first, and with all eight only for the best
            logits (`step.py`): decoding a large vocabulary in four fifths of the time. None is yes for an int8 head of
            `manifest.LARGE_VOCABULARY` words or more.
        head_preview: find the best words by a view of the head so many numbers wide (`preview.py`), a multiple of 32,
            and compute only theirs in full, instead of two passes. Half of the head's columns have a step of
            270M-270M read a quarter less. Probabilities are then estimates: generation tells them, `score` refuses.
        encoder_only: the encoder graph alone, for embeddings.
        force: write into a folder that holds files already.
        progress: told bytes of matrices read, and of how many.

    Raises ExportError or CheckpointError before `out` changes.
    """
    started = time.monotonic()
    check_weights(weights or "int8", block_size, activations or "int8", cache)
    folder = resolve(source)
    if is_exported(folder):
        raise ExportError(f"{folder} is an export already; give the checkpoint that it was made of")
    config = read_config_file(folder)
    if not isinstance(config, T5GemmaConfig):
        raise ExportError(f"{folder} holds a {config.model_type}; only encoder-decoders are exported: adapt it first")
    if config.file_type not in ("t5gemma", "t5gemma2"):
        raise ExportError(f"{folder} holds a {config.file_type}, a variant that has no graphs: run it with torch")
    packed = packing(config)
    if packed is not None:
        asked = (weights or packed.weights, block_size or packed.block_size)
        if asked != (packed.weights, packed.block_size):
            raise ExportError(
                f"{folder} holds {packed.weights} weights in blocks of {packed.block_size}; asked for was {asked[0]} "
                f"in blocks of {asked[1]}; leave both out, or export the checkpoint that it was made of"
            )
        weights, block_size = cast(Weights, packed.weights), packed.block_size
    weights = weights or "int8"
    activations = activations or ("int8-rows" if packed is None else "int8")
    block_size = check_weights(weights, block_size, activations, cache)
    decoder = config.decoder
    possible = BITS[weights][1] == 8 and decoder.vocab_size > CANDIDATES
    if two_pass_head and not possible:
        raise ExportError(
            f"a head goes in two passes if it is int8 and has over {CANDIDATES} words; {folder} has "
            f"{decoder.vocab_size} words, and the weights are {weights}"
        )
    if head_preview is not None:
        if weights == "float32" or two_pass_head or encoder_only:
            raise ExportError(
                "head_preview is for a packed head, in place of two passes; give other weights than float32, and leave "
                "two_pass_head and encoder_only out"
            )
        check_width(head_preview, decoder.vocab_size, decoder.hidden_size)
        possible = False
    in_planes = two_pass_head if two_pass_head is not None else possible and decoder.vocab_size >= LARGE_VOCABULARY
    target = Path(out)
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ExportError(f"{out} holds files already; choose another folder, or use --force to write into it")
    real, origin = Path(os.path.realpath(target)), Path(os.path.realpath(folder))
    if real == origin or real in origin.parents:
        raise ExportError(f"{out} is or contains the source {folder}; choose another folder")
    done = total = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    stored = StoredWeights(folder, config, advance)
    total = stored.num_bytes(*("encoder.",) if encoder_only else ("encoder.", "decoder."))
    if head_preview is not None:  # the head is read again, twice
        columns = -(-decoder.hidden_size // block_size) * block_size
        total += 2 * decoder.vocab_size * columns * (BITS[weights][1] or 0) // 8
    parts = ("encoder",) if encoder_only else ("encoder", "memory", "step")
    with new_folder(target, replaced=REPLACED) as staged:
        with WeightsFile(staged / WEIGHTS_FILE, stored, block_size) as file:
            how = (weights, activations, cache, in_planes, head_preview)
            energy = _write_graphs(staged, config, file, *how, encoder_only=encoder_only)
        files = {GRAPH_FILES[part]: staged / GRAPH_FILES[part] for part in parts}
        described = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
        described[WEIGHTS_FILE] = {"bytes": file.size, "sha256": file.sha256}
        measured = _measured(file)
        if packed is not None:
            measured["error"] = {"relative": packed.raw.get("error", 0.0)}
        provenance = {
            "format": FORMAT,
            "parts": list(parts),
            "model_type": config.model_type,
            "weights": weights,
            "block_size": block_size,
            "activations": activations if weights != "float32" else "float32",
            "cache": cache,
            "two_pass_head": in_planes,
            "head_preview": None if energy is None else {"width": head_preview, "energy": round(energy, 4)},
            "method": "none" if weights == "float32" else "round to nearest",
            "pictures": False,
            **measured,
            "files": described,
            "source": {
                "name": origin.name if Path(source).expanduser().is_dir() else os.fspath(source),
                "sha256": {path.name: sha256(path) for path in (folder / "config.json", *weight_files(folder))},
            },
            **({} if packed is None else {key: packed.raw[key] for key in SAID_BEFORE if key in packed.raw}),
            "versions": _versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        shutil.copyfile(folder / "config.json", staged / "config.json")
        copy_files(carried_files(folder), staged)
        if (staged / "tokenizer.json").is_file():
            build_index(staged / "tokenizer.json")
        write_json(staged / MANIFEST_FILE, provenance)
    return Export(
        out=os.fspath(out),
        weights=weights,
        block_size=block_size,
        bits_per_weight=measured["bits_per_weight"],
        error=measured["error"]["relative"],
        parts=parts,
        preview_energy=energy,
        num_bytes=sum(entry["bytes"] for entry in described.values()),
        seconds=round(time.monotonic() - started, 3),
    )


def _write_graphs(
    folder: Path,
    config: T5GemmaConfig,
    file: WeightsFile,
    weights: Weights,
    activations: Activations,
    cache: CacheKind,
    in_planes: bool,
    head_preview: int | None,
    *,
    encoder_only: bool,
) -> float | None:
    """Gives the energy of the head's view, if it has one."""
    try:
        from encore.export.encoder import EncoderGraph
        from encore.export.step import MemoryGraph, StepGraph
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise ExportError("export needs the package onnx; install it with: pip install 'encore-lm[export]'") from error
    layer_bits, vocabulary_bits = BITS[weights]

    def table(side: str, stack: StackConfig) -> Matrix:
        planes = in_planes and (side == "decoder" or bool(config.tied_embeddings))
        part = f"{side}.embed_tokens.weight", stack.vocab_size
        return file.matrix([part], stack.hidden_size, vocabulary_bits, planes=planes)

    read = table("encoder", config.encoder)
    encoder = EncoderGraph(config, file, layer_bits, activations)
    encoder.build(read)
    encoder.save(folder / GRAPH_FILES["encoder"])
    if encoder_only:
        return None
    step = StepGraph(config, file, layer_bits, activations, cache)
    written = read if config.tied_embeddings else table("decoder", config.decoder)
    seen = None if head_preview is None else view(file, written, head_preview)
    step.build(written, seen)
    step.save(folder / GRAPH_FILES["step"])
    memory = MemoryGraph(step, activations)
    memory.build()
    memory.save(folder / GRAPH_FILES["memory"])
    return None if seen is None else seen.energy


def _measured(file: WeightsFile) -> dict[str, Any]:
    """Bits per weight, scales included, and the relative error of what was packed: over all and of the worst matrix."""
    squared_error = sum(error.squared_error for error in file.errors.values())
    squared_norm = sum(error.squared_norm for error in file.errors.values())
    worst = max(file.errors, key=lambda name: file.errors[name].relative)
    return {
        "parameters_in_matrices": file.num_weights,
        "bits_per_weight": round(8 * file.num_bytes / file.num_weights, 4),
        "error": {
            "relative": round((squared_error / squared_norm) ** 0.5, 6) if squared_norm else 0.0,
            "worst": round(file.errors[worst].relative, 6),
            "worst_matrix": worst,
        },
    }


def _versions() -> dict[str, str]:
    import onnx

    return {
        "encore": __version__,
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
    }
