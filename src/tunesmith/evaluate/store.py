"""What an evaluation has generated so far, kept line by line, so that one cut short goes on.

generations.jsonl: a header with the evaluation's identity, then a line for each finished generation, with a
digest of its prompt and its share of the time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunesmith.atomic_files import write_json_lines
from tunesmith.errors import RunError
from tunesmith.evaluate.engines.base import Generation, Request, Variant
from tunesmith.locks import Lock, Timeout
from tunesmith.runs.folder import FORMAT_VERSION

logger = logging.getLogger(__name__)

Key = tuple[Variant, int]


class GenerationStore:
    """The generations of one evaluation: a folder that one process at a time may write.

    `identity` holds everything that shapes a generation, by the names that a message calls it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], prompts: Mapping[int, Sequence[int]]) -> None:
        self._path = folder / "generations.jsonl"
        self._identity = identity
        self._digests = {
            sample: hashlib.blake2b(repr(tuple(ids)).encode(), digest_size=8).hexdigest()
            for sample, ids in prompts.items()
        }
        self._lines: list[dict[str, Any]] = []
        self.finished: dict[Key, Generation] = {}
        self.seconds = 0.0
        """Time that generating took, without loading the model."""
        self._read()

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Return the requests that are not generated yet."""
        return [request for request in requests if (request.variant, request.sample) not in self.finished]

    def record(self, generations: Iterable[list[Generation]]) -> Iterator[list[Generation]]:
        """Write generations down as they come, and hand them on."""
        # Only now: what another evaluation has kept is lost when something takes its place.
        header = {"format_version": FORMAT_VERSION, "identity": self._identity}
        write_json_lines(self._path, [header, *self._lines])
        last = time.monotonic()
        with self._path.open("a", encoding="utf-8") as file:
            for together in generations:
                now = time.monotonic()
                lines = [self._line(generation, (now - last) / len(together)) for generation in together]
                file.write("".join(json.dumps(line) + "\n" for line in lines))
                file.flush()
                for line in lines:
                    self._keep(line)
                last = now
                yield together

    def _line(self, generation: Generation, seconds: float) -> dict[str, Any]:
        return {**asdict(generation), "prompt": self._digests[generation.sample], "seconds": seconds}

    def _keep(self, line: dict[str, Any]) -> None:
        generation = Generation(
            line["sample"], line["variant"], tuple(line["token_ids"]), line["finish_reason"]
        )
        self.finished[generation.variant, generation.sample] = generation
        self.seconds += line["seconds"]
        self._lines.append(line)

    def _read(self) -> None:
        header, *lines = [*_whole_lines(self._path)] or [{}]
        recorded = header.get("identity", {})
        if recorded == self._identity:
            for line in lines:
                if self._digests.get(line["sample"], line["prompt"]) == line["prompt"]:
                    self._keep(line)
        elif recorded:
            differing = [name for name in self._identity if recorded.get(name) != self._identity[name]]
            logger.info(
                "generating anew: %s differ from the last evaluation", ", ".join(differing) or "formats"
            )


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
def only_writer(folder: Path, lies_in_run: bool) -> Iterator[None]:
    """Hold an evaluation's folder, which may lie in the run that it is of.

    Raises:
        RunError: another process evaluates this checkpoint, or the folder can't be written.
        LockError: the disk has no locks.
    """
    elsewhere = "give another --home"
    if lies_in_run:  # which `home` doesn't move
        elsewhere = "copy the run to another disk, and evaluate that one"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / ".lock", elsewhere)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process is evaluating into `{folder}`", "wait for it, or stop it") from None
    except OSError as error:
        raise RunError(f"can't write to `{folder}`: {error.strerror or error}", elsewhere) from error
    try:
        yield
    finally:
        lock.release()
