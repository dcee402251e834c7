"""Logits equal those of transformers (eager, float32) within 3e-5, at every edge where others broke."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from encore.model.t5gemma import T5Gemma

WINDOW, V, TOLERANCE = 7, 97, 3e-5
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 2]
SEQ2SEQ = ["t5gemma", "t5gemma-unbalanced", "t5gemma2"]
GEMMAS = ["gemma2", "gemma3"]
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture()
def no_grad():
    with torch.no_grad():
        yield


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.isfinite(ours).all()
    assert ours.abs().max() > 0.5, "logits too small for the comparison to mean anything"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def stepwise(model, tokens: torch.Tensor, memory=None, chunks: tuple[int, ...] = (), mask=None) -> torch.Tensor:
    """Logits with a cache: up to each bound in `chunks` at once, then token by token."""
    bounds = [*chunks, *range((chunks[-1] if chunks else 0) + 1, tokens.shape[1] + 1)]
    cache = model.make_cache(*((memory,) if memory is not None else (tokens.shape[0],)), tokens.shape[1])
    out, start = [], 0
    for stop in bounds:
        new = None if mask is None else mask[:, start:stop]
        if memory is not None:
            out.append(model.decode(tokens[:, start:stop], memory, cache, decoder_mask=new))
        else:
            out.append(model(tokens[:, start:stop], new, cache))
        start = stop
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("kind", SEQ2SEQ)
@pytest.mark.parametrize("source", LENGTHS)
@pytest.mark.parametrize("target", [1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_logits_equal_at_every_length(pair, kind, source, target):
    theirs, ours = pair(kind)
    src, tgt = ids(2, source), ids(2, target, seed=1)
    expected = theirs(input_ids=src, decoder_input_ids=tgt).logits
    close(ours(src, tgt), expected)
    memory = ours.encode(src)
    close(stepwise(ours, tgt, memory), expected)
    if target > WINDOW:
        close(stepwise(ours, tgt, memory, chunks=(5, WINDOW + 3)), expected)


@pytest.mark.parametrize("kind", GEMMAS)
@pytest.mark.parametrize("length", LENGTHS)
def test_gemma_logits_equal_at_every_length(pair, kind, length):
    theirs, ours = pair(kind)
    tokens = ids(2, length)
    expected = theirs(input_ids=tokens).logits
    close(ours(tokens), expected)
    close(stepwise(ours, tokens), expected)
    if length > WINDOW:
        close(stepwise(ours, tokens, chunks=(4, WINDOW + 1)), expected)


def padded(tokens: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length in one batch. Padding has a real id, so that only the mask can tell."""
    longest = max(len(t) for t in tokens)
    batch, mask = torch.full((len(tokens), longest), 5), torch.zeros(len(tokens), longest, dtype=torch.bool)
    for row, t in enumerate(tokens):
        where = slice(0, len(t)) if side == "right" else slice(longest - len(t), longest)
        batch[row, where], mask[row, where] = t, True
    return batch, mask


@pytest.mark.parametrize("kind", SEQ2SEQ)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("longest", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 4 * WINDOW])
def test_padded_sources(pair, kind, side, longest):
    theirs, ours = pair(kind)
    sources = [ids(longest)[:n] for n in (longest, longest // 2 + 1, 2)]
    src, mask = padded(sources, side)
    tgt = ids(3, 2 * WINDOW + 1, seed=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    memory = ours.encode(src, mask)
    assert torch.isfinite(memory.states).all()
    expected = theirs(input_ids=src, attention_mask=mask.long(), position_ids=positions, decoder_input_ids=tgt).logits
    together = ours(src, tgt, mask)
    close(together, expected)
    close(stepwise(ours, tgt, memory), expected)
    for row, source in enumerate(sources):
        close(ours(source[None], tgt[row : row + 1])[0], together[row])


@pytest.mark.parametrize("kind", SEQ2SEQ)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_targets(pair, kind, side):
    theirs, ours = pair(kind)
    targets = [ids(n, seed=n) for n in (3 * WINDOW, WINDOW + 1, 2)]
    src = ids(3, 2 * WINDOW)
    tgt, mask = padded(targets, side)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(
        input_ids=src, decoder_input_ids=tgt, decoder_attention_mask=mask.long(), decoder_position_ids=positions
    ).logits
    together = ours(src, tgt, decoder_mask=mask)
    assert torch.isfinite(together).all()
    close(together[mask], expected[mask])
    cached = stepwise(ours, tgt, ours.encode(src), mask=mask)
    close(cached[mask], expected[mask])
    for row, target in enumerate(targets):
        close(ours(src[row : row + 1], target[None])[0], together[row][mask[row]])


@pytest.mark.parametrize("kind", GEMMAS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gemma_padded(pair, kind, side):
    theirs, ours = pair(kind)
    prompts = [ids(n, seed=n) for n in (4 * WINDOW, WINDOW, WINDOW + 1, 2)]
    tokens, mask = padded(prompts, side)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), position_ids=positions).logits
    together = ours(tokens, mask)
    assert torch.isfinite(together).all()
    close(together[mask], expected[mask])
    close(stepwise(ours, tokens, mask=mask)[mask], expected[mask])
    for row, prompt in enumerate(prompts):
        close(ours(prompt[None])[0], together[row][mask[row]])


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_pad_ids_are_real_without_a_mask(pair, kind):
    """Masks decide, not ids. transformers' T5Gemma guesses a mask from ids if none is given, so give it one."""
    theirs, ours = pair(kind)
    src, tgt = ids(2, 10), ids(2, 9, seed=1)
    src[:, 3:5] = 0
    tgt[:, 4] = 0
    everything = torch.ones_like(src)
    expected = theirs(
        input_ids=src, attention_mask=everything, decoder_input_ids=tgt, decoder_attention_mask=torch.ones_like(tgt)
    ).logits
    close(ours(src, tgt), expected)


def test_end_of_image_embedding_is_neither_scaled_nor_the_row(pair):
    theirs, ours = pair("t5gemma2")
    src, tgt = ids(2, 10), ids(2, 9, seed=1)
    src[0, 3], tgt[1, 4] = 90, 90
    close(ours(src, tgt), theirs(input_ids=src, decoder_input_ids=tgt).logits)


@pytest.mark.parametrize("kind", [*SEQ2SEQ, *GEMMAS])
def test_a_row_that_is_all_padding_is_finite_and_changes_nobody(pair, kind):
    _, ours = pair(kind)
    tokens, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    if isinstance(ours, T5Gemma):
        tgt = ids(2, 9, seed=1)
        out, alone = ours(tokens, tgt, mask), ours(tokens[:1], tgt[:1])
    else:
        out, alone = ours(tokens, mask), ours(tokens[:1])
    assert torch.isfinite(out).all()
    close(out[:1], alone)


@pytest.mark.parametrize("kind", [*SEQ2SEQ, *GEMMAS])
def test_bfloat16_is_no_farther_from_float32_than_the_reference(pair, kind):
    theirs, ours = pair(kind)
    src, tgt = ids(4, 3 * WINDOW), ids(4, 2 * WINDOW, seed=1)
    as_kwargs = dict(input_ids=src, decoder_input_ids=tgt) if kind in SEQ2SEQ else dict(input_ids=src)
    args = (src, tgt) if kind in SEQ2SEQ else (src,)
    exact = theirs(**as_kwargs).logits
    theirs_off = (deepcopy(theirs).bfloat16()(**as_kwargs).logits.float() - exact).pow(2).mean().sqrt()
    ours_off = (deepcopy(ours).bfloat16()(*args).float() - exact).pow(2).mean().sqrt()
    assert theirs_off > 0
    assert ours_off <= 1.2 * theirs_off


def test_vision_tower_and_projector_equal_the_reference(pair):
    theirs, ours = pair("t5gemma2")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = theirs.model.encoder.get_image_features(pixels).pooler_output
    assert isinstance(ours, T5Gemma)
    close(ours.encoder.multi_modal_projector(ours.encoder.vision_tower(pixels)), expected)


def test_memory_rows_and_cache_rows_can_be_dropped_on_the_way(pair):
    _, ours = pair("t5gemma2")
    assert isinstance(ours, T5Gemma)
    sources = [ids(n, seed=n) for n in (20, 9, 14)]
    src, mask = padded(sources, "right")
    tgt = ids(3, 20, seed=1)
    memory = ours.encode(src, mask)
    cache = ours.make_cache(memory, 20)
    ours.decode(tgt[:, :11], memory, cache)
    rows = torch.tensor([2, 0])
    cache.index_select(rows)
    rest = ours.decode(tgt[rows, 11:], memory.index_select(rows), cache)
    close(rest, ours(src[rows], tgt[rows], mask[rows])[:, 11:])


def test_window_is_read_from_the_config(pair):
    """A check of the checks: with another window the logits differ."""
    theirs, ours = pair("t5gemma2")
    src, tgt = ids(2, 20), ids(2, 20, seed=1)
    wide = replace(ours.config.encoder, sliding_window=WINDOW + 2)
    before = ours.encoder.config
    try:
        ours.encoder.config = replace(before, encoder=wide)
        assert (ours(src, tgt) - theirs(input_ids=src, decoder_input_ids=tgt).logits).abs().max() > 1e-3
    finally:
        ours.encoder.config = before
