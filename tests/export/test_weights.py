"""Packed blocks, and what is read from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from encore.checkpoint import CheckpointError
from encore.checkpoint.config_json import read_config_file
from encore.config import T5GemmaConfig
from encore.export import ExportError
from encore.export.weights import StoredWeights, WeightsFile
from encore.quantize import tensors as quantize_tensors
from encore.quantize.blocks import dequantise, in_blocks, in_planes, nearest_scales, packed, quantise


@given(st.integers(1, 5), st.integers(1, 200), st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers())
def test_packing_is_within_a_step_and_keeps_extremes_of_int8(
    num_rows: int, num_columns: int, bits: int, block_size: int, seed: int
) -> None:
    rng = np.random.default_rng(abs(seed))
    weight = rng.standard_normal((num_rows, num_columns)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.2] = 0
    codes, scales = quantise(weight, bits, block_size)
    blocks = -(-num_columns // block_size)
    assert codes.shape == (num_rows, blocks, block_size * bits // 8) and scales.shape == (num_rows, blocks)
    found = dequantise(codes, scales, bits, num_columns)
    steps = np.repeat(np.abs(scales), block_size, axis=1)[:, :num_columns]
    difference = np.abs(found - weight)
    assert (found[weight == 0] == 0).all()
    assert np.mean(difference <= 0.5001 * steps) > 0.9 or num_columns < 16, "only the far ends are cut"
    if bits == 4:
        nearest = nearest_scales(weight, bits, block_size)
        exact = dequantise(packed(weight, nearest, bits, block_size), nearest, bits, num_columns)
        errors = [np.square(in_blocks(x - weight, block_size)).sum(axis=2) for x in (found, exact)]
        assert (errors[0] <= errors[1] * 1.0001 + 1e-12).all(), (
            "each block is at least as near as with its extreme kept"
        )
        return
    assert (difference <= 1.0001 * steps).all()
    for start in range(0, num_columns, block_size):
        part = slice(start, start + block_size)
        largest = np.abs(weight[:, part]).argmax(axis=1)
        rows = np.arange(num_rows)
        np.testing.assert_allclose(found[:, part][rows, largest], weight[:, part][rows, largest], rtol=1e-6)


@given(st.integers(1, 4), st.integers(1, 200), st.sampled_from([32, 64, 128]), st.integers(0, 999))
def test_two_planes_of_four_bits_are_eight(num_rows: int, num_columns: int, block_size: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((num_rows, num_columns)).astype(np.float32)
    codes, scales = quantise(weight, 8, block_size)
    upper, lower = in_planes(codes)
    assert upper.shape == lower.shape == (*codes.shape[:2], block_size // 2)
    parts = [dequantise(plane, scales * size, 4, num_columns) for plane, size in ((upper, 16), (lower, 1))]
    cut = np.minimum(codes, 119 + 128)
    np.testing.assert_allclose(sum(parts), dequantise(cut, scales, 8, num_columns), rtol=1e-5, atol=1e-6)
    assert np.abs(parts[1]).max() <= 8 * np.abs(scales).max(), "the upper plane is within half a step of its own"


def test_more_bits_and_smaller_blocks_are_nearer() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)

    def error(bits: int, block_size: int) -> float:
        return float(np.linalg.norm(dequantise(*quantise(weight, bits, block_size), bits, 512) - weight))

    assert error(8, 128) < error(4, 32) < error(4, 64) < error(4, 128)
    assert error(8, 32) < error(8, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_read_some_rows_at_a_time(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    _, folder = make("t5gemma2")
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = read_config_file(folder)
    assert isinstance(config, T5GemmaConfig)
    monkeypatch.setattr(quantize_tensors, "SLICE_NUMBERS", 48 * 10)
    stored = StoredWeights(tmp_path, config)
    slices = list(stored.slices("encoder.embed_tokens.weight", (61, 48)))
    assert [len(part) for part in slices] == [10] * 6 + [1]
    expected = tensors["model.encoder.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(np.concatenate(slices), expected)
    with WeightsFile(tmp_path / "weights.bin", stored, 32) as file:
        matrix = file.matrix([("encoder.embed_tokens.weight", 61)], 48, 4)
    packed = (tmp_path / "weights.bin").read_bytes()[matrix.values.offset :][: matrix.values.num_bytes]
    assert packed == quantise(expected, 4, 32)[0].tobytes(), "slices give what the whole would"


def test_odd_checkpoints_are_refused(make: Callable, tmp_path: Path) -> None:
    _, folder = make("t5gemma")
    config = read_config_file(folder)
    assert isinstance(config, T5GemmaConfig)
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    changed = {**tensors, name: tensors[name].clone()}
    changed[name][3, 3] = float("nan")
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds numbers that are not finite"):
        list(StoredWeights(tmp_path, config).slices("decoder.layers.0.mlp.up_proj.weight", (80, 48)))
    with pytest.raises(ExportError, match=r"has shape \[80, 48\], config.json makes it \[96, 48\]"):
        list(StoredWeights(tmp_path, config).slices("decoder.layers.0.mlp.up_proj.weight", (96, 48)))
    with pytest.raises(ExportError, match=r"lacks the tensor decoder.layers.9.mlp.up_proj.weight"):
        list(StoredWeights(tmp_path, config).slices("decoder.layers.9.mlp.up_proj.weight", (80, 48)))
    head = {**tensors, "lm_head.out_proj.weight": tensors["model.decoder.embed_tokens.weight"] + 1}
    save_file(head, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"lm_head.out_proj.weight should be tied"):
        StoredWeights(tmp_path, config)
