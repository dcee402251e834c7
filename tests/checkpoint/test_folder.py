"""safetensors headers and indexes from anywhere: what is wrong is said, and nothing else happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from encore.checkpoint import CheckpointError
from encore.checkpoint.folder import read_folder, read_header, same_bytes, weight_files

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, header: Any, data: bytes = bytes(32), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def with_a(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "a": {**GOOD["a"], **changes}}


def test_a_good_file(tmp_path: Path) -> None:
    infos = read_header(write(tmp_path / "model.safetensors", {**GOOD, "__metadata__": {"format": "pt"}}))
    found = [(info.dtype, info.shape, info.num_bytes) for info in infos.values()]
    assert found == [("F32", (2, 3), 24), ("BF16", (4,), 8)]
    assert read_folder(tmp_path) == infos
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_mapping_is_private_and_exact(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "empty": torch.zeros(0, 4), "c": torch.randn(7).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    infos = read_folder(tmp_path)
    for name, tensor in tensors.items():
        assert infos[name].map().tobytes() == tensor.numpy().tobytes()
    infos["a"].map()[:] = np.uint8(255)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert same_bytes(infos["a"], infos["a"]) and not same_bytes(infos["a"], infos["c"])


def with_b_at(begin: int) -> dict[str, Any]:
    return {**GOOD, "b": {**GOOD["b"], "data_offsets": [begin, begin + 8]}}


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty file": (lambda p: p.write_bytes(b""), "truncated or no safetensors file"),
    "truncated": (lambda p: write(p, GOOD, bytes(31)), "tensor b ends at data byte 32 but the file holds 31"),
    "longer": (lambda p: write(p, GOOD, bytes(33)), "its tensors end at"),
    "header bomb": (lambda p: write(p, GOOD, length=2**63), "its header claims 9223372036854775808"),
    "header beyond the end": (lambda p: write(p, GOOD, length=10_000), "its header claims 10000"),
    "no JSON": (lambda p: write(p, b"{a}", b""), "not valid JSON"),
    "nested": (lambda p: write(p, b"[" * 200_000, b""), "not valid JSON"),
    "huge number": (lambda p: write(p, b'{"a":' + b"9" * 10_000 + b"}", b""), "not valid JSON"),
    "no object": (lambda p: write(p, [], b""), "expected a JSON object"),
    "doubled": (
        lambda p: write(p, b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":1}', b"1"),
        "'a' stands there twice",
    ),
    "entry": (lambda p: write(p, {**GOOD, "a": 1}), "tensor a: expected an object with dtype"),
    "dtype": (lambda p: write(p, with_a(dtype="F33")), "tensor a: unknown dtype 'F33'"),
    "dtype type": (lambda p: write(p, with_a(dtype=["F32"])), r"tensor a: unknown dtype \['F32'\]"),
    "shape": (lambda p: write(p, with_a(shape=[2, -3])), "tensor a: shape"),
    "shape type": (lambda p: write(p, with_a(shape="6")), "tensor a: shape"),
    "shape bomb": (lambda p: write(p, with_a(shape=[2**40, 2**40])), "data_offsets give 24"),
    "dimensions": (lambda p: write(p, with_a(shape=[1] * 1000)), "tensor a: shape"),
    "size": (lambda p: write(p, with_a(shape=[2, 4])), r"a: \[2, 4\] of F32 needs 32 bytes, data_offsets give 24"),
    "offsets": (lambda p: write(p, with_a(data_offsets=[24, 0])), "tensor a: data_offsets"),
    "offsets type": (lambda p: write(p, with_a(data_offsets=[0.0, 24.0])), "tensor a: data_offsets"),
    "beyond": (lambda p: write(p, with_a(data_offsets=[32, 56])), "tensor a ends at data byte 56"),
    "overlap": (lambda p: write(p, with_b_at(16), bytes(24)), "tensor b starts at"),
    "gap": (lambda p: write(p, with_b_at(26), bytes(34)), "tensor b starts at"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_folder(tmp_path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_wherever_the_safetensors_library_refuses_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = json.dumps(GOOD).encode()
    blob = bytearray(len(text).to_bytes(8, "little") + text + bytes(32))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 33))] = data.draw(st.integers(0, 255))
    del blob[data.draw(st.sampled_from([len(blob), len(blob) - 1, 20])) :]
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(blob)
    try:
        theirs = load(bytes(blob))
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, AttributeError):
        theirs = None
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    assert theirs is not None and ours.keys() == theirs.keys()


INDEX_ERRORS: dict[str, tuple[Any, str]] = {
    "no map": ({}, "weight_map is missing or empty"),
    "no object": ([], "expected a JSON object"),
    "absent file": ({"weight_map": {"a": "two.safetensors"}}, r"tensor a points to two\.safetensors, which does not"),
    "parent": ({"weight_map": {"a": "../outside.safetensors"}}, r"a points to '\.\./outside\.safetensors', no file"),
    "deep parent": ({"weight_map": {"a": "x/../../outside.safetensors"}}, "no file of the folder"),
    "absolute": ({"weight_map": {"a": "/etc/x.safetensors"}}, "no file of the folder"),
    "other system": ({"weight_map": {"a": "..\\outside.safetensors"}}, "no file of the folder"),
    "drive": ({"weight_map": {"a": "C:x.safetensors"}}, "no file of the folder"),
    "pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "no file of the folder"),
    "no name": ({"weight_map": {"a": 3}}, "no file of the folder"),
    "not in the file": (
        {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}},
        "says that tensor c lies in one.safetensors, but it does not",
    ),
    "not in the index": ({"weight_map": {"a": "one.safetensors"}}, "tensor b lies in .* does not list it"),
}


@pytest.mark.parametrize("case", INDEX_ERRORS)
def test_wrong_indexes(case: str, tmp_path: Path) -> None:
    index, message = INDEX_ERRORS[case]
    folder = tmp_path / "model"
    (folder / "x").mkdir(parents=True)
    write(folder / "one.safetensors", GOOD)
    write(tmp_path / "outside.safetensors", GOOD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_folder(folder)


def test_links_are_followed_as_in_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blobs/0123", GOOD)
    (tmp_path / "snapshot/one.safetensors").symlink_to("../blobs/0123")
    index = {"weight_map": dict.fromkeys(GOOD, "one.safetensors")}
    (tmp_path / "snapshot/model.safetensors.index.json").write_text(json.dumps(index))
    assert read_folder(tmp_path / "snapshot").keys() == GOOD.keys()
    assert [path.name for path in weight_files(tmp_path / "snapshot")] == [
        "model.safetensors.index.json",
        "one.safetensors",
    ]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_folder(tmp_path)
