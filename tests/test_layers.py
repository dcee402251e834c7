"""The shape of the code: who imports whom, what stays free of torch, how fast the command answers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "encore"
FILES = sorted(SOURCE.rglob("*.py"))
# Whatever runs exported models must import these without torch.
WITHOUT_TORCH = (
    "encore",
    "encore.cli",
    "encore.config",
    "encore.generate.sampling",
    "encore.images",
    "encore.objectives.denoise",
    "encore.objectives.ul2",
    "encore.presets",
    "encore.tokenizer",
)
MAY_BE_DISTRIBUTED = {"train/parallel.py", "train/tensor_parallel.py", "checkpoint/sharded.py"}
VAGUE_NAMES = {"utils", "util", "helpers", "common", "core", "base", "misc"}
MAX_LINES = 400


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imported_modules(path: Path) -> set[str]:
    """All modules that a file imports anywhere, `from torch import distributed` included as torch.distributed."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def run_encore(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "encore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def test_imports_go_downwards_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_torch_is_not_imported(module: str) -> None:
    result = run_python(f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))")
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_torch_distributed_is_used_in_three_files_only() -> None:
    users = {relative(f) for f in FILES if any(m.startswith("torch.distributed") for m in imported_modules(f))}
    assert users <= MAY_BE_DISTRIBUTED


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short_documented_and_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, "more than one idea in a file?"
    assert ast.get_docstring(ast.parse(text)), "say what the file is"
    assert not VAGUE_NAMES & {path.stem, path.parent.name}


def test_the_command_answers_in_less_than_half_of_the_time_of_importing_torch() -> None:
    def seconds(code: str) -> float:
        start = time.perf_counter()
        assert run_python(code).returncode == 0
        return time.perf_counter() - start

    def encore(argument: str) -> str:
        return f"import sys; sys.argv[1:] = [{argument!r}]; from encore.cli import main; main()"

    rounds = [(seconds("import torch"), seconds(encore("--help")), seconds(encore("--version"))) for _ in range(2)]
    torch_seconds, help_seconds, version_seconds = (min(column) for column in zip(*rounds, strict=True))
    assert help_seconds < torch_seconds / 2
    assert version_seconds < torch_seconds / 2


def test_help_lists_every_verb_and_each_has_an_example() -> None:
    from encore.cli import app

    verbs = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert "info" in verbs
    overview = run_encore("--help")
    assert overview.returncode == 0 and overview.stderr == ""
    for verb in verbs:
        assert f" {verb} " in overview.stdout
    code = """
import sys
from typer.testing import CliRunner
from encore.cli import app
for verb in {verbs!r}:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and result.stdout.count(f"encore {{verb}} ") >= 2, verb  # usage and example
assert "torch" not in sys.modules
"""
    result = run_python(code.format(verbs=verbs))
    assert result.returncode == 0, result.stderr


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    from encore import __version__

    result = run_encore("--version")
    assert (result.stdout, result.stderr, result.returncode) == (f"encore {__version__}\n", "", 0)
    assert version("encore-lm") == __version__


@pytest.mark.parametrize(
    ("raised", "status", "traceback"),
    [
        ("ValueError('a\\nb')", 2, False),
        ("FileNotFoundError(2, 'No such file', 'x')", 2, False),
        ("KeyboardInterrupt()", 130, False),
        ("type('Diverged', (RuntimeError,), {'__module__': 'encore.train.loop'})('stopped')", 2, False),
        ("KeyError('x')", 1, True),
    ],
)
def test_what_ends_a_verb(raised: str, status: int, traceback: bool) -> None:
    """What the user can mend is one line and status 2; ENCORE_DEBUG=1 shows where it came from."""
    code = f"""
import sys
from encore.cli import app, main
@app.command()
def fail():
    raise {raised}
sys.argv[1:] = ["fail"]
main()
"""
    result = run_python(code)
    assert (result.returncode, "Traceback" in result.stderr) == (status, traceback), result.stderr
    if status == 2:
        assert result.stderr.startswith("encore: error: ") and result.stderr.count("\n") == 1
        traced = run_python(code, ENCORE_DEBUG="1")
        assert traced.returncode == 1 and "Traceback" in traced.stderr


def test_names_of_the_package_are_found_on_first_use() -> None:
    code = """
import sys, encore
assert "torch" not in sys.modules and {"load", "Gemma", "preset"} <= set(dir(encore)) & set(encore.__all__)
assert encore.preset("gemma-3-1b") is encore.presets.PRESETS["gemma-3-1b"]
assert "torch" not in sys.modules
assert encore.Gemma.__module__ == "encore.model.gemma" and "torch" in sys.modules
for name in encore.__all__:
    getattr(encore, name)
try:
    encore.nothing
except AttributeError as error:
    assert "'nothing'" in str(error) and "load_tokenizer" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
