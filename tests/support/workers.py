"""Gloo processes that tests run functions in: forked once a session from one that has imported what takes long."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# What the training imports, and what it imports late.
_PRELOADED = ["tunesmith.train.loop", "transformers.models.llama.modeling_llama", "peft"]


class WorkerGroup:
    """`world_size` processes in a gloo group; `run(function, *arguments)` calls it on every rank."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, Path(self._folder.name) / "store", theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return each rank's result of `function(rank, world_size, *arguments)`; raise what a rank raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        for rank, (failed, value) in enumerate(answers):
            if failed:
                raise AssertionError(f"rank {rank}:\n{value}")
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def on_nodes_of_two(rank: int, world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function where the ranks stand two by two on nodes, as torchrun says it."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    try:
        return function(rank, world_size, *arguments)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def _serve(rank: int, world_size: int, store: Path, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size
    )
    while (request := pipe.recv()) is not None:
        function, arguments = request
        try:
            pipe.send((False, function(rank, world_size, *arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
