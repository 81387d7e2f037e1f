"""What the machine is and what it can do: the ceilings that everything else is measured by."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from in_process import synchronize, time_products

from gpu_parts.bench import Bench, Figures, Work
from tunesmith.machine import available_memory, usable_cpus

_LIBRARIES = (
    "torch", "triton", "transformers", "peft", "tokenizers", "huggingface-hub", "pyarrow", "pydantic", "numpy",
    "flash-attn", "flash-attn-3", "flash-attn-4",
)  # fmt: skip
_REPEATS = 10


def look_around(bench: Bench) -> Iterator[Work]:
    yield "machine", partial(_describe_machine, bench)
    yield "kernels", _describe_kernels
    yield "matrix products", partial(_time_products, bench)
    yield "copies", partial(_time_copies, bench)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def list_versions() -> dict[str, str]:
    installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    return {name: installed[name] for name in _LIBRARIES if name in installed}


def _describe_machine(bench: Bench) -> Figures:
    host = {
        "python": platform.python_version(),
        "cpus": usable_cpus(),
        "host_bytes": available_memory(),
        "disk_bytes": shutil.disk_usage(bench.folder).free,
        "compilers": [name for name in ("gcc", "clang", "g++", "nvcc") if shutil.which(name)],
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
    }
    if bench.device.type != "cuda":
        return host
    gpu = torch.cuda.get_device_properties(bench.device)
    free, total = torch.cuda.mem_get_info(bench.device)
    return {
        **host,
        "gpus": torch.cuda.device_count(),
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "total_bytes": total,
        "free_bytes": free,
        "driver": _ask_driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _ask_driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.strip()


def _describe_kernels() -> Figures:
    import torch.nn.attention
    from torch.nn.attention.varlen import varlen_attn

    return {
        "varlen_attn": [*inspect.signature(varlen_attn).parameters],
        "flash_attention": flash_implementations(),
        "linear_cross_entropy": hasattr(torch.nn.functional, "linear_cross_entropy"),
    }


def flash_implementations() -> list[str]:
    """Return the names of FlashAttention's newer versions that torch knows of, whether or not they are installed."""
    listed = getattr(torch.nn.attention, "list_flash_attention_impls", list)
    return [*listed()]


def _time_products(bench: Bench) -> Figures:
    flops = time_products(bench.scale.matrix_size, _REPEATS, bench.device)
    return {"size": bench.scale.matrix_size, "flops_per_s": median(flops), "of_each": flops}


def _time_copies(bench: Bench) -> Figures:
    source = torch.ones(bench.scale.copied_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    speeds = []
    for _ in range(_REPEATS + 1):
        synchronize(bench.device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(bench.device)
        # Read once, written once.
        speeds.append(2 * bench.scale.copied_bytes / (time.perf_counter() - start))
    return {"bytes": bench.scale.copied_bytes, "bytes_per_s": median(speeds[1:])}
