"""`encore info`: what a model is made of, for people as tables and for programs as one JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from encore.info import ModelInfo


def register(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command(epilog="Example: encore info t5gemma-2-270m-270m --json")(info)


def info(
    name: Annotated[str, typer.Argument(metavar="NAME-or-folder", help="A size, a hub name or a checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Parameters by part, shapes, memory of the weights and cache per token; nothing is downloaded or allocated."""
    from encore.info import describe

    described = describe(name)
    if as_json:
        print(json.dumps(described.as_json(), indent=2))
        return
    from rich.console import Console

    console = Console()
    for table in _tables(described):
        console.print(table)


def _tables(described: ModelInfo) -> list[Table]:
    from encore.info import describe_stack

    title = f"{described.name} ({described.config.model_type})"
    stacks = {part: describe_stack(stack) for part, stack in described.stacks.items()}
    dimensions = _table(title, *stacks)
    for key in next(iter(stacks.values())):
        dimensions.add_row(key, *(f"{stack[key]:,}" for stack in stacks.values()))

    parameters = _table("Parameters", "count")
    for part, count in {**described.parameters, **described.vectors}.items():
        if count:
            parameters.add_row(part, f"{count:,}")

    whole, text = described.memory_bytes(), described.memory_bytes(vision=False)
    memory = _table("Memory of the weights (int8 and int4 without scales)", "text", "all")
    for dtype in whole:
        memory.add_row(dtype, _in_units(text[dtype]), _in_units(whole[dtype]))

    cache = _table("Cache per token (bfloat16)", "bytes")
    if described.cache.source_token:
        cache.add_row("source", f"{described.cache.source_token:,}")
    cache.add_row("target", f"{described.cache.target_token:,}")
    cache.add_row(
        f"target, past the window of {described.cache.window:,}", f"{described.cache.target_token_beyond_window:,}"
    )

    shapes = _table("Shapes (* is each layer)", "shape")
    for tensor, shape in described.shapes.items():
        shapes.add_row(tensor, " x ".join(str(size) for size in shape))
    return [dimensions, parameters, memory, cache, shapes]


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _in_units(num_bytes: int) -> str:
    """Bytes as people read them: 1.5 GiB."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
