"""What the verbs of `generate.py` print for machines: a row of JSON for an answer, arrays for embeddings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encore.generate.embed import Embedding
    from encore.generate.request import Generation
    from encore.generate.text import Answer


def answer_row(index: int, answer: Answer) -> dict[str, Any]:
    """With drafts it says how many were accepted, with beams their scores, and further beams in `others`."""
    done = answer.generation
    row = {
        "index": index,
        "source": answer.source.text,
        **_target(done),
        "source_tokens": len(answer.source.tokens),
        "source_tokens_cut": answer.source.num_tokens_cut,
        "timings": {
            "first_token_seconds": round(done.first_token_seconds, 6),
            "seconds": round(done.seconds, 6),
            "tokens_per_second": round(len(done.tokens) / max(done.seconds, 1e-9), 3),
        },
    }
    if done.drafted:
        row["drafts"] = {"drafted": done.drafted, "accepted": done.accepted, "near_ties": done.near_ties}
    if answer.others:
        row["others"] = [_target(other) for other in answer.others]
    return row


def _target(done: Generation) -> dict[str, Any]:
    row = {
        "text": done.text,
        "tokens": done.tokens,
        "logprobs": [round(value, 6) for value in done.log_probabilities],
        "finish_reason": done.finish_reason,
        "stop": done.stop,
    }
    return row if done.score is None else {**row, "score": round(done.score, 6)}


def npz(items: Sequence[Embedding], *, pooled: bool) -> bytes:
    import numpy as np

    lengths = [len(item.tokens) for item in items]
    vectors = [item.vectors for item in items]
    empty = np.zeros((0, 0), np.float32)
    embeddings = empty if not items else np.stack(vectors) if pooled else np.concatenate(vectors)
    tokens = np.array([token for item in items for token in item.tokens], dtype=np.int64)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, embeddings=embeddings, tokens=tokens, offsets=offsets)
    return buffer.getvalue()
