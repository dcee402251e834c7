"""Text and pictures -> the ids and pixels of a source, as long as allowed and never cut in silence. No torch.

    text      in the source format that is stored with the checkpoint (`<bos>` before, `<eos>` behind, or not); a
              decoder-only model that continues text has no `<eos>` in it, one that was tuned on pairs has
    chat      the text as one user turn, with the model's turn opened behind it
    picture   <start_of_image>, placeholders and <end_of_image>, by the ids of the model's config
    chunks    pieces of a long text, each framed as a text of its own behind one and the same instruction

A text that is longer than allowed is an error, unless it was asked to be cut. With pictures it is never cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from encore.config import ModelConfig, T5GemmaConfig
from encore.generate.chunks import Chunks, cut

if TYPE_CHECKING:
    from encore.images import PanAndScan, PictureSource, Pixels
    from encore.tokenizer import Tokenizer

Overflow = Literal["error", "keep-start", "keep-end"]


class SourceCutWarning(UserWarning):
    """A source was longer than allowed, and was cut because that was asked for."""


@dataclass(frozen=True)
class Source:
    """A text, the ids that the model reads of it (`Chunks` if in chunks), how many were cut, and the pixels.

    Those are (N, 3, size, size), in [-1, 1].
    """

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

    With `chunk_tokens` a text becomes chunks of at most so many tokens, each with the frame of a whole text and the
    `instruction` in front, and `max_tokens` counts the text without them.
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
        chunk_tokens: int | None = None,
        instruction: str = "",
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
        self.chunk_tokens = chunk_tokens
        self.instruction = instruction
        if chunk_tokens is None and instruction:
            raise ValueError("an instruction is repeated before each chunk; say with chunk_tokens how long they may be")
        frame = len(self._encode(""))
        if chunk_tokens is not None:
            self._frame = self._chunk_frame()
            around = sum(map(len, self._frame))
            if chunk_tokens <= around:
                raise ValueError(
                    f"chunks of {chunk_tokens} tokens were asked for, and {around} stand around every piece of text: "
                    "allow longer chunks" + (", or shorten the instruction" if instruction else "")
                )
        if max_tokens <= frame:
            raise ValueError(
                f"at most {max_tokens} source tokens are allowed, and {frame} of them stand around every text: "
                "allow more source tokens, or fewer target tokens"
            )

    def read(self, text: str, number: int | None = None, pictures: Sequence[PictureSource] = ()) -> Source:
        """The source of one text; `number` names it in messages.

        Each picture stands where the text has a `<start_of_image>`; in a text without any, all stand in front.
        """
        if self.chunk_tokens is not None:
            return self._read_in_chunks(text, number, pictures)
        if pictures:
            return self._read_with_pictures(text, number, pictures)
        tokens = self._encode(text)
        if len(tokens) <= self.max_tokens:
            return Source(text, tokens)
        found = self._too_long(len(tokens), number)
        self._refuse_or_cut(found)
        kept = self._cut_message(text) if self.chat else self._cut(tokens)
        self._say_cut(found, len(tokens) - len(kept))
        return Source(text, kept, len(tokens) - len(kept))

    def _too_long(self, num_tokens: int, number: int | None) -> str:
        what = "the source" if number is None else f"source {number}"
        return f"{what} has {num_tokens} tokens and {self.max_tokens} are allowed"

    def _refuse_or_cut(self, found: str) -> None:
        if self.overflow == "error":
            raise ValueError(f"{found}; shorten it, allow more, or have it cut (overflow keep-start or keep-end)")

    def _say_cut(self, found: str, number: int) -> None:
        lost, kept = ("end", "beginning") if self.overflow == "keep-start" else ("beginning", "end")
        self._warn(f"{found}; {number} were cut from its {lost}, its {kept} was kept")

    def _read_in_chunks(self, text: str, number: int | None, pictures: Sequence[PictureSource]) -> Source:
        assert self.chunk_tokens is not None
        if pictures:
            from encore.images import place_pictures

            parts, pixels = self._parts(place_pictures(text, len(pictures)), pictures)
        else:
            parts, pixels = [self.tokenizer.encode(text)], None
        atoms: list[Sequence[int]] = []
        for i, part in enumerate(parts):
            if i and self.picture_format is not None:
                atoms.append(self.picture_format.tokens)
            atoms += [(token,) for token in part]
        num_tokens = sum(map(len, atoms))
        num_cut = max(0, num_tokens - self.max_tokens)
        if num_cut:
            found = self._too_long(num_tokens, number)
            if pictures:
                raise ValueError(f"{found}; a source with pictures is never cut: shorten its text, or allow more")
            self._refuse_or_cut(found)
            atoms = atoms[: self.max_tokens] if self.overflow == "keep-start" else atoms[num_cut:]
            self._say_cut(found, num_cut)
        before, after = self._frame
        room = self.chunk_tokens - len(before) - len(after)
        pieces = cut(atoms, room, self.tokenizer.token_bytes) or [[]]
        return Source(text, Chunks([*before, *piece, *after] for piece in pieces), num_cut, pixels)

    def _chunk_frame(self) -> tuple[list[int], list[int]]:
        """The ids before and behind the text of every chunk."""
        place = "{text}"
        front, _, back = self._as_prompt(place).partition(place)
        front += f"{self.instruction}\n" if self.instruction else ""
        frame = self.tokenizer.source_format
        return self.tokenizer.encode(front, bos=frame.bos), self.tokenizer.encode(back, eos=frame.eos)

    def _parts(self, marked: str, pictures: Sequence[PictureSource]) -> tuple[list[list[int]], Pixels]:
        """The ids of the text before, between and behind its pictures, without a frame, and the pixels."""
        import numpy as np

        from encore.images import load_picture, split_prompt, views

        form = self.picture_format
        if form is None:
            raise ValueError("pictures were given to a reader of text; give it a picture_format")
        pixels = [views(load_picture(picture), form.image_size, self.pan_and_scan) for picture in pictures]
        pieces = split_prompt(marked, [len(part) - 1 for part in pixels])
        parts = [self.tokenizer.encode(piece) for piece in pieces]
        if any(form.placeholder in part for part in parts):
            raise ValueError(
                f"the text itself holds the placeholder of pictures (id {form.placeholder}); "
                "write <start_of_image> where a picture stands"
            )
        return parts, np.concatenate(pixels)

    def _read_with_pictures(self, text: str, number: int | None, pictures: Sequence[PictureSource]) -> Source:
        from encore.images import place_pictures

        parts, pixels = self._parts(self._as_prompt(place_pictures(text, len(pictures))), pictures)
        assert self.picture_format is not None
        picture, tokenizer = self.picture_format.tokens, self.tokenizer
        tokens = [token for i, part in enumerate(parts) for token in (*(picture if i else ()), *part)]
        if tokenizer.source_format.bos and tokens[:1] != [tokenizer.bos_id]:
            tokens.insert(0, tokenizer.bos_id)
        if tokenizer.source_format.eos and tokens[-1:] != [tokenizer.eos_id]:
            tokens.append(tokenizer.eos_id)
        if len(tokens) > self.max_tokens:
            raise ValueError(
                f"{self._too_long(len(tokens), number)}; a source with pictures is never cut: shorten its text, "
                f"give fewer pictures ({len(picture)} tokens each), or allow more"
            )
        return Source(text, tokens, pictures=pixels)

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
