"""What the package ships: text, sentence pairs, the tokenizer, the small models, and their attribution.

    path("tokenizer")                -> the folder
    read_jsonl("pairs/train.jsonl")  -> the rows of pairs/train.jsonl.xz

`ATTRIBUTION.md` beside this file says where each comes from and under which licence. No torch here.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def path(name: str = "") -> Path:
    """Where the asset `name` (a file or folder, "/" between) lies; FileNotFoundError with what there is otherwise."""
    found = _FOLDER / name
    if ".." in Path(name).parts or Path(name).is_absolute() or not found.exists():
        there = sorted(p.relative_to(_FOLDER).as_posix() for p in _FOLDER.rglob("*.jsonl.xz"))
        folders = sorted(p.name for p in _FOLDER.iterdir() if p.is_dir() and not p.name.startswith("_"))
        raise FileNotFoundError(f"no asset is called {name!r}; there are the folders {folders} and the files {there}")
    return found


def read_jsonl(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL asset, packed (`.xz`, which the name may leave out) or not."""
    packed = name if name.endswith(".xz") else name + ".xz"
    if packed != name and (_FOLDER / name).exists():
        with path(name).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
        return
    with lzma.open(path(packed), "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
