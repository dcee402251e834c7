"""`encore generate`, `encore score`, `encore embed`: text (and pictures) in, text, numbers or vectors out.

Texts are arguments or lines of stdin; one result for each, in order. stdout holds results and nothing else. Pictures
go with every text, so that several questions can be asked about one.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar

import typer

from encore.cli.answers import answer_row, npz
from encore.generate.source import Overflow

if TYPE_CHECKING:
    import torch

    from encore.generate.sampling import SamplingSettings
    from encore.generate.text import TextGenerator
    from encore.images import PictureSource

Item = TypeVar("Item")

Texts = Annotated[list[str] | None, typer.Argument(help="Texts; without any, the lines of stdin.", show_default=False)]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Checkpoint folder, hub name or shipped model.")]
Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        help="Picture that goes with every text, at its <start_of_image> or else in front; may be repeated.",
        show_default=False,
    ),
]
Crops = Annotated[bool, typer.Option("--pan-and-scan", help="Read long pictures in crops too.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put each text into a user turn and let the model answer.")]
MaxSource = Annotated[
    int | None, typer.Option(min=1, show_default="what the model has positions for", help="Most source tokens to read.")
]
OverflowChoice = Annotated[
    Overflow,
    typer.Option(help="A source that is too long: fail, or warn and keep only its start (cut the end) or its end."),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Read each text in chunks of at most so many tokens, encoded apart: longer than the model was made for.",
        show_default="whole",
    ),
]
Instruction = Annotated[str, typer.Option(help="Text to put before each chunk, with --chunk-tokens.")]
Beams = Annotated[int | None, typer.Option(min=1, show_default="no search", help="Targets to search side by side.")]
LengthPenalty = Annotated[float, typer.Option(help="With --beams: above 1 favours longer targets, below shorter.")]
BeamReturns = Annotated[int, typer.Option(min=1, help="With --beams and --json: how many of the best to give.")]
Draft = Annotated[
    bool, typer.Option("--draft/--no-draft", help="Copy drafts from the source and verify them: same answer, sooner.")
]
DraftModel = Annotated[str | None, typer.Option(help="A small model with the same tokenizer, to draft instead.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts at a time; with 1, each is answered before the next.")]
Threads = Annotated[int | None, typer.Option(min=1, show_default="one per core", help="CPU threads.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes CUDA if there is one.")]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName, typer.Option(help="Of weights and states; auto is float32 on a CPU, else as stored.")]
Seed = Annotated[
    int | None,
    typer.Option(min=0, show_default="new draws each time", help="Same text, settings and seed: same answer."),
]
NoDrawSeed = Annotated[int | None, typer.Option(min=0, help="As for generate; this verb draws nothing.")]


def register(app: typer.Typer) -> None:
    """Adds the three verbs to the command."""
    app.command(epilog='Example: encore generate "The cat is asleep."')(generate)
    app.command(epilog='Example: encore score --source "Good morning." --target "Guten Morgen."')(score)
    app.command(epilog="Example: encore embed --format npz --output states.npz < lines.txt")(embed)


def generate(
    texts: Texts = None,
    model: ModelName = "translator-int8",
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object per text: text, tokens, logprobs, finish_reason, timings.")
    ] = False,
    image: Images = None,
    pan_and_scan: Crops = False,
    chat: Chat = False,
    max_target_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token; above, tokens are drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most probable tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens at least this probable relative to the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens already there become less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    stop_id: Annotated[
        list[int] | None, typer.Option(help="Token id that ends an answer, besides the model's own; may be repeated.")
    ] = None,
    seed: Seed = None,
    beams: Beams = None,
    length_penalty: LengthPenalty = 1.0,
    beam_returns: BeamReturns = 1,
    draft: Draft = False,
    draft_model: DraftModel = None,
    max_source_tokens: MaxSource = None,
    overflow: OverflowChoice = "error",
    chunk_tokens: ChunkTokens = None,
    instruction: Instruction = "",
    batch_size: BatchSize = 8,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write a target for each text: a translation, an answer, a continuation, a caption.

    One text on a terminal is answered as it is written. With several texts each answer is one line, line breaks within
    it written as \\n; --json gives the exact text.
    """
    from encore.generate.sampling import SamplingSettings

    settings = SamplingSettings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_target_tokens=max_target_tokens,
        stop_strings=tuple(stop or ()),
        log_probabilities=as_json,
    )
    from encore.generate.beam import BeamSettings
    from encore.generate.drafts import DraftSettings
    from encore.generate.text import TextGenerator

    if beams is None and (beam_returns, length_penalty) != (1, 1.0):
        raise ValueError("--length-penalty and --beam-returns are for beam search; give --beams too")
    if beams is not None and (draft or draft_model):
        raise ValueError("beam search takes no drafts; leave --draft and --draft-model, or --beams")
    searched = None if beams is None else BeamSettings(beams, length_penalty, num_return=beam_returns)
    drafts = None
    if draft_model is not None:
        drafter = TextGenerator.load(draft_model, **how_to_run(draft_model, device, dtype, threads)).model
        drafts = DraftSettings(model=drafter)
    elif draft:
        drafts = DraftSettings()
    pictures, crops = [], None
    if image or pan_and_scan:  # Pillow takes a moment to import
        from encore.images import PanAndScan, load_picture

        pictures, crops = [load_picture(path) for path in image or ()], PanAndScan() if pan_and_scan else None
    generator = TextGenerator.load(
        model,
        vision=bool(pictures),
        pan_and_scan=crops,
        **how_to_run(model, device, dtype, threads),
        chat=chat,
        max_source_tokens=max_source_tokens,
        overflow=overflow,
        chunk_tokens=chunk_tokens,
        instruction=instruction,
        drafts=drafts,
        warn=_warn,
    )
    if stop_id:
        from dataclasses import replace

        settings = replace(settings, stop_ids=(*generator.tokenizer.stop_ids, *stop_id))
    if texts and len(texts) == 1 and not as_json and not beams and sys.stdout.isatty():
        _stream(generator, texts[0], settings, pictures)
        return
    single = texts is not None and len(texts) == 1
    of_texts = itertools.repeat(pictures) if pictures else None
    lines = texts or _stdin_lines()
    answers = generator.generate(lines, settings, batch_size=batch_size, pictures=of_texts, beams=searched)
    for index, answer in enumerate(_with_progress(answers, texts)):
        if as_json:
            _print_json(answer_row(index, answer))
        else:
            print(answer.text if single else answer.text.replace("\n", "\\n"), flush=True)


def score(
    source: Annotated[str | None, typer.Option(help="The source; without it, JSON lines are read from stdin.")] = None,
    target: Annotated[str | None, typer.Option(help="The target whose probability is asked for.")] = None,
    model: ModelName = "translator-int8",
    chat: Chat = False,
    max_source_tokens: MaxSource = None,
    overflow: OverflowChoice = "error",
    batch_size: BatchSize = 8,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: NoDrawSeed = None,
) -> None:
    """How probable a target is, given a source: a JSON object per pair.

    stdin holds lines {"source": …, "target": …}. The result has `logprob` (the sum, natural logarithm), `mean_logprob`,
    and `tokens` with their `logprobs`, the end of the target included. A decoder-only model reads source and target as
    one text, the target with its own leading space.
    """
    del seed
    if (source is None) != (target is None):
        raise ValueError("--source and --target belong together; give both, or JSON lines on stdin")
    from encore.generate.score import score_texts
    from encore.generate.text import TextGenerator

    scorer = TextGenerator.load(
        model,
        **how_to_run(model, device, dtype, threads),
        chat=chat,
        max_source_tokens=max_source_tokens,
        overflow=overflow,
        warn=_warn,
    )
    pairs = _json_pairs(_stdin_lines()) if source is None or target is None else [(source, target)]
    scores = score_texts(scorer.model, scorer.tokenizer, scorer.reader(1), pairs, batch_size=batch_size)
    for index, item in enumerate(_with_progress(scores, None if source is None else [source])):
        _print_json(
            {
                "index": index,
                "logprob": round(item.total, 6),
                "mean_logprob": round(item.mean, 6),
                "tokens": item.tokens,
                "logprobs": [round(value, 6) for value in item.log_probabilities],
            }
        )


def embed(
    texts: Texts = None,
    model: ModelName = "translator-int8",
    pooling: Annotated[
        Literal["mean", "first", "last", "none"], typer.Option(help="Of the encoder's states; none gives them all.")
    ] = "mean",
    normalise: Annotated[bool, typer.Option("--normalise", "--normalize", help="Give every vector length 1.")] = False,
    file_format: Annotated[
        Literal["jsonl", "npz"], typer.Option("--format", help="JSON lines, or arrays for numpy.load.")
    ] = "jsonl",
    output: Annotated[Path | None, typer.Option("--output", "-o", show_default="stdout", help="File to write.")] = None,
    image: Images = None,
    pan_and_scan: Crops = False,
    chat: Chat = False,
    max_source_tokens: MaxSource = None,
    overflow: OverflowChoice = "error",
    batch_size: BatchSize = 8,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: NoDrawSeed = None,
) -> None:
    """Turn each text (with its pictures) into a vector, or into one per token; only the encoder's weights are read.

    JSON lines: {"index", "tokens", "embedding"}. npz: `embeddings` (texts, width), or with --pooling none all states
    (tokens, width), text i in rows offsets[i] to offsets[i + 1]; `tokens` and `offsets` likewise.
    """
    del seed
    if file_format == "npz" and output is None and sys.stdout.isatty():
        raise ValueError("npz is binary; give --output FILE, or send stdout to a file")
    from encore.checkpoint.hub import resolve
    from encore.generate.embed import embed_texts
    from encore.generate.embed import load as load_encoder
    from encore.generate.source import PictureFormat, SourceReader
    from encore.images import PanAndScan, load_picture
    from encore.tokenizer import load_tokenizer

    pictures = [load_picture(path) for path in image or ()]
    folder = resolve(model)
    encoder = load_encoder(folder, vision=bool(pictures), **how_to_run(model, device, dtype, threads))
    limit = encoder.config.encoder.max_position_embeddings
    reader = SourceReader(
        load_tokenizer(folder),
        max_tokens=min(limit, max_source_tokens or limit),
        chat=chat,
        overflow=overflow,
        picture_format=PictureFormat.of(encoder.config) if pictures else None,
        pan_and_scan=PanAndScan() if pan_and_scan else None,
        warn=_warn,
    )
    lines, of_texts = texts or _stdin_lines(), itertools.repeat(pictures) if pictures else None
    how = {"pooling": pooling, "normalise": normalise, "batch_size": batch_size}
    found = _with_progress(embed_texts(encoder, reader, lines, pictures=of_texts, **how), texts)
    if file_format == "npz":
        packed = npz(list(found), pooled=pooling != "none")
        if output is None:
            sys.stdout.buffer.write(packed)
            sys.stdout.buffer.flush()
        else:
            output.write_bytes(packed)
        return
    with nullcontext(sys.stdout) if output is None else output.open("w", encoding="utf-8") as file:
        for index, item in enumerate(found):
            shortest = item.vectors.astype(str).astype(float)  # 0.1, not the 0.10000000149011612 nearest to it
            _print_json({"index": index, "tokens": item.tokens, "embedding": shortest.tolist()}, file)


def how_to_run(model: str, device: str, dtype: DtypeName, threads: int | None) -> dict[str, Any]:
    """The options of a loader: of an exported folder its threads, without torch; else dtype and device."""
    from encore.checkpoint.hub import resolve
    from encore.export.manifest import is_exported

    if is_exported(resolve(model)):
        if device not in ("auto", "cpu") or dtype != "auto":
            raise ValueError(
                f"{model} is exported: it runs on the CPU, its weights as they are; leave --device, --dtype"
            )
        return {"threads": threads}
    return {"dtype": dtype, "device": _torch_device(device, threads)}


def _torch_device(device: str, threads: int | None) -> torch.device:
    import torch

    from encore.checkpoint.pretrained import as_device

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return as_device(device)


def _stdin_lines() -> Iterator[str]:
    if sys.stdin.isatty():
        print("encore: reading lines from the terminal; end with Ctrl-D", file=sys.stderr)
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _json_pairs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of stdin is not JSON ({error.msg}); give one object per line") from error
        match row:
            case {"source": str(source), "target": str(target)}:
                yield source, target
            case _:
                raise ValueError(f'line {number} of stdin is {line[:60]!r}; expected {{"source": "…", "target": "…"}}')


def _with_progress(items: Iterable[Item], texts: Sequence[object] | None) -> Iterator[Item]:
    """Counts on stderr while many results go into a file or pipe; on a terminal the results themselves are seen."""
    if (texts and len(texts) == 1) or not sys.stderr.isatty() or sys.stdout.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # redirect_stdout: rich would otherwise send our results to its own console, stderr
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("texts", total=len(texts) if texts else None)
        for item in items:
            yield item
            progress.advance(task)


def _stream(generator: TextGenerator, text: str, settings: SamplingSettings, pictures: Sequence[PictureSource]) -> None:
    for event in generator.stream(text, settings, pictures=pictures):
        print(event.text, end="", flush=True)
        if event.finish_reason == "length":
            note = f"\nencore: ended at {settings.max_target_tokens} tokens (--max-target-tokens)"
            print(note, end="", file=sys.stderr, flush=True)
    print(flush=True)


def _print_json(row: dict[str, Any], file: TextIO | None = None) -> None:
    print(json.dumps(row, ensure_ascii=False), file=file or sys.stdout, flush=True)


def _warn(message: str) -> None:
    print(f"encore: warning: {message}", file=sys.stderr)
