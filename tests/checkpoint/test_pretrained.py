"""Folders of transformers read by us and ours read by transformers: equal tensors, equal logits, clear errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from encore.checkpoint import CheckpointError
from encore.checkpoint.folder import TensorInfo
from encore.checkpoint.pretrained import load, read_config, save
from encore.config import GemmaConfig, T5GemmaConfig

KINDS = ("gemma2", "gemma3_text", "gemma3", "t5gemma", "t5gemma_unbalanced", "t5gemma2")
TOLERANCE = 3e-5

Reference = Callable[[Path], torch.nn.Module]
Difference = Callable[[torch.nn.Module, torch.nn.Module], float]
Stored = Callable[[Path], dict[str, torch.Tensor]]


def rewrite(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], Any], stored: Stored) -> Path:
    """A copy of a folder whose tensors were changed."""
    shutil.copytree(folder, copy)
    tensors = stored(copy)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, copy / "model.safetensors")
    return copy


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def small_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_reference_both_ways(
    kind: str, folders: dict[str, Path], reference: Reference, difference: Difference, tmp_path: Path
) -> None:
    ours = load(folders[kind])
    assert not ours.training
    assert difference(ours, reference(folders[kind])) < TOLERANCE
    save(ours, tmp_path / "ours")
    assert difference(ours, reference(tmp_path / "ours")) < TOLERANCE
    assert difference(load(tmp_path / "ours"), reference(folders[kind])) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vision", [False, True])
def test_what_we_write_is_what_transformers_writes(
    kind: str, vision: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    if vision and kind not in ("gemma3", "t5gemma2"):
        with pytest.raises(CheckpointError, match="no vision tower"):
            load(folders[kind], vision=True)
        return
    model = load(folders[kind], vision=vision)
    assert any("vision_tower" in name for name, _ in model.named_parameters()) == vision
    save(model, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folders[kind] / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (folders[kind] / "config.json").read_text()
    )
    assert (tmp_path / "out/generation_config.json").read_bytes() == (
        folders[kind] / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize("kind", ["gemma3", "t5gemma2"])
def test_shards_on_both_sides(
    kind: str, folders: dict[str, Path], reference: Reference, stored: Stored, difference: Difference, tmp_path: Path
) -> None:
    theirs = reference(folders[kind])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load(tmp_path / "theirs", vision=True)
    assert difference(ours, theirs) < TOLERANCE
    save(ours, tmp_path / "ours", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "ours").glob("*.safetensors")}
    assert all(path.stat().st_size < 50_000 for path in (tmp_path / "ours").glob("*.safetensors"))
    before, after = stored(folders[kind]), stored(tmp_path / "ours")
    assert before.keys() == after.keys() == index["weight_map"].keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in before.values())
    assert difference(ours, reference(tmp_path / "ours")) < TOLERANCE


def test_saving_whole_over_shards_leaves_no_old_shard(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["gemma2"])
    save(model, tmp_path / "out", max_shard_bytes=20_000)
    (tmp_path / "out/notes.txt").write_text("mine")
    save(model, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}


def test_saving_into_the_folder_that_was_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["t5gemma2"], tmp_path / "model")
    before = small_files(tmp_path / "model")
    save(load(tmp_path / "model"), tmp_path / "model")
    after = small_files(tmp_path / "model")
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after.keys() == before.keys()


def test_bfloat16_and_float16_come_back_bit_for_bit(
    folders: dict[str, Path], reference: Reference, stored: Stored, tmp_path: Path
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        reference(folders["t5gemma"]).to(dtype).save_pretrained(tmp_path / f"{dtype}")
        model = load(tmp_path / f"{dtype}")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        save(model, tmp_path / f"{dtype}-ours")
        name = str(dtype).removeprefix("torch.")
        assert json.loads((tmp_path / f"{dtype}-ours/config.json").read_text())["dtype"] == name
        assert (tmp_path / f"{dtype}/model.safetensors").read_bytes() == (
            tmp_path / f"{dtype}-ours/model.safetensors"
        ).read_bytes()


def test_dtype_converts_and_is_checked(folders: dict[str, Path], stored: Stored, tmp_path: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        model = load(folders["gemma3_text"], dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    table = stored(folders["gemma3_text"])["model.embed_tokens.weight"]
    assert torch.equal(model.embed_tokens.weight, table.bfloat16())
    for wrong in ("bf16", "int8", torch.int64, "Tensor"):
        with pytest.raises(ValueError, match=r"dtype is .*expected one of"):
            load(folders["gemma3_text"], dtype=wrong)
    save(load(folders["gemma3"], dtype="bfloat16"), tmp_path / "out")  # the borrowed tower follows
    assert {value.dtype for value in stored(tmp_path / "out").values()} == {torch.bfloat16}


def test_device_is_checked(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="device is 'nowhere'"):
        load(folders["gemma2"], device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            load(folders["gemma2"], device="cuda")


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma_unbalanced", "t5gemma2"])
def test_the_encoder_alone_reads_no_decoder_tensor(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[str] = []
    original = TensorInfo.map

    def spy(info: TensorInfo) -> Any:
        mapped.append(info.name)
        return original(info)

    monkeypatch.setattr(TensorInfo, "map", spy)
    encoder = load(folders[kind], part="encoder")
    assert mapped and all(name.startswith("model.encoder.") for name in mapped)
    tokens = torch.arange(3, 12)[None]
    whole = load(folders[kind])
    with torch.no_grad():
        assert torch.equal(encoder(tokens).states, whole.encode(tokens).states)
    with pytest.raises(ValueError, match="whole models"):
        save(encoder, folders[kind].parent / "never")
    assert not (folders[kind].parent / "never").exists()


def test_a_decoder_only_model_has_no_encoder(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no encoder"):
        load(folders["gemma2"], part="encoder")
    with pytest.raises(ValueError, match="part is 'decoder'"):
        load(folders["t5gemma"], part="decoder")  # type: ignore[arg-type]


def test_tied_embeddings_stay_tied_and_parameters_train(folders: dict[str, Path]) -> None:
    model = load(folders["t5gemma2"])
    assert model.decoder.embed_tokens.weight is model.encoder.embed_tokens.weight
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert load(folders["t5gemma"]).decoder.embed_tokens.weight.shape == (64, 32)


def test_the_loaded_model_does_not_change_with_its_file(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gemma2"], tmp_path / "model")
    model = load(tmp_path / "model")
    before = model.norm.weight.detach().clone()
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model.norm.weight, before)
    with torch.no_grad():
        model.norm.weight.fill_(7.0)
    assert path.read_bytes().count(0) == path.stat().st_size


def test_files_that_belong_to_a_checkpoint_go_along(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["t5gemma2"], tmp_path / "model")
    carried = ("tokenizer.json", "tokenizer.model", "encore.json", "LICENSE", "Gemma_Terms.md", "NOTICE.txt")
    for name in carried:
        (tmp_path / "model" / name).write_text(name)
    (tmp_path / "model/README.md").write_text("a card of the old model")

    class Own:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("own")

    model = load(tmp_path / "model")
    save(model, tmp_path / "out", tokenizer=Own())
    found = small_files(tmp_path / "out")
    assert found["tokenizer.json"] == b"own"
    assert all(found[name] == name.encode() for name in carried[1:])
    assert "README.md" not in found
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is gone"):  # the tower was never loaded
        save(model, tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_unknown_keys_are_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["t5gemma2"], tmp_path / "model")
    change_config(tmp_path / "model", my_note={"a": [1]}, eos_token_id=[1, 9])
    save(load(tmp_path / "model"), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["my_note"] == {"a": [1]} and written["eos_token_id"] == [1, 9]


def test_a_t5gemma2_without_pictures(
    folders: dict[str, Path], reference: Reference, difference: Difference, stored: Stored, tmp_path: Path
) -> None:
    """The stand-in tower: transformers finds every tensor, and we neither build nor read it."""
    from dataclasses import replace

    from encore.model.t5gemma import T5Gemma

    model = load(folders["t5gemma2"])
    bare = T5Gemma(replace(model.config, vision=None, extra={}))
    bare.load_state_dict(model.state_dict())
    save(bare, tmp_path / "bare")
    raw = json.loads((tmp_path / "bare/config.json").read_text())
    assert raw["text_only"] is True
    assert sum(value.numel() for name, value in stored(tmp_path / "bare").items() if "vision" in name) < 20_000
    again = load(tmp_path / "bare")
    assert again.config.vision is None
    assert difference(again, reference(tmp_path / "bare")) < TOLERANCE
    assert difference(again, reference(folders["t5gemma2"])) < TOLERANCE
    with pytest.raises(CheckpointError, match="no vision tower"):
        load(tmp_path / "bare", vision=True)
    save(again, tmp_path / "again")
    assert small_files(tmp_path / "again") == small_files(tmp_path / "bare")


ERRORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("model.decoder.norm.weight"), r"lacks the tensors model\.decoder\.norm\.weight"),
    "surplus": (lambda t: t.update(stray=torch.zeros(2)), r"does not describe, the tensors stray"),
    "misshapen": (
        lambda t: t.update({"model.decoder.norm.weight": torch.zeros(33)}),
        r"model\.decoder\.norm\.weight has shape \[33\], but config\.json makes it \[32\]",
    ),
    "dtype": (
        lambda t: t.update({"model.decoder.norm.weight": torch.zeros(32, dtype=torch.int8)}),
        r"model\.decoder\.norm\.weight is stored as I8",
    ),
    "tied": (
        lambda t: t.update({"lm_head.out_proj.weight": torch.zeros(64, 32)}),
        r"lm_head\.out_proj\.weight should be tied to model\.encoder\.embed_tokens\.weight but differs",
    ),
    "twice": (
        lambda t: t.update({"decoder.norm.weight": torch.zeros(32)}),
        r"decoder\.norm\.weight .*are the same one, decoder\.norm\.weight",
    ),
    "many": (lambda t: [t.pop(n) for n in list(t) if "decoder.layers.1" in n], r"and 8 more"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_tensors_that_do_not_fit_the_config(
    case: str, folders: dict[str, Path], stored: Stored, tmp_path: Path
) -> None:
    change, message = ERRORS[case]
    folder = rewrite(folders["t5gemma2"], tmp_path / "model", change, stored)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_config_that_promises_too_much_fails_before_memory_is_spent(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gemma2"], tmp_path / "model")
    change_config(tmp_path / "model", hidden_size=2**20, intermediate_size=2**24, vocab_size=2**24)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight has shape \[64, 32\]"):
        load(tmp_path / "model")  # 10 PB


def test_a_model_that_was_changed_is_not_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["gemma2"])
    model.layers[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"layers\.0\.adapter\.weight"):
        save(model, tmp_path / "out")
    model = load(folders["gemma3"])
    model.origin = None
    with pytest.raises(CheckpointError, match="comes from no folder"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_read_config_of_every_kind(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        config = read_config(folder)
        assert config.model_type == kind.removesuffix("_unbalanced")
        stack = config.stack if isinstance(config, GemmaConfig) else config.encoder
        assert (stack.hidden_size, stack.sliding_window, stack.head_dim) == (32, 4, 8)
        assert (config.vision is not None) == (kind in ("gemma3", "t5gemma2"))
    config = read_config(folders["t5gemma2"])
    assert isinstance(config, T5GemmaConfig) and (config.eoi_token_index, config.image_token_index) == (60, 61)


MEMORY = """
import sys, torch
from encore.checkpoint.pretrained import load
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
load(sys.argv[1])  # everything that is imported on use
for dtype in (None, "bfloat16"):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    model = load(sys.argv[2], dtype=dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(status("VmHWM") - before, size)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_peak_memory_of_loading(folders: dict[str, Path], tmp_path: Path) -> None:
    """At most one tensor (as stored) beyond the final size, and a little for the headers; converted or not."""
    from dataclasses import replace

    from encore.model.gemma import Gemma

    config = read_config(folders["gemma3_text"])
    assert isinstance(config, GemmaConfig)
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14}
    stack = replace(config.stack, **sizes, layer_types=("sliding_attention",) * 14)
    save(Gemma(replace(config, stack=stack)), tmp_path / "large")
    command = [sys.executable, "-c", MEMORY, str(folders["gemma3_text"]), str(tmp_path / "large")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    stored_table = 8192 * 512 * 4
    for line, smallest in zip(lines, (190e6, 95e6), strict=True):
        peak, size = map(int, line.split())
        assert size > smallest
        assert peak < size + stored_table + 12e6
