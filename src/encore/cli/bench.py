"""`encore bench`: how fast a model runs on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command(epilog="Example: encore bench translator-int8 --source-tokens 128")(bench)


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Exported folder, checkpoint, shipped model.")],
    source_tokens: Annotated[int, typer.Option(min=1, help="Length of the (random) sources.")] = 512,
    target_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write after each.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Sources at a time.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are over so many, after one to warm up.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, show_default="one per core", help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time loading, encoding, the first token and those after it, and say what memory it took."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from encore.bench import measure

    columns = (TextColumn("bench"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("bench", total=rounds + 1)
        speed = measure(
            model,
            batch=batch_size,
            source_tokens=source_tokens,
            target_tokens=target_tokens,
            rounds=rounds,
            threads=threads,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print(json.dumps(speed.as_json()))
        return
    print(f"{speed.model}: batch {speed.batch}, {speed.source_tokens} source and {speed.target_tokens} target tokens")
    print(f"  load          {speed.load_seconds:10.2f} s")
    if speed.encode_tokens_per_second is not None:
        print(f"  encode        {speed.encode_tokens_per_second:10,.0f} tokens/s")
    print(f"  first token   {speed.first_token_seconds:10.3f} s, the source's reading included")
    print(f"  decode        {speed.decode_tokens_per_second:10,.1f} tokens/s")
    if speed.peak_bytes is not None:
        print(f"  peak memory   {speed.peak_bytes / 1e6:10,.0f} MB of the whole process")
