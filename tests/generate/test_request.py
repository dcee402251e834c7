"""Stop strings, however the text arrives in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encore.generate.request import Request, StopScanner
from encore.generate.sampling import SamplingSettings


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], str | None]:
    scanner = StopScanner(stops)
    shown = [scanner.push(piece) for piece in pieces]
    shown.append("" if scanner.found is not None else scanner.finish())
    return shown, scanner.found


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_the_text_is_cut_at_the_earliest_stop_as_if_it_came_at_once(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    shown, found = run(tuple(stops), pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    if found is None:
        assert not places
        assert "".join(shown) == whole
    else:
        # Whatever completes first ends it, so the cut is never later than the first stop that is complete.
        ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
        cut = len("".join(shown))
        assert whole.startswith("".join(shown))
        assert whole[cut:].startswith(found)
        assert cut <= min(ends)


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3), st.text("abc", max_size=12))
def test_nothing_shown_is_ever_part_of_a_stop(stops: list[str], whole: str) -> None:
    shown, _ = run(tuple(stops), list(whole))
    assert all(stop not in "".join(shown) for stop in stops)


def test_what_could_begin_a_stop_is_held_back_and_released() -> None:
    scanner = StopScanner(("END", "\n\n"))
    assert scanner.push("one E") == "one "
    assert scanner.push("N") == ""
    assert scanner.push("TER\n") == "ENTER"
    assert scanner.finish() == "\n"
    assert scanner.found is None


def test_after_a_stop_nothing_more_is_shown() -> None:
    assert run(("stop",), ["a st", "op b", "c"]) == (["a ", "", "", ""], "stop")


def test_a_finished_request_takes_no_more_and_an_unfinished_one_has_no_result() -> None:
    logits = np.array([0.0, 1.0, 3.0], dtype=np.float32)
    request = Request(5, SamplingSettings(max_target_tokens=2), stop_ids=(1,))
    with pytest.raises(ValueError, match="request 5 has not ended"):
        request.result()
    assert request.accept(logits).finish_reason is None
    assert request.accept(logits).finish_reason == "length"
    with pytest.raises(ValueError, match="takes no more logits"):
        request.accept(logits)
    assert (request.result().tokens, request.result().log_probabilities) == ([2, 2], []), "nobody asked for the latter"


def test_a_stop_id_ends_it_even_as_the_last_token_allowed() -> None:
    logits = np.array([0.0, 9.0, 3.0], dtype=np.float32)
    request = Request(0, SamplingSettings(max_target_tokens=1, log_probabilities=True), stop_ids=(0, 1))
    event = request.accept(logits)
    assert (event.token, event.finish_reason, request.result().stop) == (1, "stop", 1)
    expected = 9.0 - np.logaddexp.reduce(logits.astype(float))
    assert request.result().log_probabilities == [event.log_probability] == [pytest.approx(expected, abs=1e-6)]
