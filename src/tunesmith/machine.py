"""What this machine, or the container on it, lets a process use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return the processors this process may use; a container's quota counts."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return max(1, min(cpus, int(quota) // int(period)))
    return cpus


def available_memory() -> int:
    """Return the bytes of host memory that are free to use; a container's limit counts."""
    import psutil

    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Pages of files that nobody uses are given back before anything is refused.
        return max(0, min(available, limit - used + int(stat["inactive_file"])))
    return available
