"""One live driver per run folder, by a lease that its holder renews."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from tunesmith.atomic_files import write_json
from tunesmith.errors import RunError
from tunesmith.locks import Lock

logger = logging.getLogger(__name__)

RENEW_S = 10.0
EXPIRE_S = 60.0


class Lease:
    """The right to write a run folder. A context manager: held inside, given back on leaving.

    A holder that died on this host is replaced at once; one elsewhere when it hasn't renewed for
    `EXPIRE_S` seconds.

    Raises (on entering):
        RunError: another live driver holds the folder; says its host, process and age.
        LockError: the disk has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = uuid.uuid4().hex[:12]
        self.is_lost = False
        """Another driver has taken the folder over: nothing more may be written to it."""
        self._acquired_at = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(self.path.with_suffix(".lock"), "give a --home on another disk").acquire():
            refuse_if_held(self.path)
            holder = read_holder(self.path)
            if holder is not None:
                logger.info(
                    "Replacing the lease of process %s on %s, which is gone.", holder["pid"], holder["host"]
                )
            self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        if holds(self.path, self.token):
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        holder = {
            "token": self.token,
            "host": socket.gethostname(),
            "processes": _process_space(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "acquired_at": self._acquired_at,
            "renewed_at": time.time(),
        }
        write_json(self.path, holder)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if not holds(self.path, self.token):
                    self.is_lost = True
                    return
                self._write()
            except OSError as error:
                logger.warning("could not renew the lease `%s`, trying again: %s", self.path, error)


def refuse_if_held(path: Path) -> None:
    """Refuse a run folder that another live driver holds, before anything is done for it.

    Raises:
        RunError: with the holder's host, process and age.
    """
    holder = read_holder(path)
    if holder is not None and _is_alive(holder):
        raise RunError(_describe(holder, path), "wait for it, stop it, or choose another --run_name")


def read_holder(path: Path) -> dict[str, Any] | None:
    """Return who holds the lease, or None."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def holds(path: Path, token: str) -> bool:
    """Return whether the lease at `path` is the one called `token`: what a worker asks before it publishes."""
    holder = read_holder(path)
    return holder is not None and holder["token"] == token


def _is_alive(holder: dict[str, Any]) -> bool:
    if (holder["host"], holder["processes"]) == (socket.gethostname(), _process_space()):
        start = _process_start(holder["pid"])
        return start is not None and start == str(holder["process_start"])
    return bool(time.time() - holder["renewed_at"] < EXPIRE_S)


def _process_space() -> str:
    """Return what tells whether two processes number their processes alike: containers may share a host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Return what tells this process from a later one of the same number, or None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return _process_start_without_proc(pid)
    # A killed process that its parent hasn't reaped yet ("Z") writes no more.
    return None if fields[0] == "Z" else fields[19]


def _process_start_without_proc(pid: int) -> str | None:
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    return "unknown"


def _describe(holder: dict[str, Any], path: Path) -> str:
    age_min = (time.time() - holder["acquired_at"]) / 60
    return (
        f"the run `{path.parent}` is held by process {holder['pid']} on host {holder['host']}, "
        f"started {age_min:.0f} min ago, renewed {time.time() - holder['renewed_at']:.0f} s ago"
    )
