"""One way's turn in a benchmark: what it is told, what it measures, and the process that it runs in.

Imports nothing of ours: the peers' environment uses it too.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).parent
_TAIL_LINES = 25


@dataclass(frozen=True)
class Task:
    """What every way trains: the same model, rows and settings.

    `train` and `held_out` are JSON lines of `prompt` and `completion`. A way takes `num_steps` steps of
    `batch_size` sequences; the loss on the held-out rows is measured before them, and as soon as `num_examples`
    examples have been trained.
    """

    model: str
    train: str
    held_out: str
    batch_size: int
    max_length: int
    lora_rank: int
    lora_alpha: int
    learning_rate: float
    num_steps: int
    num_examples: int
    num_threads: int


@dataclass
class Figures:
    """What one turn measured; lists hold one entry a step, padding is never counted as a token.

    `start_s` is the time from the process's start to the first step, evaluation left out. `loss_before` and
    `loss_after` are nats per trained token of the held-out rows. `flops`, `product_flops_per_s` (bfloat16
    matrix products, timed between the steps) and `planned_bytes` are ours alone.
    """

    start_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained_tokens: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_out_trained_tokens: int = 0
    loss_before: float = 0.0
    loss_after: float | None = None
    peak_bytes: int = 0
    flops: list[float] = field(default_factory=list)
    product_flops_per_s: list[float] = field(default_factory=list)
    planned_bytes: int = 0

    def is_halfway(self, task: Task) -> bool:
        """Return whether it is time to measure `loss_after`."""
        return self.loss_after is None and sum(self.examples) >= task.num_examples

    def answer(self) -> None:
        """Print the figures as the process's answer."""
        self.peak_bytes = peak_bytes()
        answer(asdict(self))


def read_task() -> tuple[str, Task]:
    """Return the way and the task that this process was started for."""
    return sys.argv[1], Task(**json.loads(sys.argv[2]))


def answer(content: Any) -> None:
    """Print this process's result, for `run_process` to read."""
    print(json.dumps(content), flush=True)


def age_s() -> float:
    """Return the seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Return the most memory that this process (or the largest of its children) has held."""
    peak = resource.getrusage(who).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_process(
    python: Path, script: str, *arguments: str, num_threads: int | None = None, folder: Path = FOLDER
) -> Any:
    """Run a script of `folder`, this one or another version's, and return what it answers.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent / "src")]),
    }
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    # A file rather than a pipe, and not this process's: progress bars fill a terminal.
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            [str(python), str(folder / script), *arguments],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
        )
        said.seek(0)
        lines = said.read().splitlines()
    if done.returncode:
        tail = "\n".join(lines[-_TAIL_LINES:])
        raise SystemExit(f"error: {script} {_shorten(arguments)} ended with {done.returncode}\n\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


def run_turn(python: Path, script: str, way: str, task: Task, folder: Path = FOLDER) -> Figures:
    """Run one way's turn in a process of its own."""
    told = run_process(
        python, script, way, json.dumps(asdict(task)), num_threads=task.num_threads, folder=folder
    )
    return Figures(**told)


def _shorten(arguments: Sequence[str]) -> str:
    return " ".join(argument if len(argument) < 40 else "…" for argument in arguments)
