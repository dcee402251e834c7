"""Asking models about long sources: scores from real answers, whole and in chunks, stretched, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import encore
from encore import assets
from encore.checkpoint.pretrained import load
from encore.cli import app
from encore.config import Rope
from encore.evaluate.examples import Style
from encore.evaluate.haystack import Library
from encore.evaluate.long_context import Cell, Reading, Suite, evaluate, panels, stretch, table
from encore.evaluate.report import panels_png
from encore.evaluate.ruler import RulerSettings
from encore.export.folder import export
from encore.generate.chunks import Chunks
from encore.generate.decoding import naive_generate
from encore.generate.onnx_backend import OnnxModel
from encore.generate.sampling import SamplingSettings
from encore.generate.source import SourceReader
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import load_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes" / "long"
TOKENIZER = load_tokenizer(assets.path("tokenizer"))


def count(text: str) -> int:
    return len(TOKENIZER.encode_source(text))


def suite(*tasks: str, lengths: tuple[int, ...] = (200,), **options) -> Suite:
    return Suite(tasks, lengths, 2, ruler=RulerSettings(digits=3), **options)


@pytest.fixture(scope="module")
def models() -> dict[str, encore.Gemma | encore.T5Gemma]:
    return {name: load(assets.path(name), dtype=torch.float32) for name in ("source", "translator")}


@pytest.mark.parametrize("chunk_tokens", [None, 120])
def test_the_score_is_that_of_the_models_own_answers(models, chunk_tokens: int | None) -> None:
    """Against answers written without cache, batch or harness; an expected string is taken from them: a hit."""
    model = models["translator"]
    examples = list(suite("vt").examples("vt", 180, count))
    reader = SourceReader(TOKENIZER, max_tokens=10_000)
    settings = SamplingSettings(max_target_tokens=30 + max(len(TOKENIZER.encode(e.opening)) for e in examples))
    wanted = []
    for example in examples:
        if chunk_tokens is not None:
            reader = SourceReader(TOKENIZER, max_tokens=10_000, chunk_tokens=chunk_tokens, instruction=example.question)
        source = reader.read(example.prompt).tokens
        assert isinstance(source, Chunks) == (chunk_tokens is not None)
        wanted.append(naive_generate(model, source, settings, tokenizer=TOKENIZER).text.strip())
    from dataclasses import replace

    examples = [replace(examples[0], answers=(wanted[0][2:9].upper(), "nowhere")), examples[1]]
    cell = evaluate("m", model, TOKENIZER, examples, Reading(chunk_tokens, batch_size=2))
    assert list(cell.answers) == wanted
    assert cell.score == (0.5 + examples[1].score(wanted[1])) / 2 > 0
    assert (cell.model, cell.task, cell.length) == ("m", "vt", 180)


def test_a_model_of_text_goes_on_from_the_opening(models) -> None:
    (example, _) = suite("vt").examples("vt", 170, count)
    cell = evaluate("m", models["source"], TOKENIZER, [example], Reading(opening=True))
    prompt = TOKENIZER.encode_source(f"{example.prompt} {example.opening}")
    settings = SamplingSettings(max_target_tokens=30 + len(TOKENIZER.encode(example.opening)))
    assert cell.answers[0] == naive_generate(models["source"], prompt, settings, tokenizer=TOKENIZER).text.strip()


def test_a_decoder_only_model_reads_no_chunks(models) -> None:
    with pytest.raises(ValueError, match="no memory to join"):
        evaluate(
            "m", models["source"], TOKENIZER, list(suite("vt").examples("vt", 200, count)), Reading(chunk_tokens=100)
        )
    with pytest.raises(ValueError, match="no example"):
        evaluate("m", models["source"], TOKENIZER, [])


@pytest.mark.parametrize("name", ["source", "translator"])
def test_stretched_models_are_those_of_the_stretched_config(models, name: str) -> None:
    model = models[name]
    other = stretch(model, rope_factor=4.0, positions=5000)
    stacks = [other.config.encoder, other.config.decoder] if isinstance(other, T5Gemma) else [other.config.stack]
    before = model.config.encoder if isinstance(model, T5Gemma) else model.config.stack
    for stack in stacks:
        assert stack.global_rope == Rope(before.global_rope.theta, 4.0) and stack.local_rope == before.local_rope
        assert stack.max_position_embeddings == 5000
    tokens = torch.arange(20, 320)[None]
    with torch.inference_mode():
        if isinstance(model, T5Gemma):
            old, new = model.encode(tokens).states, other.encode(tokens).states
        else:
            old, new = model(tokens), other(tokens)
        assert (old - new).abs().max() > 1e-3
        fresh = type(model)(other.config)
        fresh.load_state_dict(model.state_dict())
        expected = fresh.encode(tokens).states if isinstance(fresh, T5Gemma) else fresh(tokens)
    torch.testing.assert_close(new, expected)
    assert other.head_weight.data_ptr() == model.head_weight.data_ptr()  # weights are shared, not copied
    assert stretch(model, positions=10) is model
    with pytest.raises(ValueError, match="more than 0"):
        stretch(model, rope_factor=0.0)


def test_exported_models_stretch_too(models, tmp_path: Path) -> None:
    export("translator", tmp_path / "exported", "float32")
    exported = OnnxModel.load(tmp_path / "exported", threads=1)
    source = list(range(20, 520))
    far = stretch(exported, rope_factor=3.0, positions=4096)
    assert far.config.encoder.max_position_embeddings == 4096 and exported.config.encoder.max_position_embeddings < 4096
    with torch.inference_mode():
        expected = stretch(models["translator"], rope_factor=3.0).encode(torch.tensor([source])).states
    torch.testing.assert_close(torch.from_numpy(far.encode([source]).states), expected, atol=3e-4, rtol=0)
    assert abs(exported.encode([source]).states - far.encode([source]).states).max() > 1e-3


def test_tables_and_curves() -> None:
    cells = [
        Cell("a", "vt", 100, 0.5, ("x", "y"), 1.0),
        Cell("a", "vt", 1200, 0.25, ("x", "y"), 1.0),
        Cell("a", "fwe", 1200, 0.75, ("x", "y"), 1.0),
        Cell("b", "vt", 100, 1.0, ("x", "y"), 1.0),
    ]
    lines = [line.split() for line in table(cells).splitlines()]
    assert lines == [
        ["model", "task", "100", "1,200"],
        ["a", "vt", "50.0", "25.0"],
        ["a", "fwe", "–", "75.0"],
        ["a", "mean", "50.0", "50.0"],
        ["b", "vt", "100.0", "–"],
    ]
    first, second = panels(cells)
    assert dict(first.curves) == {"a": [(100, 50.0), (1200, 25.0)], "b": [(100, 100.0)]}
    assert first.title == "vt" and dict(second.curves) == {"a": [(1200, 75.0)]}
    assert panels_png([first, second])[:4] == b"\x89PNG"


def test_a_suite_says_what_it_leaves_out() -> None:
    notes: list[str] = []
    made = list(suite("cwe", "vt", lengths=(300,)).written(count, notes.append))
    assert [[example.task for example in examples] for examples in made] == [["vt", "vt"]]
    assert len(notes) == 1 and "cwe of 300 tokens takes" in notes[0]
    with pytest.raises(ValueError, match="no task is called 'x'"):
        suite("x")
    with pytest.raises(ValueError, match="at least one task"):
        Suite((), (100,))
    both = suite("vt", "mrcr_2", style=Style("start"), lengths=(600,))
    for examples in both.written(count, notes.append):
        assert examples[0].prompt.startswith(examples[0].question)
    assert both.library == Library()


def run(*words: object) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_the_command_prints_a_table_and_draws(tmp_path: Path) -> None:
    same = ["ruler", "--task", "vt,cwe", "--tokens", 180, "--examples", 1, "--seed", 3, "--model", "translator"]
    out, notes = run(*same, "--rope-factor", 2, "--plot", tmp_path / "scores.png")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["model", "task", "180"] and lines[1][:2] == ["translator", "vt"] and len(lines) == 2
    assert notes.count("left out: cwe") == 1
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
    (row,) = map(json.loads, run(*same, "--chunk-tokens", 100, "--json")[0].splitlines())
    assert (row["task"], row["length"], row["examples"]) == ("vt", 180, 1)
    with pytest.raises(ValueError, match="decoder-only"):
        run(*same, "--chunk-tokens", 100, "--model", "source")


def test_mrcr_from_the_command_line() -> None:
    out, _ = run("mrcr", "--needles", 2, "--tokens", 400, "--examples", 1, "--model", "translator")
    assert out.splitlines()[1].split()[:2] == ["translator", "mrcr_2"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--task", "cwe", "--tokens", "200"), "no task fits"),
        (("--tokens", "x"), "whole numbers"),
        (("--plot", "x.pdf"), "ends in .png"),
    ],
)
def test_the_command_says_what_is_wrong(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("ruler", *words)


@pytest.mark.slow
def test_the_recipes_run_on_written_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented way in small: write examples, adapt, two stages, evaluate past the trained length."""
    monkeypatch.chdir(tmp_path)
    data = Path("runs/long")
    for name in ("short", "long", "validation", "again"):
        options = ["--tokens", 112, "--examples", 2, "--sentence", "--digits", 3, "--write", data / f"{name}.jsonl"]
        run("ruler", "--task", "niah_single_1", *options)
    assert (data / "short.jsonl").read_bytes() == (data / "again.jsonl").read_bytes()
    row = json.loads((data / "short.jsonl").read_text(encoding="utf-8").splitlines()[0])
    used = sum(len(load_tokenizer(assets.path("source")).encode_source(row[key])) for key in ("src", "tgt"))
    assert row["tgt"].endswith(row["answers"][0]) and used == row["tokens"] <= 112
    invoke = CliRunner().invoke
    assert invoke(app, ["adapt", "source", "runs/long/adapted"]).exit_code == 0
    quick = ["--quiet", "--set", "train.steps=1", "--set", "train.checkpoint_every_steps=1"]
    for recipe, start, out in (
        ("short.toml", "runs/long/adapted", "runs/long/encoder-decoder-short"),
        ("long.toml", "runs/long/encoder-decoder-short/model", "runs/long/encoder-decoder"),
    ):
        done = invoke(app, ["tune", str(RECIPES / recipe), "--model", start, "--out", out, *quick])
        assert done.exit_code == 0, done.output
    trained = "runs/long/encoder-decoder/model"
    out, _ = run("ruler", "--task", "vt", "--tokens", 600, "--examples", 1, "--rope-factor", 4, "--model", trained)
    assert out.splitlines()[1].split()[:2] == [trained, "vt"]
