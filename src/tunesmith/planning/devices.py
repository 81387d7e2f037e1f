"""What GPUs can do and hold, from their makers' data sheets."""

from __future__ import annotations

import re

# Dense bfloat16 FLOP/s from the makers' data sheets, by words of torch's device name; longest match wins.
_PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
}

# Memory by the same names, in GB as the data sheets have it; of what comes in several sizes, the smallest.
_MEMORY_GB = {
    "B200": 180,
    "H200": 141,
    "H100": 80,
    "A100": 40,
    "L40S": 48,
    "L40": 48,
    "L4": 24,
    "A10G": 24,
    "V100": 16,
}

# What CUDA reports of such a GB, in GiB: on GDDR memory, error correction takes its share.
_REPORTED_GIB = 0.985
_REPORTED_GIB_OF_GDDR = 0.917
_WITH_GDDR = {"L40S", "L40", "L4", "A10G"}


def known_gpus() -> list[str]:
    """Return the names of the GPUs whose peak and memory are known."""
    return list(_MEMORY_GB)


def memory_of_gpu(name: str, gigabytes: int | None = None) -> int:
    """Return the bytes of memory that CUDA reports of one of the `known_gpus`, or of its kind with `gigabytes`."""
    reported = _REPORTED_GIB_OF_GDDR if name in _WITH_GDDR else _REPORTED_GIB
    return int((gigabytes or _MEMORY_GB[name]) * reported * 2**30)


def peak_flops(device_name: str) -> float | None:
    """Return the GPU's peak FLOP/s for dense bfloat16 products, or None for one that isn't known."""
    matches = [name for name in _PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None
