"""How many bytes generation takes at most, counted from the config before anything is allocated. No torch.

Caches are counted exactly: their buffers have these sizes from the start. What a pass works with is bounded from above:
the widest layer, in float32 beside the model's own dtype, and the scores that attention holds at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from encore.config import ModelConfig, StackConfig, T5GemmaConfig
from encore.generate.rows import Size

SCORES = 1 << 23
"""Scores of one block of queries, of which a pass holds COPIES: those of torch (`kernels/attention.py`) are half."""

COPIES = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. `reading` (sources) and `step` are not needed at the same time."""

    weights: int
    caches: int
    reading: int
    step: int
    rows: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + max(self.reading, self.step)


def plan(
    config: ModelConfig, size: Size, *, weights: int, caches: int, encode_tokens: int, element_bytes: int
) -> MemoryPlan:
    """`caches`: bytes of the buffers; `element_bytes`: of a state in the dtype that the model runs in."""
    reader = config.encoder if isinstance(config, T5GemmaConfig) else config.stack
    writer = config.decoder if isinstance(config, T5GemmaConfig) else config.stack
    tokens = max(size.source_tokens, encode_tokens)
    # A block is never smaller than MIN_ROWS queries.
    blocks = max(SCORES, 32 * reader.num_attention_heads * tokens)
    # The keys and values of a batch of sources are made for all layers before they go to their rows.
    stack_width = writer.num_hidden_layers * writer.num_key_value_heads * writer.head_dim
    made = (2 * stack_width + 4 * reader.hidden_size) * element_bytes
    reading = tokens * max(_bytes_per_token(reader, element_bytes), made) + COPIES * 4 * blocks
    new = size.rows * size.new_tokens
    seen = size.source_tokens + size.target_tokens + size.new_tokens
    scores = COPIES * 4 * new * writer.num_attention_heads * seen
    logits = new * writer.vocab_size * (element_bytes + 3 * 4)
    step = new * _bytes_per_token(writer, element_bytes) + scores + logits
    return MemoryPlan(weights, caches, reading, step, size.rows)


def _bytes_per_token(stack: StackConfig, element_bytes: int) -> int:
    """Of the states that a layer works with: the residual, and the feed-forward's or the attention's, a few times."""
    heads = (stack.num_attention_heads + 2 * stack.num_key_value_heads) * stack.head_dim
    return (3 * stack.hidden_size + 3 * max(stack.intermediate_size, 2 * heads)) * (element_bytes + 4)
