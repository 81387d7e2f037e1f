"""How far a long piece of work is: a bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tunesmith.view.units import format_bytes, format_duration

_PLAIN_INTERVAL_S = 10.0

Show = Callable[[int, str], None]


class Tracker:
    """Counts the work that is done, and shows it: the count and the figures beside it."""

    def __init__(self, total: int, unit: str, second_unit: str | None, done: int, show: Show) -> None:
        self._total, self._done, self._first = total, done, done
        self._unit, self._second_unit, self._second = unit, second_unit, 0
        self._show = show
        self._started_at = time.monotonic()

    def advance(self, amount: int, second: int = 0) -> None:
        """Count `amount` of the unit, and `second` of the second unit, as done."""
        self._done += amount
        self._second += second
        self._show(self._done, self._figures())

    def _figures(self) -> str:
        elapsed_s = max(time.monotonic() - self._started_at, 1e-6)
        rate = (self._done - self._first) / elapsed_s
        if self._unit == "bytes":
            parts = [f"{format_bytes(self._done)} of {format_bytes(self._total)}", f"{format_bytes(rate)}/s"]
        else:
            parts = [f"{self._done:,} of {self._total:,} {self._unit}", f"{rate:,.2f} {self._unit}/s"]
        if self._second_unit is not None:
            parts.append(f"{self._second / elapsed_s:,.0f} {self._second_unit}/s")
        if rate > 0 and self._done < self._total:
            parts.append(f"ETA {format_duration((self._total - self._done) / rate)}")
        return "  ".join(parts)


@contextmanager
def track_progress(
    what: str,
    total: int,
    unit: str,
    second_unit: str | None = None,
    done: int = 0,
    console: Console | None = None,
    plain_interval_s: float = _PLAIN_INTERVAL_S,
) -> Iterator[Tracker]:
    """Show the progress of the body, which calls the tracker's `advance`.

    Args:
        what: the work, such as "writing weights".
        total: all there is to do, in units.
        unit: a plural such as samples; `bytes` are shown as MiB and GiB.
        second_unit: what else is counted, for its rate alone, such as tokens.
        done: what had been done before, which the rates leave out.
        console: where it is shown; by default stderr.
        plain_interval_s: seconds from one line to the next where there is no terminal.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        lines = _PlainLines(what, console, plain_interval_s)
        yield Tracker(total, unit, second_unit, done, lines.show)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total, completed=done, figures="")
        yield Tracker(
            total,
            unit,
            second_unit,
            done,
            lambda count, figures: progress.update(task, completed=count, figures=figures),
        )


class _PlainLines:
    def __init__(self, what: str, console: Console, interval_s: float) -> None:
        self._what, self._console, self._interval_s = what, console, interval_s
        self._shown_at = time.monotonic()

    def show(self, done: int, figures: str) -> None:
        now = time.monotonic()
        if now - self._shown_at >= self._interval_s:
            self._shown_at = now
            self._console.print(f"{self._what}: {figures}", markup=False, highlight=False, soft_wrap=True)
