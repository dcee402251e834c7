"""Training a tokenizer: the same texts give the same files, of the size that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from encore import assets
from encore.tokenizer import load_tokenizer
from encore.tokenizer_training import train_tokenizer


def small_texts() -> list[str]:
    return [row["src"] + "\n" + row["tgt"] for row in assets.read_jsonl("pairs/validation.jsonl")]


def test_training_is_deterministic_and_exact(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_tokenizer(small_texts(), tmp_path / name, vocab_size=1000, num_sentinels=16)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one")
    assert tokenizer.vocab_size == 1000
    assert tokenizer.sentinel_ids == tuple(range(984, 1000))
    for text in ["", "  a\t\n\n b", "\u2581 \u0010_", "日本語 👍🏽", "<0x41> <unused5>"]:
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert len(tokenizer.encode("Ich weiß nicht, was Tom will.")) < 20
    digits = [tokenizer.decode([i]) for i in tokenizer.encode("a 2026")]
    assert digits == ["a", " ", "2", "0", "2", "6"]


def test_of_equally_common_characters_the_first_in_unicode_get_a_piece(tmp_path: Path) -> None:
    rare = [chr(0x4E00 + i) for i in range(200)]
    train_tokenizer([*small_texts(), *reversed(rare)], tmp_path, vocab_size=1000, num_sentinels=16, max_characters=180)
    tokenizer = load_tokenizer(tmp_path)
    with_piece = [len(tokenizer.encode(character)) == 1 for character in rare]
    assert with_piece == sorted(with_piece, reverse=True)
    assert 50 < sum(with_piece) < 150
    assert tokenizer.decode(tokenizer.encode("".join(rare))) == "".join(rare)


def test_training_refuses_what_cannot_be_filled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 500 is too small"):
        train_tokenizer(small_texts(), tmp_path, vocab_size=500)
    with pytest.raises(ValueError, match="give more text or a smaller vocab_size"):
        train_tokenizer(["only a few words"], tmp_path, vocab_size=1000)
