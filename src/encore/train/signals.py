"""Ctrl-C and SIGTERM during training: finish the step, save, then stop. A second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_HEEDED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Training was asked to stop and has saved. `exit_code` is the shell's 128 + signal: 130 or 143."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is kept in `signal`; the next one has its usual effect.

    Outside the main thread Python delivers no signals, and nothing is changed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._heed) for number in _HEEDED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _heed(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
