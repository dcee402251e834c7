"""Background processes that make the steps to come while the model works on this one.

Worker w makes the steps w, w + workers, …; what a step holds depends on nothing but its number, so any number of
workers gives the same run. Workers are fresh Python processes without torch: nothing is inherited, nothing of the
caller's `__main__` runs twice. They read their work from a socket and end when it closes, however the training
process ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Protocol

from encore.data.layout import Arrays

_AHEAD = 2  # steps per worker that are asked for before they are needed


class MakesArrays(Protocol):
    """Step number -> the arrays of its batches; can be pickled."""

    def arrays(self, step: int) -> Sequence[Arrays]: ...


class WorkerDied(ValueError):
    """A process that prepares data ended by itself."""


class Prefetched:
    """The arrays of steps, made by `workers` processes ahead of time; 0 makes them here.

    Args:
        num_steps: how many steps there are; none behind the last is prepared. 0: there is no last.
    """

    def __init__(self, source: MakesArrays, workers: int = 0, num_steps: int = 0) -> None:
        self.source, self.num_steps = source, num_steps
        self._workers: list[_Worker] = []
        self._wanted = workers

    def arrays(self, step: int) -> Sequence[Arrays]:
        """The arrays of a step. Raises WorkerDied, or a ValueError with what went wrong in the worker."""
        if not self._wanted:
            return self.source.arrays(step)
        if not self._workers:
            self._workers = [_Worker(self.source) for _ in range(self._wanted)]
        for ahead in range(self._wanted * _AHEAD):
            if not self.num_steps or step + ahead < self.num_steps or not ahead:
                self._workers[(step + ahead) % self._wanted].ask(step + ahead, first=ahead < self._wanted)
        return self._workers[step % self._wanted].answer(step)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process, and the steps it was asked for and has not given yet."""

    def __init__(self, source: MakesArrays) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "encore.data.workers", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            )
        self.connection = Connection(ours.detach())
        self.pending: deque[int] = deque()
        self.close = weakref.finalize(self, _end, self.process, self.connection)
        self._send(source)

    def ask(self, step: int, *, first: bool) -> None:
        """Have a step made. `first`: it is the next one that will be wanted of this worker."""
        while first and self.pending and self.pending[0] != step:  # the caller went elsewhere
            self._receive()
        if step not in self.pending:
            self.pending.append(step)
            self._send(step)

    def answer(self, step: int) -> Sequence[Arrays]:
        assert self.pending[0] == step
        answer = self._receive()
        if isinstance(answer, str):
            raise ValueError(f"preparing the data of step {step} failed: {answer}")
        return answer

    def _send(self, what: object) -> None:
        try:
            self.connection.send(what)
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> Sequence[Arrays] | str:
        self.pending.popleft()
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def _died(self) -> WorkerDied:
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
        return WorkerDied(
            f"a worker that prepares the data {how}{hint}; start the same command again to go on, with fewer "
            "data.workers if it comes again"
        )


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _work(connection: Connection) -> None:
    """The worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which then closes the socket
    try:
        source: MakesArrays = connection.recv()
        while True:
            step = connection.recv()
            try:
                answer: Sequence[Arrays] | str = source.arrays(step)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            connection.send(answer)
    except (EOFError, OSError):
        pass  # the training process is gone or has enough


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
