"""T5Gemma and T5Gemma 2 (arXiv 2504.06225, 2512.14856): encode, decode, forward.

memory = model.encode(source)                 # once per input
logits = model.decode(target, memory)         # all positions at once, for training and scoring
cache = model.make_cache(memory, max_target_tokens=100)
logits = model.decode(next_tokens, memory, cache)      # a few at a time, for generation
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from encore.config import T5GemmaConfig
from encore.model.cache import Cache
from encore.model.decoder import Decoder
from encore.model.encoder import Encoder, Memory
from encore.model.layers import ScaledEmbedding, init_weights, vocabulary_logits


class T5Gemma(nn.Module):
    """An encoder-decoder. T5Gemma 2 ties encoder input, decoder input and head; T5Gemma only the last two.

    With `config.shared_stack` the encoder's layers are made of the decoder's modules, and have its final norm.
    """

    origin: Path | None = None
    """The folder it was loaded from, if any."""

    def __init__(self, config: T5GemmaConfig, *, vision: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, vision=vision)
        if config.tied_embeddings:
            embed_tokens = self.encoder.embed_tokens
        else:
            embed_tokens = ScaledEmbedding(config.decoder.vocab_size, config.decoder.hidden_size)
        self.decoder = Decoder(config, embed_tokens)
        if config.shared_stack:
            for mine, theirs in zip(self.encoder.layers, self.decoder.layers, strict=True):
                for name, _ in list(mine.named_children()):
                    setattr(mine, name, getattr(theirs, name))
            self.encoder.norm = self.decoder.norm

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        return self.decoder.embed_tokens.weight

    def encode(
        self,
        encoder_input_tokens: Int[Tensor, "B S"],
        encoder_mask: Bool[Tensor, "B S"] | None = None,
        *,
        positions: Int[Tensor, "#B S"] | None = None,
        pictures: Float[Tensor, "N C size size"] | None = None,
        segment_ids: Int[Tensor, "B S"] | None = None,
    ) -> Memory:
        """Source ids to a Memory. `encoder_mask` is True for real tokens; None = all, whatever the ids.

        `pictures`, pixels in [-1, 1], stand in the order of their placeholders over the batch. `segment_ids` are of
        packed rows: 0 = padding, 1, 2, … rising from the left; each segment is read as if it were alone.
        """
        return self.encoder(
            encoder_input_tokens, encoder_mask, positions=positions, pictures=pictures, segment_ids=segment_ids
        )

    def make_cache(self, memory: Memory, max_target_tokens: int) -> Cache:
        """Keys and values of the memory, computed once, and room for `max_target_tokens` tokens."""
        weight = self.head_weight
        return Cache(
            self.config.decoder,
            batch_size=memory.states.shape[0],
            max_tokens=max_target_tokens,
            dtype=weight.dtype,
            device=weight.device,
            memories=self.decoder.memory_keys_values(memory),
        )

    def decode_states(
        self,
        decoder_input_tokens: Int[Tensor, "B T"],
        memory: Memory,
        cache: Cache | None = None,
        *,
        decoder_mask: Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "#B T"] | None = None,
        segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """States after the final norm, before the head. `segment_ids` go with a packed memory, not with a cache."""
        return self.decoder(
            decoder_input_tokens,
            memory,
            cache,
            decoder_mask=decoder_mask,
            positions=positions,
            segment_ids=segment_ids,
        )

    def decode(
        self,
        decoder_input_tokens: Int[Tensor, "B T"],
        memory: Memory,
        cache: Cache | None = None,
        *,
        decoder_mask: Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "#B T"] | None = None,
        segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits after soft-capping. With a cache, takes the next tokens and updates it in place."""
        states = self.decode_states(
            decoder_input_tokens,
            memory,
            cache,
            decoder_mask=decoder_mask,
            positions=positions,
            segment_ids=segment_ids,
        )
        return self.logits(states)

    def logits(self, states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        return vocabulary_logits(states, self.head_weight, self.config.final_logit_softcapping)

    def states(
        self,
        encoder_input_tokens: Int[Tensor, "B S"],
        decoder_input_tokens: Int[Tensor, "B T"],
        encoder_mask: Bool[Tensor, "B S"] | None = None,
        decoder_mask: Bool[Tensor, "B T"] | None = None,
        *,
        pictures: Float[Tensor, "N C size size"] | None = None,
        encoder_segment_ids: Int[Tensor, "B S"] | None = None,
        decoder_segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Decoder states of source and target at once: for losses that never hold all logits.

        Segment ids are of packed rows: segment n of a target goes with segment n of its source, and sees no other.
        """
        memory = self.encode(encoder_input_tokens, encoder_mask, pictures=pictures, segment_ids=encoder_segment_ids)
        return self.decode_states(
            decoder_input_tokens, memory, decoder_mask=decoder_mask, segment_ids=decoder_segment_ids
        )

    def forward(
        self,
        encoder_input_tokens: Int[Tensor, "B S"],
        decoder_input_tokens: Int[Tensor, "B T"],
        encoder_mask: Bool[Tensor, "B S"] | None = None,
        decoder_mask: Bool[Tensor, "B T"] | None = None,
        *,
        pictures: Float[Tensor, "N C size size"] | None = None,
        encoder_segment_ids: Int[Tensor, "B S"] | None = None,
        decoder_segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        states = self.states(
            encoder_input_tokens,
            decoder_input_tokens,
            encoder_mask,
            decoder_mask,
            pictures=pictures,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
        )
        return self.logits(states)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights: normal(0, 0.02), norms zero."""
        init_weights(self, generator)
