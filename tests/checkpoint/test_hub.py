"""Names to folders: paths, shipped models, hub names with and without a network, gated models."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from encore.checkpoint import CheckpointError
from encore.checkpoint.hub import carried_files, resolve, shipped_models
from encore.checkpoint.pretrained import load, read_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SERVED: dict[str, bytes] = {}


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one model, `some/model`; `gated/model` asks for its licence; nothing else exists."""

    def do_GET(self) -> None:
        headers: dict[str, str] = {}
        status, body = 200, b"{}"
        if "gated/" in self.path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif "some/model" not in self.path:
            status, headers = 401, {"X-Error-Code": "RepoNotFound"}
        elif "/revision/" in self.path:
            body = json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode()
        elif "/tree/" in self.path:
            rows = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in SERVED.items()]
            body = json.dumps(rows).encode()
        else:
            name = self.path.partition("?")[0].partition(f"{COMMIT}/")[2]
            body, headers = SERVED[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_gated_model_explains_what_to_do(hub: None) -> None:
    with pytest.raises(CheckpointError, match=r"gated/model is gated: accept its licence at https://huggingface\.co/"):
        resolve("gated/model")


def test_a_hub_name_is_fetched_without_the_files_that_nobody_needs(folders: dict[str, Path], hub: None) -> None:
    SERVED.update({path.name: path.read_bytes() for path in folders["gemma2"].iterdir()})
    SERVED.update({"LICENSE": b"terms", "pytorch_model.bin": b"pickle", "original/model.safetensors": b"other"})
    folder = resolve("some/model")
    unneeded = {"pytorch_model.bin", "original/model.safetensors"}
    assert {path.name for path in folder.iterdir()} == SERVED.keys() - unneeded
    ours, local = load("some/model"), load(folders["gemma2"])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), local.parameters(), strict=True))


def test_an_unknown_model(hub: None) -> None:
    with pytest.raises(CheckpointError, match="the hub knows no model nobody/nothing"):
        resolve("nobody/nothing")


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_is_said_plainly(offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(CheckpointError, match=r"google/gemma-3-270m is no local folder.*cannot be reached"):
        load("google/gemma-3-270m")


def test_a_cached_model_needs_no_network(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache as the hub client lays it out: snapshots of links into blobs."""
    model = tmp_path / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("0123abcd")
    (model / "snapshots/0123abcd").mkdir(parents=True)
    shutil.copytree(folders["gemma2"], model / "blobs")
    for path in sorted((model / "blobs").iterdir()):
        (model / "snapshots/0123abcd" / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ours, local = load("some/model"), load(folders["gemma2"])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), local.parameters(), strict=True))


def test_names_that_are_nothing(tmp_path: Path) -> None:
    for name in ("nowhere", "./nowhere", str(tmp_path / "no/such/folder"), "a/b/c"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            resolve(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; expected a checkpoint folder"):
        resolve(tmp_path / "file")


def test_a_local_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google/gemma-3-270m").mkdir(parents=True)
    assert resolve("google/gemma-3-270m") == Path("google/gemma-3-270m")


def test_shipped_models_are_found_by_name() -> None:
    for name, folder in shipped_models().items():
        assert resolve(name) == folder
        assert read_config(name).model_type == json.loads((folder / "config.json").read_text())["model_type"]


def test_carried_files(tmp_path: Path) -> None:
    names = ("LICENSE", "license.md", "NOTICE", "USAGE_POLICY.md", "gemma-terms.txt", "tokenizer.json", "encore.json")
    for name in (*names, "README.md", "model.safetensors", "config.json"):
        (tmp_path / name).write_text("")
    assert {path.name for path in carried_files(tmp_path)} == set(names)
