"""A small tokenizer of the package's own kind, trained once per session."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from encore.tokenizer import Tokenizer, load_tokenizer
from encore.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    numbers = random.Random(0)
    words = ["".join(numbers.choices("abcdefghij", k=numbers.randint(1, 4))) for _ in range(120)]
    texts = [" ".join(numbers.choices(words, k=30)) for _ in range(60)]
    train_tokenizer(texts, folder, vocab_size=512, num_sentinels=64, max_characters=20)
    return load_tokenizer(folder)
