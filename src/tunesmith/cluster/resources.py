"""What the machine or the cluster has, and what each worker gets of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tunesmith.config import TrainConfig
from tunesmith.errors import ResourceError
from tunesmith.machine import usable_cpus
from tunesmith.signals import signal_handlers_kept

THIS_MACHINE = "this machine"
_CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True)
class Allocation:
    """The workers of a run and what each of them is given."""

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int
    num_awaited: int = 0
    """Workers that find no place before an elastic cluster has grown."""
    cpus_beside_gpu: int | None = None
    """Of a node's CPUs, the share of each of its GPUs, which nobody is asked for; None: there is no such node yet."""

    @property
    def resources_per_worker(self) -> dict[str, float]:
        return {"CPU": float(self.cpus_per_worker)} | ({"GPU": 1.0} if self.use_gpu else {})

    @property
    def num_cpus(self) -> int:
        """CPUs of all workers together."""
        return self.num_workers * self.cpus_per_worker

    @property
    def num_threads(self) -> int | None:
        """CPU threads of a worker; None leaves torch's choice, which under Ray is one for each CPU that was asked for."""
        return self.cpus_beside_gpu if self.use_gpu else self.cpus_per_worker

    def describe(self) -> str:
        """Return it in words."""
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        threads = "1 CPU thread" if self.cpus_per_worker == 1 else f"{self.cpus_per_worker} CPU threads"
        return f"{workers}, {'1 GPU' if self.use_gpu else threads} each"


@dataclass(frozen=True)
class Node:
    """A machine that workers can run on; `node_id` is Ray's."""

    cpus: int
    gpus: int
    node_id: str = ""


@contextmanager
def connected_nodes() -> Iterator[tuple[list[Node], str]]:
    """Connect to the cluster of `RAY_ADDRESS`, if that is set; give its nodes, else this machine, and a name.

    Raises:
        ResourceError: nothing answers at that address.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield _cluster_nodes(), "the Ray cluster"
    elif address:
        check_address(address)
        try:
            with signal_handlers_kept():
                ray.init(log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise no_answer(address, error) from error
        try:
            yield _cluster_nodes(), f"the Ray cluster at {address}"
        finally:
            ray.shutdown()
    else:
        yield [this_machine()], THIS_MACHINE


def this_machine() -> Node:
    """Return what this machine has."""
    import torch

    return Node(usable_cpus(), torch.cuda.device_count())


def is_elastic() -> bool:
    """Return whether the cluster grows when workers find no place: the chart `raytrain` tells its pods so.

    RAY_enable_autoscaler_v2 doesn't: `ray start` sets it on every head of KubeRay's.
    """
    return os.environ.get("RAYTRAIN_ELASTIC") == "1"


def allocate(config: TrainConfig, nodes: list[Node], place: str) -> Allocation:
    """Return the workers that the run gets on these nodes, or asks for on an elastic cluster.

    On CPUs each worker gets as many as let all workers fit, none across two nodes.

    Raises:
        ResourceError: the run asks for GPUs or workers that aren't there.
    """
    num_gpus, num_cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    grows = is_elastic() and config.num_workers is not None
    if num_gpus == num_cpus == 0 and not (grows and config.use_gpu is not None):
        raise ResourceError(
            f"{place} has neither GPUs nor CPUs: no worker is there",
            "wait for one; an elastic cluster adds them where `num_workers` and `use_gpu` say how many and which",
        )
    use_gpu = num_gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and num_gpus == 0 and not grows:
        raise ResourceError(
            f"`use_gpu` is set, but {place} has no GPU", "leave `use_gpu` out to train on CPUs"
        )
    if not use_gpu and config.attn_implementation.startswith(("flash", "flex")):
        raise ResourceError(
            f"`attn_implementation` is `{config.attn_implementation}`, which trains on GPUs alone",
            "leave `attn_implementation` out, or set it to `sdpa`, to train on CPUs",
        )
    available = num_gpus if use_gpu else num_cpus
    num_workers = config.num_workers or (num_gpus if use_gpu else 1)
    num_awaited = max(0, num_workers - available)
    if num_awaited and not grows:
        unit = "GPU" if use_gpu else "CPU"
        raise ResourceError(
            f"`num_workers` is {num_workers}, but {place} has {available} {unit}{'' if available == 1 else 's'}",
            f"ask for at most {available}, or leave `num_workers` out",
        )
    if use_gpu:
        shares = [max(1, node.cpus // node.gpus) for node in nodes if node.gpus and node.cpus]
        return Allocation(num_workers, use_gpu, 1, num_awaited, min(shares, default=None))
    if num_awaited:
        return Allocation(num_workers, use_gpu, 1, num_awaited)
    largest = max(node.cpus for node in nodes)
    fitting = [cpus for cpus in range(1, largest + 1) if sum(n.cpus // cpus for n in nodes) >= num_workers]
    return Allocation(num_workers, use_gpu, max(fitting))


def check_address(address: str, variable: str = "RAY_ADDRESS") -> None:
    """Refuse an address, with or without a scheme, where nothing listens: Ray itself would try for many minutes.

    `variable` is where it comes from.

    Raises:
        ResourceError: nothing answers there.
    """
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise no_answer(address, error, variable) from error


def no_answer(address: str, error: Exception, variable: str = "RAY_ADDRESS") -> ResourceError:
    """Return the error that says so."""
    return ResourceError(
        f"no Ray cluster answers at `{variable}` ({address}): {error}",
        f"check the address, and RAY_AUTH_TOKEN if the cluster asks for one; or unset {variable}",
    )


def _cluster_nodes() -> list[Node]:
    import ray

    return [
        Node(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)), node["NodeID"])
        for node in ray.nodes()
        if node["Alive"]
    ]
