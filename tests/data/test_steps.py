"""Steps of a mixture: pure functions of their number, whoever makes them; packed rows hold what single rows hold."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encore.data.batch import Batch
from encore.data.examples import Denoise, PairExamples, TablePairs, TextExamples, causal
from encore.data.layout import Arrays
from encore.data.mixture import Mixture
from encore.data.pipeline import Batches
from encore.data.sources import pair_tables, token_stream
from encore.data.steps import Packing, Steps
from encore.data.windows import Documents, Permutation, Windows
from encore.data.workers import Prefetched, WorkerDied
from encore.objectives import ul2
from encore.objectives.denoise import longest_raw_length
from encore.tokenizer import Tokenizer

_LETTERS = np.random.default_rng(7).choice(list("abcdefghij"), (200, 3))
WORDS = ["".join(word) for word in _LETTERS]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    numbers = np.random.default_rng(1)
    texts = [" ".join(numbers.choice(WORDS, numbers.integers(5, 80))) for _ in range(120)]
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    rows = [(text[:20], text[20:60] or "a") for text in texts]
    (folder / "pairs.jsonl").write_text("".join(f'{{"src": "{s}", "tgt": "{t}"}}\n' for s, t in rows))
    return folder


def make(
    files: Path, tokenizer: Tokenizer, packing: Packing | None = None, *, encoder: bool = True, separate: bool = False
) -> Steps:
    stream = token_stream([str(files / "text.jsonl")], tokenizer, cache_folder=files)
    pairs = TablePairs(pair_tables([str(files / "pairs.jsonl")], tokenizer, cache_folder=files), 99, 99)
    objective = Denoise("t5gemma2", tokenizer) if encoder else causal
    cut = Documents(stream, 48, seed=3, eos_id=tokenizer.eos_id) if separate else Windows(stream, 48, seed=3)
    sources = [
        TextExamples([cut], objective, seed=3),
        PairExamples(pairs, tokenizer, encoder=encoder, seed=3, source=1),
    ]
    mixture = Mixture(sources, [3, 1])
    return Steps(mixture, tokenizer, batch_size=12, accumulation_steps=2, seed=3, packing=packing)


PACKED = Packing(pool_examples=100)


def same(left: list[Arrays], right: list[Arrays]) -> bool:
    return len(left) == len(right) and all(
        one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)  # type: ignore[arg-type]
        for one, other in zip(left, right, strict=True)
    )


def test_webster_gives_each_source_its_share_at_any_time() -> None:
    mixture = Mixture([object()] * 3, [2, 1, 1])  # type: ignore[list-item]
    turns = "".join("ABC"[source] for n in range(8) for source, _ in mixture.between(n, n + 1))
    assert turns == "ABCAABCA"


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 10**6), st.integers(0, 50))
def test_any_stretch_of_a_mixture_goes_on_where_the_last_ended(weights: list[float], first: int, more: int) -> None:
    mixture = Mixture([object()] * len(weights), weights)  # type: ignore[list-item]
    counts = mixture.counts(first)
    assert counts.sum() == first and (np.abs(counts - mixture.shares * first) < len(weights)).all()
    one_by_one = [entry for n in range(first, first + more) for entry in mixture.between(n, n + 1)]
    assert sorted(one_by_one) == sorted(mixture.between(first, first + more))
    for source in range(len(weights)):
        indices = [index for s, index in one_by_one if s == source]
        assert indices == list(range(int(counts[source]), int(counts[source]) + len(indices)))


def test_tasks_have_their_shares_in_any_stretch(files: Path, tokenizer: Tokenizer) -> None:
    text = make(files, tokenizer).mixture.sources[0]
    for first in (0, 1000, 10**9):
        kinds = [text.kind(index) for index in range(first, first + 80)]
        counts = {task.name: kinds.count(task.name) for task in ul2.MIXTURES["t5gemma2"]}
        assert all(abs(counts[task.name] - 10 * task.weight) <= 2 for task in ul2.MIXTURES["t5gemma2"])


def examples(steps: Steps, step_range: range) -> list[tuple[list[int] | None, list[int], list[float]]]:
    """(source, target, weights) of each segment, with the checks that hold for every batch."""
    found = []
    for step in step_range:
        for batch in map(Batch.of, steps.arrays(step)):
            targets = batch.decoder_segment_ids if batch.decoder_segment_ids is not None else batch.decoder_mask.long()
            assert torch.equal(targets > 0, batch.decoder_mask)
            for row in range(len(targets)):
                sources = None
                if batch.encoder_mask is not None and batch.encoder_input_tokens is not None:
                    ids = batch.encoder_segment_ids
                    sources = ids[row] if ids is not None else batch.encoder_mask[row].long()
                    assert sources.max() == targets[row].max(), "a segment without its other half"
                    assert torch.equal(sources > 0, batch.encoder_mask[row])
                for segment in range(1, int(targets[row].max()) + 1):
                    here = targets[row] == segment
                    place = here.nonzero()[:, 0]
                    assert place.tolist() == list(range(int(place[0]), int(place[-1]) + 1)), "not in one stretch"
                    target = batch.decoder_target_tokens[row][here].tolist()
                    read = batch.decoder_input_tokens[row][here].tolist()
                    assert read[1:] == target[:-1], "shifted across segments"
                    source = None
                    if sources is not None and batch.encoder_input_tokens is not None:
                        source = batch.encoder_input_tokens[row][sources == segment].tolist()
                    found.append((source, target, batch.decoder_loss_weights[row][here].tolist()))
    return found


@pytest.mark.parametrize("encoder", [True, False])
def test_packed_rows_hold_what_single_rows_hold(files: Path, tokenizer: Tokenizer, encoder: bool) -> None:
    """Of what was not cut: the same examples, in another layout; of pairs, every one."""
    alone, packed = (make(files, tokenizer, packing, encoder=encoder) for packing in (None, PACKED))
    assert packed.pool_steps == 9
    singles = examples(alone, range(9))
    together = examples(packed, range(9))
    assert len(singles) == 108 and len(together) >= 108
    common = [example for example in singles if example in together]
    cut = {piece.item for row in packed.pool(0).rows for piece in row if piece.start}
    assert len(common) == 108 - len(cut) and len(cut) < 54 and (cut or not encoder)
    if not encoder:
        assert sum(sum(w) for _, _, w in together) == sum(sum(w) for _, _, w in singles)


def test_no_token_of_the_text_is_lost_or_doubled_by_cutting(files: Path, tokenizer: Tokenizer) -> None:
    packed = make(files, tokenizer, PACKED, encoder=False)
    pool = packed.pool(1)
    for item, (source, index) in enumerate(pool.examples):
        pieces = sorted(piece for row in pool.rows for piece in row if piece.item == item)
        whole = packed.mixture.sources[source].row(index).target.tolist()
        assert [i for piece in pieces for i in packed._example(pool, piece).target.tolist()] == whole


@pytest.mark.parametrize("separate", [False, True])
def test_rows_are_full_and_of_one_shape(files: Path, tokenizer: Tokenizer, separate: bool) -> None:
    steps = make(files, tokenizer, Packing(pool_examples=600), separate=separate)
    steps.accumulation_steps = 1
    masks = [arrays for step in range(steps.pool_steps) for arrays in steps.arrays(step)]
    for side, length in (("encoder_mask", steps.shape.encoder), ("decoder_mask", steps.shape.decoder)):
        arrays = [mask for entry in masks if (mask := entry[side]) is not None]
        assert {mask.shape[1] for mask in arrays} == {length}
        assert np.concatenate(arrays).mean() > 0.95
    rows = [sum(len(a["decoder_mask"]) for a in steps.arrays(s)) for s in range(steps.pool_steps)]  # type: ignore[arg-type]
    assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize("packing", [None, PACKED])
def test_any_step_first_and_any_number_of_workers_give_the_same(
    files: Path, tokenizer: Tokenizer, packing: Packing | None
) -> None:
    walked = make(files, tokenizer, packing)
    in_order = [walked.arrays(step) for step in range(22)]
    for step in (21, 3, 9):  # the last of a fresh object: exact resume
        assert same(make(files, tokenizer, packing).arrays(step), in_order[step])
    assert not same(in_order[0], in_order[1])
    copied = pickle.loads(pickle.dumps(walked))
    assert same(copied.arrays(12), in_order[12])
    for workers in (1, 2):
        made = Prefetched(walked, workers, num_steps=22)
        for step in (*range(4), 11, 12, 13, 2, *range(18, 22)):
            assert same(list(made.arrays(step)), in_order[step])
        processes = [worker.process for worker in made._workers]
        assert len(processes) == workers
        made.close()
        assert [process.returncode for process in processes] == [0] * workers


@pytest.mark.parametrize("batch_size", [2, 5, 40])
def test_every_step_has_a_row(files: Path, tokenizer: Tokenizer, batch_size: int) -> None:
    steps = make(files, tokenizer, PACKED)
    steps.batch_size, steps.pool_steps = batch_size, -(-100 // batch_size)
    steps.accumulation_steps = 1
    assert all(steps.arrays(step) for step in range(2 * steps.pool_steps))
    steps = make(files, tokenizer, Packing(2000, 2000, 100))
    with pytest.raises(ValueError, match=r"12 examples a step fill less than one row .* raise train\.batch_size"):
        steps.arrays(0)


def test_any_number_of_devices_shares_the_rows(files: Path, tokenizer: Tokenizer) -> None:
    batch = Batches(make(files, tokenizer, PACKED))(4)[0]
    for world in (1, 2, 3, len(batch.decoder_mask) + 2):
        shards = [batch.shard(rank, world) for rank in range(world)]
        assert sum(shard.total_weight for shard in shards) == batch.total_weight
        for rank, shard in enumerate(shards):
            assert len(shard.decoder_mask) == max(1, len(batch.decoder_mask[rank::world]))
            assert shard.decoder_segment_ids is not None and shard.encoder_segment_ids is not None
            if rank < len(batch.decoder_mask):
                assert torch.equal(shard.decoder_target_tokens, batch.decoder_target_tokens[rank::world])
            else:
                assert shard.total_weight == 0 and bool(shard.decoder_mask.any())
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        batch.shard(2, 2)


def test_a_worker_that_dies_stops_the_run_with_its_cause(files: Path, tokenizer: Tokenizer) -> None:
    made = Prefetched(make(files, tokenizer), 2)
    made.arrays(0)
    os.kill(made._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"killed by SIGKILL .*out of memory.*same command again"):
        for step in range(1, 9):
            made.arrays(step)
    made.close()


def test_what_goes_wrong_in_a_worker_is_told_here(files: Path, tokenizer: Tokenizer) -> None:
    steps = make(files, tokenizer, Packing(8, 8, 50))  # pairs do not fit such rows
    made = Prefetched(steps, 1)
    with pytest.raises(ValueError, match=r"preparing the data of step 0 failed: ValueError: .*does not fit a row of 8"):
        made.arrays(0)
    made.close()


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_an_order_without_memory_is_an_order(number: int, seed: int) -> None:
    order = Permutation(number, np.random.default_rng(seed))
    found = [order[place] for place in range(number)]
    assert sorted(found) == list(range(number))
    if number > 100:
        moved = np.abs(np.array(found) - np.arange(number))
        assert moved.mean() == pytest.approx(number / 3, rel=0.35), "far from a random order"
        assert abs(np.corrcoef(found, np.arange(number))[0, 1]) < 0.4


def test_large_texts_are_read_in_such_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("encore.data.windows._LARGEST_TABLE", 10)
    windows = Windows(np.arange(1000, dtype=np.uint16), 8, seed=3)
    epochs = [[int(windows[e * windows.per_epoch + i][0]) for i in range(windows.per_epoch)] for e in range(2)]
    for starts in epochs:
        assert np.diff(sorted(starts)).tolist() == [8] * (windows.per_epoch - 1)
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_windows_within_documents(files: Path, tokenizer: Tokenizer) -> None:
    stream = token_stream([str(files / "text.jsonl")], tokenizer, cache_folder=files)
    text = stream[:].tolist()
    ends = stream.document_ends().tolist()
    for keep in (True, False):
        cut = Documents(stream, 16, seed=1, keep_eos=keep, eos_id=tokenizer.eos_id)
        windows = [cut[index].tolist() for index in range(cut.per_epoch)]
        assert all(len(window) == cut.tokens(index) <= 16 for index, window in enumerate(windows))
        assert all(tokenizer.eos_id not in window[:-1] for window in windows)
        starts = [0, *ends[:-1]]
        documents = [text[start : end - (not keep)] for start, end in zip(starts, ends, strict=True)]
        assert sum(map(len, windows)) == sum(map(len, documents))
        in_order = Documents(stream, 16, shuffle=False, keep_eos=keep, eos_id=tokenizer.eos_id)
        assert [i for n in range(in_order.per_epoch) for i in in_order[n].tolist()] == [
            i for document in documents for i in document
        ]
        assert sorted(windows) == sorted(in_order[n].tolist() for n in range(in_order.per_epoch))


def test_the_budget_rule_makes_examples_as_long_as_the_limits(files: Path, tokenizer: Tokenizer) -> None:
    objective = Denoise("t5gemma2", tokenizer)
    stream = token_stream([str(files / "text.jsonl")], tokenizer, cache_folder=files)
    lengths = [objective.longest_text(task, 64, 64) for task in range(len(objective.tasks))]
    text = TextExamples([Windows(stream, length, seed=1) for length in lengths], objective, seed=1)
    for index in range(40):
        row = text.row(index)
        assert row.source is not None
        sizes = (len(row.source), len(row.target))
        assert sizes == text.lengths(index) and max(sizes) <= 64 and max(sizes) >= 63
    # spec: with both sides capped at 16,384 the tasks take so much text and so many sentinels
    extra = {"source_extra_tokens": 1, "num_sentinels": 6142}
    taken = [longest_raw_length(task, 16384, 16384, **extra) for task in ul2.MIXTURES["t5gemma2"]]  # type: ignore
    assert taken[0] == pytest.approx(18_204, abs=2) and taken[3] == pytest.approx(31_774, abs=2)


def test_mode_tokens_open_the_inputs(tokenizer: Tokenizer, files: Path) -> None:
    modes = {"[NLU]": 400, "[S2S]": 401, "[NLG]": 402}
    stream = token_stream([str(files / "text.jsonl")], tokenizer, cache_folder=files)
    objective = Denoise("ul2", tokenizer, mode_ids=modes)
    text = TextExamples([Windows(stream, 48, seed=1)], objective, seed=1)
    for index in range(20):
        row = text.row(index)
        assert row.source is not None and row.source[1] == modes[objective.tasks[text.task(index)].mode or ""]
        assert (len(row.source), len(row.target)) == text.lengths(index)
