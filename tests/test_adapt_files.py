"""The files of an adaptation: what goes along, what is refused, what is left after an accident, memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from encore.adapt import adapt
from encore.checkpoint import CheckpointError
from encore.checkpoint.config_json import config_from_json
from encore.checkpoint.pretrained import save
from encore.model.gemma import Gemma

CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
}


def write(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
    """A Gemma 3 with random weights."""
    model = Gemma(config_from_json({**CONFIG, **keys}))  # type: ignore[arg-type]
    model.init_weights()
    save(model.to(dtype), folder)
    return folder


def test_licences_tokenizer_and_provenance_go_along(tmp_path: Path) -> None:
    source = write(tmp_path / "my source")
    carried = ("LICENSE", "NOTICE.txt", "USAGE_POLICY.md", "Gemma_terms.html", "tokenizer.json")
    for name in carried:
        (source / name).write_text(name)
    (source / "encore.json").write_text('{"source_format": {"bos": true, "eos": false}, "sentinels": [6, 4]}')
    (source / "README.md").write_text("a card of the source")
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 9], "top_k": 64, "cache_implementation": "hybrid"})
    )
    adapt(source, tmp_path / "out", rope_factor=8)
    out = tmp_path / "out"
    assert all((out / name).read_text() == name for name in carried)
    ours = json.loads((out / "encore.json").read_text())
    assert ours == {"source_format": {"bos": True, "eos": True}, "sentinels": [6, 4]}
    assert not (out / "README.md").exists()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 9], "pad_token_id": 0, "top_k": 64}
    text = (out / "encore_adaptation.json").read_text()
    provenance = json.loads(text)
    assert provenance["style"] == "t5gemma2" and provenance["options"] == {"rope_factor": 8, "seed": 0}
    assert provenance["source"]["name"] == "my source" and str(tmp_path) not in text
    for name, digest in provenance["source"]["sha256"].items():
        assert hashlib.sha256((source / name).read_bytes()).hexdigest() == digest
    assert set(provenance["source"]["sha256"]) == {"config.json", "model.safetensors"}
    assert provenance["versions"]["torch"] == torch.__version__ and provenance["date"].startswith("20")
    assert "warmup" not in provenance and "decoder_source" not in provenance


def test_several_stop_tokens_survive(tmp_path: Path) -> None:
    source = write(tmp_path / "source", eos_token_id=[1, 9])
    adapt(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [1, 9]
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [1, 9]


def test_a_folder_with_files_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    out = tmp_path / "out"
    adapt(source, out, random=True)
    (out / "tokenizer.json").write_text("of an older source")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds files already.*--force"):
        adapt(source, out)
    adapt(source, out, force=True)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "encore_adaptation.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    }
    assert json.loads((out / "encore_adaptation.json").read_text())["init"] == "source"
    for wrong in (source, tmp_path):
        with pytest.raises(CheckpointError, match="is or contains the source"):
            adapt(source, wrong, force=True)


def test_an_interrupted_adaptation_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "source")

    def interrupt(done: int, total: int) -> None:
        assert 0 < done <= total
        if done > total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(source, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_ends_at_all(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    adapt(
        write(tmp_path / "source"),
        tmp_path / "out",
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == sorted(done for done, _ in told)


def test_nothing_is_written_for_a_broken_source(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        adapt(source, tmp_path / "out")
    with pytest.raises(ValueError, match="style is 't5'"):
        adapt(source, tmp_path / "out", style="t5")  # type: ignore[arg-type]
    other = write(tmp_path / "other", torch.bfloat16)
    with pytest.raises(CheckpointError, match="the source is bfloat16, the decoder float32"):
        adapt(other, tmp_path / "out", decoder=write(tmp_path / "third"))
    assert not (tmp_path / "out").exists()


MEMORY = """
import sys
from encore.adapt import adapt
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
adapt(sys.argv[1], sys.argv[2] + "-warm")
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
summary = adapt(*sys.argv[2:])
print(status("VmHWM") - before, summary.num_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_peak_memory_is_one_tensor(tmp_path: Path) -> None:
    """A model of over 100 MB is adapted in the memory of its largest tensor (8 MB), and a little for headers."""
    small = write(tmp_path / "small")
    large = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    source = write(tmp_path / "large", **large)
    command = [sys.executable, "-c", MEMORY, str(small), str(source), str(tmp_path / "out")]
    peak, num_bytes = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert num_bytes > 100e6
    assert peak < 4096 * 512 * 4 + 12e6
