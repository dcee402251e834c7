"""Folders with packed weights (`packing.py`) on the torch path.

The layers' matrices stay packed in memory and are unpacked when they multiply; the vocabulary's, whose rows are looked
up one by one, is unpacked once. Slower than float weights and smaller: for speed on a CPU, `encore export` the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from encore.checkpoint import CheckpointError
from encore.checkpoint.folder import TensorInfo, read_folder
from encore.checkpoint.names import our_name
from encore.checkpoint.packing import Packing, packing, scales_name
from encore.config import ModelConfig

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


def unpack(
    codes: UInt8[Tensor, "N blocks bytes"], scales: Float[Tensor, "N blocks"], bits: int, num_columns: int
) -> Float[Tensor, "N K"]:
    """What packed blocks stand for, float32."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    numbers = codes.to(torch.float32).sub_(1 << (bits - 1)).mul_(scales[..., None])
    return numbers.flatten(1)[:, :num_columns]


class PackedLinear(nn.Module):
    """A bias-free linear layer whose matrix stays packed. It cannot be trained."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, bits: int, num_columns: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bits, self.in_features, self.out_features = bits, num_columns, len(codes)

    def forward(self, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        return F.linear(x, unpack(self.codes, self.scales, self.bits, self.in_features).to(x.dtype))


@torch.no_grad()
def fill_packed(
    model: nn.Module,
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    prefix: str = "",
) -> None:
    """Give a model on the meta device its weights; `prefix` stands before its names in the folder.

    `dtype` is of all that is not packed, and so of what is computed with; None keeps it as stored.
    """
    how = packing(config)
    assert how is not None
    infos = {our_name(config.file_type, public)[0]: info for public, info in read_folder(folder).items()}
    kept: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        name = f"{prefix}{path}.weight"
        if isinstance(module, nn.Linear) and scales_name(name) in infos:
            size = (module.out_features, module.in_features)
            made = PackedLinear(*_stored(infos, name, how.bits, how.block_size, size, device), how.bits, size[1])
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)
            continue
        for leaf, old in list(module.named_parameters(recurse=False)):
            name = f"{prefix}{path}.{leaf}" if path else f"{prefix}{leaf}"
            if id(old) not in kept:
                kept[id(old)] = nn.Parameter(_unpacked(infos, name, old, how, dtype, device), requires_grad=False)
            setattr(module, leaf, kept[id(old)])


def _unpacked(
    infos: Mapping[str, TensorInfo],
    name: str,
    like: Tensor,
    how: Packing,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    if scales_name(name) not in infos:
        stored = _tensor(infos, name, tuple(like.shape), device)
        return stored if dtype is None else stored.to(dtype)
    size = (like.shape[0], like.shape[1])
    codes, scales = _stored(infos, name, how.vocabulary_bits, how.block_size, size, device)
    norm = next(info for other, info in infos.items() if other.endswith("norm.weight"))
    whole = torch.empty(size, dtype=dtype or _DTYPES[norm.dtype], device=device)
    for rows, code, scale in zip(whole.split(4096), codes.split(4096), scales.split(4096), strict=True):
        rows.copy_(unpack(code, scale, how.vocabulary_bits, size[1]))
    return whole


def _stored(
    infos: Mapping[str, TensorInfo], name: str, bits: int, block_size: int, size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    blocks = -(-size[1] // block_size)
    codes = _tensor(infos, name, (size[0], blocks, block_size * bits // 8), device)
    return codes, _tensor(infos, scales_name(name), (size[0], blocks), device)


def _tensor(infos: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    info: Any = infos.get(name)
    if info is None:
        raise CheckpointError(f"the folder with packed weights lacks the tensor {name}; quantize the model again")
    if info.shape != shape or info.dtype not in _DTYPES:
        raise CheckpointError(
            f"{info.path}: tensor {info.name} is {info.dtype} {list(info.shape)}, config.json makes it {list(shape)}"
        )
    return torch.from_numpy(np.array(info.map())).view(_DTYPES[info.dtype]).view(shape).to(device)
