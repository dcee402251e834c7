"""Packed rows: each segment gives what it gives alone, forwards and backwards, wherever it stands.

The oracle is the model itself on one segment at a time, without segment ids.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encore.kernels import attention
from encore.kernels.attention import Keys, attend
from encore.model.encoder import Memory
from encore.model.layers import segment_positions
from encore.model.masks import EVERYTHING, Segments, Visibility, Window
from encore.model.t5gemma import T5Gemma

WINDOW, V, TOLERANCE = 7, 97, 3e-5
SEQ2SEQ = ["t5gemma", "t5gemma-unbalanced", "t5gemma2"]
GEMMAS = ["gemma2", "gemma3"]
Rows = list[list[tuple[int, int]]]
"""Of each row the segments, each by its length on the encoder's and the decoder's side."""

ROWS: dict[str, Rows] = {
    "around the window": [[(WINDOW - 1, WINDOW), (WINDOW, WINDOW + 1), (WINDOW + 1, 1), (1, 2 * WINDOW)]],
    "padded": [[(3 * WINDOW, 2), (5, 5)], [(4, 3 * WINDOW + 2)], [(1, 1), (2, 2), (3, 3)]],
    "one": [[(2 * WINDOW, 2 * WINDOW)]],
}


def ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed))


def side(rows: Rows, which: int) -> tuple[torch.Tensor, torch.Tensor, list[list[slice]]]:
    """Tokens and segment ids of one side of the rows, padded at the end with a real id, and where each segment lies."""
    longest = max(sum(lengths[which] for lengths in row) for row in rows)
    tokens, segments = torch.full((len(rows), longest), 5), torch.zeros(len(rows), longest, dtype=torch.long)
    places = []
    for i, row in enumerate(rows):
        start, slices = 0, []
        for number, lengths in enumerate(row, start=1):
            where = slice(start, start + lengths[which])
            tokens[i, where], segments[i, where] = ids(lengths[which], 100 * i + 10 * number + which), number
            slices.append(where)
            start = where.stop
        places.append(slices)
    return tokens, segments, places


def compare_seq2seq(model: T5Gemma, rows: Rows) -> None:
    """Logits of packed rows are those of each pair alone."""
    src, src_segments, sources = side(rows, 0)
    tgt, tgt_segments, targets = side(rows, 1)
    packed = model(src, tgt, encoder_segment_ids=src_segments, decoder_segment_ids=tgt_segments)
    assert torch.isfinite(packed).all()
    for i, row in enumerate(rows):
        for source, target, lengths in zip(sources[i], targets[i], row, strict=True):
            if lengths[1]:
                alone = model(src[i : i + 1, source], tgt[i : i + 1, target])
                torch.testing.assert_close(packed[i : i + 1, target], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", SEQ2SEQ)
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_packed_pairs_equal_each_alone(pair, kind, rows):
    compare_seq2seq(pair(kind)[1], ROWS[rows])


@pytest.mark.parametrize("kind", GEMMAS)
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_packed_texts_equal_each_alone(pair, kind, rows):
    model = pair(kind)[1]
    tokens, segments, places = side(ROWS[rows], 1)
    packed = model(tokens, segment_ids=segments)
    assert torch.isfinite(packed).all()
    for i, slices in enumerate(places):
        for where in slices:
            alone = model(tokens[i : i + 1, where])
            torch.testing.assert_close(packed[i : i + 1, where], alone, atol=TOLERANCE, rtol=0)


lengths = st.tuples(st.integers(0, 2 * WINDOW + 2), st.integers(1, 2 * WINDOW + 2))


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.lists(lengths, min_size=1, max_size=5), min_size=1, max_size=3), kind=st.sampled_from(SEQ2SEQ))
def test_any_packing_equals_each_alone(pair, rows, kind):
    """Also where a segment has no source at all."""
    with torch.no_grad():
        compare_seq2seq(pair(kind)[1], rows)


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2", "gemma2", "gemma3"])
def test_gradients_are_those_of_the_segments_alone(pair, kind):
    model, rows = pair(kind)[1], ROWS["padded"]
    src, src_segments, sources = side(rows, 0)
    tgt, tgt_segments, targets = side(rows, 1)
    weights = (
        torch.randn(tgt.shape, generator=torch.Generator().manual_seed(0))[..., None] * (tgt_segments > 0)[..., None]
    )

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    if isinstance(model, T5Gemma):
        packed = model.states(src, tgt, encoder_segment_ids=src_segments, decoder_segment_ids=tgt_segments)
    else:
        packed = model.states(tgt, segment_ids=tgt_segments)
    (packed * weights).sum().backward()
    together = gradients()
    for i, slices in enumerate(targets):
        for source, target in zip(sources[i], slices, strict=True):
            row = slice(i, i + 1)
            both = (src[row, source], tgt[row, target]) if isinstance(model, T5Gemma) else (tgt[row, target],)
            (model.states(*both) * weights[row, target]).sum().backward()
    alone = gradients()
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        assert torch.isfinite(gradient).all(), name
        scale = float(alone[name].abs().max().clamp(min=1.0))
        torch.testing.assert_close(
            gradient / scale, alone[name] / scale, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_a_mask_beside_segment_ids_hides_its_padding_too(pair):
    model = pair("t5gemma2")[1]
    src, segments, _ = side([[(6, 3), (9, 4)]], 0)
    tgt, tgt_segments, _ = side([[(6, 3), (9, 4)]], 1)
    mask = torch.ones_like(src, dtype=torch.bool)
    mask[:, 12:] = False
    given_both = model(src, tgt, mask, encoder_segment_ids=segments, decoder_segment_ids=tgt_segments)
    only_ids = model(src, tgt, encoder_segment_ids=segments * mask, decoder_segment_ids=tgt_segments)
    torch.testing.assert_close(given_both, only_ids, atol=0, rtol=0)
    assert (
        given_both - model(src, tgt, encoder_segment_ids=segments, decoder_segment_ids=tgt_segments)
    ).abs().max() > 1e-3


@torch.no_grad()
def test_rows_of_a_packed_memory_can_be_chosen(pair):
    model = pair("t5gemma2")[1]
    rows = ROWS["padded"]
    src, segments, _ = side(rows, 0)
    tgt, tgt_segments, _ = side(rows, 1)
    memory = model.encode(src, segment_ids=segments)
    assert memory.mask is not None and torch.equal(memory.mask, segments > 0)
    chosen = torch.tensor([2, 0])
    found = model.decode(tgt[chosen], memory.index_select(chosen), segment_ids=tgt_segments[chosen])
    expected = model.decode(tgt, memory, segment_ids=tgt_segments)[chosen]
    real = tgt_segments[chosen] > 0
    torch.testing.assert_close(found[real], expected[real], atol=TOLERANCE, rtol=0)


def test_positions_begin_again_in_each_segment():
    given_ids = torch.tensor([[1, 1, 1, 2, 2, 0], [0, 0, 1, 3, 3, 3]])
    assert segment_positions(given_ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2]]
    assert segment_positions(given_ids[:, :0]).shape == (2, 0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=6),
    left=st.one_of(st.none(), st.integers(0, 9)),
    right=st.one_of(st.none(), st.integers(0, 9)),
    max_scores=st.integers(1, 4000),
    seed=st.integers(0, 99),
)
def test_blocks_of_segments_equal_a_dense_mask(lengths, left, right, max_scores, seed):
    """Two parts under one softmax, tokens among themselves and a memory, against one matrix of who sees whom."""
    generator = torch.Generator().manual_seed(seed)
    rows = [lengths, lengths[::-1]]
    _, of_keys, _ = side(rows, 0)
    _, of_queries, _ = side(rows, 1)
    num_rows, num_keys = of_queries.shape[1], of_keys.shape[1]
    q, k, v = (torch.randn(2, 2, num_rows, 8, generator=generator) for _ in range(3))
    k2, v2 = (torch.randn(2, 2, num_keys, 8, generator=generator) for _ in range(2))
    window = Window(left, right)
    parts = [
        Keys(k, v, Visibility(window, num_keys=num_rows, segments=Segments(of_queries, of_queries))),
        Keys(k2, v2, Visibility(EVERYTHING, num_keys=num_keys, segments=Segments(of_queries, of_keys))),
    ]
    before = attention.MAX_SCORES
    attention.MAX_SCORES = max_scores
    try:
        found = attend(q, parts)
    finally:
        attention.MAX_SCORES = before
    distance = torch.arange(num_rows)[:, None] - torch.arange(num_rows)
    near = (distance <= (num_rows if left is None else left)) & (-distance <= (num_rows if right is None else right))
    seen = torch.cat(
        (near & (of_queries[:, :, None] == of_queries[:, None]), of_queries[:, :, None] == of_keys[:, None]), 2
    )
    scores = (q @ torch.cat((k, k2), 2).transpose(2, 3)).masked_fill(~seen[:, None], -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(0.0) @ torch.cat((v, v2), 2)).transpose(1, 2).flatten(2)
    real = of_queries > 0
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)


def test_cost_falls_with_packing(monkeypatch):
    """Scores computed on a global layer grow with the segments' lengths, not with S x S, also beyond LONG."""
    built: list[int] = []
    original = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: built.append(x.numel()) or original(x, dim=dim))
    for num in (1024, 2048):
        q, k, v = (torch.randn(1, 1, num, 4) for _ in range(3))
        segment_ids = torch.arange(num)[None] // 64 + 1
        attend(q, [Keys(k, v, Visibility(EVERYTHING, num_keys=num, segments=Segments(segment_ids, segment_ids)))])
        assert 0 < sum(built) <= num * 64 * 2
        built.clear()


@pytest.mark.parametrize(
    ("segment_ids", "message"),
    [
        (torch.tensor([[1, 1, 2]]), "shape"),
        (torch.tensor([[1.0, 1.0, 2.0, 2.0]]), "dtype"),
        (torch.tensor([[2, 2, 1, 1]]), "rising"),
        (torch.tensor([[1, 2, 1, 1]]), "one piece"),
        (torch.tensor([[1, 0, 1, 1]]), "one piece"),
        (torch.tensor([[-1, 1, 1, 1]]), "0 for padding"),
    ],
)
def test_segment_ids_that_make_no_sense_are_refused(pair, segment_ids, message):
    with pytest.raises(ValueError, match=message):
        pair("gemma3")[1](torch.tensor([[5, 6, 7, 8]]), segment_ids=segment_ids)
    with pytest.raises(ValueError, match=message):
        pair("t5gemma2")[1].encode(torch.tensor([[5, 6, 7, 8]]), segment_ids=segment_ids)


def test_segments_need_both_sides_and_no_cache(pair):
    model, gemma = pair("t5gemma2")[1], pair("gemma3")[1]
    tokens, segments = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 1, 2, 2]])
    memory = model.encode(tokens, segment_ids=segments)
    with pytest.raises(ValueError, match="target has none"):
        model.decode(tokens, memory)
    with pytest.raises(ValueError, match="memory has none"):
        model.decode(tokens, Memory(memory.states), segment_ids=segments)
    with pytest.raises(ValueError, match="without one"):
        model.decode(tokens, memory, model.make_cache(memory, 8), segment_ids=segments)
    with pytest.raises(ValueError, match="without one"):
        gemma(tokens, None, gemma.make_cache(1, 8), segment_ids=segments)


@torch.no_grad()
def test_a_compiled_graph_cuts_no_keys_and_gives_the_same(pair, monkeypatch):
    """Under torch.compile the reach of a block does not depend on how rows are packed: one graph serves all."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    segments = Segments(*[torch.tensor([[1, 1, 2, 2]])] * 2)
    assert Visibility(EVERYTHING, num_keys=4, segments=segments).keys_of(slice(0, 1)) == slice(0, 4)
    compare_seq2seq(pair("t5gemma2")[1], ROWS["padded"])
