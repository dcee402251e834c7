"""Exported folders with onnxruntime and numpy alone: encode, then one step at a time with caches in place. No torch.

    model = OnnxModel.load("exported")
    memory = model.encode([[2, 17, 4, 1]])               # sources of ids -> OnnxMemory
    cache = model.make_cache(memory, max_target_tokens=64)
    logits = model.step([2], cache)                      # (B, V): after <bos>; the cache now holds it

A cache (`onnx_cache.py`) is bound to the step graph once (IO binding): the graph reads and writes it where it lies, and
a step is one call. A step takes one token of each row, or several; rows may differ in source and in target length.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from encore.checkpoint.config_json import read_config_file
from encore.checkpoint.hub import resolve
from encore.config import T5GemmaConfig
from encore.export import ExportError
from encore.export.manifest import GRAPH_FILES, Manifest, check_folder
from encore.generate.chunks import Chunks, groups_of
from encore.generate.memory import MemoryPlan, plan
from encore.generate.onnx_cache import OnnxCache
from encore.generate.onnx_inputs import encoder_feeds
from encore.generate.onnx_rows import OnnxRows, cache_bytes, refuse_pictures
from encore.generate.rows import Size

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from encore.generate.padding import PicturesOfRows

MAX_LOGITS = 1 << 23
"""Logits that scoring holds at a time: 32 positions at a vocabulary of 262,144, 32 MiB."""

MEMORY_SLICE = 256
"""Source positions whose keys and values are computed at a time, so that they are never held twice."""


MANY_TOKENS = 1024
"""After encoding so many, free memory goes back to the system."""


@dataclass(frozen=True)
class OnnxMemory:
    """The encoder's states (B, S, D), float32, and how many of each row are real."""

    states: NDArray[np.float32]
    lengths: NDArray[np.int64]

    def index_select(self, rows: Sequence[int]) -> OnnxMemory:
        """These rows of the batch, in this order."""
        return OnnxMemory(self.states[list(rows)], self.lengths[list(rows)])

    @staticmethod
    def join(chunks: Sequence[Sequence[OnnxMemory]]) -> OnnxMemory:
        """Sources that were encoded in chunks: row i holds the real states of all rows of `chunks[i]`, in order."""
        rows = [
            [states[:length] for m in of_row for states, length in zip(m.states, m.lengths, strict=True)]
            for of_row in chunks
        ]
        lengths = np.array([sum(map(len, row)) for row in rows], np.int64)
        joined = np.zeros((len(rows), max(1, int(lengths.max())), rows[0][0].shape[1]), np.float32)
        for out, row, length in zip(joined, rows, lengths, strict=True):
            out[:length] = np.concatenate(row)
        return OnnxMemory(joined, lengths)


class OnnxModel:
    """An exported encoder-decoder, or its encoder alone."""

    def __init__(self, manifest: Manifest, config: T5GemmaConfig, sessions: Mapping[str, InferenceSession]) -> None:
        self.manifest, self.config, self._sessions = manifest, config, sessions

    @classmethod
    def load(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        part: Literal["all", "encoder"] = "all",
        wait: bool = True,
    ) -> OnnxModel:
        """Open a folder that `encore export` wrote; `threads` None = one per core. Raises ExportError.

        The graphs are opened side by side. With `wait` False each is waited for where it is first used, which then may
        raise ExportError too; that every file is whole has been checked by now in any case.
        """
        folder = resolve(name_or_folder)
        manifest = check_folder(folder)
        config = read_config_file(folder)
        if not isinstance(config, T5GemmaConfig):
            raise ExportError(f"{folder}/config.json describes a {config.model_type}, which has no encoder")
        wanted = ("encoder",) if part == "encoder" else ("step", "encoder", "memory")  # the longest to open first
        sessions = Sessions({name: manifest.graph(name) for name in wanted}, threads)
        return cls(manifest, config, dict(sessions) if wait else sessions)

    def encode(self, sources: Sequence[Sequence[int]]) -> OnnxMemory:
        """Sources of ids (padded to a batch here) to a memory."""
        if not sources:
            raise ValueError("there are no sources to encode; give at least one row of ids")
        if any(isinstance(source, Chunks) for source in sources):
            return OnnxMemory.join([[self.encode(group) for group in groups_of(source)] for source in sources])
        feeds = encoder_feeds(self.config, sources)
        (states,) = map(np.asarray, self._sessions["encoder"].run(["states"], feeds, giving_back()))  # (1, T, D)
        lengths = np.array([len(source) for source in sources], np.int64)
        if lengths.sum() >= MANY_TOKENS:
            trim()
        if len(sources) > 1:
            ends = np.cumsum(lengths)
            rows = np.zeros((len(sources), max(1, int(lengths.max())), states.shape[2]), np.float32)
            for row, length, end in zip(rows, lengths, ends, strict=True):
                row[:length] = states[0, end - length : end]
            states = rows
        return OnnxMemory(states, lengths)

    def make_cache(self, memory: OnnxMemory, max_target_tokens: int, step_tokens: int = 1) -> OnnxCache:
        """Keys and values of the memory, computed once, and room for `max_target_tokens` tokens a row.

        `step_tokens`: the most tokens a row that one step takes (`OnnxCache.advance`).
        """
        cache = self.empty_cache(memory.lengths, max_target_tokens, step_tokens)
        session = self._sessions["memory"]
        names = [value.name for value in session.get_outputs()]
        for start in range(0, int(memory.lengths.max()), MEMORY_SLICE):
            part = np.ascontiguousarray(memory.states[:, start : start + MEMORY_SLICE])
            computed = session.run(names, {"states": part}, giving_back())
            cache.put_memory(start, dict(zip(names, map(np.asarray, computed), strict=True)))
        return cache

    def empty_cache(self, lengths: NDArray[np.int64], max_target_tokens: int, step_tokens: int) -> OnnxCache:
        """A cache of rows with memories of these lengths, which have yet to be put in."""
        if "step" not in self._sessions:
            raise ExportError(f"{self.manifest.folder} was opened, or exported, as an encoder alone; it cannot decode")
        if max_target_tokens < 1:
            raise ValueError(f"max_target_tokens is {max_target_tokens}; expected at least 1")
        if step_tokens < 1:
            raise ValueError(f"step_tokens is {step_tokens}; expected at least 1")
        return OnnxCache(self.config, self._sessions["step"], lengths, max_target_tokens, step_tokens)

    def step(self, tokens: Sequence[int], cache: OnnxCache) -> NDArray[np.float32]:
        """Logits (B, V) after one more token of each row, which the cache now holds.

        The array is overwritten by the next step.
        """
        if len(tokens) != len(cache.lengths):
            raise ValueError(f"{len(tokens)} tokens for {len(cache.lengths)} rows; give one for each")
        return cache.advance(np.asarray(tokens, np.int64)[:, None])[:, 0]


def make_rows(model: OnnxModel, size: Size) -> OnnxRows:
    return OnnxRows(model, size)


def memory_plan(model: OnnxModel, size: Size, encode_tokens: int) -> MemoryPlan:
    """Weights are counted once, as they lie in the folder."""
    weights = sum(path.stat().st_size for path in model.manifest.folder.iterdir() if path.is_file())
    caches = cache_bytes(model, size)
    how = {"encode_tokens": encode_tokens, "element_bytes": 4}
    return plan(model.config, size, weights=weights, caches=caches, **how)


def encoder_states(
    model: OnnxModel, sources: Sequence[Sequence[int]], pictures: PicturesOfRows = None
) -> list[NDArray[np.float32]]:
    """The states (S, D) of each source, without padding."""
    refuse_pictures(pictures)
    states = model.encode(sources).states
    return [states[row, : len(source)] for row, source in enumerate(sources)]


def log_probabilities(
    model: OnnxModel, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log p of each target's ids after its source's, many positions a step; rows that have ended run on as padding."""
    if model.manifest.provenance.get("head_preview"):
        raise ExportError(
            f"{model.manifest.folder} sees its head in a narrow view, so probabilities are estimates; export the model "
            "again without --head-preview to score"
        )
    longest = max(len(target) for target in targets)
    at_once = max(1, min(longest, MAX_LOGITS // (len(targets) * model.config.decoder.vocab_size)))
    cache = model.make_cache(model.encode(sources), longest, at_once)
    pad, bos = model.config.pad_token_id, model.config.bos_token_id
    inputs = np.full((len(targets), longest), pad, np.int64)
    wanted = inputs.copy()
    for row, target in enumerate(targets):
        inputs[row, : len(target)] = [bos, *target[:-1]]
        wanted[row, : len(target)] = target
    found: list[list[float]] = [[] for _ in targets]
    for start in range(0, longest, at_once):
        places = slice(start, start + at_once)
        logits = cache.advance(inputs[:, places], wanted=wanted[:, places], summed=True)
        assert cache.log_sums is not None
        chosen = np.take_along_axis(logits, wanted[:, places, None], axis=2)[..., 0] - cache.log_sums
        for of_row, values, target in zip(found, chosen, targets, strict=True):
            of_row += values[: max(0, len(target) - start)].tolist()
    return found


class Sessions(Mapping[str, "InferenceSession"]):
    """Graphs that are being opened, each in a thread of its own; reading one waits for it.

    Most of the time goes to ONNX Runtime's own copy of the packed weights, for which it uses one thread.
    """

    def __init__(self, paths: Mapping[str, Path], threads: int | None) -> None:
        try:
            import onnxruntime as onnxruntime
        except ModuleNotFoundError as error:
            raise ExportError("exported folders need onnxruntime; install it with: pip install onnxruntime") from error
        pool = ThreadPoolExecutor(len(paths))
        self._opening: dict[str, Future[InferenceSession]] = {
            name: pool.submit(_session, path, threads) for name, path in paths.items()
        }
        pool.shutdown(wait=False)

    def __getitem__(self, name: str) -> InferenceSession:
        return self._opening[name].result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._opening)

    def __len__(self) -> int:
        return len(self._opening)


@functools.cache
def giving_back() -> Any:
    """Runs after which the memory of intermediate results is free again, for another graph too."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def trim() -> None:
    """Give free memory of the heap back to the system, which glibc else keeps: a tenth of a process that reads long."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _session(path: Path, threads: int | None) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_mem_reuse = False  # planning it takes a third of opening; runs are as fast and as small without it
    if path.name != GRAPH_FILES["step"]:
        options.enable_mem_pattern = False  # it would keep memory for every length that was seen
        options.add_session_config_entry("session.force_spinning_stop", "1")  # nothing follows a run at once
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen classes of its own, without a common one
        raise ExportError(f"{path} cannot be opened: {error}; export the model again") from error
