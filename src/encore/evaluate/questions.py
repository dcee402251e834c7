"""Questions about real paragraphs, for RULER's qa_1 and qa_2: from a file in SQuAD's form, or made from the text.

A file holds JSON lines (or is SQuAD's own JSON):

    {"question": "…", "context": "a paragraph", "answers": ["…", "…"]}            one hop
    {"question": "…", "context": ["a paragraph", "another"], "answers": ["…"]}    two hops, as HotpotQA asks
    answers may also be {"text": ["…"]}, as data sets on the hub have it

Without a file, one hop is the missing word of a quoted sentence. Two hops: the paragraph with a quoted sentence names a
note, and the beginning of that note is asked for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encore.evaluate.haystack import sentences_of


@dataclass(frozen=True)
class Question:
    """A question, the paragraphs that answer it together, and what counts as an answer (the first is written)."""

    question: str
    paragraphs: tuple[str, ...]
    answers: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file that have an answer. Raises ValueError, with the line, where one cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the questions {path}: {error.strerror}") from error
    found: list[Question] = []
    for where, row in _rows(text, str(path)):
        question, context = row.get("question"), row.get("context")
        answers = _answers(row.get("answers"))
        paragraphs = _strings([context] if isinstance(context, str) else context)
        if not isinstance(question, str) or answers is None or not paragraphs:
            raise ValueError(
                f'{where}: expected {{"question": text, "context": text or list of texts, "answers": list of texts}}, '
                f"the row has {', '.join(f'{key}: {type(value).__name__}' for key, value in row.items())}"
            )
        if answers:  # SQuAD 2 has questions without one
            found.append(Question(question, paragraphs, answers))
    if not found:
        raise ValueError(f"{path}: no question with an answer in there")
    return found


def _rows(text: str, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, Mapping) and "data" in whole:  # SQuAD's own file
        for article in whole["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    yield path, {**asked, "context": paragraph["context"]}
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}); expected one object per line") from error
            if not isinstance(row, Mapping):
                raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
            yield where, row


def _answers(given: Any) -> tuple[str, ...] | None:
    if isinstance(given, Mapping):
        given = given.get("text")
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = [entry["text"] if isinstance(entry, Mapping) and "text" in entry else entry for entry in given]
    return _strings(given)


def _strings(values: Any) -> tuple[str, ...] | None:
    """The different texts of a list; None if it is anything else."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    texts = [value for value in values if isinstance(value, str)]
    return tuple(dict.fromkeys(texts)) if len(texts) == len(values) else None


_TRIES = 1000
_NOTHING_TO_ASK = (
    "the text has too few paragraphs with a sentence of 6 to 20 words to ask about; give more, or questions"
)


def one_hop(given: Sequence[Question], paragraphs: Sequence[str], rng: random.Random) -> Question:
    """A given question about one paragraph, or a quoted sentence with a word missing."""
    if given:
        return rng.choice(_of_hops(given, 1))
    for _ in range(_TRIES):
        paragraph = rng.choice(paragraphs)
        sentence = _quotable(paragraph, rng)
        words = [] if sentence is None else [w for w in sentence.split() if w.isalpha() and w.islower() and len(w) > 4]
        if sentence is not None and words:
            missing = rng.choice(words)
            if f" {sentence} ".count(missing) == 1:
                quoted = sentence.replace(missing, "____")
                return Question(f"Which word is missing in “{quoted}”?", (paragraph,), (missing,))
    raise ValueError(_NOTHING_TO_ASK)


def two_hops(given: Sequence[Question], paragraphs: Sequence[str], rng: random.Random) -> Question:
    """A given question about two paragraphs, or a quoted sentence whose paragraph names the note that is asked for."""
    if given:
        return rng.choice(_of_hops(given, 2))
    for _ in range(_TRIES if len(paragraphs) > 1 else 0):
        first, second = rng.sample(paragraphs, 2)
        sentence = _quotable(first, rng)
        if sentence is not None:
            number = rng.randrange(1000, 10_000)
            texts = (f"{first} (See note {number}.)", f"Note {number}: {second}")
            question = f"A document says “{sentence}” and names a note. What are the first four words of that note?"
            return Question(question, texts, (" ".join(second.split()[:4]),))
    raise ValueError(_NOTHING_TO_ASK)


QUESTIONS: Mapping[str, Callable[[Sequence[Question], Sequence[str], random.Random], Question]] = {
    "qa_1": one_hop,
    "qa_2": two_hops,
}


def _quotable(paragraph: str, rng: random.Random) -> str | None:
    fitting = [sentence for sentence in sentences_of(paragraph) if 6 <= len(sentence.split()) <= 20]
    return rng.choice(fitting) if fitting else None


def _of_hops(given: Sequence[Question], hops: int) -> list[Question]:
    fitting = [question for question in given if (len(question.paragraphs) > 1) == (hops > 1)]
    if not fitting:
        kind = "about several paragraphs (qa_2)" if hops > 1 else "about one paragraph (qa_1)"
        raise ValueError(f"none of the {len(given)} questions is {kind}; give such questions, or leave the task out")
    return fitting
