"""`make bench-gpu`: parity with the CPU, speed and memory of real shapes with random weights, on GPUs.

    PYTHONPATH=src python benchmarks/gpu.py [--minutes 10] [--only lora levers] [--results FILE]

Alone on a bare machine: no network, no Ray, no `make`. Beside torch, transformers and peft it needs pydantic and
pyarrow; `make gpu-wheels` collects them elsewhere, and there

    python -m pip install --no-index --no-deps --target build/site build/gpu-wheels/*.whl
    PYTHONPATH=src:build/site python benchmarks/gpu.py

The parts come in the order of their importance. Each figure is in the file of results as soon as it is measured; what
fails is there with its error, and the next goes on. Nothing is begun in the last tenth of the time. The random weights
are written to a folder (16 GB for 8B) and loaded from it as any model's are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_parts.bench import Bench, Figures, Work, scale_of
from gpu_parts.environment import list_versions, look_around, name_of
from gpu_parts.parity import compare_with_cpu
from gpu_parts.shapes import SHAPES
from gpu_parts.speed import leave_levers_out, lengthen_rows, train_compiled, train_in_full, train_lora
from in_process import synchronize

from tunesmith.atomic_files import write_json

_FOLDER = Path(__file__).parent
PARTS: dict[str, Callable[[Bench], Iterator[Work]]] = {
    "environment": look_around,
    "parity": compare_with_cpu,
    "lora": train_lora,
    "compiled": train_compiled,
    "levers": leave_levers_out,
    "full": train_in_full,
    "context": lengthen_rows,
}
_SET_UP = "set-up"
# Of the time: what is begun takes some.
_SPARED = 0.1


@dataclass(frozen=True)
class Recorder:
    """Runs what parts yield and keeps what it gave in a file, until the time is over."""

    path: Path
    results: dict[str, Any]
    left_out: frozenset[str]
    end: float
    device: torch.device

    def run(self, part: str, rows: Iterator[Work]) -> None:
        """Measure what a part yields; what the file has of it already stays."""
        kept = self.results["parts"].setdefault(part, {})
        if _SET_UP in kept:
            return
        try:
            for name, work in rows:
                if self.is_over() or self.is_broken():
                    return
                if name not in kept and name not in self.left_out:
                    print(f"{part}: {name}", file=sys.stderr, flush=True)
                    self._keep(part, name, work)
        except Exception as error:  # whatever it is, the other parts go on
            self._write(part, _SET_UP, _describe(error))

    def is_over(self) -> bool:
        return time.time() >= self.end

    def is_broken(self) -> bool:
        """Return whether a kernel has failed such that this process can't use the GPU any more."""
        try:
            synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def errors(self) -> list[str]:
        """Return what went wrong, a line each."""
        return [
            f"{part}: {name}: {figures['error']}"
            for part, rows in self.results["parts"].items()
            for name, figures in rows.items()
            if "error" in figures
        ]

    def _keep(self, part: str, name: str, work: Callable[[], Figures]) -> None:
        start = time.perf_counter()
        try:
            figures = work()
        except Exception as error:
            figures = _describe(error)
        self._write(part, name, {**figures, "took_s": round(time.perf_counter() - start, 1)})

    def _write(self, part: str, name: str, figures: Figures) -> None:
        self.results["parts"][part][name] = figures
        write_json(self.path, self.results)
        print(f"  {figures.get('error', 'done')}", file=sys.stderr, flush=True)


def _describe(error: Exception) -> Figures:
    """Return what is told of an error, and let go of what it holds alive: a training's tensors."""
    lines = traceback.format_exception(error)
    traceback.clear_frames(error.__traceback__)
    return {"error": f"{type(error).__name__}: {error}"[:500], "traceback": "".join(lines)[-3000:]}


def main() -> None:
    words = _parse()
    device = torch.device(words.device, 0 if words.device == "cuda" else None)
    begun = time.time() if words.begun is None else words.begun
    end = begun + (1 - _SPARED) * 60 * words.minutes
    recorder = Recorder(words.results, _begin(words, device), frozenset(words.leave_out), end, device)
    with tempfile.TemporaryDirectory() as name:
        bench = _make_bench(words, device, Path(name))
        for part in words.only:
            if part not in words.leave_out:
                recorder.run(part, PARTS[part](bench))
    if recorder.is_broken() and not recorder.is_over():
        _start_anew(begun)
    errors = recorder.errors()
    print(f"written: {words.results}", *errors, sep="\n")
    sys.exit(1 if errors else 0)


def _begin(words: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the results to fill: the file's, where they are gone on with, without the parts that are measured anew."""
    words.results.parent.mkdir(parents=True, exist_ok=True)
    told = {"device": name_of(device), "versions": list_versions(), "asked": _asked(words), "parts": {}}
    is_kept = words.begun is not None or words.only != [*PARTS]
    if is_kept and words.results.is_file():
        parts = json.loads(words.results.read_text())["parts"]
        told["parts"] = {k: v for k, v in parts.items() if words.begun is not None or k not in words.only}
    return told


def _asked(words: argparse.Namespace) -> dict[str, Any]:
    names = ("shape", "rows", "max_length", "accumulation", "steps", "minutes")
    return {name: getattr(words, name) for name in names} | {"set": dict(words.set)}


def _make_bench(words: argparse.Namespace, device: torch.device, folder: Path) -> Bench:
    num_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    return Bench(
        device=device,
        folder=words.folder or folder,
        scale=scale_of(words.shape),
        rows=words.rows,
        max_length=words.max_length,
        accumulation=words.accumulation,
        num_steps=words.steps,
        num_devices=words.devices or num_devices,
        settings=dict(words.set),
    )


def _start_anew(begun: float) -> None:
    """Replace this process by one that goes on with what isn't measured yet."""
    others = [word for word in sys.argv[1:] if not word.startswith("--begun")]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *others, f"--begun={begun}"])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="time for all parts together")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of each row")
    parser.add_argument("--rows", type=int, default=2, help="rows of a microbatch")
    parser.add_argument("--accumulation", type=int, default=4, help="microbatches of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after the first")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--devices", type=int, help="devices to shard over; by default all")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--leave_out",
        type=lambda text: text.split(","),
        default=[],
        help="parts, or what they measure, as a,b",
    )
    parser.add_argument(
        "--set", type=lambda text: tuple(text.split("=", 1)), action="append", default=[], metavar="NAME=VALUE",
        help="another setting of `tunesmith train`, for all but parity",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, help="where models and rows are kept; by default they go at the end"
    )
    parser.add_argument("--results", type=Path, default=_FOLDER / "results" / "gpu.json")
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand; --device cpu --shape tiny shows that the program runs")
    return words


if __name__ == "__main__":
    main()
