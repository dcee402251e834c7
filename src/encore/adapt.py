"""adapt(): Gemma weights -> T5Gemma weights, from file to file.

What becomes of which tensor is in `adapt_plan`. It is carried out here one tensor at a time, so that a model needs no
more memory than its largest tensor.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch

from encore import __version__
from encore.adapt_plan import Layers, Plan, Style, plan
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
    text_only_placeholders,
)
from encore.checkpoint.provenance import check_out, sha256, spoken_name
from encore.checkpoint.recipes import Copy, Side, producer
from encore.checkpoint.writing import (
    MAX_SHARD_BYTES,
    WEIGHT_PATTERNS,
    OutputTensor,
    copy_files,
    new_folder,
    write_json,
    write_weights,
)
from encore.config import T5GemmaConfig, Variant

Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes in all, hashing and writing together."""

PROVENANCE_FILE = "encore_adaptation.json"

_SAMPLING = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Adaptation:
    """What was written."""

    out: str
    style: Style
    model_type: str  # of config.json: the style, or "encore_t5gemma" where no public format holds the model
    init: Literal["source", "random"]
    parameters: int
    num_bytes: int
    dtype: str
    files: tuple[str, ...]
    seconds: float
    warmup: Mapping[str, Any] | None = field(default=None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def adapt(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    style: Style = "t5gemma2",
    decoder: str | os.PathLike[str] | None = None,
    rope_factor: float | None = None,
    seed: int = 0,
    random: bool = False,
    *,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    encoder_layers: Layers | None = None,
    decoder_layers: Layers | None = None,
    **variant: Unpack[Variant],
) -> Adaptation:
    """Write the T5Gemma that a Gemma folder (or two) becomes, as a checkpoint folder.

    Args:
        source, decoder: folders, shipped models or hub names; the decoder's stack comes from `decoder`, if given.
        rope_factor: linear interpolation on global layers of both stacks; None keeps the source's.
        seed: of the tensors that are drawn (cross-attention of an unbalanced T5Gemma; everything if `random`).
        random: the same architecture with random weights: normal(0, 0.02), norms 0.
        force: write into a folder that holds files already.
        encoder_layers, decoder_layers: another depth, by layers that are dropped or repeated: their number, spaced
            evenly over the source's, or a list of the source's layers.
        variant: `attention`, `tied_embeddings`, `cross_attention_layers`, `causal_encoder`, `shared_stack`, as
            T5GemmaConfig describes them. What then is no plain T5Gemma or T5Gemma 2 is written under the model_type
            encore_t5gemma, which other libraries refuse to load.

    Raises CheckpointError or ValueError before anything is written.
    """
    started = time.monotonic()
    if style not in ("t5gemma", "t5gemma2"):
        raise ValueError(f"style is {style!r}; expected 't5gemma' or 't5gemma2'")
    folders: dict[Side, Path] = {"encoder": resolve(source)}
    folders["decoder"] = folders["encoder"] if decoder is None else resolve(decoder)
    configs = {side: read_config_file(folder) for side, folder in folders.items()}
    planned = plan(  # type checks inside
        configs["encoder"],  # type: ignore[arg-type]
        style,
        None if decoder is None else configs["decoder"],  # type: ignore[arg-type]
        rope_factor=rope_factor,
        random=random,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        **variant,
    )
    check_out(Path(out), folders.values(), force)
    tensors, dtype = _outputs(planned, folders, seed=seed, random=random)
    sources = dict.fromkeys(folders.values())
    hashed = {folder: [folder / "config.json", *([] if random else weight_files(folder))] for folder in sources}
    to_write = sum(tensor.num_bytes for tensor in tensors)
    total = to_write + sum(path.stat().st_size for paths in hashed.values() for path in paths)
    _check_room(Path(out), to_write)
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    def described(given: str | os.PathLike[str], side: Side) -> dict[str, Any]:
        return {
            "name": spoken_name(given, folders[side]),
            "model_type": configs[side].model_type,
            "sha256": {path.name: sha256(path, advance) for path in hashed[folders[side]]},
        }

    provenance = {
        "style": style,
        "init": "random" if random else "source",
        "source": described(source, "encoder"),
        **({} if decoder is None else {"decoder_source": described(decoder, "decoder")}),
        "options": {"rope_factor": rope_factor, "seed": seed, **variant},
        **_described_layers(planned, {"encoder": encoder_layers, "decoder": decoder_layers}),
        "versions": {
            "encore": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"warmup": dict(planned.warmup)} if planned.warmup else {}),
    }
    with new_folder(Path(out), replaced=(*WEIGHT_PATTERNS, *CARRIED, *LICENCES, PROVENANCE_FILE)) as staged:
        files = write_weights(staged, tensors, max_shard_bytes, advance)
        write_json(staged / "config.json", config_to_json(planned.config, dtype))
        write_json(staged / "generation_config.json", _generation_settings(folders["encoder"], planned.config))
        write_json(staged / PROVENANCE_FILE, provenance)
        copy_files(carried_files(folders["encoder"]), staged)
        _store_source_format(staged)
        _copy_decoder_licences(folders["decoder"], staged)
    return Adaptation(
        out=os.fspath(out),
        style=style,
        model_type=planned.config.file_type,
        init="random" if random else "source",
        parameters=sum(math.prod(shape) for shape in expected_shapes(planned.config).values()),
        num_bytes=to_write,
        dtype=dtype,
        files=tuple(path.name for path in files),
        seconds=round(time.monotonic() - started, 3),
        warmup=planned.warmup,
    )


def _described_layers(planned: Plan, asked: Mapping[Side, Layers | None]) -> dict[str, Any]:
    """Which of the source's layers became the target's, and by which rule, for each side of another depth."""
    found = {
        side: {"rule": "evenly spaced" if isinstance(layers, int) else "listed", "source_layers": planned.layers[side]}
        for side, layers in asked.items()
        if layers is not None
    }
    return {"layers": found} if found else {}


def _outputs(planned: Plan, folders: Mapping[Side, Path], *, seed: int, random: bool) -> tuple[list[OutputTensor], str]:
    """The tensors to be written, sorted by name, and their dtype in the words of config.json."""
    stored: dict[Side, Mapping[str, TensorInfo]] = {}
    if random:
        raw = read_config_file(folders["encoder"]).extra
        dtype = dtype_name(as_dtype(raw.get("dtype") or raw.get("torch_dtype") or "float32"))
    else:
        checked = {folder: check_folder(folder) for folder in dict.fromkeys(folders.values())}
        for weights in checked.values():
            weights.check_tied()
        stored = {side: checked[folder].tensors for side, folder in folders.items()}
        dtype, other = (checked[folder].dtype for folder in (folders["encoder"], folders["decoder"]))
        if dtype != other:
            raise CheckpointError(f"the source is {dtype}, the decoder {other}; save one of them in the other's dtype")
    code = next(code for code, value in DTYPES.items() if value == as_dtype(dtype))
    tensors = text_only_placeholders(planned.config, code)
    for name, shape in expected_shapes(planned.config).items():
        recipe = planned.recipes[name]
        kind = stored[recipe.side][recipe.name].dtype if isinstance(recipe, Copy) else code
        pieces = producer(recipe, stored, shape, kind, f"{seed}:{name}")
        tensors.append(OutputTensor(public_name(planned.config.file_type, name), kind, shape, pieces))
    return sorted(tensors, key=lambda tensor: tensor.name), dtype


def _check_room(out: Path, num_bytes: int) -> None:
    existing = next(path for path in (out, *Path(os.path.realpath(out)).parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(f"{out} needs {num_bytes:,} bytes, but only {free:,} are free there")


def _generation_settings(folder: Path, config: T5GemmaConfig) -> dict[str, Any]:
    """The source's sampling settings and stop tokens; its cache settings do not fit an encoder-decoder."""
    path = folder / "generation_config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    kept = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    return {**generation_settings(config), **kept}


def _store_source_format(staged: Path) -> None:
    """Sources are BOS, text, EOS from here on: Gemma has always seen a BOS first, and denoised inputs end in EOS."""
    if not any((staged / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    path = staged / "encore.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**stored, "source_format": {"bos": True, "eos": True}})


def _copy_decoder_licences(folder: Path, staged: Path) -> None:
    """The licences of the decoder's source too; one that differs under the same name gets a prefix."""
    for path in (path for pattern in LICENCES for path in folder.glob(pattern) if path.is_file()):
        if not (staged / path.name).exists():
            shutil.copyfile(path, staged / path.name)
        elif (staged / path.name).read_bytes() != path.read_bytes():
            shutil.copyfile(path, staged / f"decoder_{path.name}")
