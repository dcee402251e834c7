"""Where the bytes of a new checkpoint's tensors come from: copied, computed from a row, constant, or drawn.

A recipe is data (`adapt.plan` makes a table of them); `producer` turns one into a function that yields the bytes in
pieces when the tensor's turn to be written comes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from encore.checkpoint.folder import TensorInfo
from encore.checkpoint.names import is_picture_part
from encore.checkpoint.pretrained import DTYPES, map_tensor, tensor_pieces
from encore.checkpoint.writing import Piece

Side = Literal["encoder", "decoder"]
INIT_STD = 0.02

_PIECE_NUMBERS = 2**22
_PIECE_BYTES = 2**24


@dataclass(frozen=True)
class Copy:
    """The tensor `name` of the source of that side; its first `rows` rows only, if given."""

    side: Side
    name: str
    rows: int | None = None


@dataclass(frozen=True)
class ScaledRow:
    """A row of the encoder source's embedding as it enters the model: times sqrt(d), rounded as the model rounds."""

    row: int


@dataclass(frozen=True)
class Fill:
    """One value everywhere."""

    value: float


@dataclass(frozen=True)
class Draw:
    """Numbers from normal(0, std); the seed of each tensor follows from the run's seed and its name."""

    std: float = INIT_STD


Recipe = Copy | ScaledRow | Fill | Draw
"""Where a tensor comes from."""


def random_recipe(name: str) -> Recipe:
    """Gemma's initialisation: RMSNorm scales are 1 + w, so w = 0; the tower's LayerNorms scale by 1."""
    leaf = name.rsplit(".", 2)[-2]
    if is_picture_part(name) and leaf in ("layer_norm1", "layer_norm2", "post_layernorm"):
        return Fill(1.0 if name.endswith(".weight") else 0.0)
    if leaf.endswith("norm") or name.endswith((".bias", "eoi_embedding")):
        return Fill(0.0)
    return Draw()


def producer(
    recipe: Recipe,
    stored: Mapping[Side, Mapping[str, TensorInfo]],
    shape: tuple[int, ...],
    dtype: str,
    seed: str,
) -> Callable[[], Iterable[Piece]]:
    """A function that yields the bytes of one tensor."""
    if isinstance(recipe, Copy):
        info = stored[recipe.side][recipe.name]
        cut = info.shape if recipe.rows is None else (recipe.rows, *info.shape[1:])
        assert cut == shape, f"{recipe.name} has shape {info.shape}, the target {shape}"
        return lambda: _mapped_pieces(info, cut)
    if isinstance(recipe, ScaledRow):
        table = stored["encoder"]["embed_tokens.weight"]
        factor = torch.tensor(shape[0] ** 0.5).to(DTYPES[dtype])
        return lambda: tensor_pieces(map_tensor(table)[recipe.row] * factor)
    if isinstance(recipe, Fill):
        return lambda: tensor_pieces(torch.full(shape, recipe.value, dtype=DTYPES[dtype]))
    return lambda: _drawn_pieces(recipe, math.prod(shape), dtype, seed)


def _mapped_pieces(info: TensorInfo, shape: tuple[int, ...]) -> Iterator[Piece]:
    data = info.map()
    end = math.prod(shape) * DTYPES[info.dtype].itemsize
    for start in range(0, end, _PIECE_BYTES):
        yield data[start : min(start + _PIECE_BYTES, end)]


def _drawn_pieces(recipe: Draw, count: int, dtype: str, seed: str) -> Iterator[Piece]:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    for start in range(0, count, _PIECE_NUMBERS):
        numbers = torch.empty(min(_PIECE_NUMBERS, count - start)).normal_(0.0, recipe.std, generator=generator)
        yield from tensor_pieces(numbers.to(DTYPES[dtype]))
