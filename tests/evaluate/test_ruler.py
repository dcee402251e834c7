"""RULER's tasks: the length asked for, answers that are there and right, the same examples again, published scores."""

from __future__ import annotations

import collections
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encore import assets
from encore.evaluate.examples import Example, Style, match_all, match_any
from encore.evaluate.haystack import DoesNotFit, Library, largest_that_fits, names, noise, scatter
from encore.evaluate.questions import read_questions
from encore.evaluate.ruler import NIAH, TASKS, RulerSettings, ruler_examples
from encore.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(assets.path("tokenizer"))
SETTINGS = RulerSettings()


def count(text: str) -> int:
    return len(TOKENIZER.encode_source(text))


def words(text: str) -> int:
    """Another tokenizer altogether."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def make(task: str, length: int, number: int = 1, counter=count, **options) -> list[Example]:
    return list(ruler_examples(task, length, number, counter, settings=SETTINGS, **options))


def test_there_are_thirteen() -> None:
    assert len(TASKS) == len(set(TASKS)) == 13


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("counter, length", [(count, 3000), (words, 2000)])
def test_examples_are_as_long_as_asked(task: str, counter, length: int) -> None:
    (example,) = make(task, length, counter=counter)
    used = counter(f"{example.prompt} {example.opening}") + counter(example.target)
    assert used == example.tokens
    assert 0.95 * length <= used <= length
    assert example.score(example.target) == 1.0
    assert example.score("") == example.score("I cannot say.") == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(task: str) -> None:
    length = 2600 if task == "cwe" else 800
    one, again, other = make(task, length, 2), make(task, length, 2), make(task, length, 1, seed=1)
    assert one == again
    assert len({example.prompt for example in [*one, *other]}) == 3


@pytest.mark.parametrize("task", list(NIAH))
def test_each_key_asked_for_has_its_values(task: str) -> None:
    form = NIAH[task]
    (example,) = make(task, 1200)
    text = example.prompt.removesuffix(example.question)
    needles = re.findall(r"The special magic \w+ for ([\w-]+) is: ([\w-]+)\.", text)
    by_key = collections.defaultdict(list)
    for key, value in needles:
        by_key[key].append(value)
    asked = [key for key in by_key if key in example.question]
    assert len(asked) == form.num_queries
    assert sorted(example.answers) == sorted(value for key in asked for value in by_key[key])
    assert len(example.answers) == form.num_queries * form.num_values
    if form.haystack == "needles":
        assert len(needles) > 10 and len(set(needles)) == len(needles)
    else:
        assert len(needles) == form.num_keys * form.num_values


def test_variables_can_be_followed() -> None:
    (example,) = make("vt", 900)
    values: dict[str, str] = {}
    for left, right in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.prompt):
        values[left] = values.get(right, right)
    assert set(example.answers) == {name for name, value in values.items() if value in example.question}
    assert len(example.answers) == 5


def test_the_common_words_are_the_common_ones() -> None:
    (example,) = make("cwe", 3000)
    counts = collections.Counter(re.findall(r"\d+\. (\w+)", example.prompt))
    assert {word for word, _ in counts.most_common(10)} == set(example.answers)
    assert sorted(counts.values())[-10:] == [30] * 10 and sorted(counts.values())[-11] <= 3


@pytest.mark.parametrize("length", [420, 3000])
def test_the_frequent_words_are_the_frequent_ones(length: int) -> None:
    (example,) = make("fwe", length)
    counts = collections.Counter(re.findall(r"\b[a-z]{6}\b", example.prompt.split("\n")[1]))
    top = counts.most_common(4)
    assert [word for word, _ in top[:3]] == list(example.answers)
    assert top[2][1] > top[3][1]


def test_questions_of_our_own_are_answered_by_the_text() -> None:
    for example in make("qa_1", 900, 5):
        quoted = re.search(r"“(.*)”", example.question)
        assert quoted and quoted[1].replace("____", example.answers[0]) in example.prompt
    for example in make("qa_2", 900, 5):
        note = re.search(r"\(See note (\d+)\.\)", example.prompt)
        assert note and f"Note {note[1]}: {example.answers[0]}" in example.prompt


def test_questions_from_a_file(tmp_path: Path) -> None:
    one = {"question": "Who?", "context": "It was Ann.", "answers": ["Ann", "Ann Lee"]}
    two = {"question": "Where?", "context": ["Ann lives with Bo.", "Bo is in Rome."], "answers": {"text": ["Rome"]}}
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(one)}\n\n{json.dumps(two)}\n", encoding="utf-8")
    chosen = RulerSettings(questions=tuple(read_questions(path)))
    (example,) = ruler_examples("qa_1", 600, 1, count, settings=chosen)
    assert "It was Ann." in example.prompt and example.question == "Question: Who?"
    assert [example.score(text) for text in ("ANN", "it was ann lee", "Bo")] == [1.0, 1.0, 0.0]
    (example,) = ruler_examples("qa_2", 600, 1, count, settings=chosen)
    assert all(text in example.prompt for text in two["context"]) and example.answers == ("Rome",)
    squad = {"data": [{"paragraphs": [{"context": "C.", "qas": [{"question": "Q?", "answers": [{"text": "C"}]}]}]}]}
    path.write_text(json.dumps(squad), encoding="utf-8")
    (question,) = read_questions(path)
    assert (question.question, question.paragraphs, question.answers) == ("Q?", ("C.",), ("C",))
    with pytest.raises(ValueError, match="none of the 1 questions is about several"):
        list(ruler_examples("qa_2", 600, 1, count, settings=RulerSettings(questions=(question,))))
    for line, message in [
        ("{]", "line 1: not JSON"),
        ("[1]", "expected an object"),
        ('{"question": 1}', "question: int"),
    ]:
        path.write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_questions(path)


def test_where_the_question_stands() -> None:
    for place, places in (("end", [-1]), ("start", [0]), ("both", [1, -1])):
        (example,) = make("niah_single_1", 400, style=Style(place))
        lines = example.prompt.split("\n")
        assert lines.count(example.question) == len(places)
        assert all(lines[at] == example.question for at in places)
    (example,) = make("niah_single_1", 400, style=Style(sentence=True))
    assert example.target == f"{example.opening} {example.answers[0]}"
    assert example.target in example.prompt  # as the needle says it


def test_text_comes_from_the_library() -> None:
    own = Library(texts=("It is in the nature of a house that the people of it have to live with the cold. " * 3,))
    (example,) = ruler_examples("niah_single_2", 400, 1, count, settings=RulerSettings(library=own, digits=2))
    assert "in the nature of a house" in example.prompt and 10 <= int(example.answers[0]) < 100
    with pytest.raises(ValueError, match="no paragraph of English prose"):
        _ = Library(texts=("Zu kurz.",)).paragraphs


def test_a_small_library_is_enough_or_says_so() -> None:
    sentence = "It is in the nature of a house that the people of it have to live with the cold. "
    small = RulerSettings(library=Library(texts=(sentence * 3,)))
    (example,) = ruler_examples("cwe", 3000, 1, count, settings=small)  # pairs of words beside the few of the text
    assert example.tokens >= 0.95 * 3000 and re.search(r"\d+\. [a-z]+-[a-z]+ ", example.prompt)
    for task, message in (("qa_1", "no other paragraph"), ("qa_2", "too few paragraphs")):
        with pytest.raises(ValueError, match=message):
            list(ruler_examples(task, 900, 1, count, settings=small))
    unquotable = RulerSettings(library=Library(texts=(sentence.replace(". ", " and ") * 3 + "that is it.",)))
    with pytest.raises(ValueError, match="too few paragraphs"):
        list(ruler_examples("qa_1", 900, 1, count, settings=unquotable))


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(DoesNotFit, match="cwe of 500 tokens takes"):
        make("cwe", 500)
    with pytest.raises(ValueError, match="expected one of niah_single_1"):
        make("niah", 500)
    with pytest.raises(ValueError, match="there are 9"):
        names("numbers", 10, random.Random(0), digits=1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(0, 300))
@settings(max_examples=60)
def test_the_largest_amount_that_fits(steps: list[int], limit: int) -> None:
    def cost(n: int) -> int:
        return sum(steps[i % len(steps)] + 1 for i in range(n))

    best = largest_that_fits(cost, limit, "it")
    assert cost(best) <= limit < cost(best + 1)


def test_needles_lie_anywhere() -> None:
    rng = random.Random(0)
    depths = [scatter(noise(10), ["needle"], rng).index("needle") for _ in range(300)]
    assert set(depths) == set(range(11))


def test_scores_are_the_published_ones() -> None:
    assert match_all("The words are: Apple, PEAR.", ("apple", "pear", "plum")) == pytest.approx(2 / 3)
    assert match_any("in Rome", ("Paris", "rome")) == 1.0 and match_any("in Oslo", ("Paris", "rome")) == 0.0
