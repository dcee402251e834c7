"""The graphs are the model: against torch in float32, and against a slow oracle of the packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

from encore.export.graph import ACCURACY_LEVELS, FLOAT, IR_VERSION, OPSET, OURS
from encore.export.manifest import BITS
from encore.generate import onnx_inputs
from encore.generate.onnx_backend import OnnxModel
from encore.generate.padding import pad_rows
from encore.model.attention import SelfAttention
from encore.model.layers import Rotation, vocabulary_logits
from encore.model.t5gemma import T5Gemma
from encore.quantize.blocks import dequantise, quantise

W = 7
TARGET_TOKENS = 20
EDGES = [
    [[1]],
    [[W - 1]],
    [[W]],
    [[W + 1]],
    [[2 * W]],
    [[W - 1, W, W + 1, 2 * W, 1]],
    [[0, 5, 2 * W + 1]],
    [[100, 33, 65]],
]
KINDS = ("t5gemma", "t5gemma-unbalanced", "t5gemma2")
each_kind = pytest.mark.parametrize("kind", KINDS)


def draw(*lengths: int) -> list[list[int]]:
    """Ids of all kinds, 9 (the end-of-image token) among them."""
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(3, 61, length).tolist() for length in lengths]


def both(
    model: T5Gemma, graphs: OnnxModel, lengths: Sequence[int], num_tokens: int = TARGET_TOKENS
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Logits (B, T, V) of torch in one pass and of the graphs step by step, and the largest difference of states."""
    sources = draw(*lengths)
    targets = np.array(draw(*[num_tokens] * len(lengths)))
    targets[:, 2] = 9
    with torch.no_grad():
        memory = model.encode(*pad_rows(sources, 0, side="right"))
        expected = model.decode(torch.from_numpy(targets), memory).numpy()
    found = graphs.encode(sources)
    states = [np.abs(found.states[i, :n] - memory.states[i, :n].numpy()).max(initial=0) for i, n in enumerate(lengths)]
    cache = graphs.make_cache(found, num_tokens)
    steps = [graphs.step(targets[:, i].tolist(), cache).copy() for i in range(num_tokens)]
    return expected, np.stack(steps, axis=1), float(max(states))


# --- float32 ---------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(["lengths"], EDGES)
def test_float32_is_torch_past_every_window(exported: Callable, kind: str, lengths: list[int]) -> None:
    expected, found, states = both(*exported(kind), lengths)
    assert states < 1e-4
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected[:, 1:] - expected[:, :-1]).max() > 1, "the targets must matter"


@each_kind
@pytest.mark.parametrize("window", [1, 2, 64])
def test_narrow_and_wide_windows(exported: Callable, kind: str, window: int) -> None:
    expected, found, states = both(*exported(kind, changes={"sliding_window": window}), [5, 40, 90])
    assert max(states, np.abs(found - expected).max()) < 1e-4


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
def test_heads_of_an_odd_size(exported: Callable, kind: str) -> None:
    expected, found, states = both(*exported(kind, changes={"head_dim": 6}), [5, 2 * W + 1])
    assert max(states, np.abs(found - expected).max()) < 1e-4


@pytest.mark.parametrize("layer", ["sliding_attention", "full_attention"])
@each_kind
def test_one_kind_of_layer_alone(exported: Callable, kind: str, layer: str) -> None:
    changes = {"layer_types": (layer,) * 2, "num_hidden_layers": 2}
    expected, found, states = both(*exported(kind, changes=changes), [3, 2 * W])
    assert max(states, np.abs(found - expected).max()) < 1e-4


@each_kind
def test_long_sources_go_through_in_blocks(exported: Callable, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = exported(kind)
    lengths = [200, 0, 77]
    whole = both(model, graphs, lengths, 4)
    stack = graphs.config.encoder
    groups = stack.num_attention_heads // stack.num_key_value_heads
    monkeypatch.setattr(onnx_inputs, "MAX_SCORES", groups * 200 * 50)
    monkeypatch.setattr(onnx_inputs, "TOKEN_BLOCK", 100)
    feeds = onnx_inputs.encoder_feeds(graphs.config, draw(*lengths))
    capped = stack.attn_logit_softcapping is not None
    assert len(feeds["global_blocks"]) == stack.num_key_value_heads * (4 + 2 if capped else 2)
    assert len(feeds["local_blocks"]) > len(feeds["global_blocks"]) and len(feeds["token_blocks"]) == 3
    expected, found, states = both(model, graphs, lengths, 4)
    assert states < 1e-4 and np.abs(found - expected).max() < 1e-4
    assert np.abs(found - whole[1]).max() < 1e-4


def test_local_layers_read_a_band_of_keys_and_nothing_is_padding(exported: Callable) -> None:
    _, graphs = exported("t5gemma2")
    heads = graphs.config.encoder.num_key_value_heads
    for lengths in ((1_000,), (4_000, 30, 0, 1)):
        feeds = onnx_inputs.encoder_feeds(graphs.config, draw(*lengths))
        assert feeds["tokens"].shape == (1, sum(lengths))
        for name in ("local", "global"):
            first, end, first_key, end_key = feeds[f"{name}_blocks"].T[:4]
            asked = np.concatenate([np.arange(*part) for part in zip(first, end, strict=True)])
            assert np.array_equal(asked, np.arange(heads * sum(lengths)))
            scores = int(((end - first) * (end_key - first_key)).sum())
            reached = [W + feeds["local_window"].shape[0] if name == "local" else length for length in lengths]
            assert scores <= heads * sum(np.multiply(lengths, reached))


@each_kind
def test_neighbours_and_dropped_rows_change_nothing(exported: Callable, kind: str) -> None:
    _, graphs = exported(kind)
    lengths, rng = [4, 11, 2 * W + 3], np.random.default_rng(0)
    sources, targets = draw(*lengths), rng.integers(3, 61, (3, TARGET_TOKENS))
    cache = graphs.make_cache(graphs.encode(sources), TARGET_TOKENS)
    alone = graphs.make_cache(graphs.encode(sources[2:]), TARGET_TOKENS)
    rows = [0, 1, 2]
    for place in range(TARGET_TOKENS):
        if place == W + 2:
            rows = [2, 0]
            cache.index_select(rows)
        found = graphs.step(targets[rows, place].tolist(), cache)[rows.index(2)].copy()
        expected = graphs.step([int(targets[2, place])], alone)[0]
        np.testing.assert_allclose(found, expected, atol=2e-5)


# --- packed weights --------------------------------------------------------------------------------------------------


class Rounded(nn.Linear):
    """A product with inputs rounded to int8 in blocks, as MatMulNBits does at accuracy level 4."""

    block_size = 32

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(rounded(input, self.block_size), self.weight)


class RoundedByRows(nn.Linear):
    """A product with one scale for each token, as the encoder's are with activations "int8-rows"."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(rounded(input, input.shape[-1]), self.weight)


class RoundedScores(SelfAttention):
    """Scores of integers: a scale for each key, and one for all queries of a source that share a key head."""

    def queries(self, x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        q = super().queries(x, rotation)
        of_key_head = q.unflatten(1, (self.k_proj.out_features // self.head_dim, -1))
        return rounded(of_key_head.flatten(2), of_key_head[0, 0].numel()).view_as(q)

    def keys_values(self, x: torch.Tensor, rotation: Rotation | None) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().keys_values(x, rotation)
        return rounded(k, self.head_dim, 63), v


def rounded(x: torch.Tensor, block_size: int, levels: int = 127) -> torch.Tensor:
    size = x.shape[-1]
    blocks = F.pad(x, (0, -size % block_size)).unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / levels
    codes = torch.where(scale > 0, blocks / scale, torch.zeros(())).round()
    return (codes * scale).flatten(-2)[..., :size]


def oracle(model: T5Gemma, weights: str, block_size: int, activations: str) -> T5Gemma:
    """The same model with the weights that the packed ones stand for, and int8 activations if asked for."""
    copy = T5Gemma(model.config).eval()
    copy.load_state_dict(model.state_dict())
    layer_bits, vocabulary_bits = BITS[weights]  # pyright: ignore
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if parameter.dim() == 2:
                if activations == "int8-rows" and name.startswith("encoder.layers"):
                    scale = parameter.abs().amax(dim=1, keepdim=True) / 63
                    parameter.copy_((parameter / scale).round() * scale)
                    continue
                bits = vocabulary_bits if "embed_tokens" in name else layer_bits
                packed = quantise(parameter.numpy(), bits, block_size)
                parameter.copy_(torch.from_numpy(dequantise(*packed, bits, parameter.shape[1])))
    if activations != "float32":
        for name, module in copy.named_modules():
            if isinstance(module, nn.Linear):
                by_rows = activations == "int8-rows" and name.startswith("encoder.layers")
                module.__class__ = RoundedByRows if by_rows else Rounded
                module.block_size = block_size  # pyright: ignore
            elif isinstance(module, SelfAttention) and activations == "int8-rows" and model.config.encoder.qk_norm:
                module.__class__ = RoundedScores if name.startswith("encoder.layers") else module.__class__
        cap = model.config.final_logit_softcapping
        copy.logits = lambda states: vocabulary_logits(rounded(states, block_size), copy.head_weight, cap)
    return copy


@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [48, 256])
def test_one_product_rounds_its_input_to_int8(size: int, bits: int, block_size: int, num_rows: int) -> None:
    rng = np.random.default_rng(size + bits)
    weight, x = (rng.standard_normal((n, size)).astype(np.float32) for n in (64, num_rows))
    codes, scales = quantise(weight, bits, block_size)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain=OURS,
        K=size,
        N=64,
        bits=bits,
        block_size=block_size,
        accuracy_level=ACCURACY_LEVELS["int8"],
    )
    stored = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    ends = (helper.make_tensor_value_info(name, FLOAT, ["M", columns]) for name, columns in (("x", size), ("y", 64)))
    graph = helper.make_graph([node], "product", [next(ends)], [next(ends)], stored)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OURS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    expected = rounded(torch.from_numpy(x), block_size).numpy() @ dequantise(codes, scales, bits, size).T
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(x @ weight.T - expected).max() > 1e-3 * np.abs(expected).max()


CASES = [
    *(("t5gemma2", weights, block_size) for weights in ("int8", "int4") for block_size in (32, 64, 128)),
    ("t5gemma2", "int8-head-int4", 32),
    ("t5gemma", "int8", 128),
    ("t5gemma", "int4", 32),
    ("t5gemma-unbalanced", "int8", 32),
    ("t5gemma-unbalanced", "int4", 128),
]


@pytest.mark.parametrize("activations", ["float32", "int8", "int8-rows"])
@pytest.mark.parametrize(["kind", "weights", "block_size"], CASES)
def test_packed_weights_are_the_oracle(
    exported: Callable, kind: str, weights: str, block_size: int, activations: str
) -> None:
    options: dict[str, Any] = {"block_size": block_size, "activations": activations}
    model, graphs = exported(kind, weights, **options)
    slow = oracle(model, weights, block_size, activations)
    pairs = [both(slow, graphs, [length], 10)[:2] for length in (W, 2 * W + 1)]  # padding would count in a scale
    expected, found = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    difference = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    if activations == "float32":
        assert difference.max() < 1e-5
    else:  # now and then a number lies where float32 decides to which side it is rounded; what reads it then differs
        assert np.quantile(difference, 0.4) < 1e-5 and difference.max() < 0.05
    unpacked = np.concatenate([both(model, graphs, [length], 10)[0] for length in (W, 2 * W + 1)])
    assert np.linalg.norm(unpacked - expected) / np.linalg.norm(expected) > 1e-3, "packing must change something"
