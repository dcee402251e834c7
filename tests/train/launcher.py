"""Starts the processes of distributed runs: imports once, then forks as many as asked for, and never waits for ever.

Reads one JSON line per launch from stdin and answers with one on stdout, in the order of the ranks. Each process runs
the command `encore` with these arguments, in the environment that torchrun gives:

    {"world": 2, "arguments": ["pretrain", FILE, …], "seconds": 60, "signal": [RANK, CALL, NUMBER] or null}
    [[exit status, or minus the signal that ended it, stdout, stderr], …]

`signal` is sent to the process RANK by itself, as it comes to its CALL-th loss.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from typing import Any

import torch
import torch._dynamo  # (so that no child has to)

import encore.train.pretrain as pretraining
from encore.cli import main
from encore.train.loss import summed_loss


def run(request: dict[str, Any], rank: int) -> int:
    if request["signal"] and request["signal"][0] == rank:
        _, call, number = request["signal"]
        calls = 0

        def loss_after_signal(model: Any, batch: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), number)
            return summed_loss(model, batch)

        pretraining.summed_loss = loss_after_signal
    sys.argv[1:] = request["arguments"]
    try:
        main()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(request: dict[str, Any]) -> list[tuple[int, str, str]]:
    world, port = request["world"], str(free_port())
    files = [(tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")) for _ in range(world)]  # noqa: SIM115
    running: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate(files[rank], start=1):
                os.dup2(file.fileno(), number)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            status = run(request, rank)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        running[pid] = rank
    statuses = [0] * world
    deadline = time.monotonic() + request["seconds"]
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            for left in running:
                os.kill(left, signal.SIGKILL)
        time.sleep(0.01)
    answers = []
    for status, (out, err) in zip(statuses, files, strict=True):
        out.seek(0)
        err.seek(0)
        answers.append((status, out.read(), err.read()))
        out.close()
        err.close()
    return answers


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # torch.compile's own, which it means to hide
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(launch(json.loads(line))), flush=True)
