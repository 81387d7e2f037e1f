"""Where an evaluation's engines run: one in this process, or replicas on Ray, each on its own GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from tunesmith.cluster.local_ray import ray_at_hand
from tunesmith.cluster.remote import fetch
from tunesmith.cluster.replicas import Replicas
from tunesmith.cluster.resources import THIS_MACHINE, Node
from tunesmith.config import EvaluateConfig
from tunesmith.errors import ConfigError, ResourceError
from tunesmith.evaluate.engines.base import EngineSpec
from tunesmith.evaluate.engines.choose import vllm_is_installed
from tunesmith.evaluate.engines.pool import EVALUATION, Generate, LocalPool, Pool, Result


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
    if num_replicas == 1 and place == THIS_MACHINE:
        return LocalPool(use_gpu, num_threads)
    return RayPool(num_replicas, use_gpu, num_threads, size if use_gpu else 0, cpus)


class RayPool:
    """Replicas of an engine on a Ray cluster, each on its own GPUs."""

    is_elsewhere = True

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

    def call_on_gpu(self, function: Callable[..., Result], *arguments: object) -> Result:
        import ray

        with ray_at_hand(self._cpus_each):
            task = ray.remote(function).options(num_gpus=1)
            result: Result = fetch(task.remote(*arguments), EVALUATION)
        return result
