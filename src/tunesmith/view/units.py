"""Durations, bytes and numbers as people read them."""

from __future__ import annotations

import math


def format_duration(seconds: float) -> str:
    """Return the two largest units: `42 s`, `3 min 05 s`, `2 h 10 min`, `1 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    if minutes:
        return f"{minutes} min {whole % 60:02d} s"
    return f"{whole} s"


def format_step_time(seconds: float) -> str:
    """Return a step's time in ms below a tenth of a second, else in s."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def format_bytes(num_bytes: float) -> str:
    """Return a size in MiB below one GiB, else in GiB."""
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.0f} MiB"


def format_loss(loss: float) -> str:
    """Return a loss to four decimals; a large one to four digits."""
    return f"{loss:.4f}" if abs(loss) < 100 else f"{loss:.4g}"
