"""`encore quantize`: a checkpoint with packed weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from encore.quantize.blocks import PackedKind


def register(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command(
        epilog="Example: encore quantize translator translator-int4 --weights int4 --calibrate asset:pairs/train"
    )(quantize)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub name or shipped model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    weights: Annotated[
        PackedKind, typer.Option(help="Of all matrices, or of the layers and then of the vocabulary.")
    ] = "int4",
    block_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32, 64 or 128.", show_default="128"),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(help="Pairs or texts (.jsonl, asset:pairs/train) to round for (GPTQ); without: to nearest."),
    ] = None,
    examples: Annotated[int, typer.Option(help="Rows that calibration reads.", min=1)] = 256,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Pack a model's weights to int8 or int4: a smaller folder for torch, or to export."""
    from encore.cli.bar import count_bar
    from encore.quantize.folder import quantize as run

    with count_bar("calibrating", "texts") as progress:
        summary = run(
            model,
            out,
            weights,
            block_size=block_size,
            calibrate=calibrate or (),
            num_examples=examples,
            force=force,
            progress=progress,
        )
    if as_json:
        print(json.dumps(summary.as_json(), indent=2))
        return
    print(
        f"{summary.out}: {summary.weights}, {summary.method}, {summary.bits_per_weight:.2f} bits per weight in blocks "
        f"of {summary.block_size}, relative error {summary.error:.4f}, {summary.num_bytes:,} bytes"
    )
