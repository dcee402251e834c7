"""MRCR-like: a long conversation with several turns that ask for the same thing, and a request for one of them.

After multi-round co-reference resolution (Vodrahalli et al. 2024, arXiv 2409.12640) and the multi-needle form that is
public since: the model repeats the i-th answer to a repeated request, word for word, with a code in front. Score: 0
without the code, else the ratio of difflib's SequenceMatcher. The turns' texts are sentences of real documents here,
where the published sets have them written by a model, so scores compare models with each other only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from encore.evaluate.examples import Count, Draft, Example, Style, fill
from encore.evaluate.haystack import NOUNS, Library, noise_words

NEEDLES = (2, 4, 8)
MRCR_TASKS = tuple(f"mrcr_{needles}" for needles in NEEDLES)
FORMS = ("poem", "letter", "riddle", "speech", "song", "short story", "diary entry", "news report")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
CODE_LENGTH = 10


def mrcr_examples(
    task: str,
    length: int,
    number: int,
    count: Count,
    *,
    seed: int = 0,
    style: Style | None = None,
    library: Library | None = None,
) -> Iterator[Example]:
    """So many conversations of at most `length` tokens with their answers; `task` is one of MRCR_TASKS.

    Raises:
        ValueError: no such task, or it does not fit into so few tokens.
    """
    if task not in MRCR_TASKS:
        raise ValueError(f"no task is called {task!r}; expected one of {', '.join(MRCR_TASKS)}")
    needles = NEEDLES[MRCR_TASKS.index(task)]
    sentences = list(dict.fromkeys((library or Library()).sentences))
    if len(sentences) < needles:
        raise ValueError(f"{task} needs {needles} different sentences and the text has {len(sentences)}; give more")

    def make(units: int, words: int, rng: random.Random) -> Draft:
        return _conversation(needles, sentences, units, words, rng)

    for index in range(number):
        yield fill(task, length, index, count, make, seed=seed, style=style)


def _conversation(needles: int, sentences: list[str], units: int, words: int, rng: random.Random) -> Draft:
    """A unit is one more turn that asks for another form or topic; words top up one turn behind them."""
    form, topic = rng.choice(FORMS), rng.choice(NOUNS)
    texts = rng.sample(sentences, needles)
    asked = rng.randrange(needles)
    code = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=CODE_LENGTH))
    depths = [rng.random() for _ in range(needles)]
    turns: list[tuple[str, str]] = []
    for _ in range(units):
        other_form, other_topic = rng.choice(FORMS), rng.choice(NOUNS)
        if (other_form, other_topic) == (form, topic):
            other_topic = NOUNS[(NOUNS.index(topic) + 1) % len(NOUNS)]
        turns.append((_request(other_form, other_topic), rng.choice(sentences)))
    places = sorted(int(depth * (units + 1)) for depth in depths)
    for text, at in reversed(list(zip(texts, places, strict=True))):
        turns.insert(at, (_request(form, topic), text))
    if words:
        turns.append(("Say what the weather is like.", noise_words(words)))
    said = "\n".join(f"User: {request}\nAssistant: {text}" for request, text in turns)
    return Draft(
        before="The conversation below has requests that come up more than once.",
        text=said,
        question=f"Write {code} and then repeat the {_ORDINALS[asked]} {form} about the {topic}, word for word.",
        answers=(texts[asked],),
        target=f"{code} {texts[asked]}",
        scoring="ratio",
        code=code,
    )


def _request(form: str, topic: str) -> str:
    return f"Write a {form} about the {topic}."
