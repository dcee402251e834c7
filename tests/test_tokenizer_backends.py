"""Tokenizer folders: what is read from them, what is refused, Gemma's own kinds of file, SentencePiece."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from encore import assets
from encore.tokenizer import SourceFormat, Tokenizer, load_tokenizer

AWKWARD = [
    "",
    " ",
    "   three spaces,\ttab,\r\nline ends\n\n\n  and more  ",
    "Geht's dir gut? „Ja“, sagte sie – 1234,56 €.",
    "\u2581 a literal \u2581\u2581mark",
    "\u0010 \u0010_ \u0010- \u0010\u0010_\u0010-_ \u2581\u0010",
    "日本語のテキスト、👩‍👩‍👧‍👦 👍🏽 ह्रिद्यं",
    "<0x41> <0xE2><0x96> <unused5> <unused100>",
    "<start_of_turn>user\nHi<end_of_turn>\n",
    "e\u0301 \u00e9 \ufb01 \u00a0 \u200b \ufffd \x00",
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer(assets.path("tokenizer"))


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(assets.path("tokenizer")))


def copy_of_ours(folder: Path) -> Path:
    for file in assets.path("tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> list[str]:
    streamer = tokenizer.streamer(skip_special=skip_special)
    return [streamer.push(i) for i in ids] + [streamer.finish()]


def test_source_format_without_encore_json(tmp_path: Path) -> None:
    folder = copy_of_ours(tmp_path)
    (folder / "encore.json").unlink()
    assert load_tokenizer(folder).source_format == SourceFormat(bos=True, eos=True)
    edit(folder / "tokenizer_config.json", add_bos_token=None, add_eos_token=None)
    assert load_tokenizer(folder).source_format == SourceFormat(bos=True, eos=False)
    edit(folder / "tokenizer_config.json", add_bos_token=False)
    bare = load_tokenizer(folder)
    assert bare.source_format == SourceFormat(bos=False, eos=False)
    assert bare.encode_source("Hallo") == bare.encode("Hallo")


def test_sentinels_by_name_without_encore_json(tmp_path: Path) -> None:
    folder = copy_of_ours(tmp_path)
    (folder / "encore.json").unlink()
    assert load_tokenizer(folder).sentinel_ids == tuple(range(6016, 6144))  # <unused100> onward, as Gemma 3
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace("<unused1", "<other1"), encoding="utf-8")
    assert load_tokenizer(folder).sentinel_ids == (6,)  # <unused0>, <other1>: the run of names ends


def test_gemma_2_has_99_sentinels(tmp_path: Path) -> None:
    folder = copy_of_ours(tmp_path)
    (folder / "encore.json").unlink()
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for i in range(100, 228):
        text = text.replace(f"<unused{i}>", f"<other{i}>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    assert load_tokenizer(folder).sentinel_ids == tuple(range(6, 105))


def test_save_and_load(ours: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "encore.json").write_text('{"note": "kept"}', encoding="utf-8")
    ours.save(tmp_path)
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    again.save(tmp_path)  # into its own folder
    stored = json.loads((tmp_path / "encore.json").read_text(encoding="utf-8"))
    assert stored == {"note": "kept", "source_format": {"bos": True, "eos": True}, "sentinels": [6016, 128]}
    assert (tmp_path / "tokenizer.json").read_bytes() == (assets.path("tokenizer") / "tokenizer.json").read_bytes()
    assert again.encode_source("Guten Tag") == ours.encode_source("Guten Tag")


def test_a_changed_source_format_is_saved(ours: Tokenizer, tmp_path: Path) -> None:
    changed = ours.with_source_format(SourceFormat(bos=False, eos=True))
    changed.save(tmp_path)
    assert load_tokenizer(tmp_path).encode_source("a") == [*ours.encode("a"), 1]
    assert ours.source_format == SourceFormat(bos=True, eos=True)


def test_transformers_loads_it_beside_a_model_config(reference: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma3TextConfig, T5Gemma2Config

    for config in (Gemma3TextConfig(vocab_size=6144), T5Gemma2Config()):
        config.save_pretrained(copy_of_ours(tmp_path))
        loaded = AutoTokenizer.from_pretrained(str(tmp_path))
        for text in AWKWARD:
            assert loaded.encode(text) == reference.encode(text)


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": 6200},
        {"text_config": {"vocab_size": 6200}},
        {"encoder": {"text_config": {"vocab_size": 6200}}, "decoder": {}},
        {"encoder": {"vocab_size": 6200}, "decoder": {"vocab_size": 6200}},
    ],
)
def test_vocab_size_is_the_models(tmp_path: Path, config: dict[str, object]) -> None:
    folder = copy_of_ours(tmp_path)
    edit(folder / "config.json", **config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 6200
    assert tokenizer.decode([6199]) == ""  # a padded row
    with pytest.raises(ValueError, match=r"token id 6200 is outside the model's vocabulary \(0\.\.6199\)"):
        tokenizer.decode([6200])


def test_an_id_beyond_the_model_is_refused(ours: Tokenizer, tmp_path: Path) -> None:
    for token in (6144, -1, -100):
        with pytest.raises(ValueError, match=f"token id {token} is outside"):
            ours.decode([token])
        with pytest.raises(ValueError, match=f"token id {token} is outside"):
            ours.streamer().push(token)
    folder = copy_of_ours(tmp_path)
    edit(folder / "config.json", vocab_size=6143)
    edit(folder / "encore.json", sentinels=[6016, 127])
    smaller = load_tokenizer(folder)
    assert smaller.encode("<unused226>") == [6142]
    with pytest.raises(ValueError, match="token id 6143 is outside"):
        smaller.encode("<unused227>")


def test_text_that_is_no_text_is_refused(ours: Tokenizer) -> None:
    with pytest.raises(ValueError, match="encode takes text, not bytes"):
        ours.encode(b"abc")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="not Unicode"):
        ours.encode("a\ud83d")


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder is called"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    asked: list[str] = []

    def resolve(name: str) -> Path:
        asked.append(name)
        return assets.path("tokenizer")

    assert load_tokenizer("some/name", resolve=resolve).vocab_size == 6144
    assert asked == ["some/name"]


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("tokenizer.json", '{"version": "1.0", "mod', r"not a readable tokenizer\.json"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("encore.json", "[1]", "holds a list where an object is expected"),
        ("encore.json", '{"source_format": {"bos": "yes", "eos": true}}', "source format"),
        ("encore.json", '{"sentinels": [6016]}', r"give \[first id, count\]"),
        ("encore.json", '{"sentinels": [6016, 129]}', "beyond the 6144 ids"),
        ("tokenizer_config.json", '{"pad_token": "<nothing>"}', "no pad token '<nothing>'"),
    ],
)
def test_damaged_files(tmp_path: Path, file: str, content: str, complaint: str) -> None:
    folder = copy_of_ours(tmp_path)
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        load_tokenizer(folder)


def test_another_family_of_tokenizers_is_refused(tmp_path: Path) -> None:
    folder = copy_of_ours(tmp_path)
    edit(
        folder / "tokenizer.json",
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )
    with pytest.raises(ValueError, match="give a tokenizer of the Gemma family"):
        load_tokenizer(folder)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path, ours: Tokenizer) -> None:
    folder = copy_of_ours(tmp_path)
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    edit(folder / "tokenizer.json", truncation=cut, padding={**fill, "pad_type_id": 0, "pad_token": "<pad>"})
    texts = ["a", "Das ist ein langer Satz, der nicht abgeschnitten wird."]
    assert load_tokenizer(folder).encode_batch(texts) == ours.encode_batch(texts)


def test_a_tokenizer_that_transformers_made_for_gemma(tmp_path: Path) -> None:
    from transformers import GemmaTokenizer

    model = json.loads((assets.path("tokenizer") / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    theirs = GemmaTokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=["<end_of_turn>"])
    theirs.save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.source_format == SourceFormat(bos=True, eos=False)
    assert (tokenizer.stop_ids, tokenizer.sentinel_ids[0]) == ((1, 106), 6016)
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids)
        assert "".join(streamed(tokenizer, ids)) == theirs.decode(ids, skip_special_tokens=True)


# --- SentencePiece

SENTENCES = ["the house is small and the garden is big", "das Haus ist klein und der Garten ist groß", "a  b   c"] * 40


def train_sentencepiece(folder: Path, **options: Any) -> Any:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        control_symbols="<start_of_turn>,<end_of_turn>",
        user_defined_symbols="<unused0>,<unused1>,<unused2>",
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_sentencepiece(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, add_dummy_prefix=False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 340
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    turns = tuple(model.piece_to_id(name) for name in ("<start_of_turn>", "<end_of_turn>"))
    assert tokenizer.stop_ids == (1, turns[1])
    assert tokenizer.sentinel_ids == tuple(model.piece_to_id(f"<unused{i}>") for i in range(3))
    assert tokenizer.source_format == SourceFormat(bos=True, eos=False)
    for text in ["das Haus", "  two  spaces 日本 é", "", "the garden\n"]:
        assert tokenizer.encode(text) == model.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text == "".join(streamed(tokenizer, model.encode(text)))
    assert tokenizer.encode("<start_of_turn>das<bos>", bos=True) == [2, turns[0], *model.encode("das"), 2]
    assert tokenizer.decode([2, *turns, *model.encode("das"), 1]) == "das"
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode_source("das Haus") == tokenizer.encode_source("das Haus")


def test_sentencepiece_with_a_space_put_in_front(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, add_dummy_prefix=True)
    tokenizer = load_tokenizer(tmp_path)
    for text in ["das Haus", " das Haus"]:
        ids = tokenizer.encode(text)
        assert ids == model.encode(text)
        assert tokenizer.decode(ids) == model.decode(ids) == "".join(streamed(tokenizer, ids)) == text


def test_a_damaged_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a readable SentencePiece model"):
        load_tokenizer(tmp_path)
