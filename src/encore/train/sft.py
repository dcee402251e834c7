"""tune(): a model learns to answer: pairs of source and target (supervised fine-tuning).

    encoder-decoder   the encoder reads the source, the decoder writes the target and EOS
    decoder-only      BOS, source, EOS, target, EOS as one text; only the target and its EOS are learned

Both kinds get the same pairs in the same batches, so that they can be compared.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

from encore.checkpoint.training import RunFolder
from encore.data.pipeline import PairBatches, TokenPair, tokenize_pairs
from encore.data.sources import pairs, tokenizer_fingerprint
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import SourceFormat, Tokenizer
from encore.train.loop import Evaluate, RunResult, fit
from encore.train.loss import mean_loss
from encore.train.metrics import Progress
from encore.train.pretrain import open_model, open_tokenizer
from encore.train.recipe import DataRecipe, Recipe


def tune(
    recipe: Recipe, out: str | Path, *, resume: bool = True, progress: Progress | None = None, name: str = "tune"
) -> RunResult:
    """Train as the recipe says into the run folder `out`; an interrupted run goes on. Raises as `fit` does."""
    if recipe.objective != "pairs":
        raise ValueError(f'objective is {recipe.objective!r}; tune takes "pairs" (pretrain takes the others)')
    if not recipe.data.train:
        raise ValueError("the recipe names no pairs; set data.train, for example to asset:pairs/train")
    tokenizer = open_tokenizer(recipe.model)
    model = open_model(recipe.model, tokenizer, recipe.train.seed)
    encoder = isinstance(model, T5Gemma)
    if not encoder:  # the EOS is the boundary between source and target: no text contains it
        tokenizer = tokenizer.with_source_format(SourceFormat(bos=True, eos=True))
    train = _read(recipe.data, recipe.data.train, tokenizer, recipe.data.max_pairs)
    batches = PairBatches(
        train,
        tokenizer,
        encoder=encoder,
        batch_tokens=recipe.data.batch_tokens,
        accumulation_steps=recipe.train.accumulation_steps,
        seed=recipe.train.seed,
    )
    evaluate = _validation(recipe, tokenizer, encoder=encoder) if recipe.data.validation else None
    return fit(
        model,
        batches,
        recipe,
        RunFolder(out),
        tokenizer=tokenizer,
        data_fingerprint=_fingerprint(train, tokenizer),
        evaluate=evaluate,
        resume=resume,
        progress=progress,
        name=name,
    )


def _read(recipe: DataRecipe, names: tuple[str, ...], tokenizer: Tokenizer, max_pairs: int = 0) -> list[TokenPair]:
    return tokenize_pairs(
        itertools.islice(pairs(names, recipe.source_key, recipe.target_key), max_pairs or None),
        tokenizer,
        max_source_tokens=recipe.max_source_tokens,
        max_target_tokens=recipe.max_target_tokens,
    )


def _validation(recipe: Recipe, tokenizer: Tokenizer, *, encoder: bool) -> Evaluate:
    held_out = _read(recipe.data, recipe.data.validation, tokenizer)[: recipe.data.validation_pairs]
    batches = PairBatches(held_out, tokenizer, encoder=encoder, batch_tokens=recipe.data.batch_tokens).in_order(
        recipe.data.validation_pairs
    )
    return lambda model: {"validation_loss": mean_loss(model, batches)}


def _fingerprint(train: list[TokenPair], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer_fingerprint(tokenizer).encode())
    for pair in train:
        digest.update(len(pair.source).to_bytes(4, "little") + pair.source.tobytes() + pair.target.tobytes())
    return digest.hexdigest()
