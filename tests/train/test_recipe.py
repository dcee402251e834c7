"""Recipes: TOML and back, changes from the command line, and errors that name what was meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encore.train.recipe import (
    DataRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    TrainRecipe,
)
from encore.train.recipe_file import differences, load_recipe, recipe_from_table, to_toml

text = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20)
recipes = st.builds(
    Recipe,
    objective=text,
    model=st.builds(ModelRecipe, init=text),
    data=st.builds(DataRecipe, train=st.lists(text, max_size=3).map(tuple), window_tokens=st.integers(1, 10**6)),
    optim=st.builds(
        OptimRecipe, learning_rate=st.floats(0, 1), epsilon=st.floats(1e-12, 1), decay_embeddings=st.booleans()
    ),
    train=st.builds(TrainRecipe, steps=st.integers(1, 10**9)),
)


@given(recipes)
def test_toml_there_and_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.stpes=3", r"unknown key train.stpes; did you mean train\.steps\?"),
        ("steps=3", r"did you mean train\.steps\?"),
        ("optimizer.learning_rate=1", r"did you mean optim\.learning_rate\?|did you mean optim\?"),
        ("model.architecture.hidden=3", r"did you mean model\.architecture\.hidden_size\?"),
        ("train.steps=many", r"train\.steps is 'many'; expected a whole number"),
        ("train.steps=1.5", r"expected a whole number"),
        ("train.steps=true", r"expected a whole number"),
        ("train.steps=0", r"train\.steps is 0; expected more than 0"),
        ("optim.learning_rate=-1", r"expected 0 or more"),
        ("optim.beta2=1.0", r"less than 1"),
        ("optim.decay_embeddings=1", r"expected true or false"),
        ("train.precision=float16", r"expected one of 'auto', 'float32', 'bfloat16'"),
        ("data.train=3", r"expected a list"),
        ("data.train=[3]", r"expected a string"),
        ("train=3", r"train is a group of keys"),
        ("train.steps", r"expected key=value"),
        ("objective.name=3", r"objective is {.name.: 3}; expected a string"),
    ],
)
def test_bad_keys_and_values(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(None, [change])


def test_changes_are_typed_and_the_last_one_wins() -> None:
    recipe = load_recipe(
        None,
        [
            "train.steps=5",
            "train.steps=6",
            "objective=t5gemma2",
            "optim.learning_rate=1",
            "data.train=a.jsonl",
            'model.init="x y"',
        ],
    )
    assert (recipe.train.steps, recipe.objective, recipe.model.init) == (6, "t5gemma2", "x y")
    assert recipe.optim.learning_rate == 1.0 and isinstance(recipe.optim.learning_rate, float)
    assert recipe.data.train == ("a.jsonl",)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3", encoding="utf-8")
    with pytest.raises(ValueError, match="not a TOML file"):
        load_recipe(tmp_path / "bad.toml")
    with pytest.raises(ValueError, match="unknown key"):
        recipe_from_table({"train": {"epochs": 3}})


def test_differences() -> None:
    one = Recipe()
    assert differences(one, replace(one, train=TrainRecipe(steps=7))) == {"train.steps": (1000, 7)}


@pytest.mark.parametrize("name", ["source", "ul2", "translate", "mixture"])
def test_the_shipped_recipes_load(name: str) -> None:
    path = Path(__file__).parents[2] / "recipes" / f"{name}.toml"
    data = load_recipe(path).data
    assert data.train or data.sources
