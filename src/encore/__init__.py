"""Encore: T5Gemma and T5Gemma 2. Encode once, decode many times.

    model = encore.load("some/folder")
    tokenizer = encore.load_tokenizer("some/folder")
    memory = model.encode(encoder_input_tokens)
    logits = model.decode(decoder_input_tokens, memory)

Names are imported on first use (PEP 562), so `import encore` costs nothing and never imports torch by itself.
Modules are reached as attributes too: `encore.adapt`, `encore.generate`, `encore.presets`, …
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encore.checkpoint.hub import load_tokenizer as load_tokenizer
    from encore.checkpoint.pretrained import load as load
    from encore.checkpoint.pretrained import save as save
    from encore.config import GemmaConfig as GemmaConfig
    from encore.config import T5GemmaConfig as T5GemmaConfig
    from encore.model.encoder import Encoder as Encoder
    from encore.model.encoder import Memory as Memory
    from encore.model.gemma import Gemma as Gemma
    from encore.model.t5gemma import T5Gemma as T5Gemma
    from encore.presets import preset as preset
    from encore.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

_HOME_OF = {
    "Encoder": "encore.model.encoder",
    "Gemma": "encore.model.gemma",
    "GemmaConfig": "encore.config",
    "Memory": "encore.model.encoder",
    "T5Gemma": "encore.model.t5gemma",
    "T5GemmaConfig": "encore.config",
    "Tokenizer": "encore.tokenizer",
    "load": "encore.checkpoint.pretrained",
    "load_tokenizer": "encore.checkpoint.hub",
    "preset": "encore.presets",
    "save": "encore.checkpoint.pretrained",
}

__all__ = ["__version__", *_HOME_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"encore.{name}") is not None:
        return importlib.import_module(f"encore.{name}")
    raise AttributeError(f"module 'encore' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
