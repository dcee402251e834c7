"""The loss of packed rows: that of their examples alone, in value and gradient, for every kind of model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from encore.data.batch import Batch
from encore.data.layout import Row, lay_out
from encore.objectives.losses import cross_entropy
from encore.train.loss import mean_loss, summed_loss, target_states
from encore.train.models import open_model

EXAMPLES = [([2, 400, 401, 1], [410, 411, 412, 1]), ([2, 402, 1], [413, 1]), ([2, *range(403, 415), 1], [420, 421, 1])]


def batch_of(groups: list[list[int]], *, encoder: bool) -> Batch:
    """Rows of these examples; packed if any row has several."""
    made = [Row(np.asarray(source) if encoder else None, np.asarray(target)) for source, target in EXAMPLES]
    packed = any(len(group) > 1 for group in groups)
    rows = [[made[i] for i in group] for group in groups]
    return Batch.of(lay_out(rows, bos_id=2, pad_id=0, segments=packed))


@pytest.mark.parametrize("kind", ["gemma3_text", "t5gemma", "t5gemma2"])
def test_packed_rows_lose_what_their_examples_do(tiny: Any, kind: str) -> None:
    encoder = kind != "gemma3_text"
    recipe = tiny.recipe("t5gemma2" if encoder else "causal", f"model.architecture.model_type={kind}")
    model = open_model(recipe.model, tiny.tokenizer, seed=3)
    found = []
    for groups in ([[0], [1], [2]], [[1, 0], [2]], [[2, 1, 0]]):
        batch = batch_of(groups, encoder=encoder)
        assert (batch.decoder_segment_ids is None) == (len(groups) == 3)
        loss = summed_loss(model, batch)
        parameters = [p for name, p in model.named_parameters() if "eoi_embedding" not in name]
        found.append((loss.detach(), *torch.autograd.grad(loss, parameters)))
        with torch.no_grad():
            assert mean_loss(model, [batch]) == pytest.approx(found[0][0].item() / 9, rel=1e-5)
    for packed in found[1:]:
        for one, other in zip(packed, found[0], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3_text", "t5gemma", "t5gemma2"])
def test_lookups_take_no_matrix_beside_the_gradient_of_the_head(tiny: Any, kind: str) -> None:
    encoder = kind != "gemma3_text"
    recipe = tiny.recipe("t5gemma2" if encoder else "causal", f"model.architecture.model_type={kind}")
    model = open_model(recipe.model, tiny.tokenizer, seed=3)
    batch = batch_of([[0], [1], [2]], encoder=encoder)
    head, targets = model.head_weight, batch.decoder_target_tokens.flatten()
    states = target_states(model, batch).flatten(0, 1)
    softcap = model.config.final_logit_softcapping
    plain, _ = cross_entropy(states, head, targets, batch.decoder_loss_weights.flatten(), softcap)
    (expected,) = torch.autograd.grad(plain, head)
    with torch.profiler.profile(profile_memory=True) as profile:
        summed_loss(model, batch).backward()
    events: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    matrices = [event for event in events if event.name() == "[memory]" and event.nbytes() == head.nbytes]
    assert len(matrices) == (2 if kind == "t5gemma" else 1)  # T5Gemma's encoder has an embedding of its own
    assert head.grad is not None and head.grad.layout == torch.strided
    torch.testing.assert_close(head.grad, expected, atol=1e-5, rtol=1e-5)
    summed_loss(model, batch).backward()
    torch.testing.assert_close(head.grad, 2 * expected, atol=1e-5, rtol=1e-5)
    model.zero_grad()
    target_states(model, batch).sum().backward()
    assert head.grad is not None and head.grad.layout == torch.strided, "a loss without the head has dense gradients"
