"""A warning when one side of an encoder-decoder leaves the other behind: its gradients run away, or are nothing.

The two sides of an adapted model start from the same weights and keep their own size of gradients; what matters is
not the ratio of the norms but that it stays near its own median. Nothing here changes what is learned.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

WINDOW = 100
SETTLING_STEPS = 20  # of a ratio's median, before it is trusted
PATIENCE_STEPS = 5  # in a row, before a warning
FAR = 30.0  # times the median
NOTHING = 1e-6  # of the other side's norm


class Balance:
    """Watches the norms of the encoder's and the decoder's gradients; each kind of warning is given once."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=WINDOW)
        self._running: dict[str, int] = {}
        self._told: set[str] = set()

    def look(self, step: int, norms: Mapping[str, float]) -> str | None:
        """A warning, or None; `norms` as `clip_gradients` gives them. Models of one side have nothing to compare."""
        encoder, decoder = norms.get("gradient_norm_encoder"), norms.get("gradient_norm_decoder")
        if encoder is None or decoder is None or max(encoder, decoder) == 0:
            return None
        if min(encoder, decoder) < NOTHING * max(encoder, decoder):
            still = "encoder" if encoder < decoder else "decoder"
            if self._due("still"):
                return (
                    f"warning: in step {step} the {still} gets no gradient to speak of (norms: encoder {encoder:.2g}, "
                    f"decoder {decoder:.2g}) for {PATIENCE_STEPS} steps: it is not learning; look at the initial "
                    f"weights and at what reaches the {still}"
                )
            return None
        self._running.pop("still", None)
        ratio = encoder / decoder
        usual = median(self._ratios) if len(self._ratios) >= SETTLING_STEPS else ratio
        self._ratios.append(ratio)
        if abs(math.log(ratio / usual)) <= math.log(FAR):
            self._running.pop("far", None)
            return None
        if not self._due("far"):
            return None
        side, other = ("encoder", "decoder") if ratio > usual else ("decoder", "encoder")
        return (
            f"warning: in step {step} the {side}'s gradient norm has run away from the {other}'s: encoder "
            f"{encoder:.2g}, decoder {decoder:.2g}, more than {FAR:.0f} times off their usual ratio of {usual:.2g}, "
            f"for {PATIENCE_STEPS} steps; lower optim.{side}_rate or optim.learning_rate, or look at the data"
        )

    def _due(self, kind: str) -> bool:
        self._running[kind] = self._running.get(kind, 0) + 1
        if self._running[kind] < PATIENCE_STEPS or kind in self._told:
            return False
        self._told.add(kind)
        return True
