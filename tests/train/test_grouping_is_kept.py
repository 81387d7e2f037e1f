"""A run goes on with its adapters grouped as they were when it was started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.runs import small_config, start
from tunesmith.train.set_up import set_up, tear_down
from tunesmith.train.worker import ProcessWorker, TrainJob

pytestmark = pytest.mark.usefixtures("alone")


def count_grouped(job: TrainJob) -> int:
    """Return how many layers a start of the run computes in groups."""
    training = set_up(job, ProcessWorker(0, 1, torch.device("cpu"), job.run))
    layers = [getattr(module.forward, "__self__", None) for module in training.model.modules()]
    tear_down(training)
    return sum(bool(getattr(layer, "group", None)) for layer in layers)


def test_a_run_of_before_there_were_groups_goes_on_without(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    job = start(small_config(model_of("llama"), rows, tmp_path))
    num_grouped = count_grouped(job)
    assert num_grouped == 5 * 2  # q, k and v, gate and up of two blocks
    assert count_grouped(job) == num_grouped
    params = job.run.read_params()
    del params["resolved"]["groups_adapters"]
    job.run.write_params(params)
    assert count_grouped(job) == 0
    assert job.run.read_params()["resolved"]["groups_adapters"] is False
    assert count_grouped(job) == 0
