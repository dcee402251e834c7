"""memory.onnx and step.onnx: what decoding needs.

    memory.onnx   states (B, S, D) -> for every decoder layer the keys (normed, not rotated) and values (B, K, S, E)
    step.onnx     T >= 1 target ids per row -> logits (B, T, V); keys and values written into the caches in place;
                  where `summed` is true also log_sums (B, T), the logarithm of their summed exponentials, else NaN

An int8 head of a large vocabulary is most of what a step of a small model reads. It may go in two passes: products with
the upper four bits of every weight, then what the lower four add for the CANDIDATES best words and for the ids in

    wanted     (B, T, W)      say the tokens that are scored

so those have the logits of int8, and all others about those of int4. Or the first pass is over a narrow view of the
head (`preview.py`), and the second over the rows of the best. Without a soft-cap on the logits

    first_logits (B, T, V)    those of the first pass, is an output to be bound where `logits` is, which it then becomes

The caller decides what lies where, so order, rings, unequal rows and forgotten tokens are its business alone
(`generate/onnx_cache.py`). For every kind of layer it gives

    slots_*    (B, K, T, 3)   row, head and slot that each new key and value is written to, before anything is read
    value_slots_* (B, C, T, 3)    the same for values that lie in C columns (`attention.py`)
    hidden_*   (B, 1, Q, L)   what is added to the scores of L slots: 0, or -1e30 for what a query must not see;
                              Q = 1 (one token) or T x G, token by token, for the G query heads that share a key

A cache of T5Gemma 2 holds the memory and the target of a row, so one softmax goes over both. T5Gemma reads the memory
apart, by cross-attention under its soft-cap. The G heads of a key are rows of one product: keys are read once. What is
kept of them, float32 or int8, is told in `attention.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import helper, numpy_helper

from encore.config import LayerType, T5GemmaConfig
from encore.export.attention import Kept, KeptKeys
from encore.export.encoder import short
from encore.export.graph import BOOL, FLOAT, INT64, OURS, LayerGraph, value
from encore.export.manifest import CANDIDATES, Activations, CacheKind
from encore.export.preview import CANDIDATES as VIEW_CANDIDATES
from encore.export.preview import View
from encore.export.weights import Matrix, WeightsFile

KEY_NORM = "k_norm"

GROUP = 64
"""Words of the vocabulary whose greatest logit stands for them when the best are sought."""

PIECES = 64
"""How many parts of the vocabulary the exponentials are summed in, at most."""

NOT_SUMMED = numpy_helper.from_array(np.array([np.nan], np.float32))


@dataclass(frozen=True)
class MemoryReader:
    """What reads the memory in one layer: the rows of keys and values of its matrix."""

    layer: str
    attention: str
    keys_values: Matrix


class StepGraph(LayerGraph):
    def __init__(
        self,
        config: T5GemmaConfig,
        file: WeightsFile,
        bits: int | None,
        activations: Activations,
        cache: CacheKind = "float32",
    ) -> None:
        super().__init__("step", activations, config.decoder, "decoder.", file, bits)
        self.config = config
        self.cache: CacheKind = cache
        self.kept = KeptKeys(self, cache)
        self.merged = config.model_type == "t5gemma2"
        self.readers: list[MemoryReader] = []
        self._once: dict[str, str] = {}
        """Values that all layers share, by what they are."""

    def build(self, table: Matrix, view: View | None = None) -> None:
        """`table`: the vocabulary's matrix, embedding and head, which may have a view."""
        stack, config = self.stack, self.config
        tokens = self.input("tokens", INT64, ["B", "T"])
        self.input("positions", INT64, ["B", "T"])
        for kind in dict.fromkeys(stack.layer_types):
            self.input(f"slots_{short(kind)}", INT64, ["B", stack.num_key_value_heads, "T", 3])
            if self.kept.in_columns:
                self.input(f"value_slots_{short(kind)}", INT64, ["B", self.kept.parts["values"].heads, "T", 3])
            self.input(f"hidden_{short(kind)}", FLOAT, ["B", 1, "Q", f"L_{short(kind)}"])
            for part in ("cos", "sin"):
                self.input(f"{part}_{short(kind)}", FLOAT, ["P", stack.head_dim // 2])
        if not self.merged:
            self.input("hidden_memory", FLOAT, ["B", 1, 1, "S"])
        vector = None
        if self.merged:
            name = "encoder.embed_tokens.eoi_embedding"
            vector = config.eoi_token_index, self.stored_weights.vector(name, stack.hidden_size)
        x = self.embedding(table, tokens, vector)
        h = self.norm(x, "layers.0.pre_self_attn_layernorm")
        for i, kind in enumerate(stack.layer_types):
            layer, last = f"layers.{i}.", i + 1 == stack.num_hidden_layers
            part = self.norm(self._self_attention(h, i, kind), f"{layer}post_self_attn_layernorm")
            if not self.merged:
                h, x = self.add_and_norm(part, x, f"{layer}pre_cross_attn_layernorm")
                part = self.norm(self._cross_attention(h, i), f"{layer}post_cross_attn_layernorm")
            h, x = self.add_and_norm(part, x, f"{layer}pre_feedforward_layernorm")
            following = "norm" if last else f"layers.{i + 1}.pre_self_attn_layernorm"
            h, x = self.add_and_norm(self.feed_forward(h, layer), x, following, "states" if last else None)
        logits = self._logits(h, table, view)
        cap = config.final_logit_softcapping
        self.softcapped(logits, None if cap is None else self.constant(cap))
        self.nodes[-1].output[0] = "logits"
        self.output("logits", FLOAT, ["B", "T", table.num_rows])
        with self.inside("summed") as summed:
            sums = self._log_sums(table.num_rows)
        with self.inside("not_summed") as not_summed:
            nothing = self.node("ConstantOfShape", self.node("Shape", tokens), value=NOT_SUMMED)
        self.node(
            "If",
            self.input("summed", BOOL, []),
            then_branch=helper.make_graph(summed, "summed", [], [value(sums)]),
            else_branch=helper.make_graph(not_summed, "not_summed", [], [value(nothing)]),
            output=self.output("log_sums", FLOAT, ["B", "T"]),
        )

    def _logits(self, h: str, table: Matrix, view: View | None) -> str:
        first = self.linear(h, table) if view is None else self.linear(self.linear(h, view.directions), view.rows)
        if table.lower is None and view is None:
            return first
        if self.config.final_logit_softcapping is None:  # the caller binds it where the logits go: nothing is copied
            self.nodes[-1].output[0] = first = self.output("first_logits", FLOAT, ["B", "T", table.num_rows])
        best = self._best(first, table.num_rows, CANDIDATES if view is None else VIEW_CANDIDATES)
        ids = self.node("Concat", best, self.input("wanted", INT64, ["B", "T", "W"]), axis=-1)
        rows = self.lower_rows(table, ids) if view is None else self.rows_of(table, ids)
        full = self.node("MatMul", rows, self.node("Unsqueeze", h, self.integers(-1)))
        full = self.node("Squeeze", full, self.integers(-1))
        if view is None:
            full = self.node("Add", self.node("GatherElements", first, ids, axis=-1), full)
        return self.node("ScatterElements", first, ids, full, axis=-1)

    def _best(self, logits: str, vocab_size: int, count: int) -> str:
        """The ids (B, T, count) of the greatest logits, which are in as many groups at most: by their maxima."""

        def top(x: str) -> str:
            return self.nodes_of("TopK", [x, self.integers(count)], 2, axis=-1, sorted=0)[1]

        if vocab_size % GROUP or vocab_size // GROUP <= count:
            return top(logits)
        grouped = self.node("Reshape", logits, self.integers(0, 0, -1, GROUP))
        groups = top(self.node("ReduceMax", grouped, self.integers(-1), keepdims=0))
        first = self.node("Mul", self.node("Unsqueeze", groups, self.integers(-1)), self.integers(GROUP))
        ids = self.node("Add", first, self.integers(*range(GROUP)))
        ids = self.node("Reshape", ids, self.integers(0, 0, -1))
        places = top(self.node("GatherElements", logits, ids, axis=-1))
        return self.node("GatherElements", ids, places, axis=-1)

    def _log_sums(self, vocab_size: int) -> str:
        """Piece by piece, so that threads share the vocabulary of one token.

        LogSoftmax subtracts what is wanted here from every logit, in one pass; the difference at one place tells it.
        """
        logits = self.node("Reshape", "logits", self.integers(0, 0, math.gcd(vocab_size, PIECES), -1))
        first = self.integers(0), self.integers(1), self.integers(-1)
        before, after = (self.node("Slice", x, *first) for x in (logits, self.node("LogSoftmax", logits, axis=-1)))
        sums = self.node("Sub", before, after)
        return self.node("ReduceLogSumExp", sums, self.integers(2, 3), keepdims=0)

    def _self_attention(self, h: str, i: int, kind: LayerType) -> str:
        """Over the cache of the layer, which the new keys and values are written to first."""
        stack, layer, name = self.stack, f"layers.{i}.", short(kind)
        sizes = {"q_proj": self.query_size, "k_proj": self.key_size, "v_proj": self.key_size}
        matrix = self.matrix(f"{layer}self_attn.", stack.hidden_size, **sizes)
        if self.merged:
            rows = matrix.rows(self.query_size, matrix.num_rows)
            self.readers.append(MemoryReader(layer, "self_attn", rows))
        q, k, v = self.split(self.linear(h, matrix), *sizes.values())
        q = self.head_norm(self._queries(q), layer, "self_attn.q_norm")
        q = self._rotated(q, stack.num_attention_heads, kind)
        k = self.head_norm(self._rows(k, stack.head_dim), layer, "self_attn.k_norm")
        k = self._rotated(k, stack.num_key_value_heads, kind)
        new = self.kept.packed(k, self._rows(v, self.kept.parts["values"].width))
        for label, part in self.kept.parts.items():
            shape = ["B", part.heads, f"L_{name}", part.width]
            past = self.input(f"past_{label}_{i}", part.kind, shape)
            written = self.output(f"new_{label}_{i}", part.kind, shape)
            slots = self._slots(part.slots + name, part.heads)
            new[label] = self.node("ScatterND", past, slots, new[label], output=written)
        out = self._attend(q, new, f"hidden_{name}")
        return self.linear(out, self.matrix(f"{layer}self_attn.", self.query_size, o_proj=stack.hidden_size))

    def _cross_attention(self, h: str, i: int) -> str:
        """Over the memory's keys and values, which lie in buffers of their own."""
        stack, layer = self.stack, f"layers.{i}."
        q = self.linear(h, self.matrix(f"{layer}cross_attn.", stack.hidden_size, q_proj=self.query_size))
        matrix = self.matrix(
            f"{layer}cross_attn.", self.config.encoder.hidden_size, k_proj=self.key_size, v_proj=self.key_size
        )
        self.readers.append(MemoryReader(layer, "cross_attn", matrix))
        kept = {
            label: self.input(f"memory_{label}_{i}", part.kind, ["B", part.heads, "S", part.width])
            for label, part in self.kept.parts.items()
        }
        out = self._attend(self.head_norm(self._queries(q), layer, "cross_attn.q_norm"), kept, "hidden_memory")
        return self.linear(out, self.matrix(f"{layer}cross_attn.", self.query_size, o_proj=stack.hidden_size))

    def _queries(self, q: str) -> str:
        """(B, T, H x E) -> (B, 1, T x H, E)."""
        return self.node("Reshape", q, self.integers(0, 1, -1, self.stack.head_dim))

    def _rows(self, x: str, width: int) -> str:
        """(B, T, N x width) -> (B, T x N, width)."""
        return x if width == self.key_size else self.node("Reshape", x, self.integers(0, -1, width))

    def _rotated(self, x: str, heads: int, kind: LayerType) -> str:
        """Rows (…, T x heads, E), each a head of a token, turned to the token's position."""
        name, once = short(kind), f"positions of {heads}"
        if heads > 1 and once not in self._once:
            positions = self.node("Unsqueeze", "positions", self.integers(2))
            positions = self.node("Tile", positions, self.integers(1, 1, heads))
            self._once[once] = self.node("Reshape", positions, self.integers(0, -1))
        rotation = [self._once.get(once, "positions"), f"cos_{name}", f"sin_{name}"]
        return self.node("RotaryEmbedding", x, *rotation, domain=OURS)

    def _slots(self, name: str, heads: int) -> str:
        """The slots (B, heads, T, 3) of an input, in the order of `_rows`: (B, T x heads, 3)."""
        if name not in self._once:
            slots = self.node("Transpose", name, perm=[0, 2, 1, 3]) if heads > 1 else name
            self._once[name] = self.node("Reshape", slots, self.integers(0, -1, 3))
        return self._once[name]

    def _attend(self, q: str, kept: Kept, hidden: str) -> str:
        """Queries (B, 1, T x H, E) over slots (B, K, L, E) -> (B, T, H x E)."""
        stack = self.stack
        kv_heads, size = stack.num_key_value_heads, stack.head_dim
        if kv_heads > 1:  # the queries of each key head, token by token
            q = self.node("Reshape", q, self.integers(0, -1, kv_heads, self.groups, size))
            q = self.node("Transpose", q, perm=[0, 2, 1, 3, 4])
            q = self.node("Reshape", q, self.integers(0, 0, -1, size))
        out = self.kept.attend(q, kept, hidden)
        if kv_heads > 1:
            out = self.node("Reshape", out, self.integers(0, kv_heads, -1, self.groups, size))
            out = self.node("Transpose", out, perm=[0, 2, 1, 3, 4])
        return self.node("Reshape", out, self.integers(0, -1, self.query_size))


class MemoryGraph(LayerGraph):
    """Its matrices are those of the step graph, read where they lie in the weights file."""

    def __init__(self, step: StepGraph, activations: Activations) -> None:
        super().__init__("memory", activations, step.stack, "decoder.", step.file, step.bits)
        self.readers, self.source_size = step.readers, step.config.encoder.hidden_size
        self.kept = KeptKeys(self, step.cache)

    def build(self) -> None:
        stack = self.stack
        states = self.input("states", FLOAT, ["B", "S", self.source_size])
        for i, reader in enumerate(self.readers):
            k, v = self.split(self.linear(states, reader.keys_values), self.key_size, self.key_size)
            k = self.norm_by_head(k, stack.num_key_value_heads, reader.layer, f"{reader.attention}.{KEY_NORM}")
            parts = self.kept.parts
            packed = self.kept.packed(self._by_head(k, stack.head_dim), self._by_head(v, parts["values"].width))
            for label, part in parts.items():
                self.node("Identity", packed[label], output=f"memory_{label}_{i}")
                self.output(f"memory_{label}_{i}", part.kind, ["B", part.heads, "S", part.width])

    def _by_head(self, x: str, width: int) -> str:
        """(B, S, N x width) -> (B, N, S, width)."""
        return self.node("Transpose", self.node("Reshape", x, self.integers(0, 0, -1, width)), perm=[0, 2, 1, 3])
