"""The batch: shifted once, BOS first, EOS last, nothing learned from padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encore.data.batch import decoder_batch, encoder_decoder_batch

PAD, EOS, BOS = 0, 1, 2
a, b, c, d, x, y, z = range(10, 17)


def test_the_arrays_of_the_docstring() -> None:
    batch = encoder_decoder_batch([[a, b, c], [d]], [[x, y, EOS], [z, EOS]], bos_id=BOS, pad_id=PAD)
    assert batch.encoder_input_tokens is not None and batch.encoder_mask is not None
    assert batch.encoder_input_tokens.tolist() == [[a, b, c], [d, PAD, PAD]]
    assert batch.encoder_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.decoder_input_tokens.tolist() == [[BOS, x, y], [BOS, z, PAD]]
    assert batch.decoder_target_tokens.tolist() == [[x, y, EOS], [z, EOS, PAD]]
    assert batch.decoder_loss_weights.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.decoder_mask.tolist() == [[True] * 3, [True, True, False]]
    assert batch.total_weight == 5 and batch.num_tokens == 9


def test_decoder_only_learns_after_the_prompt() -> None:
    batch = decoder_batch([[a, b, EOS, x, EOS], [c, EOS, y]], [3, 2], bos_id=BOS, pad_id=PAD)
    assert batch.encoder_input_tokens is None and batch.encoder_mask is None
    assert batch.decoder_input_tokens.tolist() == [[BOS, a, b, EOS, x], [BOS, c, EOS, PAD, PAD]]
    assert batch.decoder_target_tokens.tolist() == [[a, b, EOS, x, EOS], [c, EOS, y, PAD, PAD]]
    assert batch.decoder_loss_weights.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]


rows = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=5)


@given(rows)
def test_inputs_are_the_targets_shifted_once(targets: list[list[int]]) -> None:
    batch = encoder_decoder_batch(targets, targets, bos_id=BOS, pad_id=PAD)
    for i, row in enumerate(targets):
        real = batch.decoder_mask[i]
        assert batch.decoder_target_tokens[i][real].tolist() == row
        assert batch.decoder_input_tokens[i][real].tolist() == [BOS, *row[:-1]]
        assert torch.equal(batch.decoder_loss_weights[i] > 0, real)


@pytest.mark.parametrize(("sources", "targets"), [([[]], [[EOS]]), ([[a]], [[]]), ([], [])])
def test_empty_rows_are_refused(sources: list[list[int]], targets: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        encoder_decoder_batch(sources, targets, bos_id=BOS, pad_id=PAD)


def test_a_row_of_prompt_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="all prompt"):
        decoder_batch([[a, b]], [2], bos_id=BOS, pad_id=PAD)
