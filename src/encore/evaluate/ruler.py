"""RULER's thirteen tasks at any length (Hsieh et al. 2024, arXiv 2404.06654): retrieval, tracing, counting, questions.

    niah_single_1..3      one needle, in noise or text; its value a number or a UUID
    niah_multikey_1..3    one needle asked for among others; in 2 and 3 the whole haystack is needles
    niah_multivalue       four values of one key              niah_multiquery   four keys asked for
    vt                    variables assigned to each other: which of them hold one value
    cwe, fwe              the ten commonest words of a list; the three commonest of a coded text
    qa_1, qa_2            a question about one paragraph, or two, among many others

The tasks, their numbers of needles and hops, and the scores are the paper's; the wording and the filler are our own, so
scores compare models with each other, not with published tables. `length` tokens hold prompt and answer, and are
filled to at least 95 %; every example follows from (task, length, seed, index) alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from encore.evaluate.examples import Count, Draft, Example, Make, Style, fill
from encore.evaluate.haystack import PAIRS, Library, NameKind, cycle_from, name, names, noise, noise_words, scatter
from encore.evaluate.questions import QUESTIONS, Question


@dataclass(frozen=True)
class Niah:
    """A kind of needles and of the haystack around them."""

    haystack: Literal["noise", "text", "needles"]
    key: NameKind = "words"
    value: NameKind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("text"),
    "niah_single_3": Niah("text", value="uuids"),
    "niah_multikey_1": Niah("text", num_keys=4),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", key="uuids", value="uuids"),
    "niah_multivalue": Niah("text", num_values=4),
    "niah_multiquery": Niah("text", num_keys=4, num_queries=4),
}
TASKS = (*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")

ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
"""How many tokens an answer may take in the paper; 128 for needles."""


@dataclass(frozen=True)
class RulerSettings:
    """What may be made easier or replaced. The defaults are the paper's, but for the text, which the package ships."""

    library: Library = field(default_factory=Library)
    questions: tuple[Question, ...] = ()  # (): made from the library's paragraphs
    digits: int = 7  # of the numbers
    num_hops: int = 4  # of vt
    num_common: int = 10  # words asked for by cwe
    common_times: int = 30
    uncommon_times: int = 3
    zipf: float = 2.0  # of fwe


def ruler_examples(
    task: str,
    length: int,
    number: int,
    count: Count,
    *,
    seed: int = 0,
    style: Style | None = None,
    settings: RulerSettings | None = None,
) -> Iterator[Example]:
    """So many examples of a task, each of at most `length` tokens with its answer.

    Args:
        count: how many tokens a text has, the frame of a source included: `lambda t: len(tokenizer.encode_source(t))`.

    Raises:
        ValueError: no such task, or the task does not fit into so few tokens.
    """
    make = _maker(task, settings or RulerSettings())
    for index in range(number):
        yield fill(task, length, index, count, make, seed=seed, style=style)


def _maker(task: str, settings: RulerSettings) -> Make:
    if task in NIAH:
        return lambda units, words, rng: _niah(NIAH[task], settings, units, words, rng)
    if task == "vt":
        return lambda units, words, rng: _variable_tracking(settings, units, words, rng)
    if task == "cwe":
        return lambda units, words, rng: _common_words(settings, units, rng)
    if task == "fwe":
        return lambda units, words, rng: _frequent_words(settings, units, rng)
    if task in QUESTIONS:
        return lambda units, words, rng: _question(task, settings, units, words, rng)
    raise ValueError(f"no task is called {task!r}; expected one of {', '.join(TASKS)}")


def _padding(words: int) -> list[str]:
    return [noise_words(words)] if words else []


def _niah(task: Niah, settings: RulerSettings, units: int, words: int, rng: random.Random) -> Draft:
    what = {"words": "phrase", "numbers": "number", "uuids": "UUID"}[task.value]
    keys = names(task.key, task.num_keys, rng)
    values = names(task.value, task.num_keys * task.num_values, rng, settings.digits)
    needles, value_of = [], {key: [] for key in keys}
    for i, value in enumerate(values):
        key = keys[i // task.num_values]
        value_of[key].append(value)
        needles.append(_needle(what, key, value))
    asked = rng.sample(keys, task.num_queries)
    start = rng.random()
    if task.haystack == "noise":
        filler = noise(units)
    elif task.haystack == "text":
        pieces = settings.library.sentences
        filler = cycle_from(pieces, int(start * len(pieces)), units)
    else:
        filler = []
        while len(filler) < units:
            key = name(task.key, rng)
            if key not in value_of:
                filler.append(_needle(what, key, name(task.value, rng, settings.digits)))
    answers = tuple(value for key in asked for value in value_of[key])
    plural = "s" if len(answers) > 1 else ""
    spoken = ", ".join(asked[:-1]) + f" and {asked[-1]}" if len(asked) > 1 else asked[0]
    context = " ".join([*scatter(filler, needles, rng), *_padding(words)])
    verb = "are" if plural else "is"
    return Draft(
        before=f"The text below hides special magic {what}s. Remember them: you will be asked.",
        text=context,
        question=f"What {verb} the special magic {what}{plural} for {spoken}?",
        answers=answers,
        target=", ".join(answers),
        opening=f"The special magic {what}{plural} for {spoken} {verb}:",
    )


def _needle(what: str, key: str, value: str) -> str:
    return f"The special magic {what} for {key} is: {value}."


def _variable_tracking(settings: RulerSettings, units: int, words: int, rng: random.Random) -> Draft:
    variables: dict[str, None] = {}
    while len(variables) < settings.num_hops + 1:
        variables["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))] = None
    chain = list(variables)
    value = str(rng.randrange(10_000, 100_000))
    lines = [f"VAR {chain[0]} = {value}."]
    lines += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)]
    filler = noise(units)
    depths = sorted(int(rng.random() * (units + 1)) for _ in lines)  # the chain keeps its order
    pieces: list[str] = []
    start = 0
    for depth, line in zip(depths, lines, strict=True):
        pieces += [*filler[start:depth], line]
        start = depth
    context = " ".join([*pieces, *filler[start:], *_padding(words)])
    return Draft(
        before="The text below assigns values to variables. Follow the assignments.",
        text=context,
        question=f"Which {len(chain)} variables have the value {value}, directly or through others?",
        answers=tuple(chain),
        target=" ".join(chain),
        opening=f"The variables with the value {value} are",
    )


def _common_words(settings: RulerSettings, units: int, rng: random.Random) -> Draft:
    """A unit is one more line of an uncommon word; each uncommon word has at most `uncommon_times` of them."""
    needed = settings.num_common + -(-units // settings.uncommon_times)
    words = rng.sample(settings.library.words, len(settings.library.words))  # all, so that units do not change them
    if needed > len(words):
        words += rng.sample(PAIRS, len(PAIRS))
    if needed > len(words):
        raise ValueError(f"the list needs {needed} different words and there are {len(words)}; give more text")
    common, uncommon = words[: settings.num_common], words[settings.num_common :]
    lines = [*common * settings.common_times, *(uncommon[i // settings.uncommon_times] for i in range(units))]
    rng.shuffle(lines)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(lines, start=1))
    return Draft(
        before="Some words of the list below come up far more often than the others.",
        text=listed,
        question=f"Which {settings.num_common} words are the most common in the list?",
        answers=tuple(common),
        target=" ".join(common),
        opening="The most common words are",
    )


def _frequent_words(settings: RulerSettings, units: int, rng: random.Random) -> Draft:
    """Words drawn so that the one of rank k comes up in proportion to k^-zipf; the first rank is mere filler."""
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < 200:
        vocabulary["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    ranked = list(vocabulary)
    total = units + 60  # enough that three words stand out from the rest
    weights = [(rank + 1) ** -settings.zipf for rank in range(len(ranked))]
    scale = total / sum(weights)
    counts = [int(weight * scale) for weight in weights]
    counts[0] = max(counts[0] + total - sum(counts), counts[1] + 1)
    lines = ["..."] * counts[0] + [
        word for word, times in zip(ranked[1:], counts[1:], strict=True) for _ in range(times)
    ]
    rng.shuffle(lines)
    return Draft(
        before="The coded text below is made of words without meaning. Do not count the dots.",
        text=" ".join(lines),
        question="Which three words come up most often in the coded text?",
        answers=tuple(ranked[1:4]),
        target=" ".join(ranked[1:4]),
        opening="The three most frequent words are",
    )


def _question(task: str, settings: RulerSettings, units: int, words: int, rng: random.Random) -> Draft:
    """A unit is one more paragraph that does not answer the question."""
    asked = QUESTIONS[task](settings.questions, settings.library.paragraphs, rng)
    pool = [paragraph for paragraph in settings.library.paragraphs if paragraph not in asked.paragraphs]
    if not pool:
        raise ValueError("the text has no other paragraph than those of the question; give more text")
    others = cycle_from(pool, int(rng.random() * len(pool)), units)
    shelf = scatter(others, asked.paragraphs, rng)
    context = "\n".join([f"Document {i}: {text}" for i, text in enumerate(shelf, start=1)] + _padding(words))
    return Draft(
        before="Answer the question from the documents; give only the answer.",
        text=context,
        question=f"Question: {asked.question}",
        answers=asked.answers,
        target=asked.answers[0],
        opening="Answer:",
        scoring="any",
    )
