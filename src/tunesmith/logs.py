"""Where log lines go."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def configure_logging() -> None:
    """Log to stderr: our own events from INFO up, other libraries' from WARNING up.

    A program that has configured logging keeps its own handlers.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("tunesmith").setLevel(logging.INFO)
    for name in ("transformers", "datasets", "peft", "filelock", "fsspec", "urllib3", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers and datasets set their own loggers' levels when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@contextmanager
def log_to_file(path: Path, rank: int = 0) -> Iterator[None]:
    """Append this process's log to `path` while inside: events on rank 0, failures on every rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    handler.addFilter(lambda record: record.name.startswith("tunesmith") or record.levelno >= logging.WARNING)
    root, package = logging.getLogger(), logging.getLogger("tunesmith")
    root.addHandler(handler)
    package.setLevel(min(package.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
