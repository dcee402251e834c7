"""attend() in blocks, over parts, with windows: equal to dense attention over concatenated keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encore.kernels import attention
from encore.kernels.attention import Keys, attend
from encore.model.masks import EVERYTHING, Visibility, Window


def dense(q, parts, windows, masks, offset, softcap=None):
    """The oracle: one explicit mask, one softmax, float64."""
    num_rows, groups = q.shape[2], q.shape[1] // parts[0][0].shape[1]
    k = torch.cat([k for k, _ in parts], dim=2).repeat_interleave(groups, dim=1).double()
    v = torch.cat([v for _, v in parts], dim=2).repeat_interleave(groups, dim=1).double()
    columns = []
    for (key, _), window, mask in zip(parts, windows, masks, strict=True):
        seen = torch.zeros(q.shape[0], num_rows, key.shape[2], dtype=torch.bool)
        for i in range(num_rows):
            for j in range(key.shape[2]):
                distance = i + offset - j
                near = (window.left is None or distance <= window.left) and (
                    window.right is None or -distance <= window.right
                )
                seen[:, i, j] = near if mask is None else mask[:, j] & near
        columns.append(seen)
    seen = torch.cat(columns, dim=-1)[:, None]
    scores = q.double() @ k.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2).flatten(2)


bounds = st.one_of(st.none(), st.integers(0, 9))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    left=bounds,
    right=bounds,
    padded=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    offset=st.integers(0, 12),
    max_scores=st.integers(1, 4000),
    seed=st.integers(0, 99),
)
def test_blocks_and_parts_equal_dense(rows, sizes, left, right, padded, softcap, offset, max_scores, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, rows, 8, generator=generator)
    parts = [
        (torch.randn(2, 2, n, 8, generator=generator), torch.randn(2, 2, n, 8, generator=generator)) for n in sizes
    ]
    windows = [Window(left, right), *[EVERYTHING] * (len(parts) - 1)]
    masks = [torch.rand(2, n, generator=generator) < 0.6 if padded else None for n in sizes]
    keys = [
        Keys(k, v, Visibility(w, num_keys=k.shape[2], offset=offset, key_mask=m))
        for (k, v), w, m in zip(parts, windows, masks, strict=True)
    ]
    before = attention.MAX_SCORES
    attention.MAX_SCORES = max_scores
    try:
        out = attend(q, keys, softcap=softcap)
    finally:
        attention.MAX_SCORES = before
    assert torch.isfinite(out).all()
    expected = dense(q, parts, windows, masks, offset, softcap)
    if not padded:  # a window alone can hide everything; such rows are never asked for
        alive = expected.abs().sum(-1) > 0
        out, expected = out[alive], expected[alive]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [EVERYTHING, Window(100, 90)])
def test_long_inputs_take_the_fast_paths_and_stay_equal(padded, window, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    num = attention.LONG + 37
    q, k, v = (torch.randn(2, h, num, 8, generator=generator) for h in (4, 2, 2))
    mask = torch.ones(2, num, dtype=torch.bool)
    if padded:
        mask[0, 200:] = False
        mask[1] = False
    fast = attend(q, [Keys(k, v, Visibility(window, num_keys=num, key_mask=mask if padded else None))])
    monkeypatch.setattr(attention, "LONG", num + 1)
    monkeypatch.setattr(attention, "MAX_SCORES", 1 << 40)
    monkeypatch.setattr(attention, "_rows_per_block", lambda *_: num)
    slow = attend(q, [Keys(k, v, Visibility(window, num_keys=num, key_mask=mask if padded else None))])
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    assert not padded or fast[1].abs().max() == 0


def test_a_blind_row_gives_zeros_and_no_nan_gradient():
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 3, dtype=torch.bool)
    out = attend(q, [Keys(k, v, Visibility(EVERYTHING, num_keys=3, key_mask=mask))])
    assert out.abs().max() == 0
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_local_layers_build_only_their_band(monkeypatch):
    """Scores computed grow with S x window, not S x S."""
    built = []
    original = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: built.append(x.numel()) or original(x, dim=dim))
    for num in (1024, 2048):
        q, k, v = (torch.randn(1, 1, num, 4) for _ in range(3))
        attend(q, [Keys(k, v, Visibility(Window(31, 32), num_keys=num))])
        assert sum(built) < num * 64 * 3
        built.clear()
