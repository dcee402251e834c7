"""What runs a model: torch for those in memory, onnxruntime for exported ones; neither without need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from encore.generate import onnx_backend
from encore.generate.drafts import Drafting, DraftSettings, ModelDrafter, NgramDrafter
from encore.generate.memory import MemoryPlan
from encore.generate.onnx_backend import OnnxModel
from encore.generate.rows import HasConfig, Rows, Size, target_stack

if TYPE_CHECKING:
    from encore.generate.padding import PicturesOfRows


class Backend(Protocol):
    """The functions that `decoding` (torch) and `onnx_backend` both offer for a model of theirs."""

    def make_rows(self, model: Any, size: Size) -> Rows: ...

    def memory_plan(self, model: Any, size: Size, encode_tokens: int) -> MemoryPlan: ...

    def log_probabilities(
        self, model: Any, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> list[list[float]]: ...

    def encoder_states(
        self, model: Any, sources: Sequence[Sequence[int]], pictures: PicturesOfRows = None
    ) -> list[NDArray[np.float32]]: ...


def backend_of(model: Any) -> Backend:
    if isinstance(model, OnnxModel):
        return onnx_backend
    from encore.generate import decoding

    return decoding


def make_rows(model: HasConfig, size: Size) -> Rows:
    """Rows of a model, with buffers for the most that `size` says."""
    return backend_of(model).make_rows(model, size)


def memory_plan(model: HasConfig, size: Size, encode_tokens: int) -> MemoryPlan:
    """The bytes that a model takes with rows of this size, when sources of `encode_tokens` in all are read at once."""
    return backend_of(model).memory_plan(model, size, encode_tokens)


def make_drafting(drafts: DraftSettings, model: HasConfig, size: Size) -> Drafting:
    """What drafts for rows of `model`, which have this size."""
    draft_model = drafts.model
    if draft_model is None:
        return Drafting(NgramDrafter(drafts.ngram), drafts)
    ours, theirs = target_stack(model).vocab_size, target_stack(draft_model).vocab_size
    if ours != theirs:
        raise ValueError(
            f"the draft model has a vocabulary of {theirs}, the model one of {ours}; take one with the same tokenizer"
        )
    own = Size(size.rows, size.source_tokens, size.target_tokens + drafts.max_tokens, size.new_tokens)
    return Drafting(ModelDrafter(draft_model.config, make_rows(draft_model, own), own.new_tokens), drafts)
