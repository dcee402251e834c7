"""The `encore` command: a table of verbs.

Each file beside this one holds a group of verbs and a `register(app)` that adds them. None imports torch, or anything
that does, before a verb runs, so that `encore --help` answers at once. Results go to stdout, progress and notes to
stderr; what the user can mend (a ValueError, an OSError, an error class of ours) is one line on stderr and status 2.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from encore import __version__

# In the order of `encore --help`.
GROUPS = (
    *("demo", "generate", "info", "adapt", "train", "distill", "data", "runs"),
    *("evaluate", "quantize", "export", "bench"),
)

app = typer.Typer(
    name="encore",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"encore {__version__}")
        raise typer.Exit


@app.callback()
def encore(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """T5Gemma and T5Gemma 2: adapt a decoder-only Gemma into an encoder-decoder, train it, run it."""


for group in GROUPS:
    importlib.import_module(f"encore.cli.{group}").register(app)


EXTRAS = {
    **dict.fromkeys(("torch", "jaxtyping", "matplotlib", "sacrebleu", "safetensors"), "train"),
    "onnx": "export",
}
"""Which extra of the package brings a library that exported models run without."""


def absent_library(error: Exception) -> str | None:
    """What to install, where a library of an extra is missing; None for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRAS:
        return None
    return (
        f"this needs {name}, which is not installed; install it with: pip install 'encore-lm[{EXTRAS[name]}]' "
        "(exported models generate, score and embed without it)"
    )


def is_users_to_mend(error: Exception) -> bool:
    """Whether the message alone helps: the input, the file system or a condition with a name, not a defect of ours."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.partition(".")[0] == "encore"


def main() -> None:
    """The entry point. ENCORE_DEBUG=1 shows the traceback of every error."""
    try:
        app(prog_name="encore")
    except Exception as error:
        absent = absent_library(error)
        if os.environ.get("ENCORE_DEBUG") == "1" or not (absent or is_users_to_mend(error)):
            raise
        message = absent or " ".join(str(error).split()) or type(error).__name__
        print(f"encore: error: {message}", file=sys.stderr)
        sys.exit(2)
