"""Files as the safetensors library writes them; folders that appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from encore.checkpoint import CheckpointError
from encore.checkpoint.folder import read_folder
from encore.checkpoint.pretrained import tensor_pieces
from encore.checkpoint.writing import OutputTensor, new_folder, write_weights

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def output(name: str, tensor: torch.Tensor) -> OutputTensor:
    return OutputTensor(name, CODES[tensor.dtype], tuple(tensor.shape), lambda: tensor_pieces(tensor))


def test_the_file_equals_that_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4),
        "a": torch.randn(5).bfloat16(),
        "z.ö": torch.randn(2, 2).T.double(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    (tmp_path / "ours").mkdir()
    write_weights(tmp_path / "ours", [output(name, tensor) for name, tensor in tensors.items()])
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_hold_at_most_what_is_asked(tmp_path: Path) -> None:
    tensors = [output(f"t{i}", torch.full((i + 1,), float(i))) for i in range(10)]
    told: list[int] = []
    files = write_weights(tmp_path, tensors, max_shard_bytes=60, progress=told.append)
    assert sum(told) == sum(tensor.num_bytes for tensor in tensors) == 220
    infos = read_folder(tmp_path)
    assert len(infos) == 10
    for path in files[:-1]:
        assert sum(info.num_bytes for info in infos.values() if info.path == path) <= 60
    write_weights(tmp_path, tensors[9:], max_shard_bytes=8)  # one tensor larger than a shard has one alone
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        write_weights(tmp_path, tensors, max_shard_bytes=0)


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    with pytest.raises(RuntimeError, match="midway"), new_folder(tmp_path / "out") as staged:
        (staged / "config.json").write_text("new")
        raise RuntimeError("midway")
    with pytest.raises(RuntimeError, match="midway"), new_folder(tmp_path / "fresh"):
        raise RuntimeError("midway")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/config.json").read_text() == "old"


def test_other_files_stay_and_old_weights_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for name in ("config.json", "notes.txt", "sub/deep.txt", "model-00001-of-00002.safetensors"):
        (out / name).write_text("old")
    (out / "link").symlink_to("notes.txt")
    with new_folder(out) as staged:
        (staged / "config.json").write_text("new")
    assert {path.name for path in out.iterdir()} == {"config.json", "notes.txt", "sub", "link"}
    assert (out / "config.json").read_text() == "new" and (out / "sub/deep.txt").read_text() == "old"
    assert (out / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as staged:
        (staged / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/config.json").read_text() == "new"


def test_a_mount_point_is_filled_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "model.safetensors").write_text("old")
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(out))
    before = out.stat().st_ino
    with new_folder(out) as staged:
        assert staged.parent == out
        (staged / "config.json").write_text("new")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"config.json": "new", "notes.txt": "mine"}
    assert out.stat().st_ino == before


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="is a file"), new_folder(tmp_path / "out"):
        pass


KILLED = """
import sys, time
from pathlib import Path
from encore.checkpoint.writing import OutputTensor, new_folder, write_weights
def slow():
    for _ in range(1000):
        yield bytes(1000)
        print("piece", flush=True)
        time.sleep(0.05)
with new_folder(Path(sys.argv[1])) as staged:
    write_weights(staged, [OutputTensor("a", "U8", (1_000_000,), slow)])
"""


def test_a_killed_process_leaves_no_half_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"piece\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.01)
    assert [path.name for path in out.iterdir()] == ["config.json"]
