"""`encore adapt`: a decoder-only Gemma becomes an encoder-decoder."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encore.cli.bar import bytes_bar


class Style(StrEnum):
    """What the source becomes."""

    t5gemma = "t5gemma"
    t5gemma2 = "t5gemma2"


class Init(StrEnum):
    """Where the weights come from."""

    source = "source"
    random = "random"


def register(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command(epilog="Example: encore adapt google/gemma-3-270m my-t5gemma2 --style t5gemma2 --rope-factor 8")(adapt)


def adapt(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A Gemma 2 or 3: folder, shipped model or hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    style: Annotated[Style, typer.Option(help="t5gemma from Gemma 2, t5gemma2 from Gemma 3.")] = Style.t5gemma2,
    decoder: Annotated[str | None, typer.Option(help="Another source for the decoder, e.g. a smaller one.")] = None,
    rope_factor: Annotated[
        float | None, typer.Option(help="Interpolate positions on global layers; 8 in the released T5Gemma 2.")
    ] = None,
    init: Annotated[
        Init, typer.Option(help="The source's weights, or random ones in the same architecture.")
    ] = Init.source,
    seed: Annotated[int, typer.Option(help="For weights that are drawn at random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Adapt a decoder-only Gemma into a T5Gemma; no training, one tensor at a time."""
    from encore.adapt import adapt as run

    with bytes_bar("adapt") as progress:
        summary = run(
            source,
            out,
            style=style.value,
            decoder=decoder,
            rope_factor=rope_factor,
            seed=seed,
            random=init is Init.random,
            force=force,
            progress=progress,
        )
    if as_json:
        print(json.dumps(summary.as_json(), indent=2))
        return
    print(f"{summary.out}: {summary.style}, {summary.parameters:,} parameters in {summary.dtype}")
    if summary.warmup is not None:
        print(f"cross-attention is random: train it alone for the first {summary.warmup['steps']} steps")
