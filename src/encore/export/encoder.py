"""encoder.onnx: source ids to states, at any source length, with nothing of size S x S in memory and no padding.

The sources of a batch lie one after the other, T tokens in all, and share the products. What would need much memory
goes block by block through a Loop; the caller says what the blocks are (`generate/onnx_inputs.py`):

    local layer     a row of `local_blocks` says which tokens ask and which are asked; `local_window` (C, 1, J) hides
                    what lies outside a query's window: the same for every block, since a window moves with its queries
    global layer    `global_blocks` likewise, without a mask: a source sees itself, and nothing else
    feed-forward    some tokens at a time (`token_blocks`)

The G query heads of a key head are rows of one product, and key heads lie below one another, as further tokens. Global
layers without a soft-cap are ONNX Runtime's fused attention (FlashAttention, Dao et al. 2022: scores in tiles that stay
in the cache). Equations: T5Gemma paper, section 2; T5Gemma 2 paper, section 2.

With activations "int8-rows" each row of a matrix and each token have one scale, so a product is one of integers
(LLM.int8(), Dettmers et al. 2022, section 2.1: without its columns of outliers). Such products take a third of
the time of those in blocks with scales of their own, whatever their bits, because processors multiply int8 four times
as fast as float32 as long as nothing lies between two sums. The scores of queries and keys that are normed are such
products too (SageAttention, Zhang et al. 2025, section 4: a scale for each key and for each block of queries, while
weights and values stay float32), and global layers go tile by tile in this graph (`_by_tiles`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from encore.config import LayerType, T5GemmaConfig
from encore.export.graph import BOOL, FLOAT, INT8, INT64, OURS, LayerGraph, value
from encore.export.manifest import Activations
from encore.export.weights import ROW_LEVELS, Matrix, WeightsFile

LARGEST_SCORE = 75.0
"""Exponentials of scores up to here, and sums of a million of them, are float32 numbers."""

TILE = 512
"""Rows of queries, and keys, of a tile of scores at most."""

PLACES = {"local": (1, 1, 1, 1, 2, 2), "global": (1, 1, 1, 1)}
"""The parts of a block's row: first query, their end, first key, their end; where its part of `local_window` (rows,
columns) begins, and where it ends."""


@dataclass(frozen=True)
class Seen:
    """What a block of queries sees: slices of a layer's keys and values, made where they are read."""

    graph: LayerGraph
    all_keys: str
    all_values: str
    integers: tuple[str, str, str] | None
    start: str
    end: str

    def keys(self) -> str:
        return self._slice(self.all_keys)

    def values(self) -> str:
        return self._slice(self.all_values)

    def key_columns(self) -> str:
        assert self.integers is not None
        return self._slice(self.integers[0], axis=1)

    def key_scales(self) -> str:
        assert self.integers is not None
        return self._slice(self.integers[1])

    def _slice(self, x: str, axis: int = 0) -> str:
        return self.graph.node("Slice", x, self.start, self.end, self.graph.integers(axis))


class EncoderGraph(LayerGraph):
    def __init__(self, config: T5GemmaConfig, file: WeightsFile, bits: int | None, activations: Activations) -> None:
        super().__init__("encoder", activations, config.encoder, "encoder.", file, bits)
        self.config = config
        self.by_rows = activations == "int8-rows" and bits is not None
        self.scores_of_integers = self.by_rows and self.stack.qk_norm and self.stack.attn_logit_softcapping is None

    def build(self, table: Matrix) -> None:
        """`table`: the embedding that the encoder reads."""
        stack = self.stack
        tokens = self.input("tokens", INT64, [1, "T"])
        self.input("token_blocks", INT64, ["N", 2])
        for name in dict.fromkeys(map(short, stack.layer_types)):
            for part in ("cos", "sin"):
                self.input(f"{part}_{name}", FLOAT, ["T", stack.head_dim // 2])
            self.input(f"{name}_blocks", INT64, [f"N_{name}", sum(PLACES[name])])
            if name == "local":
                self.input("local_window", FLOAT, ["C", 1, "J"])
        vector = None
        if self.config.model_type == "t5gemma2":
            name = "encoder.embed_tokens.eoi_embedding"
            vector = self.config.eoi_token_index, self.stored_weights.vector(name, stack.hidden_size)
        self.node("SequenceEmpty", output="no_blocks")
        x = self.embedding(table, tokens, vector)
        h = self.norm(x, "layers.0.pre_self_attn_layernorm")
        for i, kind in enumerate(stack.layer_types):
            layer, last = f"layers.{i}.", i + 1 == stack.num_hidden_layers
            part = self.norm(self._attention(h, layer, short(kind)), f"{layer}post_self_attn_layernorm")
            h, x = self.add_and_norm(part, x, f"{layer}pre_feedforward_layernorm")
            following = "norm" if last else f"layers.{i + 1}.pre_self_attn_layernorm"
            part = self.feed_forward(h, layer)
            h, x = self.add_and_norm(part, x, following, "states" if last else None)
        self.output("states", FLOAT, [1, "T", stack.hidden_size])

    # --- products

    def products(self, x: str, layer: str, columns: int, **rows: int) -> list[str]:
        """x times each of some matrices (leaf name -> rows) of a layer: apart, since to split one result copies it."""
        if self.by_rows:
            levels, scale = self._levels(x, columns)
            return [self.node("Mul", part, scale) for part in self._integer_products(levels, layer, columns, **rows)]
        matrix, ends = self.matrix(layer, columns, **rows), np.cumsum(list(rows.values())).tolist()
        return [self.linear(x, matrix.rows(end - n, end)) for n, end in zip(rows.values(), ends, strict=True)]

    def _levels(self, x: str, size: int, levels: int = 127, zero: str = "") -> tuple[str, str]:
        """x (1, T, size) rounded to zero (128) + -levels … levels, and what a level is worth for each token."""
        largest, smallest = (self.node(kind, x, self.integers(-1)) for kind in ("ReduceMax", "ReduceMin"))
        largest = self.node("Max", largest, self.node("Neg", smallest), self.constant(levels * 1e-20))
        scale = self.node("Mul", largest, self.constant(1 / levels))
        zeros = self.node("Expand", zero or self.constant(128, np.uint8), self.node("Shape", scale))
        return self.node("QuantizeLinear", x, scale, zeros, axis=2, block_size=size), scale

    def _integer_products(self, levels: str, layer: str, columns: int, **rows: int) -> list[str]:
        """Products with the matrices' scales in them, but not yet those of the tokens."""
        found: list[str] = []
        for part in rows.items():
            matrix = self.file.matrix_by_rows(self.parts(layer, dict([part])), columns)
            weight = self.stored(f"{matrix.name}.rows", matrix.values, INT8, (columns, matrix.num_rows))
            scales = self.stored(f"{matrix.name}.row_scales", matrix.scales, FLOAT, (matrix.num_rows,))
            inputs = [levels, weight, self.constant(1), scales, self.constant(128, np.uint8)]
            found.append(self.node("MatMulIntegerToFloat", *inputs, domain=OURS))
        return found

    def feed_forward(self, x: str, layer: str) -> str:
        """Some tokens at a time, so that what lies between the products stays in the cache."""

        def part(places: str) -> str:
            start, end = self.nodes_of("Split", [places, self.integers(1, 1)], 2, axis=0)
            return self._feed_forward(self.node("Slice", x, start, end, self.integers(1)), f"{layer}mlp.")

        x = self._in_blocks("token_blocks", f"{layer}mlp", part, axis=1)
        return self.norm(x, f"{layer}post_feedforward_layernorm")

    def _feed_forward(self, x: str, layer: str) -> str:
        hidden, inner = self.stack.hidden_size, self.stack.intermediate_size
        if not self.by_rows:
            gate, up = self.products(x, layer, hidden, gate_proj=inner, up_proj=inner)
            x = self.node("Mul", self.node("FastGelu", gate, domain=OURS), up)
            return self.products(x, layer, inner, down_proj=hidden)[0]
        levels, scale = self._levels(x, hidden)
        gate, up = self._integer_products(levels, layer, hidden, gate_proj=inner, up_proj=inner)
        x = self.node("Mul", self.node("FastGelu", self.node("Mul", gate, scale), domain=OURS), up)
        # The tokens' scales, which `up` lacks, are multiplied in where there are fewest numbers: at the end.
        return self.node("Mul", self.products(x, layer, inner, down_proj=hidden)[0], scale)

    # --- attention

    def _attention(self, h: str, layer: str, kind: str) -> str:
        stack, kv_heads = self.stack, self.stack.num_key_value_heads
        sizes = {"q_proj": self.query_size, "k_proj": self.key_size, "v_proj": self.key_size}
        q, k, v = self.products(h, f"{layer}self_attn.", stack.hidden_size, **sizes)
        q = self._rotated(self.norm_by_head(q, stack.num_attention_heads, layer, "self_attn.q_norm"), kind)
        k = self._rotated(self.norm_by_head(k, stack.num_key_value_heads, layer, "self_attn.k_norm"), kind)
        q = self.node("Reshape", self.by_key_head(q, self.groups), self.integers(-1, self.groups, stack.head_dim))
        keys, values = (self.node("Reshape", self.by_key_head(x), self.integers(-1, stack.head_dim)) for x in (k, v))
        integers = self._integer_keys(keys) if self.scores_of_integers else None

        def part(places: str) -> str:
            parts = self.nodes_of("Split", [places, self.integers(*PLACES[kind])], len(PLACES[kind]), axis=0)
            block = self.node("Slice", q, *parts[:2], self.integers(0))
            seen = Seen(self, keys, values, integers, parts[2], parts[3])
            return self._attend_locally(block, seen, parts[4:]) if parts[4:] else self._attend_globally(block, seen)

        out = self._in_blocks(f"{kind}_blocks", f"{layer}self_attn", part, axis=0)  # (K x T, G, E)
        if kv_heads > 1:
            out = self.node("Reshape", out, self.integers(kv_heads, -1, self.groups, stack.head_dim))
            out = self.node("Transpose", out, perm=[1, 0, 2, 3])
        out = self.node("Reshape", out, self.integers(1, -1, self.query_size))
        return self.products(out, f"{layer}self_attn.", self.query_size, o_proj=stack.hidden_size)[0]

    def _rotated(self, x: str, kind: str) -> str:
        return self.node("RotaryEmbedding", x, self.integers(0), f"cos_{kind}", f"sin_{kind}", domain=OURS)

    def _integer_keys(self, keys: str) -> tuple[str, str, str]:
        """Keys (K x T, E) as columns (E, K x T) in -63 … 63, what a level of each is worth, the norm of the longest."""
        rows = self.node("Unsqueeze", keys, self.integers(0))
        levels, scales = self._levels(rows, self.stack.head_dim, ROW_LEVELS, self.constant(0, np.int8))
        columns = self.node("Transpose", self.node("Squeeze", levels, self.integers(0)), perm=[1, 0])
        return columns, self.node("Reshape", scales, self.integers(-1)), self._longest(keys)

    def _longest(self, x: str) -> str:
        return self.node("ReduceMax", self.node("ReduceL2", x, self.integers(-1)), keepdims=0)

    def _query_levels(self, q: str) -> tuple[str, str]:
        """Queries rounded to 128 + int8, and what a level of all of them is worth in scores."""
        largest = self.node("Max", self.node("ReduceMax", self.node("Abs", q), keepdims=0), self.constant(127 * 1e-20))
        scale = self.node("Mul", largest, self.constant(1 / 127))
        levels = self.node("QuantizeLinear", q, scale, self.constant(128, np.uint8))
        return levels, self.node("Mul", scale, self.constant(self.attention_scale))

    def _integer_scores(self, levels: str, scale: str, keys: str, key_scales: str) -> str:
        zero = self.constant(128, np.uint8)
        return self.node("MatMulIntegerToFloat", levels, keys, scale, key_scales, zero, domain=OURS)

    def _attend_locally(self, q: str, seen: Seen, window: list[str]) -> str:
        """Queries (C, G, E) over what they see -> (C, G, E). `window`: where its part begins, ends."""
        if seen.integers is None:
            scores = self._capped(self.fused_product(q, seen.keys(), self.attention_scale))
        else:
            scores = self._integer_scores(*self._query_levels(q), seen.key_columns(), seen.key_scales())
        scores = self.node("Add", scores, self.node("Slice", "local_window", *window, self.integers(0, 2)))
        return self.node("MatMul", self.node("Softmax", scores, axis=-1), seen.values())

    def _capped(self, scores: str) -> str:
        cap = self.stack.attn_logit_softcapping
        return self.softcapped(scores, None if cap is None else self.constant(cap))

    def _attend_globally(self, q: str, seen: Seen) -> str:
        """Queries (C, G, E) over what they see -> (C, G, E)."""
        if self.stack.attn_logit_softcapping is not None:
            scores = self._capped(self.fused_product(q, seen.keys(), self.attention_scale))
            return self.node("MatMul", self.node("Softmax", scores, axis=-1), seen.values())
        if seen.integers is None:
            return self._fused(q, seen)
        # By Cauchy and Schwarz no score is larger than this.
        bound = self.node("Mul", self._longest(q), seen.integers[2])
        small = self.node("Less", bound, self.constant(LARGEST_SCORE / self.attention_scale))
        tiles, fused = (self._branch(attend, q, seen) for attend in (self._by_tiles, self._fused))
        return self.node("If", small, then_branch=tiles, else_branch=fused)

    def _branch(self, attend: Callable[[str, Seen], str], q: str, seen: Seen) -> onnx.GraphProto:
        with self.inside(attend.__name__.strip("_")) as nodes:
            out = attend(q, seen)
        return helper.make_graph(nodes, attend.__name__, [], [value(out)])

    def _fused(self, q: str, seen: Seen) -> str:
        parts = [
            self.node("Reshape", x, self.integers(1, -1, self.stack.head_dim)) for x in (q, seen.keys(), seen.values())
        ]
        out = self.node("MultiHeadAttention", *parts, domain=OURS, num_heads=1, scale=self.attention_scale)
        return self.node("Reshape", out, self.integers(-1, self.groups, self.stack.head_dim))

    def _by_tiles(self, q: str, seen: Seen) -> str:
        """Sums over tiles of keys of exp(scores), and of exp(scores) x values, for one tile of queries after the other.

        The scores are small enough not to need their maximum subtracted first, which would be further passes over each
        tile. Tiles are equally large; the keys and queries that fill up the last ones count as 0 and are cut off.
        """
        size = self.stack.head_dim
        rows = self.node("Reshape", q, self.integers(-1, size))
        values = seen.values()
        one = self.node(
            "Expand", self.constant(1.0), self.node("Concat", self._length(values), self.integers(1), axis=0)
        )
        columns = self._tiles(seen.key_columns(), 1)  # (E, n, J)
        keys = self.node("Transpose", columns, perm=[1, 0, 2])
        asked = [keys, *(self._tiles(x, 0) for x in (seen.key_scales(), values, one))]
        with self.inside("queries") as of_queries:
            tile = f"{self.prefix}tile"
            levels, scale = self._query_levels(tile)
            zeros = self.node("ConstantOfShape", self.node("Shape", tile))
            zero = self.node("ReduceMax", zeros, self.integers(-1))
            with self.inside("keys") as of_keys:
                found, total, *seen_tile = (f"{self.prefix}{name}" for name in ("found", "total", "k", "s", "v", "one"))
                weights = self.node("Exp", self._integer_scores(levels, scale, *seen_tile[:2]))
                sums = [
                    self.node("Gemm", weights, factor, before)
                    for before, factor in zip((found, total), seen_tile[2:], strict=True)
                ]
            inputs = [value(found), value(total), value(seen_tile[0], INT8), *map(value, seen_tile[1:])]
            body = helper.make_graph(of_keys, "keys", inputs, list(map(value, sums)))
            found, total = self.nodes_of("Scan", [zeros, zero, *asked], 2, body=body, num_scan_inputs=len(asked))
            out = self.node("Div", found, total)
        body = helper.make_graph(of_queries, "queries", [value(tile)], [value(out)])
        out = self.node(
            "Reshape", self.node("Scan", self._tiles(rows, 0), body=body, num_scan_inputs=1), self.integers(-1, size)
        )
        out = self.node("Slice", out, self.integers(0), self._length(rows))
        return self.node("Reshape", out, self.integers(-1, self.groups, size))

    def _length(self, x: str, axis: int = 0) -> str:
        return self.node("Shape", x, start=axis, end=axis + 1)

    def _tiles(self, x: str, axis: int) -> str:
        """`axis` of x, filled up with 0, in equal parts: (…, L, …) -> (…, n, J, …) with J <= TILE."""
        length = self._length(x, axis)
        count = self._parts(length, self.integers(TILE))
        size = self._parts(length, count)
        missing = self.node("Sub", self.node("Mul", count, size), length)
        padded = self.node("Pad", x, self.node("Concat", self.integers(0), missing, axis=0), "", self.integers(axis))
        before = [self._length(x, 0)] if axis else []
        after = self.node("Shape", x, start=axis + 1)
        return self.node("Reshape", padded, self.node("Concat", *before, count, size, after, axis=0))

    def _parts(self, length: str, size: str) -> str:
        """How many parts of a size there are in a length, rounded up."""
        return self.node("Div", self.node("Sub", self.node("Add", length, size), self.integers(1)), size)

    # --- subgraphs

    def _in_blocks(self, table: str, label: str, part: Callable[[str], str], axis: int) -> str:
        """What `part` makes of each row of a table of blocks, one behind the other along `axis`."""
        with self.inside(label) as nodes:
            block, go_on, still, before, after = (
                f"{self.prefix}{name}" for name in ("i", "go_on", "still", "before", "after")
            )
            result = part(self.node("Gather", table, block, axis=0))
            self.node("SequenceInsert", before, result, output=after)
            self.node("Identity", go_on, output=still)
        sequence = helper.make_tensor_sequence_value_info
        inputs = [value(block, INT64, []), value(go_on, BOOL, []), sequence(before, FLOAT, None)]
        outputs = [value(still, BOOL, []), sequence(after, FLOAT, None)]
        body = helper.make_graph(nodes, label, inputs, outputs)
        count = self.node("Squeeze", self.node("Shape", table, end=1))
        return self.node("ConcatFromSequence", self.node("Loop", count, "", "no_blocks", body=body), axis=axis)


def short(kind: LayerType) -> str:
    return "local" if kind == "sliding_attention" else "global"
