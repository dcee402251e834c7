"""The shipped text and pairs as they are, and the recipe that makes them, run on a small corpus."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from encore import assets
from encore.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "assets.py"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("assets_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict[str, Any]]]:
    return {name: list(assets.read_jsonl(f"pairs/{name}.jsonl")) for name in SPLITS}


@pytest.fixture(scope="module")
def texts() -> dict[str, list[dict[str, Any]]]:
    return {name: list(assets.read_jsonl(f"text/{name}.jsonl.xz")) for name in SPLITS[:2]}


# --- what is shipped


def test_size() -> None:
    parts = [assets.path(name) for name in ("text", "pairs", "tokenizer", "licenses", "ATTRIBUTION.md")]
    files = [file for part in parts for file in ([part] if part.is_file() else part.rglob("*"))]
    assert 10e6 < sum(file.stat().st_size for file in files) < 12.5e6


def test_pairs_are_split_by_sentence(recipe: ModuleType, pairs: dict[str, list[dict[str, Any]]]) -> None:
    assert len(pairs["validation"]) == len(pairs["test"]) == 1000
    assert len(pairs["train"]) > 100_000
    for side in ("src", "tgt"):
        seen = {name: {recipe.sentence_key(row[side]) for row in rows} for name, rows in pairs.items()}
        if side == "tgt":
            for name in ("validation", "test"):
                seen[name] |= {recipe.sentence_key(reference) for row in pairs[name] for reference in row["refs"]}
        assert all(len(keys) > 900 for keys in seen.values())
        assert not seen["train"] & seen["validation"]
        assert not seen["train"] & seen["test"]
        assert not seen["validation"] & seen["test"]


def test_rows_of_pairs(recipe: ModuleType, pairs: dict[str, list[dict[str, Any]]]) -> None:
    train = Counter((row["src"], row["tgt"]) for row in pairs["train"])
    assert max(train.values()) == 1
    for name in ("validation", "test"):
        assert len({recipe.sentence_key(row["src"]) for row in pairs[name]}) == 1000
        assert all(row["refs"][0] == row["tgt"] for row in pairs[name])
        assert any(len(row["refs"]) > 1 for row in pairs[name])


def test_text_says_where_it_is_from(texts: dict[str, list[dict[str, Any]]]) -> None:
    attribution = assets.path("ATTRIBUTION.md").read_text(encoding="utf-8")
    for rows in texts.values():
        characters = Counter[str]()
        for row in rows:
            assert set(row) == {"text", "lang", "source", "license"}
            characters[row["lang"]] += len(row["text"])
        assert 0.75 < characters["de"] / characters["en"] < 1.34  # about as much of each
        for repository, licence in {(row["source"].split("@")[0], row["license"]) for row in rows}:
            line = next(line for line in attribution.splitlines() if f"| {repository} |" in line)
            assert re.search(r"public domain|CC BY|CC0|MIT|Apache|BSD", line), (line, licence)
    for name in re.findall(r"`([^`/]+\.txt)`", attribution):
        assert (assets.path("licenses") / name).stat().st_size > 50


def test_validation_text_is_apart(texts: dict[str, list[dict[str, Any]]]) -> None:
    sources = {name: {row["source"] for row in rows} for name, rows in texts.items()}
    assert sources["train"] and len(sources["validation"]) > 20
    assert not sources["train"] & sources["validation"]
    paragraphs = {
        name: {block for row in rows for block in row["text"].split("\n\n") if len(block) >= 80}
        for name, rows in texts.items()
    }
    assert not paragraphs["train"] & paragraphs["validation"]


def test_names_of_assets() -> None:
    assert assets.path("tokenizer").is_dir()
    assert next(assets.read_jsonl("pairs/test.jsonl")) == next(assets.read_jsonl("pairs/test.jsonl.xz"))
    for name in ("nothing", "../config.py", "/etc"):
        with pytest.raises(FileNotFoundError, match=r"no asset is called .*tokenizer.*pairs/test\.jsonl\.xz"):
            assets.path(name)
    with pytest.raises(FileNotFoundError, match="no asset is called"):
        next(assets.read_jsonl("pairs/nothing.jsonl"))


# --- the recipe


def row(text: str, lang: str = "en") -> dict[str, str]:
    return {"text": text, "lang": lang, "source": "a/b@0:c", "license": "MIT"}


def test_cleaning_of_documentation(recipe: ModuleType) -> None:
    text = (
        "# A Heading\n\nThis is **bold** text with a [link](https://x.org) and an\n_odd_ line break.\n\n"
        "```python\nfor a in the_list:\n\n    print(a)\n```\n\n| a | table |\n|---|---|\n| of | two |\n\n"
        "    indented = listing(of, the, code)\n\nSee https://example.org for more.\n\n- one item\n- another item\n"
    )
    assert list(recipe.clean_blocks(row(text), "en_docs")) == [
        "# A Heading",
        "This is bold text with a link and an odd line break.",
        "- one item\n- another item",
    ]


def test_cleaning_of_books(recipe: ModuleType) -> None:
    text = (
        "[Illustration: a house]\n\n{81}\n\nHe was {82} there.[4] “Yes,” said he.\n\nA rose,\na verse,\n\n"
        "Transcriber's note: the spelling is kept.\n\n12 34 56"
    )
    assert list(recipe.clean_blocks(row(text), "en_gutenberg")) == [
        'He was there. "Yes," said he.',
        "A rose,\na verse,",
    ]


def test_text_in_the_other_language_goes(recipe: ModuleType) -> None:
    text = "»Das ist ein deutscher Satz und er bleibt.«\n\nThis is one of the sentences that nobody translated for us."
    assert list(recipe.clean_blocks(row(text, "de"), "de_docs")) == ["„Das ist ein deutscher Satz und er bleibt.“"]


def test_passages(recipe: ModuleType) -> None:
    blocks = ["a" * 4000, "# Title", "b" * 4000, "c" * 100, "d" * 9000, "e"]
    assert list(recipe.passages(blocks)) == [
        "a" * 4000,
        "# Title\n\n" + "b" * 4000 + "\n\n" + "c" * 100,
        "d" * 9000,
        "e",
    ]


def test_groups_of_pairs_are_closed(recipe: ModuleType) -> None:
    sentences = [
        ("Hi.", "Hallo!"),
        ("hi", "Grüß dich"),
        ("Hello.", "Hallo"),
        ("Bye.", "Tschüss."),
        ("Bye.", "Tschüss."),
    ]
    groups = recipe.group_pairs([{"src": src, "tgt": tgt} for src, tgt in sentences])
    assert sorted(map(len, groups)) == [1, 3]
    greeting = next(group for group in groups if len(group) == 3)
    assert recipe.with_references(greeting) == [
        {"src": "Hello.", "tgt": "Hallo", "refs": ["Hallo"]},
        {"src": "Hi.", "tgt": "Hallo!", "refs": ["Hallo!", "Grüß dich"]},
    ]


def write_corpus(recipe: ModuleType, folder: Path, pairs: list[dict[str, Any]], passages: list[dict[str, Any]]) -> None:
    """A corpus like the one the assets were made from: a little of every source, from what is shipped."""
    wanted = {file: names.split() for file, names in recipe.DOCUMENTS.items()}
    wanted |= {f"{lang}_gutenberg": [f"GITenberg/{n}" for n in names.split()] for lang, names in recipe.BOOKS.items()}
    by_source: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for passage in passages:
        by_source.setdefault((passage["lang"], passage["source"].split("@")[0]), []).append(passage)
    sources = ["file\trepository\tcommit\titems\tbytes\tlicence"]
    for file, repositories in wanted.items():
        lines = []
        for repository in repositories:
            few = sorted(by_source[file[:2], repository], key=lambda r: r["source"])[:3]
            lines += [json.dumps({**r, "source": f"{r['source']}:{i}"}) for i, r in enumerate(few)]
            sources.append(f"{file}.jsonl.xz\t{repository}\t{'0' * 40}\t3\t1\t{few[0]['license']}")
        (folder / f"{file}.jsonl.xz").write_bytes(lzma.compress("\n".join(lines).encode(), preset=0))
    lines = [json.dumps({"src": p["src"], "tgt": p["tgt"], "source": "a/pairs@0:x"}) for p in pairs]
    (folder / "para_tatoeba_en-de.jsonl.xz").write_bytes(lzma.compress("\n".join(lines).encode(), preset=0))
    sources.append(f"para_tatoeba_en-de.jsonl.xz\ta/pairs\t{'1' * 40}\t1\t1\tCC BY 2.0 FR")
    (folder / "SOURCES.tsv").write_text("\n".join(sources) + "\n", encoding="utf-8")
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES" / "a+pairs__LICENSE.txt").write_text("do as you like", encoding="utf-8")


def test_the_recipe_gives_the_same_bytes_every_time(
    recipe: ModuleType,
    pairs: dict[str, list[dict[str, Any]]],
    texts: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(recipe, corpus, pairs["train"][:3000], [*texts["train"], *texts["validation"]])
    made = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [sys.executable, str(RECIPE), "--corpus", str(corpus), "--out", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed})
        made.append({p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()})
    assert made[0] == made[1]
    assert set(made[0]) == {
        *(f"text/{name}.jsonl.xz" for name in SPLITS[:2]),
        *(f"pairs/{name}.jsonl.xz" for name in SPLITS),
        *(f"tokenizer/{name}.json" for name in ("tokenizer", "tokenizer_config", "encore")),
        "ATTRIBUTION.md",
        "licenses/a+pairs__LICENSE.txt",
    }
    assert load_tokenizer(tmp_path / "1" / "tokenizer").vocab_size == 6144
    held_out = lzma.decompress(made[0]["text/validation.jsonl.xz"]).decode()
    for book in recipe.VALIDATION_BOOKS:
        assert book in held_out and book not in lzma.decompress(made[0]["text/train.jsonl.xz"]).decode()

    (corpus / "SOURCES.tsv").write_text("file\trepository\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"SOURCES\.tsv has no row for .*a/pairs"):
        recipe.write_attribution(corpus, tmp_path / "3", {("para_tatoeba_en-de.jsonl.xz", "a/pairs")})
