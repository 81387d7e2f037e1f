"""Locks on files, which end with the process that holds them; and disks that have none."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from tunesmith.errors import LockError

__all__ = ["Lock", "Timeout"]

# Of NFS without its lock service, Lustre mounted without `flock`, and file systems in user space.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class Lock:
    """A lock on a file. A context manager once it is acquired.

    `remedy` says which setting puts the file on another disk.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path = path
        self._remedy = remedy
        self._lock = FileLock(path)

    def acquire(self, timeout: float = -1) -> Lock:
        """Wait for the lock, at most `timeout` seconds; less than 0 waits for ever.

        Raises:
            Timeout: another process holds it.
            LockError: the disk has no locks.
            OSError: the file can't be written.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="flock not supported")
                self._lock.acquire(timeout=timeout)
        except NotImplementedError as error:  # of an older filelock, for ENOSYS
            raise self._no_locks(os.strerror(errno.ENOSYS)) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            raise self._no_locks(error.strerror or str(error)) from error
        if type(self._lock) is SoftFileLock:
            # What filelock takes in place of a lock outlives a process that is killed.
            self._lock.release()
            raise self._no_locks(os.strerror(errno.ENOSYS))
        return self

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _no_locks(self, reason: str) -> LockError:
        return LockError(
            f"the disk of `{self.path.parent}` has no locks: `{self.path.name}` can't be locked there ({reason})",
            f"{self._remedy}; or mount this one with locks (NFS: with its lock service; Lustre: -o flock)",
        )
