"""A batch through a model to its loss, and the precision that the products run in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encore.data.batch import Batch
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.objectives.losses import cross_entropy

Model = Gemma | T5Gemma


def summed_loss(model: Model, batch: Batch) -> Tensor:
    """Sum over the batch of loss weight x negative log-likelihood, in nats; differentiable."""
    with _lookups_added_to_head(model) as head:
        states = target_states(model, batch)
    loss, _ = cross_entropy(
        states.flatten(0, 1),
        model.head_weight if head is None else head,
        batch.decoder_target_tokens.flatten(),
        batch.decoder_loss_weights.flatten(),
        model.config.final_logit_softcapping,
    )
    return loss


@contextmanager
def _lookups_added_to_head(model: Model) -> Iterator[Tensor | None]:
    """The head weight, of which lookups made meanwhile have sparse gradients: the sum is dense, and only one (V, D).

    Autograd works backwards, from what was made last. This alias of the matrix is older than the lookups, so the dense
    gradient meets theirs when they are known, and takes them up in place; the other way round it would be copied.
    None where the matrix is spread over processes: it is gathered only later.
    """
    weight, embedding = model.head_weight, (model.decoder if isinstance(model, T5Gemma) else model).embed_tokens
    if type(weight) is not nn.Parameter or embedding.weight is not weight or not torch.is_grad_enabled():
        yield None
        return
    embedding.sparse_gradient = True
    try:
        yield torch.ops.aten.alias(weight)
    finally:
        embedding.sparse_gradient = False


def target_states(model: Model, batch: Batch) -> Float[Tensor, "B T D"]:
    """What the model makes of the targets, before the head. Packed examples do not see each other."""
    decoder_mask, decoder_segments = _unless_full(batch.decoder_mask), batch.decoder_segment_ids
    if isinstance(model, T5Gemma):
        if batch.encoder_input_tokens is None or batch.encoder_mask is None:
            raise ValueError("an encoder-decoder needs batches with a source; this batch has none")
        return model.states(
            batch.encoder_input_tokens,
            batch.decoder_input_tokens,
            _unless_full(batch.encoder_mask),
            decoder_mask,
            encoder_segment_ids=batch.encoder_segment_ids,
            decoder_segment_ids=decoder_segments,
            pictures=batch.pictures,
        )
    if batch.encoder_input_tokens is not None:
        raise ValueError("a decoder-only model has nowhere to put the batch's source; make batches without one")
    return model.states(batch.decoder_input_tokens, decoder_mask, segment_ids=decoder_segments)


def mean_loss(model: Model, batches: Sequence[Batch]) -> float:
    """Nats per learned token over all of `batches`; for validation, under no_grad."""
    device = model.head_weight.device
    total = sum(float(summed_loss(model, batch.to(device))) for batch in batches)
    return total / sum(batch.total_weight for batch in batches)


def resolve_precision(asked: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where it is fast (CUDA; CPUs with AVX512-BF16 or AMX) and float32 elsewhere."""
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo")
    words = flags.read_text(encoding="utf-8", errors="replace").split() if flags.is_file() else []
    return torch.bfloat16 if "amx_bf16" in words or "avx512_bf16" in words else torch.float32


def _unless_full(mask: Tensor) -> Tensor | None:
    """None stands for a mask without padding, which the models take a shorter way for."""
    return None if bool(mask.all()) else mask
