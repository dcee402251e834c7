"""Generation: ids in, ids out (`decoding`), text in, text out (`text`), scores and embeddings.

    settings = SamplingSettings(temperature=0.7, top_p=0.9, seed=1)
    generate(model, [source_ids], settings, tokenizer=tokenizer)[0].text

`sampling`, `request` and `source` import no torch; the names below are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encore.generate.decoding import generate as generate
    from encore.generate.decoding import naive_generate as naive_generate
    from encore.generate.decoding import stream as stream
    from encore.generate.request import Event as Event
    from encore.generate.request import Generation as Generation
    from encore.generate.sampling import SamplingSettings as SamplingSettings
    from encore.generate.text import TextGenerator as TextGenerator

_HOME_OF = {
    "Event": "request",
    "Generation": "request",
    "SamplingSettings": "sampling",
    "TextGenerator": "text",
    "generate": "decoding",
    "naive_generate": "decoding",
    "stream": "decoding",
}

__all__ = list(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"encore.generate.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'encore.generate' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
