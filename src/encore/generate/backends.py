"""What runs a model: torch for those in memory, onnxruntime for exported ones; neither without need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from encore.generate import onnx_backend
from encore.generate.onnx_backend import OnnxModel
from encore.generate.request import Event, Generation
from encore.generate.sampling import SamplingSettings

if TYPE_CHECKING:
    from encore.generate.padding import PicturesOfRows
    from encore.tokenizer import Tokenizer


class Backend(Protocol):
    """The functions that `decoding` (torch) and `onnx_backend` both offer for a model of theirs."""

    def generate(
        self,
        model: Any,
        sources: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        pictures: PicturesOfRows = None,
    ) -> list[Generation]: ...

    def stream(
        self,
        model: Any,
        sources: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        pictures: PicturesOfRows = None,
    ) -> Iterator[Event]: ...

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
