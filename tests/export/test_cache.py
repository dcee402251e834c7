"""The cache in int8: products over what is kept are good, what is kept is near what was there, rows stay apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from encore.checkpoint.config_json import read_config_file
from encore.config import T5GemmaConfig
from encore.export.attention import KeptKeys
from encore.export.graph import FLOAT, LayerGraph
from encore.export.weights import StoredWeights, WeightsFile

from .conftest import KINDS, WINDOW

each_kind = pytest.mark.parametrize("kind", KINDS)
NUMPY = {FLOAT: np.float32, TensorProto.INT8: np.int8, TensorProto.UINT8: np.uint8}


def run(
    folder: Path, scratch: Path, build: Callable[[LayerGraph, KeptKeys], list[str]], feeds: dict[str, Any]
) -> list[Any]:
    """What a graph gives that `build` makes for the decoder's stack of a folder."""
    config = read_config_file(folder)
    assert isinstance(config, T5GemmaConfig)
    with WeightsFile(scratch / "weights.bin", StoredWeights(folder, config), 32) as file:
        graph = LayerGraph("part", "float32", config.decoder, "decoder.", file, None)
        kinds = {np.dtype(value): kind for kind, value in NUMPY.items()}
        for name, array in feeds.items():
            graph.input(name, kinds[array.dtype], array.shape)
        kept = KeptKeys(graph, "int8")
        for name in build(graph, kept):
            graph.output(name, kept.parts[name].kind if name in kept.parts else FLOAT, [None] * 4)  # pyright: ignore
        graph.save(scratch / "part.onnx")
    return onnxruntime.InferenceSession(scratch / "part.onnx").run(None, feeds)


@each_kind
@pytest.mark.parametrize("num_slots", [5, 300])
def test_attention_over_the_kept_numbers(make: Callable, tmp_path: Path, kind: str, num_slots: int) -> None:
    """Against float64 over the numbers that the kept ones stand for, with keys and values of very unlike sizes."""
    model, folder = make(kind)
    stack, rng = model.config.decoder, np.random.default_rng(num_slots)
    heads, size = stack.num_key_value_heads, stack.head_dim
    keys, values = (
        (rng.standard_normal((2, heads, num_slots, size)) * rng.lognormal(0, 1, (2, heads, num_slots, 1))).astype("f")
        for _ in range(2)
    )
    keys[0, 0, 1] = 0

    def pack(graph: LayerGraph, kept: KeptKeys) -> list[str]:
        packed = kept.packed("k", "v")
        for part in kept.parts:
            graph.node("Identity", packed[part], output=part)
        return list(kept.parts)

    parts = dict(
        zip(
            ("keys", "values", "key_scales", "value_scales"),
            run(folder, tmp_path, pack, {"k": keys, "v": values}),
            strict=True,
        )
    )
    assert (parts["keys"].dtype, parts["values"].dtype) == (np.uint8, np.int8)
    stand_for = {
        "keys": (parts["keys"].astype(float) - 128) * parts["key_scales"],
        "values": parts["values"].astype(float) * parts["value_scales"],
    }
    for name, before in (("keys", keys), ("values", values)):
        largest = np.abs(before).max(axis=-1, keepdims=True)
        assert (np.abs(stand_for[name] - before) <= 0.501 / 127 * largest).all()

    q = rng.standard_normal((2, heads, 6, size)).astype(np.float32)
    hidden = np.where(rng.random((2, 1, 1, num_slots)) < 0.3, np.float32(-1e30), np.float32(0))
    hidden[..., 0] = 0

    def attend(graph: LayerGraph, kept: KeptKeys) -> list[str]:
        graph.node("Identity", kept.attend("q", {part: part for part in kept.parts}, "hidden"), output="out")
        return ["out"]

    (found,) = run(folder, tmp_path, attend, {"q": q, "hidden": hidden, **parts})
    scores = q @ stand_for["keys"].swapaxes(2, 3) * stack.query_pre_attn_scalar**-0.5
    cap = stack.attn_logit_softcapping
    scores = (scores if cap is None else cap * np.tanh(scores / cap)) + hidden
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ stand_for["values"]
    errors = relative(found, expected)
    assert errors.max() < 2e-3 and np.median(errors) < 5e-4


def relative(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


@each_kind
def test_what_it_costs_and_that_rows_stay_apart(exported: Callable, kind: str) -> None:
    (_, exact), (_, graphs) = exported(kind), exported(kind, cache="int8")
    rng = np.random.default_rng(0)
    sources = [rng.integers(3, 61, length).tolist() for length in (4, 40, 2 * WINDOW)]
    targets = rng.integers(3, 61, (3, 2 * WINDOW + 1))

    def logits(model: Any, rows: list[int], num_tokens: int) -> NDArray[np.float32]:
        cache = model.make_cache(model.encode([sources[row] for row in rows]), targets.shape[1], num_tokens)
        steps = range(0, targets.shape[1], num_tokens)
        logits.bytes = cache.num_bytes
        return np.concatenate([cache.advance(targets[rows, i : i + num_tokens]).copy() for i in steps], axis=1)

    expected = logits(exact, [0, 1, 2], 1)
    whole = logits.bytes
    found = logits(graphs, [0, 1, 2], 1)
    assert logits.bytes < 0.33 * whole
    assert 1e-5 < relative(found, expected).mean() < 0.02
    for row in range(3):
        assert np.median(relative(logits(graphs, [row], 1)[0], found[row])) < 1e-4
    assert np.median(relative(logits(graphs, [0, 1, 2], 5), found)) < 1e-4, "steps of several tokens"
