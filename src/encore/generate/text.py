"""Text in, text out: a model with its tokenizer.

    generator = TextGenerator.load("translator")
    [answer.text for answer in generator.generate(["Good morning."])]      # ["Guten Morgen."]

    seeing = TextGenerator.load(folder, vision=True)
    seeing.generate(["What is this?"], pictures=[["photo.jpg"]])

Any number of texts is read as a stream, and answered in order.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from encore.checkpoint.hub import resolve
from encore.config import T5GemmaConfig
from encore.export.manifest import is_exported
from encore.generate.batch import beam_search, generate, stream
from encore.generate.beam import BeamSettings
from encore.generate.drafts import DraftSettings
from encore.generate.onnx_backend import OnnxModel
from encore.generate.padding import PicturesOfRows, by_length
from encore.generate.request import Event, Generation
from encore.generate.rows import source_limit
from encore.generate.sampling import SamplingSettings
from encore.generate.source import Overflow, PictureFormat, Source, SourceReader, with_pictures
from encore.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

    from encore.generate.decoding import Model
    from encore.images import PanAndScan, PictureSource

BATCHES_AHEAD = 4
"""How many batches of texts are read ahead, to put those of like length together."""


@dataclass(frozen=True)
class Answer:
    """What was generated for a text, the source it was generated from, and further beams if several were wanted."""

    source: Source
    generation: Generation
    others: list[Generation] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.generation.text


class TextGenerator:
    """Generates for texts. How sources longer than allowed are treated is said once, here (see `SourceReader`)."""

    def __init__(
        self,
        model: Model | OnnxModel,
        tokenizer: Tokenizer,
        *,
        chat: bool = False,
        max_source_tokens: int | None = None,
        overflow: Overflow = "error",
        pan_and_scan: PanAndScan | None = None,
        chunk_tokens: int | None = None,
        instruction: str = "",
        drafts: DraftSettings | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat
        self.max_source_tokens = max_source_tokens
        self.overflow: Overflow = overflow
        self.pan_and_scan = pan_and_scan
        self.chunk_tokens = chunk_tokens
        self.instruction = instruction
        self.drafts = drafts
        self.warn = warn

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: str | torch.dtype | None = "auto",
        device: torch.device | str = "cpu",
        vision: bool = False,
        chat: bool = False,
        max_source_tokens: int | None = None,
        overflow: Overflow = "error",
        pan_and_scan: PanAndScan | None = None,
        chunk_tokens: int | None = None,
        instruction: str = "",
        drafts: DraftSettings | None = None,
        warn: Callable[[str], None] | None = None,
        threads: int | None = None,
    ) -> TextGenerator:
        """From a checkpoint folder that holds its tokenizer, or from an exported one, which needs no torch.

        `vision` loads the tower that pictures need. It, `dtype` (as in `checkpoint.pretrained.load`; here float32 on a
        CPU unless asked otherwise) and `device` are for checkpoints, `threads` is for exported folders (torch has a
        setting of its own).
        """
        folder = resolve(name_or_folder)
        model: Model | OnnxModel
        if is_exported(folder):
            if dtype not in (None, "auto") or str(device) != "cpu":
                raise ValueError(
                    f"{folder} is exported: it runs on the CPU with its own weights; set no dtype or device"
                )
            if vision:
                raise ValueError(f"{folder} is exported: it reads text only; give the checkpoint it was made from")
            model = OnnxModel.load(folder, threads=threads, wait=False)  # while the tokenizer is read
        else:
            from encore.checkpoint.pretrained import load
            from encore.model.encoder import Encoder

            loaded = load(folder, dtype=dtype, device=device, vision=vision)
            assert not isinstance(loaded, Encoder)  # part="all"
            model = loaded
        return cls(
            model,
            load_tokenizer(folder),
            chat=chat,
            max_source_tokens=max_source_tokens,
            overflow=overflow,
            pan_and_scan=pan_and_scan,
            chunk_tokens=chunk_tokens,
            instruction=instruction,
            drafts=drafts,
            warn=warn,
        )

    def reader(self, max_target_tokens: int, *, pictures: bool = False) -> SourceReader:
        """What makes sources of texts (and of pictures), when up to this many target tokens are to follow."""
        limit = longest = source_limit(self.model, max_target_tokens)
        if self.chunk_tokens is not None:
            if not isinstance(self.model.config, T5GemmaConfig):
                raise ValueError("a decoder-only model has no encoder to read chunks with; leave chunk_tokens out")
            if self.chunk_tokens > limit:
                raise ValueError(f"chunk_tokens is {self.chunk_tokens}; the model takes at most {limit} at a time")
            longest = sys.maxsize  # of all chunks together
        return SourceReader(
            self.tokenizer,
            max_tokens=longest if self.max_source_tokens is None else min(longest, self.max_source_tokens),
            chat=self.chat,
            overflow=self.overflow,
            picture_format=PictureFormat.of(self.model.config) if pictures else None,
            pan_and_scan=self.pan_and_scan,
            chunk_tokens=self.chunk_tokens,
            instruction=self.instruction,
            warn=self.warn,
        )

    def stream(
        self, text: str, settings: SamplingSettings | None = None, *, pictures: Sequence[PictureSource] = ()
    ) -> Iterator[Event]:
        """The tokens and pieces of text for one text, as they come."""
        settings = settings or SamplingSettings()
        source = self.reader(settings.max_target_tokens, pictures=bool(pictures)).read(text, pictures=pictures)
        return stream(
            self.model,
            [source.tokens],
            settings,
            tokenizer=self.tokenizer,
            pictures=[source.pictures],
            drafts=self.drafts,
        )

    def generate(
        self,
        texts: Iterable[str],
        settings: SamplingSettings | None = None,
        *,
        batch_size: int = 8,
        pictures: Iterable[Sequence[PictureSource]] | None = None,
        beams: BeamSettings | None = None,
    ) -> Iterator[Answer]:
        """One answer per text, in their order, while `texts` is being read.

        Some batches are read ahead and sorted by length, so that little is padded; with `batch_size=1` each answer
        comes before the next text is read. `pictures` has an entry for each text: its pictures (file names, bytes of
        files or Pillow images), () for none. Each stands at a `<start_of_image>` of the text, or all stand in front.
        `beams` searches instead of taking one token after the other.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string; give a list of texts, even of one")
        settings = settings or SamplingSettings()
        reader = self.reader(settings.max_target_tokens, pictures=pictures is not None)
        ahead = batch_size * BATCHES_AHEAD if batch_size > 1 else 1
        numbered = enumerate(with_pictures(texts, pictures), start=1)
        while chunk := list(itertools.islice(numbered, ahead)):
            sources = [reader.read(text, number, of_text) for number, (text, of_text) in chunk]
            answers: dict[int, Answer] = {}
            for rows in by_length([source.tokens for source in sources], batch_size):
                batch = [sources[row].tokens for row in rows]
                pixels = [sources[row].pictures for row in rows]
                for row, (best, *others) in zip(rows, self._run(batch, settings, pixels, beams), strict=True):
                    answers[row] = Answer(sources[row], best, others)
            yield from (answers[row] for row in range(len(chunk)))

    def _run(
        self,
        sources: Sequence[Sequence[int]],
        settings: SamplingSettings,
        pictures: PicturesOfRows,
        beams: BeamSettings | None,
    ) -> list[list[Generation]]:
        """For each source its targets, best first."""
        given = {"tokenizer": self.tokenizer, "pictures": pictures}
        if beams is not None:
            return beam_search(self.model, sources, settings, beams=beams, **given)
        return [[found] for found in generate(self.model, sources, settings, drafts=self.drafts, **given)]
