"""How keys and values are kept in a cache, and attention over what is kept: float32, or int8.

int8: every key and every value of a head has a scale of its own, largest magnitude / 127, and is rounded to nearest.
Products stay in integers, so a cache is read once and as int8. What they are multiplied with is split in two numbers of
6 or 7 bits (a coarse one, and the rest at a finer scale), so that it adds no error worth naming beside the cache's own:

    scores     keys (L, E), 128 + int8, x [coarse | fine] queries (E, 2M) in -63 … 63
    results    [coarse | fine] weights (2M, L) in 0 … 127, the values' scales multiplied in first, x values (L, E) int8

The left factor is unsigned because ONNX Runtime's signed one is two to five times slower where AVX-512 VNNI is.

The narrower range keeps pairs of products below 2^15, which processors without VNNI add up in 16 bits, and sums over
131,072 slots below 2^31.

float32 values of a single key head lie in columns of VALUE_WIDTH, as if each were a head of its own. ONNX Runtime
copies what it multiplies by such columns; where other work keeps the memory busy, to gather them from whole rows, a
kilobyte apart, takes half as long again (a step of 270M-270M at 512 source tokens: 15.2 ms, and 14.3 in columns; on a
quiet machine 11.9 both ways).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from encore.export.manifest import CacheKind

if TYPE_CHECKING:
    from encore.export.graph import LayerGraph

FLOAT, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8

LARGEST, QUERY_LEVELS, WEIGHT_LEVELS, ZERO = 127.0, 63.0, 127.0, 128.0
_TINY = 1e-20

VALUE_WIDTH = 16

Kept = dict[str, str]
"""Name of a part of the cache -> name of its value in a graph."""


@dataclass(frozen=True)
class Part:
    """(B, heads, slots, width) of a kind; new ones are written where the graph's input `slots` + kind of layer says."""

    kind: int
    heads: int
    width: int
    slots: str = "slots_"


class KeptKeys:
    """The parts of a cache, what is written to them, and what is read from them, in the nodes of one graph."""

    def __init__(self, graph: LayerGraph, cache: CacheKind) -> None:
        self.graph, self.int8 = graph, cache == "int8"
        heads, size = graph.stack.num_key_value_heads, graph.stack.head_dim
        if self.int8:
            self.parts = {"keys": Part(UINT8, heads, size), "values": Part(INT8, heads, size)}
            self.parts |= {"key_scales": Part(FLOAT, heads, 1), "value_scales": Part(FLOAT, heads, 1)}
            return
        self.parts = {"keys": Part(FLOAT, heads, size), "values": Part(FLOAT, heads, size)}
        if self.in_columns:
            self.parts["values"] = Part(FLOAT, size // VALUE_WIDTH, VALUE_WIDTH, "value_slots_")

    @property
    def in_columns(self) -> bool:
        stack = self.graph.stack
        return not self.int8 and stack.num_key_value_heads == 1 and stack.head_dim % VALUE_WIDTH == 0

    def packed(self, keys: str, values: str) -> Kept:
        """What is kept of keys and values (…, E), each part (…, its width): values come in the width of their part."""
        if not self.int8:
            return {"keys": keys, "values": values}
        key_scales, value_scales = self._scale(keys, LARGEST), self._scale(values, LARGEST)
        levels = self.graph.node("Add", self._levels(keys, key_scales), self.graph.constant(ZERO))
        return {
            "keys": self.graph.node("Cast", levels, to=UINT8),
            "values": self.graph.node("Cast", self._levels(values, value_scales), to=INT8),
            "key_scales": key_scales,
            "value_scales": value_scales,
        }

    def attend(self, q: str, kept: Kept, hidden: str) -> str:
        """Queries (B, K, M, E) over kept (B, K, L, E) -> (B, K, M, E); (B, M, columns, width) of values in columns."""
        graph, cap = self.graph, self.graph.stack.attn_logit_softcapping
        scores = self._scores(q, kept) if self.int8 else graph.fused_product(q, kept["keys"], graph.attention_scale)
        scores = graph.softcapped(scores, None if cap is None else graph.constant(cap))
        weights = graph.node("Softmax", graph.node("Add", scores, hidden), axis=-1)
        if self.int8:
            return self._results(weights, kept)
        out = graph.node("MatMul", weights, kept["values"])
        return graph.node("Transpose", out, perm=[0, 2, 1, 3]) if self.in_columns else out

    def _scores(self, q: str, kept: Kept) -> str:
        graph = self.graph
        scale = self._scale(q, QUERY_LEVELS)
        steps = graph.node("Div", q, scale)
        coarse = graph.node("Round", steps)
        rest = graph.node("Mul", graph.node("Sub", steps, coarse), graph.constant(2 * QUERY_LEVELS))
        both = graph.node("Concat", coarse, graph.node("Round", rest), axis=2)
        both = graph.node("Transpose", graph.node("Cast", both, to=INT8), perm=[0, 1, 3, 2])
        zero = graph.constant(int(ZERO), np.uint8)
        products = graph.node("Cast", graph.node("MatMulInteger", kept["keys"], both, zero), to=FLOAT)  # (B, K, L, 2M)
        products = graph.node("Transpose", products, perm=[0, 1, 3, 2])
        scores = self._joined(products, 0.5 / QUERY_LEVELS)
        scores = graph.node("Mul", scores, graph.node("Mul", scale, graph.constant(graph.attention_scale)))
        return graph.node("Mul", scores, graph.node("Reshape", kept["key_scales"], graph.integers(0, 0, 1, -1)))

    def _results(self, weights: str, kept: Kept) -> str:
        graph = self.graph
        value_scales = graph.node("Reshape", kept["value_scales"], graph.integers(0, 0, 1, -1))
        scaled = graph.node("Mul", weights, value_scales)
        scale = self._scale(scaled, WEIGHT_LEVELS, magnitude=False)
        steps = graph.node("Div", scaled, scale)
        coarse = graph.node("Floor", steps)
        rest = graph.node("Mul", graph.node("Sub", steps, coarse), graph.constant(WEIGHT_LEVELS))
        both = graph.node("Concat", coarse, graph.node("Round", rest), axis=2)
        both = graph.node("Cast", both, to=UINT8)
        products = graph.node("Cast", graph.node("MatMulInteger", both, kept["values"]), to=FLOAT)  # (B, K, 2M, E)
        return graph.node("Mul", self._joined(products, 1 / WEIGHT_LEVELS), scale)

    def _joined(self, products: str, fine: float) -> str:
        """Coarse + fine, which are above each other."""
        graph = self.graph
        first, second = graph.nodes_of("Split", [products], 2, axis=2, num_outputs=2)
        return graph.node("Add", first, graph.node("Mul", second, graph.constant(fine)))

    def _scale(self, x: str, levels: float, *, magnitude: bool = True) -> str:
        """What a step is worth when the largest of the last axis is to be `levels` of them."""
        graph = self.graph
        largest = graph.node("ReduceMax", graph.node("Abs", x) if magnitude else x, graph.integers(-1))
        return graph.node("Max", graph.node("Mul", largest, graph.constant(1 / levels)), graph.constant(_TINY))

    def _levels(self, x: str, scale: str) -> str:
        return self.graph.node("Round", self.graph.node("Div", x, scale))
