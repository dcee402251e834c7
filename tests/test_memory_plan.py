"""The memory plan against what a real model, its optimizer, its activations and its loss take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from encore.config import GemmaConfig, ModelConfig, T5GemmaConfig
from encore.memory_plan import Activations, Planner, loss_peak, make_planner, trace, units
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.objectives.losses import cross_entropy
from encore.presets import PRESETS, layer_types, preset
from encore.train.optim import make_optimizer
from encore.train.recipe import OptimRecipe

DOCS = Path(__file__).parent.parent / "docs" / "memory_plan.md"


def small(kind: str) -> ModelConfig:
    """Seven layers a stack, so that most are stood for by others; width 64."""
    stack = replace(
        preset("encore-small").stack,  # pyright: ignore
        **dict(vocab_size=96, hidden_size=64, intermediate_size=128, head_dim=16, sliding_window=24),
        **dict(num_hidden_layers=7, layer_types=layer_types(7, 3), query_pre_attn_scalar=16),
    )
    if kind == "gemma3_text":
        return GemmaConfig("gemma3_text", stack)
    if kind == "t5gemma":
        stack = replace(stack, qk_norm=False, attn_logit_softcapping=50.0)
    return T5GemmaConfig(kind, stack, stack, 30.0 if kind == "t5gemma" else None)  # pyright: ignore


def build(config: ModelConfig) -> Any:
    model = Gemma(config) if isinstance(config, GemmaConfig) else T5Gemma(config)
    model.init_weights()
    return model


def states(model: Any, source_tokens: int, target_tokens: int) -> torch.Tensor:
    source, target = (torch.randint(3, 90, (1, n)) for n in (source_tokens, target_tokens))
    return model.states(torch.cat((source, target), 1)) if isinstance(model, Gemma) else model.states(source, target)


def allocated_peak(run: Callable[[], object]) -> int:
    """The most that torch's allocator gave out while this ran, by its own profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # pyright: ignore
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2", "gemma3_text"])
def test_weights_moments_and_gradients_are_those_of_a_real_model(kind: str) -> None:
    model = build(small(kind))
    optimizer = make_optimizer(model, OptimRecipe())
    states(model, 20, 12).sum().backward()
    for parameter in model.parameters():  # the head's, and the vector of pictures
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    planned = make_planner(small(kind), 20, 12).plan(1)
    parameters = list(model.parameters())
    assert planned.weights == sum(p.nbytes for p in parameters)
    assert planned.gradients == sum(p.grad.nbytes for p in parameters)
    assert planned.moments == sum(
        state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    layers, root = units(model)
    assert root + sum(layers) == sum(p.numel() for p in parameters)
    assert len(layers) == (7 if kind == "gemma3_text" else 14)
    assert root == sum(p.numel() for n, p in model.named_parameters() if ".layers." not in f".{n}")


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2", "gemma3_text"])
def test_what_the_forward_keeps_is_what_autograd_saves(kind: str) -> None:
    """All seven layers run for real in float32; the plan runs four without memory."""
    model = build(small(kind))
    saved: dict[int, torch.UntypedStorage] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = states(model, 130, 70)
    measured = sum(storage.nbytes() for storage in saved.values())
    planned = trace(small(kind), 130, 70, torch.float32)[False].kept
    assert planned == pytest.approx(measured, rel=0.002)
    del out


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2", "gemma3_text"])
def test_the_peak_of_forward_and_backward_is_what_the_allocator_gave(kind: str) -> None:
    """Long rows, so that activations outweigh the gradients, of which the plan counts those of one layer here."""
    model = build(small(kind))
    states(model, 300, 200).sum().backward()  # gradients are there: none is allocated in what follows

    def step() -> None:
        out = states(model, 300, 200)
        out.backward(torch.ones_like(out))

    planned = trace(small(kind), 300, 200, torch.float32)[False]
    assert planned.kept + planned.layer == pytest.approx(allocated_peak(step), rel=0.07)


def test_with_checkpointing_inputs_are_kept_and_one_layer_is_made_anew() -> None:
    config = small("t5gemma2")
    assert isinstance(config, T5GemmaConfig)
    planned = trace(config, 130, 70, torch.float32)
    longer = replace(config.encoder, num_hidden_layers=9, layer_types=layer_types(9, 3))
    more = trace(replace(config, encoder=longer), 130, 70, torch.float32)
    assert more[True].kept - planned[True].kept == 2 * 4 * 64 * 130  # two layers more: two inputs more
    assert more[True].layer == pytest.approx(planned[True].layer, rel=0.05)
    assert planned[True].layer > planned[False].layer
    assert planned[True].kept < planned[False].kept / 5


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_loss_takes_what_the_allocator_gave(softcap: float | None) -> None:
    """bfloat16 states and head, as FSDP gathers them."""
    vocab_size, width, tokens = 40_000, 64, 300  # three chunks of 100 on a CPU
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    head = torch.randn(vocab_size, width).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab_size, (tokens,))

    def step() -> None:
        loss, _ = cross_entropy(x, head, targets, softcap=softcap)
        loss.backward()

    planned = loss_peak(head.shape, tokens, softcap, device="cpu")
    assert planned == pytest.approx(allocated_peak(step), rel=0.03)


def test_the_plan_is_arithmetic() -> None:
    planner = Planner(1000, 100, 50, 960, {False: Activations(700, 60), True: Activations(70, 600)})
    one, four = planner.plan(1), planner.plan(4)
    assert (one.weights, one.moments, one.gradients, one.root) == (4000, 8000, 4000, 400)
    assert four.sharded == one.sharded // 4
    assert one.at_work == 960  # the loss
    assert one.peak == 16000 + 400 + 700 + 960
    assert planner.plan(1, checkpointing=True).at_work == 8 * 50 + 600
    fit = planner.rows_that_fit(4, 20_000, checkpointing=False)
    assert planner.plan(4, fit).peak <= 20_000 < planner.plan(4, fit + 1).peak
    assert planner.rows_that_fit(1, 16_000, checkpointing=True) == 0
    with pytest.raises(ValueError, match="devices is 0"):
        planner.plan(0)


def test_the_documented_tables_are_of_the_released_sizes() -> None:
    """What does not need a trace of each: 16 bytes of state per parameter, and the root."""
    tables = DOCS.read_text(encoding="utf-8").split("\n## ")[1:]
    assert [table.split(",")[0] for table in tables] == [name for name in PRESETS if name.startswith("t5gemma-")]
    for table in tables:
        with torch.device("meta"):
            model = T5Gemma(preset(table.split(",")[0]))  # pyright: ignore
        layers, root = units(model)
        for line in table.splitlines()[4:]:
            devices, state, at_work = line.strip("| ").split(" | ")[:3]
            assert state == f"{16 * -(-(sum(layers) + root) // int(devices)) / 1e9:.1f}", line
            assert at_work == f"{4 * root / 1e9:.1f}", line
