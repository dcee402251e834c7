"""What the teacher reads: the very text that an example was made of, with every real target token in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encore.data.batch import Batch, decoder_batch, encoder_decoder_batch
from encore.data.examples import source_tokens
from encore.data.teacher_text import TeacherText, teacher_rows
from encore.objectives import ul2
from encore.tokenizer import SourceFormat, Tokenizer

PAD, EOS, BOS = 0, 1, 2


@pytest.fixture
def layout(tokenizer: Tokenizer) -> TeacherText:
    return TeacherText(tokenizer, pairs=False)


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def test_the_drawings(tokenizer: Tokenizer, layout: TeacherText) -> None:
    """The three examples of the module's docstring, with a = 400, b = 401, …"""
    x, y = tokenizer.sentinel_ids[:2]
    a, b, c, d, e, f, g, h = range(400, 408)
    no_frame = TeacherText(tokenizer, pairs=False, source_format=SourceFormat(bos=False, eos=False))
    text, places = no_frame.text(ids(a, b, c), ids(d, e, f, g, h, EOS))
    assert text.tolist() == [a, b, c, d, e, f, g, h] and places.tolist() == [3, 4, 5, 6, 7, -1]
    text, places = no_frame.text(ids(a, b, x, e, f, g, y), ids(x, c, d, y, h, EOS))
    assert text.tolist() == [a, b, c, d, e, f, g, h] and places.tolist() == [-1, 2, 3, -1, 7, -1]
    pairs = TeacherText(tokenizer, pairs=True, source_format=SourceFormat(bos=True, eos=True))
    text, places = pairs.text(ids(BOS, a, b, c, EOS), ids(d, e, EOS))
    assert text.tolist() == [a, b, c, EOS, d, e, EOS] and places.tolist() == [4, 5, 6]
    modes = TeacherText(tokenizer, pairs=False, source_format=SourceFormat(bos=True, eos=True), mode_ids=[h])
    assert modes.text(ids(BOS, h, a, h, EOS), ids(b, EOS))[0].tolist() == [a, h, b], "a mode token only in front"
    text, places = layout.text(None, ids(a, EOS, b))
    assert text.tolist() == [a, EOS, b] and places.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "source_format", [SourceFormat(True, True), SourceFormat(True, False), SourceFormat(False, False)]
)
@pytest.mark.parametrize("mixture", ["t5gemma2", "ul2", "prefixlm"])
def test_every_objective_gives_its_text_back(tokenizer: Tokenizer, mixture: str, source_format: SourceFormat) -> None:
    """Windows of random ids, BOS and EOS among them, as a stream of documents has them."""
    framed = tokenizer.with_source_format(source_format)
    layout = TeacherText(framed, pairs=False)
    random = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), [PAD, *tokenizer.sentinel_ids])
    for task in ul2.mixture_rows(mixture) * 6:
        window = random.choice(ordinary, random.integers(2, 90))
        window[random.integers(len(window))] = EOS
        example = ul2.apply(task, window, tokenizer.sentinel_ids, EOS, random)
        text, places = layout.text(source_tokens(example.inputs, framed), example.targets)
        assert text.tolist() == window.tolist()
        real = ~np.isin(example.targets, tokenizer.sentinel_ids)
        real[-1] = False
        assert (places >= 0).tolist() == real.tolist()
        assert window[places[real]].tolist() == example.targets[real].tolist()
        assert (np.diff(places[real]) > 0).all(), "a repeated token was found in another place"


def test_rows_of_one_example_and_of_several(tokenizer: Tokenizer, layout: TeacherText) -> None:
    """Alone or packed: the token before each place is what stands before it in its own text."""
    sources = [ids(BOS, 400, 401, EOS), ids(BOS, 402, EOS), ids(BOS, 403, 404, 405, EOS)]
    targets = [ids(410, 411, EOS), ids(412, 413, 414, EOS), ids(415, EOS)]
    texts = [[400, 401, 410, 411], [402, 412, 413, 414], [403, 404, 405, 415]]
    apart = encoder_decoder_batch(sources, targets, bos_id=BOS, pad_id=PAD)
    rows = teacher_rows(apart, layout)
    assert rows is not None and rows.segment_ids is None
    assert rows.tokens.tolist() == [[BOS, *text[:-1]] for text in texts]
    assert rows.taught.tolist() == [[2, 3, -1, -1], [5, 6, 7, -1], [11, -1, -1, -1]]
    packed = pack([[0, 1], [2]], sources, targets)
    rows = teacher_rows(packed, layout)
    assert rows is not None and rows.segment_ids is not None
    assert rows.tokens.tolist() == [[BOS, *texts[0][:-1], BOS, *texts[1][:-1]], [BOS, *texts[2][:-1], *[PAD] * 4]]
    assert rows.segment_ids.tolist() == [[1] * 4 + [2] * 4, [1] * 4 + [0] * 4]
    assert rows.taught.tolist() == [[2, 3, -1, 5, 6, 7, -1], [8 + 3, -1, -1, -1, -1, -1, -1]]


def pack(groups: list[list[int]], sources: list[np.ndarray], targets: list[np.ndarray]) -> Batch:
    """Rows of several examples, laid out by hand."""
    rows = [
        encoder_decoder_batch([sources[i] for i in g], [targets[i] for i in g], bos_id=BOS, pad_id=PAD) for g in groups
    ]

    def laid(name: str, mask: str, width: int, numbers: bool = False) -> torch.Tensor:
        out = torch.zeros(len(rows), width, dtype=getattr(rows[0], name).dtype)
        for r, row in enumerate(rows):
            real = getattr(row, mask)
            values = torch.arange(1, len(real) + 1)[:, None].expand_as(real) if numbers else getattr(row, name)
            out[r, : int(real.sum())] = values[real].to(out.dtype)
        return out

    encoder_width = max(int(row.encoder_mask.sum()) for row in rows if row.encoder_mask is not None)
    decoder_width = max(int(row.decoder_mask.sum()) for row in rows)
    return Batch(
        laid("encoder_input_tokens", "encoder_mask", encoder_width),
        laid("encoder_mask", "encoder_mask", encoder_width),
        *(laid(f"decoder_{name}", "decoder_mask", decoder_width) for name in ("input_tokens", "target_tokens")),
        laid("decoder_loss_weights", "decoder_mask", decoder_width),
        laid("decoder_mask", "decoder_mask", decoder_width),
        laid("encoder_input_tokens", "encoder_mask", encoder_width, numbers=True),
        laid("decoder_input_tokens", "decoder_mask", decoder_width, numbers=True),
    )


def test_what_is_not_learned_is_not_asked_for(layout: TeacherText) -> None:
    batch = decoder_batch([ids(400, 401, 402, EOS), ids(403, EOS)], [2, 0], bos_id=BOS, pad_id=PAD)
    rows = teacher_rows(batch, layout)
    assert rows is not None and torch.equal(rows.tokens, batch.decoder_input_tokens)
    assert rows.taught.tolist() == [[-1, -1, 2, 3], [4, 5, -1, -1]]
    silent = Batch(
        None,
        None,
        *(getattr(batch, f"decoder_{n}") for n in ("input_tokens", "target_tokens")),
        *(torch.zeros_like(batch.decoder_loss_weights), batch.decoder_mask),
    )
    assert teacher_rows(silent, layout) is None


def test_what_is_no_text_is_refused(tokenizer: Tokenizer, layout: TeacherText) -> None:
    x, y = tokenizer.sentinel_ids[:2]
    for source, target in (
        (ids(BOS, 400, x, 401, EOS), ids(y, 402, EOS)),
        (ids(BOS, 400, x, 401, y, EOS), ids(x, 402, EOS)),
        (ids(BOS, 400, EOS), ids(401, 402)),
    ):
        with pytest.raises(ValueError, match="not made by a denoising objective"):
            layout.text(source, target)
