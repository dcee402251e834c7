"""Many processes learn what one learns: sharded, split, replicated; killed, stopped, and on another number of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import encore
from encore.checkpoint.training import RunFolder
from encore.train.distill_logits import distill_logits
from encore.train.metrics import TIME_FIELDS, Silent, read_metrics
from encore.train.models import open_model
from encore.train.parallel import layers_of, mesh_shape, units_of
from encore.train.pretrain import pretrain
from encore.train.recipe import TrainRecipe
from encore.train.recipe_file import load_recipe, to_toml

LAUNCHER = Path(__file__).with_name("launcher.py")
KINDS = {
    "causal": ("causal",),
    "t5gemma2": ("t5gemma2",),
    "t5gemma": (
        "t5gemma2",
        "model.architecture.model_type=t5gemma",
        "model.architecture.num_key_value_heads=2",
        "optim.cross_attention_warmup_steps=1",
    ),
}
Answer = tuple[int, str, str]


class Launcher:
    """`launcher.py`, started once."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, str(LAUNCHER)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(
        self, world: int, recipe: Path, out: Path, *changes: str, signal: tuple[int, int, int] | None = None
    ) -> list[Answer]:
        """Run `encore pretrain` on `world` processes."""
        options = [part for change in changes for part in ("--set", change)]
        request = {
            "world": world,
            "arguments": ["pretrain", str(recipe), "--out", str(out), "--quiet", *options],
            "seconds": 150,
            "signal": signal,
        }
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return [(status, out, err) for status, out, err in json.loads(self.process.stdout.readline())]

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


def recipe_of(tiny: Any, kind: str, *changes: str) -> Path:
    recipe = tiny.recipe(
        *KINDS[kind],
        *("train.steps=4", "train.checkpoint_every_steps=2", "train.keep_last=9", "train.evaluate_every_steps=4"),
        *("model.architecture.num_attention_heads=4", "train.batch_size=6", "train.precision=float32"),
        f"data.validation={json.dumps([tiny.text])}",
        *changes,
    )
    path = tiny.folder / f"{kind}.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    return path


def alone(recipe: Path, out: Path) -> Path:
    """The run in this one process."""
    pretrain(load_recipe(recipe), out, progress=Silent())
    return out


def finished(answers: list[Answer], run: Path) -> None:
    assert answers == [(0, f"{run / 'model'}\n" if rank == 0 else "", "") for rank in range(len(answers))]


def assert_alike(one: Path, many: Path) -> None:
    """The same lines of metrics and the same weights, within float tolerance."""
    left, right = read_metrics(one / "metrics.jsonl"), read_metrics(many / "metrics.jsonl")
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - set(TIME_FIELDS):
            assert b[key] == pytest.approx(a[key], rel=2e-4), (a["step"], key)
    theirs = encore.load(many / "model").state_dict()
    for name, weight in encore.load(one / "model").state_dict().items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=3e-4, msg=name)


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_metrics(run / "metrics.jsonl")]


def back_to(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was after the checkpoint of `step`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model", ignore_errors=True)
    for checkpoint in RunFolder(copy).checkpoints():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.folder)
    return copy


def test_a_killed_process_ends_the_run_which_goes_on_with_two_or_one(tiny: Any, launch: Launcher) -> None:
    """T5Gemma 2 sharded over two, with accumulation. After a kill: two again bit for bit, one within tolerance."""
    recipe = recipe_of(tiny, "t5gemma2", "train.accumulation_steps=2", "train.checkpoint_every_steps=1")
    one, two, killed = alone(recipe, tiny.folder / "one"), tiny.folder / "two", tiny.folder / "killed"
    finished(launch(2, recipe, two), two)
    assert_alike(one, two)
    assert not list(two.rglob("*.pt")) and not list(two.rglob(".metadata")) and not list(two.rglob(".writing-*"))

    (left, _, said), (gone, _, _) = launch(2, recipe, killed, signal=(1, 2 * 3 + 2, signal.SIGKILL))
    assert gone == -signal.SIGKILL and left == 2, said
    assert "encore: error: process 0 of 2 lost contact with another one" in said
    assert re.search(r"the last good checkpoint is .*step-00000[23]", said) and "Traceback" not in said
    assert not (killed / "model").exists()

    fewer = back_to(killed, 2, tiny.folder / "fewer")
    finished(launch(2, recipe, killed), killed)
    assert without_times(killed) == without_times(two)
    for folder in ("model", "checkpoints/step-000004/training/shards"):
        for file in sorted((two / folder).glob("*.safetensors")):
            mine, theirs = load_file(killed / folder / file.name), load_file(file)
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert_alike(one, alone(recipe, fewer))


def test_decoder_only_on_four(tiny: Any, launch: Launcher) -> None:
    recipe, many = recipe_of(tiny, "causal"), tiny.folder / "many"
    finished(launch(4, recipe, many), many)
    assert_alike(alone(recipe, tiny.folder / "one"), many)


def test_split_layers_and_a_stop_that_one_process_hears(tiny: Any, launch: Launcher) -> None:
    """T5Gemma on 2 x 2, through the end of the cross-attention's warm-up; SIGTERM to one stops all after one step."""
    recipe, many = recipe_of(tiny, "t5gemma"), tiny.folder / "many"
    ways = ("train.tensor_parallel=2", "train.activation_checkpointing=true")
    answers = launch(4, recipe, many, *ways, signal=(3, 3, signal.SIGTERM))
    assert [status for status, _, _ in answers] == [128 + signal.SIGTERM] * 4
    assert all("stopped after step 3" in said for _, _, said in answers), answers
    assert [checkpoint.step for checkpoint in RunFolder(many).checkpoints()] == [2, 3]
    assert_alike(alone(recipe, tiny.folder / "one"), alone(recipe, many))


@pytest.mark.parametrize("world", [2, 4])
def test_a_teacher_beside_split_students(tiny: Any, launch: Launcher, world: int) -> None:
    """Logits of teacher and student split over the vocabulary; from a running teacher, and on two from its top k."""
    teacher = open_model(tiny.recipe("causal", "model.architecture.hidden_size=48").model, tiny.tokenizer, seed=9)
    with torch.no_grad():
        teacher.head_weight.mul_(8)  # far from the uniform distribution
    encore.save(teacher, tiny.folder / "teacher", tokenizer=tiny.tokenizer)
    distill = (f"distill.teacher={tiny.folder / 'teacher'}", "distill.alpha=0.7", "distill.temperature=1.5")
    short = ("train.steps=2", "train.evaluate_every_steps=2")
    recipe = recipe_of(tiny, "t5gemma2", *short, *distill, "distill.top_k=40")
    if world == 2:
        distill_logits(load_recipe(recipe), tiny.folder / "logits")
        recipe = recipe_of(tiny, "t5gemma2", *short, *distill, f"distill.logits={tiny.folder / 'logits'}")
    many = tiny.folder / "many"
    finished(launch(world, recipe, many, f"train.tensor_parallel={world}"), many)
    one = alone(recipe, tiny.folder / "one")
    assert_alike(one, many)
    assert read_metrics(one / "metrics.jsonl")[-1]["validation_divergence"] > 0.05


def test_many_go_on_from_one(tiny: Any, launch: Launcher) -> None:
    """From a checkpoint of one process: two that split layers, then two whole copies; the model is a mean."""
    recipe = recipe_of(tiny, "t5gemma2", "train.average_last=2")
    one = alone(recipe, tiny.folder / "one")
    many = back_to(one, 2, tiny.folder / "many")
    finished(launch(2, recipe, many, "train.tensor_parallel=2"), many)
    assert_alike(one, many)
    copies = back_to(many, 2, tiny.folder / "copies")
    finished(launch(2, recipe, copies, "train.shard=none"), copies)
    assert_alike(one, copies)


def test_processes_that_do_not_fit_the_recipe() -> None:
    assert mesh_shape(TrainRecipe(tensor_parallel=2), 6) == (3, 2)
    assert mesh_shape(TrainRecipe(data_parallel=3), 3) == (3, 1)
    with pytest.raises(ValueError, match=r"1 process was started, .* a multiple of 2: torchrun --nproc-per-node 2 "):
        mesh_shape(TrainRecipe(tensor_parallel=2), 1)
    with pytest.raises(ValueError, match=r"4 processes were started, .* ask for 3 x 2 = 6: torchrun"):
        mesh_shape(TrainRecipe(data_parallel=3, tensor_parallel=2), 4)


def test_layers_that_share_a_parameter_are_no_units() -> None:
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(3))
            self.layers[1][0] = self.layers[0][0]  # pyright: ignore

    stack = Stack()
    assert layers_of(stack) == list(stack.layers)
    assert units_of(layers_of(stack)) == [stack.layers[2]]


COMPILED = ("train.compile=true", "train.compile_backend=eager", "train.activation_checkpointing=true")


def test_compiled_layers_learn_the_same(tiny: Any, launch: Launcher) -> None:
    """Captured by torch.compile, with activation checkpointing, sharded over two."""
    recipe = recipe_of(tiny, "t5gemma2", "train.steps=2", "train.evaluate_every_steps=2")
    plain = alone(recipe, tiny.folder / "plain")
    finished(launch(2, recipe, tiny.folder / "two", *COMPILED), tiny.folder / "two")
    assert_alike(plain, tiny.folder / "two")


@pytest.mark.parametrize("kind", ["causal", "t5gemma2"])
def test_activation_checkpointing_changes_nothing(tiny: Any, kind: str) -> None:
    """Alone, bit for bit: the same products are made, twice."""
    plain = alone(recipe_of(tiny, kind), tiny.folder / "plain")
    again = alone(recipe_of(tiny, kind, "train.activation_checkpointing=true"), tiny.folder / "again")
    assert without_times(plain) == without_times(again)
