"""tune(): a model learns to answer: pairs of source and target (supervised fine-tuning).

    encoder-decoder   the encoder reads the source, the decoder writes the target and EOS
    decoder-only      BOS, source, EOS, target, EOS as one text; only the target and its EOS are learned

Both kinds get the same pairs in the same batches, so that they can be compared.
"""

from __future__ import annotations

from pathlib import Path

from encore.train.loop import RunResult
from encore.train.metrics import Progress
from encore.train.pretrain import train
from encore.train.recipe import Recipe


def tune(
    recipe: Recipe, out: str | Path, *, resume: bool = True, progress: Progress | None = None, name: str = "tune"
) -> RunResult:
    """Train as the recipe says into the run folder `out`; an interrupted run goes on. Raises as `fit` does."""
    if recipe.objective not in ("pairs", "pictures"):
        raise ValueError(
            f'objective is {recipe.objective!r}; tune takes "pairs" or "pictures" (pretrain takes the others)'
        )
    return train(recipe, out, resume=resume, progress=progress, name=name)
