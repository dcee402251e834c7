"""What `pip install encore-lm` brings without an extra is enough to run exported models: tried where there is no torch.

The environment is a folder of links to the installed files of exactly those distributions that the package's own
requirements lead to, and a Python that looks nowhere else. It is what pip would make, without a network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import encore

SOURCES = Path(encore.__file__).parent
HEAVY = {"torch", "transformers", "onnx", "safetensors", "matplotlib", "sacrebleu", "jaxtyping"}


def required(name: str) -> set[str]:
    """The distribution and all that it requires without extras, by normalised name."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if current in found:
            continue
        found.add(current)
        for text in distribution(current).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "encore").symlink_to(SOURCES)
    for name in required("encore-lm") - {"encore-lm"}:
        installed = distribution(name)
        roots = {Path(file).parts[0] for file in installed.files or [] if not file.parts[0].startswith((".", ".."))}
        for root in roots - {"__pycache__"}:
            if not (folder / root).exists():
                (folder / root).symlink_to(Path(str(installed.locate_file(root))))
    return folder


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from encore.cli import main; main()"
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=kept | {"COLUMNS": "200"},
    )


def test_the_requirements_without_extras_are_light(site: Path) -> None:
    assert not HEAVY & {path.name for path in site.iterdir()}
    assert {"numpy", "onnxruntime", "tokenizers"} <= {path.name for path in site.iterdir()}


def test_the_shipped_translator_answers(site: Path) -> None:
    answer = run(site, "generate", "I have lost my keys.", "--json", "--threads", "1")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["text"] == "Ich habe meine Schlüssel verloren."
    scores = [run(site, "score", "--source", "Good morning.", "--target", t) for t in ("Guten Morgen.", "Nein.")]
    good, bad = (json.loads(score.stdout)["logprob"] for score in scores)
    assert good > bad
    assert json.loads(run(site, "embed", "Good morning.").stdout)["embedding"]


def test_what_needs_torch_says_how_to_get_it(site: Path, tmp_path: Path) -> None:
    result = run(site, "adapt", "source", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "encore-lm[train]" in result.stderr and "Traceback" not in result.stderr
    assert run(site, "--help").returncode == 0
