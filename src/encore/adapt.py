"""Gemma weights -> T5Gemma weights (arXiv 2504.06225 section 2.2; arXiv 2512.14856 section 2).

One pure function, `plan`, maps every tensor of the target to where it comes from; `adapt` carries that out from file
to file, one tensor at a time, so that a model needs no more memory than its largest tensor.

                     T5Gemma (from Gemma 2)                       T5Gemma 2 (from Gemma 3)
    encoder          the source                                   the source
    decoder          the source, or another one (--decoder)       the same; its attention reads target and memory
    embedding        one per stack                                one for all, from the source, at most 262,144 rows
    cross-attention  same size: the layer's self-attention        none: merged into self-attention
                     and its norms; else random, warmed up
    eoi_embedding    none                                         sqrt(d) x the row of the end-of-image token, so that
                                                                  the function stays as it was
    vision           none                                         tower and projector of a gemma3 folder
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
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
    text_only_placeholders,
)
from encore.checkpoint.provenance import check_out, sha256, spoken_name
from encore.checkpoint.recipes import Copy, Fill, Recipe, ScaledRow, Side, producer, random_recipe
from encore.checkpoint.writing import (
    MAX_SHARD_BYTES,
    WEIGHT_PATTERNS,
    OutputTensor,
    copy_files,
    new_folder,
    write_json,
    write_weights,
)
from encore.config import GemmaConfig, StackConfig, T5GemmaConfig

Style = Literal["t5gemma", "t5gemma2"]
Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes in all, hashing and writing together."""

PROVENANCE_FILE = "encore_adaptation.json"
WARMUP_STEPS = 1000
MAX_VOCAB_SIZE = 262_144
IMAGE_TOKEN = 256_001

_SAMPLING = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Plan:
    """What an adaptation makes: the target's config and, by our names, where each of its tensors comes from."""

    config: T5GemmaConfig
    recipes: Mapping[str, Recipe]
    warmup: Mapping[str, Any] | None


@dataclass(frozen=True)
class Adaptation:
    """What was written."""

    out: str
    style: Style
    init: Literal["source", "random"]
    parameters: int
    num_bytes: int
    dtype: str
    files: tuple[str, ...]
    seconds: float
    warmup: Mapping[str, Any] | None = field(default=None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    source: GemmaConfig,
    style: Style,
    decoder: GemmaConfig | None = None,
    *,
    rope_factor: float | None = None,
    random: bool = False,
) -> Plan:
    """Which tensor of the target comes from where. ValueError, with the reason, if the two do not fit."""
    config = target_config(source, style, decoder, rope_factor=rope_factor)
    copied_cross = same_size(config.encoder, config.decoder)
    names = expected_shapes(config)
    if random:
        return Plan(config, {name: random_recipe(name) for name in names}, None)
    recipes = {name: _recipe(name, source, config, copied_cross) for name in names}
    warmup = None
    if style == "t5gemma" and not copied_cross:
        warmup = {"steps": WARMUP_STEPS, "train": "cross_attention"}
    return Plan(config, recipes, warmup)


def target_config(
    source: GemmaConfig, style: Style, decoder: GemmaConfig | None = None, *, rope_factor: float | None = None
) -> T5GemmaConfig:
    """The config of the target. ValueError, with the reason, if the source cannot become it."""
    other = decoder or source
    for role, config in (("source", source), ("decoder", other)):
        if not isinstance(config, GemmaConfig):
            raise ValueError(f"the {role} is a {config.model_type}; expected a decoder-only Gemma 2 or Gemma 3")
        _check_style(role, config, style)
    if style == "t5gemma":
        if rope_factor is not None:
            raise ValueError("rope_factor is for style t5gemma2: T5Gemma interpolates no positions")
        encoder_stack, decoder_stack = source.stack, other.stack
    else:
        if rope_factor is not None and not 0 < rope_factor < math.inf:
            raise ValueError(f"rope_factor is {rope_factor}; expected a number above 0 (8 in the released models)")
        encoder_stack, decoder_stack = (_t5gemma2_stack(config.stack, rope_factor) for config in (source, other))
        if encoder_stack.hidden_size != decoder_stack.hidden_size:
            raise ValueError(
                f"T5Gemma 2 has one embedding and merged attention, so both stacks need one width: "
                f"{encoder_stack.hidden_size} in the source, {decoder_stack.hidden_size} in the decoder"
            )
    if encoder_stack.vocab_size != decoder_stack.vocab_size:
        raise ValueError(
            f"the source has {encoder_stack.vocab_size} tokens and the decoder {decoder_stack.vocab_size}; "
            "both must share one tokenizer"
        )
    eos = source.extra.get("eos_token_id")
    placeholder = source.image_token_index  # Gemma 3's, 262144, is the first id beyond the embedding as it is cut here
    return T5GemmaConfig(
        model_type=style,
        encoder=encoder_stack,
        decoder=decoder_stack,
        final_logit_softcapping=other.final_logit_softcapping,
        vision=source.vision if style == "t5gemma2" else None,
        pad_token_id=source.pad_token_id,
        eos_token_id=source.eos_token_id,
        bos_token_id=source.bos_token_id,
        boi_token_index=source.boi_token_index,
        eoi_token_index=source.eoi_token_index,
        image_token_index=placeholder if placeholder < encoder_stack.vocab_size else IMAGE_TOKEN,
        extra={"eos_token_id": eos} if isinstance(eos, list) else {},
    )


def same_size(encoder: StackConfig, decoder: StackConfig) -> bool:
    """Whether a decoder is balanced with its encoder: then cross-attention can copy self-attention."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "head_dim")
    return all(getattr(encoder, name) == getattr(decoder, name) for name in sizes)


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
) -> Adaptation:
    """Write the T5Gemma that a Gemma folder (or two) becomes, as a checkpoint folder.

    Args:
        source, decoder: folders, shipped models or hub names; the decoder's stack comes from `decoder`, if given.
        rope_factor: linear interpolation on global layers of both stacks; None keeps the source's.
        seed: of the tensors that are drawn (cross-attention of an unbalanced T5Gemma; everything if `random`).
        random: the same architecture with random weights: normal(0, 0.02), norms 0.
        force: write into a folder that holds files already.

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
        configs["decoder"],  # type: ignore[arg-type]
        rope_factor=rope_factor,
        random=random,
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
        "options": {"rope_factor": rope_factor, "seed": seed},
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
        init="random" if random else "source",
        parameters=sum(math.prod(shape) for shape in expected_shapes(planned.config).values()),
        num_bytes=to_write,
        dtype=dtype,
        files=tuple(path.name for path in files),
        seconds=round(time.monotonic() - started, 3),
        warmup=planned.warmup,
    )


def _check_style(role: str, config: GemmaConfig, style: Style) -> None:
    if style == "t5gemma" and config.stack.qk_norm:
        raise ValueError(
            f"the {role} is a {config.model_type}, whose queries and keys are normalised; T5Gemma has no such norms, "
            "so they would be lost. Use style t5gemma2"
        )
    if style == "t5gemma2" and not config.stack.qk_norm:
        raise ValueError(
            f"the {role} is a {config.model_type}, which has no norms on queries and keys and caps its logits; "
            "the layers of T5Gemma 2 are Gemma 3's. Use style t5gemma"
        )


def _t5gemma2_stack(stack: StackConfig, rope_factor: float | None) -> StackConfig:
    rope = stack.global_rope if rope_factor is None else replace(stack.global_rope, factor=float(rope_factor))
    return replace(stack, vocab_size=min(stack.vocab_size, MAX_VOCAB_SIZE), global_rope=rope)


def _recipe(name: str, source: GemmaConfig, config: T5GemmaConfig, copied_cross: bool) -> Recipe:
    """Where a tensor of the target (our name) comes from."""
    side, _, inner = name.partition(".")
    assert side in ("encoder", "decoder"), name
    if inner == "embed_tokens.eoi_embedding":
        inside = config.eoi_token_index < config.encoder.vocab_size
        return ScaledRow(config.eoi_token_index) if inside else Fill(0.0)
    if inner == "embed_tokens.weight":
        rows = config.encoder.vocab_size
        return Copy(side, inner, rows if rows < source.stack.vocab_size else None)
    if "cross_attn" in inner:
        if copied_cross:
            return Copy(side, inner.replace("cross_attn", "self_attn"))
        return random_recipe(name)
    return Copy(side, inner)


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
        tensors.append(OutputTensor(public_name(planned.config.model_type, name), kind, shape, pieces))
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
