"""Train a small tokenizer of Gemma's kind: byte-pair pieces with byte fallback, spaces as U+2581, nothing lost.

The id layout is Gemma 3's where it matters:

    0 <pad>  1 <eos>  2 <bos>  3 <unk>  4 <mask>  5 [multimodal]  6..104 <unused0..98>
    105 <start_of_turn>  106 <end_of_turn>  107..362 <0x00>..<0xFF>  363.. pieces  ..end <unused100..227> (sentinels)

`decode(encode(text)) == text` for any text, in `transformers` as well as here. Gemma itself loses a literal U+2581 (it
comes back as a space); here two escapes in the normalizer, undone by the decoder, keep it: ESCAPE + "_" stands for a
literal U+2581 and ESCAPE + "-" for a literal ESCAPE (U+0010, "data link escape", which ordinary text does not contain).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from encore.tokenizer_backends import SPACE

ESCAPE = "\u0010"
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
UNUSED = tuple(f"<unused{i}>" for i in range(99))
TURNS = ("<start_of_turn>", "<end_of_turn>")
FRONT = (*CONTROL, "[multimodal]", *UNUSED, *TURNS)
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
FIRST_SENTINEL = 100  # the name, as in Gemma 3: <unused100>

# A word with the space before it (and an apostrophe inside: don't), a digit, a run of punctuation, white space.
WORDS = (
    rf"{SPACE}?[\p{{L}}\p{{M}}]+(?:['’]\p{{L}}+)?"
    r"|\p{N}"
    rf"|{SPACE}?[^\p{{L}}\p{{M}}\p{{N}}\s{SPACE}]+"
    rf"|{SPACE}+(?={SPACE}[^\s{SPACE}])|{SPACE}+"
    r"|\n+|\s+"
)


def _pipeline(model: models.BPE) -> Tokenizer:
    """A backend with Gemma's normalizer and decoder around `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            normalizers.Replace(ESCAPE, ESCAPE + "-"),
            normalizers.Replace(SPACE, ESCAPE + "_"),
            normalizers.Replace(" ", SPACE),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")  # pyright: ignore
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(ESCAPE + "_", SPACE),
            decoders.Replace(ESCAPE + "-", ESCAPE),
        ]
    )
    return tokenizer


def _commonest(texts: Iterable[str], count: int) -> list[str]:
    """The commonest characters; of equally common ones those that come first in Unicode (the library picks any)."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    return [c for c in ranked if c not in (" ", SPACE, ESCAPE, "\n")][:count]


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocab_size: int = 6144,
    num_sentinels: int = 128,
    characters: str | None = None,
    max_characters: int = 200,
    max_piece_length: int = 16,
) -> None:
    """Learn the pieces from `texts` and write tokenizer.json, tokenizer_config.json and encore.json into `folder`.

    `characters` get a piece of their own (where not given, the `max_characters` commonest), besides the line break and
    the space; all others are spelt in bytes. The source format is BOS, text, EOS. The same texts give the same files.
    Raises ValueError when the texts are too few to fill `vocab_size`.
    """
    texts = list(texts)
    alphabet = sorted({"\n", SPACE, *(_commonest(texts, max_characters - 2) if characters is None else characters)})
    num_pieces = vocab_size - len(FRONT) - len(BYTES) - num_sentinels
    if num_pieces < len(alphabet):
        least = len(FRONT) + len(BYTES) + num_sentinels + len(alphabet)
        raise ValueError(f"vocab_size {vocab_size} is too small; give at least {least}, or fewer sentinels")
    learner = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces,
        min_frequency=2,
        show_progress=False,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        max_token_length=max_piece_length,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    if len(pieces) != num_pieces:
        raise ValueError(
            f"the texts gave only {len(pieces)} pieces of {num_pieces}; give more text or a smaller vocab_size"
        )

    sentinels = [f"<unused{FIRST_SENTINEL + i}>" for i in range(num_sentinels)]
    vocabulary = {piece: i for i, piece in enumerate([*FRONT, *BYTES, *pieces, *sentinels])}
    if len(vocabulary) != vocab_size:
        raise ValueError("a learned piece has the name of a special token; take that name out of the texts")
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = _pipeline(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = {*CONTROL, *TURNS}
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=name in special) for name in (*FRONT, *sentinels)])
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> <bos>:1 $B:1 <eos>:1",
        special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])],
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name.strip('<>')}_token": name for name in CONTROL},
        "add_bos_token": True,
        "add_eos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    ours = {"source_format": {"bos": True, "eos": True}, "sentinels": [vocab_size - num_sentinels, num_sentinels]}
    for name, content in (("tokenizer_config.json", config), ("encore.json", ours)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
