"""Conversion where a model has room: in this process, or as a task on a node of the Ray cluster."""

from __future__ import annotations

import io
import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from logging import LogRecord
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tunesmith.cluster.local_ray import ended_by_sigterm
from tunesmith.cluster.remote import Work, fetch
from tunesmith.cluster.resources import Node, connected_nodes
from tunesmith.config import ConvertConfig
from tunesmith.errors import ConfigError, ExportError
from tunesmith.export.convert import Exported, choose_output, export
from tunesmith.export.folder import mark_beside, tidy
from tunesmith.machine import usable_cpus
from tunesmith.runs.tuned import TunedModel, taken

logger = logging.getLogger(__name__)

_SAID_AFTER_S = 15
_PLACED_WITHIN_S = 600
_ENDED_WITHIN_S = 30
_HINT = "nothing was put in place; a process that dies has mostly run out of its node's memory"

Said = SimpleQueue[LogRecord | str | None]
"""What an export logs and prints on its way; None at its end."""

_CONVERSION = Work("the conversion", ExportError, ExportError, _HINT)


def convert(config: ConvertConfig) -> Exported:
    """Export the tuned model that the settings mean; see `export.convert.export`.

    On the Ray cluster of `RAY_ADDRESS`, if that is set, it runs on a node with GPUs, or without any GPU in the
    cluster on one with CPUs: not for their GPUs, which it doesn't use, but because a head seldom has the memory.

    Raises:
        ConfigError, ModelError, ResourceError, RunError: bad input, before anything is written.
        CheckpointError: the checkpoint can't be read.
        ExportError: it can't be written or isn't equal, or the process on the cluster is lost.
    """
    with taken(config, "convert_checkpoint_to_hf") as tuned, connected_nodes() as (nodes, place):
        output = choose_output(tuned, config)
        fitting = choose_nodes(nodes)
        if place == "this machine" or _is_here(fitting):
            return export(tuned, config, output)
        with ended_by_sigterm(), mark_beside(output) as mark:
            return _export_on(fitting, tuned, config, output, mark)


def choose_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes that a conversion may run on: those with GPUs, else those with CPUs."""
    return [node for node in nodes if node.gpus] or [node for node in nodes if node.cpus]


def _is_here(nodes: Sequence[Node]) -> bool:
    import ray

    return ray.get_runtime_context().get_node_id() in {node.node_id for node in nodes}


def _export_on(
    nodes: Sequence[Node], tuned: TunedModel, config: ConvertConfig, output: Path, mark: Path
) -> Exported:
    """Run `export` as a task on one of the nodes, with its log and progress here.

    Ended by a signal or a lost process, it leaves nothing half-written.
    """
    import ray

    selector = {"ray.io/node-id": f"in({','.join(node.node_id for node in nodes)})"} if nodes else None
    task = ray.remote(_export_here).options(
        num_cpus=1, max_retries=0, num_returns="streaming", label_selector=selector
    )
    stream = task.remote(tuned, config, output, mark)
    try:
        _wait_until_placed(stream)
        return _follow(stream)
    except (KeyboardInterrupt, ExportError):
        ray.cancel(stream, force=True)
        ray.wait([stream.completed()], timeout=_ENDED_WITHIN_S)
        tidy(output)
        raise


def _wait_until_placed(stream: Any) -> None:
    import ray

    if ray.wait([stream], timeout=_SAID_AFTER_S)[0]:
        return
    logger.info("waiting for a CPU of the cluster's nodes")
    if not ray.wait([stream], timeout=_PLACED_WITHIN_S)[0]:
        raise ExportError(
            f"the conversion has found no CPU on the cluster in {_PLACED_WITHIN_S} s",
            "wait until one is free, or add nodes",
        )


def _follow(stream: Any) -> Exported:
    """Log and print here what the task says; return what it has written."""
    said = None
    for reference in stream:
        said = fetch(reference, _CONVERSION)
        if isinstance(said, LogRecord):
            logging.getLogger(said.name).handle(said)
        elif isinstance(said, str):
            print(said, end="", file=sys.stderr, flush=True)
    assert isinstance(said, Exported), "it ends with that, or an error"
    return said


def _export_here(
    tuned: TunedModel, config: ConvertConfig, output: Path, mark: Path
) -> Iterator[LogRecord | str | Exported]:
    """Yield what the export says while it runs, and at last what it has written."""
    import torch

    for path in (mark, tuned.folder):
        if not path.exists():
            raise ConfigError(
                f"the node {socket.gethostname()} can't see `{path.parent}`",
                "give --home and --output_dir on a disk that every node of the cluster mounts at the same path",
            )
    torch.set_num_threads(usable_cpus())  # Ray allows one for each CPU that was asked for
    said: Said = SimpleQueue()
    with ThreadPoolExecutor(1) as thread, _all_said_to(said):
        logger.info("converting on %s", socket.gethostname())
        exporting = thread.submit(export, tuned, config, output)
        exporting.add_done_callback(lambda _: said.put(None))
        while (message := said.get()) is not None:
            yield message
        yield exporting.result()


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
