"""Packed products against a slow oracle, one by one, from the activations that the graph itself has there.

Activations are rounded to int8 in blocks before they are multiplied. Where one lies at the middle between two levels,
the last bit of float32 decides, and everything that reads the product differs a little: compared from end to end, a
position may be 5 % apart (`test_graphs.py`). Each product by itself has no such excuse, and what lies between the
products is the float32 graph's, which is compared there with torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from safetensors.numpy import load_file

import encore
from encore import assets
from encore.config import T5GemmaConfig
from encore.export import encoder
from encore.export.folder import export
from encore.export.graph import FLOAT
from encore.export.manifest import CANDIDATES
from encore.generate import onnx_inputs
from encore.generate.onnx_backend import OnnxModel, log_probabilities
from encore.generate.onnx_cache import OnnxCache
from encore.generate.onnx_inputs import encoder_feeds
from encore.quantize.blocks import dequantise, in_blocks

from .conftest import KINDS, WINDOW


def draw(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(3, 61, length).tolist() for length in lengths]


def opened(path: Path) -> onnx.ModelProto:
    """A graph, with the Loops over blocks of tokens undone: what goes through in one block is the Loop's body once."""
    model = onnx.load(path, load_external_data=False)
    nodes = list(model.graph.node)
    for loop in [node for node in nodes if node.op_type == "Loop" and node.attribute[0].g.name.endswith("mlp")]:
        body = loop.attribute[0].g
        *inside, insert, _ = body.node
        (joined,) = (node for node in nodes if loop.output[0] in node.input)
        block = helper.make_node("Constant", [], [body.input[0].name], value_int=0)
        result = helper.make_node("Identity", [insert.input[1]], [joined.output[0]])
        place = nodes.index(loop)
        nodes[place : place + 2] = [block, *inside, result]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


class Watched:
    """A graph of a folder that also gives what goes into its packed products and what comes out."""

    def __init__(self, folder: Path, part: str) -> None:
        model = opened(folder / f"{part}.onnx")
        self.folder, self.nodes = folder, [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        fused = (node for node in model.graph.node if node.op_type == "FusedMatMul")
        self.float_nodes = [node for node in fused if node.input[1] in self.stored]
        both = (*self.nodes, *self.float_nodes)
        self.names = list(dict.fromkeys(name for node in both for name in (node.input[0], node.output[0])))
        known = {value.name for value in (*model.graph.output, *model.graph.input)}
        values = [helper.make_tensor_value_info(name, FLOAT, None) for name in self.names if name not in known]
        model.graph.output.extend(values)
        path = folder / f"watched_{part}.onnx"  # beside the weights, which it names
        onnx.save(model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(path, options)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        given = {value.name for value in self.session.get_inputs()}
        fed = {name: array for name, array in feeds.items() if name in given}
        wanted = [name for name in self.names if name not in fed]
        return fed | dict(zip(wanted, map(np.asarray, self.session.run(wanted, fed)), strict=True))

    def matrix(self, node: onnx.NodeProto, bits: int, num_columns: int) -> NDArray[np.float32]:
        """What the packed matrix of a product stands for, (N, K)."""
        codes, scales = (
            self.array(name, kind) for name, kind in zip(node.input[1:3], (np.uint8, np.float32), strict=True)
        )
        return dequantise(codes, scales.reshape(codes.shape[:2]), bits, num_columns)

    def array(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        """A stored one."""
        place = {entry.key: entry.value for entry in self.stored[name].external_data}
        data = (self.folder / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
        return np.frombuffer(data, dtype).reshape(self.stored[name].dims)

    def worst(self, values: Mapping[str, NDArray[Any]]) -> float:
        """The largest relative error of a product's row."""
        found = 0.0
        for node in self.nodes:
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            x = values[node.input[0]].reshape(-1, sizes["K"])
            matrix = self.matrix(node, sizes["bits"], sizes["K"])
            expected = rounded(x, sizes["block_size"]) @ matrix.T.astype(np.float64)
            difference = np.linalg.norm(values[node.output[0]].reshape(expected.shape) - expected, axis=1)
            size = np.maximum(np.linalg.norm(expected, axis=1), 1e-20)  # 0 for a row that is padding
            found = max(found, float((difference / size).max()))
        return found


def rounded(x: NDArray[np.float32], block_size: int) -> NDArray[np.float32]:
    """Rounded to int8 in blocks, by the same float32 operations as the kernel's."""
    blocks = in_blocks(x, block_size)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return (np.rint(blocks * inverse) * scale).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize(
    ["kind", "weights", "block_size"],
    [
        *(("t5gemma2", weights, block_size) for weights in ("int8", "int4") for block_size in (32, 128)),
        ("t5gemma", "int8", 128),
        ("t5gemma", "int4", 32),
        ("t5gemma-unbalanced", "int8", 32),
        ("t5gemma-unbalanced", "int4", 128),
    ],
)
def test_every_product_of_every_graph(exported: Callable, kind: str, weights: str, block_size: int) -> None:
    _, graphs = exported(kind, weights, block_size=block_size, activations="int8")
    assert isinstance(graphs, OnnxModel)
    folder, sources = graphs.manifest.folder, draw(WINDOW, 2 * WINDOW + 1)
    encoder, memory, step = (Watched(folder, part) for part in ("encoder", "memory", "step"))
    config, states = graphs.config, graphs.encode(sources)
    assert encoder.worst(encoder.run(encoder_feeds(config, sources))) < 1e-3
    assert memory.worst(memory.run({"states": states.states})) < 1e-3
    cache = graphs.make_cache(states, 8, 3)
    watched = OnnxCache(config, step.session, states.lengths, 8, 3)
    watched.buffers = cache.buffers
    targets = np.array(draw(3, 3))
    watched.advance(targets)
    inputs = watched._steps[3].inputs
    watched._steps[3].prepare(targets)
    assert step.worst(step.run(inputs)) < 1e-3
    layers = len(config.decoder.layer_types)
    assert len(step.nodes) >= 4 * layers + 1 and len(memory.nodes) == layers


@pytest.mark.parametrize("kind", KINDS)
def test_products_by_rows(exported: Callable, make: Callable, kind: str) -> None:
    """One scale per token and per row of the matrix: the graph against numpy, and both near the exact states."""
    _, graphs = exported(kind, "int8", activations="int8-rows")
    (_, exact), (_, blocks) = exported(kind), exported(kind, "int8", activations="int8")
    folder, sources = graphs.manifest.folder, draw(WINDOW, 4 * WINDOW)
    model = opened(folder / "encoder.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(nodes) == 7 * graphs.config.encoder.num_hidden_layers
    by_output = {node.output[0]: node for node in model.graph.node}
    inputs = [by_output[node.input[0]].input[0] for node in nodes]
    outputs = [node.output[0] for node in nodes]
    known = {value.name for value in model.graph.output}
    names = [name for name in dict.fromkeys([*inputs, *outputs]) if name not in known]
    model.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    onnx.save(model, folder / "watched_rows.onnx")
    session = onnxruntime.InferenceSession(folder / "watched_rows.onnx")
    values = dict(zip(names, map(np.asarray, session.run(names, encoder_feeds(graphs.config, sources))), strict=True))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(name: str, dtype: type[np.generic]) -> NDArray[Any]:
        place = {entry.key: entry.value for entry in stored[name].external_data}
        data = (folder / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
        return np.frombuffer(data, dtype).reshape(stored[name].dims)

    tensors = load_file(make(kind)[1] / "model.safetensors")
    for node, before, after in zip(nodes, inputs, outputs, strict=True):
        levels, scales = array(node.input[1], np.int8), array(node.input[3], np.float32)
        weight = tensors["model." + node.input[1].removesuffix(".rows")]
        assert np.abs(levels).max() == 63
        assert (np.abs(levels.T * scales[:, None] - weight) <= 0.501 * scales[:, None]).all()
        x = values[before].reshape(-1, len(levels))
        scale = np.maximum(np.abs(x).max(axis=1, keepdims=True) * np.float32(1 / 127), 1e-20)
        expected = np.rint(x / scale) @ (levels * scales).astype(np.float64)
        difference = np.linalg.norm(values[after].reshape(expected.shape) - expected, axis=1)
        assert (difference / np.linalg.norm(expected, axis=1)).max() < 1e-3
    states = [graph.encode(sources).states[1] for graph in (exact, blocks, graphs)]
    errors = [np.linalg.norm(found - states[0]) / np.linalg.norm(states[0]) for found in states[1:]]
    assert 0 < errors[0] < errors[1] < 0.06


def encoder_states(config: T5GemmaConfig, folder: Path, sources: list[list[int]]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    (states,) = session.run(["states"], encoder_feeds(config, sources))
    return np.asarray(states)


@pytest.mark.parametrize("norm", [None, 9.0])
def test_integer_scores_by_tiles(
    exported: Callable, make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: float | None
) -> None:
    """Sources of many tiles and of one: as near the exact states as with fused attention, which large scores need."""
    monkeypatch.setattr(onnx_inputs, "GLOBAL_BLOCK", 400)
    model, checkpoint = make("t5gemma2")
    if norm is not None:  # of queries and keys: scores of which float32 has no exponentials
        model = copy.deepcopy(model)
        for layer in model.encoder.layers:
            for part in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                part.weight.data.fill_(norm)
        checkpoint = tmp_path / "checkpoint"
        encore.save(model, checkpoint, tokenizer=encore.load_tokenizer(assets.path("tokenizer")))
    sources = draw(700, 1, 300, 513)
    states: list[NDArray[np.float32]] = []
    for name, weights, largest in (("exact", "float32", 75.0), ("tiles", "int8", 75.0), ("fused", "int8", 0.0)):
        monkeypatch.setattr(encoder, "LARGEST_SCORE", largest)
        export(checkpoint, tmp_path / name, weights)  # pyright: ignore
        states.append(encoder_states(model.config, tmp_path / name, sources))
    exact, tiles, fused = states
    assert np.isfinite(tiles).all()
    if norm is not None:
        return np.testing.assert_array_equal(tiles, fused)
    errors = [np.linalg.norm(found - exact) / np.linalg.norm(exact) for found in (tiles, fused)]
    assert (tiles != fused).any() and errors[0] < 1.1 * errors[1] < 0.06
    alone = encoder_states(model.config, tmp_path / "tiles", sources[2:3])
    difference = np.linalg.norm(tiles[:, 701:1001] - alone) / np.linalg.norm(alone)
    assert difference < 0.05


def watched_step(
    graphs: OnnxModel, wanted: NDArray[np.int64]
) -> tuple[Watched, dict[str, NDArray[Any]], NDArray[np.float32], NDArray[np.float32]]:
    """A step of three tokens: the watched graph, what its products took and gave, logits and log-sums."""
    watched, memory = Watched(graphs.manifest.folder, "step"), graphs.encode(draw(WINDOW, 2 * WINDOW))
    cache = graphs.make_cache(memory, 8, 3)
    twin = OnnxCache(graphs.config, watched.session, memory.lengths, 8, 3)
    twin.buffers = {name: buffer.copy() for name, buffer in cache.buffers.items()}
    tokens = np.array(draw(3, 3))
    logits = cache.advance(tokens, wanted=wanted, summed=True)
    assert cache.log_sums is not None
    twin.advance(tokens)
    twin.rollback([0, 0])
    twin._steps[3].prepare(tokens)
    return watched, watched.run(twin._steps[3].inputs), logits, cache.log_sums


def both_passes(
    graphs: OnnxModel,
    first: NDArray[np.float64],
    full: NDArray[np.float64],
    wanted: NDArray[np.int64],
    num_candidates: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first pass with the full logits of its best words and the wanted ones; and the full ones, both capped."""
    best = np.argsort(-first, axis=-1)[..., :num_candidates]
    ids = np.concatenate([best, wanted[..., None]], axis=-1)
    expected = first.copy()
    np.put_along_axis(expected, ids, np.take_along_axis(full, ids, axis=-1), axis=-1)
    cap = graphs.config.final_logit_softcapping
    return (expected, full) if cap is None else (cap * np.tanh(expected / cap), cap * np.tanh(full / cap))


@pytest.mark.parametrize("vocab_size", [300, 64 * 80])  # all words compared; groups of words by their best
@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
def test_a_head_in_two_passes(exported: Callable, kind: str, vocab_size: int) -> None:
    """The best words of the first pass, and those asked for, have the logits of all eight bits; the rest of four."""
    options = {"activations": "float32", "two_pass_head": True}
    _, graphs = exported(kind, "int8", {"vocab_size": vocab_size}, **options)
    wanted = np.array([[280, 281, 282], [290, 291, 292]])
    watched, values, logits, log_sums = watched_step(graphs, wanted)
    head = watched.nodes[-1]
    states = values[head.input[0]].astype(np.float64)
    upper = watched.matrix(head, 4, states.shape[2])
    label = head.input[1].removesuffix(".codes")
    lower = helper.make_node("", ["", f"{label}.lower_of_rows", head.input[2]], [])
    lower = watched.matrix(lower, 4, states.shape[2]) / 16
    first, full = states @ upper.T, states @ (upper + lower).T
    expected, full = both_passes(graphs, first, full, wanted, CANDIDATES)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert (np.abs(expected - full) > 1e-3 * np.abs(expected).max()).any(), "the passes differ"
    np.testing.assert_allclose(log_sums, np.log(np.exp(expected).sum(axis=-1)), rtol=1e-5)


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
def test_scores_of_a_head_in_two_passes(exported: Callable, kind: str) -> None:
    """Of words that are among the best or not: nearer to int8's than the first pass alone, int8-head-int4, is."""
    changes, sources, targets = {"vocab_size": 300}, draw(9, 20), draw(6, 4)
    options = {"activations": "float32", "block_size": 32}
    ways = [("float32", {}), ("int8", {**options, "two_pass_head": True}), ("int8-head-int4", options)]
    found = []
    for weights, how in ways:
        _, graphs = exported(kind, weights, changes, **how)
        found.append(np.concatenate(log_probabilities(graphs, sources, targets)))
    exact, two_passes, four_bits = found
    errors = [np.abs(x - exact).mean() for x in (two_passes, four_bits)]
    assert errors[0] < 0.35 * errors[1]
