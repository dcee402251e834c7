"""Nodes, constants and the layer parts that all graphs share.

Beside the standard operators, ONNX Runtime's own are used (domain com.microsoft): MatMulNBits and GatherBlockQuantized
for packed weights, FusedMatMul for a product with a transposed matrix, SkipSimplifiedLayerNormalization for a residual
sum with its norm. Everything else is float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from encore.config import StackConfig
from encore.export.manifest import WEIGHTS_FILE, Activations
from encore.export.weights import Matrix, Place, StoredWeights, WeightsFile

OURS = "com.microsoft"
OPSET, IR_VERSION = 21, 10
ACCURACY_LEVELS: dict[Activations, int] = {"float32": 1, "int8": 4, "int8-rows": 4}
HIDDEN = -1e30
"""What is added to the score of a hidden key: its weight is then exactly 0, and a row without keys has no NaN."""

FLOAT, INT8, INT64, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64, TensorProto.UINT8
BOOL = TensorProto.BOOL

Shape = Sequence[int | str]


def value(name: str, kind: int = FLOAT, shape: Shape | None = None) -> onnx.ValueInfoProto:
    """An input or output of a graph; of a subgraph, the shape may be left out."""
    return helper.make_tensor_value_info(name, kind, shape)


class Graph:
    """One ONNX graph in the making. Values are names; every method that makes a node gives the name of its result."""

    def __init__(self, name: str, activations: Activations, prefix: str = "") -> None:
        self.name, self.prefix = name, prefix
        self.accuracy_level = ACCURACY_LEVELS[activations]
        self.nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._known: dict[Any, str] = {}

    def input(self, name: str, kind: int, shape: Shape) -> str:
        self._inputs.append(value(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Shape) -> str:
        self._outputs.append(value(name, kind, shape))
        return name

    def nodes_of(
        self, kind: str, inputs: Sequence[str], outputs: int | Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node with several results; "" for one that is not wanted."""
        label = f"{self.prefix}{kind}_{len(self.nodes)}"
        names = [f"{label}_{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=label, domain=domain, **attributes))
        return names

    def node(self, kind: str, *inputs: str, domain: str = "", output: str | None = None, **attributes: Any) -> str:
        return self.nodes_of(kind, inputs, 1 if output is None else [output], domain, **attributes)[0]

    @contextmanager
    def inside(self, label: str) -> Iterator[list[onnx.NodeProto]]:
        """Nodes are those of a subgraph, which it gives."""
        nodes, prefix = self.nodes, self.prefix
        self.nodes, self.prefix = [], f"{prefix}{label.replace('.', '_')}_"
        yield self.nodes
        self.nodes, self.prefix = nodes, prefix

    def constant(self, number: Any, dtype: type[np.generic] = np.float32) -> str:
        """A small array, kept in the graph; equal ones once."""
        array = np.asarray(number, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = f"constant_{len(self._initializers)}"
            self._initializers.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def integers(self, *values: int) -> str:
        """A vector of int64, such as a shape."""
        return self.constant(values, np.int64)

    def stored(self, name: str, place: Place, kind: int, shape: Sequence[int]) -> str:
        """An array of the weights file."""
        if name not in self._known:
            tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
            for key, entry in (("location", WEIGHTS_FILE), ("offset", place.offset), ("length", place.num_bytes)):
                tensor.external_data.add(key=key, value=str(entry))
            self._initializers.append(tensor)
            self._known[name] = name
        return name

    def save(self, path: Path) -> None:
        graph = helper.make_graph(self.nodes, self.name, self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OURS, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="encore")
        path.write_bytes(model.SerializeToString(deterministic=True))

    # --- parts of layers

    def linear(self, x: str, matrix: Matrix) -> str:
        """x @ matrix'."""
        if matrix.bits is None:
            return self.fused_product(x, self.float_matrix(matrix))
        return self.node(
            "MatMulNBits",
            x,
            self.codes(matrix),
            self.scales(matrix),
            domain=OURS,
            K=matrix.num_columns,
            N=matrix.num_rows,
            bits=matrix.bits,
            block_size=matrix.block_size,
            accuracy_level=self.accuracy_level,
        )

    def fused_product(self, x: str, y: str, factor: float = 1.0) -> str:
        """factor * x @ y'."""
        return self.node("FusedMatMul", x, y, domain=OURS, transB=1, alpha=factor)

    def rows_of(self, matrix: Matrix, tokens: str) -> str:
        """The rows (B, T, K) of a matrix that stand at `tokens` (B, T)."""
        if matrix.bits is None:
            return self.node("Gather", self.float_matrix(matrix), tokens, axis=0)
        rows = self._unpacked_rows(matrix, tokens, "codes", matrix.values)
        return rows if matrix.lower is None else self.node("Add", rows, self.lower_rows(matrix, tokens))

    def lower_rows(self, matrix: Matrix, tokens: str) -> str:
        """What the lower plane of a matrix adds to its rows (…, K) that stand at `tokens`."""
        assert matrix.lower is not None
        rows = self._unpacked_rows(matrix, tokens, "lower", matrix.lower)
        return self.node("Mul", rows, self.constant(1 / 16))

    def _unpacked_rows(self, matrix: Matrix, tokens: str, label: str, place: Place) -> str:
        """Rows of codes at `place`, as floats.

        Where the graph multiplies with the matrix too, ONNX Runtime keeps a copy of its own order for that. These rows
        are an array apart at the same place of the file, so that of the original only what is read stays in memory.
        """
        blocks = (matrix.num_rows, matrix.num_blocks)
        codes = self.stored(f"{matrix.name}.{label}_of_rows", place, UINT8, (*blocks, matrix.block_bytes))
        scales = self.stored(f"{matrix.name}.scales_of_rows", *_kind(matrix.scales), (*blocks, 1))
        gathered = self.node(
            "GatherBlockQuantized",
            codes,
            tokens,
            scales,
            domain=OURS,
            gather_axis=0,
            quantize_axis=2,
            block_size=matrix.block_size,
            bits=matrix.bits,
        )
        shape = self.node("Concat", self.node("Shape", tokens), self.integers(-1), axis=0)
        rows = self.node("Reshape", gathered, shape)
        if matrix.num_columns % matrix.block_size == 0:
            return rows
        return self.node("Slice", rows, self.integers(0), self.integers(matrix.num_columns), self.integers(-1))

    def float_matrix(self, matrix: Matrix) -> str:
        return self.stored(matrix.name, matrix.values, FLOAT, (matrix.num_rows, matrix.num_columns))

    def codes(self, matrix: Matrix) -> str:
        shape = (matrix.num_rows, matrix.num_blocks, matrix.block_bytes)
        return self.stored(f"{matrix.name}.codes", matrix.values, UINT8, shape)

    def scales(self, matrix: Matrix) -> str:
        return self.stored(f"{matrix.name}.scales", *_kind(matrix.scales), (matrix.num_rows, matrix.num_blocks))

    def split(self, x: str, *sizes: int) -> list[str]:
        return self.nodes_of("Split", [x, self.integers(*sizes)], len(sizes), axis=-1)

    def softcapped(self, x: str, cap: str | None) -> str:
        """cap * tanh(x / cap); `cap` is the name of a constant."""
        if cap is None:
            return x
        return self.node("Mul", self.node("Tanh", self.node("Div", x, cap)), cap)


class LayerGraph(Graph):
    """A graph of layers of one stack, whose weights are `leaves` + leaf names of the checkpoint."""

    def __init__(
        self, name: str, activations: Activations, stack: StackConfig, leaves: str, file: WeightsFile, bits: int | None
    ) -> None:
        super().__init__(name, activations)
        self.stack, self.leaves, self.file, self.bits = stack, leaves, file, bits
        self.stored_weights: StoredWeights = file.stored

    @property
    def groups(self) -> int:
        return self.stack.num_attention_heads // self.stack.num_key_value_heads

    @property
    def query_size(self) -> int:
        return self.stack.num_attention_heads * self.stack.head_dim

    @property
    def key_size(self) -> int:
        return self.stack.num_key_value_heads * self.stack.head_dim

    @property
    def attention_scale(self) -> float:
        return self.stack.query_pre_attn_scalar**-0.5

    def matrix(self, layer: str, columns: int, **rows: int) -> Matrix:
        """Write the matrices `rows` (leaf name -> rows) of a layer, one below the other."""
        return self.file.matrix(self.parts(layer, rows), columns, self.bits)

    def parts(self, layer: str, rows: Mapping[str, int]) -> list[tuple[str, int]]:
        return [(f"{self.leaves}{layer}{leaf}.weight", count) for leaf, count in rows.items()]

    def scale(self, name: str, size: int | None = None) -> str:
        """1 + w of an RMSNorm."""
        weight = self.stored_weights.vector(f"{self.leaves}{name}.weight", size or self.stack.hidden_size)
        return self.constant(np.float32(1.0) + weight)

    def norm(self, x: str, name: str, size: int | None = None, output: str | None = None) -> str:
        epsilon = self.stack.rms_norm_eps
        scale = self.scale(name, size)
        return self.node("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=epsilon, output=output)

    def add_and_norm(self, part: str, x: str, name: str, last: str | None = None) -> tuple[str, str]:
        """(norm(x + part), x + part). `last` names the norm's result; nobody needs the sum then."""
        inputs, epsilon = [part, x, self.scale(name)], self.stack.rms_norm_eps
        outputs = 4 if last is None else [last]
        names = self.nodes_of("SkipSimplifiedLayerNormalization", inputs, outputs, OURS, epsilon=epsilon)
        if last is not None:
            return last, ""
        self.nodes[-1].output[1] = self.nodes[-1].output[2] = ""
        return names[0], names[3]

    def embedding(self, matrix: Matrix, tokens: str, end_of_image: tuple[int, NDArray[np.float32]] | None) -> str:
        """Rows times sqrt(D); T5Gemma 2 has a vector of its own in place of the end-of-image token's row."""
        x = self.node("Mul", self.rows_of(matrix, tokens), self.constant(matrix.num_columns**0.5))
        if end_of_image is None or end_of_image[0] >= matrix.num_rows:
            return x
        here = self.node("Equal", tokens, self.constant(end_of_image[0], np.int64))
        here = self.node("Unsqueeze", here, self.integers(2))
        return self.node("Where", here, self.constant(end_of_image[1]), x)

    def head_norm(self, x: str, layer: str, name: str) -> str:
        """The RMSNorm of heads (…, E), where the stack has one."""
        return self.norm(x, f"{layer}{name}", self.stack.head_dim) if self.stack.qk_norm else x

    def norm_by_head(self, x: str, heads: int, layer: str, name: str) -> str:
        """`head_norm` of (B, T, heads x E)."""
        if not self.stack.qk_norm or heads == 1:
            return self.head_norm(x, layer, name)
        x = self.node("Reshape", x, self.integers(0, 0, heads, -1))
        return self.node("Reshape", self.head_norm(x, layer, name), self.integers(0, 0, -1))

    def by_key_head(self, x: str, groups: int = 1) -> str:
        """(B, T, K x groups x E) -> (B, K, T x groups, E): per key head, token by token, the rows that share it."""
        kv_heads, size = self.stack.num_key_value_heads, self.stack.head_dim
        if kv_heads == 1:
            return self.node("Reshape", x, self.integers(0, 1, -1, size))
        x = self.node("Reshape", x, self.integers(0, 0, kv_heads, groups, size))
        x = self.node("Transpose", x, perm=[0, 2, 1, 3, 4])
        return self.node("Reshape", x, self.integers(0, 0, -1, size))

    def feed_forward(self, x: str, layer: str) -> str:
        """down(gelu(gate(x)) * up(x)), then its norm."""
        hidden, inner = self.stack.hidden_size, self.stack.intermediate_size
        both = self.linear(x, self.matrix(f"{layer}mlp.", hidden, gate_proj=inner, up_proj=inner))
        gate, up = self.split(both, inner, inner)
        x = self.node("Mul", self.node("FastGelu", gate, domain=OURS), up)
        x = self.linear(x, self.matrix(f"{layer}mlp.", inner, down_proj=hidden))
        return self.norm(x, f"{layer}post_feedforward_layernorm")


def _kind(place: Place | None) -> tuple[Place, int]:
    assert place is not None
    return place, FLOAT
