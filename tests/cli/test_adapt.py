"""`encore adapt` as a command: output, errors, and nothing imported before it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from encore.cli import main

CONFIG = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 8,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    from encore.checkpoint.config_json import config_from_json
    from encore.checkpoint.pretrained import save
    from encore.model.gemma import Gemma

    config = config_from_json(CONFIG)
    model = Gemma(config)  # type: ignore[arg-type]
    model.init_weights()
    save(model, tmp_path / "source")
    return tmp_path / "source"


def encore(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["encore", *map(str, arguments)])
    try:
        main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_json_is_all_that_stands_on_stdout(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = encore(monkeypatch, "adapt", source, out, "--style", "t5gemma2", "--rope-factor", 8, "--json")
    captured = capsys.readouterr()
    assert status == 0 and captured.err == ""
    summary = json.loads(captured.out)
    assert summary["style"] == "t5gemma2" and summary["out"] == str(out) and summary["files"] == ["model.safetensors"]
    raw = json.loads((out / "config.json").read_text())
    assert raw["decoder"]["rope_parameters"]["full_attention"]["factor"] == 8.0
    assert summary["num_bytes"] < (out / "model.safetensors").stat().st_size


def test_the_bar_appears_on_stderr_when_it_takes_long(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import encore.cli.bar as bar
    from encore.checkpoint.pretrained import load

    monkeypatch.setattr(bar, "_SILENT_SECONDS", -1.0)
    assert encore(monkeypatch, "adapt", source, tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "adapt" in captured.err
    count = sum(parameter.numel() for parameter in load(tmp_path / "out").parameters())
    assert captured.out == f"{tmp_path / 'out'}: t5gemma2, {count:,} parameters in float32\n"


def test_random_weights_differ_and_follow_the_seed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert encore(monkeypatch, "adapt", source, tmp_path / name, "--init", "random", "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_errors_are_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encore(monkeypatch, "adapt", source, tmp_path / "out", "--style", "t5gemma") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "Use style t5gemma2" in captured.err
    assert encore(monkeypatch, "adapt", source, source) == 2
    assert encore(monkeypatch, "adapt", tmp_path / "nowhere", tmp_path / "out") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_imports_no_torch_before_it_runs() -> None:
    code = "import sys, encore.cli.adapt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_variants_and_depth_by_options(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--attention", "separate", "--separate-embeddings", "--cross-attention-on", "global")
    options += ("--causal-encoder", "--encoder-layers", 3, "--decoder-layers", "1,")
    assert encore(monkeypatch, "adapt", source, tmp_path / "out", *options) == 0
    assert "its model_type is encore_t5gemma" in capsys.readouterr().out
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["model_type"] == "encore_t5gemma" and raw["family"] == "t5gemma2"
    assert (raw["attention"], raw["tied_embeddings"], raw["cross_attention_layers"]) == (
        "separate",
        False,
        "full_attention",
    )
    assert (raw["causal_encoder"], raw["shared_stack"]) == (True, False)
    assert raw["encoder"]["text_config"]["num_hidden_layers"] == 3 and raw["decoder"]["num_hidden_layers"] == 1
    provenance = json.loads((tmp_path / "out/encore_adaptation.json").read_text())
    assert provenance["options"]["attention"] == "separate"
    assert provenance["layers"]["encoder"]["rule"] == "evenly spaced"
    assert encore(monkeypatch, "adapt", source, tmp_path / "shared", "--shared-stack", "--tied-embeddings") == 0
    assert json.loads((tmp_path / "shared/config.json").read_text())["shared_stack"] is True
    capsys.readouterr()
    assert encore(monkeypatch, "adapt", source, tmp_path / "none", "--encoder-layers", "two") == 2
    assert "--encoder-layers is 'two'" in capsys.readouterr().err
