"""`encore export`: a checkpoint becomes graphs that run without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from encore.export.manifest import Activations, CacheKind, Weights


def register(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command(epilog="Example: encore export translator translator-int8 --weights int8")(export)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub name or shipped model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="Of all matrices, or of the layers and then of the vocabulary (embedding and head).",
            show_default="int8, or what the folder holds packed",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale: 32, 64 or 128.",
            show_default="128",
        ),
    ] = None,
    activations: Annotated[
        Activations | None,
        typer.Option(
            help="What packed weights are multiplied with: float32 is exact, int8 faster, int8-rows fastest (it has "
            "the encoder's layers in int8, whatever WEIGHTS says).",
            show_default="int8-rows, or int8 for a folder that is packed",
        ),
    ] = None,
    cache: Annotated[
        CacheKind,
        typer.Option(help="How keys and values are kept: int8 reads and holds a quarter, and costs a little."),
    ] = "float32",
    two_pass_head: Annotated[
        bool | None,
        typer.Option(
            "--two-pass-head/--one-pass-head",
            help="Read four of an int8 head's eight bits, then all of the 64 best words: a step is a fifth shorter "
            "at 262,144 words. The best words and scored ones have the logits of int8, others about those of int4.",
            show_default="two for an int8 head of 32,768 words or more",
        ),
    ] = None,
    head_preview: Annotated[
        int | None,
        typer.Option(
            metavar="WIDTH",
            help="Find the best words by a view of the head WIDTH numbers wide (a multiple of 32), and compute only "
            "theirs in full. 256 of 640 columns: a step of 270M takes 10 to 30 % less time. Log-probabilities are then "
            "estimates, and encore score refuses.",
            show_default="no view",
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Pairs or texts (.jsonl, asset:pairs/train) to round for as encore quantize does (GPTQ, with torch); "
            "without: to nearest."
        ),
    ] = None,
    examples: Annotated[int, typer.Option(help="Rows that calibration reads.", min=1)] = 256,
    encoder_only: Annotated[
        bool, typer.Option("--encoder-only", help="For embeddings: leave the decoder out.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Write a T5Gemma as ONNX graphs, which generate, score and embed run on any CPU without torch."""
    import tempfile

    from encore.cli.bar import bytes_bar, count_bar
    from encore.export import ExportError
    from encore.export.folder import export as run

    with tempfile.TemporaryDirectory(prefix="encore-") as folder:
        if calibrate:
            from encore.quantize.folder import quantize

            if weights == "float32":
                raise ExportError("weights is float32, and nothing is rounded; leave --calibrate out")
            with count_bar("calibrating", "texts") as progress:
                packed = Path(folder) / "packed"
                options = {"block_size": block_size, "num_examples": examples, "progress": progress}
                quantize(model, packed, weights or "int8", calibrate=calibrate, **options)
            model, weights, block_size = str(packed), None, None
        with bytes_bar("exporting") as reading:
            summary = run(
                model,
                out,
                weights,
                block_size=block_size,
                activations=activations,
                cache=cache,
                two_pass_head=two_pass_head,
                head_preview=head_preview,
                encoder_only=encoder_only,
                force=force,
                progress=reading,
            )
    if as_json:
        print(json.dumps(summary.as_json(), indent=2))
        return
    what = f"{summary.bits_per_weight:.2f} bits per weight"
    if summary.block_size:
        what += f" in blocks of {summary.block_size}, relative error {summary.error:.4f}"
    if summary.preview_energy is not None:
        what += f", {summary.preview_energy:.1%} of the head's energy in its view"
    print(f"{summary.out}: {summary.weights}, {what}, {summary.num_bytes:,} bytes")
