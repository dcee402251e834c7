"""encoder.onnx: source ids to states, at any source length, with nothing of size S x S in memory.

Attention runs over blocks of queries in a Scan, whose body sees one block at a time:

    local layer    block n of C queries sees the J keys at `local_keys[n]`; `local_window` (C, J) is the same for every
                   block, since a window moves with its queries; `local_hidden` hides what lies outside the source
    global layer   a block sees all S keys; `hidden` (B, S) hides the padding

The caller pads S to whole blocks and chooses C: one block for a short source, more for a long one
(`generate/onnx_inputs.py`). Equations: T5Gemma paper, section 2; T5Gemma 2 paper, section 2.
"""

from __future__ import annotations

import onnx
from onnx import helper

from encore.config import LayerType, T5GemmaConfig
from encore.export.graph import FLOAT, INT64, OURS, Graph, LayerGraph
from encore.export.manifest import Activations
from encore.export.weights import Matrix, RowMatrix, WeightsFile


class EncoderGraph(LayerGraph):
    def __init__(self, config: T5GemmaConfig, file: WeightsFile, bits: int | None, activations: Activations) -> None:
        super().__init__("encoder", activations, config.encoder, "encoder.", file, bits)
        self.config = config
        self.by_rows = activations == "int8-rows"

    def build(self, table: Matrix) -> None:
        """`table`: the embedding that the encoder reads."""
        stack = self.stack
        tokens = self.input("tokens", INT64, ["B", "S"])
        kinds: list[LayerType] = list(dict.fromkeys(stack.layer_types))
        for kind in kinds:
            for part in ("cos", "sin"):
                self.input(f"{part}_{short(kind)}", FLOAT, ["S", stack.head_dim // 2])
        if "sliding_attention" in kinds:
            self.input("local_keys", INT64, ["N", "J"])
            self.input("local_window", FLOAT, ["C", "J"])
            self.input("local_hidden", FLOAT, ["N", "B", 1, 1, 1, "J"])
        if "full_attention" in kinds:
            self.input("global_blocks", INT64, [1])
            self.input("hidden", FLOAT, ["B", 1, 1, 1, "S"])
        vector = None
        if self.config.model_type == "t5gemma2":
            name = "encoder.embed_tokens.eoi_embedding"
            vector = self.config.eoi_token_index, self.stored_weights.vector(name, stack.hidden_size)
        x = self.embedding(table, tokens, vector)
        h = self.norm(x, "layers.0.pre_self_attn_layernorm")
        for i, kind in enumerate(stack.layer_types):
            layer, last = f"layers.{i}.", i + 1 == stack.num_hidden_layers
            part = self.norm(self._attention(h, layer, kind), f"{layer}post_self_attn_layernorm")
            h, x = self.add_and_norm(part, x, f"{layer}pre_feedforward_layernorm")
            following = "norm" if last else f"layers.{i + 1}.pre_self_attn_layernorm"
            part = self.feed_forward(h, layer)
            h, x = self.add_and_norm(part, x, following, "states" if last else None)
        self.output("states", FLOAT, ["B", "S", stack.hidden_size])

    def factor(self, layer: str, columns: int, **rows: int) -> Matrix | RowMatrix:
        if self.by_rows:
            return self.file.matrix_by_rows(self.parts(layer, rows), columns)
        return super().factor(layer, columns, **rows)

    def _attention(self, h: str, layer: str, kind: LayerType) -> str:
        stack, kv_heads = self.stack, self.stack.num_key_value_heads
        matrix = self.factor(
            f"{layer}self_attn.",
            stack.hidden_size,
            q_proj=self.query_size,
            k_proj=self.key_size,
            v_proj=self.key_size,
        )
        q, k, v = self.split(self.linear(h, matrix), self.query_size, self.key_size, self.key_size)
        q = self._rotated(self.head_norm(q, layer, "self_attn.q_norm"), kind)
        k = self._rotated(self.head_norm(k, layer, "self_attn.k_norm"), kind)
        keys, values = (
            self.node(
                "Unsqueeze",
                self.node(
                    "Transpose",
                    self.node("Reshape", part, self.integers(0, 0, kv_heads, stack.head_dim)),
                    perm=[0, 2, 1, 3],
                ),
                self.integers(2),
            )
            for part in (k, v)
        )  # (B, K, 1, S, E)
        local = kind == "sliding_attention"
        blocks = self.node("Shape", "local_keys", end=1) if local else "global_blocks"
        heads = self.integers(-1, kv_heads, self.groups, stack.head_dim)
        shape = self.node("Concat", self.integers(0), blocks, heads, axis=0)
        q = self.node("Transpose", self.node("Reshape", q, shape), perm=[1, 0, 3, 4, 2, 5])  # (N, B, K, G, C, E)
        scanned = [q, "local_keys", "local_hidden"] if local else [q]
        body = self._block(layer, keys, values, kind)
        out = self.node("Scan", *scanned, num_scan_inputs=len(scanned), body=body)
        out = self.node("Transpose", out, perm=[1, 0, 4, 2, 3, 5])
        out = self.node("Reshape", out, self.integers(0, -1, self.query_size))
        return self.linear(out, self.factor(f"{layer}self_attn.", self.query_size, o_proj=stack.hidden_size))

    def _rotated(self, x: str, kind: LayerType) -> str:
        cos, sin = f"cos_{short(kind)}", f"sin_{short(kind)}"
        return self.node("RotaryEmbedding", x, self.integers(0), cos, sin, domain=OURS)

    def _block(self, layer: str, keys: str, values: str, kind: LayerType) -> onnx.GraphProto:
        """Attention of one block of queries (B, K, G, C, E); keys and values are seen from outside."""
        prefix = layer.replace(".", "_")
        body = Graph(f"{layer}block", "float32", prefix)
        inputs = [helper.make_tensor_value_info(f"{prefix}q", FLOAT, None)]
        if kind == "sliding_attention":
            inputs.append(helper.make_tensor_value_info(f"{prefix}keys", INT64, ["J"]))
            inputs.append(helper.make_tensor_value_info(f"{prefix}hidden", FLOAT, ["B", 1, 1, 1, "J"]))
            keys, values = (body.node("Gather", part, f"{prefix}keys", axis=3) for part in (keys, values))
        scores = body.node("FusedMatMul", f"{prefix}q", keys, domain=OURS, transB=1, alpha=self.attention_scale)
        cap = self.stack.attn_logit_softcapping
        scores = body.softcapped(scores, None if cap is None else self.constant(cap))
        if kind == "sliding_attention":
            scores = body.node("Add", body.node("Add", scores, "local_window"), f"{prefix}hidden")
        else:
            scores = body.node("Add", scores, "hidden")
        weights = body.node("Softmax", scores, axis=-1)
        body.node("MatMul", weights, values, output=f"{prefix}out")
        result = helper.make_tensor_value_info(f"{prefix}out", FLOAT, None)
        return helper.make_graph(body.nodes, f"{layer}block", inputs, [result])


def short(kind: LayerType) -> str:
    return "local" if kind == "sliding_attention" else "global"
