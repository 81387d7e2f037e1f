"""What the machine or the cluster has, and what each worker gets of it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tunesmith.config import TrainConfig
from tunesmith.errors import ResourceError


@dataclass(frozen=True)
class Allocation:
    """The workers of a run and what each of them is given."""

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int

    @property
    def resources_per_worker(self) -> dict[str, float]:
        return {"CPU": float(self.cpus_per_worker)} | ({"GPU": 1.0} if self.use_gpu else {})

    @property
    def num_threads(self) -> int | None:
        """CPU threads of a worker's products; None leaves torch's choice, where the GPU does the work."""
        return None if self.use_gpu else self.cpus_per_worker

    def describe(self) -> str:
        """Return it in words."""
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        per_worker = "a GPU each" if self.use_gpu else f"{self.cpus_per_worker} CPU threads each"
        return f"{workers}, {per_worker}"


def allocate(config: TrainConfig) -> Allocation:
    """Return the workers that the run gets: of the cluster at `RAY_ADDRESS`, else of this machine.

    Raises:
        ResourceError: the run asks for GPUs or workers that aren't there.
    """
    num_cpus, num_gpus, place = _cluster_resources()
    use_gpu = num_gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and num_gpus == 0:
        raise ResourceError(
            f"`use_gpu` is set, but {place} has no GPU", "leave `use_gpu` out to train on CPUs"
        )
    available = num_gpus if use_gpu else num_cpus
    num_workers = config.num_workers or (num_gpus if use_gpu else 1)
    if num_workers > available:
        unit = "GPUs" if use_gpu else "CPUs"
        raise ResourceError(
            f"`num_workers` is {num_workers}, but {place} has {available} {unit}",
            f"ask for at most {available}, or leave `num_workers` out",
        )
    cpus_per_worker = 1 if use_gpu else max(1, num_cpus // num_workers)
    return Allocation(num_workers, use_gpu, cpus_per_worker)


def _cluster_resources() -> tuple[int, int, str]:
    """Return CPUs, GPUs and the place's name; connects to the cluster if there is one."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if not address and not ray.is_initialized():
        import torch

        return len(os.sched_getaffinity(0)), torch.cuda.device_count(), "this machine"
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ResourceError(
                f"no Ray cluster answers at `RAY_ADDRESS` ({address}): {error}",
                "check the address, or unset RAY_ADDRESS to train on this machine",
            ) from error
    resources = ray.cluster_resources()
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), "the Ray cluster"
