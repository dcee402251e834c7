"""Text in, text out: a model with its tokenizer.

    generator = TextGenerator.load("translator")
    [answer.text for answer in generator.generate(["Good morning."])]      # ["Guten Morgen."]

Any number of texts is read as a stream, and answered in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from encore.checkpoint.hub import resolve
from encore.checkpoint.pretrained import load
from encore.generate.decoding import Model, generate, source_limit, stream
from encore.generate.padding import by_length
from encore.generate.request import Event, Generation
from encore.generate.sampling import SamplingSettings
from encore.generate.source import Overflow, Source, SourceReader
from encore.model.encoder import Encoder
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import Tokenizer, load_tokenizer

BATCHES_AHEAD = 4
"""How many batches of texts are read ahead, to put those of like length together."""


@dataclass(frozen=True)
class Answer:
    """What was generated for one text, and the source it was generated from."""

    source: Source
    generation: Generation

    @property
    def text(self) -> str:
        return self.generation.text


class TextGenerator:
    """Generates for texts. How sources longer than allowed are treated is said once, here (see `SourceReader`)."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        chat: bool = False,
        max_source_tokens: int | None = None,
        overflow: Overflow = "error",
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat
        self.max_source_tokens = max_source_tokens
        self.overflow: Overflow = overflow
        self.warn = warn

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        chat: bool = False,
        max_source_tokens: int | None = None,
        overflow: Overflow = "error",
        warn: Callable[[str], None] | None = None,
    ) -> TextGenerator:
        """From a checkpoint folder that holds its tokenizer."""
        folder = resolve(name_or_folder)
        model = load(folder, dtype=dtype, device=device)
        assert not isinstance(model, Encoder)  # part="all"
        tokenizer = load_tokenizer(folder)
        return cls(model, tokenizer, chat=chat, max_source_tokens=max_source_tokens, overflow=overflow, warn=warn)

    def reader(self, max_target_tokens: int) -> SourceReader:
        """What makes sources of texts, when up to this many target tokens are to follow."""
        limit = source_limit(self.model, max_target_tokens)
        return SourceReader(
            self.tokenizer,
            max_tokens=limit if self.max_source_tokens is None else min(limit, self.max_source_tokens),
            encoder_decoder=isinstance(self.model, T5Gemma),
            chat=self.chat,
            overflow=self.overflow,
            warn=self.warn,
        )

    def stream(self, text: str, settings: SamplingSettings | None = None) -> Iterator[Event]:
        """The tokens and pieces of text for one text, as they come."""
        settings = settings or SamplingSettings()
        source = self.reader(settings.max_target_tokens).read(text)
        return stream(self.model, [source.tokens], settings, tokenizer=self.tokenizer)

    def generate(
        self, texts: Iterable[str], settings: SamplingSettings | None = None, *, batch_size: int = 8
    ) -> Iterator[Answer]:
        """One answer per text, in their order, while `texts` is being read.

        Some batches are read ahead and sorted by length, so that little is padded; with `batch_size=1` each answer
        comes before the next text is read.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string; give a list of texts, even of one")
        settings = settings or SamplingSettings()
        reader = self.reader(settings.max_target_tokens)
        ahead = batch_size * BATCHES_AHEAD if batch_size > 1 else 1
        numbered = enumerate(texts, start=1)
        while chunk := list(itertools.islice(numbered, ahead)):
            sources = [reader.read(text, number) for number, text in chunk]
            answers: dict[int, Answer] = {}
            for rows in by_length([source.tokens for source in sources], batch_size):
                batch = [sources[row].tokens for row in rows]
                generations = generate(self.model, batch, settings, tokenizer=self.tokenizer)
                for row, generation in zip(rows, generations, strict=True):
                    answers[row] = Answer(sources[row], generation)
            yield from (answers[row] for row in range(len(chunk)))
