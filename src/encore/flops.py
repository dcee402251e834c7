"""Model FLOPs of training: what a step needs at least, by which utilisation is reckoned (PaLM, arXiv 2204.02311).

6 for each weight of a matrix and token that goes through it (2 in the forward, 4 in the backward), and 12 x head width
for each head and pair of a query and a key that it may see (two products). Which tokens go through which matrix:

    the encoder's layers                            source
    the decoder's layers                            target
      keys and values of cross-attention            source
      keys and values of merged attention           source and target
    a projection of the memory                      source
    the head                                        target

Not counted: looking up embeddings, norms, softmax, the optimizer, whatever is computed twice, and pairs that are
computed but masked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from encore.config import GemmaConfig, ModelConfig, StackConfig
from encore.model.gemma import Gemma
from encore.model.masks import EVERYTHING, Window, decoder_window, encoder_window
from encore.model.t5gemma import T5Gemma


def training_flops(config: ModelConfig, source_tokens: int, target_tokens: int) -> int:
    """Of the forward and backward of one row. A decoder-only model reads source and target as one."""
    if isinstance(config, GemmaConfig):
        with torch.device("meta"):
            gemma = Gemma(config)
        tokens = source_tokens + target_tokens
        linear = (_weights(gemma.layers) + gemma.head_weight.numel()) * tokens
        windows = (decoder_window(config.stack, kind) for kind in config.stack.layer_types)
        return 6 * linear + _attention(config.stack, tokens, windows)

    with torch.device("meta"):
        model = T5Gemma(config)
    encoder, decoder, target_layers = config.encoder, config.decoder, model.decoder.layers
    on_source = _weights(model.encoder.layers)
    on_source += sum(_weights(part) for name, part in model.decoder.named_children() if name == "memory_proj")
    on_target = _weights(target_layers) + model.head_weight.numel()
    readers = [i for i, reads in enumerate(config.memory_layers) if reads]
    for i in readers:
        layer: Any = target_layers[i]
        merged = config.attention == "merged"
        attention = layer.self_attn if merged else layer.cross_attn
        keys_values = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
        on_source += keys_values
        on_target -= 0 if merged else keys_values
    pairs_with_memory = len(readers) * source_tokens * target_tokens
    return (
        6 * (on_source * source_tokens + on_target * target_tokens)
        + _attention(encoder, source_tokens, (encoder_window(config, kind) for kind in encoder.layer_types))
        + _attention(decoder, target_tokens, (decoder_window(decoder, kind) for kind in decoder.layer_types))
        + 12 * decoder.num_attention_heads * decoder.head_dim * pairs_with_memory
    )


def _weights(module: nn.Module) -> int:
    """Of matrices, without norms."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)


def _attention(stack: StackConfig, tokens: int, windows: Iterable[Window]) -> int:
    return 12 * stack.num_attention_heads * stack.head_dim * sum(pairs_seen(window, tokens) for window in windows)


def pairs_seen(window: Window, tokens: int) -> int:
    """How many (query, key) pairs of one row a window lets through."""
    if window == EVERYTHING:
        return tokens * tokens
    left = tokens if window.left is None else window.left
    right = tokens if window.right is None else window.right
    return sum(min(i, left) + 1 + min(tokens - 1 - i, right) for i in range(tokens))
