"""What a checkpoint costs: a step with a save before it, written to its end, beside a step without."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from in_process import make_job, set_up_alone
from ours import make_config
from turn import answer, read_task

from tunesmith.tracking.jsonl import NoLog
from tunesmith.train.checkpoint import Progress
from tunesmith.train.saving import publish
from tunesmith.train.state import Training
from tunesmith.train.step import take_step

_PAIRS = 4


def main() -> None:
    _, task = read_task()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(task, task.train, Path(folder), "train")
        training = set_up_alone(make_job(config, num_threads=task.num_threads), torch.device("cpu"))
        take_step(training, 1)
        figures: dict[str, list[float]] = {"step_s": [], "saved_step_s": []}
        for pair in range(_PAIRS):
            # In turns the one and the other first: a drift must not count for either.
            for place, save in enumerate((pair % 2 == 1, pair % 2 == 0)):
                seconds = _time_step(training, 2 + 2 * pair + place, save)
                figures["saved_step_s" if save else "step_s"].append(seconds)
    answer(figures)


def _time_step(training: Training, step: int, save: bool) -> float:
    start = time.perf_counter()
    if save:
        training.checkpointer.save(Progress(step - 1))
    take_step(training, step)
    if save:
        failure = publish(training, NoLog(), step, wait=True)
        assert failure is None, failure
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
