"""Reading one JSON object key by key, with errors that say where the key stands and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from encore.checkpoint import CheckpointError

_MAX_INTEGER = 2**31 - 1
_MAX_LAYERS = 4096


class Keys:
    """A JSON object and the path that led to it: `encoder.text_config.`"""

    def __init__(self, raw: Mapping[str, Any], path: str = "") -> None:
        self.raw = raw
        self.path = path

    def where(self, name: str) -> str:
        return f"{self.path}{name}"

    def child(self, name: str, default: Mapping[str, Any] | None = None) -> Keys:
        """The object under `name`; `default` (if given) stands for a missing or null one."""
        value = self.raw.get(name)
        if value is None and default is not None:
            value = default
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.where(name)} is {_say(self.raw, name)}; expected a JSON object")
        return Keys(value, f"{self.where(name)}.")

    def integer(self, name: str, default: int | None) -> int:
        """A whole number of at least 1. Without a default the key must be there."""
        value = self.raw.get(name, default)
        limit = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_INTEGER
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:  # [height, width] of a square
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise CheckpointError(
                f"{self.where(name)} is {_say(self.raw, name)}; expected a whole number from 1 to {limit}"
            )
        return value

    def number(self, name: str, default: float | None) -> float:
        """A finite number above 0. Without a default the key must be there."""
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"{self.where(name)} is {_say(self.raw, name)}; expected a number above 0")
        return value

    def number_or_none(self, name: str, default: float | None) -> float | None:
        """As `number`, but an explicit null means none (a soft-cap that is switched off)."""
        if name not in self.raw:
            return default
        return None if self.raw[name] is None else self.number(name, None)

    def expect(self, name: str, *allowed: Any) -> None:
        """The key is missing or has one of the values that we can compute with."""
        if name in self.raw and not any(
            self.raw[name] == value and isinstance(self.raw[name], bool) == isinstance(value, bool) for value in allowed
        ):
            wanted = " or ".join(repr(value) for value in allowed if value is not None)
            raise CheckpointError(f"{self.where(name)} is {self.raw[name]!r}; only {wanted} can be computed here")


def token(sources: Sequence[Keys], names: Sequence[str], default: int) -> int:
    """The first id that the sources give under one of the names; the first of a list of ids."""
    for keys in sources:
        for name in names:
            value = keys.raw.get(name)
            first = value[0] if isinstance(value, list) and value else value
            if first is None:
                continue
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                raise CheckpointError(f"{keys.where(name)} is {value!r}; expected a token id or a list of token ids")
            return first
    return default


def put_token(raw: dict[str, Any], name: str, value: int) -> None:
    """Write a token id; a list that starts with it (several stop tokens) stays."""
    old = raw.get(name)
    if not (isinstance(old, list) and old and old[0] == value):
        raw[name] = value


def _say(raw: Mapping[str, Any], name: str) -> str:
    return repr(raw[name]) if name in raw else "missing"
