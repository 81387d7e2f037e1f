"""What an evaluation has generated so far, kept line by line, so that one cut short goes on.

generations.jsonl: a header with the evaluation's identity, then a line for each finished generation, and
one for each pass with its duration.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tunesmith.errors import RunError
from tunesmith.evaluate.engine import Generation, Request, Variant
from tunesmith.runs import FORMAT_VERSION, write_json_lines

logger = logging.getLogger(__name__)

Key = tuple[Variant, int]


class GenerationStore:
    """The generations of one evaluation: a folder that one process at a time may write.

    `identity` holds everything that shapes a generation, by the names that a message calls it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._path = folder / "generations.jsonl"
        self._identity = identity
        self.finished: dict[Key, Generation] = {}
        self.seconds = 0.0
        """Time that generating took, over all passes, without loading the model."""
        self._read()

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Return the requests that are not generated yet."""
        return [request for request in requests if (request.variant, request.sample) not in self.finished]

    def record(self, generations: Iterable[list[Generation]]) -> Iterator[list[Generation]]:
        """Write generations down as they come, and hand them on."""
        start = last = time.monotonic()
        with self._path.open("a", encoding="utf-8") as file:
            try:
                for together in generations:
                    file.write("".join(json.dumps(asdict(generation)) + "\n" for generation in together))
                    file.flush()
                    self.finished |= {(each.variant, each.sample): each for each in together}
                    last = time.monotonic()
                    yield together
            finally:
                self.seconds += last - start
                file.write(json.dumps({"pass_seconds": last - start}) + "\n")

    def _read(self) -> None:
        lines = list(_whole_lines(self._path))
        if lines and lines[0].get("identity") == self._identity:
            for line in lines[1:]:
                if "pass_seconds" in line:
                    self.seconds += line["pass_seconds"]
                else:
                    generation = Generation(**{**line, "token_ids": tuple(line["token_ids"])})
                    self.finished[generation.variant, generation.sample] = generation
        elif lines:
            recorded = lines[0].get("identity", {})
            differing = [name for name in self._identity if recorded.get(name) != self._identity[name]]
            logger.info(
                "generating anew: %s differ from the last evaluation", ", ".join(differing) or "formats"
            )
        # Without what a killed writer left half-written.
        header = {"format_version": FORMAT_VERSION, "identity": self._identity}
        write_json_lines(self._path, [header, *(lines[1:] if self.finished or self.seconds else [])])


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                yield dict(json.loads(text))
            except (json.JSONDecodeError, TypeError, ValueError):
                continue


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold an evaluation's folder.

    Raises:
        RunError: another process evaluates this checkpoint, or the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process is evaluating into `{folder}`", "wait for it, or stop it") from None
    except OSError as error:
        raise RunError(
            f"can't write to `{folder}`: {error.strerror or error}", "give another --home"
        ) from error
    try:
        yield
    finally:
        lock.release()
