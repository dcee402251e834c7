"""encore average: every public kind, in the first folder's dtype, with errors that name what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from encore.checkpoint import CheckpointError, averaging
from encore.checkpoint.averaging import average
from encore.checkpoint.pretrained import load, save

KINDS = ("gemma2", "gemma3_text", "gemma3", "t5gemma", "t5gemma_unbalanced", "t5gemma2")


def moved(folder: Path, out: Path, amount: float, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of a folder with noise on every tensor, pictures' parts too."""
    model = load(folder, dtype, vision="vision" in (folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(int(amount * 100))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator).to(dtype)
    save(model, out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_three_and_transformers_reads_it(
    kind: str, folders: dict[str, Path], reference: Callable[[Path], torch.nn.Module], tmp_path: Path
) -> None:
    sources = [folders[kind], *(moved(folders[kind], tmp_path / f"{i}", 0.1 * i) for i in (1, 2))]
    seen: list[tuple[int, int]] = []
    summary = average(sources, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    stored = [load_file(source / "model.safetensors") for source in sources]
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == stored[0].keys()
    for name, value in found.items():
        mean = torch.stack([tensors[name].double() for tensors in stored]).mean(0)
        assert torch.equal(value, mean.to(torch.float32)), name
        assert not torch.equal(value, stored[0][name]), name
    reference(tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((folders[kind] / name).read_text())
    assert seen[-1][0] == seen[-1][1] and summary.parameters == sum(value.numel() for value in found.values())
    told = json.loads((tmp_path / "out/encore_average.json").read_text())
    assert [entry["name"] for entry in told["averaged"]] == [kind, "1", "2"]
    assert str(tmp_path) not in json.dumps(told)


def test_the_first_folder_gives_the_dtype_and_pieces_change_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = moved(folders["gemma2"], tmp_path / "half", 0.1, torch.bfloat16)
    whole = moved(folders["gemma2"], tmp_path / "whole", 0.2)
    assert average([half, whole], tmp_path / "a").dtype == "bfloat16"
    monkeypatch.setattr(averaging, "_PIECE_ELEMENTS", 7)
    average([half, whole], tmp_path / "b", max_shard_bytes=9000)
    left, right = load(tmp_path / "a").state_dict(), load(tmp_path / "b").state_dict()
    assert {value.dtype for value in left.values()} == {torch.bfloat16}
    assert all(torch.equal(left[name], right[name]) for name in left)
    average([half, whole], tmp_path / "c", dtype="float32")
    wide = load(tmp_path / "c").state_dict()
    assert all(wide[name].dtype == torch.float32 and torch.equal(wide[name].bfloat16(), left[name]) for name in left)


def test_the_mean_is_rounded_once(folders: dict[str, Path], tmp_path: Path) -> None:
    """Sums in bfloat16 would lose the small one beside three large ones."""
    sources = []
    for i, value in enumerate((256.0, 256.0, 256.0, 2.0)):
        model = load(folders["gemma2"], torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        save(model, tmp_path / f"{i}")
        sources.append(tmp_path / f"{i}")
    average(sources, tmp_path / "out")
    expected = torch.tensor(770 / 4).bfloat16()
    assert all(bool((value == expected).all()) for value in load(tmp_path / "out").state_dict().values())


def test_what_does_not_fit_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    gemma = folders["gemma2"]
    with pytest.raises(ValueError, match="two or more folders, got 1"):
        average([gemma], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"are different models: decoder\.hidden_size is 32 and 16; "):
        average([folders["t5gemma"], folders["t5gemma_unbalanced"]], tmp_path / "out")
    with pytest.raises(CheckpointError, match="model_type is gemma2 and t5gemma2"):
        average([gemma, folders["t5gemma2"]], tmp_path / "out")
    with pytest.raises(CheckpointError, match="is or contains the source"):
        average([gemma, gemma], gemma, force=True)
    other = moved(gemma, tmp_path / "other", 0.1)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[31\]"):
        average([gemma, other], tmp_path / "out")
    tensors["model.norm.weight"] = torch.full((32,), float("nan"))
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mean of tensor model\.norm\.weight is not finite"):
        average([gemma, other], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]  # nothing is left of what failed
    average([gemma, gemma], tmp_path / "out")
    with pytest.raises(CheckpointError, match="--force"):
        average([gemma, gemma], tmp_path / "out")
    average([gemma, gemma], tmp_path / "out", force=True)
