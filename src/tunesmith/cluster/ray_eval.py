"""Evaluation where the GPUs are: in this process, or by replicas of the model on Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from tunesmith.cluster.local_ray import ended_by_sigterm, ray_at_hand
from tunesmith.cluster.remote import explain, fetch
from tunesmith.cluster.replicas import EVALUATION, Replicas
from tunesmith.cluster.resources import Node, connected_nodes
from tunesmith.config import EvaluateConfig
from tunesmith.errors import ConfigError, ResourceError
from tunesmith.evaluate.engines.base import EngineSpec, make_engine, vllm_is_installed
from tunesmith.evaluate.evaluation import EvaluationResult, Generate, Pool, run_evaluation
from tunesmith.evaluate.metrics.score import Metric, choose_metrics, score_predictions
from tunesmith.evaluate.results import Prediction
from tunesmith.runs.tuned import taken

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate a tuned model beside its base model, as `config` says; finished samples are kept if it is cut short.

    Runs on the GPUs of the Ray cluster of `RAY_ADDRESS`, else on this machine.

    Raises:
        ConfigError, DataError, ModelError, ResourceError, RunError: bad input, before anything is generated.
        EvaluationError: the replicas keep failing.
    """
    with (
        ended_by_sigterm(),
        taken(config, "test_checkpoint") as tuned,
        connected_nodes() as (nodes, place),
    ):
        return run_evaluation(config, tuned, choose_pool(config, nodes, place))


def choose_pool(config: EvaluateConfig, nodes: Sequence[Node], place: str) -> Pool:
    """Return where the engines run.

    Raises:
        ConfigError: transformers is asked to spread one model over several GPUs.
        ResourceError: the evaluation asks for more GPUs or replicas than there are.
    """
    size = config.tensor_parallel_size
    use_gpu = any(node.gpus for node in nodes)
    if size > 1 and max(node.gpus for node in nodes) < size:
        raise ResourceError(
            f"`tensor_parallel_size` is {size}, but no node of {place} has {size} GPUs",
            "set it to at most the GPUs of one node",
        )
    with_vllm = vllm_is_installed() if config.engine == "auto" else config.engine == "vllm"
    if size > 1 and not with_vllm:
        raise ConfigError(
            f"`tensor_parallel_size` is {size}, but transformers generates on one GPU per replica",
            "tensor_parallel_size works with vLLM alone: leave it out, or use --engine vllm",
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
        with _memory_explained(), closing(make_engine(engine, spec)) as loaded:
            yield loaded.generate

    def score(
        self, rows: Sequence[Prediction], metrics: Sequence[Metric], bertscore_model: str | None
    ) -> list[Prediction]:
        return score_predictions(rows, metrics)


class RayPool:
    """Replicas of an engine on a Ray cluster, each on its own GPUs."""

    score_device = "cpu"  # the driver may run on a head without GPUs

    def __init__(
        self, num_replicas: int, use_gpu: bool, num_threads: int | None, gpus_each: int, cpus_each: int
    ) -> None:
        self.num_replicas = num_replicas
        self.use_gpu = use_gpu
        self.num_threads = num_threads
        self.gpus_each = gpus_each
        self._cpus_each = cpus_each

    @contextmanager
    def load(self, engine: str, spec: EngineSpec) -> Iterator[Generate]:
        with ray_at_hand(self.num_replicas * self._cpus_each):
            replicas = Replicas(engine, spec, self.num_replicas, self._cpus_each, self.gpus_each)
            with closing(replicas):
                replicas.wait_until_loaded()
                yield replicas.generate

    def score(
        self, rows: Sequence[Prediction], metrics: Sequence[Metric], bertscore_model: str | None
    ) -> list[Prediction]:
        import ray

        if not self.use_gpu:
            return score_predictions(rows, metrics)
        names = [metric.name for metric in metrics]
        logger.info("scoring on a GPU of the cluster, as soon as one is free")
        with ray_at_hand(self._cpus_each):
            task = ray.remote(_score_on_gpu).options(num_gpus=1)
            scored: list[Prediction] = fetch(task.remote(rows, names, bertscore_model), EVALUATION)
        return scored


def _score_on_gpu(
    rows: Sequence[Prediction], names: Sequence[str], bertscore_model: str | None
) -> list[Prediction]:
    references = [row["reference"] for row in rows]
    metrics, _ = choose_metrics(names, references, bertscore_model, "cuda")
    return score_predictions(rows, metrics)


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn a lack of memory, the GPU's or the machine's, into an error of ours."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise explain(error, EVALUATION) from error
