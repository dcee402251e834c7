"""Generation: ids in, ids out (`batch`), text in, text out (`text`), requests that come and go (`engine`).

    settings = SamplingSettings(temperature=0.7, top_p=0.9, seed=1)
    generate(model, [source_ids], settings, tokenizer=tokenizer)[0].text

`sampling`, `request` and `source` import no torch; the names below are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encore.generate.batch import beam_search as beam_search
    from encore.generate.batch import generate as generate
    from encore.generate.batch import stream as stream
    from encore.generate.beam import BeamSettings as BeamSettings
    from encore.generate.decoding import naive_generate as naive_generate
    from encore.generate.drafts import DraftSettings as DraftSettings
    from encore.generate.engine import Engine as Engine
    from encore.generate.request import Event as Event
    from encore.generate.request import Generation as Generation
    from encore.generate.sampling import SamplingSettings as SamplingSettings
    from encore.generate.text import TextGenerator as TextGenerator

_HOME_OF = {
    "BeamSettings": "beam",
    "DraftSettings": "drafts",
    "Engine": "engine",
    "Event": "request",
    "Generation": "request",
    "SamplingSettings": "sampling",
    "TextGenerator": "text",
    "beam_search": "batch",
    "generate": "batch",
    "naive_generate": "decoding",
    "stream": "batch",
}

__all__ = list(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"encore.generate.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'encore.generate' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
