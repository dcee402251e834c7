"""Text -> the ids of a source, as long as allowed and never cut in silence. No torch.

    encoder-decoder   the tokenizer's source format (`<bos>` before, `<eos>` behind, or not)
    decoder-only      `<bos>` and the text: a prompt that the target continues
    chat              the text as one user turn, with the model's turn opened behind it

A text that is longer than allowed is an error, unless it was asked to be cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from encore.tokenizer import Tokenizer

Overflow = Literal["error", "keep-start", "keep-end"]


class SourceCutWarning(UserWarning):
    """A source was longer than allowed, and was cut because that was asked for."""


@dataclass(frozen=True)
class Source:
    """A text, the ids that the model reads of it, and how many were cut."""

    text: str
    tokens: list[int]
    num_tokens_cut: int = 0


class SourceReader:
    """Makes sources of at most `max_tokens` tokens.

    A longer text is an error, or is cut with a warning: "keep-start" keeps its beginning and cuts its end, "keep-end"
    keeps its end and cuts its beginning. `<bos>`, `<eos>` and chat turns stay whole either way.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        encoder_decoder: bool,
        chat: bool = False,
        overflow: Overflow = "error",
        warn: Callable[[str], None] | None = None,
    ) -> None:
        if overflow not in get_args(Overflow):
            raise ValueError(f"overflow is {overflow!r}; expected one of {', '.join(get_args(Overflow))}")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.encoder_decoder = encoder_decoder
        self.chat = chat
        self.overflow: Overflow = overflow
        self._warn = warn or (lambda message: warnings.warn(message, SourceCutWarning, stacklevel=4))
        frame = len(self._encode(""))
        if max_tokens <= frame:
            raise ValueError(
                f"at most {max_tokens} source tokens are allowed, and {frame} of them stand around every text: "
                "allow more source tokens, or fewer target tokens"
            )

    def read(self, text: str, number: int | None = None) -> Source:
        """The source of one text; `number` names it in messages."""
        tokens = self._encode(text)
        if len(tokens) <= self.max_tokens:
            return Source(text, tokens)
        what = "the source" if number is None else f"source {number}"
        found = f"{what} has {len(tokens)} tokens and {self.max_tokens} are allowed"
        if self.overflow == "error":
            raise ValueError(f"{found}; shorten it, allow more, or have it cut (overflow keep-start or keep-end)")
        cut = self._cut_message(text) if self.chat else self._cut(tokens)
        lost, kept = ("end", "beginning") if self.overflow == "keep-start" else ("beginning", "end")
        num_cut = len(tokens) - len(cut)
        self._warn(f"{found}; {num_cut} were cut from its {lost}, its {kept} was kept")
        return Source(text, cut, num_cut)

    def _encode(self, text: str) -> list[int]:
        if self.chat:
            text = self.tokenizer.chat([{"role": "user", "content": text}])
        return self.tokenizer.encode_source(text) if self.encoder_decoder else self.tokenizer.encode(text, bos=True)

    def _cut(self, tokens: list[int]) -> list[int]:
        head = tokens[: int(tokens[0] == self.tokenizer.bos_id)]
        tail = tokens[len(tokens) - int(tokens[-1] == self.tokenizer.eos_id) :]
        body = tokens[len(head) : len(tokens) - len(tail)]
        room = self.max_tokens - len(head) - len(tail)
        return [*head, *(body[:room] if self.overflow == "keep-start" else body[len(body) - room :]), *tail]

    def _cut_message(self, text: str) -> list[int]:
        """Shortens the message inside its turn until the whole fits; ids may join differently at the cut."""
        message = self.tokenizer.encode(text)
        tokens = self._encode(text)
        while len(tokens) > self.max_tokens:
            room = max(len(message) - (len(tokens) - self.max_tokens), 0)
            message = message[:room] if self.overflow == "keep-start" else message[len(message) - room :]
            tokens = self._encode(self.tokenizer.decode(message, skip_special=False))
        return tokens
