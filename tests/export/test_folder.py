"""Exported folders: what they hold, what they say of themselves, and how a damaged one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from encore import assets
from encore.checkpoint.hub import resolve
from encore.export import ExportError
from encore.export.folder import export
from encore.export.manifest import MANIFEST_FILE, WEIGHTS_FILE, check_folder
from encore.generate.onnx_backend import OnnxModel
from encore.generate.sampling import SamplingSettings
from encore.generate.text import TextGenerator


@pytest.fixture(scope="module")
def whole(make: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "model"
    export(make("t5gemma2")[1], out, "int4", block_size=32)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def test_the_folder_is_all_that_generation_needs(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names >= {"encoder.onnx", "memory.onnx", "step.onnx", WEIGHTS_FILE, "config.json", "encore.json"}
    assert names >= {MANIFEST_FILE, "tokenizer.json"} and not [name for name in names if "safetensors" in name]
    for part in ("encoder", "memory", "step"):
        onnx.load(whole / f"{part}.onnx", load_external_data=False)
    assert check_folder(whole, thorough=True).parts == ("encoder", "memory", "step")


def test_provenance_states_bits_and_error(whole: Path, make: Callable, tmp_path: Path) -> None:
    said = json.loads((whole / MANIFEST_FILE).read_text())
    model, folder = make("t5gemma2")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert said["parameters_in_matrices"] == sum(p.numel() for p in matrices)
    assert (said["weights"], said["block_size"], said["activations"]) == ("int4", 32, "int8-rows")
    of_encoder = {p for name, p in model.named_parameters() if name.startswith("encoder.layers")}
    by_rows = sum(p.shape[0] * (p.shape[1] + 4) for p in matrices if p in of_encoder)
    padded = sum(p.shape[0] * -(-p.shape[1] // 32) * (16 + 4) for p in matrices if p not in of_encoder)
    assert said["bits_per_weight"] == pytest.approx(8 * (by_rows + padded) / said["parameters_in_matrices"], abs=1e-3)
    assert 0.05 < said["error"]["relative"] <= said["error"]["worst"] < 0.15
    assert set(said["source"]["sha256"]) == {"config.json", "model.safetensors"}
    eight = export(folder, tmp_path / "int8", "int8", block_size=32, activations="int8")
    assert eight.error < 0.1 * said["error"]["relative"]
    told: list[tuple[int, int]] = []
    exact = export(folder, tmp_path / "float32", "float32", progress=lambda *seen: told.append(seen))
    assert told[-1][0] == told[-1][1] == 4 * sum(p.numel() for p in matrices)
    assert (exact.error, exact.bits_per_weight) == (0.0, 32.0)
    assert str(tmp_path) not in (tmp_path / "float32" / MANIFEST_FILE).read_text()


def test_embedding_and_head_share_one_matrix(whole: Path) -> None:
    def places(part: str) -> dict[str, str]:
        graph = onnx.load(whole / f"{part}.onnx", load_external_data=False).graph
        stored = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in graph.initializer}
        return {name: entry["offset"] for name, entry in stored.items() if entry}

    step, encoder, memory = places("step"), places("encoder"), places("memory")
    name = "encoder.embed_tokens.weight.codes"
    assert step[name] == encoder[f"{name}_of_rows"]
    nodes = onnx.load(whole / "step.onnx", load_external_data=False).graph.node
    head = next(node for node in nodes if "logits" in node.output)
    assert name in head.input
    assert len(memory) == 2 * 4, "keys and values of every layer, codes and scales"
    size = (whole / WEIGHTS_FILE).stat().st_size
    said = json.loads((whole / MANIFEST_FILE).read_text())
    assert size < said["bits_per_weight"] * said["parameters_in_matrices"] / 8 + 4096 * len({*step.values()}) * 3


def test_the_encoder_alone(make: Callable, tmp_path: Path) -> None:
    summary = export(make("t5gemma")[1], tmp_path / "encoder", "int8", encoder_only=True)
    assert summary.parts == ("encoder",)
    assert not (tmp_path / "encoder" / "step.onnx").exists()
    model = OnnxModel.load(tmp_path / "encoder", part="encoder")
    memory = model.encode([[5, 6, 7]])
    assert memory.states.shape == (1, 3, 48)
    with pytest.raises(ExportError, match="cannot decode"):
        model.make_cache(memory, 3)
    with pytest.raises(ExportError, match="exported without its step graph; export the model again without"):
        OnnxModel.load(tmp_path / "encoder")


@pytest.mark.parametrize("name", ["encoder.onnx", "memory.onnx", "step.onnx", WEIGHTS_FILE])
def test_missing_and_damaged_files_are_named(copied: Path, name: str) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:-1])
    with pytest.raises(ExportError, match=f"{name} has {len(data) - 1} bytes, expected {len(data)}"):
        OnnxModel.load(copied)
    (copied / name).write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(ExportError, match=f"{name} is damaged"):
        check_folder(copied, thorough=True)
    (copied / name).unlink()
    with pytest.raises(ExportError, match=f"lacks {name}; export the model again"):
        OnnxModel.load(copied)


@pytest.mark.parametrize(
    ["text", "message"],
    [
        ("{", "is not valid JSON"),
        ("[]", "has the format"),
        ('{"format": 99}', "has the format 99, this version reads 4"),
        ('{"format": 4, "files": {}}', "does not name its files and parts"),
        ('{"format": 4, "files": {}, "parts": ["encoder", "../x"]}', "some are unknown or missing"),
        ('{"format": 4, "files": {}, "parts": ["encoder"]}', "does not describe encoder.onnx"),
    ],
)
def test_odd_manifests_are_refused(copied: Path, text: str, message: str) -> None:
    (copied / MANIFEST_FILE).write_text(text)
    with pytest.raises(ExportError, match=message):
        OnnxModel.load(copied)


def test_what_cannot_be_exported(make: Callable, whole: Path, tmp_path: Path) -> None:
    _, folder = make("t5gemma2")
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="weights is 'int5'; expected one of float32, int8"):
        export(folder, out, "int5")  # pyright: ignore
    with pytest.raises(ExportError, match="block_size is 48; expected one of 32, 64, 128"):
        export(folder, out, "int8", block_size=48)
    with pytest.raises(ExportError, match="float32 weights have no blocks"):
        export(folder, out, "float32", block_size=32)
    for weights in ("int4", "int8-head-int4", "int8"):  # of the last, there are too few words
        with pytest.raises(ExportError, match=f"over 64 words; .* has 61 words, and the weights are {weights}"):
            export(folder, out, weights, two_pass_head=True)  # pyright: ignore
    with pytest.raises(ExportError, match="is an export already"):
        export(whole, out)
    with pytest.raises(ExportError, match="holds a gemma3_text; only encoder-decoders are exported"):
        export("source", out)
    with pytest.raises(ExportError, match="is or contains the source"):
        export(folder, folder, force=True)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    with pytest.raises(ExportError, match="holds files already"):
        export(folder, out)
    export(folder, out, force=True)
    assert (out / "mine.txt").read_text() == "stays" and check_folder(out)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_shipped_translator(tmp_path: Path, weights: str) -> None:
    export("translator", tmp_path / "exported", weights)  # pyright: ignore
    said = json.loads((tmp_path / "exported" / MANIFEST_FILE).read_text())
    assert said["model_type"] == "t5gemma2" and said["source"]["name"] == "translator"
    settings = SamplingSettings(max_target_tokens=80, stop_ids=())  # past the window of 64
    texts = [row["src"] for _, row in zip(range(3), assets.read_jsonl("pairs/validation.jsonl"), strict=False)]
    ours = [a.generation.tokens for a in TextGenerator.load(tmp_path / "exported").generate(texts, settings)]
    theirs = [a.generation.tokens for a in TextGenerator.load(resolve("translator")).generate(texts, settings)]
    assert [len(tokens) for tokens in ours] == [80] * 3
    if weights == "float32":
        assert ours == theirs
    else:
        assert sum(a[:5] == b[:5] for a, b in zip(ours, theirs, strict=True)) >= 2
