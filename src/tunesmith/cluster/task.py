"""A function run as a task on one of the cluster's nodes, with its log and progress here."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from logging import LogRecord
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from tunesmith.cluster.remote import fetch
from tunesmith.cluster.resources import Node
from tunesmith.failures import Work
from tunesmith.machine import usable_cpus

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SAID_AFTER_S = 15
_PLACED_WITHIN_S = 600
_ENDED_WITHIN_S = 30

Said = SimpleQueue[LogRecord | str | None]
"""What a function logs and prints on its way; None at its end."""


@dataclass(frozen=True)
class _Returned(Generic[Result]):
    """What a function has returned, told apart from what it has said."""

    value: Result


def choose_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes with room for a model: those with GPUs, else those with CPUs.

    Not for their GPUs, which the work may not use, but because a head seldom has the memory.
    """
    return [node for node in nodes if node.gpus] or [node for node in nodes if node.cpus]


def includes_this_one(nodes: Sequence[Node]) -> bool:
    """Return whether this process runs on one of the nodes; it does where it is connected to no cluster."""
    import ray

    return not ray.is_initialized() or ray.get_runtime_context().get_node_id() in {n.node_id for n in nodes}


def run_on(nodes: Sequence[Node], work: Work, function: Callable[..., Result], *arguments: object) -> Result:
    """Return what the function returns on one of the nodes; what it logs and prints appears here.

    Interrupted, or with the process lost, the function has ended when this ends.

    Raises:
        work.failed, work.lost: it failed, its process died, or no node has a CPU for it.
    """
    import ray

    selector = {"ray.io/node-id": f"in({','.join(node.node_id for node in nodes)})"} if nodes else None
    task = ray.remote(_run_here).options(
        num_cpus=1, max_retries=0, num_returns="streaming", label_selector=selector
    )
    stream = task.remote(function, arguments)
    try:
        _wait_until_placed(stream, work)
        result: Result = _follow(stream, work)
    except (KeyboardInterrupt, work.failed, work.lost):
        ray.cancel(stream, force=True)
        ray.wait([stream.completed()], timeout=_ENDED_WITHIN_S)
        raise
    return result


def _wait_until_placed(stream: Any, work: Work) -> None:
    import ray

    if ray.wait([stream], timeout=_SAID_AFTER_S)[0]:
        return
    logger.info("waiting for a CPU of the cluster's nodes")
    if not ray.wait([stream], timeout=_PLACED_WITHIN_S)[0]:
        raise work.failed(
            f"{work.name} has found no CPU on the cluster in {_PLACED_WITHIN_S} s",
            "wait until one is free, or add nodes",
        )


def _follow(stream: Any, work: Work) -> Any:
    """Log and print here what the task says; return what its function has returned."""
    said = None
    for reference in stream:
        said = fetch(reference, work)
        if isinstance(said, LogRecord):
            logging.getLogger(said.name).handle(said)
        elif isinstance(said, str):
            print(said, end="", file=sys.stderr, flush=True)
    assert isinstance(said, _Returned), "it ends with that, or an error"
    return said.value


def _run_here(
    function: Callable[..., Result], arguments: Sequence[object]
) -> Iterator[LogRecord | str | _Returned[Result]]:
    """Yield what the function says while it runs, and at last what it has returned."""
    import torch

    torch.set_num_threads(usable_cpus())  # Ray allows one for each CPU that was asked for
    said: Said = SimpleQueue()
    with ThreadPoolExecutor(1) as thread, _all_said_to(said):
        running = thread.submit(function, *arguments)
        running.add_done_callback(lambda _: said.put(None))
        while (message := said.get()) is not None:
            yield message
        yield _Returned(running.result())


@contextmanager
def _all_said_to(said: Said) -> Iterator[None]:
    """Put what this process logs and prints, on stderr, into the queue."""
    package = logging.getLogger("tunesmith")
    handler = QueueHandler(said)
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        with redirect_stderr(_Lines(said)):
            yield
    finally:
        package.removeHandler(handler)


class _Lines(io.TextIOBase):
    """A stream whose text goes into a queue."""

    def __init__(self, said: Said) -> None:
        self._said = said

    def write(self, text: str) -> int:
        self._said.put(text)
        return len(text)
