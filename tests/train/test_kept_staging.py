"""What a save is copied into is kept for the next one, and holds what the state was when it was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from support.gradients import CPU, whole
from support.runs import small_config, start
from tunesmith.model.adapters.lora import is_kept
from tunesmith.model.files.state import read_weights
from tunesmith.runs.folder import Checkpoint
from tunesmith.train.checkpoint import Checkpointer, Progress, build_stager, keeps_staging
from tunesmith.train.set_up import set_up
from tunesmith.train.state import Training
from tunesmith.train.worker import ProcessWorker

pytestmark = pytest.mark.usefixtures("alone")


class WatchedStager(DefaultStager):
    """A stager as GPUs have one, but for the pinning; notes where it puts what."""

    def __init__(self) -> None:
        super().__init__(StagingOptions(False, False, False, False))
        self.places: list[dict[str, int]] = []
        self.is_closed = False

    def stage(self, state_dict: Any, **options: Any) -> Any:
        staged: Any = super().stage(state_dict, **options)
        plain = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in staged.items()}
        self.places.append({name: tensor.data_ptr() for name, tensor in plain.items()})
        return staged

    def close(self) -> None:
        super().close()
        self.is_closed = True


class FailingStager(DefaultStager):
    def stage(self, state_dict: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")


@pytest.fixture(params=[False, True], ids=["lora", "full"])
def training(
    request: pytest.FixtureRequest, model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> Training:
    job = start(small_config(model_of("llama"), rows, tmp_path, full_ft=request.param, save_total_limit=9))
    return set_up(job, ProcessWorker(0, 1, CPU, job.run))


def make_checkpointer(training: Training, stager: DefaultStager) -> Checkpointer:
    from tunesmith.model.adapters.new_tokens import load_run_tokenizer

    tokenizer = load_run_tokenizer(training.config)
    return Checkpointer(training.job, 0, training.model, training.optimizer, tokenizer, stager)


def save(training: Training, checkpointer: Checkpointer, step: int) -> None:
    """Save, change every weight at once, and check that the checkpoint has what was before."""
    trained = {n: p for n, p in training.model.named_parameters() if p.requires_grad and is_kept(n, p)}
    expected = {name: whole(parameter.detach()).clone() for name, parameter in trained.items()}
    checkpointer.save(Progress(step))
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(step)
    checkpointer.wait()
    saved = checkpointer.take_outcome()
    assert isinstance(saved, Checkpoint)
    weights = read_weights(saved.path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.skipif(not keeps_staging(torch.__version__), reason="this torch clears a stager after each save")
def test_memory_for_saves_is_kept_between_them_and_given_back_at_the_end(training: Training) -> None:
    stager = WatchedStager()
    checkpointer = make_checkpointer(training, stager)
    for step in (1, 2, 3):
        save(training, checkpointer, step)
    first, *others = stager.places
    assert others == [first, first]
    assert len(set(first.values())) == len(first)
    assert not stager.is_closed
    checkpointer.close()
    assert stager.is_closed


def test_a_save_goes_without_memory_that_cannot_be_had(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    options = StagingOptions(False, False, False, False)
    checkpointer = make_checkpointer(training, FailingStager(options))
    with caplog.at_level(logging.WARNING, logger="tunesmith"):
        for step in (1, 2):
            save(training, checkpointer, step)
    warned = [record.message for record in caplog.records if record.name == "tunesmith.train.checkpoint"]
    assert len(warned) == 1
    assert "CUDA error: out of memory" in warned[0]
    checkpointer.close()


def test_cpus_and_torches_that_clear_it_keep_no_memory_for_saves() -> None:
    assert build_stager("cpu") is None
    kept = {version: keeps_staging(version) for version in ("2.11.0+cu130", "2.13.0", "3.0.1")}
    assert kept == {"2.11.0+cu130": False, "2.13.0": True, "3.0.1": True}
