"""Recipes as files: TOML <- `--set train.steps=100`, and back. No torch here.

An unknown key is an error that names the nearest known one; the resolved recipe is written beside each checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from encore.train.recipe import Recipe, flat


def load_recipe(path: str | Path | None, changes: Sequence[str] = ()) -> Recipe:
    """Read a TOML file (None: all defaults), then apply `key=value` changes such as `train.steps=100`."""
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: not a TOML file: {error}") from error
        except OSError as error:
            raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from error
    for change in changes:
        _apply(table, change)
    return recipe_from_table(table)


def recipe_from_table(table: Mapping[str, Any]) -> Recipe:
    """Nested mappings, as read from TOML, to a Recipe; unknown keys and wrong types are ValueErrors."""
    return cast("Recipe", _build(Recipe, table, ""))


def to_toml(recipe: Recipe) -> str:
    """The recipe with every value, as TOML that `load_recipe` reads back to an equal one."""
    lines: list[str] = []
    _dump(recipe, "", lines)
    return "\n".join(lines) + "\n"


def differences(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ: {"train.steps": (100, 200)}."""
    left, right = flat(one), flat(other)
    return {key: (value, right[key]) for key, value in left.items() if value != right[key]}


def known_keys() -> list[str]:
    return list(flat(Recipe()))


def _apply(table: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {change}: expected key=value, for example train.steps=100")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {change}: {parent} is a value, not a group of keys")
    try:
        table[leaf] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[leaf] = text  # a bare word: --set objective=causal


def _build(kind: type[Any], table: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = (
                _nearest(name, key) if prefix[-2:] != "]." else (difflib.get_close_matches(key, hints, 1) or [None])[0]
            )
            raise ValueError(
                f"unknown key {name}" + (f"; did you mean {near}?" if near else f"; known: {', '.join(hints)}")
            )
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} is a group of keys, got {value!r}; set one of them, for example {name}.…=…")
            values[key] = _build(cast("type[Any]", hints[key]), cast("Mapping[str, Any]", value), f"{name}.")
        else:
            values[key] = _convert(hints[key], value, name)
    return kind(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        item = typing.get_args(hint)[0]
        values = [value] if isinstance(value, str) else value
        if dataclasses.is_dataclass(item):
            return _tables(cast("type[Any]", item), values, name)
        if not isinstance(values, list | tuple):
            raise ValueError(f"{name} is {value!r}; expected a list")
        return tuple(_convert(item, entry, name) for entry in cast("Sequence[Any]", values))
    if origin is types.UnionType:
        raise TypeError(f"{name}: unions are not used in recipes")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{name} is {value!r}; expected {_KIND_NAMES[hint]}")
    return value


def _tables(kind: type[Any], values: Any, name: str) -> tuple[Any, ...]:
    """A list of tables, [[name]] in TOML."""
    if not isinstance(values, list | tuple) or not all(isinstance(value, Mapping) for value in values):
        raise ValueError(f"{name} is {values!r}; expected a list of tables, each written as [[{name}]]")
    tables = cast("Sequence[Mapping[str, Any]]", values)
    return tuple(_build(kind, table, f"{name}[{number}].") for number, table in enumerate(tables))


_KIND_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _nearest(name: str, leaf: str) -> str | None:
    known = known_keys()
    groups = sorted({key.rpartition(".")[0] for key in known if "." in key})
    if close := difflib.get_close_matches(name, [*known, *groups], n=1, cutoff=0.6):
        return close[0]
    by_leaf = {key.rpartition(".")[2]: key for key in known}
    close = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.6)
    return by_leaf[close[0]] if close else None


def _dump(value: Any, prefix: str, lines: list[str]) -> None:
    nested = [f for f in dataclasses.fields(value) if dataclasses.is_dataclass(getattr(value, f.name))]
    tables = [f for f in dataclasses.fields(value) if _is_tables(getattr(value, f.name))]
    for f in dataclasses.fields(value):
        if f not in nested and f not in tables:
            lines.append(f"{f.name} = {_toml(getattr(value, f.name))}")
    for f in tables:
        for entry in getattr(value, f.name):
            lines.extend(["", f"[[{prefix}{f.name}]]"])
            _dump(entry, f"{prefix}{f.name}.", lines)
    for f in nested:
        lines.extend(["", f"[{prefix}{f.name}]"])
        _dump(getattr(value, f.name), f"{prefix}{f.name}.", lines)


def _is_tables(value: Any) -> bool:
    return isinstance(value, tuple) and any(dataclasses.is_dataclass(entry) for entry in cast("tuple[Any, ...]", value))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(entry) for entry in cast('tuple[Any, ...]', value))}]"
    return repr(value)
