"""The benchmark scripts run, on a small model, and write the rows that they promise."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


def test_against_transformers(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    sizes = ["--model", "encore-small-small", "--source", "32,80", "--batch", "1,5", "--steps", "3", "--rounds", "1"]
    command = [sys.executable, str(SCRIPTS / "against_transformers.py"), *sizes, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(row["work"], row["batch"], row["source_tokens"]) for row in rows] == [
        ("encode", 1, 32),
        ("encode", 1, 80),
        ("decode", 1, 512),
        ("decode", 5, 512),
    ]
    for row in rows:
        assert row["peer"] == "transformers float32" and row["unit"] == "tokens/s"
        assert abs(row["ratio"] - row["ours"] / row["peer_value"]) < 1e-9


def test_long_context_refuses_a_peer_that_would_not_fit() -> None:
    command = [sys.executable, str(SCRIPTS / "long_context.py"), "--tokens", "32768", "--peer", "transformers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "would not fit" in done.stderr


def test_a_few_kills(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    options = ["--kills", "2", "--steps", "24", "--warm", "--json", str(out)]
    command = [sys.executable, str(SCRIPTS / "kill_resume.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "2 of 2 resumed bit for bit"
    told = json.loads(out.read_text())
    assert (told["kills"], told["same"], len(told["rows"])) == (2, 2, 2)


@pytest.fixture
def kill_resume(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("kill_resume", SCRIPTS / "kill_resume.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kill_resume", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_run(run: Path, steps: int) -> None:
    """The files of a run that `kill_resume.py` compares, without a model."""
    for step in (2, 4):
        training = run / "checkpoints" / f"step-{step:06d}" / "training"
        training.mkdir(parents=True)
        (training.parent / "model.safetensors").write_bytes(bytes([step] * 8))
        (training / "optimizer.safetensors").write_bytes(bytes([step] * 16))
        (training / "state.json").write_text(json.dumps({"step": step, "wall_seconds": id(run), "tokens": 7}))
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_bytes(b"4444")
    rows = [{"step": step, "loss": 9.0 - step, "wall_seconds": 1.0 * id(run)} for step in range(steps)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


DAMAGES = {
    "step 4: model.safetensors": ("checkpoints/step-000004/model.safetensors", b"\4" * 7 + b"\5"),
    "step 2: training/optimizer.safetensors": ("checkpoints/step-000002/training/optimizer.safetensors", b""),
    "step 4: training/state.json": ("checkpoints/step-000004/training/state.json", b'{"step": 4, "tokens": 8}'),
    "metrics.jsonl": ("metrics.jsonl", b'{"step": 0, "loss": 8.5}\n'),
    "model": ("model/model.safetensors", b"4445"),
    "left over: ['.writing-step-000006']": ("checkpoints/.writing-step-000006/config.json", b"{}"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_run_that_went_on_otherwise_is_found_out(tmp_path: Path, kill_resume: Any, fault: str) -> None:
    for name in ("whole", "killed"):
        write_run(tmp_path / name, 5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    checkpoints = {step: kill_resume.digests(path) for step, path in kill_resume.checkpoints_of(whole).items()}
    reference = kill_resume.Reference(checkpoints, kill_resume.digests(whole / "model"), kill_resume.rows_of(whole))
    assert kill_resume.look_at_end(killed, reference, 4) == []
    assert kill_resume.look(killed, reference, 6) == (4, ["the last checkpoint was of step 6, is of step 4"])
    path, content = DAMAGES[fault]
    (killed / path).parent.mkdir(exist_ok=True)
    (killed / path).write_bytes(content)
    assert fault in kill_resume.look_at_end(killed, reference, 4)


def test_train_speed(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    variants = ["encore", "encore, all logits at once", "encore, dense lookups", "transformers"]
    options = ["--quick", "--threads", "1", "--variants", ";".join(variants), "--json", str(out)]
    command = [sys.executable, str(SCRIPTS / "train_speed.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["variant"] for row in rows] == variants
    assert rows[-1]["ratio"] == 1.0
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])
        assert row["ratio"] > 0 and 0 < row["utilisation"] < 1 and row["peak_gigabytes"] > 0.1


def test_first_token(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--size", "small-small", "--runs", "1", "--folder", str(tmp_path / "models"), "--json", str(out)]
    command = [sys.executable, str(SCRIPTS / "first_token.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    short, long = json.loads(out.read_text())
    assert (short["source_words"], long["source_words"]) == (2, 32)
    for row in (short, long):
        assert 0 < row["fastest"] <= row["first"] <= row["end"] and row["cpu"] > 0
        assert {"load tokenizer", "open encoder", "open step", "first step"} < row["stages"].keys()
    tokenizer = json.loads((tmp_path / "models" / "t5gemma-2-small-small-int8-128" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == 6_144


def test_cpu_generate_beside_transformers(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPTS / "cpu_generate.py"), "--size", "small-small", "--folder", str(tmp_path)]
    command += ["--source", "32", "--batch", "1", "--rounds", "1", "--threads", "1", "--target", "5"]
    peers = "transformers float32,llama.cpp Q8_0,OpenVINO int8,OpenVINO int4"
    command += ["--ours", "encore int8", "--peers", peers, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = {row["peer"]: row for row in json.loads(out.read_text())}
    row = rows["transformers float32"]
    assert (row["work"], row["size"], row["weights"], row["batch"]) == ("decode", "small-small", "int8", 1)
    assert row["ratio"] == row["ours"] / row["peer_value"] and 0 < row["share_of_limit"] < 1.5
    for peer in ("llama.cpp Q8_0", "OpenVINO int8"):
        assert f"{peer}: not installed" in done.stderr or peer in rows
    assert "OpenVINO int4" not in rows  # stands beside int4 only
