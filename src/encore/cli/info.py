"""`encore info`: what a model is made of, and what memory training it takes; as tables, or as one JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from encore.info import ModelInfo
    from encore.memory_plan import Planner

RELEASED = "released"
GB = 1_000_000_000


def register(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command(epilog="Example: encore info t5gemma-2-270m-270m --json")(info)


def info(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME-or-folder", help="A size, a hub name or a checkpoint folder; with --plan also: released."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="The memory that training takes on each device.")] = False,
    devices: Annotated[str, typer.Option(help="Of --plan: numbers of devices.")] = "1,2,4,8,16,32,64",
    device_memory: Annotated[float, typer.Option(help="Of --plan: GB (10^9 bytes) of one device.")] = 80.0,
    tokens: Annotated[str, typer.Option(help="Of --plan: the length of rows, SOURCE/TARGET.")] = "4096/4096",
    markdown: Annotated[bool, typer.Option("--markdown", help="Of --plan: print Markdown.")] = False,
) -> None:
    """Parameters by part, shapes, memory of the weights and cache per token; nothing is downloaded or allocated.

    With --plan, what training takes: encore info t5gemma-2-1b-1b --plan --devices 8,64 --tokens 16384/4096
    """
    if plan:
        _plan(name, _counts(devices), device_memory, _lengths(tokens), as_json=as_json, markdown=markdown)
        return
    from encore.info import describe

    described = describe(name)
    if as_json:
        print(json.dumps(described.as_json(), indent=2))
        return
    from rich.console import Console

    console = Console()
    for table in _tables(described):
        console.print(table)
    if described.variant is not None:
        said = ", ".join(f"{key}: {value}" for key, value in described.variant.items())
        print(f"No public format holds this model, and other libraries do not load it ({said})")


def _counts(devices: str) -> list[int]:
    words = devices.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ValueError(f"--devices is {devices!r}; expected numbers above 0 with commas between, such as 1,2,4,8")
    return [int(word) for word in words]


def _lengths(tokens: str) -> tuple[int, int]:
    source, _, target = tokens.partition("/")
    if not all(word.strip().isdecimal() and int(word) for word in (source, target)):
        raise ValueError(f"--tokens is {tokens!r}; expected SOURCE/TARGET, such as 4096/4096")
    return int(source), int(target)


def _plan(
    name: str, devices: list[int], device_memory: float, tokens: tuple[int, int], *, as_json: bool, markdown: bool
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from encore.info import find_config
    from encore.memory_plan import make_planner
    from encore.presets import PRESETS

    if not device_memory > 0:
        raise ValueError(f"--device-memory is {device_memory}; expected GB above 0")
    names = [size for size in PRESETS if size.startswith("t5gemma-")] if name == RELEASED else [name]
    planners: dict[str, Planner] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for each in bar.track(names, description="tracing activations"):
            called, config = find_config(each)
            planners[called] = make_planner(config, *tokens)
    memory = round(device_memory * GB)
    rows = {called: _plan_rows(planner, devices, memory) for called, planner in planners.items()}
    if as_json:
        head = {"source_tokens": tokens[0], "target_tokens": tokens[1], "device_memory_bytes": memory}
        print(json.dumps({**head, "models": rows}, indent=2))
        return
    for called, lines in rows.items():
        title = f"{called}, rows of {tokens[0]:,}/{tokens[1]:,} tokens, devices of {device_memory:g} GB"
        cells = [_plan_cells(line) for line in lines]
        if markdown:
            print(f"\n## {title}\n\n| {' | '.join(PLAN_COLUMNS)} |\n|{'---|' * len(PLAN_COLUMNS)}")
            print("\n".join(f"| {' | '.join(line)} |" for line in cells))
            continue
        table = _table(title, *PLAN_COLUMNS[1:])
        table.columns[0].header = PLAN_COLUMNS[0]
        for line in cells:
            table.add_row(*line)
        Console().print(table)
    print(f"\n{PLAN_NOTES}" if markdown else PLAN_NOTES)


PLAN_COLUMNS = ("devices", "state", "root", "kept", "peak", "rows", "kept*", "peak*", "rows*")
PLAN_NOTES = (
    "GB on each device. state: float32 weights, moments and gradients, sharded. root: the embedding in bfloat16 and "
    "its gradient. kept: activations of one row. peak: of a step with one row. rows: so many fit. *: with activation "
    "checkpointing."
)


def _plan_rows(planner: Planner, devices: list[int], memory: int) -> list[dict[str, Any]]:
    """For each number of devices what one row takes, and how many fit, by whether activations are checkpointed."""
    return [
        {"devices": number}
        | {
            name: planner.plan(number, checkpointing=checkpointing).as_json()
            | {"rows_that_fit": planner.rows_that_fit(number, memory, checkpointing=checkpointing)}
            for name, checkpointing in (("plain", False), ("checkpointed", True))
        }
        for number in devices
    ]


def _plan_cells(row: dict[str, Any]) -> list[str]:
    plain, again = row["plain"], row["checkpointed"]
    gigabytes = (plain["sharded"], plain["root"], plain["activations"], plain["peak"])
    return [
        str(row["devices"]),
        *(f"{value / GB:.1f}" for value in gigabytes),
        f"{plain['rows_that_fit']:,}",
        *(f"{again[key] / GB:.1f}" for key in ("activations", "peak")),
        f"{again['rows_that_fit']:,}",
    ]


def _tables(described: ModelInfo) -> list[Table]:
    from encore.info import describe_stack

    title = f"{described.name} ({described.config.file_type})"
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
    if described.packed is not None:
        said = described.packed
        memory.add_row(
            f"packed here as {said['weights']}", f"{said['bits_per_weight']:.2f} bits per weight", said["method"]
        )

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
