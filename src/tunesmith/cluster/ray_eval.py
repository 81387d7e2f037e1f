"""Evaluation where the GPUs are: in this process, or by replicas of the model on Ray."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from tunesmith.cluster.local_ray import ray_at_hand
from tunesmith.cluster.resources import Node, connected_nodes
from tunesmith.config import EvaluateConfig
from tunesmith.errors import EvaluationError, ResourceError, TunesmithError
from tunesmith.evaluate.engine import EngineSpec, Generation, Request, make_engine
from tunesmith.evaluate.evaluation import EvaluationResult, Generate, Pool, run_evaluation
from tunesmith.evaluate.results import Prediction
from tunesmith.evaluate.score import Metric, choose_metrics, score_predictions
from tunesmith.tuned import taken

logger = logging.getLogger(__name__)

_MAX_LOST_REPLICAS = 3


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate a tuned model beside its base model, as `config` says; finished samples are kept if it is cut short.

    Runs on the GPUs of the Ray cluster of `RAY_ADDRESS`, else on this machine.

    Raises:
        ConfigError, DataError, ModelError, ResourceError, RunError: bad input, before anything is generated.
        EvaluationError: the replicas keep failing.
    """
    with (
        _ended_by_sigterm(),
        taken(config, "test_checkpoint") as tuned,
        connected_nodes() as (nodes, place),
    ):
        return run_evaluation(config, tuned, choose_pool(config, nodes, place))


def choose_pool(config: EvaluateConfig, nodes: Sequence[Node], place: str) -> Pool:
    """Return where the engines run.

    Raises:
        ResourceError: the evaluation asks for more GPUs or replicas than there are.
    """
    size = config.tensor_parallel_size
    use_gpu = any(node.gpus for node in nodes)
    if size > 1 and max(node.gpus for node in nodes) < size:
        raise ResourceError(
            f"`tensor_parallel_size` is {size}, but no node of {place} has {size} GPUs",
            "set it to at most the GPUs of one node",
        )
    fitting = sum(node.gpus // size for node in nodes) if use_gpu else sum(node.cpus for node in nodes)
    num_replicas = config.num_replicas or (fitting if use_gpu else 1)
    if num_replicas > fitting:
        raise ResourceError(
            f"`num_replicas` is {num_replicas}, but {place} holds {fitting}",
            f"ask for at most {fitting}, or leave `num_replicas` out",
        )
    cpus = 1 if use_gpu else max(node.cpus for node in nodes) // num_replicas or 1
    num_threads = None if use_gpu else cpus
    if num_replicas == 1 and place == "this machine":
        return LocalPool(use_gpu, num_threads)
    return RayPool(num_replicas, use_gpu, num_threads, size if use_gpu else 0, cpus)


class LocalPool:
    """One engine, in this process."""

    num_replicas = 1

    def __init__(self, use_gpu: bool, num_threads: int | None) -> None:
        self.use_gpu = use_gpu
        self.num_threads = num_threads
        self.score_device = "cuda" if use_gpu else "cpu"

    @contextmanager
    def load(self, engine: str, spec: EngineSpec) -> Iterator[Generate]:
        with closing(make_engine(engine, spec)) as loaded:
            yield loaded.generate

    def score(
        self, rows: Sequence[Prediction], metrics: Sequence[Metric], bertscore_model: str | None
    ) -> list[Prediction]:
        return score_predictions(rows, metrics)


class RayPool:
    """Replicas of an engine on a Ray cluster, each on its own GPUs; one that dies is replaced."""

    score_device = "cpu"  # the driver may run on a head without GPUs

    def __init__(
        self, num_replicas: int, use_gpu: bool, num_threads: int | None, gpus_each: int, cpus_each: int
    ) -> None:
        self.num_replicas = num_replicas
        self.use_gpu = use_gpu
        self.num_threads = num_threads
        self._gpus_each = gpus_each
        self._cpus_each = cpus_each

    @contextmanager
    def load(self, engine: str, spec: EngineSpec) -> Iterator[Generate]:
        import ray

        with ray_at_hand(self.num_replicas * self._cpus_each):
            replicas: list[Any] = []

            def start() -> Any:
                actor = ray.remote(Replica).options(num_cpus=self._cpus_each, num_gpus=self._gpus_each)
                replicas.append(actor.remote(engine, spec))
                return replicas[-1]

            try:
                first = [start() for _ in range(self.num_replicas)]
                for replica in first:
                    _get(replica.load.remote())
                yield lambda requests: _spread(requests, first, start)
            finally:
                for replica in replicas:
                    ray.kill(replica)

    def score(
        self, rows: Sequence[Prediction], metrics: Sequence[Metric], bertscore_model: str | None
    ) -> list[Prediction]:
        import ray

        if not self.use_gpu:
            return score_predictions(rows, metrics)
        names = [metric.name for metric in metrics]
        with ray_at_hand(self._cpus_each):
            task = ray.remote(_score_on_gpu).options(num_gpus=1)
            scored: list[Prediction] = _get(task.remote(rows, names, bertscore_model))
        return scored


class Replica:
    """One engine, in a process of its own."""

    def __init__(self, engine: str, spec: EngineSpec) -> None:
        self._engine_name = engine
        self._spec = spec
        self._engine: Any = None

    def load(self) -> None:
        # Not when it is made: an error of that reaches nobody whole.
        if self._engine is None:
            self._engine = make_engine(self._engine_name, self._spec)

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Generation]]:
        self.load()
        yield from self._engine.generate(requests)


def _score_on_gpu(
    rows: Sequence[Prediction], names: Sequence[str], bertscore_model: str | None
) -> list[Prediction]:
    references = [row["reference"] for row in rows]
    metrics, _ = choose_metrics(names, references, bertscore_model, "cuda")
    return score_predictions(rows, metrics)


def _spread(requests: Sequence[Request], replicas: Sequence[Any], start: Any) -> Iterator[list[Generation]]:
    """Yield every request's generation; what a lost replica has not yielded goes to the one in its place."""
    import ray
    from ray.exceptions import RayActorError

    # In turn, so that each gets short and long ones, tuned and base.
    shares = [list(requests[number :: len(replicas)]) for number in range(len(replicas))]
    streams = {
        _stream(replica, share): share for replica, share in zip(replicas, shares, strict=True) if share
    }
    num_lost = 0
    while streams:
        (ready, *_), _ = ray.wait(list(streams), num_returns=1)
        share = streams[ready]
        try:
            finished: list[Generation] = _get(next(ready))
        except StopIteration:
            del streams[ready]
            continue
        except RayActorError as error:
            del streams[ready]
            num_lost += 1
            if num_lost > _MAX_LOST_REPLICAS:
                raise EvaluationError(
                    f"{num_lost} replicas have died: {str(error).splitlines()[0]}",
                    "the finished samples are kept, and the same command goes on; a smaller --batch_size needs less memory",
                ) from error
            logger.warning("a replica has died; another takes its %d remaining samples", len(share))
            streams[_stream(start(), share)] = share
            continue
        done = {(generation.sample, generation.variant) for generation in finished}
        streams[ready] = [request for request in share if (request.sample, request.variant) not in done]
        yield finished


def _stream(replica: Any, share: Sequence[Request]) -> Any:
    return replica.generate.options(num_returns="streaming").remote(list(share))


def _get(reference: Any) -> Any:
    """Return what a replica has made; raise an error of ours as it was raised there."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, TunesmithError):
            raise error.cause from error
        raise


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the process as Ctrl-C does: engines close, and what is finished is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
