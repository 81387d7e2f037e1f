"""The progress of long work, on a terminal and without one."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from tunesmith.view.bar import track_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock in seconds that only the test moves."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_plain_lines_come_now_and_then_with_rates_and_the_time_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with track_progress(
        "evaluating", 100, "samples", "tokens", done=20, console=Console(file=stream)
    ) as tracker:
        for _ in range(40):
            clock[0] += 0.5
            tracker.advance(1, second=10)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "evaluating: 40 of 100 samples  2.00 samples/s  20 tokens/s  ETA 30 s",
        "evaluating: 60 of 100 samples  2.00 samples/s  20 tokens/s  ETA 20 s",
    ]


def test_short_work_prints_nothing_without_a_terminal(clock: list[float]) -> None:
    stream = io.StringIO()
    with track_progress("writing", 10, "bytes", console=Console(file=stream)) as tracker:
        tracker.advance(10)
    assert stream.getvalue() == ""


def test_a_terminal_shows_a_bar_with_sizes() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with track_progress("writing weights", 4 << 30, "bytes", console=console) as tracker:
        tracker.advance(1 << 30)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "writing weights" in shown
    assert "1.00 GiB of 4.00 GiB" in shown
    assert "ETA" in shown


def test_an_error_inside_ends_the_bar_and_passes_through() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})
    with pytest.raises(ValueError, match="inside"), track_progress("work", 2, "steps", console=console):
        raise ValueError("inside")
