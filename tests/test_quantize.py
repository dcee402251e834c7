"""Packed weights in safetensors: rounding against slow oracles, the torch path, and the same weights in graphs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import encore
from encore import assets
from encore.checkpoint import CheckpointError
from encore.checkpoint.packed import PackedLinear, unpack
from encore.checkpoint.packing import KEY, is_packed_matrix
from encore.cli import app
from encore.config import T5GemmaConfig
from encore.export.folder import export
from encore.generate.onnx_backend import OnnxModel
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.quantize import calibrate
from encore.quantize.blocks import dequantise, nearest_scales, packed, quantise, searched_scales
from encore.quantize.folder import quantize
from encore.quantize.gptq import DAMPING, Rounding

PAIRS = "asset:pairs/train"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped translator's shape with fewer layers, and columns that fill no whole block."""
    import dataclasses

    config = encore.load("translator").config
    assert isinstance(config, T5GemmaConfig)
    sizes = {"num_hidden_layers": 2, "hidden_size": 80, "intermediate_size": 112, "num_attention_heads": 2}
    kinds = ("sliding_attention", "full_attention")
    stack = dataclasses.replace(config.encoder, **sizes, layer_types=kinds, num_key_value_heads=1, head_dim=32)
    model = T5Gemma(dataclasses.replace(config, encoder=stack, decoder=stack, extra={}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    encore.save(model.eval(), folder, tokenizer=encore.load_tokenizer(assets.path("tokenizer")))
    return folder


# --- rounding --------------------------------------------------------------------------------------------------------


def inputs(num_columns: int, seed: int = 0) -> NDArray[np.float32]:
    """Inputs (tokens, K) as real ones are: columns that go together, and some much larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((400, 12)) @ rng.standard_normal((12, num_columns))
    return ((mixed + 0.3 * rng.standard_normal(mixed.shape)) * rng.lognormal(0, 1, num_columns)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_columns", [32, 80, 200])
def test_gptq_is_the_slow_elimination(num_columns: int, bits: int) -> None:
    """Column by column, the inverse of H without those that are done: Optimal Brain Quantization, word by word."""
    rng = np.random.default_rng(num_columns)
    weight, x = rng.standard_normal((6, num_columns)).astype(np.float32), inputs(num_columns)
    hessian = (x.T @ x).astype(np.float64)
    rounding = Rounding(hessian)
    codes, scales = rounding.quantise(weight, bits, 32)
    half = 1 << (bits - 1)
    inverse = np.linalg.inv(hessian + DAMPING * np.trace(hessian) / num_columns * np.eye(num_columns))
    left, expected = weight.astype(np.float64), np.zeros((6, num_columns))
    by_column = np.repeat(scales, 32, axis=1).astype(np.float64)
    for i in np.argsort(-np.diagonal(hessian), kind="stable"):
        level = np.clip(np.rint(left[:, i] / by_column[:, i]), -half, half - 1)
        expected[:, i] = level * by_column[:, i]
        left -= np.outer((left[:, i] - expected[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1  # done: never read again
    found = dequantise(codes, scales, bits, num_columns)
    assert np.mean(np.abs(found - expected) > 1e-4) < 0.01, "but for levels at the very middle"


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_errs_less_where_it_counts(bits: int) -> None:
    weight, x = np.random.default_rng(1).standard_normal((64, 160)).astype(np.float32), inputs(160)

    def error(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> float:
        return float(np.linalg.norm((dequantise(codes, scales, bits, 160) - weight) @ inputs(160, 0).T))

    nearest, calibrated = error(*quantise(weight, bits, 32)), error(*Rounding(x.T @ x).quantise(weight, bits, 32))
    assert calibrated < 0.6 * nearest


def test_gptq_without_preferences_rounds_to_nearest() -> None:
    weight = np.random.default_rng(2).standard_normal((16, 96)).astype(np.float32)
    codes, scales = Rounding(np.eye(96)).quantise(weight, 4, 32)
    np.testing.assert_array_equal(scales, searched_scales(weight, 4, 32))
    np.testing.assert_array_equal(codes, packed(weight, scales, 4, 32))


def test_searched_scales_err_less_and_mind_what_counts() -> None:
    weight = np.random.default_rng(3).standard_normal((50, 128)).astype(np.float32)
    importance = np.where(np.arange(128) % 32 == 3, 100.0, 1.0).astype(np.float32)

    def error(scales: NDArray[np.float32], weights: NDArray[np.float32]) -> float:
        found = dequantise(packed(weight, scales, 4, 32), scales, 4, 128)
        return float((np.square(found - weight) * weights).sum())

    plain, minding = searched_scales(weight, 4, 32), searched_scales(weight, 4, 32, importance)
    even = np.ones(128, np.float32)
    assert error(plain, even) < 0.95 * error(nearest_scales(weight, 4, 32), even)
    assert error(minding, importance) < 0.8 * error(plain, importance)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ["weights", "block_size"], [("int8", 128), ("int8", 32), ("int4", 32), ("int4", 64), ("int8-head-int4", 32)]
)
def test_torch_computes_with_what_was_packed(tiny: Path, tmp_path: Path, weights: str, block_size: int) -> None:
    summary = quantize(tiny, tmp_path / "packed", weights, block_size=block_size)  # pyright: ignore
    exact, model = encore.load(tiny), encore.load(tmp_path / "packed")
    assert isinstance(exact, T5Gemma) and isinstance(model, T5Gemma)
    bits = {"int8": (8, 8), "int4": (4, 4), "int8-head-int4": (8, 4)}[weights]
    num_bits = num_weights = 0
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if is_packed_matrix(name):
                of_this = bits[name.endswith("embed_tokens.weight")]
                codes, scales = quantise(parameter.numpy(), of_this, block_size)
                num_bits += 8 * codes.size + 32 * scales.size
                num_weights += parameter.numel()
                parameter.copy_(torch.from_numpy(dequantise(codes, scales, of_this, parameter.shape[1])))
        source, target = torch.randint(3, 900, (2, 90)), torch.randint(3, 900, (2, 70))
        torch.testing.assert_close(model(source, target), exact(source, target), atol=1e-5, rtol=1e-5)
    assert summary.bits_per_weight == pytest.approx(num_bits / num_weights, abs=1e-3)
    assert isinstance(model.decoder.layers[1].mlp.up_proj, PackedLinear)  # pyright: ignore
    alone = encore.load(tmp_path / "packed", part="encoder")
    torch.testing.assert_close(alone(source).states, exact.encode(source).states, atol=1e-5, rtol=1e-5)
    half = encore.load(tmp_path / "packed", dtype="bfloat16")
    assert half(source, target).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="unpack weights before save"):
        encore.save(model, tmp_path / "again")


def test_unpacking_is_the_same_in_torch_and_numpy() -> None:
    for bits in (4, 8):
        codes, scales = quantise(np.random.default_rng(bits).standard_normal((7, 100)).astype(np.float32), bits, 32)
        found = unpack(torch.from_numpy(codes), torch.from_numpy(scales), bits, 100)
        np.testing.assert_array_equal(found.numpy(), dequantise(codes, scales, bits, 100))


def test_a_decoder_only_model(tmp_path: Path) -> None:
    quantize("source", tmp_path / "packed", "int8")
    exact, model = encore.load("source"), encore.load(tmp_path / "packed", dtype="float32")
    assert isinstance(exact, Gemma) and isinstance(model, Gemma)
    tokens = torch.tensor([encore.load_tokenizer("source").encode("The river is wide", bos=True)])
    with torch.no_grad():
        difference = (model(tokens) - exact.float()(tokens)).norm() / exact(tokens).norm()
    assert 0 < difference < 0.05


def test_packed_folders_are_exported_as_they_are(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "packed", "int4", block_size=64)
    export(tmp_path / "packed", tmp_path / "one")
    export(tiny, tmp_path / "two", "int4", block_size=64, activations="int8")
    one, two = (json.loads((tmp_path / name / "encore_export.json").read_text()) for name in ("one", "two"))
    assert one["files"] == two["files"], "graphs and weights, to the byte"
    assert one["source"]["sha256"] == two["source"]["sha256"]
    assert one["error"]["relative"] == pytest.approx(two["error"]["relative"], rel=1e-4)
    with pytest.raises(ValueError, match="holds int4 weights in blocks of 64; asked for was int8 in blocks of 64"):
        export(tmp_path / "packed", tmp_path / "three", "int8")
    with pytest.raises(CheckpointError, match="holds packed weights already"):
        quantize(tmp_path / "packed", tmp_path / "three")
    quantize(tiny, tmp_path / "packed8", "int8")
    export(tmp_path / "packed8", tmp_path / "four", two_pass_head=True)
    export(tiny, tmp_path / "five", "int8", two_pass_head=True, activations="int8")
    four, five = (json.loads((tmp_path / name / "encore_export.json").read_text()) for name in ("four", "five"))
    assert four["files"] == five["files"] and four["two_pass_head"]
    export(tmp_path / "packed8", tmp_path / "six", head_preview=64)
    export(tiny, tmp_path / "seven", "int8", head_preview=64, activations="int8")
    six, seven = (json.loads((tmp_path / name / "encore_export.json").read_text()) for name in ("six", "seven"))
    assert six["files"] == seven["files"] and six["head_preview"]["width"] == 64


def test_calibration_reads_real_text_and_helps(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to the exact model on text it did not read; the same bytes each time, whatever the groups."""
    told: list[tuple[int, int]] = []
    options = {"calibrate": [PAIRS], "num_examples": 24, "progress": lambda *seen: told.append(seen)}
    summary = quantize(tiny, tmp_path / "one", "int4", **options)
    again = quantize(tiny, tmp_path / "two", "int4", **options)
    assert summary.method == "gptq" and (summary.error, summary.num_bytes) == (again.error, again.num_bytes)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert told[-1][0] == told[-1][1] and told[-1][0] % 24 == 0
    said = json.loads((tmp_path / "one" / "config.json").read_text())[KEY]
    assert said["calibration"] == {"files": [PAIRS], "examples": 24, "max_tokens": 512}
    quantize(tiny, tmp_path / "nearest", "int4")
    monkeypatch.setattr(calibrate.Calibration.__init__, "__kwdefaults__", {"budget": 1})  # a group for each matrix
    quantize(tiny, tmp_path / "layers", "int4", **options)
    tokenizer, held_out = encore.load_tokenizer(tiny), list(assets.read_jsonl("pairs/test.jsonl"))[:15]

    def error(name: str) -> float:
        exact, model = encore.load(tiny), encore.load(tmp_path / name)
        assert isinstance(exact, T5Gemma) and isinstance(model, T5Gemma)
        total = 0.0
        for row in held_out:
            source = torch.tensor([tokenizer.encode_source(row["src"])])
            target = torch.tensor([[tokenizer.bos_id, *tokenizer.encode_target(row["tgt"])[:-1]]])
            with torch.no_grad():
                total += float((model(source, target) - exact(source, target)).square().sum())
        return math.sqrt(total)

    nearest = error("nearest")
    assert max(error("one"), error("layers")) < 0.95 * nearest


def test_texts_calibrate_too(tmp_path: Path) -> None:
    tokenizer = encore.load_tokenizer("source")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"One river, {i} boats."}) for i in range(5)))
    names = [str(tmp_path / "texts.jsonl")]
    limits = {"num_examples": 3, "max_tokens": 4}
    both = calibrate.examples(names, tokenizer, encoder_decoder=True, **limits)
    alone = calibrate.examples(names, tokenizer, encoder_decoder=False, **limits)
    ids = tokenizer.encode("One river, 0 boats.")[:8]
    assert len(both) == len(alone) == 3
    assert both[0].source == ids[: len(ids) // 2] and both[0].target == [tokenizer.bos_id, *ids[len(ids) // 2 :]][:4]
    assert alone[0] == calibrate.Example([], [tokenizer.bos_id, *ids][:4])
    (tmp_path / "other.jsonl").write_text('{"words": "?"}\n')
    with pytest.raises(ValueError):
        calibrate.examples([str(tmp_path / "other.jsonl")], tokenizer, encoder_decoder=True, **limits)


@pytest.mark.parametrize("damage", ["shape", "missing", "key"])
def test_damaged_folders_are_refused(tiny: Path, tmp_path: Path, damage: str) -> None:
    quantize(tiny, tmp_path / "packed", "int4", block_size=32)
    path, config = tmp_path / "packed" / "model.safetensors", tmp_path / "packed" / "config.json"
    tensors, name = load_file(path), "model.decoder.layers.0.mlp.up_proj.weight"
    if damage == "key":
        raw = json.loads(config.read_text())
        config.write_text(json.dumps({**raw, KEY: {**raw[KEY], "bits": 5}}))
    else:
        changed = {key: value for key, value in tensors.items() if key != name}
        save_file(changed if damage == "missing" else {**changed, name: tensors[name][:, :1]}, path)
    expected = {"shape": "up_proj.weight is U8", "missing": "lacks the tensor decoder.layers.0.mlp.up_proj.weight"}
    with pytest.raises(CheckpointError, match=expected.get(damage, "expected 4 or 8 bits in blocks")):
        encore.load(tmp_path / "packed")


def test_the_verb(tiny: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["quantize", str(tiny), str(tmp_path / "packed"), "--weights", "int8", "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["weights"] == "int8" and summary["method"] == "round to nearest"
    done = runner.invoke(app, ["info", str(tmp_path / "packed"), "--json"])
    assert json.loads(done.stdout)["packed_weights"]["bits_per_weight"] == summary["bits_per_weight"]
    assert (
        f"{summary['bits_per_weight']:.2f} bits per weight"
        in runner.invoke(app, ["info", str(tmp_path / "packed")]).stdout
    )
    arguments = ["export", str(tiny), str(tmp_path / "graphs"), "--weights", "int4", "--calibrate", PAIRS]
    done = runner.invoke(app, [*arguments, "--examples", "4", "--cache", "int8"])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "graphs" / "encore_export.json").read_text())
    assert (said["method"], said["cache"], said["calibration"]["examples"]) == ("gptq", "int8", 4)
    assert said["source"]["name"] == "model" and len(OnnxModel.load(tmp_path / "graphs").encode([[5, 6]]).lengths) == 1
