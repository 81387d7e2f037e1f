"""The benchmark for GPUs, on a CPU: that it runs alone and through, keeps what it had, and fills its page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.paths import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))

import gpu
from gpu_parts.page import tabulate_gpu
from gpu_parts.parity import CASES
from gpu_parts.shapes import mixed_lengths
from gpu_parts.speed import flip_each

from tunesmith.model.kernels.install import GPU, kernels_for

BENCHMARKS = REPOSITORY / "benchmarks"
CPU = torch.device("cpu")

# On a bare machine, whose packages bring their own along.
RUN_ALONE = """
import importlib.metadata, runpy, sys
from importlib.machinery import PathFinder

ABSENT = {"ray", "datasets", "tensorboard", "rich", "matplotlib", "liger_kernel", "pandas", "cloudpickle"}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import peft, torch, transformers, transformers.models.llama.modeling_llama
there = {name.partition(".")[0] for name in sys.modules}
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    needed = {name.partition(".")[0] for name in sys.modules} - there
    packages = importlib.metadata.packages_distributions()
    print("needed:", *{package.lower() for name in needed for package in packages.get(name, ())})
"""


@pytest.mark.slow
def test_it_runs_through_on_a_cpu_without_ray_and_fills_the_page(tmp_path: Path) -> None:
    results = tmp_path / "results" / "gpu.json"
    # The compiler would take longer than all the rest; of what is alike, one does.
    left_out = ["compiled", "torch_norms=True", "packs_masks=False", "recomputed blocks", "dropout", "64"]
    settings = {
        "shape": "tiny", "device": "cpu", "max_length": 64, "accumulation": 1, "steps": 2, "results": results,
        "leave_out": ",".join(left_out),
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    ran = subprocess.run(
        [sys.executable, "-c", RUN_ALONE, str(BENCHMARKS / "gpu.py"), *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(REPOSITORY / "src")])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    measured = json.loads(results.read_text())
    parts: dict[str, dict[str, Any]] = measured["parts"]
    assert [*parts] == [part for part in gpu.PARTS if part not in left_out]
    assert {*CASES} - {*left_out} <= {*parts["parity"]}
    assert all(one["difference"] < one["tolerance"] for one in parts["parity"].values() if "losses" in one)
    lora = parts["lora"]
    assert all(len(lora[name]["tokens_per_s"]) == 2 for name in lora if name.startswith("rows"))
    assert {*parts["levers"]} == {"default", *flip_each(kernels_for("cpu")), "default, once more"} - {
        *left_out
    }
    assert [*parts["context"]] == ["32"] and [*parts["full"]] == ["tiny"]
    assert all(one["peak_bytes"] and one["planned_bytes"] for one in parts["context"].values())
    page = tabulate_gpu(measured)
    for name in ("rows of several examples", "sliding windows", "keeps_cheap_results=True", "`aten::"):
        assert f"| {name}" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    (needed,) = re.findall(r"^needed: (.*)", ran.stdout, re.MULTILINE)
    assert {*needed.split()} - {"tunesmith"} == wheels()


def wheels() -> set[str]:
    lines = (BENCHMARKS / "requirements-gpu.txt").read_text().splitlines()
    return {line.lower() for line in lines if not line.startswith("#")}


@pytest.fixture
def recorder(tmp_path: Path) -> gpu.Recorder:
    return gpu.Recorder(tmp_path / "gpu.json", {"parts": {}}, frozenset({"unwanted"}), time.time() + 60, CPU)


def test_what_fails_is_recorded_and_the_next_goes_on(recorder: gpu.Recorder) -> None:
    def part() -> Iterator[gpu.Work]:
        yield "first", lambda: {"value": 1}
        yield "second", lambda: {"value": 1 / 0}
        assert "second" in json.loads(recorder.path.read_text())["parts"]["numbers"]
        yield "unwanted", lambda: {"value": 3}
        yield "fourth", lambda: {"value": 4}
        raise RuntimeError("no more memory")

    recorder.run("numbers", part())
    rows = json.loads(recorder.path.read_text())["parts"]["numbers"]
    assert [*rows] == ["first", "second", "fourth", "set-up"] and rows["fourth"]["value"] == 4
    assert recorder.errors() == [
        "numbers: second: ZeroDivisionError: division by zero",
        "numbers: set-up: RuntimeError: no more memory",
    ]


def test_nothing_is_begun_when_the_time_is_over_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    kept = {"parts": {"numbers": {"first": {"value": 1}}}}
    recorder = gpu.Recorder(tmp_path / "gpu.json", kept, frozenset(), time.time() + 60, CPU)
    recorder.run("numbers", iter([("first", lambda: {"value": 2}), ("second", lambda: {"value": 2})]))
    late = gpu.Recorder(recorder.path, kept, frozenset(), time.time(), CPU)
    late.run("numbers", iter([("third", lambda: {"value": 3})]))
    rows = json.loads(recorder.path.read_text())["parts"]["numbers"]
    assert {name: figures["value"] for name, figures in rows.items()} == {"first": 1, "second": 2}


def test_each_switch_of_the_kernels_is_turned_alone() -> None:
    for name, kernels in flip_each(GPU).items():
        changed = {field for field in vars(GPU) if getattr(GPU, field) != getattr(kernels, field)}
        (field,) = changed
        assert name == f"{field}={getattr(kernels, field)}"


def test_mixed_rows_hold_many_examples_of_many_lengths() -> None:
    lengths = [*mixed_lengths(100_000, 4096)]
    assert sum(lengths) >= 100_000 and max(lengths) <= 4096
    assert len(lengths) > 100 and len(set(lengths)) > 80


def test_the_page_shows_what_failed() -> None:
    rows = {"a": {"error": "attention is `sdpa`", "tokens_per_s": [1.0]}, "b": {"fits": False}}
    asked = {"shape": "tiny", "rows": 1, "max_length": 2, "accumulation": 3}
    page = tabulate_gpu({"device": "a GPU", "versions": {}, "asked": asked, "parts": {"lora": rows}})
    assert "| a | 1 (1–1) |  |  |  |  | attention is `sdpa` |" in page and "doesn't fit" in page
