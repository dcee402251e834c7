"""A small tokenizer of the package's own kind, and tiny runs."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from encore.cli import main
from encore.tokenizer import Tokenizer, load_tokenizer
from encore.tokenizer_training import train_tokenizer
from encore.train.recipe import Recipe
from encore.train.recipe_file import load_recipe, recipe_from_table, to_toml


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    numbers = random.Random(0)
    words = ["".join(numbers.choices("abcdefghij", k=numbers.randint(1, 4))) for _ in range(120)]
    texts = [" ".join(numbers.choices(words, k=30)) for _ in range(60)]
    train_tokenizer(texts, folder, vocab_size=512, num_sentinels=64, max_characters=20)
    return load_tokenizer(folder)


class Tiny:
    """Files and recipes for runs of a few seconds."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        numbers = random.Random(1)
        words = ["".join(numbers.choices("abcdefghij", k=3)) for _ in range(40)]
        texts = [" ".join(numbers.choices(words, k=numbers.randint(5, 60))) for _ in range(80)]
        self.text = self.write("text.jsonl", [{"text": text} for text in texts])
        self.pairs = self.write("pairs.jsonl", [{"src": text[:20], "tgt": text[20:40] or "a"} for text in texts])

    def write(self, name: str, rows: list[dict[str, str]]) -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    def recipe(self, objective: str = "causal", *changes: str) -> Recipe:
        """`objective` "causal" and "pairs" give a decoder-only model, unless a change names another model_type."""
        table = {
            "objective": objective,
            "model": {
                "tokenizer": str(self.tokenizer.folder),
                "architecture": {
                    "model_type": "gemma3_text" if objective in ("causal", "pairs") else "t5gemma2",
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "head_dim": 16,
                    "layer_types": ["sliding_attention", "full_attention"],
                    "sliding_window": 8,
                },
            },
            "data": {
                "train": [self.pairs if objective == "pairs" else self.text],
                "window_tokens": 24,
                "batch_tokens": 160,
                "validation_windows": 8,
                "cache_folder": str(self.folder / "cache"),
            },
            "optim": {"learning_rate": 5e-3, "warmup_steps": 4},
            "train": {"steps": 8, "batch_size": 4, "checkpoint_every_steps": 4, "evaluate_every_steps": 4, "seed": 7},
        }
        path = self.folder / "recipe.toml"
        path.write_text(to_toml(recipe_from_table(table)), encoding="utf-8")
        return load_recipe(path, changes)


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The `encore` command, in this process: its status, and what it said to stdout and to stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["encore", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def tiny(tmp_path: Path, tokenizer: Tokenizer) -> Tiny:
    return Tiny(tmp_path, tokenizer)
