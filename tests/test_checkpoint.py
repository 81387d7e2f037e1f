"""Checkpoints: whole or absent, off the critical path, useful as they are."""

from __future__ import annotations

import json
import resource
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runs_at_hand import losses, small_config, start, train_here, write_rows
from tiny_models import save_model
from tokenizers_at_hand import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.errors import CheckpointError
from tunesmith.model.lora import ADAPTER_WEIGHTS
from tunesmith.runs import RunDir, iterate_metrics
from tunesmith.train.final import write_final
from tunesmith.train.start import ending_of, last_event


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(folder / "tiny", build_tokenizer("byte_bpe"))
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> TrainConfig:
    return small_config(
        folder / "tiny", folder / "rows.jsonl", tmp_path, max_steps=6, early_stopping_patience=0
    )


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Let every write beyond this size fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def adapter(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint_path(step) / ADAPTER_WEIGHTS)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("full_ft", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config: TrainConfig, full_ft: bool) -> None:
    config = config.model_copy(update={"full_ft": full_ft})
    job = start(config)
    run = train_here(job)
    before, weights = losses(run), trained_weights(run, 6)
    shutil.rmtree(run.checkpoint_path(6))
    train_here(job)
    assert losses(run) == before
    assert_equal(trained_weights(run, 6), weights)
    assert [
        line["step"] for line in iterate_metrics(run.metrics_path) if line["attempt"] == 2 and "loss" in line
    ] == [5, 6]


def trained_weights(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    from tunesmith.train.checkpoint import read_weights

    return read_weights(run.checkpoint_path(step))


def test_raising_max_steps_goes_on(config: TrainConfig) -> None:
    run = train_here(start(config.model_copy(update={"max_steps": 2})))
    assert ending_of(run) == "finished"
    train_here(start(config))
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]


def test_a_failed_write_keeps_the_checkpoint_before_it_and_says_so(config: TrainConfig) -> None:
    run = train_here(start(config.model_copy(update={"max_steps": 2})))
    kept = adapter(run, 2)
    job = start(config)
    with files_limited_to(30_000), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_here(job)
    assert ending_of(run) == "failed"
    assert "could not be written" in last_event(run, "failed")["message"]
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2]
    assert_equal(adapter(run, 2), kept)
    assert not list(run.path.glob(".unfinished_*")), "a full disk is not kept full"

    train_here(start(config))
    assert ending_of(run) == "finished"


def test_a_torn_state_is_an_error_that_names_the_folder(config: TrainConfig) -> None:
    job = start(config)
    run = train_here(job)
    shutil.rmtree(run.checkpoint_path(6))
    for path in (run.checkpoint_path(4) / "state").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="checkpoint_00000004"):
        train_here(job)


def test_a_worker_whose_driver_was_replaced_publishes_nothing(config: TrainConfig) -> None:
    from dataclasses import replace

    job = replace(start(config), lease_token="gone")
    train_here(job)
    assert job.run.checkpoints() == []


def test_final_holds_the_best_checkpoint_and_says_which(config: TrainConfig) -> None:
    # A rate that ruins the model after some steps: the best is not the last.
    config = config.model_copy(
        update={"learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    )
    run = train_here(start(config))
    measured = losses(run, "eval_loss")
    del measured[0]
    best = write_final(run, config, "cpu")
    assert best.step == min(measured, key=measured.__getitem__)
    assert_equal(load_file(run.final_path / ADAPTER_WEIGHTS), adapter(run, best.step))
    origin = json.loads((run.final_path / "tunesmith.json").read_text())
    assert (origin["run"], origin["checkpoint"]) == (str(run.path), best.path.name)
    write_final(run, config, "cpu")
    assert [path.name for path in run.final_path.parent.iterdir() if path.name.startswith(".")] == []


def test_a_checkpoint_carries_tokenizer_settings_and_a_format_version(config: TrainConfig) -> None:
    run = train_here(start(config))
    folder = run.checkpoint_path(6)
    assert (folder / "tokenizer.json").exists()
    assert json.loads((folder / "params.json").read_text())["settings"]["lora_rank"] == 4
    for name in ("params.json", "trainer_state.json"):
        assert json.loads((folder / name).read_text())["format_version"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_examples(config: TrainConfig) -> None:
    config = config.model_copy(
        update={"learning_rate": 1e30, "min_learning_rate": 1e30, "max_grad_norm": 0.0, "save_steps": 1}
    )
    run = train_here(start(config))
    assert ending_of(run) == "failed"
    failure = last_event(run, "failed")
    assert "lines" in failure["message"]
    assert "of training.jsonl" in failure["message"]
    last = run.latest_checkpoint()
    assert last is not None
    assert f"step {last.step + 1}:" in failure["message"], "the last good step is saved"
