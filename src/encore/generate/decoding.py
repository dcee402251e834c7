"""Models in torch: rows to generate with, the slow oracle beside them, log-probabilities and encoder states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encore.data.batch import Batch, decoder_batch, encoder_decoder_batch
from encore.generate.encoding import encode_sources
from encore.generate.memory import MemoryPlan, plan
from encore.generate.padding import PicturesOfRows, join_pictures
from encore.generate.request import Generation
from encore.generate.rows import Size, make_requests
from encore.generate.sampling import Logits, SamplingSettings
from encore.generate.torch_rows import TorchRows, cache_bytes
from encore.model.encoder import Encoder
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma

if TYPE_CHECKING:
    from encore.tokenizer import Tokenizer

Model = Gemma | T5Gemma

MAX_LOGITS = 1 << 25
"""Logits held at a time: 128 positions at a vocabulary of 262,144, 128 MiB in float32."""


def make_rows(model: Model, size: Size) -> TorchRows:
    return TorchRows(model, size)


def memory_plan(model: Model, size: Size, encode_tokens: int) -> MemoryPlan:
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    element_bytes = model.head_weight.element_size()
    caches = cache_bytes(model.config, size, element_bytes)
    how = {"encode_tokens": encode_tokens, "element_bytes": element_bytes}
    return plan(model.config, size, weights=weights, caches=caches, **how)


def naive_generate(
    model: Model,
    source: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
) -> Generation:
    """One source, no cache, no batch: the whole target is read for every token. The oracle of `batch.generate`."""
    (request,) = make_requests(model, [source], settings, tokenizer)
    device = model.head_weight.device
    pixels = join_pictures(pictures, 1)
    with torch.inference_mode():
        memory = encode_sources(model.encoder, [source], pixels) if isinstance(model, T5Gemma) else None
        while not request.finished:
            if isinstance(model, T5Gemma) and memory is not None:
                target = torch.tensor([[model.config.bos_token_id, *request.tokens]], device=device)
                logits = model.decode(target, memory)
            else:
                logits = model(torch.tensor([[*source, *request.tokens]], device=device), pictures=pixels)
            request.accept(_as_numpy(logits)[0])
    return request.result()


@torch.inference_mode()
def log_probabilities(
    model: Model, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log p of each target's ids after its source's: one forward pass.

    The head runs over the target's positions only, some at a time, so that no (B, T, V) tensor is held.
    """
    ids = {"bos_id": model.config.bos_token_id, "pad_id": model.config.pad_token_id}
    device = model.head_weight.device
    if isinstance(model, T5Gemma):
        batch = encoder_decoder_batch(sources, targets, **ids).to(device)
        assert batch.encoder_input_tokens is not None
        states = model.states(
            batch.encoder_input_tokens, batch.decoder_input_tokens, batch.encoder_mask, batch.decoder_mask
        )
    else:
        rows = [[*source, *target] for source, target in zip(sources, targets, strict=True)]
        batch = decoder_batch(rows, [len(source) for source in sources], **ids).to(device)
        states = model.states(batch.decoder_input_tokens, batch.decoder_mask)
    values = _target_log_probabilities(model, states, batch)
    return [part.tolist() for part in values.split([len(target) for target in targets])]


def _target_log_probabilities(model: Model, states: Tensor, batch: Batch) -> Tensor:
    """Those of the positions with weight, one row of the batch after the other, on the CPU."""
    scored = batch.decoder_loss_weights > 0
    positions, tokens = states[scored], batch.decoder_target_tokens[scored]
    step = max(1, MAX_LOGITS // model.head_weight.shape[0])
    parts: list[Tensor] = []
    for start in range(0, len(tokens), step):
        logits = model.logits(positions[start : start + step]).float()
        chosen = logits.gather(1, tokens[start : start + step, None])[:, 0]
        parts.append((chosen - logits.logsumexp(dim=1)).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def encoder_states(
    model: Encoder | T5Gemma, sources: Sequence[Sequence[int]], pictures: PicturesOfRows = None
) -> list[NDArray[np.float32]]:
    """The states (S, D) of each source, without padding."""
    encoder = model.encoder if isinstance(model, T5Gemma) else model
    states = encode_sources(encoder, sources, join_pictures(pictures, len(sources))).states.float().cpu().numpy()
    return [states[row, : len(source)] for row, source in enumerate(sources)]


def _as_numpy(logits: Tensor) -> list[Logits]:
    """The last position's logits of each row, (V,) in float32."""
    return list(logits[:, -1].float().cpu().numpy())
