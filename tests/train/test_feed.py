"""Runs on mixtures and packed rows: they learn, resume exactly with other workers, and say what they read."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

import encore
from encore.data.pipeline import Batches
from encore.data.token_cache import Table
from encore.model.t5gemma import T5Gemma
from encore.train.feed import open_feed, reads_source
from encore.train.loop import RunResult
from encore.train.loss import summed_loss
from encore.train.metrics import TIME_FIELDS, Silent, read_metrics
from encore.train.models import open_model
from encore.train.pretrain import pretrain
from encore.train.reading import open_reading
from encore.train.recipe import Recipe
from encore.train.recipe_file import differences, load_recipe, to_toml
from encore.train.sft import tune


def mixture(tiny: Any, *changes: str, objective: str = "t5gemma2") -> Recipe:
    """A recipe with two sources, through a file, as a person would write it."""
    recipe = tiny.recipe(objective, "data.train=[]", *changes)
    sources = (
        f'[[data.sources]]\nname = "text"\nfiles = [{json.dumps(tiny.text)}]\nweight = 3\n'
        f"validation = [{json.dumps(tiny.text)}]\n\n"
        f'[[data.sources]]\nname = "pairs"\nfiles = [{json.dumps(tiny.pairs)}]\nobjective = "pairs"\n'
        f"validation = [{json.dumps(tiny.pairs)}]\n\n"
    )
    path = tiny.folder / "mixture.toml"
    path.write_text(
        to_toml(recipe).replace("sources = []\n", "").replace("[optim]", f"{sources}[optim]"), encoding="utf-8"
    )
    loaded = load_recipe(path)
    path.write_text(to_toml(loaded), encoding="utf-8")
    assert load_recipe(path) == loaded and not differences(loaded, load_recipe(path))
    return loaded


def rows(result: RunResult) -> list[dict[str, Any]]:
    found = read_metrics(result.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in found]


PACK = ("data.pack=true", "data.pool_examples=32", "train.batch_size=8")


def test_a_packed_mixture_learns_and_tells_each_source_apart(tiny: Any) -> None:
    result = pretrain(mixture(tiny, *PACK, "train.steps=8"), tiny.folder / "run", progress=Silent())
    last = rows(result)[-1]
    assert last["loss"] < result.losses[0][1]
    both = last["validation_loss_text"], last["validation_loss_pairs"]
    assert last["validation_loss"] == pytest.approx(0.75 * both[0] + 0.25 * both[1])
    told = json.loads((tiny.folder / "run" / "data.json").read_text())["sources"]
    assert [(source["name"], source["share"]) for source in told] == [("text", 0.75), ("pairs", 0.25)]
    assert [source["skipped"] for source in told] == [0, 0] and told[0]["records"] == 80
    assert isinstance(encore.load(result.model_folder), T5Gemma)


def test_a_stopped_run_goes_on_bit_for_bit_with_another_number_of_workers(tiny: Any) -> None:
    whole = pretrain(mixture(tiny, *PACK), tiny.folder / "whole", progress=Silent())
    recipe = mixture(tiny, *PACK)
    stopped = tiny.folder / "stopped"

    class Stop(Exception):
        pass

    class Stopping(Silent):
        def step(self, row: Any) -> None:
            if row["step"] == 6:
                raise Stop

    with pytest.raises(Stop):
        pretrain(recipe, stopped, progress=Stopping())
    resumed = pretrain(mixture(tiny, *PACK, "data.workers=2"), stopped, progress=Silent())
    assert rows(resumed) == rows(whole)
    one, other = (encore.load(result.model_folder).state_dict() for result in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model_type", ["t5gemma2", "t5gemma", "gemma3_text"])
def test_packed_rows_have_the_loss_of_single_rows(tiny: Any, model_type: str) -> None:
    """The same examples, several in a row or each alone: attention stays inside a segment, so the loss is the same."""
    objective = "causal" if model_type == "gemma3_text" else "t5gemma2"
    recipe = tiny.recipe(
        objective,
        f"model.architecture.model_type={model_type}",
        *("data.documents=separate", "data.window_tokens=40", "train.batch_size=8"),
    )
    model = open_model(recipe.model, tiny.tokenizer, 0).eval()
    encoder = isinstance(model, T5Gemma)
    shape = ("data.pack=true", "data.pool_examples=8", "data.encoder_row_tokens=400", "data.decoder_row_tokens=400")
    packed_recipe = _changed(recipe, tiny, *shape)
    alone, packed = (open_reading(r, tiny.tokenizer, encoder=encoder) for r in (recipe, packed_recipe))
    singles, together = Batches(alone.steps)(0), Batches(packed.steps)(0)
    cut = any(piece.start for row in packed.steps.pool(0).rows for piece in row)
    assert not cut and [len(batch.decoder_mask) for batch in together] == [1]
    with torch.no_grad():
        losses = [sum(float(summed_loss(model, batch)) for batch in batches) for batches in (singles, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert sum(b.num_tokens for b in singles) == sum(b.num_tokens for b in together)


def _changed(recipe: Recipe, tiny: Any, *changes: str) -> Recipe:
    path = tiny.folder / "changed.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    return load_recipe(path, changes)


@pytest.mark.parametrize("changes", [(), (*PACK, "data.documents=separate"), ("data.lengths=budget",)])
def test_without_a_cache_text_is_tokenised_on_the_fly(tiny: Any, changes: tuple[str, ...]) -> None:
    """No table of the training text is written; a stopped run goes on bit for bit, with another number of workers."""
    limits = ("data.max_source_tokens=24", "data.max_target_tokens=24", f"data.validation={json.dumps([tiny.text])}")
    recipe = tiny.recipe("t5gemma2", "data.cache=false", "train.log_every_steps=1", *limits, *changes)
    whole = pretrain(recipe, tiny.folder / "whole", progress=Silent())
    assert len(list((tiny.folder / "cache" / "texts").glob("[!.]*"))) == 1
    held_out = list((tiny.folder / "cache" / "tokens").glob("[!.]*"))
    assert len(held_out) == 1 and Table.open(held_out[0]).tally.records <= 80
    half = tiny.folder / "half"
    shutil.copytree(whole.folder, half)
    shutil.rmtree(half / "checkpoints" / "step-000008")
    shutil.rmtree(half / "model")
    resumed = pretrain(_changed(recipe, tiny, "data.workers=2"), half, progress=Silent())
    assert rows(resumed) == rows(whole) and whole.losses[-1][0] == 8
    kept = pretrain(_changed(recipe, tiny, "data.cache=true"), tiny.folder / "kept", progress=Silent())
    assert kept.validation_losses[0] == pytest.approx(whole.validation_losses[0])  # held-out examples are the same
    assert rows(kept) != rows(whole)


def test_pairs_on_the_fly(tiny: Any) -> None:
    recipe = tiny.recipe("pairs", "data.cache=false", f"data.validation={json.dumps([tiny.pairs])}")
    one = tune(recipe, tiny.folder / "one", progress=Silent())
    two = tune(_changed(recipe, tiny, "data.workers=1"), tiny.folder / "two", progress=Silent())
    assert rows(one) == rows(two) and one.validation_losses[-1][1] < one.validation_losses[0][1]
    assert tune(_changed(recipe, tiny, *PACK), tiny.folder / "packed", progress=Silent()).steps == 8


def test_tuning_on_packed_pairs(tiny: Any) -> None:
    recipe = tiny.recipe("pairs", *PACK, "train.steps=6", f"data.validation={json.dumps([tiny.pairs])}")
    result = tune(recipe, tiny.folder / "run", progress=Silent())
    assert result.validation_losses[-1][1] < result.validation_losses[0][1]
    unpacked = tune(tiny.recipe("pairs", "data.workers=1"), tiny.folder / "one", progress=Silent())
    alone = tune(tiny.recipe("pairs"), tiny.folder / "two", progress=Silent())
    assert rows(unpacked) == rows(alone)


def test_a_worker_that_dies_keeps_the_last_checkpoint(tiny: Any) -> None:
    recipe = tiny.recipe("t5gemma2", "data.workers=1", "train.steps=200", "train.checkpoint_every_steps=2")

    class Killing(Silent):
        def step(self, row: Any) -> None:
            if row["step"] == 3:
                feed.batches._arrays._workers[0].process.kill()

    import encore.train.pretrain as module

    opened = module.open_feed
    feed: Any = None

    def open_and_keep(*arguments: Any, **options: Any) -> Any:
        nonlocal feed
        feed = opened(*arguments, **options)
        return feed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_feed", open_and_keep)
        with pytest.raises(ValueError, match="killed by SIGKILL"):
            pretrain(recipe, tiny.folder / "run", progress=Killing())
    assert (tiny.folder / "run" / "checkpoints" / "step-000002" / "config.json").is_file()


def test_sources_say_what_is_wrong(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"'causal' but the model is an encoder-decoder"):
        open_feed(tiny.recipe("causal"), tiny.tokenizer, encoder=True)
    bad = tiny.write("bad.jsonl", [{"other": "x"}])
    with pytest.raises(ValueError, match="all 1 records are damaged"):
        open_feed(tiny.recipe("t5gemma2", f"data.train=[{bad!r}]"), tiny.tokenizer, encoder=True)
    with pytest.raises(ValueError, match="no piece absent"):
        open_feed(tiny.recipe("ul2", 'data.mode_tokens=["absent", "<pad>", "<eos>"]'), tiny.tokenizer, encoder=True)
    with pytest.raises(ValueError, match=r"'short_spans_light' needs .* 64; set data\.window_tokens to 12"):
        open_feed(tiny.recipe("t5gemma2", "data.window_tokens=2000"), tiny.tokenizer, encoder=True)
    for change, message in (
        ("data.sources=[{files=['a']}]", "both given"),
        ("data.mode_tokens=['a']", "expected three"),
        ("data.pool_examples=0", "expected more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.recipe("t5gemma2", change)


def test_which_recipes_have_an_encoder(tiny: Any) -> None:
    assert reads_source(tiny.recipe("t5gemma2")) and not reads_source(tiny.recipe("causal"))
    assert not reads_source(tiny.recipe("pairs"))
    assert reads_source(tiny.recipe("pairs", "model.architecture.model_type=t5gemma"))
    assert reads_source(tiny.recipe("pairs", "model.init=asset:translator"))
    assert not reads_source(tiny.recipe("pairs", "model.init=asset:source"))
    assert reads_source(tiny.recipe("pairs", "model.init=t5gemma-2-270m-270m"))
