"""Long inputs take other ways through the encoder; what comes out is the same."""

from __future__ import annotations

import torch

from encore.kernels import attention
from encore.model import layers


def test_long_sources_give_the_same_memory(pair, monkeypatch):
    _, model = pair("t5gemma2")
    tokens = torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, 50:] = False
    with torch.no_grad():
        expected = model.encode(tokens, mask).states
        monkeypatch.setattr(layers, "ROWS_AT_ONCE", 16)
        monkeypatch.setattr(attention, "LONG", 32)
        monkeypatch.setattr(attention, "MAX_SCORES", 4096)
        found = model.encode(tokens, mask).states
    assert not torch.equal(found, expected), "the other ways were not taken"
    torch.testing.assert_close(found[mask], expected[mask], atol=3e-5, rtol=0)


def test_with_gradients_nothing_is_cut(pair, monkeypatch):
    _, model = pair("gemma3")
    monkeypatch.setattr(layers, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(torch.Tensor, "split", lambda *_, **__: 1 / 0)
    model(torch.randint(3, 97, (1, 40))).sum().backward()
    model.zero_grad()
