"""`encore data inspect`: what a run would read, before it reads it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

_SHOWN_CHARACTERS = 700


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    group = typer.Typer(no_args_is_help=True)
    group.command(epilog="Example: encore data inspect recipes/ul2.toml --set data.pack=true --examples 2")(inspect)
    group.callback()(data)
    app.add_typer(group, name="data", epilog="Example: encore data inspect recipes/ul2.toml")


def data() -> None:
    """Look at what runs read."""


def inspect(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE.toml", help="The run as a file.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. data.pack=true.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="How many examples of each source and task to print.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure the speed.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show a recipe's mixture, lengths, fill of rows, padding and speed, and some examples in words.

    What is not tokenised yet is tokenised now, and kept as for the run itself. No model is loaded.
    """
    from encore.train.feed import open_feed, reads_source
    from encore.train.inspection import inspect as run
    from encore.train.models import open_tokenizer
    from encore.train.reading import open_reading
    from encore.train.recipe_file import load_recipe

    asked = load_recipe(recipe, changes or [])
    encoder = reads_source(asked)
    feed = open_feed(asked, open_tokenizer(asked.model), encoder=encoder)
    reading = feed.reading or open_reading(asked, feed.tokenizer, encoder=encoder)
    with contextlib.closing(feed), _bar("measuring") as progress:
        report = run(
            reading,
            feed.batches.source,
            feed.tokenizer,
            examples=examples,
            seconds=seconds,
            workers=asked.data.workers,
            num_steps=asked.train.steps,
            progress=progress,
        )
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        _print(report)


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[float, float], None]]:
    """A bar on stderr, for what takes more than two seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), TextColumn("left"), TimeRemainingColumn())
    with contextlib.ExitStack() as stack:
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(name)

        def update(done: float, total: float) -> None:
            bar.update(task, completed=done, total=total)
            if total > 2.0 and not bar.live.is_started:
                stack.enter_context(bar)

        yield update


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    columns = ("source", "objective", "share", "of tokens", "records", "skipped", "tokens", "epoch")
    table = Table(*columns, title="Mixture (shares of examples; an epoch in examples)", title_justify="left")
    for s in report["sources"]:
        shares = (f"{s['share_of_examples']:.1%}", f"{s['share_of_tokens']:.1%}")
        counts = (f"{s[key]:,}" for key in ("records", "skipped", "tokens", "examples_per_epoch"))
        table.add_row(s["name"], s["objective"], *shares, *counts)
    console.print(table)
    for place in (place for s in report["sources"] for place in s["places"]):
        console.print(f"skipped: {place}")
    lengths = Table("tokens per example", "mean", "median", "95%", "longest", title="Lengths", title_justify="left")
    for s in [*(report["sources"] if len(report["sources"]) > 1 else ()), {"name": "all", **report}]:
        for side in ("inputs", "targets"):
            spread = s[side]
            values = (f"{spread['mean']:,.1f}", *(f"{spread[key]:,}" for key in ("p50", "p95", "max")))
            lengths.add_row(f"{s['name']}: {side}", *values)
    console.print(lengths)
    fill = report["fill"]
    sides = [f"{side} {share:.1%}" for side, share in fill.items() if share is not None]
    if report["packed"]:
        inputs, targets = report["row_tokens"]
        console.print(f"Rows: packed, {inputs:,} input and {targets:,} target tokens")
    else:
        console.print("Rows: one example each, padded to the longest of its batch")
    console.print(f"Fill: {', '.join(sides)}; padding {report['padding']:.1%}")
    per_step = f"{report['rows_per_step']:,.1f} rows and {report['tokens_per_step']:,.0f} tokens"
    console.print(f"Steps: {per_step} on average over {report['measured_steps']:,}")
    by = f"{report['workers']} workers" if report["workers"] else "the training process itself"
    console.print(f"Speed: {report['tokens_per_second']:,.0f} tokens per second, made by {by}")
    for example in report["examples"]:
        console.print(f"\n{example['source']} · {example['task']}")
        for side in ("input", "target"):
            console.print(f"  {side} ({example[f'{side}_tokens']:,} tokens): {_cut(example[side])}")


def _cut(text: str) -> str:
    shown = text.replace("\n", "⏎")
    more = len(shown) - _SHOWN_CHARACTERS
    return shown if more <= 0 else f"{shown[:_SHOWN_CHARACTERS]} … and {more:,} characters more"
