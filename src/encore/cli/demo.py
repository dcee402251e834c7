"""`encore demo`: the main job, end to end, on what the package ships."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from encore.demo import DemoResult


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: encore demo --out encore-demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Where the models, curves and the report go.")] = Path("encore-demo"),
    short: Annotated[bool, typer.Option("--short", help="A few steps of each, in seconds: only that it runs.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with what an earlier run left in --out.")] = True,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 = two, or fewer if there are fewer cores.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Adapt the shipped small Gemma, continue it with UL2, tune it to translate, and compare it with its source."""
    from dataclasses import replace

    from encore.demo import SHORT, default_budget, run_demo

    budget = SHORT if short else default_budget()
    if threads:
        budget = replace(budget, threads=threads)

    def say(what: str) -> None:
        print(f"\n{what}", file=sys.stderr, flush=True)

    def sentences(who: str, done: int, total: int) -> None:
        end = "\n" if done == total else ""
        start = "\r" if sys.stderr.isatty() else ""
        if sys.stderr.isatty() or done == total:
            print(f"{start}{who}: {done}/{total} sentences", end=end, file=sys.stderr, flush=True)

    result = run_demo(out, budget, resume=resume, say=say, on_sentences=sentences)
    if as_json:
        print(json.dumps(result.as_json(), ensure_ascii=False))
    else:
        _show(result)


def _show(result: DemoResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="English to German, held-out sentences")
    for column in ("model", "BLEU", "chrF", "loss", "pretrain", "tune", "evaluate"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for c in result.contestants:
        seconds = (f"{s:.0f} s" for s in (c.pretrain_seconds, c.tune_seconds, c.evaluate_seconds))
        table.add_row(c.what, f"{c.bleu:.1f}", f"{c.chrf:.1f}", f"{c.validation_loss:.3f}", *seconds)
    console.print(table)
    for row in result.answers:
        console.print()
        for name, text in row.items():
            console.print(f"  {name:18} {text}", highlight=False, markup=False)
    console.print(f"\n{result.wall_seconds:.0f} seconds in all. Report: {result.report}", highlight=False)
    console.print(
        f'Try it:  encore generate --model {result.model} "I have lost my keys."', highlight=False, markup=False
    )
