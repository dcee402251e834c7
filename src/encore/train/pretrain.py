"""pretrain(): a model reads text. Causal LM for a decoder-only one, a denoising mixture for the others.

data = DataRecipe(train=("asset:text/train",))
recipe = Recipe(objective="t5gemma2", model=ModelRecipe(init="runs/adapted"), data=data)
result = pretrain(recipe, "runs/ul2")        # -> runs/ul2/model
"""

from __future__ import annotations

from pathlib import Path

from encore.checkpoint.training import RunFolder
from encore.model.t5gemma import T5Gemma
from encore.train.distill import evaluation, open_distillation
from encore.train.feed import open_feed
from encore.train.loop import RunResult, fit
from encore.train.loss import summed_loss
from encore.train.metrics import Progress
from encore.train.models import open_model, open_tokenizer
from encore.train.parallel import Processes, open_processes
from encore.train.picture_features import has_pictures, what_pictures_become
from encore.train.recipe import Recipe


def pretrain(
    recipe: Recipe, out: str | Path, *, resume: bool = True, progress: Progress | None = None, name: str = "pretrain"
) -> RunResult:
    """Train as the recipe says into the run folder `out`; an interrupted run goes on. Raises as `fit` does."""
    if recipe.objective == "pairs":
        raise ValueError(
            'objective is "pairs", which is for tune; pretrain takes "causal" or a mixture of ul2.MIXTURES'
        )
    return train(recipe, out, resume=resume, progress=progress, name=name)


def train(recipe: Recipe, out: str | Path, *, resume: bool, progress: Progress | None, name: str) -> RunResult:
    """What pretrain and tune have in common: everything but the name of the objective."""
    with open_processes(recipe.train) as processes:
        return _train(recipe, out, processes, resume=resume, progress=progress, name=name)


def _train(
    recipe: Recipe, out: str | Path, processes: Processes, *, resume: bool, progress: Progress | None, name: str
) -> RunResult:
    tokenizer = open_tokenizer(recipe.model)
    with_pictures = has_pictures(recipe)
    model = open_model(recipe.model, tokenizer, recipe.train.seed, vision=with_pictures)
    pictures = what_pictures_become(model, recipe) if with_pictures else None
    with processes.first_goes_ahead():  # it tokenises, the others read its cache
        feed = open_feed(recipe, tokenizer, encoder=isinstance(model, T5Gemma), pictures=pictures)
        feed.write_report(out)
    distillation = open_distillation(recipe, feed.tokenizer, model.head_weight.shape[0])
    try:
        return fit(
            model,
            feed.batches,
            recipe,
            RunFolder(out),
            tokenizer=feed.tokenizer,
            data_fingerprint=feed.fingerprint + (distillation.teacher.fingerprint if distillation else ""),
            evaluate=feed.evaluation(lambda batches: evaluation(batches, distillation)),
            loss=distillation or summed_loss,
            resume=resume,
            progress=progress,
            name=name,
        )
    finally:
        feed.close()
