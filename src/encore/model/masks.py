"""Who sees whom. Every mask of the family is a window over indices, a flag for each key that it is real, and pictures.

A query at index i sees a key at index j if  -right <= i - j <= left  and the key is real (None = no bound):

    stack                          global layer         local layer (window W)
    Gemma, decoders                left None, right 0   left W-1, right 0
    T5Gemma 2 encoder              left None, None      left (W+1)//2 - 1, right W//2
    T5Gemma encoder                left None, None      left W, right W
    a causal encoder               left None, right 0   left W-1, right 0
    anything reading the memory    left None, None      left None, None  (local layers too)

Gemma 3 adds a group for each token: -1, or the number of the picture it belongs to. The tokens of one picture see each
other both ways, but on local layers never more than W-1 to the left:

    a key that `right` would hide is seen all the same if it is in the query's group, and the group is not -1

T5Gemma 2's encoder has no such rule: its pictures are seen as text is.

Packed rows hold several documents, told apart by segment ids (1, 2, … from the left, 0 = padding): a key is hidden from
every query of another segment, in self-attention and in the memory alike. A segment lies in one piece, so a block of
queries reaches only the keys from the first of its segments to the last: the cost falls as more documents share a row.

So the merged attention of T5Gemma 2 has two parts: the target under the decoder's row of this table, and the memory
under the last row. They meet in one softmax in `kernels/attention.py`; no merged matrix is built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from encore.config import LayerType, StackConfig, T5GemmaConfig

MEMOISED_ELEMENTS = 1 << 25
"""How much of a mask one object keeps for the layers that follow: 32 MB of bools."""


@dataclass(frozen=True)
class Window:
    """How far a query sees to the left and to the right; None = without bound."""

    left: int | None = None
    right: int | None = None


EVERYTHING = Window()


def decoder_window(config: StackConfig, layer_type: LayerType) -> Window:
    """Causal; local layers see themselves and W-1 before."""
    return Window(config.sliding_window - 1 if layer_type == "sliding_attention" else None, 0)


def encoder_window(config: T5GemmaConfig, layer_type: LayerType) -> Window:
    """Bidirectional, unless the encoder is causal as a decoder is. Local layers of T5Gemma 2 see W tokens in all; those
    of T5Gemma see W to each side.

    For T5Gemma, transformers 5.23 counts |i - j| <= W, Google's JAX code |i - j| < W: one key per side fewer.
    Parity is measured against transformers, so the bound here is inclusive.
    """
    if config.causal_encoder:
        return decoder_window(config.encoder, layer_type)
    if layer_type == "full_attention":
        return EVERYTHING
    width = config.encoder.sliding_window
    return Window((width + 1) // 2 - 1, width // 2) if config.model_type == "t5gemma2" else Window(width, width)


def picture_groups(tokens: Int[Tensor, "B T"], image_token_index: int) -> Int[Tensor, "B T"]:
    """The number of the picture that each token belongs to, in its row; -1 for text.

    A picture begins where a placeholder follows something else, so pictures that touch would be one: the prompt keeps
    an end-of-image and a begin-of-image token between them.

    >>> picture_groups(torch.tensor([[5, 9, 9, 5, 9, 9]]), 9)
    tensor([[-1,  0,  0, -1,  1,  1]])
    """
    is_picture = tokens == image_token_index
    begins = is_picture.clone()
    begins[:, 1:] &= ~is_picture[:, :-1]
    return torch.where(is_picture, begins.cumsum(dim=1) - 1, -1)


class Segments:
    """Which document each query and each key of packed rows belongs to, and how far apart those of one document lie.

    Ids rise within a row; 0 is padding. Queries and keys are the same tokens, or target and memory. The reach of each
    query is known on the host (one transfer), so that blocks can be cut without asking the device.
    """

    def __init__(self, queries: Int[Tensor, "B T"], keys: Int[Tensor, "B S"]) -> None:
        self.queries, self.keys = queries, keys
        self._first, self._stop, self.longest = _reach_of_segments(queries.cpu(), keys.cpu())

    def keys_of(self, rows: slice) -> slice:
        """From the first to the last key of the segments of these queries, over the batch; empty if all are padding."""
        start, stop = min(self._first[rows], default=0), max(self._stop[rows], default=0)
        return slice(min(start, stop), stop)

    def hidden(self, rows: slice, keys: slice) -> Bool[Tensor, "B T S"]:
        return self.queries[:, rows, None] != self.keys[:, None, keys]


def _reach_of_segments(queries: Int[Tensor, "B T"], keys: Int[Tensor, "B S"]) -> tuple[list[int], list[int], int]:
    """For each query index the first key of its segments and the one after the last, over the batch; and the size of
    the largest segment of keys, at least 1.
    """
    batch_size, num_keys = keys.shape
    number = 1 + max((int(ids.max()) for ids in (queries, keys) if ids.numel()), default=0)
    index = torch.arange(num_keys).expand(batch_size, -1)
    shape = (batch_size, number)
    first = torch.full(shape, num_keys).scatter_reduce(1, keys.long(), index, "amin")
    last = torch.full(shape, -1).scatter_reduce(1, keys.long(), index, "amax")
    first[:, 0], last[:, 0] = num_keys, -1  # padding is nobody's
    if not batch_size:
        return [], [], 1
    starts, stops = first.gather(1, queries.long()).amin(dim=0), last.gather(1, queries.long()).amax(dim=0) + 1
    return starts.tolist(), stops.tolist(), max(1, int((last - first).max()) + 1)


class Visibility:
    """A window between queries at `offset + 0..T-1` and keys at `key_index`, or at 0..S-1 if that is None.

    `key_mask` (B, S) is True for real keys. `group` (B, S) says which keys belong to which picture; queries and keys
    are then the same tokens. `segments` keeps the documents of packed rows apart. Blocks of the mask are built when
    asked for, and kept while all of them are small: one object serves all layers of a kind, so that a mask is built
    once per pass.
    """

    def __init__(
        self,
        window: Window,
        *,
        num_keys: int,
        offset: int = 0,
        key_mask: Bool[Tensor, "B S"] | None = None,
        key_index: Int[Tensor, " S"] | None = None,
        group: Int[Tensor, "B S"] | None = None,
        segments: Segments | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.window = window
        self.offset = offset
        self.num_keys = num_keys
        self.key_mask = key_mask
        self.key_index = key_index
        assert group is None or (offset == 0 and key_index is None), "groups are of new tokens among themselves"
        self.group = group
        assert segments is None or (offset == 0 and key_index is None), "segments are not combined with a cache"
        self.segments = segments
        self._reach = 0 if group is None else _longest_run(group) - 1
        self.device = device
        self._blocks: dict[tuple[int, int, int, int], Tensor | None] = {}
        self._kept = 0

    @property
    def span(self) -> int | None:
        if self.window.left is None or self.window.right is None:
            span = None if self.window == EVERYTHING else self.num_keys
        else:
            span = self.window.left + self.window.right + self._reach + 1
        if self.segments is None:
            return span
        return self.segments.longest if span is None else min(span, self.segments.longest)

    @property
    def may_be_blind(self) -> bool:
        """Packed tokens always see themselves; a memory may have nothing for the segment of a target token."""
        return self.key_mask is not None or (
            self.segments is not None and self.segments.queries is not self.segments.keys
        )

    def keys_of(self, rows: slice) -> slice:
        if self.key_index is not None:
            return slice(0, self.num_keys)
        left, right = self.window.left, self.window.right
        start = 0 if left is None else max(0, self.offset + rows.start - left)
        stop = self.num_keys if right is None else min(self.num_keys, self.offset + rows.stop + right + self._reach)
        if self.segments is not None and not torch.compiler.is_compiling():  # one graph for every way to pack
            reach = self.segments.keys_of(rows)
            start, stop = max(start, reach.start), min(stop, reach.stop)
        return slice(min(start, self.num_keys), max(stop, min(start, self.num_keys)))

    def hidden(self, rows: slice, keys: slice) -> Bool[Tensor, "#B #T S"] | None:
        key = (rows.start, rows.stop, keys.start, keys.stop)
        if key not in self._blocks:
            block = self._hidden(rows, keys)
            if block is not None:
                self._kept += block.numel()
                if self._kept > MEMOISED_ELEMENTS:
                    return block
            self._blocks[key] = block
        return self._blocks[key]

    def _hidden(self, rows: slice, keys: slice) -> Tensor | None:
        hidden = None
        if self.key_mask is not None:
            hidden = ~self.key_mask[:, None, keys]
        if self.segments is not None:
            other = self.segments.hidden(rows, keys)
            hidden = other if hidden is None else hidden | other
        left, right = self.window.left, self.window.right
        first_query, last_query = self.offset + rows.start, self.offset + rows.stop - 1
        if self.key_index is None:  # drop a bound that nothing in this block crosses
            left = None if left is not None and last_query - keys.start <= left else left
            right = None if right is not None and keys.stop - 1 - first_query <= right else right
        if left is None and right is None:
            return hidden
        query = torch.arange(first_query, last_query + 1, device=self.device)[:, None]
        if self.key_index is None:
            key = torch.arange(keys.start, keys.stop, device=self.device)
        else:
            key = self.key_index[keys]
        distance = query - key[None]
        outside = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            outside |= distance > left
        outside = outside[None]
        if right is not None:
            later = (-distance > right)[None]
            if self.group is not None:
                of_query, of_key = self.group[:, rows, None], self.group[:, None, keys]
                later = later & ((of_query != of_key) | (of_query < 0))
            outside = outside | later
        return outside if hidden is None else hidden | outside


def _longest_run(group: Int[Tensor, "B S"]) -> int:
    """Tokens of the largest picture, at least 1."""
    if group.numel() == 0:
        return 1
    pictures = int(group.max()) + 1
    sizes = [int((group == number).sum(dim=1).max()) for number in range(pictures)]
    return max([1, *sizes])
