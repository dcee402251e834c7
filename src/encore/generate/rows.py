"""Rows: targets being decoded side by side, whatever runs the model, and the checks before. No torch, no onnxruntime.

    rows.join([source], [1]) ─▶ a new row ─ step([[first]]) ─▶ logits ─ Request.accept ─▶ id ─ step([[id]]) ─▶ …

`TorchRows` (torch) and `OnnxRows` (exported graphs) implement `Rows`; `scheduler.py` and `beam.py` drive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from encore.config import ModelConfig, StackConfig, T5GemmaConfig
from encore.generate.chunks import longest_chunk
from encore.generate.request import Request
from encore.generate.sampling import SamplingSettings

if TYPE_CHECKING:
    from encore.generate.padding import PicturesOfRows
    from encore.tokenizer import Tokenizer

RowLogits: TypeAlias = NDArray[np.float32]
"""Logits (T, V) of one row, after each of its T new tokens."""


class HasConfig(Protocol):
    """A model, whatever runs it."""

    @property
    def config(self) -> ModelConfig: ...


@dataclass(frozen=True)
class Size:
    """The most there may be: rows, tokens of a source, tokens of a target, new tokens of a row in one step."""

    rows: int
    source_tokens: int
    target_tokens: int
    new_tokens: int = 1


class Rows(Protocol):
    """Targets being decoded, row 0 to `num_rows` - 1; buffers for the most of them are made at the start."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Of the buffers, which neither grow nor shrink."""
        ...

    @property
    def log_sums(self) -> NDArray[np.float32] | None:
        """(rows, T) after a step with `summed`: log-sum-exp of its logits, if the model gives it with them."""
        ...

    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int], pictures: PicturesOfRows = None) -> None:
        """Read the sources in one batch; each becomes so many rows, behind the others, that share what was computed."""
        ...

    def step(self, tokens: Sequence[Sequence[int]], *, summed: bool = False) -> Sequence[RowLogits]:
        """Logits after each of the new tokens of each row (one or more). They are overwritten by the next step."""
        ...

    def rollback(self, counts: Sequence[int]) -> None:
        """Forget the last so many tokens of each row: fewer than the last step gave it."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order (they may repeat)."""
        ...


def first_token(config: ModelConfig, source: Sequence[int]) -> int:
    """What a row is given in its first step: `<bos>`, or a prompt's last token (`join` read those before it)."""
    return config.bos_token_id if isinstance(config, T5GemmaConfig) else source[-1]


def source_stack(model: HasConfig) -> StackConfig:
    """The stack that reads the source: the encoder, or the only one."""
    return model.config.encoder if isinstance(model.config, T5GemmaConfig) else model.config.stack


def target_stack(model: HasConfig) -> StackConfig:
    """The stack that writes: the decoder, or the only one."""
    return model.config.decoder if isinstance(model.config, T5GemmaConfig) else model.config.stack


def source_limit(model: HasConfig, max_target_tokens: int) -> int:
    """The most source tokens the model has positions for, when up to `max_target_tokens` follow."""
    limit = target_stack(model).max_position_embeddings
    if max_target_tokens > limit:
        raise ValueError(
            f"max_target_tokens is {max_target_tokens}; the model has {limit} target positions: ask for fewer tokens"
        )
    if isinstance(model.config, T5GemmaConfig):
        return model.config.encoder.max_position_embeddings
    return limit - max_target_tokens


def check_ids(rows: Sequence[Sequence[int]], vocab_size: int, what: str) -> None:
    """Refuses ids that the embedding does not have, before they become an index error deep inside."""
    for i, row in enumerate(rows):
        for token in row:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{what} {i} holds the id {token}; the model has ids 0 to {vocab_size - 1}: "
                    "use the tokenizer that belongs to the model"
                )


def make_requests(
    model: HasConfig,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None,
    tokenizer: Tokenizer | None,
) -> list[Request]:
    """One request for each source, with all that the user may have got wrong checked before anything is computed."""
    if settings is None or isinstance(settings, SamplingSettings):
        settings = [settings or SamplingSettings()] * len(sources)
    if len(settings) != len(sources):
        raise ValueError(f"{len(settings)} settings for {len(sources)} sources; give one for all, or one for each")
    check_ids(sources, source_stack(model).vocab_size, "source")
    encoder_decoder = isinstance(model.config, T5GemmaConfig)
    requests: list[Request] = []
    for row, (source, chosen) in enumerate(zip(sources, settings, strict=True)):
        limit, longest = source_limit(model, chosen.max_target_tokens), longest_chunk(source)
        if longest > limit:
            raise ValueError(
                f"source {row} has {longest} tokens; the model takes {limit}"
                + ("" if encoder_decoder else f" when up to {chosen.max_target_tokens} are to follow")
                + ": shorten it"
            )
        if not encoder_decoder and not source:
            raise ValueError(f"source {row} is empty; a decoder-only model needs a token to start from, such as <bos>")
        requests.append(
            Request(
                row,
                chosen,
                stop_ids=tokenizer.stop_ids if tokenizer else (model.config.eos_token_id,),
                seen=(model.config.bos_token_id,) if encoder_decoder else source,
                decoder=tokenizer.streamer() if tokenizer else None,
            )
        )
    return requests
