"""The engine, drafts and beams over exported graphs give what they give in torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import encore
from encore.export.folder import export
from encore.generate.backends import make_rows, memory_plan
from encore.generate.batch import beam_search, generate
from encore.generate.beam import BeamSettings
from encore.generate.drafts import DraftSettings
from encore.generate.engine import Engine
from encore.generate.onnx_backend import OnnxModel
from encore.generate.rows import Size
from encore.generate.sampling import SamplingSettings
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import Tokenizer

WINDOW = 6
GREEDY = SamplingSettings(max_target_tokens=4 * WINDOW, stop_ids=())
COPIES = DraftSettings(max_tokens=5, ngram=2, adaptive=False)
each_kind = pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
Pair = tuple[T5Gemma, OnnxModel]


@pytest.fixture(scope="module")
def pair(tiny: Callable, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """pair(kind, weights) -> the model in torch, and exported."""
    made: dict[tuple[str, str], Pair] = {}

    def make(kind: str, weights: str = "float32") -> Pair:
        if (kind, weights) not in made:
            folder: Path = tmp_path_factory.mktemp("models")
            config = tiny(kind).config
            wider = dataclasses.replace(config.decoder, head_dim=16, hidden_size=32, intermediate_size=64)
            model = T5Gemma(dataclasses.replace(config, encoder=wider, decoder=wider))
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    std = 0.3 if parameter.dim() == 1 or "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            encore.save(model.eval(), folder / "checkpoint", tokenizer=tokenizer)
            export(folder / "checkpoint", folder / "exported", weights)  # pyright: ignore[reportArgumentType]
            made[kind, weights] = model, OnnxModel.load(folder / "exported", threads=1)
        return made[kind, weights]

    return make


def sources(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 61, rng.integers(1, longest)).tolist() for _ in range(count)]


@each_kind
def test_requests_that_come_and_go(pair: Callable[..., Pair], kind: str) -> None:
    model, graphs = pair(kind)
    rows = sources(16)
    settings = [
        dataclasses.replace(GREEDY, max_target_tokens=1 + 3 * i % 23, temperature=float(i % 2), seed=i)
        for i in range(len(rows))
    ]
    with Engine(graphs, max_rows=4, max_source_tokens=20, max_target_tokens=4 * WINDOW, encode_tokens=40) as engine:
        tickets = [engine.submit(*one) for one in zip(rows, settings, strict=True)]
        found = [ticket.result(60)[0].tokens for ticket in tickets]
        samples = engine.submit(rows[0], settings[1], n=3).result(60)
    assert found == [g.tokens for g in generate(model, rows, settings)]
    alone = [generate(model, [rows[0]], dataclasses.replace(settings[1], seed=1 + i))[0].tokens for i in range(3)]
    assert [sample.tokens for sample in samples] == alone


@each_kind
def test_drafts_change_nothing(pair: Callable[..., Pair], kind: str) -> None:
    _, graphs = pair(kind)
    accepted = parted = 0
    for seed in range(2):
        rows = sources(15, seed=seed)
        expected = generate(graphs, rows, GREEDY)
        for ours, alone in zip(generate(graphs, rows, GREEDY, drafts=COPIES), expected, strict=True):
            accepted += ours.accepted
            if ours.tokens != alone.tokens:
                parted += 1
                assert ours.near_ties
    assert accepted and parted <= 2


def test_an_exported_model_drafts(pair: Callable[..., Pair]) -> None:
    model, graphs = pair("t5gemma2")
    rows = sources(8, seed=3)
    settings = [dataclasses.replace(GREEDY, max_target_tokens=n) for n in (1, 2, 5, 9, 24, 20, 24, 24)]
    for writer in (model, graphs):
        expected = generate(writer, rows, settings)
        ours = generate(writer, rows, settings, drafts=DraftSettings(max_tokens=4, adaptive=False, model=graphs))
        drafted, accepted = (sum(getattr(g, name) for g in ours) for name in ("drafted", "accepted"))
        assert accepted > 0.9 * drafted > 0
        assert sum(a.tokens != b.tokens and not a.near_ties for a, b in zip(ours, expected, strict=True)) == 0


@each_kind
def test_beams_equal_those_of_torch(pair: Callable[..., Pair], kind: str) -> None:
    model, graphs = pair(kind)
    settings = dataclasses.replace(GREEDY, stop_ids=(1, 9))
    rows = sources(6, seed=7)
    beams = BeamSettings(4, 0.6, num_return=2)
    found, expected = (beam_search(m, rows, settings, beams=beams) for m in (graphs, model))
    for ours, theirs in zip(found, expected, strict=True):
        assert [o.tokens for o in ours] == [t.tokens for t in theirs]
        np.testing.assert_allclose([o.score or 0 for o in ours], [t.score or 0 for t in theirs], atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_graphs_part_only_within_their_noise(pair: Callable[..., Pair], weights: str) -> None:
    """How far a step over several tokens is from steps over one is measured; targets part only where that decides."""
    _, graphs = pair("t5gemma2", weights)
    noise, gaps = 0.0, []
    for source in sources(8, seed=3):
        (expected,) = generate(graphs, [source], GREEDY)
        (ours,) = generate(graphs, [source], GREEDY, drafts=COPIES)
        single, several = (make_rows(graphs, Size(1, 20, 40, 8)) for _ in range(2))
        for rows in (single, several):
            rows.join([source], [1])
        fed = [2, *expected.tokens[:-1]]
        alone = np.concatenate([single.step([[token]])[0].copy() for token in fed])
        together = np.concatenate([several.step([fed[i : i + 4]])[0].copy() for i in range(0, len(fed), 4)])
        noise = max(noise, float(np.abs(alone - together).max()))
        if ours.tokens != expected.tokens:
            place = next(i for i, (a, b) in enumerate(zip(ours.tokens, expected.tokens, strict=True)) if a != b)
            top = np.sort(alone[place])[-2:]
            gaps.append(float(top[1] - top[0]))
    assert all(gap <= 2 * noise for gap in gaps), (gaps, noise)


@each_kind
def test_buffers_stay_within_the_plan(pair: Callable[..., Pair], kind: str) -> None:
    _, graphs = pair(kind)
    size = Size(5, 20, 30, 4)
    rows = make_rows(graphs, size)
    most = memory_plan(graphs, size, 64).caches
    rng = np.random.default_rng(0)
    seen = 0
    for source in sources(30, longest=21):
        if rows.num_rows == 5:
            rows.select(sorted(rng.choice(5, rng.integers(0, 5), replace=False).tolist()))
        rows.join([source], [1])
        for _ in range(3):
            rows.step([[5] * int(n) for n in rng.integers(1, 3, rows.num_rows)])
            if int(rows.cache.lengths.max()) > 20:  # pyright: ignore[reportAttributeAccessIssue]
                rows.select(list(range(1, rows.num_rows)) or [0])
                break
        seen = max(seen, rows.num_bytes)
    assert most / 4 < seen <= most / 2
