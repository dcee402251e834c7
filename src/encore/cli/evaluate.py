"""`encore evaluate ruler` and `encore evaluate mrcr`: how well models read long sources, by task and length.

Also the examples themselves, as pairs to train on (`--write`). stdout holds the table (or JSON), notes go to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from encore.evaluate.long_context import Cell, Reading, Suite
    from encore.tokenizer import Tokenizer

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Checkpoint folder, hub name or shipped model; may be repeated.",
        show_default="the shipped source",
    ),
]
Tokens = Annotated[str, typer.Option(help="Lengths of prompt and answer together, by the first model's tokenizer.")]
Examples = Annotated[int, typer.Option(min=1, help="Examples for each task and length.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same examples.")]
Place = Annotated[
    Literal["end", "start", "both"], typer.Option("--question", help="Where the question stands; published: end.")
]
Sentence = Annotated[bool, typer.Option("--sentence", help="Written targets are whole sentences.")]
Opening = Annotated[
    bool, typer.Option("--opening", help="Put the beginning of the answer behind the prompt, for models of text.")
]
Haystack = Annotated[
    list[str] | None,
    typer.Option(
        help="Text to hide things in: files, folders or asset:…; may be repeated.",
        show_default="asset:text/validation",
    ),
]
ChunkTokens = Annotated[
    int | None, typer.Option(min=1, help="Read in chunks of so many tokens, each behind the question; else whole.")
]
RopeFactor = Annotated[
    float | None, typer.Option(help="Divide positions on global layers, to read past the trained length.")
]
Write = Annotated[Path | None, typer.Option(help="Write the examples as JSON lines with src and tgt; ask no model.")]
Plot = Annotated[Path | None, typer.Option(help="Draw score by length into this PNG.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for each model, task and length.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sources at a time.")]
Threads = Annotated[int | None, typer.Option(min=1, show_default="one per core", help="CPU threads.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes CUDA if there is one.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of weights and states.")]

RULER_EXAMPLE = "Example: encore evaluate ruler --task niah_single_1 --tokens 512 --examples 2"
MRCR_EXAMPLE = "Example: encore evaluate mrcr --needles 2 --tokens 512 --examples 2"


def register(app: typer.Typer) -> None:
    """Adds the group to the command."""
    group = typer.Typer(no_args_is_help=True)
    group.command(epilog=RULER_EXAMPLE)(ruler)
    group.command(epilog=MRCR_EXAMPLE)(mrcr)
    group.callback()(evaluate)
    app.add_typer(group, name="evaluate", epilog=RULER_EXAMPLE)


def evaluate() -> None:
    """Measure how well models read long sources, and write examples to train on."""


def ruler(
    model: Models = None,
    task: Annotated[str, typer.Option(help="Names with commas between, or all thirteen.")] = "all",
    tokens: Tokens = "1024,2048,4096",
    examples: Examples = 20,
    seed: Seed = 0,
    digits: Annotated[int, typer.Option(min=1, help="Of the hidden numbers; published: 7.")] = 7,
    question: Place = "end",
    sentence: Sentence = False,
    opening: Opening = False,
    haystack: Haystack = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="JSON lines in SQuAD's form, for qa_1 and qa_2.", show_default="made from the text"),
    ] = None,
    chunk_tokens: ChunkTokens = None,
    rope_factor: RopeFactor = None,
    write: Write = None,
    plot: Plot = None,
    as_json: AsJson = False,
    batch_size: BatchSize = 4,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """RULER's thirteen tasks, made anew at any length: needles, variables, word counts, questions.

    Scores are per cent of the expected strings found in the greedy answers (of questions: whether any is found).
    """
    from encore.evaluate.examples import Style
    from encore.evaluate.long_context import Reading, Suite
    from encore.evaluate.questions import read_questions
    from encore.evaluate.ruler import TASKS, RulerSettings

    suite = Suite(
        TASKS if task == "all" else _names(task),
        _numbers(tokens, "--tokens"),
        examples,
        seed,
        Style(question, sentence),
        RulerSettings(
            library=_library(haystack), questions=tuple(read_questions(questions)) if questions else (), digits=digits
        ),
    )
    reading = Reading(chunk_tokens, opening, batch_size)
    _run(model or ["source"], suite, reading, rope_factor, write, plot, as_json, (device, dtype, threads))


def mrcr(
    model: Models = None,
    needles: Annotated[str, typer.Option(help="How often the same is asked for: 2, 4, 8, with commas between.")] = "2",
    tokens: Tokens = "1024,2048,4096",
    examples: Examples = 20,
    seed: Seed = 0,
    question: Place = "end",
    haystack: Haystack = None,
    chunk_tokens: ChunkTokens = None,
    rope_factor: RopeFactor = None,
    write: Write = None,
    plot: Plot = None,
    as_json: AsJson = False,
    batch_size: BatchSize = 4,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """A conversation with requests that come up several times: repeat the i-th answer, word for word.

    Scores are per cent of difflib's similarity with the text asked for; 0 without the code that must stand in front.
    """
    from encore.evaluate.examples import Style
    from encore.evaluate.long_context import Reading, Suite
    from encore.evaluate.ruler import RulerSettings

    suite = Suite(
        tuple(f"mrcr_{number}" for number in _numbers(needles, "--needles")),
        _numbers(tokens, "--tokens"),
        examples,
        seed,
        Style(question),
        RulerSettings(library=_library(haystack)),
    )
    reading = Reading(chunk_tokens, False, batch_size)
    _run(model or ["source"], suite, reading, rope_factor, write, plot, as_json, (device, dtype, threads))


def _run(
    models: Sequence[str],
    suite: Suite,
    reading: Reading,
    rope_factor: float | None,
    write: Path | None,
    plot: Path | None,
    as_json: bool,
    how: tuple[str, Literal["auto", "float32", "bfloat16", "float16"], int | None],
) -> None:
    if plot is not None and plot.suffix.lower() != ".png":
        raise ValueError(f"--plot is {plot}; expected a name that ends in .png")
    from encore.checkpoint.hub import resolve
    from encore.tokenizer import load_tokenizer

    first = load_tokenizer(resolve(models[0]))
    if write is not None:
        _write(suite, first, write)
        return
    from encore.evaluate.long_context import evaluate as ask
    from encore.evaluate.long_context import panels, stretch, table

    cells: list[Cell] = []
    with _progress(len(models) * len(suite.tasks) * len(suite.lengths) * suite.num_examples) as advance:
        asked = list(suite.written(_counter(first), _note))
        if not asked:
            raise ValueError("no task fits into the lengths that were given; ask for more tokens")
        for name in models:
            loaded, tokenizer = _load(name, how)
            _note_positions(name, loaded, max(suite.lengths), rope_factor)
            fitting = stretch(loaded, rope_factor=rope_factor, positions=2 * max(suite.lengths))
            for examples in asked:
                cells.append(ask(name, fitting, tokenizer, examples, reading, advance))
                if as_json:
                    print(json.dumps(cells[-1].as_json(), ensure_ascii=False), flush=True)
    if not as_json:
        print(table(cells))
    if plot is not None:
        from encore.evaluate.report import panels_png

        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(panels_png(panels(cells)))
        _note(f"wrote {plot}")


def _write(suite: Suite, tokenizer: Tokenizer, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    with (
        path.open("w", encoding="utf-8") as file,
        _progress(len(suite.tasks) * len(suite.lengths) * suite.num_examples) as advance,
    ):
        for examples in suite.written(_counter(tokenizer), _note):
            for example in examples:
                row = {
                    "src": example.prompt,
                    "tgt": example.target,
                    "task": example.task,
                    "length": example.length,
                    "tokens": example.tokens,
                    "answers": example.answers,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                number += 1
                advance()
    print(f"{path}: {number} examples")


def _load(name: str, how: tuple[str, Literal["auto", "float32", "bfloat16", "float16"], int | None]) -> Any:
    from encore.cli.generate import how_to_run
    from encore.generate.text import TextGenerator

    generator = TextGenerator.load(name, **how_to_run(name, *how))
    return generator.model, generator.tokenizer


def _note_positions(name: str, model: Any, longest: int, rope_factor: float | None) -> None:
    from encore.generate.rows import source_stack

    limit = source_stack(model).max_position_embeddings
    if longest > limit and rope_factor is None:
        _note(f"{name} was made for {limit} positions and is asked to read {longest}; --rope-factor interpolates them")


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode_source(text))


def _library(names: list[str] | None) -> Any:
    from encore.evaluate.haystack import Library

    return Library(tuple(names)) if names else Library()


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part.replace("_", "")) for part in _names(text))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; expected whole numbers with commas between") from None


def _note(message: str) -> None:
    print(f"encore: {message}", file=sys.stderr, flush=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr where that is a terminal; gives what to call after each example."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("examples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("examples", total=total)
        yield lambda: bar.advance(task)
