"""`encore runs` and `encore average`: what is done with runs and their checkpoints once they are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encore.cli.bar import bytes_bar

if TYPE_CHECKING:
    from encore.evaluate.runs import Rows


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.command(epilog="Example: encore average runs/a/checkpoints/step-000900 runs/a/checkpoints/step-001000 --out a")(
        average
    )
    group = typer.Typer(no_args_is_help=True)
    group.command(epilog="Example: encore runs plot runs/a runs/b --out curves.png")(plot)
    group.callback()(runs)
    app.add_typer(group, name="runs", epilog="Example: encore runs plot runs/a runs/b --out curves.png")


def average(
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDER FOLDER…", help="Checkpoints of one model, two or more.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="The folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="Of the result; without it, the first folder's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Average the weights of checkpoints, one tensor at a time; tokenizer and licences are the first one's."""
    from encore.checkpoint.averaging import average as run

    with bytes_bar("average") as progress:
        summary = run(folders, out, dtype=dtype, force=force, progress=progress)
    if as_json:
        print(json.dumps(summary.as_json(), indent=2))
        return
    print(f"{summary.out}: the mean of {len(summary.folders)}, {summary.parameters:,} parameters in {summary.dtype}")


def runs() -> None:
    """Look at runs: their curves as a picture."""


def plot(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders, as pretrain and tune write.")],
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="The picture to write.")] = Path("curves.png"),
) -> None:
    """Draw loss, validation loss and gradient norms by part, a line per run, into one PNG."""
    from encore.evaluate.report import panels_png
    from encore.evaluate.runs import run_panels

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out is {out}; expected a name that ends in .png")
    panels = run_panels({str(folder): _rows(folder) for folder in folders})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(panels_png(panels))
    print(out)


def _rows(folder: Path) -> Rows:
    from encore.train.metrics import read_metrics

    rows = read_metrics(folder / "metrics.jsonl")
    if not any("loss" in row for row in rows):
        raise ValueError(f"{folder} is no run folder with a finished step: its metrics.jsonl has no loss in it")
    return rows
