"""What decides the last bits of a product on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch


def processor() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model, "kernels": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
