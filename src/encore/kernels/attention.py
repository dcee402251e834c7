"""attend(): softmax attention of queries over one or more parts of keys, under one softmax.

    out = softmax([q k1' | q k2' | ...] + hidden) [v1; v2; ...]

Parts are never concatenated: only their scores are. So the merged attention of T5Gemma 2 (T5Gemma 2 paper, section 2)
reads its target and its memory where they lie, and a cache is read in place.

Queries go through in blocks of rows. A block looks only at the keys that its window can reach, so local layers cost
O(S x window), and the scores held at once are bounded: nothing of size S x S exists. Grouped heads are folded into
rows (`B K (G T) E`), so keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

MAX_SCORES = 1 << 22
"""Scores of one block of query rows, over batch and heads: 16 MB in float32, about the size of a shared cache."""

HIDDEN = torch.finfo(torch.float32).min
"""The score of a hidden key: finite, so that a row of nothing else is no NaN."""

LONG = 1024
"""From this many queries on, an unwindowed part goes to the fused kernel of torch."""


class Visible(Protocol):
    """Who sees whom. The predicates live in `model/masks.py`; attention only asks for blocks of them."""

    def keys_of(self, rows: slice) -> slice:
        """The keys that any of these query rows may see."""
        ...

    def hidden(self, rows: slice, keys: slice) -> Bool[Tensor, "#B #T S"] | None:
        """True where a key is hidden; None if all are seen. (#B, 1, S) if all rows see the same."""
        ...

    @property
    def span(self) -> int | None:
        """How many keys a query sees at most; None = all."""
        ...

    @property
    def may_be_blind(self) -> bool:
        """Whether some row may see no key at all (padding), in this part."""
        ...


@dataclass(frozen=True)
class Keys:
    """One part of what is attended to: keys and values (B, K, S, E) and who sees them."""

    k: Float[Tensor, "B K S E"]
    v: Float[Tensor, "B K S E"]
    visible: Visible


def attend(
    q: Float[Tensor, "B H T E"], parts: Sequence[Keys], *, softcap: float | None = None
) -> Float[Tensor, "B T HE"]:
    """Attention of `q` (already scaled) over the joined `parts`; heads come back side by side, ready for `o_proj`.

    A row that sees no key gives zeros, if every part says that it may be blind. Softmax runs in float32.
    """
    batch, num_heads, num_rows, head_dim = q.shape
    num_kv_heads = parts[0].k.shape[1]
    q = q.unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    if softcap is None and len(parts) == 1 and parts[0].visible.span is None and num_rows >= LONG:
        out = _fused(q, parts[0])
        return out.permute(0, 3, 1, 2, 4).reshape(batch, num_rows, num_heads * head_dim)

    block = 1 if num_rows == 1 else _rows_per_block(batch * num_heads, num_rows, parts)
    blocks = [_block(q, slice(a, min(a + block, num_rows)), parts, softcap) for a in range(0, num_rows, block)]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3) if blocks else q
    return out.permute(0, 3, 1, 2, 4).reshape(batch, num_rows, num_heads * head_dim)


def _rows_per_block(rows_of_scores: int, num_rows: int, parts: Sequence[Keys]) -> int:
    """As many query rows as keep the scores below MAX_SCORES; with windows, no more than a window's worth."""
    spans = [part.visible.span for part in parts]
    reach = sum(
        part.k.shape[2] if span is None else min(span, part.k.shape[2]) for part, span in zip(parts, spans, strict=True)
    )
    block = max(16, MAX_SCORES // max(1, rows_of_scores * max(1, reach)))
    if any(span is not None and span < part.k.shape[2] for part, span in zip(parts, spans, strict=True)):
        widest = max(span for span in spans if span is not None)
        block = min(block, max(64, widest // 2))
    return max(1, min(block, num_rows))


def _block(q: Tensor, rows: slice, parts: Sequence[Keys], softcap: float | None) -> Tensor:
    """Dense attention of one block of query rows: (B, K, G, t, E)."""
    q = q[:, :, :, rows]
    groups, num_rows = q.shape[2:4]
    folded = q.flatten(2, 3)
    scores, values = [], []
    blind = True
    for part in parts:
        keys = part.visible.keys_of(rows)
        s = (folded @ part.k[:, :, keys].transpose(-1, -2)).float()
        if softcap is not None:
            s = torch.tanh(s / softcap) * softcap
        hidden = part.visible.hidden(rows, keys)
        if hidden is not None:
            s = s.unflatten(2, (groups, num_rows)).masked_fill(hidden[:, None, None], HIDDEN).flatten(2, 3)
        scores.append(s)
        values.append(part.v[:, :, keys])
        blind = blind and part.visible.may_be_blind
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    weights = torch.softmax(joined, dim=-1)
    if blind:  # a row that sees nothing has equal weights on hidden keys: make them zeros
        weights = weights.masked_fill(joined == HIDDEN, 0.0)
    shares = (weights,) if len(values) == 1 else weights.split([v.shape[2] for v in values], dim=-1)
    out = shares[0].to(values[0].dtype) @ values[0]
    for share, v in zip(shares[1:], values[1:], strict=True):
        out = out + share.to(v.dtype) @ v
    return out.unflatten(2, (groups, num_rows))


def _fused(q: Float[Tensor, "B K G T E"], part: Keys) -> Tensor:
    """torch's fused attention where all rows see the same keys, so that groups fold into rows."""
    batch, num_kv_heads, groups, num_rows, head_dim = q.shape
    hidden = part.visible.hidden(slice(0, 1), slice(0, part.k.shape[2]))
    bias = None
    if hidden is not None:
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, torch.finfo(q.dtype).min)
        bias = bias[:, None].expand(-1, -1, groups * num_rows, -1)
    folded = q.reshape(batch, num_kv_heads, groups * num_rows, head_dim)
    out = F.scaled_dot_product_attention(folded, part.k, part.v, attn_mask=bias, scale=1.0)
    if hidden is not None and part.visible.may_be_blind:
        out = out.masked_fill(hidden.all(dim=-1)[:, None, :, None], 0.0)
    return out.unflatten(2, (groups, num_rows))
