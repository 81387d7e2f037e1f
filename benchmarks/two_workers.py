"""Two workers beside one, a core each, over the same global batch of four microbatches of one pack."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing
from in_process import make_job, set_up_in_group
from ours import make_config
from turn import Task, answer, read_task

from tunesmith.train.set_up import tear_down
from tunesmith.train.step import take_step
from tunesmith.train.worker import TrainJob

_MICROBATCHES = 4
_STEPS = 3
_TURNS = 2


def main() -> None:
    _, task = read_task()
    speeds: dict[str, list[float]] = {"1": [], "2": []}
    if len(os.sched_getaffinity(0)) >= 2:
        for _ in range(_TURNS):
            for num_workers in (1, 2):
                speeds[str(num_workers)].append(_measure(task, num_workers))
    answer(speeds)


def _measure(task: Task, num_workers: int) -> float:
    """Return the tokens per second of the whole group."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(task, task.train, folder, "train").model_copy(
            update={
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": _MICROBATCHES // num_workers,
            }
        )
        job = make_job(config, num_workers, num_threads=1)
        torch.multiprocessing.spawn(_work, (num_workers, folder, job), num_workers)
        return float((folder / "speed").read_text())


def _work(rank: int, num_workers: int, folder: Path, job: TrainJob) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    training = set_up_in_group(rank, num_workers, folder, job, torch.device("cpu"))
    speeds = []
    for step in range(1, _STEPS + 1):
        start = time.perf_counter()
        result = take_step(training, step)
        speeds.append(result.counts.tokens / (time.perf_counter() - start))
    if rank == 0:
        (folder / "speed").write_text(str(statistics.median(speeds[1:])))
    tear_down(training)


if __name__ == "__main__":
    main()
