"""Sources of ids -> a Memory, with torch: a batch in one pass, or each source in chunks that are encoded apart."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from encore.generate.chunks import Chunks, groups_of
from encore.generate.padding import pad_rows
from encore.model.encoder import Encoder, Memory


def encode_sources(
    encoder: Encoder, sources: Sequence[Sequence[int]], pictures: Float[Tensor, "N C size size"] | None = None
) -> Memory:
    """Row i holds the states of source i, as long as the source has ids, with padding on the right.

    `pictures` stand in the order of their placeholders over the sources.
    """
    if not any(isinstance(source, Chunks) for source in sources):
        return _encode(encoder, sources, pictures)
    parts: list[list[Memory]] = []
    used = 0
    for source in sources:
        parts.append([])
        for group in groups_of(source):
            pixels = None
            if pictures is not None and encoder.config.vision is not None:
                placeholders = sum(row.count(encoder.config.image_token_index) for row in map(list, group))
                number = placeholders // encoder.config.vision.mm_tokens_per_image
                pixels, used = (pictures[used : used + number] if number else None), used + number
            parts[-1].append(_encode(encoder, group, pixels))
    return Memory.join(parts)


def _encode(encoder: Encoder, rows: Sequence[Sequence[int]], pictures: Tensor | None) -> Memory:
    device = encoder.embed_tokens.weight.device
    tokens, mask = pad_rows(rows, encoder.config.pad_token_id, side="right", device=device)
    return encoder(tokens, mask, pictures=pictures)
