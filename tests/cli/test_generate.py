"""The verbs generate, score and embed: what stands on stdout, what on stderr, and how they end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import encore
from encore import assets
from encore.cli import app
from encore.config import GemmaConfig, Rope, StackConfig, T5GemmaConfig
from encore.generate.sampling import SamplingSettings
from encore.generate.text import TextGenerator

TEXTS = ["Good morning.", "Why?", "The cat is asleep on the warm stove."]
SHORT = ["--max-target-tokens", "12"]


def save_tiny(kind: str, folder: Path) -> Path:
    """A random model with the shipped tokenizer."""
    tokenizer = encore.load_tokenizer(assets.path("tokenizer"))
    stack = StackConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=8,
        local_rope=Rope(10_000.0),
        global_rope=Rope(1_000_000.0),
        query_pre_attn_scalar=8,
        qk_norm=True,
        max_position_embeddings=400,
    )
    model = (
        encore.T5Gemma(T5GemmaConfig("t5gemma2", stack, stack))
        if kind == "t5gemma2"
        else encore.Gemma(GemmaConfig("gemma3_text", stack))
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    encore.save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("t5gemma2", tmp_path_factory.mktemp("models") / "t5gemma2"))


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("gemma3", tmp_path_factory.mktemp("models") / "gemma3"))


@pytest.fixture
def encore_(folder: str) -> Callable[..., Result]:
    """Runs a verb in this process; `--model` is the tiny one unless given."""

    def run(*arguments: str, stdin: str | None = None) -> Result:
        model = () if "--model" in arguments else ("--model", folder)
        return CliRunner().invoke(app, [*arguments, *model], input=stdin)

    return run


def rows(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def expected(folder: str) -> list[str]:
    return [
        answer.text for answer in TextGenerator.load(folder).generate(TEXTS, SamplingSettings(max_target_tokens=12))
    ]


# --- generate --------------------------------------------------------------------------------------------------------


def test_one_text_several_texts_and_lines(encore_: Callable[..., Result], expected: list[str]) -> None:
    one = encore_("generate", TEXTS[0], *SHORT)
    assert one.stdout == expected[0] + "\n"
    several = encore_("generate", *TEXTS, *SHORT)
    assert several.stdout.splitlines() == [text.replace("\n", "\\n") for text in expected]
    lines = encore_("generate", *SHORT, "--batch-size", "2", stdin="\r\n".join(TEXTS))
    assert lines.stdout == several.stdout
    assert one.stderr == several.stderr == lines.stderr == ""
    assert encore_("generate", *SHORT, stdin="").stdout == ""


def test_json(encore_: Callable[..., Result], folder: str, expected: list[str]) -> None:
    found = rows(encore_("generate", "--json", *SHORT, stdin="\n".join(TEXTS) + "\n"))
    assert [row["index"] for row in found] == [0, 1, 2]
    assert [row["source"] for row in found] == TEXTS
    assert [row["text"] for row in found] == expected
    tokenizer = encore.load_tokenizer(folder)
    for row in found:
        assert len(row["tokens"]) == len(row["logprobs"]) == 12
        assert all(value <= 0 for value in row["logprobs"])
        assert row["finish_reason"] == "length" and row["stop"] is None
        assert row["source_tokens"] == len(tokenizer.encode_source(row["source"])) and row["source_tokens_cut"] == 0
        timings = row["timings"]
        assert 0 < timings["first_token_seconds"] <= timings["seconds"]
        assert timings["tokens_per_second"] == pytest.approx(12 / timings["seconds"], rel=0.01)


def test_sampling_options_reach_the_draws(encore_: Callable[..., Result], folder: str) -> None:
    options = ["--temperature", "1.7", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.001"]
    options += ["--repetition-penalty", "1.2", "--seed", "11", "--stop", "@@", "--stop-id", "400"]
    (row,) = rows(encore_("generate", "--json", TEXTS[0], *SHORT, *options))
    settings = SamplingSettings(
        temperature=1.7,
        top_k=50,
        top_p=0.95,
        min_p=0.001,
        repetition_penalty=1.2,
        seed=11,
        max_target_tokens=12,
        stop_strings=("@@",),
        stop_ids=(1, 106, 400),
    )
    assert row["tokens"] == next(TextGenerator.load(folder).generate(TEXTS[:1], settings)).generation.tokens
    (other,) = rows(encore_("generate", "--json", TEXTS[0], *SHORT, *options, "--seed", "12"))
    assert other["tokens"] != row["tokens"]
    (stopped,) = rows(encore_("generate", "--json", TEXTS[0], *SHORT, *options, "--stop-id", str(row["tokens"][3])))
    assert stopped["finish_reason"] == "stop" and stopped["stop"] in row["tokens"][:4]


def test_stop_string(encore_: Callable[..., Result], expected: list[str]) -> None:
    stop = expected[0][3:6]
    (row,) = rows(encore_("generate", "--json", TEXTS[0], *SHORT, "--stop", stop))
    assert (row["text"], row["stop"]) == (expected[0][: expected[0].index(stop)], stop)


def test_chat_device_dtype_and_threads(encore_: Callable[..., Result], folder: str) -> None:
    before = torch.get_num_threads()
    try:
        (row,) = rows(
            encore_(
                "generate",
                "--json",
                "Why?",
                "--chat",
                *SHORT,
                *("--device", "cpu", "--dtype", "bfloat16", "--threads", "1"),
            )
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    generator = TextGenerator.load(folder, dtype=torch.bfloat16, chat=True)
    answer = next(generator.generate(["Why?"], SamplingSettings(max_target_tokens=12)))
    assert row["tokens"] == answer.generation.tokens
    assert row["source_tokens"] == len(answer.source.tokens)


def test_a_source_that_is_too_long_fails_or_is_cut_aloud(encore_: Callable[..., Result]) -> None:
    failed = encore_("generate", *TEXTS, *SHORT, "--max-source-tokens", "6")
    assert isinstance(failed.exception, ValueError)
    assert "source 3 has" in str(failed.exception) and "6 are allowed" in str(failed.exception)
    assert failed.stdout == ""
    for overflow, lost in (("keep-start", "end"), ("keep-end", "beginning")):
        cut = encore_("generate", "--json", *TEXTS, *SHORT, "--max-source-tokens", "6", "--overflow", overflow)
        assert [row["source_tokens_cut"] > 0 for row in rows(cut)] == [False, False, True]
        assert cut.stderr.startswith("encore: warning: source 3 has") and f"cut from its {lost}" in cut.stderr


def test_a_decoder_only_model_continues_the_text(encore_: Callable[..., Result], gemma_folder: str) -> None:
    (row,) = rows(encore_("generate", "--json", TEXTS[0], *SHORT, "--model", gemma_folder))
    assert row["source_tokens"] == len(encore.load_tokenizer(gemma_folder).encode_source(TEXTS[0]))
    assert len(row["tokens"]) == 12


def test_wrong_options_are_refused_before_a_model_is_read(encore_: Callable[..., Result]) -> None:
    assert "top_p is 3.0" in str(encore_("generate", "x", "--top-p", "3", "--model", "no such folder").exception)
    assert "no such folder" in str(encore_("generate", "x", "--model", "no such folder").exception)
    assert "expected a name such as cpu" in str(encore_("generate", "x", "--device", "toaster").exception)
    assert encore_("generate", "x", "--overflow", "cut").exit_code == 2
    assert encore_("generate", "x", "--batch-size", "0").exit_code == 2


# --- score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5gemma2", "gemma3"])
def test_score(encore_: Callable[..., Result], folder: str, gemma_folder: str, kind: str) -> None:
    model = ("--model", folder if kind == "t5gemma2" else gemma_folder)
    pairs = [{"source": text, "target": target} for text, target in zip(TEXTS, ["Ja.", "", "Nein, nie."], strict=True)]
    found = rows(encore_("score", *model, "--batch-size", "2", stdin="\n".join(map(json.dumps, pairs))))
    assert [row["index"] for row in found] == [0, 1, 2]
    for pair, row in zip(pairs, found, strict=True):
        assert row["tokens"] == encore.load_tokenizer(folder).encode_target(pair["target"])
        assert row["logprob"] == pytest.approx(sum(row["logprobs"]), abs=1e-4)
        assert row["mean_logprob"] == pytest.approx(row["logprob"] / len(row["tokens"]), abs=1e-5)
        (alone,) = rows(encore_("score", *model, "--source", pair["source"], "--target", pair["target"]))
        assert alone["logprob"] == pytest.approx(row["logprob"], abs=1e-3)


def test_scores_are_what_generate_reported(encore_: Callable[..., Result], folder: str) -> None:
    settings = SamplingSettings(temperature=1.0, seed=0, max_target_tokens=12)
    answer = next(TextGenerator.load(folder).generate(TEXTS[:1], settings))
    (row,) = rows(encore_("score", "--source", TEXTS[0], "--target", answer.text))
    if row["tokens"][:-1] == answer.generation.tokens:  # the text may be tokenized in another way
        assert row["logprobs"][:-1] == pytest.approx(answer.generation.log_probabilities, abs=1e-3)
    assert row["tokens"][-1] == 1


def test_score_errors_name_the_line(encore_: Callable[..., Result]) -> None:
    good = json.dumps({"source": "a", "target": "b"})
    assert "line 2 of stdin is not JSON" in str(encore_("score", stdin=f"{good}\n{{oops\n").exception)
    assert 'expected {"source"' in str(encore_("score", stdin='{"source": "a"}\n').exception)
    assert "line 1 of stdin is '[1, 2]'" in str(encore_("score", stdin="[1, 2]\n").exception)
    assert "belong together" in str(encore_("score", "--source", "a").exception)


# --- embed -----------------------------------------------------------------------------------------------------------


def states(folder: str, text: str) -> np.ndarray:
    tokens = encore.load_tokenizer(folder).encode_source(text)
    with torch.no_grad():
        return encore.load(folder).encode(torch.tensor([tokens])).states[0].numpy()  # pyright: ignore


def test_embed_as_json_lines(encore_: Callable[..., Result], folder: str, tmp_path: Path) -> None:
    found = rows(encore_("embed", *TEXTS))
    for text, row in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(row["embedding"], states(folder, text).mean(0), atol=1e-5)
    every = rows(encore_("embed", "--pooling", "none", "--normalize", stdin=TEXTS[0]))
    norms = np.linalg.norm(np.array(every[0]["embedding"]), axis=1)
    np.testing.assert_allclose(norms, np.ones(len(every[0]["tokens"])), atol=1e-5)
    written = encore_("embed", *TEXTS, "--output", str(tmp_path / "x.jsonl"))
    assert written.stdout == ""
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == found


def test_embed_as_npz(encore_: Callable[..., Result], folder: str, tmp_path: Path) -> None:
    pooled = np.load(io.BytesIO(encore_("embed", *TEXTS, "--format", "npz", "--pooling", "last").stdout_bytes))
    assert pooled["embeddings"].shape == (3, 16) and pooled["embeddings"].dtype == np.float32
    encore_("embed", "--format", "npz", "--pooling", "none", "-o", str(tmp_path / "all.npz"), stdin="\n".join(TEXTS))
    every = np.load(tmp_path / "all.npz")
    offsets = every["offsets"]
    assert offsets[-1] == len(every["embeddings"]) == len(every["tokens"])
    for i, text in enumerate(TEXTS):
        own = every["embeddings"][offsets[i] : offsets[i + 1]]
        np.testing.assert_allclose(own, states(folder, text), atol=1e-5)
        np.testing.assert_allclose(own[-1], pooled["embeddings"][i], atol=1e-5)


def test_embedding_with_a_decoder_only_model_says_why_not(encore_: Callable[..., Result], gemma_folder: str) -> None:
    assert "has no encoder" in str(encore_("embed", "x", "--model", gemma_folder).exception)


# --- as a process ----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "encore"]
HEEDS_INTERRUPTS = (  # also where the tests themselves run in the background of a shell, which ignores them
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from encore.cli import main; main()"
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def read_all(descriptor: int) -> str:
    def pieces() -> Iterator[bytes]:
        while True:
            try:
                piece = os.read(descriptor, 4096)
            except OSError:  # the other end of a terminal was closed
                return
            if not piece:
                return
            yield piece

    return b"".join(pieces()).decode().replace("\r\n", "\n")


def test_help_has_an_example_and_costs_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom encore.cli import app\n"
        "for verb in ('generate', 'score', 'embed'):\n"
        "    shown = CliRunner().invoke(app, [verb, '--help']).stdout\n"
        "    assert f'Example: encore {verb} ' in shown, shown\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=ENVIRONMENT).returncode == 0


def test_one_text_on_a_terminal_is_shown_as_it_is_written(folder: str, expected: list[str]) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "generate", TEXTS[0], "--model", folder, *SHORT]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        os.close(theirs)
        shown = read_all(ours)
        assert process.stderr is not None
        notes = process.stderr.read().decode()
    os.close(ours)
    assert process.returncode == 0
    assert shown == expected[0] + "\n"
    assert notes.strip() == "encore: ended at 12 tokens (--max-target-tokens)"


def test_many_lines_into_a_pipe_are_counted_on_stderr(folder: str) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "generate", "--json", *TEXTS, "--model", folder, *SHORT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=ENVIRONMENT) as process:
        os.close(theirs)
        assert process.stdout is not None
        lines = process.stdout.read().decode().splitlines()
        shown = read_all(ours)
    os.close(ours)
    assert process.returncode == 0
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    assert "3/3" in shown


def test_a_closed_pipe_ends_quietly_and_ctrl_c_with_130(folder: str) -> None:
    command = [sys.executable, "-c", HEEDS_INTERRUPTS, "generate", "--model", folder, *SHORT, "--batch-size", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
    closed, interrupted = subprocess.Popen(command, **pipes), subprocess.Popen(command, **pipes)
    for process in (closed, interrupted):
        process.stdin.write(b"Good morning.\n")
        process.stdin.flush()
    for process in (closed, interrupted):
        assert process.stdout.readline()
    closed.stdout.close()
    closed.stdin.write(b"Why?\n" * 5)
    interrupted.send_signal(signal.SIGINT)
    after_close, after_interrupt = finish(closed), finish(interrupted)
    interrupted.stdout.close()
    assert closed.returncode == 1 and after_close == ""
    assert interrupted.returncode == 130 and "Traceback" not in after_interrupt


def finish(process: subprocess.Popen) -> str:
    """What it says on stderr until it ends."""
    assert process.stderr is not None and process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    process.wait(timeout=60)
    return said
