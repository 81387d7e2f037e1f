"""Where the time of a step goes, by kernel: a table small enough for the file of results."""

from __future__ import annotations

from typing import Any

from in_process import synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_parts.bench import Bench, Figures
from tunesmith.train.state import Training
from tunesmith.train.step import take_step

_LISTED = 40
_LONGEST_NAME = 80


def profile_step(bench: Bench, training: Training) -> Figures:
    """Return the operations of one step that took longest: on the GPU its kernels, else the CPU's own."""
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        take_step(training, 1)
        synchronize(bench.device)

    def own_us(average: Any) -> float:
        return float(average.self_device_time_total if on_gpu else average.self_cpu_time_total)

    # What calls a kernel is told its time too.
    counted = [one for one in profiler.key_averages() if (one.device_type != DeviceType.CPU) == on_gpu]
    averages = sorted(counted, key=own_us, reverse=True)
    return {
        "total_ms": sum(map(own_us, averages)) / 1e3,
        "operations": [
            {"name": one.key[:_LONGEST_NAME], "calls": one.count, "own_ms": own_us(one) / 1e3}
            for one in averages[:_LISTED]
        ],
    }
