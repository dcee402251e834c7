"""Text and pictures -> the ids and pixels of a source, as long as allowed and never cut in silence. No torch.

    text      in the source format that is stored with the checkpoint (`<bos>` before, `<eos>` behind, or not); a
              decoder-only model that continues text has no `<eos>` in it, one that was tuned on pairs has
    chat      the text as one user turn, with the model's turn opened behind it
    picture   <start_of_image>, placeholders and <end_of_image>, by the ids of the model's config

A text that is longer than allowed is an error, unless it was asked to be cut. With pictures it is never cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from encore.config import ModelConfig, T5GemmaConfig

if TYPE_CHECKING:
    from encore.images import PanAndScan, PictureSource, Pixels
    from encore.tokenizer import Tokenizer

Overflow = Literal["error", "keep-start", "keep-end"]


class SourceCutWarning(UserWarning):
    """A source was longer than allowed, and was cut because that was asked for."""


@dataclass(frozen=True)
class Source:
    """A text, the ids that the model reads of it, how many were cut, and the pixels (N, 3, size, size) in [-1, 1]."""

    text: str
    tokens: list[int]
    num_tokens_cut: int = 0
    pictures: Pixels | None = None


@dataclass(frozen=True)
class PictureFormat:
    """What a model makes of a picture: pixels of one size, and ids around its placeholders.

    The ids are the config's. A T5Gemma 2 that was adapted keeps the tokenizer of Gemma 3, whose `<image_soft_token>`
    (262144) lies outside its embedding, so the tokenizer's own placeholder is never used.
    """

    image_size: int
    tokens: tuple[int, ...]
    placeholder: int

    @classmethod
    def of(cls, config: ModelConfig) -> PictureFormat:
        """Raises ValueError for a model that reads text only."""
        if config.vision is None:
            raise ValueError(f"pictures were given, but this {config.model_type} reads text only")
        placeholders = (config.image_token_index,) * config.vision.mm_tokens_per_image
        tokens = (config.boi_token_index, *placeholders, config.eoi_token_index)
        stack = config.encoder if isinstance(config, T5GemmaConfig) else config.stack
        if max(tokens) >= stack.vocab_size:
            raise ValueError(
                f"the model's picture tokens have ids up to {max(tokens)}, but its vocabulary ends at "
                f"{stack.vocab_size - 1}; set boi_token_index, eoi_token_index and image_token_index in config.json"
            )
        return cls(config.vision.image_size, tokens, config.image_token_index)


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
        chat: bool = False,
        overflow: Overflow = "error",
        picture_format: PictureFormat | None = None,
        pan_and_scan: PanAndScan | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        if overflow not in get_args(Overflow):
            raise ValueError(f"overflow is {overflow!r}; expected one of {', '.join(get_args(Overflow))}")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.chat = chat
        self.overflow: Overflow = overflow
        self.picture_format = picture_format
        self.pan_and_scan = pan_and_scan
        self._warn = warn or (lambda message: warnings.warn(message, SourceCutWarning, stacklevel=4))
        frame = len(self._encode(""))
        if max_tokens <= frame:
            raise ValueError(
                f"at most {max_tokens} source tokens are allowed, and {frame} of them stand around every text: "
                "allow more source tokens, or fewer target tokens"
            )

    def read(self, text: str, number: int | None = None, pictures: Sequence[PictureSource] = ()) -> Source:
        """The source of one text; `number` names it in messages.

        Each picture stands where the text has a `<start_of_image>`; in a text without any, all stand in front.
        """
        if pictures:
            return self._read_with_pictures(text, number, pictures)
        tokens = self._encode(text)
        if len(tokens) <= self.max_tokens:
            return Source(text, tokens)
        found = self._too_long(tokens, number)
        if self.overflow == "error":
            raise ValueError(f"{found}; shorten it, allow more, or have it cut (overflow keep-start or keep-end)")
        cut = self._cut_message(text) if self.chat else self._cut(tokens)
        lost, kept = ("end", "beginning") if self.overflow == "keep-start" else ("beginning", "end")
        num_cut = len(tokens) - len(cut)
        self._warn(f"{found}; {num_cut} were cut from its {lost}, its {kept} was kept")
        return Source(text, cut, num_cut)

    def _too_long(self, tokens: list[int], number: int | None) -> str:
        what = "the source" if number is None else f"source {number}"
        return f"{what} has {len(tokens)} tokens and {self.max_tokens} are allowed"

    def _read_with_pictures(self, text: str, number: int | None, pictures: Sequence[PictureSource]) -> Source:
        import numpy as np

        from encore.images import load_picture, place_pictures, split_prompt, views

        form = self.picture_format
        if form is None:
            raise ValueError("pictures were given to a reader of text; give it a picture_format")
        marked = place_pictures(text, len(pictures))
        pixels = [views(load_picture(picture), form.image_size, self.pan_and_scan) for picture in pictures]
        tokens: list[int] = []
        pieces = split_prompt(self._as_prompt(marked), [len(part) - 1 for part in pixels])
        for i, piece in enumerate(pieces):
            frame = self.tokenizer.source_format
            bos, eos = frame.bos and i == 0, frame.eos and i == len(pieces) - 1
            ids = self.tokenizer.encode(piece, bos=bos, eos=eos)
            if form.placeholder in ids:
                raise ValueError(
                    f"the text itself holds the placeholder of pictures (id {form.placeholder}); "
                    "write <start_of_image> where a picture stands"
                )
            tokens += [*form.tokens, *ids] if i else ids
        if len(tokens) > self.max_tokens:
            raise ValueError(
                f"{self._too_long(tokens, number)}; a source with pictures is never cut: shorten its text, "
                f"give fewer pictures ({len(form.tokens)} tokens each), or allow more"
            )
        return Source(text, tokens, pictures=np.concatenate(pixels))

    def _as_prompt(self, text: str) -> str:
        return self.tokenizer.chat([{"role": "user", "content": text}]) if self.chat else text

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_source(self._as_prompt(text))

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


def with_pictures(
    texts: Iterable[str], pictures: Iterable[Sequence[PictureSource]] | None
) -> Iterator[tuple[str, Sequence[PictureSource]]]:
    """Each text with its pictures, while both are being read; an endless `pictures` serves any number of texts."""
    if pictures is None:
        yield from ((text, ()) for text in texts)
        return
    if isinstance(texts, Sized) and isinstance(pictures, Sized) and len(texts) != len(pictures):
        raise ValueError(f"pictures has {len(pictures)} entries for {len(texts)} texts; give one for each, () for none")
    of_texts = iter(pictures)
    for number, text in enumerate(texts, start=1):
        of_text = next(of_texts, None)
        if of_text is None:
            raise ValueError(f"pictures ended before text {number}; give an entry for each text, () for none")
        if isinstance(of_text, str | bytes) or not isinstance(of_text, Sequence):
            raise ValueError(f"the pictures of text {number} are {of_text!r:.80}; give a list, even of one")
        yield text, of_text
