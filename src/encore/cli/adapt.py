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


class Attention(StrEnum):
    """How the decoder reads the memory."""

    separate = "separate"
    merged = "merged"


class ReadingLayers(StrEnum):
    """Which decoder layers read the memory."""

    all = "all"
    global_ = "global"


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
    encoder_layers: Annotated[
        str | None, typer.Option(help="Another depth: a number, evenly spaced, or the source's layers as 0,2,5.")
    ] = None,
    decoder_layers: Annotated[str | None, typer.Option(help="The same for the decoder.")] = None,
    attention: Annotated[
        Attention | None, typer.Option(help="Separate in T5Gemma, merged in T5Gemma 2, unless given.")
    ] = None,
    tied_embeddings: Annotated[
        bool | None,
        typer.Option("--tied-embeddings/--separate-embeddings", help="One for both stacks, as T5Gemma 2, or two."),
    ] = None,
    cross_attention_on: Annotated[
        ReadingLayers, typer.Option(help="The decoder layers that read the memory.")
    ] = ReadingLayers.all,
    causal_encoder: Annotated[bool, typer.Option("--causal-encoder", help="An encoder that sees to the left.")] = False,
    shared_stack: Annotated[
        bool, typer.Option("--shared-stack", help="Encoder and decoder have the same layers.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Adapt a decoder-only Gemma into a T5Gemma; no training, one tensor at a time.

    What the public formats of T5Gemma and T5Gemma 2 cannot hold is written under the model_type encore_t5gemma.
    """
    from encore.adapt import adapt as run
    from encore.config import VARIANT_TYPE, Variant

    variant = Variant()
    if attention is not None:
        variant["attention"] = attention.value
    if tied_embeddings is not None:
        variant["tied_embeddings"] = tied_embeddings
    if cross_attention_on is ReadingLayers.global_:
        variant["cross_attention_layers"] = "full_attention"
    if causal_encoder:
        variant["causal_encoder"] = True
    if shared_stack:
        variant["shared_stack"] = True

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
            encoder_layers=_layers(encoder_layers, "--encoder-layers"),
            decoder_layers=_layers(decoder_layers, "--decoder-layers"),
            **variant,
        )
    if as_json:
        print(json.dumps(summary.as_json(), indent=2))
        return
    print(f"{summary.out}: {summary.style}, {summary.parameters:,} parameters in {summary.dtype}")
    if summary.model_type == VARIANT_TYPE:
        print(f"no public format holds it: its model_type is {VARIANT_TYPE}, which other libraries do not load")
    if summary.warmup is not None:
        print(f"cross-attention is random: train it alone for the first {summary.warmup['steps']} steps")


def _layers(given: str | None, option: str) -> int | list[int] | None:
    """ "6" -> 6; "0,2,5" -> [0, 2, 5]; "3," -> [3]."""
    if given is None:
        return None
    try:
        numbers = [int(number) for number in given.removesuffix(",").split(",")]
    except ValueError:
        raise ValueError(f"{option} is {given!r}; expected a number of layers, or layers like 0,2,5") from None
    return numbers if "," in given else numbers[0]
