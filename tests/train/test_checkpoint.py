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

from support.runs import ending_of, events, last_event, losses, small_config, start, train_here, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.api import fine_tune
from tunesmith.config import TrainConfig
from tunesmith.errors import CheckpointError, RunError
from tunesmith.export.final import write_final
from tunesmith.model.adapters.lora import ADAPTER_WEIGHTS
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import is_finished
from tunesmith.runs.metrics_log import find_ending, iterate_metrics, newest_attempt


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
    from tunesmith.model.files.state import read_weights

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
    best = write_final(run, config.model)
    assert best.step == min(measured, key=measured.__getitem__)
    assert_equal(load_file(run.final_path / ADAPTER_WEIGHTS), adapter(run, best.step))
    origin = json.loads((run.final_path / "tunesmith.json").read_text())
    assert (origin["run"], origin["checkpoint"]) == (run.path.name, best.path.name)
    write_final(run, config.model)
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


def test_every_save_is_recorded_even_if_the_next_one_is_near(config: TrainConfig) -> None:
    config = config.model_copy(update={"save_steps": 1})
    run = train_here(start(config))
    assert [event["step"] for event in events(run, "checkpoint")] == [1, 2, 3, 4, 5, 6]


def test_every_failed_save_is_said(config: TrainConfig) -> None:
    train_here(start(config.model_copy(update={"max_steps": 2})))
    job = start(config.model_copy(update={"save_steps": 1}))
    with files_limited_to(30_000), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_here(job)
    failures = [
        event for event in events(job.run, "checkpoint") if "could not be written" in event["message"]
    ]
    assert len(failures) == 4
    assert not list(job.run.path.glob(".unfinished_*"))


def test_a_finished_run_without_its_result_gets_it_without_training(config: TrainConfig) -> None:
    pytest.importorskip("ray")  # nothing is trained with it, but `fine_tune` looks for its workers first
    job = start(config)
    run = train_here(job)
    before = losses(run)
    result = fine_tune(config)
    assert (result.ending, result.exit_code) == ("finished", 0)
    assert run.holds_final()
    assert losses(run) == before
    with pytest.raises(RunError, match="is finished; its result lies in"):
        fine_tune(config)
    torn = run.checkpoint_path(4)
    shutil.rmtree(torn)
    assert run.holds_final()


def test_raised_settings_go_on_and_others_are_refused_with_what_to_raise(config: TrainConfig) -> None:
    def goes_on(**changes: object) -> bool:
        return not is_finished(run, config.model_copy(update=changes))

    run = train_here(start(config))
    assert goes_on(max_steps=7)
    assert not goes_on(max_steps=5)
    assert not goes_on(num_train_epochs=9.0)

    config = config.model_copy(update={"run_name": "epochs", "num_train_epochs": 1.0})
    run = train_here(start(config))
    assert not goes_on(max_steps=100)
    assert goes_on(max_steps=100, num_train_epochs=2.0)
    assert goes_on(max_steps=100, num_train_epochs=None)

    # No evaluation improves by 100 nats.
    changes = {
        "run_name": "early",
        "early_stopping_patience": 1,
        "early_stopping_threshold": 100.0,
        "eval_steps": 1,
    }
    config = config.model_copy(update={"num_train_epochs": None, "max_steps": 20, **changes})
    run = train_here(start(config))
    assert max(losses(run)) == 2
    assert goes_on(max_steps=21)
    assert goes_on(early_stopping_patience=2)
    assert goes_on(early_stopping_patience=0)
    assert not goes_on(max_steps=20)
    train_here(start(config.model_copy(update={"max_steps": 21})))
    assert max(losses(run)) == 3, "it has its whole patience again"


def test_an_attempt_that_breaks_off_does_not_end_as_the_one_before(config: TrainConfig) -> None:
    run = train_here(start(config))
    attempts = newest_attempt(run)
    assert find_ending(run) is not None
    assert find_ending(run, after_attempt=attempts) is None
    with run.metrics_path.open("a") as file:
        file.write(
            '{"step": 6, "attempt": 2, "event": "start"}\n{"step": 6, "attempt": 1, "event": "finished"}\n'
        )
    assert find_ending(run) is None


def test_a_full_models_result_keeps_the_bases_generation_settings(folder: Path, config: TrainConfig) -> None:
    model = config.home / "model"  # type: ignore[operator]
    shutil.copytree(folder / "tiny", model)
    settings = {"eos_token_id": [0, 5], "temperature": 0.6, "do_sample": True}
    (model / "generation_config.json").write_text(json.dumps(settings))
    config = config.model_copy(update={"model_path": model, "full_ft": True, "dtype": "bfloat16"})
    run = train_here(start(config))
    write_final(run, config.model)
    kept = json.loads((run.final_path / "generation_config.json").read_text())
    assert {name: kept[name] for name in settings} == settings
    weights = load_file(run.final_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_params_record_what_was_chosen_and_a_resumed_run_keeps_its_dtype(config: TrainConfig) -> None:
    config = config.model_copy(update={"max_steps": 2})
    run = train_here(start(config))
    resolved = run.read_params()["resolved"]
    assert resolved == {
        "dtype": "float32",
        "attn_implementation": "varlen",
        "fsdp": "no_shard",
        "gradient_checkpointing": "off",
        "num_workers": 1,
        "use_gpu": False,
        "groups_adapters": True,
    }
    # As if another machine, which computes in bfloat16 by itself, went on.
    train_here(start(config.model_copy(update={"max_steps": 4, "dtype": "auto"})))
    assert "float32" in last_event(run, "start")["message"]
