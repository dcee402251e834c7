"""Load and save checkpoint folders in the public layout: encore.load, encore.save.

Loading checks every header against the config first, builds the model on the meta device (shapes without storage),
then fills it tensor by tensor from the mapped file: at no time is more than one tensor held beyond the final size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from encore.checkpoint import CheckpointError
from encore.checkpoint.config_json import TEXT_ONLY_VISION, config_to_json, read_config_file
from encore.checkpoint.folder import TensorInfo, read_folder, same_bytes
from encore.checkpoint.hub import carried_files, resolve
from encore.checkpoint.names import is_picture_part, our_name, public_name
from encore.checkpoint.packed import fill_packed
from encore.checkpoint.packing import packing
from encore.checkpoint.writing import (
    MAX_SHARD_BYTES,
    OutputTensor,
    Piece,
    copy_files,
    new_folder,
    write_json,
    write_weights,
)
from encore.config import GemmaConfig, ModelConfig, T5GemmaConfig
from encore.model.encoder import Encoder
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma

Model = Gemma | T5Gemma | Encoder

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors names -> torch dtypes that a model may have."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHOWN = 5


class SavesItself(Protocol):
    """A tokenizer: it writes its files into a folder."""

    def save(self, folder: Path, /) -> Any: ...


@dataclass(frozen=True)
class Weights:
    """The tensors of a checked folder by our names, and its tied copies: (copy, the tensor it must equal)."""

    tensors: Mapping[str, TensorInfo]
    tied: tuple[tuple[TensorInfo, TensorInfo], ...]

    @property
    def dtype(self) -> str:
        """The dtype of the embedding matrix, in the words of config.json: "bfloat16"."""
        name = next(name for name in self.tensors if name.endswith("embed_tokens.weight"))
        return dtype_name(DTYPES[self.tensors[name].dtype])

    def check_tied(self) -> None:
        """Compare the tied copies with their originals. Raises CheckpointError that names both."""
        for copy, original in self.tied:
            if not same_bytes(copy, original):
                raise CheckpointError(
                    f"{copy.path}: tensor {copy.name} should be tied to {original.name} but differs from it; "
                    "a head of its own cannot be represented"
                )


def read_config(name_or_folder: str | os.PathLike[str]) -> ModelConfig:
    """The config of a folder, a shipped model or a hub name. Raises CheckpointError."""
    return read_config_file(resolve(name_or_folder))


def load(
    name_or_folder: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    vision: bool = False,
    part: Literal["all", "encoder"] = "all",
) -> Model:
    """A model in eval mode from a folder, a shipped model or a hub name.

    Args:
        dtype: of the parameters; None keeps each as stored; "auto" is float32 on a CPU, where bfloat16 is slow or, with
            units for it, less exact, and as stored elsewhere.
        vision: also load the vision tower and projector, which text alone does not need.
        part: "encoder" gives the encoder of an encoder-decoder alone and reads no decoder tensor.

    Raises CheckpointError, before memory is spent, that names the tensor, key or file at fault.
    """
    target_device = as_device(device)
    if dtype == "auto":
        dtype = torch.float32 if target_device.type == "cpu" else None
    wanted = None if dtype is None else as_dtype(dtype)
    folder = resolve(name_or_folder)
    config = read_config_file(folder)
    if vision and config.vision is None:
        raise CheckpointError(f"{folder} holds no vision tower, so it reads text alone: leave pictures (vision) out")
    if part not in ("all", "encoder"):
        raise ValueError(f"part is {part!r}; expected 'all' or 'encoder'")
    if part == "encoder" and not isinstance(config, T5GemmaConfig):
        raise CheckpointError(f"{folder} holds a {config.model_type}, which has no encoder; load it with part='all'")
    prefix = "encoder." if part == "encoder" else ""
    if packing(config) is not None:
        model = build_on_meta(config, vision=vision, part=part)
        fill_packed(model, folder, config, wanted, target_device, prefix)
        model.origin = folder.absolute()  # type: ignore[assignment]
        return model.eval()
    weights = check_folder(folder, config)
    if part == "all":
        weights.check_tied()
    model = build_on_meta(config, vision=vision, part=part)
    _fill(model, {name: weights.tensors[prefix + name] for name, _ in model.named_parameters()}, wanted, target_device)
    model.origin = folder.absolute()  # type: ignore[assignment]
    return model.eval()


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers 5 loads, with the names and tied-weight omissions of its own. A model that is
    no plain T5Gemma or T5Gemma 2 is written under a model_type of ours, which transformers refuses.

    What the model does not hold comes from the folder it was loaded from: the vision tower and projector (unless
    loaded), generation settings, licences, and the tokenizer unless one is given. The folder appears whole or not at
    all; other files that it held before stay.
    """
    if not isinstance(model, Gemma | T5Gemma):
        raise ValueError(
            f"save() writes whole models (Gemma, T5Gemma), not {type(model).__name__}: an encoder alone has no public "
            "folder format; save the model that it belongs to"
        )
    origin = getattr(model, "origin", None)
    tensors = _outputs(model, origin)
    tensors += text_only_placeholders(model.config, _NAMES[model.head_weight.dtype])
    with new_folder(Path(folder)) as staged:
        write_weights(staged, sorted(tensors, key=lambda tensor: tensor.name), max_shard_bytes)
        write_json(staged / "config.json", config_to_json(model.config, dtype_name(model.head_weight.dtype)))
        if tokenizer is not None:
            tokenizer.save(staged)
        if origin is not None and Path(origin).is_dir():
            copy_files(carried_files(Path(origin)), staged)
        if not (staged / "generation_config.json").exists() and not (Path(folder) / "generation_config.json").exists():
            write_json(staged / "generation_config.json", generation_settings(model.config))


def check_folder(folder: Path, config: ModelConfig | None = None) -> Weights:
    """Compare a folder's headers with what its config promises. Raises CheckpointError; reads no tensor."""
    config = config or read_config_file(folder)
    stored: dict[str, TensorInfo] = {}
    copies: list[tuple[TensorInfo, str]] = []
    for public, info in read_folder(folder).items():
        name, role = our_name(config.file_type, public)
        if role == "ignored" or (config.vision is None and config.extra.get("text_only") and is_picture_part(name)):
            continue
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.path}: tensor {public} is stored as {info.dtype}; expected one of {', '.join(DTYPES)}"
            )
        if role == "tied":
            copies.append((info, name))
        elif name in stored:
            raise CheckpointError(f"{info.path}: tensors {stored[name].name} and {public} are the same one, {name}")
        else:
            stored[name] = info
    for info, original in copies:  # some older folders kept the copy and left out the original
        stored.setdefault(original, info)
    shapes = expected_shapes(config)
    _compare(folder, config, stored, shapes)
    return Weights(stored, tuple((copy, stored[name]) for copy, name in copies if stored[name] is not copy))


def build_on_meta(config: ModelConfig, *, vision: bool = False, part: Literal["all", "encoder"] = "all") -> Model:
    """The model without storage."""
    with torch.device("meta"), _WithoutInit():
        if isinstance(config, GemmaConfig):
            return Gemma(config, vision=vision)
        return T5Gemma(config, vision=vision) if part == "all" else Encoder(config, vision=vision)


class _WithoutInit(TorchFunctionMode):
    """Skips torch.nn.init: there is nothing to fill, and normal_ on the meta device imports for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by our names: that is the model itself, with its vision part if it has one."""
    model = build_on_meta(config, vision=config.vision is not None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def text_only_placeholders(config: ModelConfig, dtype: str) -> list[OutputTensor]:
    """Zeros for the stand-in tower of a T5Gemma 2 without pictures, so that transformers finds every tensor."""
    if config.file_type != "t5gemma2" or config.vision is not None:
        return []
    shapes = expected_shapes(replace(config, vision=TEXT_ONLY_VISION))
    return [
        zeros(public_name(config.file_type, name), dtype, shape)
        for name, shape in shapes.items()
        if is_picture_part(name)
    ]


def zeros(name: str, dtype: str, shape: tuple[int, ...]) -> OutputTensor:
    return OutputTensor(name, dtype, shape, lambda: tensor_pieces(torch.zeros(shape, dtype=DTYPES[dtype])))


def generation_settings(config: ModelConfig) -> dict[str, Any]:
    """A generation_config.json for a model that came without: its special tokens."""
    eos = config.extra.get("eos_token_id")
    several = isinstance(eos, list) and eos and eos[0] == config.eos_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos if several else config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def map_tensor(info: TensorInfo) -> Tensor:
    """The tensor on its mapped file: nothing is held beyond the pages that are touched."""
    data = info.map()
    if info.begin % DTYPES[info.dtype].itemsize:
        data = np.array(data)  # a header of odd length: torch wants aligned numbers
    return torch.from_numpy(data).view(DTYPES[info.dtype]).view(info.shape)


def tensor_pieces(tensor: Tensor) -> Iterable[Piece]:
    """The bytes of a tensor."""
    yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """ "bfloat16" or torch.bfloat16 -> torch.bfloat16; ValueError for what no model has."""
    value = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if value not in _NAMES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(map(dtype_name, _NAMES))}")
    return value


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_device(device: str | torch.device) -> torch.device:
    """A device that this machine has; ValueError otherwise."""
    try:
        value = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; expected a name such as cpu or cuda") from error
    if value.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no CUDA device here; use device='cpu'")
    return value


def _compare(
    folder: Path, config: ModelConfig, stored: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    def public(name: str) -> str:
        return stored[name].name if name in stored else public_name(config.file_type, name)

    for name, shape in shapes.items():
        if name in stored and stored[name].shape != shape:
            raise CheckpointError(
                f"{stored[name].path}: tensor {public(name)} has shape {list(stored[name].shape)}, "
                f"but config.json makes it {list(shape)}"
            )
    missing = [public(name) for name in shapes if name not in stored]
    surplus = [public(name) for name in stored if name not in shapes]
    for problem, names in (("lacks", missing), ("holds, but config.json does not describe,", surplus)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(f"{folder} {problem} the tensors {', '.join(names[:_SHOWN])}{more}")


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, TensorInfo], dtype: torch.dtype | None, device: torch.device) -> None:
    """Replace every parameter by its stored values; modules that share one go on sharing it."""
    filled: dict[int, nn.Parameter] = {}
    places = [(f"{path}." if path else "", module) for path, module in model.named_modules()]
    for prefix, module in places:
        for leaf, old in list(module.named_parameters(recurse=False)):
            if id(old) not in filled:
                info = tensors[prefix + leaf]
                value = torch.empty(info.shape, dtype=dtype or DTYPES[info.dtype], device=device)
                value.copy_(map_tensor(info))
                filled[id(old)] = nn.Parameter(value)
            setattr(module, leaf, filled[id(old)])
    held = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not held, f"buffers without values: {held}"


def _outputs(model: Gemma | T5Gemma, origin: Path | None) -> list[OutputTensor]:
    """Every tensor that the folder needs; the pictures' parts from the origin if the model lacks them."""
    config, held = model.config, dict(model.named_parameters())
    shapes = expected_shapes(config)
    odd = [name for name in held if shapes.get(name) != tuple(held[name].shape)]
    odd += [name for name in shapes if name not in held and not is_picture_part(name)]
    if odd:
        raise CheckpointError(
            f"the model is no plain {config.file_type}: {', '.join(odd[:_SHOWN])} do not fit its config; "
            "merge adapters and unpack weights before save()"
        )
    for name, parameter in held.items():
        if parameter.dtype not in _NAMES or parameter.is_meta:
            raise CheckpointError(f"parameter {name} is {parameter.dtype} on {parameter.device}; it cannot be saved")
    borrowed = [name for name in shapes if name not in held]
    if borrowed and (origin is None or not origin.is_dir()):
        raise CheckpointError(
            f"the config describes a vision tower, but the model was built without it and "
            f"{'it comes from no folder' if origin is None else f'its folder {origin} is gone'}; "
            "build it with vision=True, or set config.vision to None"
        )
    kept = check_folder(origin).tensors if borrowed and origin is not None else {}
    for name in borrowed:
        if name not in kept or kept[name].shape != shapes[name]:
            raise CheckpointError(f"{origin} does not hold {name} of shape {list(shapes[name])}")

    def output(name: str, shape: tuple[int, ...]) -> OutputTensor:
        public, dtype = public_name(config.file_type, name), model.head_weight.dtype
        if name in held:
            return OutputTensor(public, _NAMES[held[name].dtype], shape, lambda: tensor_pieces(held[name]))
        return OutputTensor(public, _NAMES[dtype], shape, lambda: tensor_pieces(map_tensor(kept[name]).to(dtype)))

    return [output(name, shape) for name, shape in shapes.items()]
