"""What long-context tasks are made of: filler of any length, names to hide in it, and the search for the right amount.

    filler   noise      five short sentences over and over
             text       sentences of real documents, from a place drawn by the seed
    names    words      "quiet-harbour"        numbers   "4829173"        uuids   "0f8e…"

Everything is drawn from a `random.Random` that the caller seeds; nothing here depends on the clock or on hash order.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from encore.data.sources import documents

NameKind = Literal["words", "numbers", "uuids"]

NOISE = (
    "The road is long.",
    "The hill is low.",
    "The rain is warm.",
    "We walk on.",
    "Then we rest and eat.",
)

_ADJECTIVES = (
    "able ancient bitter blue brave bright broken busy calm careful cheap clean clear clever cold common cool curious "
    "dark deep distant dry early easy empty equal fair famous fine firm flat fresh full gentle golden good grand great "
    "green grey happy hard heavy hidden high hollow honest hot huge icy kind large last late lazy light little lonely "
    "long loud low lucky narrow new noble old open pale plain polite poor proud pure quick quiet rare ready red rich "
    "rough round royal sad safe sharp short shy silent simple slow small smart smooth soft sour steep strange strong "
    "sudden sweet swift tall tender thick thin tiny tired tough true warm weak wet white whole wide wild wise young"
)
_NOUNS = (
    "actor apple arm army aunt autumn bag ball bank basket beach bear bed bell bench bird boat body book bottle bowl "
    "box branch bread bridge brother bucket bus cake camera candle captain car card castle cat chair cheese child "
    "church city clock cloud coat coffee corner cottage country cousin cow cup dance daughter desk doctor dog door "
    "dream dress driver ear egg engine eye face family farmer father field finger fire fish flower forest friend "
    "fruit garden gate girl glass gold grass guest hall hand harbour hat heart hill horse hotel house island jacket "
    "judge key king kitchen knife ladder lady lake lamp leaf letter lion lock machine map market master meadow milk "
    "mirror money moon morning mother mountain mouse mouth music nail neck needle night nose ocean office orange "
    "painter palace paper park pen piano picture pilot plant plate pocket poem potato prince queen rain ring river "
    "road roof room rose sailor school sea shadow sheep ship shirt shoe shop silver singer sister skin sky snow "
    "soldier song spoon spring square star station stone storm story street student sugar summer sun table tailor "
    "teacher tent theatre thread ticket tiger tooth tower town train tree uncle valley village voice wagon wall "
    "watch water wheel window winter wolf woman wood world writer yard"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
PAIRS = tuple(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)


def name(kind: NameKind, rng: random.Random, digits: int = 7) -> str:
    """One key or value."""
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "numbers":
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def names(kind: NameKind, number: int, rng: random.Random, digits: int = 7) -> list[str]:
    """So many different ones, in the order drawn."""
    room = {"words": len(ADJECTIVES) * len(NOUNS), "numbers": 9 * 10 ** (digits - 1), "uuids": 1 << 122}[kind]
    if number > room:
        raise ValueError(
            f"{number} different {kind} were asked for and there are {room}; ask for fewer, or more digits"
        )
    found: dict[str, None] = {}
    while len(found) < number:
        found[name(kind, rng, digits)] = None
    return list(found)


@dataclass(frozen=True)
class Library:
    """Real documents to hide needles in. `sources` are file names or `asset:…`, as in recipes; read when first used."""

    sources: tuple[str, ...] = ("asset:text/validation",)
    text_key: str = "text"
    texts: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def paragraphs(self) -> list[str]:
        """Paragraphs of plain English prose, 40 to 200 words each, every one once."""
        found: dict[str, None] = {}
        for text in self.texts or documents(self.sources, self.text_key):
            for block in re.split(r"\n\s*\n", text):
                paragraph = " ".join(block.split())
                if _is_prose(paragraph):
                    found[paragraph] = None
        if not found:
            raise ValueError(f"{', '.join(self.sources)}: no paragraph of English prose in there; give other text")
        return list(found)

    @cached_property
    def sentences(self) -> list[str]:
        return [sentence for paragraph in self.paragraphs for sentence in sentences_of(paragraph)]

    @cached_property
    def words(self) -> list[str]:
        """Different words of 4 to 10 small letters, in alphabetical order."""
        return sorted({word for paragraph in self.paragraphs for word in re.findall(r"\b[a-z]{4,10}\b", paragraph)})


_COMMON = frozenset(("the", "of", "and", "to", "a", "in", "is", "that", "it", "was", "for", "you", "with"))


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    if not 40 <= len(words) <= 200 or paragraph[-1] not in '.!?"”':
        return False
    letters = sum(c.isalpha() or c in " ,.;'’" for c in paragraph)
    english = sum(word.lower() in _COMMON for word in words)
    return letters >= 0.93 * len(paragraph) and english >= 0.12 * len(words)


def sentences_of(paragraph: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?]) +(?=[A-Z])", paragraph) if part]


def noise(number: int) -> list[str]:
    """So many sentences of noise."""
    return [NOISE[i % len(NOISE)] for i in range(number)]


def noise_words(number: int) -> str:
    """So many words of noise."""
    return " ".join(" ".join(noise(number)).split()[:number])


def cycle_from(pieces: Sequence[str], start: int, number: int) -> list[str]:
    """So many pieces from `start` on, beginning again at the end."""
    return [pieces[(start + i) % len(pieces)] for i in range(number)]


def scatter(filler: Sequence[str], needles: Iterable[str], rng: random.Random) -> list[str]:
    """The needles between the pieces of filler, each at a depth of its own; with equal depths in their own order."""
    placed = sorted(((int(rng.random() * (len(filler) + 1)), i, needle) for i, needle in enumerate(needles)))
    found: list[str] = []
    start = 0
    for place, _, needle in placed:
        found += [*filler[start:place], needle]
        start = place
    return [*found, *filler[start:]]


class DoesNotFit(ValueError):
    """A task needs more tokens than it was given, even without filler."""


def largest_that_fits(cost: Callable[[int], int], limit: int, what: str) -> int:
    """The largest amount whose cost is at most `limit`, by doubling and bisection.

    Raises:
        DoesNotFit: not even the amount 0 does.
    """
    if (least := cost(0)) > limit:
        raise DoesNotFit(f"{what} takes {least} tokens without any filler and {limit} are allowed; ask for more tokens")
    low, high = 0, 1
    while cost(high) <= limit:
        low, high = high, 2 * high
        if high > 1 << 24:
            raise ValueError(f"{what}: filler without end does not reach {limit} tokens; is the tokenizer right?")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low
