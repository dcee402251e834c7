"""memory.onnx and step.onnx: what decoding needs.

    memory.onnx   states (B, S, D) -> for every decoder layer the keys (normed, not rotated) and values (B, K, S, E)
    step.onnx     one target id per row -> logits (B, 1, V); keys and values written into the caches in place

A cache of T5Gemma 2 holds the memory in front and the target behind it, row by row without gaps:

    slot   0 … m_b - 1     m_b … m_b + t
           memory          target so far, rotated, the new token last

GroupQueryAttention writes the new key into slot `seen_*`[b] (= m_b + t on a global layer) and reads slots 0 to there,
so rows of different lengths need no mask. Order does not matter to attention: on a local layer the caller moves the
newest token over the one that leaves the window before each step, and the last slot is written again (a ring).
T5Gemma has no memory in front; its cross-attention reads the memory apart, under its soft-cap.
"""

from __future__ import annotations

from dataclasses import dataclass

from encore.config import LayerType, T5GemmaConfig
from encore.export.encoder import short
from encore.export.graph import FLOAT, INT32, INT64, OURS, LayerGraph
from encore.export.manifest import Activations
from encore.export.weights import Matrix, WeightsFile

KEY_NORM = "k_norm"


@dataclass(frozen=True)
class MemoryReader:
    """What reads the memory in one layer: the rows of keys and values of its matrix."""

    layer: str
    attention: str
    keys_values: Matrix


class StepGraph(LayerGraph):
    def __init__(self, config: T5GemmaConfig, file: WeightsFile, bits: int | None, activations: Activations) -> None:
        super().__init__("step", activations, config.decoder, "decoder.", file, bits)
        self.config = config
        self.merged = config.model_type == "t5gemma2"
        self.readers: list[MemoryReader] = []

    def build(self, table: Matrix) -> None:
        """`table`: the vocabulary's matrix, embedding and head."""
        stack, config = self.stack, self.config
        tokens = self.input("tokens", INT64, ["B", 1])
        self.input("positions", INT64, ["B", 1])
        for kind in dict.fromkeys(stack.layer_types):
            self.input(f"seen_{short(kind)}", INT32, ["B"])
            self.input(f"total_{short(kind)}", INT32, [])
            for part in ("cos", "sin"):
                self.input(f"{part}_{short(kind)}", FLOAT, ["P", stack.head_dim // 2])
        if not self.merged:
            self.input("hidden", FLOAT, ["B", 1, 1, "S"])
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
        logits = self.linear(h, table)
        cap = config.final_logit_softcapping
        logits = self.softcapped(logits, None if cap is None else self.constant(cap))
        self.node("Identity", logits, output="logits")
        self.output("logits", FLOAT, ["B", 1, table.num_rows])

    def _self_attention(self, h: str, i: int, kind: LayerType) -> str:
        """Over the cache of the layer, which the node appends to."""
        stack, layer, name = self.stack, f"layers.{i}.", short(kind)
        sizes = {"q_proj": self.query_size, "k_proj": self.key_size, "v_proj": self.key_size}
        matrix = self.matrix(f"{layer}self_attn.", stack.hidden_size, **sizes)
        if self.merged:
            rows = matrix.rows(self.query_size, matrix.num_rows)
            self.readers.append(MemoryReader(layer, "self_attn", rows))
        q, k, v = self.split(self.linear(h, matrix), *sizes.values())
        q, k = self.head_norm(q, layer, "self_attn.q_norm"), self.head_norm(k, layer, "self_attn.k_norm")
        cache = [stack.num_key_value_heads, f"slots_{name}", stack.head_dim]
        past = [self.input(f"past_{part}_{i}", FLOAT, ["B", *cache]) for part in ("keys", "values")]
        new = [self.output(f"new_{part}_{i}", FLOAT, ["B", *cache]) for part in ("keys", "values")]
        inputs = [q, k, v, *past, f"seen_{name}", f"total_{name}", f"cos_{name}", f"sin_{name}", "positions"]
        out = self.nodes_of(
            "GroupQueryAttention",
            inputs,
            [f"attention_{i}", *new],
            OURS,
            num_heads=stack.num_attention_heads,
            kv_num_heads=stack.num_key_value_heads,
            scale=self.attention_scale,
            softcap=stack.attn_logit_softcapping or 0.0,
            do_rotary=1,
        )[0]
        return self.linear(out, self.matrix(f"{layer}self_attn.", self.query_size, o_proj=stack.hidden_size))

    def _cross_attention(self, h: str, i: int) -> str:
        """Over the memory's keys and values, which lie in buffers of their own."""
        stack, layer = self.stack, f"layers.{i}."
        q = self.linear(h, self.matrix(f"{layer}cross_attn.", stack.hidden_size, q_proj=self.query_size))
        matrix = self.matrix(
            f"{layer}cross_attn.", self.config.encoder.hidden_size, k_proj=self.key_size, v_proj=self.key_size
        )
        self.readers.append(MemoryReader(layer, "cross_attn", matrix))
        heads = [stack.num_key_value_heads, self.groups, stack.head_dim]
        q = self.node("Reshape", self.head_norm(q, layer, "cross_attn.q_norm"), self.integers(0, *heads))
        shape = ["B", stack.num_key_value_heads, "S", stack.head_dim]
        keys, values = (self.input(f"memory_{part}_{i}", FLOAT, shape) for part in ("keys", "values"))
        scores = self.node("FusedMatMul", q, keys, domain=OURS, transB=1, alpha=self.attention_scale)
        cap = stack.attn_logit_softcapping
        scores = self.softcapped(scores, None if cap is None else self.constant(cap))
        weights = self.node("Softmax", self.node("Add", scores, "hidden"), axis=-1)
        out = self.node("Reshape", self.node("MatMul", weights, values), self.integers(0, 1, self.query_size))
        return self.linear(out, self.matrix(f"{layer}cross_attn.", self.query_size, o_proj=stack.hidden_size))


class MemoryGraph(LayerGraph):
    """Its matrices are those of the step graph, read where they lie in the weights file."""

    def __init__(self, step: StepGraph, activations: Activations) -> None:
        super().__init__("memory", activations, step.stack, "decoder.", step.file, step.bits)
        self.readers, self.source_size = step.readers, step.config.encoder.hidden_size

    def build(self) -> None:
        stack = self.stack
        states = self.input("states", FLOAT, ["B", "S", self.source_size])
        shape = self.integers(0, 0, stack.num_key_value_heads, stack.head_dim)
        for i, reader in enumerate(self.readers):
            k, v = self.split(self.linear(states, reader.keys_values), self.key_size, self.key_size)
            k = self.head_norm(k, reader.layer, f"{reader.attention}.{KEY_NORM}")
            for part, value in (("keys", k), ("values", v)):
                heads = self.node("Reshape", value, shape)
                self.node("Transpose", heads, perm=[0, 2, 1, 3], output=f"memory_{part}_{i}")
                sizes = ["B", stack.num_key_value_heads, "S", stack.head_dim]
                self.output(f"memory_{part}_{i}", FLOAT, sizes)
