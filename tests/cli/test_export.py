"""The verb export: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from encore.cli import app


def test_export_says_what_was_written_and_generate_reads_it(tmp_path: Path) -> None:
    out = str(tmp_path / "exported")
    run = CliRunner().invoke(app, ["export", "translator", out, "--weights", "int8-head-int4", "--json"])
    assert run.exit_code == 0, run.exception
    said = json.loads(run.stdout)
    assert (said["weights"], said["block_size"], said["parts"]) == (
        "int8-head-int4",
        128,
        ["encoder", "memory", "step"],
    )
    assert 4.5 < said["bits_per_weight"] < 8.5 and 0 < said["error"] < 0.1
    again = CliRunner().invoke(app, ["export", "translator", out])
    assert "--force" in str(again.exception)
    plain = CliRunner().invoke(app, ["export", "translator", out, "--force", "--encoder-only"])
    assert plain.stdout.startswith(f"{out}: int8, 8.17 bits per weight in blocks of 128, relative error 0.0")
    embedded = CliRunner().invoke(app, ["embed", "Good morning.", "--model", out])
    assert len(json.loads(embedded.stdout)["embedding"]) == 256
    refused = CliRunner().invoke(app, ["generate", "Good morning.", "--model", out])
    assert "without --encoder-only" in str(refused.exception)
    refused = CliRunner().invoke(app, ["embed", "Good morning.", "--model", out, "--dtype", "bfloat16"])
    assert "leave --device, --dtype" in str(refused.exception)
