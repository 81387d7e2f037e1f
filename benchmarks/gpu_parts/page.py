"""What `docs/performance.md` tells of the results of `gpu.py`: a table for each part that was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from tables import table

Figures = Mapping[str, Any]
Rows = Mapping[str, Figures]

_OPERATIONS = 12


def tabulate_gpu(gpu: Mapping[str, Any]) -> str:
    """Return the tables of the parts there are, one below the other."""
    versions = ", ".join(f"{name} {number}" for name, number in gpu["versions"].items())
    asked = gpu["asked"]
    parts = [f"{gpu['device']}; {versions}"]
    for name, tabulate in _TABLES.items():
        rows = gpu["parts"].get(name)
        if rows:
            parts.append(tabulate(rows, asked))
    return "\n\n".join(parts)


def _tell_environment(rows: Rows, asked: Figures) -> str:
    machine = rows.get("machine", {})
    told = [f"{name} {machine[name]}" for name in ("driver", "cuda", "nccl") if machine.get(name)]
    if "flops_per_s" in rows.get("matrix products", {}):
        products = rows["matrix products"]
        told.append(f"{products['flops_per_s'] / 1e12:,.1f} TFLOP/s in {products['size']}³ products")
    if "bytes_per_s" in rows.get("copies", {}):
        told.append(f"{rows['copies']['bytes_per_s'] / 1e12:,.2f} TB/s in copies")
    return "; ".join(told)


def _tabulate_parity(rows: Rows, asked: Figures) -> str:
    cells = [
        [
            name,
            str(one.get("attention", "")),
            _percent(one, "difference"),
            _percent(one, "tolerance"),
            _fault(one),
        ]
        for name, one in rows.items()
        if "losses" in one or "error" in one
    ]
    return table(["losses beside the CPU's", "attention", "differ by", "at most", ""], cells)


def _tabulate_training(title: str) -> Callable[[Rows, Figures], str]:
    def tabulate(rows: Rows, asked: Figures) -> str:
        cells = [
            [name, _speed(one), _percent(one, "mfu", 0), *_memory(one), _fault(one)]
            for name, one in rows.items()
            if name != "profile"
        ]
        head = [title.format(**asked), "tokens/s", "MFU", "peak memory", "reserved", "planned", ""]
        told = table(head, cells)
        chosen = [f"- {name}: {one['chosen']}" for name, one in rows.items() if "chosen" in one]
        parts = [told, "\n".join(chosen)] if chosen else [told]
        if "operations" in rows.get("profile", {}):
            parts.append(_tabulate_profile(rows["profile"]))
        return "\n\n".join(parts)

    return tabulate


def _tabulate_levers(rows: Rows, asked: Figures) -> str:
    default = rows.get("default", {})
    cells = []
    for name, one in rows.items():
        speed, peak = "", ""
        if "tokens_per_s" in one and "tokens_per_s" in default:
            speed = f"{median(one['tokens_per_s']) / median(default['tokens_per_s']):.3f}"
            peak = f"{one['peak_bytes'] / default['peak_bytes']:.3f}"
        cells.append([name, speed, peak, _fault(one)])
    return table(["a shallower model", "× tokens/s", "× peak memory", ""], cells)


def _tabulate_profile(profile: Figures) -> str:
    total = profile["total_ms"]
    cells = [
        [f"`{one['name']}`", f"{one['calls']:,}", f"{one['own_ms']:,.2f}", f"{one['own_ms'] / total:.1%}"]
        for one in profile["operations"][:_OPERATIONS]
    ]
    return table(["a step's longest operations", "calls", "ms", "of all"], cells)


def _speed(one: Figures) -> str:
    speeds = one.get("tokens_per_s")
    return f"{median(speeds):,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f})" if speeds else ""


def _memory(one: Figures) -> list[str]:
    return [
        f"{one[name] / 2**30:.1f} GiB" if one.get(name) else ""
        for name in ("peak_bytes", "reserved_bytes", "planned_bytes")
    ]


def _percent(one: Figures, name: str, digits: int = 2) -> str:
    return f"{one[name]:.{digits}%}" if one.get(name) is not None else ""


def _fault(one: Figures) -> str:
    if one.get("fits") is False and "tokens_per_s" not in one:
        return "doesn't fit"
    return str(one.get("error") or one.get("absent") or "").split("\n")[0][:80].replace("|", "/")


_TABLES: dict[str, Callable[[Rows, Figures], str]] = {
    "environment": _tell_environment,
    "parity": _tabulate_parity,
    "lora": _tabulate_training("{shape}, LoRA, {rows} × {max_length} × {accumulation}"),
    "compiled": _tabulate_training("{shape}, LoRA, blocks compiled"),
    "levers": _tabulate_levers,
    "full": _tabulate_training("full fine-tuning"),
    "context": _tabulate_training("{shape}, LoRA, one row of so many tokens"),
}
