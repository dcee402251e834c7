"""What a decoder-only teacher reads for a batch, and where it speaks about each target token.

The teacher reads the example's text as it was before it was made into an example: prefix and target as one, holes
filled, each token given all that stand before it. Of the text a b c d e f g h (X, Y sentinels, - nobody):

    prefix LM   source  a b c                      target  d e f g h EOS           teacher reads BOS a b c d e f g
                                                   spoken of by  c d e f g -
    denoising   source  a b X e f g Y              target  X c d Y h EOS           teacher reads BOS a b c d e f g
                                                   spoken of by  - b c - g -
    pairs       source  a b c                      target  x y EOS                 teacher reads BOS a b c EOS x y
                                                   spoken of by EOS x y

Sentinels, and the EOS behind an example that was cut from a longer text, are no text: their targets stay one-hot
(T5Gemma 2, arXiv 2512.14856, section 4). A tuned decoder-only model does write the EOS of a pair. Everything here is
read from the batch alone, so it is the same for any packing, any number of devices and after any resume.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from encore.data.batch import Batch
from encore.tokenizer import SourceFormat, Tokenizer

Ids = np.ndarray


@dataclass(frozen=True)
class ExampleText:
    """One example of a batch: its place, the teacher's text, and which text token each target token is (-1: none).

    `source` (None for a decoder-only student) and `target` are the ids as they stand in the batch. Target tokens of
    loss weight 0 are not spoken of either.
    """

    row: int
    start: int
    source: Ids | None
    target: Ids
    text: Ids
    places: Ids

    @property
    def taught(self) -> Ids:
        """Which of its target tokens the teacher speaks about."""
        return (self.places >= 0).nonzero()[0]


class TeacherText:
    """Examples -> texts. `pairs`: source and target are two texts with EOS between, else two parts of one text.

    `mode_ids` are those of UL2's mode tokens, which open a source and are no text either.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        pairs: bool,
        source_format: SourceFormat | None = None,
        mode_ids: Collection[int] = (),
    ) -> None:
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        self.source_format = source_format or tokenizer.source_format
        self.sentinel_ids = np.asarray(tokenizer.sentinel_ids, np.int64)
        self.pairs, self.mode_ids = pairs, frozenset(mode_ids)

    def examples(self, batch: Batch) -> Iterator[ExampleText]:
        """All examples of a batch that have something to learn, row by row."""
        targets, weights = batch.decoder_target_tokens.cpu().numpy(), batch.decoder_loss_weights.cpu().numpy()
        target_segments = _segments(batch.decoder_segment_ids, batch.decoder_mask)
        sources = source_segments = None
        if batch.encoder_input_tokens is not None and batch.encoder_mask is not None:
            sources = batch.encoder_input_tokens.cpu().numpy()
            source_segments = _segments(batch.encoder_segment_ids, batch.encoder_mask)
        for row, segments in enumerate(target_segments):
            for segment in range(1, int(segments.max(initial=0)) + 1):
                here = (segments == segment).nonzero()[0]
                if not weights[row, here].any():
                    continue
                target = targets[row, here]
                source = None
                if sources is not None and source_segments is not None:
                    source = sources[row, source_segments[row] == segment]
                text, places = self.text(source, target)
                places = np.where(weights[row, here] != 0, places, -1)
                yield ExampleText(row, int(here[0]), source, target, text, places)

    def text(self, source: Ids | None, target: Ids) -> tuple[Ids, Ids]:
        """One example's text (L,) without BOS, and for each target token its place in it, or -1."""
        if source is None:
            return target, np.arange(len(target))
        source = self._bare(source)
        if self.pairs:
            text = np.concatenate([source, [self.eos_id], target])
            return text, len(source) + 1 + np.arange(len(target))
        written = target[:-1]
        in_source, in_target = np.isin(source, self.sentinel_ids), np.isin(written, self.sentinel_ids)
        if target[-1] != self.eos_id or not np.array_equal(source[in_source], written[in_target]):
            raise ValueError(
                f"an example with {in_source.sum()} sentinels in its source and {in_target.sum()} in its target, which "
                f"ends in {target[-1]}, was not made by a denoising objective of one text; a teacher cannot read it"
            )
        # Kept part i comes before hidden part i: number them 0, 2, 4, … and 1, 3, 5, …
        kept = 2 * np.cumsum(in_source)[~in_source]
        hidden = (2 * np.cumsum(in_target) - 1)[~in_target] if in_target.any() else np.ones(len(written), np.int64)
        order = np.argsort(np.concatenate([kept, hidden]), kind="stable")
        text = np.concatenate([source[~in_source], written[~in_target]])[order]
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        places = np.full(len(target), -1)
        places[:-1][~in_target] = rank[len(kept) :]
        return text, places

    def _bare(self, source: Ids) -> Ids:
        """The source without the BOS and EOS of its format, and without a mode token."""
        if self.source_format.bos and len(source) and source[0] == self.bos_id:
            source = source[1:]
        if len(source) and source[0] in self.mode_ids:
            source = source[1:]
        if self.source_format.eos and len(source) and source[-1] == self.eos_id:
            source = source[:-1]
        return source


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's batch: a row for each row of the student's, its examples one behind the other.

    `segment_ids` None: one example per row. `taught` (B, T): for each target token of the student's batch, which of the
    R * L outputs of the teacher is the distribution over it; -1: none.
    """

    tokens: Int[Tensor, "R L"]
    segment_ids: Int[Tensor, "R L"] | None
    taught: Int[Tensor, "B T"]


def teacher_rows(batch: Batch, layout: TeacherText) -> TeacherRows | None:
    """What the teacher reads for a batch, on the batch's device; None if there is nothing for it to say."""
    rows: dict[int, list[ExampleText]] = {}
    for example in layout.examples(batch):
        rows.setdefault(example.row, []).append(example)
    if not rows:
        return None
    length = max(sum(len(example.text) for example in examples) for examples in rows.values())
    tokens = np.full((len(rows), length), layout.pad_id, np.int64)
    segments = np.zeros((len(rows), length), np.int64)
    taught = np.full(tuple(batch.decoder_target_tokens.shape), -1, np.int64)
    for r, examples in enumerate(rows.values()):
        start = 0
        for n, example in enumerate(examples, start=1):
            here = slice(start, start + len(example.text))
            tokens[r, here] = np.concatenate([[layout.bos_id], example.text[:-1]])
            segments[r, here] = n
            spoken = example.taught
            taught[example.row, example.start + spoken] = r * length + start + example.places[spoken]
            start = here.stop
    device = batch.decoder_target_tokens.device
    packed = int(segments.max()) > 1
    ids = torch.from_numpy(segments).to(device) if packed else None
    return TeacherRows(torch.from_numpy(tokens).to(device), ids, torch.from_numpy(taught).to(device))


def _segments(ids: Tensor | None, mask: Tensor) -> np.ndarray:
    return (mask.long() if ids is None else ids).cpu().numpy()
