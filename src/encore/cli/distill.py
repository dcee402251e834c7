"""`encore distill-logits`: a teacher's logits on disk, for a run that cannot hold the teacher beside the student."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from encore.cli.bar import bytes_bar


def register(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command("distill-logits", epilog="Example: encore distill-logits recipes/distill.toml --out runs/logits")(
        distill_logits
    )


def distill_logits(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The run that will read them.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. distill.top_k=64.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Write the top-k logits of distill.teacher for all that a run will read; says the size before it begins.

    Then: encore pretrain RECIPE.toml --set distill.logits=FOLDER
    """
    from encore.train.distill_logits import distill_logits as run
    from encore.train.recipe_file import load_recipe

    def note(message: str) -> None:
        if not quiet:
            typer.echo(message, err=True)

    asked = load_recipe(recipe, changes or [])
    with bytes_bar("distill-logits") as progress:
        manifest = run(asked, out, force=force, note=note, progress=progress)
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "bytes": manifest.num_bytes, **dataclasses.asdict(manifest)}))
    else:
        typer.echo(str(out))
