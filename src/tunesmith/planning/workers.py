"""What a run is planned for: workers on this machine, or imagined ones elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.machine import available_memory
from tunesmith.model.load import resolve_dtype
from tunesmith.parallel.fsdp import HYBRID
from tunesmith.planning.devices import known_gpus, memory_of_gpu, peak_flops

_PRODUCT_SIZE = 1024
_MEASURE_S = 0.2


@dataclass(frozen=True)
class Workers:
    """What a run is planned for.

    Attributes:
        memory: bytes of each worker.
        flops: FLOP/s of each worker's products in `dtype`; None for a GPU that isn't known.
        imagined: whether they are elsewhere: more may be had, and their folders may be absent here.
        most_of_node: a node has so many of them at most; None: all are on one.
    """

    num: int
    device_type: str
    name: str
    memory: int
    flops: float | None
    dtype: torch.dtype
    imagined: bool = False
    most_of_node: int | None = None

    @property
    def num_equal_nodes(self) -> int:
        """The nodes that they are on, if these have equally many, else 1: then nodes make no difference."""
        per_node = min(self.num, self.most_of_node or self.num)
        return 1 if self.num % per_node else self.num // per_node


def find_workers(config: TrainConfig, num_workers: int, use_gpu: bool) -> Workers:
    """Return `num_workers` workers on this machine, which share its processors, or have one of its GPUs each."""
    device = torch.device("cuda" if use_gpu else "cpu")
    dtype = resolve_dtype(config.dtype, device)
    if use_gpu:
        gpu = torch.cuda.get_device_properties(device)
        return Workers(num_workers, "cuda", gpu.name, gpu.total_memory, peak_flops(gpu.name), dtype)
    flops = _measure_products(dtype) / num_workers
    return Workers(num_workers, "cpu", "CPU", available_memory() // num_workers, flops, dtype)


def imagine_workers(config: TrainConfig, gpu: str, gpus_per_node: str = "8") -> Workers:
    """Return workers with one GPU each, of the kind `gpu`: `H100`, or with the size of its memory `A100-80GB`.

    A node has `gpus_per_node` of them.

    Raises:
        ConfigError: that GPU isn't known, a node has no such number of them, or the weights can't be sharded within nodes.
    """
    if not gpus_per_node.isdecimal() or not int(gpus_per_node):
        raise ConfigError(f"`--gpus_per_node` is `{gpus_per_node}`", "it must be a whole number from 1 on")
    name, _, size = gpu.upper().partition("-")
    gigabytes = size.removesuffix("GB")
    if name not in known_gpus() or (size and not gigabytes.isdecimal()):
        raise ConfigError(
            f"`--gpu` is `{gpu}`, which isn't known",
            f"known are {', '.join(known_gpus())}, also with the size of their memory, as A100-80GB",
        )
    memory = memory_of_gpu(name, int(gigabytes) if size else None)
    # Volta has no instructions for bfloat16.
    best = torch.float32 if name == "V100" else torch.bfloat16
    dtype = best if config.dtype == "auto" else getattr(torch, config.dtype)
    workers = Workers(
        config.num_workers or 1,
        "cuda",
        gpu.upper(),
        memory,
        peak_flops(name),
        dtype,
        imagined=True,
        most_of_node=int(gpus_per_node),
    )
    if config.fsdp == HYBRID and workers.num_equal_nodes == 1 and workers.num > int(gpus_per_node):
        raise ConfigError(
            f"`fsdp` is `{HYBRID}`, but {workers.num} workers don't fill nodes of {gpus_per_node}",
            "ask for as many workers as fill whole nodes, or set `fsdp` to `full_shard`",
        )
    return workers


def _measure_products(dtype: torch.dtype) -> float:
    """Return the FLOP/s of this machine's matrix products, measured for a fifth of a second."""
    left, right = (torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, dtype=dtype) for _ in range(2))
    left @ right
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _MEASURE_S:
        left @ right
        count += 1
    return 2 * _PRODUCT_SIZE**3 * count / (time.perf_counter() - start)
