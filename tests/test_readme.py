"""The README's own commands and code, run as a reader would."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = {
    "pretrain": ["--set", "train.steps=2", "--set", "train.batch_size=2", "--set", "data.max_tokens=4000"],
    "tune": ["--set", "train.steps=2", "--set", "data.max_pairs=50", "--set", "data.validation_pairs=8"],
}


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_commands_run_one_after_the_other(tmp_path: Path) -> None:
    lines = re.findall(r"^    (encore .*)$", section("What it does"), re.MULTILINE)
    assert len(lines) >= 8
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "lines.txt").write_text("Good morning.\nI am here.\n", encoding="utf-8")
    for line in lines:
        words = shlex.split(line, comments=True)
        stdin = None
        if "<" in words:
            at = words.index("<")
            stdin, words = (tmp_path / words[at + 1]).read_text(encoding="utf-8"), words[:at]
        command = [sys.executable, "-m", *words, *SHORTER.get(words[1], [])]
        done = subprocess.run(command, cwd=tmp_path, input=stdin, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip(), line


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_tree_names_files_that_exist() -> None:
    tree = section("The tree")
    folder = ROOT
    found = 0
    for line in tree.splitlines():
        match = re.match(r"^( +)((?:[\w/]+(?:\.py|/) *)+)", line)
        if not match:
            continue
        depth = len(match[1])
        for name in match[2].split():
            if depth == 4:
                folder = ROOT / name
                assert folder.is_dir(), name
            elif depth == 6:
                path = ROOT / "src/encore" / name
                assert path.exists(), name
                parent = path
            else:
                assert (parent / name).exists(), name  # pyright: ignore[reportPossiblyUnboundVariable]
            found += 1
    assert found > 30
