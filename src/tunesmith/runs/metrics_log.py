"""What a run has recorded in `metrics.jsonl`, as readers take it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.runs.folder import RunDir, check_format_version

ENDINGS = ("finished", "stopped", "failed")


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every line of a `metrics.jsonl` but the header; a torn line is left out.

    Raises:
        RunError: the file is of a newer format.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if "format_version" in line:
                check_format_version(line, path)
            else:
                yield line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, each step's last one of its kind, by step.

    A resumed run repeats steps; the kinds are training lines, evaluations and events.
    """
    last: dict[tuple[int, str], dict[str, Any]] = {}
    for line in iterate_metrics(path):
        kind = "event" + line["event"] if "event" in line else "eval" if "eval_loss" in line else "train"
        last[line["step"], kind] = line
    return sorted(last.values(), key=lambda line: line["step"])


def untrained_loss(run: RunDir) -> float | None:
    """Return the validation loss before the first step, in nats: the base model's; None if it wasn't measured."""
    lines = read_metrics(run.metrics_path)
    return next((line["eval_loss"] for line in lines if "eval_loss" in line and line["step"] == 0), None)


def newest_attempt(run: RunDir) -> int:
    """Return the number of the newest attempt that has written anything, 0 before the first."""
    return max((line["attempt"] for line in iterate_metrics(run.metrics_path)), default=0)


def find_ending(run: RunDir, after_attempt: int = 0) -> dict[str, Any] | None:
    """Return the event that ended the newest attempt; None if it broke off, or is none after `after_attempt`."""
    newest = newest_attempt(run)
    lines = (line for line in iterate_metrics(run.metrics_path) if line["attempt"] == newest)
    endings = [line for line in lines if line.get("event") in ENDINGS]
    return endings[-1] if endings and newest > after_attempt else None


def finished_at(run: RunDir, step: int) -> bool:
    """Return whether any attempt has finished at this step."""
    lines = iterate_metrics(run.metrics_path)
    return any(line.get("event") == "finished" and line["step"] == step for line in lines)
