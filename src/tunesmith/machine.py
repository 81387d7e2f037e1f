"""What this machine, or the container on it, lets a process use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 1 << 24

LONGEST_SOCKET_BYTES = 107  # Linux's sockaddr_un
_SOCKET_NAME_BYTES = 40  # a UUID, and what stands around it


def socket_folder() -> str:
    """Return a folder for sockets with names of their own: that of temporary files, or /tmp where that is too long."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) + _SOCKET_NAME_BYTES <= LONGEST_SOCKET_BYTES else "/tmp"


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


def keep_freed_memory() -> None:
    """Let this process keep the memory of tensors that it frees, for those that follow; on Linux with glibc.

    By default it goes back to the system step after step, and every page that comes again is cleared first.
    Large tensors still go back: small ones that live on would break up the room that they leave.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
