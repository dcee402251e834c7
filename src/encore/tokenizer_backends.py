"""What reads a tokenizer file: the `tokenizers` library for tokenizer.json, `sentencepiece` for tokenizer.model.

Both give ids for text and the piece of an id. How pieces become text is the work of `encore.tokenizer`, the same for
both, so that a stream of ids and all ids at once give the same characters. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""The piece of a byte."""


class Backend(Protocol):
    """What a library must give: ids for text, the piece of an id, and how pieces become text."""

    size: int  # largest id + 1
    special_ids: frozenset[int]  # left out of decoded text
    strip_space: bool  # the encoder put a space before the text
    escapes: Mapping[str, str]  # replaced in decoded text

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def piece(self, token: int) -> str | None: ...
    def token_id(self, piece: str) -> int | None: ...


class JsonBackend:
    """tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json ({error}); fetch or save it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = self._find_size()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, content in added.items() if content.special)
        self.strip_space: bool
        self.escapes: Mapping[str, str]
        decoder = self._tokenizer.decoder
        self.strip_space, self.escapes = read_decoder(json.loads(decoder.__getstate__()) if decoder else None, path)

    def _find_size(self) -> int:
        """The largest id + 1. Without gaps it is the number of pieces, which spares a dictionary of them all."""
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if all(self._tokenizer.id_to_token(token) is not None for token in range(size)):
            return size
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [coded.ids for coded in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def piece(self, token: int) -> str | None:
        return self._tokenizer.id_to_token(token)

    def token_id(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)


def read_decoder(decoder: dict[str, Any] | None, path: Path) -> tuple[bool, dict[str, str]]:
    """Whether it strips a space, and its escapes.

    Accepts Gemma's decoder (U+2581 to space, byte fallback), with literal replacements at the end.
    """
    steps = (decoder or {}).get("decoders", [decoder or {}])
    kinds = [step.get("type") for step in steps]
    strip = False
    escapes: dict[str, str] = {}
    expected = kinds[:3] == ["Replace", "ByteFallback", "Fuse"]
    for step in steps[3:]:
        if step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            strip = True
        elif step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 2:
            escapes[step["pattern"]["String"]] = step["content"]
        else:
            expected = False
    if expected and (steps[0]["pattern"], steps[0]["content"]) != ({"String": SPACE}, " "):
        expected = False
    if not expected:
        raise ValueError(
            f"{path} decodes by {kinds}, not as Gemma's tokenizers do (Replace {SPACE!r}, ByteFallback, Fuse); "
            "give a tokenizer of the Gemma family"
        )
    return strip, escapes


class SentencePieceBackend:
    """tokenizer.model, read by `sentencepiece`. Control pieces in the text give their id, as in tokenizer.json."""

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(f"{path} needs the sentencepiece package: pip install sentencepiece") from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a readable SentencePiece model ({error}); fetch it again") from error
        self.size = self._model.get_piece_size()
        model = self._model
        self.special_ids = frozenset(i for i in range(self.size) if model.is_control(i) or model.is_unknown(i))
        self.strip_space = model.encode("a", out_type=str)[0].startswith(SPACE)
        self.escapes: Mapping[str, str] = {}
        names = sorted((model.id_to_piece(i) for i in self.special_ids), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._control = {model.id_to_piece(i): i for i in self.special_ids}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids.extend(self._model.encode(part))
        return ids

    def piece(self, token: int) -> str | None:
        return self._model.id_to_piece(token) if token < self.size else None

    def token_id(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else None
