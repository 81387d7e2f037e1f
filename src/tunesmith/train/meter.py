"""Speed and memory of the steps between two lines of metrics."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import nn

from tunesmith.planning.devices import peak_flops
from tunesmith.planning.throughput import count_flops_per_token


class Meter:
    """A stopwatch around the steps: evaluations and checkpoints in between don't count."""

    def __init__(self, model: nn.Module, full_ft: bool, device: torch.device, world_size: int) -> None:
        self._device = device
        self._world_size = world_size
        self._flops_per_token = count_flops_per_token(model, full_ft)
        self._peak_flops = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._reset()

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, tokens: int, data_wait_s: float) -> None:
        """End a step of `tokens` tokens (of the global batch) that waited `data_wait_s` for its batches."""
        self._seconds += time.perf_counter() - self._started
        self._data_wait_s += data_wait_s
        self._tokens += tokens
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the means since the last reading: tokens/s over all workers, seconds a step.

        `peak_memory_bytes` is this rank's, since it started: of the GPU, or of the process on a CPU.
        """
        tokens_per_second = self._tokens / self._seconds
        values = {
            "tokens_per_second": tokens_per_second,
            "step_time_s": self._seconds / self._steps,
            "data_wait_s": self._data_wait_s / self._steps,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }
        if self._peak_flops is not None:
            values["mfu"] = tokens_per_second * self._flops_per_token / (self._peak_flops * self._world_size)
        self._reset()
        return values

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._seconds = self._data_wait_s = 0.0
        self._tokens = self._steps = 0

    def _peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
