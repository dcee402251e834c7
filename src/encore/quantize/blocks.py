"""Numbers <-> packed blocks of int8 or int4. No torch.

A block is 32, 64 or 128 numbers of one row that share a float32 scale:

    w ~ scale * (q - 2^(bits-1)),   q unsigned, two to a byte at 4 bits (the first in the low half)

which is what ONNX Runtime's MatMulNBits and GatherBlockQuantized read. A scale may be negative, since one side has a
level more. `nearest_scales` meets the number of largest magnitude exactly; `searched_scales` tries smaller ones too,
which cut it and serve the others better, and takes the least squared error: worth it at 4 bits.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

SHRINKING = np.linspace(0.6, 1.0, 17, dtype=np.float32)
"""What `searched_scales` multiplies the largest magnitude with."""

FEW = np.array([0.8, 0.9, 1.0], np.float32)
"""The same where nothing is calibrated: on normal numbers the error is within 2 % of that of all."""

_TINY = 1e-30

PackedKind = Literal["int8", "int4", "int8-head-int4"]
PACKED_BITS: dict[PackedKind, tuple[int, int]] = {"int8": (8, 8), "int4": (4, 4), "int8-head-int4": (8, 4)}
"""Bits of the layers' matrices and of the vocabulary's (embedding and head)."""

DEFAULT_BLOCK_SIZE = 128
"""8.25 or 4.25 bits per weight. At 270M, int4 products take a tenth longer in blocks of 64, a quarter longer in 32."""


def in_blocks(weight: Floats, block_size: int) -> Floats:
    """(N, K) -> (N, blocks, block_size); a last block is filled with zeros."""
    missing = -weight.shape[1] % block_size
    if missing:
        weight = np.pad(weight, ((0, 0), (0, missing)))
    return weight.reshape(len(weight), -1, block_size)


def nearest_scales(weight: Floats, bits: int, block_size: int) -> Floats:
    """(N, blocks): largest magnitude / -2^(bits-1), sign included."""
    blocks = in_blocks(weight, block_size)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)[..., 0]
    return np.where(np.abs(largest) < _TINY, np.float32(0), largest / np.float32(-(1 << (bits - 1)))).astype(np.float32)


def searched_scales(
    weight: Floats, bits: int, block_size: int, importance: Floats | None = None, shrinking: Floats = SHRINKING
) -> Floats:
    """(N, blocks): of the nearest scale, both signs, and shrunk ones, that of least squared error.

    `importance` (K,) weighs the squared errors of the columns; None = all alike. `shrinking`: ascending factors to try.
    """
    blocks = in_blocks(weight, block_size)
    weights = np.ones(weight.shape[1], np.float32) if importance is None else importance.astype(np.float32)
    weights = in_blocks(weights[None], block_size)[0]
    best = nearest_scales(weight, bits, block_size)
    widest, least = best.copy(), np.full(best.shape, np.inf, np.float32)
    half = np.float32(1 << (bits - 1))
    for factor in (*shrinking[::-1], *-shrinking[::-1]):
        scales = widest * factor
        inverse = _inverse(scales)
        levels = np.clip(np.rint(blocks * inverse[..., None]), -half, half - 1)
        error = np.einsum("nbk,bk->nb", np.square(levels * scales[..., None] - blocks), weights)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def packed(weight: Floats, scales: Floats, bits: int, block_size: int) -> Codes:
    """The levels nearest to a matrix, packed: (N, blocks, bytes)."""
    half = 1 << (bits - 1)
    levels = np.clip(np.rint(in_blocks(weight, block_size) * _inverse(scales)[..., None]), -half, half - 1)
    return pack((levels + half).astype(np.uint8), bits)


def scales_of(weight: Floats, bits: int, block_size: int) -> Floats:
    """(N, blocks): the scales with which a matrix is rounded to nearest."""
    if bits == 8:
        return nearest_scales(weight, bits, block_size)
    return searched_scales(weight, bits, block_size, shrinking=FEW)


def quantise(weight: Floats, bits: int, block_size: int) -> tuple[Codes, Floats]:
    """A matrix (N, K) rounded to nearest: packed blocks (N, blocks, bytes) and scales (N, blocks)."""
    scales = scales_of(weight, bits, block_size)
    return packed(weight, scales, bits, block_size), scales


def pack(codes: Codes, bits: int) -> Codes:
    """(N, blocks, block_size) of unsigned levels -> (N, blocks, bytes)."""
    return codes if bits == 8 else (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def in_planes(codes: Codes) -> tuple[Codes, Codes]:
    """int8 levels (N, blocks, block_size) as two packed planes of 4 bits, which add up to them:

        q - 128 = 16 (upper - 8) + (lower - 8)

    The upper plane alone is the matrix at 4 bits, with 16 times the scales. It has no room for levels above 119 of 127;
    they become 119, and the error of the whole grows by about a tenth. (The largest number of a block is level -128.)
    """
    shifted = np.minimum(codes, 247) + np.uint8(8)
    return pack(shifted >> np.uint8(4), 4), pack(shifted & np.uint8(15), 4)


def dequantise(codes: Codes, scales: Floats, bits: int, num_columns: int) -> Floats:
    """What the packed blocks stand for, (N, K)."""
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).astype(np.uint8).reshape(*codes.shape[:2], -1)
    numbers = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return numbers.reshape(len(codes), -1)[:, :num_columns]


def _inverse(scales: Floats) -> Floats:
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
