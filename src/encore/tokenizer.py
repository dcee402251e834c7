"""Text to token ids and back, for Gemma's kind of tokenizer: byte-pair pieces, U+2581 for a space, byte fallback.

A folder holds `tokenizer.json` (read by the `tokenizers` library) or `tokenizer.model` (SentencePiece), the usual
`tokenizer_config.json`, and our `encore.json`:

    {"source_format": {"bos": true, "eos": true}, "sentinels": [6016, 128]}

The source format says how every source (encoder input) is framed, in training and in use alike; without `encore.json`
it follows `add_bos_token` and `add_eos_token`. The sentinels mark the holes of denoising examples: `<unused100>`
onward in Gemma 3, `<unused0>`..`<unused98>` in Gemma 2, where nothing else is said. No torch here.

    tokenizer = load_tokenizer(folder)
    tokenizer.encode_source("Hello.")          [bos, ..., eos]      (by the source format)
    tokenizer.encode_target("Hallo.")          [..., eos]           (labels; the decoder reads [bos] + labels[:-1])
    tokenizer.decode(ids)                      "Hallo."
"""

from __future__ import annotations

import codecs
import copy
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encore.tokenizer_backends import BYTE, SPACE, Backend, SentencePieceBackend
from encore.tokenizer_index import open_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"


@dataclass(frozen=True)
class SourceFormat:
    """How a source is framed: BOS in front or not, EOS at the end or not."""

    bos: bool
    eos: bool


class Tokenizer:
    """Encode, decode, frame and stream. Made by `load_tokenizer`.

    vocab_size: the model's id range (of `config.json` beside the tokenizer; else the largest id + 1).
    stop_ids: where generation ends (EOS, and `<end_of_turn>` where the vocabulary has it).
    sentinel_ids: the hole markers of denoising, in order of use.
    """

    def __init__(
        self,
        folder: Path,
        backend: Backend,
        *,
        ids: Mapping[str, int],
        vocab_size: int,
        source_format: SourceFormat,
        sentinels: range,
    ) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.pad_id, self.bos_id, self.eos_id = ids["pad"], ids["bos"], ids["eos"]
        self.source_format = source_format
        self.sentinel_ids: tuple[int, ...] = tuple(sentinels)
        end_of_turn = backend.token_id(END_OF_TURN)
        self.stop_ids: tuple[int, ...] = (self.eos_id,) if end_of_turn is None else (self.eos_id, end_of_turn)
        self.backend = backend
        self._special_ids = backend.special_ids | set(ids.values())
        self._bytes: dict[int, bytes] = {}
        cut = [re.escape(escape[0]) + r"\Z" for escape in backend.escapes]  # an escape that the end of the text may cut
        self._escape = re.compile("|".join([*map(re.escape, backend.escapes), *cut])) if cut else None

    # --- encoding

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS in front and EOS at the end as asked; one that is already there is not doubled."""
        return self.encode_batch([text], bos=bos, eos=eos)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, eos: bool = False) -> list[list[int]]:
        """`encode` for many texts at once."""
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"encode takes text, not {type(text).__name__} ({text!r:.80}); decode bytes first")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the text is not Unicode ({error}); repair it before encoding: {text!r:.80}"
                ) from error
        batch = self.backend.encode_batch(texts)
        for ids in batch:
            if self.backend.size > self.vocab_size and ids and max(ids) >= self.vocab_size:
                self._refuse(max(ids))
            if bos and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
            if eos and ids[-1:] != [self.eos_id]:
                ids.append(self.eos_id)
        return batch

    def encode_source(self, text: str) -> list[int]:
        """Ids of an encoder input, framed by `source_format`."""
        return self.encode(text, bos=self.source_format.bos, eos=self.source_format.eos)

    def encode_target(self, text: str) -> list[int]:
        """Labels: ids and EOS. The decoder reads [bos_id] + labels[:-1]."""
        return self.encode(text, eos=True)

    def token_id(self, piece: str) -> int | None:
        """The id of one piece by its exact name, such as "<unused0>"; None where there is none."""
        return self.backend.token_id(piece)

    # --- decoding

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, one for each broken sequence."""
        data = b"".join(self.token_bytes(int(i), skip_special=skip_special) for i in ids)
        text = "".join(self.resolve_escapes(data.decode("utf-8", "replace")))
        return text.removeprefix(" ") if self.backend.strip_space else text

    def decode_batch(self, batch: Iterable[Iterable[int]], *, skip_special: bool = True) -> list[str]:
        """`decode` for many rows."""
        return [self.decode(ids, skip_special=skip_special) for ids in batch]

    def streamer(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self, skip_special=skip_special)

    def token_bytes(self, token: int, *, skip_special: bool = False) -> bytes:
        """The UTF-8 bytes (perhaps half a character) that one id stands for; none for a row without a piece."""
        if skip_special and token in self._special_ids:
            return b""
        known = self._bytes.get(token)
        if known is None:
            if not 0 <= token < self.vocab_size:
                self._refuse(token)
            piece = self.backend.piece(token) or ""
            byte = BYTE.fullmatch(piece)
            known = bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()
            self._bytes[token] = known
        return known

    def resolve_escapes(self, text: str) -> tuple[str, str]:
        """`text` with its escapes replaced, and apart from it a last character that may begin another escape."""
        if self._escape is None:
            return text, ""
        held = ""

        def replacement(found: re.Match[str]) -> str:
            nonlocal held
            if found[0] in self.backend.escapes:
                return self.backend.escapes[found[0]]
            held = found[0]
            return ""

        return self._escape.sub(replacement, text), held

    def _refuse(self, token: int) -> None:
        raise ValueError(
            f"token id {token} is outside the model's vocabulary (0..{self.vocab_size - 1}); "
            "is this the tokenizer that belongs to the model?"
        )

    # --- conversations

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The source text of a conversation, up to where the model's next turn begins.

        `messages` are {"role", "content"} with roles user and assistant (or model) in turn, the last one the user's. A
        system message may come first; there is no system turn, so it opens the first user turn. As in Gemma's own
        template, white space around a message is dropped.
        """
        if self.token_id(START_OF_TURN) is None or self.token_id(END_OF_TURN) is None:
            raise ValueError(f"the tokenizer in {self.folder} has no turn tokens; it cannot hold a conversation")
        turns: list[tuple[str, str]] = []
        system = ""
        for i, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if not isinstance(content, str):
                raise ValueError(f"message {i} has content {content!r:.80}; give text")
            role = "model" if role == "assistant" else role
            if role == "system" and i == 0:
                system = content.strip() + "\n\n"
                continue
            expected = "model" if len(turns) % 2 else "user"
            if role != expected:
                raise ValueError(
                    f"message {i} has the role {message.get('role')!r} where {expected!r} is due; roles are user and "
                    "assistant in turn, after at most one system message at the start"
                )
            turns.append((expected, (system if not turns else "") + content.strip()))
        if len(turns) % 2 == 0:
            raise ValueError("a conversation must end with the user's message; add one")
        history = "".join(f"{START_OF_TURN}{role}\n{content}{END_OF_TURN}\n" for role, content in turns)
        return f"{history}{START_OF_TURN}model\n"

    # --- folders

    def with_source_format(self, source_format: SourceFormat) -> Tokenizer:
        """The same tokenizer with another framing of sources; `save` stores it."""
        other = copy.copy(self)
        other.source_format = source_format
        return other

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder` and write `encore.json` (other keys in it are kept)."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        found = [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).exists()]
        if not any(path.name in TOKENIZER_FILES[:2] for path in found):
            raise FileNotFoundError(f"the tokenizer was read from {self.folder}, where its files no longer are")
        for path in found:
            if path.resolve() != (target / path.name).resolve():
                shutil.copyfile(path, target / path.name)
        content = _read_json(target / "encore.json") or _read_json(self.folder / "encore.json")
        content["source_format"] = {"bos": self.source_format.bos, "eos": self.source_format.eos}
        content["sentinels"] = [self.sentinel_ids[0] if self.sentinel_ids else 0, len(self.sentinel_ids)]
        (target / "encore.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class StreamDecoder:
    """Text of ids that come one by one: whole characters only, and together exactly `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # the first character of what may become an escape
        self._at_start = tokenizer.backend.strip_space

    def push(self, token: int) -> str:
        """Take one id; return the text that is now certain (often "", while a character is incomplete)."""
        return self._certain(self._tokenizer.token_bytes(int(token), skip_special=self._skip_special), final=False)

    def finish(self) -> str:
        """The rest: what an incomplete character at the end comes to. The decoder then starts afresh."""
        rest = self._certain(b"", final=True)
        self._at_start = self._tokenizer.backend.strip_space
        self._characters.reset()
        return rest

    def _certain(self, data: bytes, *, final: bool) -> str:
        text = self._held + self._characters.decode(data, final)
        text, self._held = self._tokenizer.resolve_escapes(text)
        if final:
            text, self._held = text + self._held, ""
        if text and self._at_start:
            text, self._at_start = text.removeprefix(" "), False
        return text


def load_tokenizer(folder: str | Path, *, resolve: Callable[[str], Path] | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder. `resolve` turns a name that is no folder (a hub name) into one.

    Raises FileNotFoundError where there is no folder or no tokenizer in it, ValueError where a file is damaged.
    """
    path = Path(folder)
    if not path.is_dir() and resolve is not None:
        path = resolve(str(folder))
    if not path.is_dir():
        raise FileNotFoundError(f"no folder is called {str(folder)!r}; give the folder of a checkpoint or tokenizer")
    if (path / "tokenizer.json").exists():
        backend: Backend = open_json(path / "tokenizer.json")
    elif (path / "tokenizer.model").exists():
        backend = SentencePieceBackend(path / "tokenizer.model")
    else:
        raise FileNotFoundError(f"{path} has no tokenizer.json or tokenizer.model; copy the tokenizer's files there")
    config = _read_json(path / "special_tokens_map.json") | _read_json(path / "tokenizer_config.json")
    ids = {kind: _special_id(backend, config, kind, path) for kind in ("pad", "bos", "eos")}
    vocab_size = _vocab_size(_read_json(path / "config.json")) or backend.size
    ours = _read_json(path / "encore.json")
    stored_format = ours.get("source_format")
    if stored_format is None:
        stored_format = {"bos": config.get("add_bos_token", True), "eos": config.get("add_eos_token", False)}
    if not (isinstance(stored_format, dict) and all(isinstance(stored_format.get(k), bool) for k in ("bos", "eos"))):
        raise ValueError(
            f'{path} has the source format {stored_format!r}; encore.json should say {{"bos": true, "eos": true}} '
            "with true or false for each"
        )
    return Tokenizer(
        path,
        backend,
        ids=ids,
        vocab_size=vocab_size,
        source_format=SourceFormat(bos=stored_format["bos"], eos=stored_format["eos"]),
        sentinels=_sentinels(ours.get("sentinels"), backend, vocab_size, path),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch or save it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where an object is expected; fetch or save it again")
    return content


def _special_id(backend: Backend, config: Mapping[str, Any], kind: str, path: Path) -> int:
    name = config.get(f"{kind}_token") or f"<{kind}>"
    if isinstance(name, dict):
        name = name.get("content", "")
    found = backend.token_id(name)
    if found is None:
        raise ValueError(f"the tokenizer in {path} has no {kind} token {name!r}; name it in tokenizer_config.json")
    return found


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    """The rows of the embedding, wherever the model's config.json keeps them."""
    decoder, encoder = config.get("decoder") or {}, config.get("encoder") or {}
    for part in (config, config.get("text_config") or {}, decoder, encoder, encoder.get("text_config") or {}):
        if isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def _sentinels(stored: object, backend: Backend, vocab_size: int, path: Path) -> range:
    """The stored list, else `<unused100>` onward (Gemma 3), else `<unused0>`..`<unused98>` (Gemma 2)."""
    if stored is not None:
        if not (isinstance(stored, list) and len(stored) == 2 and all(type(n) is int and n >= 0 for n in stored)):
            raise ValueError(f"{path / 'encore.json'} has the sentinels {stored!r}; give [first id, count]")
        if sum(stored) > vocab_size:
            raise ValueError(f"{path / 'encore.json'} has sentinels {stored} beyond the {vocab_size} ids of the model")
        return range(stored[0], stored[0] + stored[1])
    for first_name in (100, 0):
        first = backend.token_id(f"<unused{first_name}>")
        if first is not None and first < vocab_size:
            count = 1
            while first + count < vocab_size and backend.piece(first + count) == f"<unused{first_name + count}>":
                count += 1
            return range(first, first + count)
    return range(0)
