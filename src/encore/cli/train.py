"""`encore pretrain` and `encore tune`: a recipe, a run folder, and changes by `--set key=value`.

Under torchrun each process runs the verb; the first one alone prints the result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from encore.train.loop import RunResult

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="RECIPE.toml", help="The run as a file; without one, defaults.")
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. train.steps=100.")
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="RUN", help="The run's folder; without it, runs/ and the recipe's name.")
]
Init = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Where to start: short for --set model.init=…")
]
Data = Annotated[
    list[str] | None, typer.Option("--data", metavar="FILE", help="What to read: short for --set data.train=…")
]
Resume = Annotated[
    bool, typer.Option(help="Go on from the last checkpoint in RUN, or start anew and remove what is there.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads: short for --set train.threads=…")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda: short for --set train.device=…")]
Precision = Annotated[
    str | None, typer.Option("--dtype", help="auto, float32 or bfloat16 products: short for --set train.precision=…")
]
Seed = Annotated[int | None, typer.Option(help="Short for --set train.seed=…")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: encore pretrain recipes/ul2.toml --set train.steps=500")(pretrain)
    app.command(epilog="Example: encore tune --model FOLDER --data pairs.jsonl --out runs/mine")(tune)


def pretrain(
    recipe: RecipeFile = None,
    changes: Changes = None,
    out: Out = None,
    model: Init = None,
    data: Data = None,
    resume: Resume = True,
    threads: Threads = None,
    device: Device = None,
    dtype: Precision = None,
    seed: Seed = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train on text: causal LM (decoder-only) or a denoising mixture (encoder-decoder). Prints the model's folder.

    An interrupted run goes on where it was when the same command is given again.
    """
    from encore.train.recipe_file import load_recipe

    shorts = _shorts(model, data, threads, device, dtype, seed)
    asked = load_recipe(recipe, [*shorts, *(changes or [])])

    def run(folder: Path) -> RunResult:
        from encore.train.metrics import Silent
        from encore.train.pretrain import pretrain as train

        return train(asked, folder, resume=resume, progress=Silent() if quiet else None)

    _run(run, _folder(out, recipe, "pretrain"), as_json)


def tune(
    recipe: RecipeFile = None,
    changes: Changes = None,
    out: Out = None,
    model: Init = None,
    data: Data = None,
    resume: Resume = True,
    threads: Threads = None,
    device: Device = None,
    dtype: Precision = None,
    seed: Seed = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train on pairs, JSONL rows of {"src": …, "tgt": …}. Prints the model's folder.

    Without a recipe: encore tune --model FOLDER --data pairs.jsonl. An interrupted run goes on where it was.
    """
    from encore.train.recipe_file import load_recipe

    shorts = ["objective=pairs", *_shorts(model, data, threads, device, dtype, seed)]
    asked = load_recipe(recipe, [*(shorts if recipe is None else shorts[1:]), *(changes or [])])

    def run(folder: Path) -> RunResult:
        from encore.train.metrics import Silent
        from encore.train.sft import tune as train

        return train(asked, folder, resume=resume, progress=Silent() if quiet else None)

    _run(run, _folder(out, recipe, "tune"), as_json)


def _shorts(
    model: str | None,
    data: list[str] | None,
    threads: int | None,
    device: str | None,
    dtype: str | None,
    seed: int | None,
) -> list[str]:
    given = {
        "model.init": model,
        "data.train": data or None,
        "train.threads": threads,
        "train.device": device,
        "train.precision": dtype,
        "train.seed": seed,
    }
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]


def _folder(out: Path | None, recipe: Path | None, verb: str) -> Path:
    return out or Path("runs") / (recipe.stem if recipe else verb)


def _run(run: Callable[[Path], RunResult], folder: Path, as_json: bool) -> None:
    from encore.train.parallel import ProcessLost
    from encore.train.signals import Interrupted

    try:
        result = run(folder)
    except ProcessLost as lost:
        print(f"encore: error: {lost}", file=sys.stderr, flush=True)
        os._exit(2)  # what is open waits for the process that is gone
    except Interrupted as stopped:
        typer.echo(f"encore: {stopped}", err=True)
        raise typer.Exit(stopped.exit_code) from None
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        fields = dataclasses.asdict(result)
        typer.echo(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}))
    else:
        typer.echo(str(result.model_folder))
