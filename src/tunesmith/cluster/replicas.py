"""Replicas of an engine on Ray: each takes a share of the requests whenever it is free, and a lost one is replaced."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.cluster.remote import fetch
from tunesmith.errors import EvaluationError
from tunesmith.evaluate.engines.base import EngineSpec, Generation, Request, Variant
from tunesmith.evaluate.engines.choose import make_engine
from tunesmith.evaluate.engines.pool import EVALUATION, ReplicaLostError

logger = logging.getLogger(__name__)

# Not in all: a node takes the replicas of all its GPUs with it, and those placed there anew.
_MAX_LOST_EACH = 3
_SAID_AFTER_S = 15
_PLACED_WITHIN_S = 600
_CLOSED_WITHIN_S = 30

Share = dict[tuple[Variant, int], Request]
"""The requests that one replica answers, without those that it has answered."""


class Replica:
    """One engine, in a process of its own."""

    def __init__(self, engine: str, spec: EngineSpec) -> None:
        self._engine_name = engine
        self._spec = spec
        self._engine: Any = None

    def load(self) -> Iterator[list[Generation]]:
        """Load the engine; an empty list comes first, as a sign that this process has its place on a node."""
        yield []
        # Not when it is made: an error of that reaches nobody whole.
        self._engine = make_engine(self._engine_name, self._spec)

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Generation]]:
        yield from self._engine.generate(requests)

    def close(self) -> None:
        self._engine.close()


@dataclass
class _Task:
    """What a replica is at: its share, or loading."""

    replica: Any
    share: Share | None = None
    is_placed: bool = True
    started_at: float = field(default_factory=time.monotonic)


class Replicas:
    """The replicas of one engine, and who of them is at what."""

    def __init__(
        self, engine: str, spec: EngineSpec, num_replicas: int, cpus_each: int, gpus_each: int
    ) -> None:
        """Start them; `wait_until_loaded` says when one of them can generate."""
        self._engine = engine
        self._spec = spec
        self._num_replicas = num_replicas
        self._cpus_each = cpus_each
        self._gpus_each = gpus_each
        self._alive: list[Any] = []
        self._free: list[Any] = []
        self._tasks: dict[Any, _Task] = {}
        self._num_lost = 0
        self._has_said = False
        for _ in range(num_replicas):
            self._start()

    def wait_until_loaded(self) -> None:
        """Wait for the first replica; the others join when they are loaded.

        Raises:
            ModelError: the engine can't load or serve the model.
            EvaluationError: replicas keep dying, or none finds room on the cluster.
        """
        while not self._free:
            self._advance([])

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Generation]]:
        """Yield every request's generation once, in any order.

        Raises:
            EvaluationError: replicas fail or keep dying, or none finds room on the cluster.
        """
        # In turn, so that each gets short and long ones, tuned and base.
        dealt = [requests[number :: self._num_replicas] for number in range(self._num_replicas)]
        queue = [{(r.variant, r.sample): r for r in share} for share in dealt if share]
        while queue or any(task.share is not None for task in self._tasks.values()):
            while queue and self._free:
                self._hand_out(queue.pop(0))
            finished = self._advance(queue)
            if finished:
                yield finished

    def close(self) -> None:
        """End the replicas. Those at rest close their engine first: the next one finds the GPUs' memory free."""
        import ray

        closing = [replica.close.remote() for replica in self._free]
        ray.wait(closing, num_returns=len(closing), timeout=_CLOSED_WITHIN_S)
        for replica in self._alive:
            ray.kill(replica)

    def _start(self) -> None:
        import ray

        actor = ray.remote(Replica).options(num_cpus=self._cpus_each, num_gpus=self._gpus_each)
        replica = actor.remote(self._engine, self._spec)
        self._alive.append(replica)
        stream = replica.load.options(num_returns="streaming").remote()
        self._tasks[stream] = _Task(replica, is_placed=False)
        self._has_said = False

    def _hand_out(self, share: Share) -> None:
        replica = self._free.pop()
        stream = replica.generate.options(num_returns="streaming").remote(list(share.values()))
        self._tasks[stream] = _Task(replica, share)

    def _advance(self, queue: list[Share]) -> list[Generation]:
        """Wait for news of a replica and return what it has finished; a lost one's share goes back to the queue."""
        import ray

        self._check_placement()
        ready, _ = ray.wait(list(self._tasks), num_returns=1, timeout=_SAID_AFTER_S)
        if not ready:
            return []
        task = self._tasks[ready[0]]
        try:
            finished: list[Generation] = fetch(next(ready[0]), EVALUATION)
        except StopIteration:
            del self._tasks[ready[0]]
            self._free.append(task.replica)
            return []
        except ReplicaLostError as error:
            del self._tasks[ready[0]]
            self._replace(task, error)
            if task.share:
                queue.append(task.share)
            return []
        task.is_placed = True
        for generation in finished:
            assert task.share is not None, "who loads generates nothing"
            del task.share[generation.variant, generation.sample]
        return finished

    def _replace(self, lost: _Task, error: ReplicaLostError) -> None:
        import ray

        self._num_lost += 1
        if self._num_lost > _MAX_LOST_EACH * self._num_replicas:
            raise EvaluationError(f"{self._num_lost} times {error.message}", error.hint) from error
        logger.warning(
            "a replica is lost, %d samples go to whichever is free first, and another is started: %s",
            len(lost.share or ()),
            error.message,
        )
        self._alive.remove(lost.replica)
        # One that only is out of reach may hold its GPUs still.
        ray.kill(lost.replica)
        self._start()

    def _check_placement(self) -> None:
        """Say what replicas wait for, once; give up where none is alive and none has found room for long."""
        now = time.monotonic()
        waits_s = [now - task.started_at for task in self._tasks.values() if not task.is_placed]
        each, unit = (self._gpus_each, "GPUs") if self._gpus_each else (self._cpus_each, "CPUs")
        late = [wait_s for wait_s in waits_s if wait_s >= _SAID_AFTER_S]
        if late and not self._has_said:
            logger.info("waiting for %d of the cluster's %s", len(late) * each, unit)
            self._has_said = True
        none_is_alive = len(waits_s) == len(self._tasks) and not self._free
        if none_is_alive and min(waits_s) >= _PLACED_WITHIN_S:
            raise EvaluationError(
                f"no replica of {each} {unit} has found room on the cluster in {_PLACED_WITHIN_S} s",
                f"wait until {unit} are free, or add nodes; the finished samples are kept, and the same command goes on",
            )
