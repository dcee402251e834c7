"""Build what the package ships besides the models: text, sentence pairs, the tokenizer, and their attribution.

    python recipes/assets.py --corpus CORPUS --out src/encore/assets

CORPUS is a folder of `{text,lang,source,license}` and `{src,tgt,...}` JSONL files (xz), with SOURCES.tsv and LICENSES/:
the English and German books, stories, textbooks and documentation named in BOOKS and DOCUMENTS below, and the
English-German sentences of Tatoeba. The result depends on the corpus alone (same bytes every time):

    text/{train,validation}.jsonl.xz         passages of at most 6,000 characters, in a fixed shuffled order
    pairs/{train,validation,test}.jsonl.xz   {"src", "tgt"}; the two small splits also list every "refs"
    tokenizer/                               trained on the two train files (`encore.tokenizer_training`), one minute
    ATTRIBUTION.md, licenses/                who wrote it and under which terms

Validation text is whole documents (two whole books among them). Pairs are grouped before they are split: two pairs that
share an English or a German side, up to case and punctuation, always land in the same split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from encore.tokenizer_training import train_tokenizer

# Book names as in SOURCES.tsv, without author. Everyday narrative first, then two of exposition in each language.
BOOKS = {
    "de": """BuddenbrooksVerfall-einer-Familie_34811 Der-Golem_51476 Der-Nachsommer_8126 Der-Prozess-Roman_69327
        Der-Wendekreis---Zweite-Folge---Oberlins-drei-Stufen-Sturreganz_18552 Die-Biene-Maja-und-ihre-Abenteuer_21021
        Die-Leute-von-Seldwyla---Band-2_28042 Effi-Briest_5323
        Ein-Kampf-um-Rom--Historischer-Roman.-Erster-Band_31294
        Ein-Kampf-um-Rom--Historischer-Roman.-Zweiter-Band_33090 K-nigliche-HoheitRoman_35328 Max-Havelaar_31527
        Wilhelm-Hauffs-samtliche-Werke-in-sechs-Banden-Bd-6_61957 Die-Traumdeutung_40739
        Die-Naturwissenschaften-in-ihrer-Entwicklung-und-in-ihrem-Zusammenhange-I-Band-Von-den-Anfang__53428""",
    "en": """Aesop-s-Fables--a-new-translation_11339 Andersen-s-Fairy-Tales_1597 Anne-of-Green-Gables_45
        Black-Beauty_271 English-Fairy-Tales_7439 Grimms-Fairy-Tales_2591 Little-Women_514 Peter-Pan_16
        The-Jungle-Book_236 The-Railway-Children_1874 The-Secret-Garden_113 The-War-of-the-Worlds_36
        The-Wind-in-the-Willows_289 The-Wonderful-Wizard-of-Oz_55 Treasure-Island_120 White-Fang_910 Frankenstein_84
        Kim_2226 The-Age-of-Innocence_541 Dubliners_2814 Crime-and-Punishment_2554
        Up-from-Slavery--An-Autobiography_2376 The-Outline-of-Science-Vol.-1--of-4-A-Plain-Story-Simply-Told_20417
        A-Short-History-of-the-World_35461""",
}
DOCUMENTS = {
    "de_docs": "github/opensource.guide cncf/glossary microsoft/IoT-For-Beginners "
    "MicrosoftDocs/Dynamics-365-Operations.de-de",
    "en_docs": "github/opensource.guide cncf/glossary microsoft/IoT-For-Beginners GSA/plainlanguage.gov rust-lang/book",
    "en_stories": "global-asp/asp-source global-asp/pb-source",
    "en_textbooks": "philschatz/psychology-book",
}
VALIDATION_BOOKS = ("GITenberg/Peter-Pan_16", "GITenberg/Die-Biene-Maja-und-ihre-Abenteuer_21021")
VALIDATION_SHARE = 50  # of the other documents, one in 50
PASSAGE_CHARACTERS = 6_000
HELD_OUT_SENTENCES = 1_000
PAIRS_FILE = "para_tatoeba_en-de"
# What gets a piece of its own: with line break and space, the 200 commonest characters of the train files.
CHARACTERS = (
    "".join(map(chr, range(0x21, 0x7F)))
    + "ÄÖÜßäöü§°²´·¼½¾×ÆÉàáâæçèéêëíîïñóôûćŋŌōū\u00ad\u2011–—‘’‚“”„†…€→−√"
    + "ΕΙΤΨΩάέίαβγδεηθικλμνοπρςστυφωόύϛἰὶῦῶЗ♥⚠✅\ufe0f🎓🎥💁😀😇😢🚀🧠"
)

NOTICE = re.compile(
    r"Transkription|Transcriber|Gutenberg|Druckfehler|E-?text|\[ ?Illustration|Anmerkung(en)? zur", re.I
)
STOPWORDS = {
    "de": "der die das und ist nicht sie ein eine zu den mit für von auf sich dem es im werden",
    "en": "the of and to is in that it you for with are this be on as or can your from",
}
EDITS = (  # markup to words; the order matters
    (re.compile(r"```.*?(```|\Z)|~~~.*?(~~~|\Z)", re.S), "\n\n"),
    (re.compile(r"<!--.*?-->|<[^<>\n]{1,200}>", re.S), ""),
    (re.compile(r"\(?\[\\?\[link\\?\]\]\([^)]*\)\)?"), ""),
    (re.compile(r"!\[[^\]]*\]\([^)]*\)(\{[^}]*\})?"), ""),
    (re.compile(r"\[([^\]\[]*)\](\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r" ?\{\d+\}| ?\[\d+\]|\u00ad|\ufeff|[\u200b-\u200f]"), ""),
    (re.compile(r"\*\*|__"), ""),
    (re.compile(r"(?<!\w)[_=](\S[^_=\n]*\S|\S)[_=](?!\w)"), r"\1"),
    (re.compile(r"[\u00a0\u2009\u202f\t]"), " "),
    (re.compile(r" {2,}"), " "),
    (re.compile(r" +([,.;:])"), r"\1"),
)
QUOTES = {"en": str.maketrans("“”‘’", "\"\"''"), "de": str.maketrans("»«›‹’", "„“‚‘'")}  # as in the sentence pairs


def digest(text: str) -> int:
    """A number that depends on `text` alone, for splits and shuffles that never change."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


# --- text ---------------------------------------------------------------------------------------------------------


def unwrap(block: str, *, verse: bool) -> str:
    """Join hard-wrapped lines; keep list items and headings, and (`verse`) all line breaks of a book."""
    lines = [line.strip() for line in block.split("\n") if line.strip()]
    if verse:
        return "\n".join(lines)
    joined: list[str] = []
    for line in lines:
        if joined and not re.match(r"([-*+#]|\d+[.)])\s", line) and not joined[-1].startswith("#"):
            joined[-1] += " " + line
        else:
            joined.append(line)
    return "\n".join(joined)


def is_prose(block: str, lang: str, *, technical: bool) -> bool:
    """False for tables, code, listings, editorial notices and text in the other language."""
    if NOTICE.search(block) or re.search(r"https?://|\|.*\||-{4,}", block):
        return False
    if technical and re.search(r"[{}<>\\|=^~]|::|\(\)|\w\.\w+\(|^[$>] |\w_\w", block):
        return False
    visible = [c for c in block if not c.isspace()]
    letters, digits = sum(c.isalpha() for c in visible), sum(c.isdigit() for c in visible)
    if letters < 0.75 * len(visible) or digits > 0.1 * len(visible):
        return False
    words = re.findall(r"[^\W\d_]+", block.casefold())
    other = "en" if lang == "de" else "de"
    mine, theirs = (sum(word in STOPWORDS[name].split() for word in words) for name in (lang, other))
    return theirs <= mine if len(words) > 5 else bool(words)


def clean_blocks(row: dict[str, str], file: str) -> Iterator[str]:
    text = unicodedata.normalize("NFC", row["text"]).replace("\r\n", "\n")
    for pattern, replacement in EDITS:
        text = pattern.sub(replacement, text)
    text = text.translate(QUOTES[row["lang"]])
    for block in re.split(r"\n\s*\n", text):
        block = unwrap(block, verse=file.endswith("gutenberg"))
        if block and is_prose(block, row["lang"], technical=file.endswith("docs")):
            yield block


def passages(blocks: Iterable[str]) -> Iterator[str]:
    """Pack paragraphs into passages; a heading never ends one."""
    kept: list[str] = []
    for block in blocks:
        if kept and sum(map(len, kept)) + len(block) > PASSAGE_CHARACTERS:
            heading = kept.pop() if kept[-1].startswith("#") else None
            yield "\n\n".join(kept)
            kept = [heading] if heading else []
        kept.append(block)
    yield "\n\n".join(kept)


def build_text(corpus: Path, out: Path) -> set[tuple[str, str]]:
    """Write the two text files; return the (file, repository) pairs that were used."""
    wanted = {file: set(names.split()) for file, names in DOCUMENTS.items()}
    wanted |= {f"{lang}_gutenberg": {f"GITenberg/{name}" for name in names.split()} for lang, names in BOOKS.items()}
    seen: set[int] = set()
    used: set[tuple[str, str]] = set()
    splits: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    for file in sorted(wanted):
        missing = set(wanted[file])
        for row in read_rows(corpus / f"{file}.jsonl.xz"):
            repository = row["source"].split("@")[0]
            if repository not in wanted[file]:
                continue
            missing.discard(repository)
            held_out = (
                repository in VALIDATION_BOOKS
                if file.endswith("gutenberg")
                else digest(row["source"]) % VALIDATION_SHARE == 0
            )
            blocks = []
            for block in clean_blocks(row, file):
                key = digest(block)
                if len(block) < 80 or key not in seen:
                    blocks.append(block)
                seen.add(key)
            for passage in passages(blocks):
                if len(passage) >= 200 and any(len(line) > 80 for line in passage.split("\n")):
                    splits["validation" if held_out else "train"].append({**row, "text": passage})
                    used.add((f"{file}.jsonl.xz", repository))
        if missing:
            raise ValueError(f"{corpus / file}.jsonl.xz has nothing from {sorted(missing)}; is this the right corpus?")
    for name, rows in splits.items():
        rows.sort(key=lambda row: digest(str(row["text"])))
        write_rows(out / "text" / f"{name}.jsonl.xz", rows)
    return used


# --- pairs --------------------------------------------------------------------------------------------------------


def sentence_key(text: str) -> str:
    """A sentence up to case, punctuation and width."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def group_pairs(rows: Iterable[dict[str, str]]) -> list[list[tuple[str, str]]]:
    """Groups of pairs such that no sentence (by `sentence_key`) occurs in two groups, in an order fixed by hash."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    pairs = sorted({(row["src"].strip(), row["tgt"].strip()) for row in rows})
    pairs = [(src, tgt) for src, tgt in pairs if sentence_key(src) and sentence_key(tgt)]
    for src, tgt in pairs:
        first, second = sorted((root("en " + sentence_key(src)), root("de " + sentence_key(tgt))))
        parent[second] = first
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for src, tgt in pairs:
        groups[root("en " + sentence_key(src))].append((src, tgt))
    return sorted(groups.values(), key=lambda group: digest(min(sentence_key(src) for src, _ in group)))


def with_references(group: list[tuple[str, str]]) -> list[dict[str, object]]:
    """One row for each distinct English sentence, with all its translations."""
    references: dict[str, list[str]] = defaultdict(list)
    written: dict[str, str] = {}
    for src, tgt in group:
        written.setdefault(sentence_key(src), src)
        references[sentence_key(src)].append(tgt)
    return [{"src": src, "tgt": references[key][0], "refs": references[key]} for key, src in written.items()]


def build_pairs(corpus: Path, out: Path) -> set[tuple[str, str]]:
    rows = list(read_rows(corpus / f"{PAIRS_FILE}.jsonl.xz"))
    splits: dict[str, list[dict[str, object]]] = {"test": [], "validation": [], "train": []}
    for group in group_pairs(rows):
        held_out = with_references(group)
        for name in ("test", "validation"):
            if len(splits[name]) + len(held_out) <= HELD_OUT_SENTENCES:
                splits[name].extend(held_out)
                break
        else:
            splits["train"].extend({"src": src, "tgt": tgt} for src, tgt in group)
    for name, part in splits.items():
        part.sort(key=lambda row: digest(f"{row['src']}\n{row['tgt']}"))
        write_rows(out / "pairs" / f"{name}.jsonl.xz", part)
    return {(f"{PAIRS_FILE}.jsonl.xz", repository) for repository in {row["source"].split("@")[0] for row in rows}}


# --- attribution ----------------------------------------------------------------------------------------------------

ATTRIBUTION = """# Attribution of the shipped text and sentence pairs

The files in `text/` and `pairs/` were made from the sources below (file, repository, commit, licence) by
`recipes/assets.py`: markup, tables, code and editorial notices were removed, paragraphs were packed into passages,
quotation marks were made alike, sentences were deduplicated and split. Each passage carries its own source and licence.
The tokenizer was trained on the train files.

- CC BY 4.0: https://creativecommons.org/licenses/by/4.0/legalcode
- CC BY 3.0: https://creativecommons.org/licenses/by/3.0/legalcode
- CC BY 2.0 FR: https://creativecommons.org/licenses/by/2.0/fr/legalcode
- The stories are of the African Storybook and of Pratham Books' StoryWeaver; their authors and illustrators are named
  with each story at the address in its `source`. The textbooks are of OpenStax College (download for free at
  https://openstax.org).
- The sentence pairs are of Tatoeba (https://tatoeba.org), selected by https://www.manythings.org/anki/; the whole of
  `pairs/` is under CC BY 2.0 FR.
- The books were made available by Project Gutenberg and are in the public domain in the USA; header and footer were
  removed. If you are elsewhere, check your country's terms.

Licence texts of the repositories stand in `licenses/`.

| file | repository | commit | licence | licence text |
|---|---|---|---|---|
"""


def write_attribution(corpus: Path, out: Path, used: set[tuple[str, str]]) -> None:
    folder = out / "licenses"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    table, names = [], {}
    for line in (corpus / "SOURCES.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        file, repository, commit, _, _, licence = line.split("\t")
        if (file, repository) not in used:
            continue
        used = used - {(file, repository)}
        texts = []
        for path in sorted((corpus / "LICENSES").glob(repository.replace("/", "+") + "__*")):
            text = path.read_text(encoding="utf-8")
            name = names.setdefault(text, path.name)  # the same text only once
            (folder / name).write_text(text, encoding="utf-8")
            texts.append(f"`{name}`")
        table.append(f"| {file} | {repository} | {commit[:12]} | {licence} | {', '.join(texts)} |")
    if used:
        raise ValueError(f"SOURCES.tsv has no row for {sorted(used)}; every source needs its commit and licence")
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION + "\n".join(table) + "\n", encoding="utf-8")


def training_lines(out: Path) -> Iterator[str]:
    """What the tokenizer learns from: the train text, and both sides of the train pairs."""
    for row in read_rows(out / "text" / "train.jsonl.xz"):
        yield row["text"]
    for row in read_rows(out / "pairs" / "train.jsonl.xz"):
        yield row["src"] + "\n" + row["tgt"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build src/encore/assets (without the models) from a corpus folder.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with *.jsonl.xz, SOURCES.tsv and LICENSES/")
    parser.add_argument("--out", type=Path, required=True, help="the assets folder to write")
    arguments = parser.parse_args()
    used = build_text(arguments.corpus, arguments.out)
    used |= build_pairs(arguments.corpus, arguments.out)
    write_attribution(arguments.corpus, arguments.out, used)
    train_tokenizer(training_lines(arguments.out), arguments.out / "tokenizer", characters=CHARACTERS)


if __name__ == "__main__":
    main()
