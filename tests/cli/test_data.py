"""`encore data inspect`: the numbers add up, and the examples can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from encore.cli import app

RECIPE = """
objective = "t5gemma2"
[model]
tokenizer = "asset:tokenizer"
[model.architecture]
model_type = "t5gemma2"
[data]
window_tokens = 64
[[data.sources]]
name = "texts"
files = ["text.jsonl"]
weight = 3
[[data.sources]]
name = "phrases"
files = ["pairs.jsonl"]
objective = "pairs"
[train]
batch_size = 16
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    text = [
        json.dumps({"text": f"Number {i} goes to town, and number {i + 1} stays at home. " * 12}) for i in range(60)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join([*text, "{damaged"]), encoding="utf-8")
    pairs = [json.dumps({"src": f"a man of {i}", "tgt": f"ein Mann von {i}"}) for i in range(50)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", "inspect", *arguments, "--seconds", "0"])


@pytest.mark.usefixtures("folder")
def test_as_json() -> None:
    done = inspect("recipe.toml", "--set", "data.pack=true", "--set", "data.pool_examples=256", "--json")
    assert done.exit_code == 0, done.stderr
    assert "skipped 1 of 61 records" in done.stderr and "line 61 (not JSON" in done.stderr
    report = json.loads(done.stdout)
    assert [s["share_of_examples"] for s in report["sources"]] == [0.75, 0.25]
    assert sum(s["share_of_tokens"] for s in report["sources"]) == pytest.approx(1)
    assert report["sources"][0]["skipped"] == 1 and report["sources"][1]["examples_per_epoch"] == 50
    assert report["packed"] and report["measured_steps"] == 16 and report["tokens_per_second"] > 0
    fill, rows = report["fill"], report["row_tokens"]
    assert min(fill.values()) > 0.9
    places = report["rows_per_step"] * (fill["encoder"] * rows[0] + fill["decoder"] * rows[1])
    assert report["tokens_per_step"] == pytest.approx(places)
    assert report["padding"] == pytest.approx(1 - places / (report["rows_per_step"] * sum(rows)))
    mean = report["inputs"]["mean"] + report["targets"]["mean"]
    assert report["tokens_per_step"] == pytest.approx(16 * mean, rel=0.05)
    assert len(report["examples"]) == 6  # five tasks, and pairs
    (pair,) = (example for example in report["examples"] if example["source"] == "phrases")
    assert "a man of" in pair["input"] and "ein Mann von" in pair["target"]


@pytest.mark.usefixtures("folder")
def test_for_people() -> None:
    done = inspect("recipe.toml", "--examples", "1")
    assert done.exit_code == 0, done.stderr
    for expected in ("texts", "75.0%", "skipped: ", "one example each", "padding", "tokens per second", "prefix_lm"):
        assert expected in done.stdout
    hidden = done.stdout.partition("short_spans_light")[2]
    source, target = (line for line in hidden.splitlines()[1:3])
    assert "<unused100>" in source and "<unused100>" in target and target.endswith("<eos>")


@pytest.mark.usefixtures("folder")
def test_pairs_under_a_token_budget() -> None:
    changes = ["objective=pairs", "data.sources=[]", 'data.train=["pairs.jsonl"]', "data.batch_tokens=256"]
    done = inspect("recipe.toml", "--json", *(word for change in changes for word in ("--set", change)))
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["packed"] and 100 < report["tokens_per_step"] <= 256 and report["padding"] < 0.2


@pytest.mark.usefixtures("folder")
def test_errors_name_what_is_missing() -> None:
    failed = inspect("recipe.toml", "--set", 'data.sources=[{files=["nowhere.jsonl"]}]')
    assert isinstance(failed.exception, ValueError) and "no file or folder nowhere.jsonl" in str(failed.exception)
